"""Noise of the rows of a set: what it depends on, and whose voices a babble is of."""

import json

import numpy as np
import pytest
import soundfile

from aura_jax.audio.io import load_audio
from aura_jax.data.manifest import load_manifest
from aura_jax.errors import UserError
from aura_jax.evaluate.noise import Noise, noise_table, noises
from aura_jax.evaluate.run import evaluate_kept
from aura_jax.infer.generate import Reply


def write_set(folder, voices, text_rows=0):
    """Writes a set of clips of these voices; None: the row has none."""
    folder.mkdir(exist_ok=True)
    lines = []
    for i, voice in enumerate(voices):
        clip = 0.1 * np.random.default_rng(i).standard_normal(800 + 160 * i)
        soundfile.write(folder / f"{i}.wav", clip.astype(np.float32), 16000, subtype="FLOAT")
        line = {"id": f"row-{i}", "audio": f"{i}.wav", "text": "hello", "intent": "greet"}
        lines.append(line | ({"voice": voice} if voice else {}))
    lines += [{"prompt": "Hello", "response": "Hello"}] * text_rows
    path = folder / "set.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_row_s_noise_depends_on_seed_id_and_kind(tmp_path):
    path = write_set(tmp_path, ["ann", "ben", "cy", "di"])
    rows = load_manifest(path)
    for kind in ("white", "babble"):
        noise = Noise(kind, rows, name="s")
        shuffled = Noise(kind, [rows[i] for i in (2, 0, 3, 1)], name="s")
        for row in rows:
            assert (noise.of(row, 500) == shuffled.of(row, 500)).all()
        assert (noise.of(rows[0], 500) != noise.of(rows[1], 500)).any()
        assert (noise.of(rows[0], 500) != Noise(kind, rows, name="s", seed=1).of(rows[0], 500)).any()
    white, crowd = (Noise(kind, rows, name="s").of(rows[0], 500) for kind in ("white", "babble"))
    assert (white != crowd).any()


def test_the_ratio_only_scales_the_noise(tmp_path):
    rows = load_manifest(write_set(tmp_path, [None, None, None]))
    noise, clip = Noise("babble", rows, name="s"), load_audio(rows[1].audio)
    added = {db: noise.at(db)(rows[1], clip).astype(np.float64) - clip for db in (20.0, 0.0)}
    assert np.abs(added[0.0] - 10 * added[20.0]).max() < 1e-4 * np.abs(added[0.0]).max()
    assert np.mean(added[0.0] ** 2) == pytest.approx(np.mean(clip.astype(np.float64) ** 2), rel=1e-4)


def talkers(noise, row):
    return {noise._clips[i].rpartition("/")[2] for i in noise._talkers(row)}


def test_a_babble_is_of_other_voices_where_they_are_known(tmp_path):
    rows = load_manifest(write_set(tmp_path, ["ann", "ann", "ben", "cy", None]))
    noise = Noise("babble", rows, name="s")
    assert talkers(noise, rows[0]) == {"2.wav", "3.wav"}
    assert talkers(noise, rows[2]) == {"0.wav", "1.wav", "3.wav"}
    assert talkers(noise, rows[4]) == {"0.wav", "1.wav", "2.wav", "3.wav"}


def test_a_babble_is_the_sum_of_its_talkers(tmp_path):
    rows = load_manifest(write_set(tmp_path, ["ann", "ben", "cy"]))
    one = Noise("babble", rows, name="s").of(rows[0], 700)
    # Each talker, looped from every place: the babble is the sum of one of each.
    looped = []
    for i in (1, 2):
        clip = load_audio(rows[i].audio).astype(np.float64)
        clip /= np.sqrt(np.mean(clip**2))
        looped.append(np.stack([np.resize(np.roll(clip, -start), 700) for start in range(len(clip))]))
    scores = [np.argmax(of_clip @ one) for of_clip in looped]
    assert np.abs(looped[0][scores[0]] + looped[1][scores[1]] - one).max() < 1e-4


def test_sets_are_heard_in_noise(tmp_path, tiny_config):
    sets = {"a": load_manifest(write_set(tmp_path / "a", ["ann", "ben", "cy"], text_rows=1))}
    sets["b"] = load_manifest(write_set(tmp_path / "b", [None] * 3))
    c = tiny_config()
    assert noises(c, sets) == {}
    c.eval.noise.update(kinds=("white", "babble"))
    found = noises(c, sets)
    assert {name: set(kinds) for name, kinds in found.items()} == {"a": {"white", "babble"}, "b": {"white", "babble"}}
    assert len(found["a"]["white"].rows) == 3  # text makes no sound
    c.eval.noise.update(sets=("b",))
    assert set(noises(c, sets)) == {"b"}


class Listens:
    """Remembers what it heard."""

    batch_size = 2

    def __init__(self):
        self.heard = []

    def generate(self, requests, progress=None):
        self.heard += [request.waveform for request in requests]
        return [Reply("hello", (), True, 0.0) for _ in requests]


def test_the_system_hears_the_mixture(tmp_path):
    rows = load_manifest(write_set(tmp_path, ["ann", "ben", "cy"]))
    noise, answers = Noise("babble", rows, name="s"), Listens()
    found = evaluate_kept(answers, rows, ["s", "babble", "5 dB"], None, change=noise.at(5.0))
    assert found["scores"]["n"] == 3 and found["scores"]["wer"]["value"] == 0
    for row, heard in zip(rows, answers.heard, strict=True):  # the clips are longer from row to row
        assert (heard == noise.at(5.0)(row, load_audio(row.audio))).all()


@pytest.mark.parametrize(
    ("voices", "match"),
    [
        (["ann", "ann", "ann"], r"set\.jsonl:1: 0 other clips of other voices than 'ann' in the set 's'.*needs 2"),
        (["ann", "ben", None], r"set\.jsonl:1: 1 other clips of other voices"),
        ([None, None], r"set\.jsonl:1: 1 other clips in the set 's'"),
    ],
)
def test_too_few_for_a_babble_is_one_line(tmp_path, voices, match):
    rows = load_manifest(write_set(tmp_path, voices))
    with pytest.raises(UserError, match=match) as caught:
        Noise("babble", rows, name="s")
    assert "\n" not in str(caught.value)
    Noise("white", rows, name="s")


def test_other_mistakes_are_one_line(tmp_path):
    rows = load_manifest(write_set(tmp_path, [None] * 3, text_rows=1))
    with pytest.raises(UserError, match="the set 's' has no audio"):
        Noise("white", rows[3:], name="s")
    for row in rows[:3]:
        soundfile.write(row.audio, np.zeros(800, np.float32), 16000)
    with pytest.raises(UserError, match=r"set\.jsonl:1: no babble can be mixed of 2 clips"):
        Noise("babble", rows, name="s").of(rows[0], 100)


def test_the_table_is_of_each_set_and_its_noises():
    rate = {"value": 0.5, "low": 0.25, "high": 0.75, "n": 4}
    scores = {"n": 4, "wer": rate}
    lines = noise_table({"a": scores, "b": scores}, {"a": {"white": {"20": scores, "0": scores}}}).splitlines()
    assert [line.split("  ")[0] for line in lines] == ["set", "a, clean", "a, white 20 dB", "a, white 0 dB"]
