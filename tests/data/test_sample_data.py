"""The data that comes with the project: complete, licensed, and with nothing held out in the training text."""

import json
import re

import pytest

from aura_jax.evaluate.score import read_accepted
from aura_jax.synthesis.kokoro import TEST_VOICES


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def questions(documents) -> set[str]:
    return {turn["content"] for d in documents for turn in d.get("messages", []) if turn["role"] == "user"}


@pytest.fixture(scope="module")
def text(sample_data):
    return {name: lines(sample_data / "text" / f"{name}.jsonl") for name in ("train", "validation", "questions")}


def test_held_out_text_is_of_other_works_and_questions(text):
    train, validation = text["train"], text["validation"]
    sources = [{d["source"] for d in part if d["kind"] != "chat"} for part in (train, validation)]
    assert sources[0] and sources[1] and not sources[0] & sources[1]
    asked = questions(train)
    assert len(asked) >= 200 and len(questions(validation)) >= 40
    assert not asked & questions(validation)
    assert not (asked | questions(validation)) & {q["prompt"] for q in text["questions"]}


def test_documents_are_well_formed(text):
    for document in text["train"] + text["validation"]:
        assert {"kind", "source"} <= set(document)
        if document["kind"] == "chat":
            roles = [turn["role"] for turn in document["messages"]]
            assert roles == ["user", "assistant"] * (len(roles) // 2) and roles
            assert all(turn["content"].strip() for turn in document["messages"])
        else:
            assert len(document["text"]) > 100 and "\ufffd" not in document["text"]
    assert all(re.compile(pattern) for question in text["questions"] for pattern in question["patterns"])
    assert len(text["questions"]) == 10


def test_every_work_has_its_licence_named(text, sample_data):
    readme = (sample_data / "text" / "README.md").read_text(encoding="utf-8")
    for document in text["train"] + text["validation"]:
        if document["kind"] != "chat":
            name = document["source"].partition(" (")[0].partition(", ")
            title = name[0] if name[0].startswith(("King James", "SQLite", "XZ")) else name[2] or name[0]
            assert title.split(" documentation")[0].partition(" and amend")[0] in readme, document["source"]
    assert "CC0" in readme
    assert "CC-BY-SA-3.0" in (sample_data / "recordings" / "LICENSE.md").read_text(encoding="utf-8")


def test_every_clip_is_there_and_no_other(sample_data):
    for folder in ("commands", "questions", "recordings"):
        named = {row["audio"] for path in (sample_data / folder).glob("*.jsonl") for row in lines(path)}
        present = {str(path.relative_to(sample_data / folder)) for path in (sample_data / folder).rglob("*.ogg")}
        assert named == present


def test_no_test_voice_is_in_training(sample_data):
    voices = lambda name: {row["voice"] for row in lines(sample_data / "commands" / f"{name}.jsonl")}
    sentences = lambda name: {row["text"] for row in lines(sample_data / "commands" / f"{name}.jsonl")}
    assert not voices("train") & (voices("test_new_voices") | voices("test_new_voices_and_sentences"))
    assert not sentences("train") & (sentences("test_new_sentences") | sentences("test_new_voices_and_sentences"))


def test_questions_have_answers_and_what_is_new_is_new(sample_data, text):
    folder = sample_data / "questions"
    sets = {path.stem: lines(path) for path in folder.glob("*.jsonl")}
    of = lambda key, *names: {row[key] for name in names for row in sets[name]}
    new_voices, new_questions, both = (f"test_new_{x}" for x in ("voices", "questions", "voices_and_questions"))
    assert set(sets) == {"train", "validation", new_voices, new_questions, both}
    assert not of("voice", "train", "validation") & of("voice", new_voices, both)
    assert of("voice", new_questions) <= of("voice", "train") and not of("voice", "train") & of("voice", "validation")
    assert not of("text", "train") & of("text", "validation", new_questions, both)
    assert of("text", new_voices) == of("text", "train") and of("text", new_questions) == of("text", both)
    elsewhere = questions(text["train"] + text["validation"]) | {q["prompt"] for q in text["questions"]}
    for name, rows in sets.items():
        assert not of("text", name) & elsewhere
        for row in rows:
            accepted = read_accepted(row, name)
            assert accepted is not None and not accepted.answered_by(row["text"]), row["text"]
    commands = {row["voice"] for row in lines(sample_data / "commands" / "test_new_voices.jsonl")}
    assert of("voice", new_voices) | of("voice", both) <= commands == set(TEST_VOICES)
    assert sum(path.stat().st_size for path in folder.rglob("*")) < 5 << 20
