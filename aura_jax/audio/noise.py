"""Noise for evaluation, on the host: white, or the babble of other speakers, mixed in at a given signal-to-noise ratio.

Everything is numpy and depends on the arguments alone. Letters in array names: S samples.
"""

from collections.abc import Sequence

import numpy as np

from aura_jax.errors import UserError


def white(n_samples: int, random: np.random.Generator) -> np.ndarray:
    """Returns white Gaussian noise, float32 [n_samples], of power 1."""
    return random.standard_normal(n_samples, np.float32)


def babble(clips: Sequence[np.ndarray], n_samples: int, random: np.random.Generator) -> np.ndarray:
    """Returns the sum of several clips, each scaled to power 1, looped or cut from a random place on.

    Args:
      clips: float32 waveforms of one rate; silent ones add nothing.
      n_samples: length of the result.
      random: that the places are drawn from, one of each clip.

    Returns:
      float32 [n_samples].

    Raises:
      UserError: there are no clips, or all of them are silent.
    """
    sum_S, n_heard = np.zeros(n_samples, np.float32), 0
    for clip_S in clips:
        start = int(random.integers(len(clip_S)))
        power = _power(clip_S)
        if power > 0:
            sum_S += np.take(clip_S, np.arange(start, start + n_samples), mode="wrap") / np.float32(np.sqrt(power))
            n_heard += 1
    if not n_heard:
        raise UserError(f"no babble can be mixed of {len(clips)} clips: give some that are not silent")
    return sum_S


def mix(clip_S: np.ndarray, noise_S: np.ndarray, snr_db: float) -> np.ndarray:
    """Returns the clip with the noise added, scaled so that their powers are `snr_db` apart.

    Power is the mean square over all samples, pauses included. The clip itself is not scaled, and nothing is clipped:
    the sum may leave [-1, 1]. A silent clip stays silent, and silent noise adds nothing.

    Args:
      clip_S, noise_S: float32 [S].
      snr_db: of the clip's power over the noise's, dB.

    Returns:
      float32 [S].
    """
    signal, noise = _power(clip_S), _power(noise_S)
    if not noise:
        return clip_S
    return clip_S + noise_S * np.float32(np.sqrt(signal / noise) * 10 ** (-snr_db / 20))


def _power(x_S: np.ndarray) -> float:
    return float(np.mean(np.square(x_S, dtype=np.float64)))
