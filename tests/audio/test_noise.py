"""Noise for evaluation: powers, ratios, loops, and what silence does."""

import numpy as np
import pytest

from aura_jax.audio.noise import babble, mix, white
from aura_jax.errors import UserError


def tone(n: int, size: float, seed: int = 0) -> np.ndarray:
    return (size * np.random.default_rng(seed).standard_normal(n)).astype(np.float32)


def test_white_noise_has_power_one_and_no_colour():
    noise = white(1 << 16, np.random.default_rng(0))
    assert noise.dtype == np.float32 and noise.shape == (1 << 16,)
    assert np.mean(noise**2) == pytest.approx(1, rel=0.02)
    halves = np.abs(np.fft.rfft(noise))[1:] ** 2
    assert halves[: len(halves) // 2].mean() == pytest.approx(halves[len(halves) // 2 :].mean(), rel=0.05)
    assert (noise == white(1 << 16, np.random.default_rng(0))).all()


@pytest.mark.parametrize("snr_db", [20.0, 5.0, 0.0, -3.0])
def test_the_ratio_of_a_mixture_is_that_asked_for(snr_db):
    clip, noise = tone(5000, 0.03), tone(5000, 7.0, 1)
    mixed = mix(clip, noise, snr_db)
    assert mixed.dtype == np.float32
    added = mixed.astype(np.float64) - clip
    assert 10 * np.log10(np.mean(clip.astype(np.float64) ** 2) / np.mean(added**2)) == pytest.approx(snr_db, abs=1e-3)
    assert np.corrcoef(added, noise)[0, 1] == pytest.approx(1, abs=1e-5)


def test_silence_stays_as_it_is():
    silent, noise = np.zeros(100, np.float32), tone(100, 1.0)
    assert not mix(silent, noise, 0.0).any()
    assert (mix(noise, silent, 0.0) == noise).all()


def test_babble_is_the_sum_of_looped_clips_of_equal_power():
    clips = [tone(300, 0.01, 1), np.zeros(50, np.float32), tone(700, 5.0, 2)]
    found = babble(clips, 1000, np.random.default_rng(3))
    random, expected = np.random.default_rng(3), np.zeros(1000)
    for clip in clips:
        start = int(random.integers(len(clip)))
        if clip.any():
            scaled = clip / np.sqrt(np.mean(clip.astype(np.float64) ** 2))
            expected += [scaled[(start + i) % len(clip)] for i in range(1000)]
    assert found.dtype == np.float32 and np.abs(found - expected).max() < 1e-5
    assert len(babble(clips, 20, np.random.default_rng(3))) == 20


def test_babble_of_nothing_is_one_line():
    for clips in ([], [np.zeros(10, np.float32)]):
        with pytest.raises(UserError, match="not silent") as caught:
            babble(clips, 5, np.random.default_rng(0))
        assert "\n" not in str(caught.value)
