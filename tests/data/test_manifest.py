"""Manifests: what is read, and what each mistake is told."""

import json

import numpy as np
import pytest
import soundfile

from aura_jax.data.manifest import clip_samples, load_manifest
from aura_jax.errors import UserError


@pytest.fixture
def write(tmp_path):
    (tmp_path / "clips").mkdir()

    def write_lines(*lines) -> str:
        path = tmp_path / "train.jsonl"
        path.write_bytes(b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines) + b"\n")
        return str(path)

    return write_lines


def test_rows(write, tmp_path):
    path = write(
        {"audio": "clips/a.wav", "text": "Hello", "voice": "x", "seconds": 2},
        b"",
        {"audio": str(tmp_path / "clips/b.wav"), "response": "Hi.", "prompt": "Answer.", "id": 7},
        {"prompt": "Two and two?", "response": "Four.", "ended": None, "history": None},
        {"text": "Once upon a time."},
    )
    speech, answer, chat, plain = load_manifest(path)
    assert speech.audio == str(tmp_path / "clips" / "a.wav") and speech.id == "clips/a.wav" and speech.seconds == 2.0
    assert speech.target == "Hello" and speech.extra == {"voice": "x"} and speech.where == f"{path}:1"
    assert answer.target == "Hi." and answer.id == "7" and answer.where == f"{path}:3"
    assert chat.audio is None and not chat.is_plain_text and chat.target == "Four." and chat.ended
    assert plain.is_plain_text and plain.id == "row-5"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", r":1: not JSON \(.*column"),
        (b"\xff{}", ":1: not UTF-8"),
        ([1], ":1: not an object, but list: give one JSON object a line"),
        ({"audio": "clips/a.wav"}, ":1: 'audio' without 'text' or 'response': .*`aura-jax data transcribe`"),
        ({"audio": 3, "text": "a"}, ":1: 'audio' is 3: give a string"),
        ({"audio": "", "text": "a"}, ":1: 'audio' is empty"),
        ({"audio": "clips/a.wav", "text": ["a"]}, ":1: 'text' is .* give a string"),
        ({"audio": "clips/a.wav", "text": "a", "seconds": "2"}, "'seconds'"),
        ({"audio": "clips/a.wav", "text": "a", "seconds": True}, "'seconds'"),
        ({"audio": "clips/a.wav", "text": "a", "seconds": -1}, "'seconds'"),
        ({"audio": "clips/a.wav", "text": "a", "header_seconds": -1}, "'header_seconds' is -1: give 0 or more"),
        ({"adio": "clips/a.wav", "text": "a"}, "no 'audio', but 'adio': rename the key"),
        ({"audio_path": "clips/a.wav", "text": "a"}, "no 'audio', but 'audio_path'"),
        ({"prompt": "a"}, "neither speech nor text"),
        ({}, "neither speech nor text"),
        ({"text": ""}, "neither speech nor text"),
        ({"audio": "nowhere/a.wav", "text": "a"}, "the folder .*nowhere of 'audio' does not exist"),
        ({"prompt": "a", "response": "b", "history": "c"}, "'history' is not a list"),
        ({"prompt": "a", "response": "b", "ended": "no"}, "'ended' is \"no\": give false"),
        ({"prompt": "a", "response": "b", "history": [{"role": "user", "content": "c"}]}, "whole exchanges"),
        ({"prompt": "a", "response": "b", "history": [{"role": "assistant"}, {}]}, "turn 1 is not one of 'user'"),
    ],
)
def test_mistakes_name_file_and_line(write, line, message):
    with pytest.raises(UserError, match=message) as error:
        load_manifest(write(line))
    assert "\n" not in str(error.value)


def test_missing_folder_and_empty_manifests(tmp_path):
    with pytest.raises(UserError, match=r"none.jsonl: cannot be read \(No such file or directory\)"):
        load_manifest(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match=r"no index.json in it: name a manifest"):
        load_manifest(tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match="an empty manifest"):
        load_manifest(tmp_path / "empty.jsonl")


def test_clip_samples_by_manifest_header_and_cache(write, tmp_path):
    for name, rate in (("a", 16000), ("b", 8000)):
        soundfile.write(tmp_path / "clips" / f"{name}.wav", np.zeros(4001), rate)
    (tmp_path / "clips" / "broken.wav").write_bytes(b"nothing")
    rows = load_manifest(
        write(
            {"audio": "clips/a.wav", "text": "", "seconds": 0.25},
            {"audio": "clips/a.wav", "text": ""},
            {"audio": "clips/b.wav", "text": ""},
            {"audio": "clips/broken.wav", "text": ""},
            {"text": "none"},
        )
    )
    cache = tmp_path / "run" / "seconds.jsonl"
    wanted = [4008, 4002, 8003, 1, 0]
    assert clip_samples(rows) == wanted
    assert clip_samples(rows, cache=cache) == wanted
    assert len(cache.read_text().splitlines()) == 2
    cache.write_text(cache.read_text().replace("0.500", "0.750"))
    stale = clip_samples(rows, cache=cache)
    assert stale[2] != wanted[2]  # the cache is believed ...
    soundfile.write(tmp_path / "clips" / "b.wav", np.zeros(100), 8000)
    assert clip_samples(rows, cache=cache)[2] == 201  # ... until the file changes
    cache.write_text("x")
    with pytest.raises(UserError, match="delete it"):
        clip_samples(rows, cache=cache)


def test_every_sample_manifest_loads(sample_data):
    paths = sorted(sample_data.glob("*/t*.jsonl"))
    paths = [path for path in paths if path.parent.name in ("commands", "recordings")]
    assert [len(load_manifest(path)) for path in paths] == [80, 93, 55, 1452, 90, 341]
