"""Scores against jiwer, and on texts that the normaliser empties."""

import json

import jiwer
import numpy as np
import pytest
import sacrebleu

from aura_jax.errors import UserError
from aura_jax.evaluate.score import (
    IntentClassifier,
    bleu,
    character_errors,
    interval,
    normalise,
    read_accepted,
    score,
    score_answered,
    table,
    word_errors,
)


def test_normalisation_is_whispers():
    assert normalise("What's the colour of, um, forty two?") == "what is the color of 42"
    assert normalise("Turn ON the kitchen-lights!") == "turn on the kitchen lights"
    assert normalise("#") == normalise("mm") == normalise("") == ""


def test_wer_and_cer_equal_jiwer(sample_data):
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
    expected_cer = jiwer.cer([normalise(r) for r, _ in kept], [normalise(h) for _, h in kept])
    assert scores["cer"]["value"] == pytest.approx(expected_cer, abs=1e-12)
    assert scores["cer"]["low"] < expected_cer < scores["cer"]["high"]
    assert scores["n"] == len(kept) and 0 < expected < 1
    assert scores["wer"]["low"] < expected < scores["wer"]["high"]


def test_empty_references_and_hypotheses_count_as_insertions_and_deletions():
    assert word_errors("#", "number sign") == (2, 0)
    assert word_errors("Hello there", "") == (2, 2)
    assert word_errors("", "") == (0, 0)
    assert character_errors("#", "a b") == (3, 0) and character_errors("Ab, c", "ab c!") == (0, 4)
    scores = score(["#", "mm", "g"], ["hash", "", "g"])
    assert scores["wer"]["value"] == 1.0  # one insertion over the one word
    assert scores["exact_match"]["value"] == pytest.approx(2 / 3)
    assert score(["#"], ["hash"])["wer"] == {"value": 1.0, "low": 1.0, "high": 1.0, "n": 1}


def test_interval_covers_and_is_reproducible():
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(100):
        sample = random.random(80) < 0.3
        found = interval(sample, np.ones(80), n_resamples=200)
        assert found["n"] == 80
        covered += found["low"] <= 0.3 <= found["high"]
        assert found["low"] <= found["value"] <= found["high"]
    assert 85 <= covered <= 100
    assert interval(sample, np.ones(80)) == interval(sample, np.ones(80))
    assert interval(sample, np.ones(80), seed=1) != interval(sample, np.ones(80))


def test_bleu_is_sacrebleus_and_resampled_as_it_would_resample():
    random = np.random.default_rng(0)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "looked", "at", "its", "own", "tail", "for", "hours"]
    references = [" ".join(random.choice(words, 9)).capitalize() + "." for _ in range(20)]
    hypotheses = [" ".join(w if random.random() > 0.3 else "dog" for w in r.split()) for r in references]
    hypotheses[3] = ""
    found = bleu(references, hypotheses, n_resamples=50)
    assert found["value"] == pytest.approx(sacrebleu.corpus_bleu(hypotheses, [references]).score, abs=1e-9)
    assert 0 < found["value"] < 100 and found["n"] == 20
    random, values = np.random.default_rng(0), []
    for _ in range(50):
        index = random.integers(0, 20, 20)
        values.append(sacrebleu.corpus_bleu([hypotheses[i] for i in index], [[references[i] for i in index]]).score)
    assert [found["low"], found["high"]] == pytest.approx(np.quantile(values, [0.025, 0.975]).tolist(), abs=1e-9)
    assert bleu(["Yes, it is so."], ["Yes, it is so."])["low"] == pytest.approx(100)
    assert bleu(["Yes."], [""])["value"] == 0


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
    some = score(["Set a timer.", "Close the door."], ["Set a timer", "Set a timer"], ["timer", None], classifier)
    assert (some["intent_accuracy"]["value"], some["intent_accuracy"]["n"]) == (1.0, 1)
    assert isinstance(classifier.classify(""), str)


def test_ties_go_to_the_majority():
    classifier = IntentClassifier([("turn on a b", "on"), ("turn off a c", "off"), ("turn off a d", "off")])
    assert classifier.classify("turn off a b") == "off"


def test_table_lines_up():
    lines = table({"one": score(["a b"], ["a b"]), "another set": score(["a", "b"], ["a", "c"])}).splitlines()
    assert lines[0].split() == ["set", "n", "WER", "%", "CER", "%", "exact", "match", "%"]
    assert "50.0 [0.0, 100.0]" in lines[2]
    assert len({len(line) for line in lines}) == 1


def test_table_shows_whatever_scores_there_are():
    half = {"value": 0.5, "low": 0.25, "high": 0.75, "n": 4}
    sets = {
        "questions": {"n": 4, "multiple_choice": half, "unparsable": half},
        "german": {"n": 2, "bleu": {"value": 31.25, "low": 20.0, "high": 40.0, "n": 2}},
    }
    head, questions, german = table(sets).splitlines()
    assert head.split() == ["set", "n", "BLEU", "multiple", "choice", "%", "unparsable", "%"]
    assert questions.split() == ["questions", "4", "-", *["50.0", "[25.0,", "75.0]"] * 2]
    assert german.split() == ["german", "2", "31.2", "[20.0,", "40.0]", "-", "-"]


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("There are twelve months.", True),
        ("12!", True),
        ("A DOZEN, of course", True),
        ("There are 112 of them.", False),
        ("A dozenth", False),
        ("Twelve hundred", False),
        ("", False),
    ],
)
def test_a_question_is_answered_by_whole_words_as_the_normaliser_leaves_them(text, right):
    question = read_accepted({"answers": ["twelve", "a dozen"]}, "set.jsonl:1")
    assert question is not None and question.answered_by(text) == right
    assert score_answered([text], [question])["answered"] == {"value": right, "low": right, "high": right, "n": 1}


def test_an_empty_set_says_so():
    with pytest.raises(UserError, match="empty"):
        score([], [])
    with pytest.raises(UserError, match="intent"):
        IntentClassifier([])
