"""Cuts of long recordings: whole, bounded, and in the pauses."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aura_jax.audio.pauses import cut_in_pauses

RATE = 16000


def noise(seconds: float, size: float, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(round(seconds * RATE)) * size).astype(np.float32)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60_000), st.integers(1920, 20_000), st.integers(0, 99))
def test_the_pieces_are_the_waveform_and_none_is_too_long(n_samples, longest, seed):
    waveform_S = np.random.default_rng(seed).standard_normal(n_samples).astype(np.float32)
    pieces = cut_in_pauses(waveform_S, longest)
    starts, ends = zip(*pieces, strict=True)
    assert starts == (0, *ends[:-1]) and ends[-1] == n_samples
    assert all(0 < end - start <= longest for start, end in pieces)
    assert all(end - start >= 2 * longest / 3 for start, end in pieces[:-1])


@given(st.lists(st.tuples(st.floats(0.3, 1.2), st.floats(0.15, 0.4)), min_size=12, max_size=14))
@settings(max_examples=20, deadline=None)
def test_every_cut_is_in_a_pause(words):
    """Words of loud noise, between pauses of quiet noise; each third of a piece has a pause."""
    parts = [
        noise(seconds, size, i)
        for i, word in enumerate(words)
        for seconds, size in zip(word, (0.3, 0.002), strict=True)
    ]
    waveform_S = np.concatenate(parts)
    edges = np.cumsum([0, *map(len, parts)])
    pieces = cut_in_pauses(waveform_S, 5 * RATE)
    for _, end in pieces[:-1]:
        assert (np.searchsorted(edges, end) - 1) % 2 == 1


def test_short_ones_stay_whole_and_silence_is_cut_late():
    assert cut_in_pauses(np.zeros(1, np.float32), 16000) == [(0, 1)]
    assert cut_in_pauses(noise(1.0, 0.1), 16000) == [(0, 16000)]
    assert cut_in_pauses(np.zeros(16001, np.float32), 16000) == [(0, 15920), (15920, 16001)]
    with pytest.raises(ValueError, match="at least 1920"):
        cut_in_pauses(np.zeros(9, np.float32), 100)
