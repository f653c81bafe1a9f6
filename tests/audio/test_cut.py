"""Cutting utterances out of recordings."""

import io

import numpy as np
import pytest
import soundfile

from aura_jax.audio import cut as cut_module
from aura_jax.audio.cut import cut
from aura_jax.audio.io import AudioError


@pytest.fixture
def recording(tmp_path):
    """Two channels that count up, at 8 kHz, of 16 bits: what is cut out can be told exactly."""
    ramp = np.stack([np.arange(16000), -np.arange(16000)], axis=1).astype(np.int16)
    soundfile.write(tmp_path / "long.flac", ramp, 8000)
    return str(tmp_path / "long.flac"), ramp


def test_spans_are_exact(recording, monkeypatch):
    path, ramp = recording
    monkeypatch.setattr(cut_module, "_BLOCK", 1000)
    spans = [(0.0, 0.5), (0.25, 0.75), (0.25, 0.3), (1.5, 1.75), (1.9, 2.5)]
    for (begin, end), flac in zip(spans, cut(path, spans), strict=True):
        samples, rate = soundfile.read(io.BytesIO(flac), dtype="int16")
        assert rate == 8000
        np.testing.assert_array_equal(samples, ramp[round(begin * 8000) : round(end * 8000)])


def test_mistakes(recording, tmp_path):
    path, _ = recording
    with pytest.raises(AudioError, match=r"long.flac: 2 s, but a span is 3 to 4 s: mend the span"):
        list(cut(path, [(0.0, 1.0), (3.0, 4.0)]))
    with pytest.raises(AudioError, match="mend the span"):
        list(cut(path, [(1.0, 1.0)]))
    with pytest.raises(ValueError, match="not in order"):
        list(cut(path, [(1.0, 2.0), (0.5, 1.5)]))
    with pytest.raises(AudioError, match=r"none.flac: cannot be decoded \(.*"):
        list(cut(str(tmp_path / "none.flac"), [(0.0, 1.0)]))
