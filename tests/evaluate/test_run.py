"""Evaluation of a set, with a system that knows all answers but some."""

import json

import numpy as np
import pytest
import soundfile

from aura_jax.data.manifest import load_manifest
from aura_jax.errors import UserError
from aura_jax.evaluate.run import evaluate_set, evaluate_sets, intent_classifier, read_request
from aura_jax.infer.generate import Reply

TEXTS = ["Open the door.", "Close the window.", "What time is it?", "Stop."]


class Fake:
    """Says the text whose number is the clip's length in tenths of a second, or the prompt."""

    batch_size = 2

    def __init__(self):
        self.lengths = []

    def generate(self, requests, progress=None):
        replies = []
        for request in requests:
            n = -1 if request.waveform is None else round(len(request.waveform) / 1600)
            self.lengths.append(n)
            replies.append(Reply(TEXTS[n - 1] if n > 0 else request.prompt, (), True, 0.0))
        if progress is not None:
            progress(len(requests))
        return replies


@pytest.fixture
def manifest(tmp_path):
    lines = []
    for n in (3, 1, 4, 2):
        soundfile.write(tmp_path / f"{n}.wav", np.zeros(1600 * n, np.float32), 16000)
        lines.append({"id": f"clip-{n}", "audio": f"{n}.wav", "text": TEXTS[n - 1], "intent": "abcd"[n - 1]})
    path = tmp_path / "set.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_outputs_keep_the_rows_order_and_batches_go_by_length(manifest):
    fake = Fake()
    result = evaluate_set(fake, load_manifest(manifest), progress=False, classifier=intent_classifier([manifest]))
    assert fake.lengths == [1, 2, 3, 4]
    assert [o.id for o in result.outputs] == ["clip-3", "clip-1", "clip-4", "clip-2"]
    assert all(o.reference == o.hypothesis for o in result.outputs)
    assert result.scores["n"] == 4 and result.scores["wer"]["value"] == 0
    assert result.scores["exact_match"]["value"] == result.scores["intent_accuracy"]["value"] == 1
    assert result.audio_seconds == pytest.approx(1.0) and result.seconds >= 0


def test_an_answer_is_compared_with_as_much_of_a_response_as_there_is(manifest):
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    for line in lines:
        line |= {"response": " ".join(line["text"].split()[:2]), "ended": line["id"] == "clip-3"}
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = evaluate_set(Fake(), load_manifest(manifest), progress=False)
    # "What time" was the whole response: "is it?" is too much there. Of "Open the" nothing more is known.
    assert found.scores["wer"]["value"] == 2 / 7 and found.scores["exact_match"]["value"] == 0.75
    assert found.outputs[1].hypothesis == "Open the door."


def test_a_clip_that_cannot_be_read(manifest, tmp_path):
    (tmp_path / "1.wav").write_bytes(b"no audio")
    rows = load_manifest(manifest)
    with pytest.raises(UserError, match=r"1\.wav"):
        evaluate_set(Fake(), rows, progress=False)
    result = evaluate_set(Fake(), rows, skip_unreadable=True, progress=False)
    assert result.scores["n"] == 3
    assert len(result.unreadable) == 1 and "set.jsonl:2" in result.unreadable[0]


