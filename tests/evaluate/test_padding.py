"""How much silence Whisper needs: which padding is chosen, and what is told of the others."""

import json

import numpy as np
import pytest
import soundfile

from aura_jax.convert import random_models
from aura_jax.data.manifest import load_manifest
from aura_jax.errors import UserError
from aura_jax.evaluate.padding import find_padding
from aura_jax.evaluate.score import score
from aura_jax.infer.generate import Reply
from aura_jax.infer.prompting import Request
from aura_jax.infer.transcriber import Transcriber

WORDS = " ".join(f"word{i}" for i in range(50))


@pytest.fixture
def rows(tmp_path):
    lines = []
    for i in range(2):
        clip = 0.1 * np.random.default_rng(i).standard_normal(8000)
        soundfile.write(tmp_path / f"{i}.wav", clip, 16000, subtype="FLOAT")
        lines.append({"id": str(i), "audio": f"{i}.wav", "text": WORDS})
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return load_manifest(tmp_path / "set.jsonl")


class Hears:
    """Leaves out so many words of each text, by padding."""

    window_seconds = 30.0

    def __init__(self, n_missing, padding=None):
        self.n_missing, self.padding = n_missing, padding

    def with_windows(self, windows, padding=0.0, hears_again=True):
        assert windows is None or (windows == tuple(range(1, 31)) and not hears_again)
        return Hears(self.n_missing, None if windows is None else padding)

    def generate(self, requests, progress):
        progress(len(requests))
        text = " ".join(WORDS.split()[self.n_missing[self.padding] :])
        return [Reply(text, (), True, 0.1) for _ in requests]


@pytest.mark.parametrize(
    ("n_missing", "seconds"),
    [({0: 30, 1: 3, 2: 2, 5: 1, None: 1}, 2.0), ({0: 0, 1: 3, None: 1}, 0.0), ({0: 30, 1: 3, None: 1}, None)],
)
def test_the_shortest_padding_within_a_point_is_found(rows, n_missing, seconds):
    candidates = [padding for padding in n_missing if padding is not None]
    found = find_padding(Hears(n_missing), rows, candidates[::-1], tolerance=0.02, progress=False)
    assert found.seconds == seconds and (found.windows is None) == (seconds is None)
    assert {padding: wer["value"] for padding, wer in found.wer.items()} == {k: n / 50 for k, n in n_missing.items()}


@pytest.mark.slow
def test_with_a_whisper_the_error_rates_are_those_of_its_windows(rows, tmp_path):
    random_models.build_whisper(tmp_path, window_seconds=2)
    transcriber = Transcriber(tmp_path, batch_size=2, max_new_tokens=4)
    found = find_padding(transcriber, rows, [0.0, 5.0], progress=False)
    clips = [np.asarray(soundfile.read(row.audio, dtype="float32")[0]) for row in rows]
    for padding, windows in ((0.0, 1.0), (5.0, 2.0), (None, None)):
        replies = transcriber.with_windows(windows, hears_again=False).generate([Request(clip) for clip in clips])
        assert found.wer[padding] == score([WORDS] * 2, [reply.text for reply in replies])["wer"]


def test_rows_without_a_transcript_say_so(tmp_path):
    (tmp_path / "set.jsonl").write_text('{"audio": "a.wav", "response": "yes", "seconds": 1}\n')
    with pytest.raises(UserError, match=r"set.jsonl:1.*: the error rate needs 'audio' and 'text'"):
        find_padding(Hears({}), load_manifest(tmp_path / "set.jsonl"), progress=False)
