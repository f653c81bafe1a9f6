"""Augmentation: gain, noise and spectrogram masks in JAX with one key a row; speed on the host.

Nothing depends on how far a batch is padded. A function spends the keys it is given: give each its own
(`jax.random.fold_in`). Letters in array names: B rows, S samples, F frames, M mel bins.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import soxr

from aura_jax.audio.features import HOP, SAMPLE_RATE
from aura_jax.errors import UserError


@jax.jit
def random_gain(keys_B: jax.Array, waveform_BxS: jax.Array, low_db: float, high_db: float) -> jax.Array:
    """Multiplies each row by one gain, uniform in [low_db, high_db] dB. Returns [B, S] of the waveform's type."""

    def row(key: jax.Array, waveform_S: jax.Array) -> jax.Array:
        gain = 10.0 ** (jax.random.uniform(key, minval=low_db, maxval=high_db) / 20.0)
        return waveform_S * gain.astype(waveform_S.dtype)

    return jax.vmap(row)(keys_B, waveform_BxS)


@jax.jit
def add_noise(
    keys_B: jax.Array,
    waveform_BxS: jax.Array,
    n_samples_B: jax.Array,
    snr_db_low: float,
    snr_db_high: float,
    probability: float,
) -> jax.Array:
    """Adds white Gaussian noise to each row, with a probability, at an SNR uniform in [snr_db_low, snr_db_high] dB.

    Signal and noise power are both measured over the row's valid samples, so the SNR is exact. Silence stays silence,
    and samples from n_samples_B on stay as they are.

    Args:
      keys_B: random keys, one a row.
      waveform_BxS: float, [-1, 1].
      n_samples_B: int; valid samples.
      snr_db_low: dB.
      snr_db_high: dB; equal to snr_db_low for one fixed SNR.
      probability: of a row getting noise, [0, 1].

    Returns:
      [B, S] of the waveform's type.
    """

    def row(key: jax.Array, waveform_S: jax.Array, n_samples: jax.Array) -> jax.Array:
        noise_key, setting_key = jax.random.split(key)
        n = waveform_S.shape[0]
        # A key for every hop: what sample i gets must not depend on S, and that holds for any random generator.
        hop_keys = jax.vmap(lambda i: jax.random.fold_in(noise_key, i))(jnp.arange(-(-n // HOP)))
        noise_S = jax.vmap(lambda k: jax.random.normal(k, (HOP,)))(hop_keys).reshape(-1)[:n]
        valid_S = jnp.arange(n) < n_samples
        noise_S = jnp.where(valid_S, noise_S, 0.0)
        signal_energy = jnp.sum(jnp.where(valid_S, waveform_S.astype(jnp.float32), 0.0) ** 2)
        noise_energy = jnp.maximum(jnp.sum(noise_S**2), jnp.finfo(jnp.float32).tiny)
        place, chance = jax.random.uniform(setting_key, (2,))
        snr_db = snr_db_low + place * (snr_db_high - snr_db_low)
        scale = jnp.sqrt(signal_energy / noise_energy) * 10.0 ** (-snr_db / 20.0)
        scale = jnp.where(chance < probability, scale, 0.0)
        return waveform_S + (scale * noise_S).astype(waveform_S.dtype)

    return jax.vmap(row)(keys_B, waveform_BxS, n_samples_B)


@functools.partial(jax.jit, static_argnames=("n_freq_masks", "freq_width", "n_time_masks", "time_width"))
def spec_augment(
    keys_B: jax.Array,
    mel_BxFxM: jax.Array,
    n_frames_B: jax.Array,
    *,
    n_freq_masks: int,
    freq_width: int,
    n_time_masks: int,
    time_width: int,
) -> jax.Array:
    """SpecAugment's masks (arXiv 1904.08779, section 2, without time warping), filled with the row's mean.

    Each mask is uniformly 0 to its width wide, and lies uniformly where it fits: frequency masks in the M bins, time
    masks in the valid frames. Masks may overlap. The mean is over valid frames and all bins, before masking.

    Args:
      keys_B: random keys, one a row.
      mel_BxFxM: float.
      n_frames_B: int; valid frames. Later ones stay as they are, and neither masks nor mean depend on F.
      n_freq_masks: frequency masks a row.
      freq_width: the widest frequency mask, bins.
      n_time_masks: time masks a row.
      time_width: the widest time mask, frames.

    Returns:
      [B, F, M] of the input's type.

    Raises:
      UserError: freq_width exceeds M.
    """
    n_bins = mel_BxFxM.shape[-1]
    if freq_width > n_bins:
        raise UserError(f"freq_width {freq_width} exceeds the {n_bins} mel bins: choose a smaller one")

    def masked(key: jax.Array, n_masks: int, widest: int | jax.Array, size: int | jax.Array, length: int) -> jax.Array:
        """bool [length]: where any of the masks lies, all of them within the first `size`."""
        width_key, start_key = jax.random.split(key)
        width = jax.random.randint(width_key, (n_masks,), 0, widest + 1)
        start = jax.random.randint(start_key, (n_masks,), 0, size - width + 1)
        index = jnp.arange(length)[:, None]
        return jnp.any((index >= start) & (index < start + width), axis=1)

    def row(key: jax.Array, mel_FxM: jax.Array, n_frames: jax.Array) -> jax.Array:
        freq_key, time_key = jax.random.split(key)
        valid_F = jnp.arange(mel_FxM.shape[0]) < n_frames
        total = jnp.sum(jnp.where(valid_F[:, None], mel_FxM.astype(jnp.float32), 0.0))
        mean = total / jnp.maximum(n_frames * n_bins, 1)
        widest = jnp.minimum(time_width, n_frames)
        freq_M = masked(freq_key, n_freq_masks, freq_width, n_bins, n_bins)
        time_F = masked(time_key, n_time_masks, widest, n_frames, mel_FxM.shape[0])
        return jnp.where((time_F[:, None] | freq_M) & valid_F[:, None], mean.astype(mel_FxM.dtype), mel_FxM)

    return jax.vmap(row)(keys_B, mel_BxFxM, n_frames_B)


def speed_samples(n_samples: int, factor: float) -> int:
    """Samples that `n_samples` become at `factor` times the speed: round(n / factor). Raises UserError as below."""
    if not (math.isfinite(factor) and factor > 0):
        raise UserError(f"speed factor {factor} is not a positive number: use, for example, 0.9 or 1.1")
    return round(n_samples / factor)


def change_speed(waveform_S: np.ndarray, factor: float) -> np.ndarray:
    """Plays a 16 kHz waveform `factor` times as fast, pitch included (Ko et al. 2015), by resampling, on the host.

    Takes and returns float32 [S]; the result has exactly `speed_samples(S, factor)` samples. Raises UserError if
    `factor` is not a positive number.
    """
    n_samples = speed_samples(len(waveform_S), factor)
    if factor == 1:
        return waveform_S
    changed_S = soxr.resample(waveform_S, SAMPLE_RATE * factor, SAMPLE_RATE, quality="HQ")[:n_samples]
    return np.pad(changed_S, (0, n_samples - len(changed_S)))  # soxr's own rounding may be a sample short