def test_chat_rows_are_answered_and_plain_text_is_refused(tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text('{"prompt": "Say yes.", "response": "Say yes."}\n')
    result = evaluate_set(Fake(), load_manifest(path), progress=False)
    assert result.scores["exact_match"]["value"] == 1 and "intent_accuracy" not in result.scores
    path.write_text('{"text": "Just prose."}\n')
    with pytest.raises(UserError, match=r"chat\.jsonl:1: plain text"):
        evaluate_set(Fake(), load_manifest(path), progress=False)


def test_nothing_to_evaluate_says_so():
    with pytest.raises(UserError, match="no row"):
        evaluate_set(Fake(), [], progress=False)


def test_a_manifest_without_intents_has_no_classifier(sample_data):
    assert intent_classifier([sample_data / "recordings" / "test.jsonl"]) is None
    assert intent_classifier([sample_data / "commands" / "train.jsonl"]) is not None


def write(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return load_manifest(path)


def test_a_row_is_scored_as_it_asks_for(tmp_path):
    question = {"choices": ["Rome", "Paris"], "answer": "B", "response": "unused"}
    rows = write(
        tmp_path / "mixed.jsonl",
        {"prompt": "Stop.", "response": "Stop now."},
        {**question, "prompt": "The answer is B."},
        {**question, "prompt": "A or B"},
        {"prompt": "Das ist ein kleines Haus.", "response": "Das ist ein kleines Haus.", "metric": "bleu"},
        {"prompt": "It has twelve sides.", "response": "unused", "answers": ["12", "a dozen"]},
        {"prompt": "It has one hundred twelve.", "response": "unused", "answers": ["12", "a dozen"]},
    )
    result = evaluate_set(Fake(), rows, progress=False)
    assert result.scores["n"] == 6
    assert {name: s["n"] for name, s in result.scores.items() if name != "n"} == {
        "wer": 1, "cer": 1, "exact_match": 1, "bleu": 1, "multiple_choice": 2, "unparsable": 2,
        "answered": 2,
    }  # fmt: skip
    assert result.scores["wer"]["value"] == 0.5 and result.scores["bleu"]["value"] == pytest.approx(100)
    assert result.scores["multiple_choice"]["value"] == result.scores["unparsable"]["value"] == 0.5
    assert result.scores["answered"]["value"] == 0.5
    references = ["Stop now.", "B. Paris", "B. Paris", "Das ist ein kleines Haus.", "12", "12"]
    assert [o.reference for o in result.outputs] == references
    plain = evaluate_set(Fake(), rows, progress=False, by_row=False)
    assert set(plain.scores) == {"n", "wer", "cer", "exact_match"} and plain.scores["wer"]["n"] == 6
    assert plain.outputs[1].reference == "unused"


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"metric": "blue"}, r"set\.jsonl:1: unknown 'metric' 'blue': did you mean 'bleu'\?"),
        ({"metric": "bleu", "choices": ["a", "b"], "answer": "A"}, r"set\.jsonl:1: both 'choices' and 'metric'"),
        ({"choices": ["a", "b"]}, r"set\.jsonl:1: 'choices' without an 'answer'"),
        ({"answers": "Paris"}, r"set\.jsonl:1: 'answers' is not a list of texts"),
        ({"answers": ["Paris", "#"]}, r"set\.jsonl:1: 'answers' has '#', of which the normaliser leaves no word"),
        ({"answers": ["a"], "choices": ["a", "b"], "answer": "A"}, r"set\.jsonl:1: both 'choices' and 'answers'"),
    ],
)
def test_a_mistake_in_how_a_row_is_scored_comes_before_decoding(tmp_path, tiny_config, keys, match):
    write(tmp_path / "good.jsonl", {"prompt": "Say yes.", "response": "Say yes."})
    write(tmp_path / "set.jsonl", {"prompt": "x", "response": "y", **keys})
    fake = Fake()
    with pytest.raises(UserError, match=match) as caught:
        evaluate_sets(fake, {name: tmp_path / f"{name}.jsonl" for name in ("good", "set")}, tiny_config())
    assert fake.lengths == [] and "\n" not in str(caught.value)


def test_a_spoken_question_wants_its_answer_and_another_clip_its_transcript(manifest):
    line = json.loads(manifest.read_text().splitlines()[0])
    clip, question, answer = write(manifest, line, line | {"answers": ["seven"]}, line | {"response": "Seven."})
    assert [read_request(row).wants_transcript for row in (clip, question, answer)] == [True, False, False]


def test_a_translation_needs_a_response(manifest):
    lines = [json.loads(line) | {"metric": "bleu"} for line in manifest.read_text().splitlines()]
    with pytest.raises(UserError, match=r"set\.jsonl:1: 'metric' is bleu, and there is no 'response'"):
        evaluate_set(Fake(), write(manifest, *lines), progress=False)


def test_what_is_heard_can_be_changed(manifest):
    fake = Fake()
    result = evaluate_set(fake, load_manifest(manifest), progress=False, change=lambda row, clip: clip[:1600])
    assert set(fake.lengths) == {1} and {o.hypothesis for o in result.outputs} == {TEXTS[0]}
