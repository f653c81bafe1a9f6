"""The audio embedding layer: all that stands between log-mel frames and the LLM once the encoder is gone.

Embedders that keep the encoder, and read its states, are in `adapters.py`; all share `EmbedderConfig`.
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

OF_FRAMES = ("stem", "patch")
OF_STATES = ("stack", "conv", "cformer")
KINDS = OF_FRAMES + OF_STATES
FRAMES_AHEAD = {"stem": 1, "patch": 0}  # mel frames after those that a token covers, which it depends on as well


@dataclasses.dataclass(frozen=True)
class EmbedderConfig:
    """The audio embedding layer's shape.

    Attributes:
      kind: of those that read log-mel frames: "stem", Whisper's two convolutions, which can start from the teacher's;
        or "patch", one linear map of each token's mel frames (encoder-free to the letter). Of those that read the
        states of a Whisper encoder: "stack" or "conv", as in `adapters.py`, or "cformer", as in `cformer.py`.
      n_mels: mel bins.
      width: inside: the teacher's width for "stem"; the encoder's for those that read states.
      out_width: the LLM's width.
      frames_per_token: 50 Hz frames stacked into a token: 2, 4, 6, 8 for 25, 12.5, 8.33, 6.25 Hz; of "cformer", those
        that a token has at least.
      hidden: width of the hidden layer of "stack" and "conv".
      n_before, n_after: blocks of "cformer" before and after it fires.
    """

    kind: str
    n_mels: int
    width: int
    out_width: int
    frames_per_token: int
    hidden: int = 0
    n_before: int = 0
    n_after: int = 0

    def __post_init__(self):
        if self.kind not in KINDS:
            raise UserError(f"unknown embedder.kind {self.kind!r}: {nearest(self.kind, KINDS)}")
        if self.kind == "conv" and self.frames_per_token & (self.frames_per_token - 1):
            raise UserError("embedder.kind 'conv' halves the rate: use embedder.token_rate 25, 12.5 or 6.25")


def sinusoids(length: int, width: int) -> np.ndarray:
    """Returns Whisper's sinusoidal positions [length, width], float32: sines, then cosines."""
    rate = np.exp(-np.log(10000.0) / (width // 2 - 1) * np.arange(width // 2))
    angle = np.arange(length)[:, None] * rate
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32)


def sized_as_text(module: nn.Module, x_NxAxD: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Returns `x` normalised to a root mean square of `text_rms`, that of the LLM's own embedding table, times a
    learned gain that starts at 1: the LLM never sees inputs of a foreign size. Both become parameters of `module`."""
    x_NxAxD = x_NxAxD.astype(jnp.float32)
    gain = module.param("gain", nn.initializers.ones, ())
    text_rms = module.param("text_rms", nn.initializers.constant(0.02), ())
    rms_NxAx1 = jnp.sqrt(jnp.mean(x_NxAxD**2, axis=-1, keepdims=True) + 1e-12)
    return keep_rows((x_NxAxD / rms_NxAx1 * (text_rms * gain)).astype(dtype))


def stack_frames(x_NxFxW: jax.Array, n_valid_N: jax.Array, per_token: int) -> jax.Array:
    """Returns [N, ceil(F / per_token), per_token W]: the frames of a token side by side, those that are not valid 0."""
    n, n_frames, width = x_NxFxW.shape
    n_tokens = -(-n_frames // per_token)
    valid_NxF = jnp.arange(n_frames) < n_valid_N[:, None]
    x_NxFxW = jnp.where(valid_NxF[..., None], x_NxFxW, 0)
    x_NxFxW = jnp.pad(x_NxFxW, ((0, 0), (0, n_tokens * per_token - n_frames), (0, 0)))
    return keep_rows(x_NxFxW.reshape(n, n_tokens, per_token * width))


class AudioEmbedder(nn.Module):
    """Log-mel frames to audio tokens in the LLM's embedding space."""

    config: EmbedderConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, mel_NxFxM: jax.Array, n_frames_N: jax.Array, first: jax.Array | None = None, n_most: int = 0
    ) -> jax.Array:
        """Returns [N, A, D] with A = ceil(F / (2 frames_per_token)); tokens past a clip's end hold no meaning.

        Args:
          n_frames_N: valid mel frames of each clip; what follows does not change the valid tokens.
          first: scalar, of pieces of clips: the number of the first token in its clip. It lacks the frames before it,
            and is right only as the first of its clip.
          n_most: tokens of the longest clip, where `first` is given.
        """
        c = self.config

        def positions(n: int, per_token: int) -> jax.Array:
            if first is None:
                return jnp.asarray(sinusoids(n, c.width), self.dtype)
            table = jnp.asarray(sinusoids(n_most * per_token + n, c.width), self.dtype)
            return jax.lax.dynamic_slice_in_dim(table, first * per_token, n)

        if c.kind == "stem":
            stem = ConvStem(c.width, self.dtype, jnp.float32, name="stem")
            x_NxFxW = stem(mel_NxFxM, n_frames_N)
            x_NxFxW = x_NxFxW + positions(x_NxFxW.shape[1], c.frames_per_token)
            x_NxAxW = stack_frames(x_NxFxW, (n_frames_N + 1) // 2, c.frames_per_token)
        else:
            x_NxAxW = stack_frames(mel_NxFxM.astype(self.dtype), n_frames_N, 2 * c.frames_per_token)
            x_NxAxW = nn.Dense(c.width, dtype=self.dtype, name="patch")(x_NxAxW)
            x_NxAxW = x_NxAxW + positions(x_NxAxW.shape[1], 1)
        x_NxAxW = nn.LayerNorm(dtype=self.dtype, name="norm")(x_NxAxW)
        return sized_as_text(self, nn.Dense(c.out_width, dtype=self.dtype, name="proj")(x_NxAxW), self.dtype)
