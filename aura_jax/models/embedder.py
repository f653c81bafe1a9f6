"""The audio embedding layer: all that stands between log-mel frames and the LLM once the encoder is gone.

Dimensions: N clips, F mel frames (100 Hz), M mel bins, A audio tokens, W width inside, D width of the LLM.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from aura_jax.errors import UserError, nearest
from aura_jax.models.whisper import ConvStem
from aura_jax.sharding import keep_rows

KINDS = ("stem", "patch")


@dataclasses.dataclass(frozen=True)
class EmbedderConfig:
    """The audio embedding layer's shape.

    Attributes:
      kind: "stem", Whisper's two convolutions, which can start from the teacher's; or "patch", one linear map of
        each token's mel frames (encoder-free to the letter).
      n_mels: mel bins.
      width: inside: the teacher's width for "stem".
      out_width: the LLM's width.
      frames_per_token: 50 Hz frames stacked into a token: 2, 4, 6, 8 for 25, 12.5, 8.33, 6.25 Hz.
    """

    kind: str
    n_mels: int
    width: int
    out_width: int
    frames_per_token: int

    def __post_init__(self):
        if self.kind not in KINDS:
            raise UserError(f"unknown embedder.kind {self.kind!r}: {nearest(self.kind, KINDS)}")


def sinusoids(length: int, width: int) -> np.ndarray:
    """Returns Whisper's sinusoidal positions [length, width], float32: sines, then cosines."""
    rate = np.exp(-np.log(10000.0) / (width // 2 - 1) * np.arange(width // 2))
    angle = np.arange(length)[:, None] * rate
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32)


class AudioEmbedder(nn.Module):
    """Log-mel frames to audio tokens in the LLM's embedding space.

    The output is normalised to a root mean square of `text_rms`, that of the LLM's own embedding table, times a
    learned gain that starts at 1: the LLM never sees inputs of a foreign size.
    """

    config: EmbedderConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, mel_NxFxM: jax.Array, n_frames_N: jax.Array) -> jax.Array:
        """Returns [N, A, D] with A = ceil(F / (2 frames_per_token)); tokens past a clip's end hold no meaning.

        Args:
          n_frames_N: valid mel frames of each clip; what follows does not change the valid tokens.
        """
        c = self.config
        n, n_frames, _ = mel_NxFxM.shape
        frames_per_token = c.frames_per_token * (2 if c.kind == "patch" else 1)
        if c.kind == "stem":
            stem = ConvStem(c.width, self.dtype, jnp.float32, name="stem")
            x_NxFxW, n_valid_N = stem(mel_NxFxM, n_frames_N), (n_frames_N + 1) // 2
            x_NxFxW = x_NxFxW + jnp.asarray(sinusoids(x_NxFxW.shape[1], c.width), self.dtype)
        else:
            x_NxFxW, n_valid_N = mel_NxFxM.astype(self.dtype), n_frames_N
        n_positions = (n_frames + 1) // 2  # at 50 Hz
        n_tokens = -(-n_positions // c.frames_per_token)
        valid_NxF = jnp.arange(x_NxFxW.shape[1]) < n_valid_N[:, None]
        x_NxFxW = jnp.where(valid_NxF[..., None], x_NxFxW, 0)
        x_NxFxW = jnp.pad(x_NxFxW, ((0, 0), (0, n_tokens * frames_per_token - x_NxFxW.shape[1]), (0, 0)))
        x_NxAxW = keep_rows(x_NxFxW.reshape(n, n_tokens, -1))
        if c.kind == "patch":
            x_NxAxW = nn.Dense(c.width, dtype=self.dtype, name="patch")(x_NxAxW)
            x_NxAxW = x_NxAxW + jnp.asarray(sinusoids(n_tokens, c.width), self.dtype)
        x_NxAxW = nn.LayerNorm(dtype=self.dtype, name="norm")(x_NxAxW)
        x_NxAxD = nn.Dense(c.out_width, dtype=self.dtype, name="proj")(x_NxAxW).astype(jnp.float32)

        gain = self.param("gain", nn.initializers.ones, ())
        text_rms = self.param("text_rms", nn.initializers.constant(0.02), ())
        rms_NxAx1 = jnp.sqrt(jnp.mean(x_NxAxD**2, axis=-1, keepdims=True) + 1e-12)
        return keep_rows((x_NxAxD / rms_NxAx1 * (text_rms * gain)).astype(self.dtype))
