"""The voice model: as it is, and without what it needs."""

import sys

import numpy as np
import pytest

from aura_jax import cli
from aura_jax.synthesis import kokoro
from aura_jax.synthesis.pronounce import Unspoken


def test_a_missing_package_is_said_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    (tmp_path / "t.txt").write_text("Hello.\n")
    code = cli.main(["data", "synthesize", "--text", str(tmp_path / "t.txt"), "--output", str(tmp_path / "clips")])
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1 and 'pip install "aura_jax[synthesize]"' in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "0"], "--threads must be at least 1"),
        (["--speeds", "fast"], "--speeds 'fast': write two numbers"),
        (["--sentences", "many"], "--sentences 'many': write two numbers of words"),
        (["--config.seed=1"], "data synthesize takes no config"),
        (["--output", "gs://bucket/clips"], "--output gs://bucket/clips: write to a folder of this machine"),
    ],
)
def test_mistakes_are_said_before_anything_is_fetched(tmp_path, capsys, arguments, message):
    (tmp_path / "t.txt").write_text("Hello.\n")
    verb = ["data", "synthesize", "--text", str(tmp_path / "t.txt"), "--output", str(tmp_path / "clips")]
    assert cli.main([*verb, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_silence_at_the_ends_is_cut_to_a_margin():
    loud = np.sin(np.arange(24000, dtype=np.float32))
    quiet = np.full(24000, 1e-3, np.float32)
    trimmed = kokoro._trim(np.concatenate([quiet, loud, quiet]))
    assert len(trimmed) == pytest.approx(24000 + 2 * 0.08 * 24000, abs=10)
    assert len(kokoro._trim(np.zeros(100, np.float32))) == 100


@pytest.mark.slow  # fetches 94 MB the first time, and reads the model
def test_the_real_model_speaks():
    synthesizer = kokoro.Kokoro()
    assert len(synthesizer.voices) == 28 and set(kokoro.TEST_VOICES) < set(synthesizer.voices)
    slow = synthesizer.speak("Good morning.", "af_heart", 0.9)
    assert slow.dtype == np.float32 and 0.1 < np.abs(slow).max() < 1 and 8000 < len(slow) < 32000
    np.testing.assert_array_equal(synthesizer.speak("Good morning.", "af_heart", 0.9), slow)
    assert len(synthesizer.speak("Good morning.", "af_heart", 1.2)) < len(slow)
    with pytest.raises(Unspoken, match="an unknown word: 'Xyzzy'"):
        synthesizer.check("Xyzzy.")
