"""Clips: the same by seed and place, whatever was there, however many hours are asked for."""

import json

import numpy as np
import pytest

from aura_jax.audio.io import audio_seconds
from aura_jax.data.manifest import load_manifest
from aura_jax.errors import UserError
from aura_jax.synthesis.clips import choose_voices, write
from aura_jax.synthesis.pronounce import Unspoken
from aura_jax.synthesis.sentences import Utterance

VOICES = ["anna", "ben", "cleo", "dora"]
TEXTS = [Utterance(f"This is text {letter}.", {"answers": [letter]}) for letter in "abcdefgh"]
TEXTS.insert(3, Utterance("It was in 1984.", {}))


class Fake:
    """Says a tone, whose length is of the text, the voice and the speed; refuses digits; `said` lists what it said."""

    model = "fake"
    voices = VOICES

    def __init__(self, stop_after=None):
        self.said, self._stop_after = [], stop_after

    def check(self, text):
        if any(c.isdigit() for c in text):
            raise Unspoken("a sign: digits")

    def speak(self, text, voice, speed):
        if len(self.said) == self._stop_after:
            raise KeyboardInterrupt
        self.said.append((text, voice, speed))
        n = round(8000 / speed) + 40 * VOICES.index(voice) + ord(text[-2])
        return 0.1 * np.sin(np.arange(n) / 5).astype(np.float32)


def rows_of(output):
    return [json.loads(line) for line in (output.parent / f"{output.name}.jsonl").read_text().splitlines()]


def make(output, synthesizer=None, **how):
    how = {"voices": VOICES, "progress": False, **how}
    return write(TEXTS, output, synthesizer or Fake(), **how)


def test_every_text_is_spoken_once_and_the_manifest_says_how(tmp_path):
    report = make(tmp_path / "clips")
    rows = rows_of(tmp_path / "clips")
    assert [row["text"] for row in rows] == [u.text for u in TEXTS if "1984" not in u.text]
    assert report.n_clips == 8 and report.left_out == {"a sign": 1} and "1 texts left out: 1 a sign" in report.summary
    for row, loaded in zip(rows, load_manifest(tmp_path / "clips.jsonl"), strict=True):
        assert row["answers"] == [row["text"][-2]] and row["voice"] in VOICES
        assert row["seconds"] == pytest.approx(audio_seconds(loaded.audio), abs=1e-3)
    assert len({row["voice"] for row in rows}) > 1
    assert report.seconds == pytest.approx(sum(row["seconds"] for row in rows))


@pytest.mark.parametrize("n_threads", [1, 3])
def test_a_stop_changes_nothing(tmp_path, n_threads):
    make(tmp_path / "whole" / "clips", readings=2)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "clips", Fake(stop_after=5), readings=2, n_threads=n_threads)
    assert not (tmp_path / "clips.jsonl").exists()
    there = {path.name for path in (tmp_path / "clips").glob("*.ogg")}
    assert 0 < len(there) <= 5
    report = make(tmp_path / "clips", again := Fake(), readings=2, n_threads=n_threads)
    assert report.n_kept == len(there) and len(again.said) == 16 - len(there)
    assert (tmp_path / "clips.jsonl").read_bytes() == (tmp_path / "whole" / "clips.jsonl").read_bytes()
    for path in (tmp_path / "whole" / "clips").glob("*.ogg"):
        assert audio_seconds(path) == audio_seconds(tmp_path / "clips" / path.name)


def test_more_hours_are_the_clips_that_are_there_and_further_ones(tmp_path):
    fake = Fake()
    make(tmp_path / "clips", fake, hours=1.2 / 3600)
    few = rows_of(tmp_path / "clips")
    report = make(tmp_path / "clips", fake, hours=2.4 / 3600)
    more = rows_of(tmp_path / "clips")
    assert 0 < len(few) < len(more) < 8 and more[: len(few)] == few and report.n_kept == len(few)
    assert sum(row["seconds"] for row in more[:-1]) < 2.4 <= sum(row["seconds"] for row in more)
    by_id = {row["id"]: row for row in rows_of_all(tmp_path)}
    assert all(by_id[row["id"]]["seconds"] == row["seconds"] for row in more)
    assert [row["id"] for row in more] != sorted((row["id"] for row in more), key=lambda name: name[-6:])
    report = make(tmp_path / "clips", hours=1)
    assert report.n_clips == 8 and "of 1 h: there is no more text" in report.summary


def rows_of_all(tmp_path):
    make(tmp_path / "all")
    return rows_of(tmp_path / "all")


def test_readings_are_by_different_voices_and_another_seed_draws_others(tmp_path):
    make(tmp_path / "one", readings=3, speeds=(0.9, 1.1))
    make(tmp_path / "two", fake := Fake(), readings=3, seed=1, speeds=(0.9, 1.1))
    rows = rows_of(tmp_path / "one")
    for utterance in TEXTS[:3]:
        assert len({row["voice"] for row in rows if row["text"] == utterance.text}) == 3
    assert [row["voice"] for row in rows] != [row["voice"] for row in rows_of(tmp_path / "two")]
    assert all(0.9 <= speed <= 1.1 for _, _, speed in fake.said) and len({speed for *_, speed in fake.said}) > 12


def test_clips_of_another_making_are_not_gone_on_with(tmp_path):
    make(tmp_path / "clips")
    other = Fake()
    other.model = "another"
    for how, match in (
        ({"seed": 1}, r"clips: written with another --seed \(0, now 1\)"),
        ({"voices": VOICES[:2]}, "another --voices"),
        ({"synthesizer": other}, r"another model \(fake, now another\)"),
    ):
        with pytest.raises(UserError, match=match):
            make(tmp_path / "clips", **how)
    with pytest.raises(UserError, match=r"another text"):
        write(TEXTS[1:], tmp_path / "clips", Fake(), voices=VOICES, progress=False)
    (tmp_path / "clips" / "making.json").write_text("{")
    with pytest.raises(UserError, match=r"making\.json: damaged"):
        make(tmp_path / "clips")
    (tmp_path / "clips" / "making.json").unlink()
    with pytest.raises(UserError, match=r"no making\.json"):
        make(tmp_path / "clips")


@pytest.mark.parametrize(
    ("how", "match"),
    [
        ({"speeds": (1.2, 0.8)}, "--speeds 1.2,0.8"),
        ({"speeds": (0.1, 1.0)}, "between 0.5 and 2"),
        ({"hours": 0}, "--hours must be more than 0"),
        ({"readings": 5}, r"from 1 to the number of voices \(4\)"),
    ],
)
def test_mistakes_are_said_in_one_line(tmp_path, how, match):
    with pytest.raises(UserError, match=match) as caught:
        make(tmp_path / "clips", **how)
    assert "\n" not in str(caught.value) and not (tmp_path / "clips").exists()


def test_nothing_that_can_be_spoken_says_so(tmp_path):
    with pytest.raises(UserError, match="none of 1 texts can be spoken as written: a sign"):
        write(TEXTS[3:4], tmp_path / "clips", Fake(), voices=VOICES)


def test_voices_are_chosen_by_name_and_tests_keep_theirs():
    assert choose_voices(None, VOICES, ["ben"]) == ["anna", "cleo", "dora"]
    assert choose_voices("all", VOICES, ["ben"]) == VOICES
    assert choose_voices("dora, ben", VOICES, ["ben"]) == ["ben", "dora"]
    with pytest.raises(UserError, match="unknown voice 'bem': did you mean 'ben'"):
        choose_voices("anna,bem", VOICES, [])
