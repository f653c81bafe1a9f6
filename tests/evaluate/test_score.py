"""Scores against jiwer, and on texts that the normaliser empties."""

import json

import jiwer
import numpy as np
import pytest

from aura_jax.errors import UserError
from aura_jax.evaluate.score import IntentClassifier, interval, normalise, score, table, word_errors


def test_normalisation_is_whispers():
    assert normalise("What's the colour of, um, forty two?") == "what is the color of 42"
    assert normalise("Turn ON the kitchen-lights!") == "turn on the kitchen lights"
    assert normalise("#") == normalise("mm") == normalise("") == ""


def test_wer_equals_jiwer(sample_data):
    lines = (sample_data / "recordings" / "train.jsonl").read_text().splitlines()[:150]
    references = [json.loads(line)["text"] for line in lines]
    random = np.random.default_rng(0)
    hypotheses = []
    for text in references:
        words = [word for word in text.split() if random.random() > 0.1]
        hypotheses.append(" ".join(words[:3] + ["surprise"] * int(random.integers(0, 2)) + words[3:]))
    kept = [
        (r, h) for r, h in zip(references, hypotheses, strict=True) if normalise(r)
    ]  # jiwer takes no empty reference
    expected = jiwer.wer([normalise(r) for r, _ in kept], [normalise(h) for _, h in kept])
    scores = score([r for r, _ in kept], [h for _, h in kept])
    assert scores["wer"]["value"] == pytest.approx(expected, abs=1e-12)
    assert scores["n"] == len(kept) and 0 < expected < 1
    assert scores["wer"]["low"] < expected < scores["wer"]["high"]


def test_empty_references_and_hypotheses_count_as_insertions_and_deletions():
    assert word_errors("#", "number sign") == (2, 0)
    assert word_errors("Hello there", "") == (2, 2)
    assert word_errors("", "") == (0, 0)
    scores = score(["#", "mm", "g"], ["hash", "", "g"])
    assert scores["wer"]["value"] == 1.0  # one insertion over the one word
    assert scores["exact_match"]["value"] == pytest.approx(2 / 3)
    assert score(["#"], ["hash"])["wer"] == {"value": 1.0, "low": 1.0, "high": 1.0}


def test_interval_covers_and_is_reproducible():
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(100):
        sample = random.random(80) < 0.3
        found = interval(sample, np.ones(80), n_resamples=200)
        covered += found["low"] <= 0.3 <= found["high"]
        assert found["low"] <= found["value"] <= found["high"]
    assert 85 <= covered <= 100
    assert interval(sample, np.ones(80)) == interval(sample, np.ones(80))
    assert interval(sample, np.ones(80), seed=1) != interval(sample, np.ones(80))


def test_intents_by_the_nearest_training_sentence(sample_data):
    rows = [json.loads(line) for line in (sample_data / "commands" / "train.jsonl").read_text().splitlines()]
    classifier = IntentClassifier([(row["text"], row["intent"]) for row in rows])
    assert all(classifier.classify(row["text"]) == row["intent"] for row in rows)
    assert classifier.classify("Remind me to buy some mild tomorrow.") == "remind"
    scores = score(
        ["Set a timer for forty minutes.", "Close the door."],
        ["Set a timer", "Set a timer"],
        ["timer", "close"],
        classifier,
    )
    assert scores["intent_accuracy"]["value"] == 0.5
    assert isinstance(classifier.classify(""), str)


def test_ties_go_to_the_majority():
    classifier = IntentClassifier([("turn on a b", "on"), ("turn off a c", "off"), ("turn off a d", "off")])
    assert classifier.classify("turn off a b") == "off"


def test_table_lines_up():
    lines = table({"one": score(["a b"], ["a b"]), "another set": score(["a", "b"], ["a", "c"])}).splitlines()
    assert lines[0].split() == ["set", "n", "WER", "%", "exact", "match", "%"]
    assert "50.0 [0.0, 100.0]" in lines[2]
    assert len({len(line) for line in lines}) == 1


def test_an_empty_set_says_so():
    with pytest.raises(UserError, match="empty"):
        score([], [])
    with pytest.raises(UserError, match="intent"):
        IntentClassifier([])
