"""Texts to speak: lines as they are, or cut into sentences, without what is not heard."""

import json

import pytest

from aura_jax.errors import UserError
from aura_jax.synthesis.sentences import normalise, read


def test_what_is_not_heard_goes_and_the_words_stay():
    assert normalise("\u201cIt\u2019s  _true_,\u201d she said--'now'.") == "It's true, she said \u2014 now."
    assert normalise('\u2014 "Don\'t!"') == "Don't!"
    assert normalise("Add --force -- or not --") == "Add --force \u2014 or not"


def test_lines_are_kept_whole_with_their_other_keys(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"text": "Stop. Now!", "answers": ["x"], "id": "7", "seconds": 2}) + "\n")
    ((text, extra),) = read(path)
    assert text == "Stop. Now!" and extra == {"answers": ["x"]}
    (tmp_path / "t.txt").write_text("One line.\n\nAnother line.\n")
    assert [u.text for u in read(tmp_path / "t.txt")] == ["One line.", "Another line."]


def test_documents_are_cut_into_sentences_of_some_length_each_once(tmp_path):
    long = "So it went on and on " * 9
    text = f"He met Mr. Smith at the old mill. Short one. {long}.\n\n\u201cWhere did you put the red ball, Anna?\u201d"
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": "and this one begins in the middle."}]
    path = tmp_path / "docs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ({"text": text, "kind": "prose"}, {"messages": turns})))
    found = read(path, (7, 37))
    assert [u.text for u in read(path, (2, 7))] == ["Short one."]
    assert [u.text for u in found] == ["He met Mr. Smith at the old mill.", "Where did you put the red ball, Anna?"]
    assert found[0].extra == {"kind": "prose"}


def test_a_file_without_texts_says_so(tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_text('{"txt": "x"}\n')
    with pytest.raises(UserError, match=r"f\.jsonl:1: neither 'text' nor 'messages'"):
        read(path)
    path.write_text('{"text": "Short."}\n')
    with pytest.raises(UserError, match=r"f\.jsonl: no sentence of 7 to 37 words"):
        read(path, (7, 37))
    with pytest.raises(UserError, match=r"sentences of 9 to 3 words: give the fewest"):
        read(path, (9, 3))
    with pytest.raises(UserError, match=r"none\.txt: cannot be read"):
        read(tmp_path / "none.txt")
