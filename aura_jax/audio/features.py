"""Log-mel features in JAX, on the device, and the arithmetic of samples, frames and tokens.

Letters in array names: B rows, S samples, F frames (100 Hz), M mel bins, N samples of a window, C frequency bins.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from aura_jax.errors import UserError

SAMPLE_RATE = 16000  # Hz
HOP = 160  # samples: 100 frames a second
N_FFT = 400  # samples: windows of 25 ms
ENCODER_RATE = 50  # Hz: Whisper's encoder halves the frame rate

_POWER_FLOOR = 1e-10
_DYNAMIC_RANGE = 8.0  # in log10 of power: 80 dB below the maximum


def n_frames(n_samples):
    """Log-mel frames that cover `n_samples`: ceil(n / 160). An int, or an integer numpy or JAX array of any shape."""
    return -(-n_samples // HOP)


def n_encoder_frames(n_samples):
    """Encoder frames (50 Hz) that cover `n_samples`: ceil(n_frames / 2). Types as `n_frames`."""
    return -(-n_frames(n_samples) // 2)


def encoder_samples(n_encoder_frames: int) -> int:
    """Samples at 16 kHz that so many encoder frames cover: 320 each; of a Whisper's positions, its window."""
    return 2 * HOP * n_encoder_frames


def n_audio_tokens(n_samples, token_rate: float):
    """Audio tokens that cover `n_samples` at `token_rate` Hz: ceil(n_encoder_frames / frames_per_token).

    Takes an int, or an integer numpy or JAX array of any shape. Raises UserError as `frames_per_token` does.
    """
    return -(-n_encoder_frames(n_samples) // frames_per_token(token_rate))


def frames_per_token(token_rate: float) -> int:
    """Encoder frames (50 Hz) that one audio token covers: 2, 4, 6, 8 at 25, 12.5, 8.33, 6.25 Hz.

    Raises UserError if 50 Hz is not a multiple of `token_rate` (to one part in a thousand, so that 8.33 means 50/6).
    """
    if not (math.isfinite(token_rate) and 0 < token_rate <= ENCODER_RATE * 1.001):
        raise UserError(f"token_rate {token_rate} Hz is not in (0, {ENCODER_RATE}]: use 25, 12.5, 8.33 or 6.25")
    frames = round(ENCODER_RATE / token_rate)
    if abs(ENCODER_RATE / frames - token_rate) > 1e-3 * token_rate:
        raise UserError(
            f"token_rate {token_rate} Hz does not divide the encoder's {ENCODER_RATE} Hz: "
            f"the nearest that does is {ENCODER_RATE / frames:.6g}"
        )
    return frames


@functools.lru_cache(maxsize=1)
def _fourier_tables() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The periodic Hann window [400], cosines [201, 201] of samples 0..200, sines [199, 201] of samples 1..199; f32."""
    n = np.arange(N_FFT)
    window_N = 0.5 - 0.5 * np.cos(2 * np.pi * n / N_FFT)
    # n * c modulo the period keeps the arguments, and with them the tables' last digits, exact.
    half = N_FFT // 2
    angle_NxC = 2 * np.pi * (np.outer(n[: half + 1], n[: half + 1]) % N_FFT) / N_FFT
    return (
        window_N.astype(np.float32),
        np.cos(angle_NxC).astype(np.float32),
        np.sin(angle_NxC[1:half]).astype(np.float32),
    )


def _power_spectrum(frame_BxFxN: jax.Array) -> jax.Array:
    """Power [B, F, 201] of frames [B, F, 400], windowed here.

    A product with the Fourier basis instead of an FFT, because for an FFT XLA gathers a sharded batch onto every
    device. Folding each frame onto its symmetric half (cosines are even about sample 200, sines odd) halves the work
    and, more than that, the rounding error: it then equals a float32 FFT's. bf16 or TF32 would lose the quiet bins.
    """
    window_N, cosine_NxC, sine_NxC = _fourier_tables()
    frame_BxFxN = frame_BxFxN * window_N
    half = N_FFT // 2
    first, last = frame_BxFxN[..., 1:half], frame_BxFxN[..., :half:-1]
    even = jnp.concatenate([frame_BxFxN[..., :1], first + last, frame_BxFxN[..., half : half + 1]], axis=-1)
    real_BxFxC = jnp.dot(even, cosine_NxC, precision="highest")
    imaginary_BxFxC = jnp.dot(first - last, sine_NxC, precision="highest")
    return real_BxFxC**2 + imaginary_BxFxC**2


@functools.lru_cache(maxsize=4)
def _mel_filters_CxM(n_mels: int) -> np.ndarray:
    """[201, n_mels] f32: librosa's slaney filters, 0 to 8 kHz, which are Whisper's."""
    from librosa.filters import mel  # half a second to import, and workers that only count frames never need it

    return np.ascontiguousarray(mel(sr=SAMPLE_RATE, n_fft=N_FFT, n_mels=n_mels).T)


@functools.partial(jax.jit, static_argnames=("n_mels", "normalisation", "reflect_end"))
def log_mel(
    waveform_BxS: jax.Array,
    n_mels: int = 80,
    *,
    n_samples_B: jax.Array | None = None,
    normalisation: str = "whisper",
    reflect_end: bool = False,
) -> jax.Array:
    """The log-mel spectrogram that Whisper reads (arXiv 2212.04356, section 2.2), 100 frames a second.

    Frame f is centred on sample 160 f. The start is reflected, as Whisper does; the end is followed by zeros, so that
    a clip's frames do not depend on the padding that follows it.

    Args:
      waveform_BxS: float, [-1, 1], 16 kHz; S a multiple of 160.
      n_mels: mel bins: 80, or 128 for Whisper large-v3.
      n_samples_B: int; samples that are real. Later ones are read as zeros, frames from ceil(n / 160) on are 0 in the
        result and do not enter the maximum: the result does not depend on S. None: all S samples are real.
      normalisation: values more than 8 (80 dB) below a maximum are raised to it. "whisper": the row's maximum, which
        looks ahead; "streaming": the maximum up to and including each frame, which does not.
      reflect_end: reflect the end too: with a 30 s window, what transformers.WhisperFeatureExtractor computes.

    Returns:
      mel_BxFxM: f32, F = S // 160, (max(log10 power, maximum - 8) + 4) / 4.

    Raises:
      ValueError: S is not a multiple of 160; reflect_end with n_samples_B (the result would depend on S) or with a
        window too short to reflect; an unknown normalisation.
    """
    n_samples = waveform_BxS.shape[1]
    if n_samples % HOP:
        raise ValueError(f"log_mel needs a multiple of {HOP} samples, got {n_samples}: pad with zeros")
    if normalisation not in ("whisper", "streaming"):
        raise ValueError(f"normalisation {normalisation!r} is unknown: use 'whisper' or 'streaming'")
    if reflect_end and (n_samples_B is not None or n_samples <= N_FFT):
        raise ValueError("reflect_end is for a whole window: leave n_samples_B out, and give more than 400 samples")

    if n_samples_B is not None:
        # Select, do not multiply: 0 * NaN in the padding would be NaN.
        waveform_BxS = jnp.where(jnp.arange(n_samples) < n_samples_B[:, None], waveform_BxS, 0.0)
    frames = n_samples // HOP
    half = N_FFT // 2
    tail = 2 * HOP - half  # frames + 2 hops in all: the last window starts at hop frames - 1 and spans 2.5
    end_BxS = jnp.pad(waveform_BxS, ((0, 0), (0, tail)), mode="reflect" if reflect_end else "constant")
    log_BxFxM = _log_power(jnp.pad(end_BxS, ((0, 0), (half, 0)), mode="reflect"), n_mels)
    loudest_BxF = jnp.max(log_BxFxM, axis=-1)
    valid_BxF = None
    if n_samples_B is not None:
        valid_BxF = jnp.arange(frames) < n_frames(n_samples_B)[:, None]
        loudest_BxF = jnp.where(valid_BxF, loudest_BxF, -jnp.inf)
    if normalisation == "whisper":
        maximum_BxF = jnp.max(loudest_BxF, axis=-1, keepdims=True, initial=-jnp.inf)
    else:
        maximum_BxF = jax.lax.cummax(loudest_BxF, axis=1)
    mel_BxFxM = _scaled(log_BxFxM, maximum_BxF)
    return mel_BxFxM if valid_BxF is None else jnp.where(valid_BxF[..., None], mel_BxFxM, 0.0)


def log_mel_of_piece(padded_BxS: jax.Array, maximum_B: jax.Array, n_mels: int = 80) -> tuple[jax.Array, jax.Array]:
    """The log-mel of a piece of a clip, with the normalisation "streaming".

    Args:
      padded_BxS: float, 16 kHz, S = 160 (F + 2): the samples around F frames, from 200 before the centre of the first.
        Before a clip's start they are its reflection, after its end zeros, as `log_mel` has them.
      maximum_B: f32, the largest log10 power of the clip before the piece; -inf of its first.

    Returns:
      mel_BxFxM: as of `log_mel` of the whole clip.
      maximum_BxG: f32, G = F + 1, the largest log10 power before each frame, and before the one that comes next.
    """
    log_BxFxM = _log_power(padded_BxS, n_mels)
    maximum_BxG = jax.lax.cummax(jnp.concatenate([maximum_B[:, None], jnp.max(log_BxFxM, axis=-1)], axis=1), axis=1)
    return _scaled(log_BxFxM, maximum_BxG[:, 1:]), maximum_BxG


def _log_power(padded_BxS: jax.Array, n_mels: int) -> jax.Array:
    """Log10 of the mel power [B, F, n_mels]; S = 160 (F + 2), from half a window before the first frame's centre."""
    hops = padded_BxS.astype(jnp.float32).reshape(len(padded_BxS), -1, HOP)
    frame_BxFxN = jnp.concatenate([hops[:, :-2], hops[:, 1:-1], hops[:, 2:, : N_FFT - 2 * HOP]], axis=-1)
    mel_BxFxM = jnp.dot(_power_spectrum(frame_BxFxN), _mel_filters_CxM(n_mels), precision="highest")
    return jnp.log10(jnp.maximum(mel_BxFxM, _POWER_FLOOR))


def _scaled(log_BxFxM: jax.Array, maximum_BxF: jax.Array) -> jax.Array:
    return (jnp.maximum(log_BxFxM, maximum_BxF[..., None] - _DYNAMIC_RANGE) + 4.0) / 4.0
