"""The text pool: a pure function of (seed, index) that reads everything once a pass."""

import json

import numpy as np
import pytest
from transformers import AutoTokenizer

from aura_jax.data.batch import Part
from aura_jax.data.prompts import CHATML, ChatFormat
from aura_jax.data.text_pool import Documents, TextPool, load_documents
from aura_jax.errors import UserError


def stream(first: int, lengths: list[int]) -> list[tuple[int, ...]]:
    """Documents whose tokens are consecutive numbers: a token tells its place."""
    ends = first + np.cumsum(lengths)
    return [tuple(range(end - length, end)) for end, length in zip(ends, lengths, strict=True)]


DOCUMENTS = Documents(stream(0, [7, 30, 3, 60]), stream(1000, [12, 12, 40]))


def test_rows_are_consecutive_tokens_with_segments_that_are_documents():
    pool = TextPool(DOCUMENTS, n_rows=4, n_tokens=10, chat_share=0.5)
    document = {token: i for i, tokens in enumerate(DOCUMENTS.prose + DOCUMENTS.chat) for token in tokens}
    for index in range(20):
        tokens, segment = pool.batch(index)
        assert tokens.shape == segment.shape == (4, 10) and tokens.dtype == segment.dtype == np.int32
        assert (np.diff(tokens, axis=1) == 1).all() and (segment[:, 0] == 1).all()
        assert ((tokens >= 1000).sum(axis=1) > 0).tolist() == [False, False, True, True]
        for row, numbers in zip(tokens, segment, strict=True):
            owners = np.array([document[token] for token in row])
            assert (np.diff(owners) == np.diff(numbers)).all()


def test_each_pass_takes_every_row_once_and_passes_differ():
    pool = TextPool(Documents(stream(0, [109]), []), n_rows=1, n_tokens=10)
    passes = [[int(pool.batch(p * 10 + i)[0][0, 0]) for i in range(10)] for p in range(4)]
    for starts in passes:
        assert len({start // 10 for start in starts}) == 10 and len({start % 10 for start in starts}) == 1
    assert len({tuple(starts) for starts in passes}) == 4


def test_a_pass_of_the_pool_has_read_every_row():
    documents = Documents(stream(0, [109]), stream(1000, [49]))  # ten rows of prose, four of chat
    make = lambda share: TextPool(documents, n_rows=4, n_tokens=10, chat_share=share)
    assert [make(share).batches_per_pass for share in (0, 0.25, 0.5, 1)] == [3, 4, 5, 1]
    starts = np.concatenate([make(0.25).batch(i)[0][:, 0] for i in range(4)])
    assert len({start // 10 for start in starts if start < 1000}) == 10
    assert len({start for start in starts if start >= 1000}) == 4


def test_it_is_pure_and_sliced_by_host():
    make = lambda seed: TextPool(DOCUMENTS, n_rows=4, n_tokens=10, seed=seed)
    whole = make(3).batch(17)
    np.testing.assert_array_equal(whole, make(3).batch(17))
    assert not np.array_equal(whole, make(4).batch(17))
    halves = [make(3).batch(17, Part((host,), 2)) for host in (0, 1)]
    np.testing.assert_array_equal(np.concatenate(halves, axis=1), whole)
    np.testing.assert_array_equal(make(3).batch(17, Part((0, 3), 4)), np.asarray(whole)[:, [0, 3]])
    with pytest.raises(UserError, match=r"data\.text_rows 4 is not a multiple of the 3 parts"):
        make(3).batch(0, Part((0,), 3))


def test_without_a_share_chat_has_a_row_at_least():
    few = Documents(stream(0, [1000]), stream(2000, [20]))
    tokens, _ = TextPool(few, n_rows=4, n_tokens=10).batch(0)
    assert (tokens[:, 0] >= 2000).sum() == 1
    tokens, _ = TextPool(Documents([], few.chat), n_rows=2, n_tokens=10).batch(0)
    assert (tokens >= 2000).all()


def test_mistakes():
    with pytest.raises(
        UserError, match=r"data\.text_pool has 100 tokens of prose, less than a row of 200.* lower data\.text_length"
    ):
        TextPool(DOCUMENTS, n_rows=2, n_tokens=200)
    with pytest.raises(UserError, match=r"data\.text_chat 2"):
        TextPool(DOCUMENTS, n_rows=2, n_tokens=10, chat_share=2)
    with pytest.raises(UserError, match=r"data\.text_pool has 0 tokens of chat"):
        TextPool(Documents(DOCUMENTS.prose, []), n_rows=2, n_tokens=10, chat_share=1)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", ":1: not JSON"),
        ("[]", ":1: not an object, but list"),
        ('{"texts": "a"}', ":1: neither"),
        ("", "no documents"),
    ],
)
def test_mistakes_in_files(tiny_llm_dir, tmp_path, line, message):
    chat = ChatFormat(AutoTokenizer.from_pretrained(tiny_llm_dir), CHATML)
    (tmp_path / "text.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=message):
        load_documents(tmp_path / "text.jsonl", chat)
    with pytest.raises(UserError, match="cannot be read"):
        load_documents(tmp_path / "none.jsonl", chat)


def test_documents_are_tokenised(tiny_llm_dir, tmp_path):
    chat = ChatFormat(AutoTokenizer.from_pretrained(tiny_llm_dir), CHATML)
    turns = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
    lines = [{"text": "Once upon a time.", "kind": "prose"}, {"messages": turns}]
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, lines)))
    documents = load_documents(tmp_path / "text.jsonl", chat)
    assert documents == ([chat.text("Once upon a time.")], [chat.conversation(turns)])
