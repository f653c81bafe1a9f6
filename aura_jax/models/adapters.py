"""What stands between the states of a Whisper encoder and the LLM, where the encoder is kept.

Dimensions: N clips, P encoder positions (50 Hz), W width of the encoder, A audio tokens, D width of the LLM.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from aura_jax.models.embedder import EmbedderConfig, sized_as_text, stack_frames
from aura_jax.sharding import keep_rows

_KERNEL = 5  # positions that a convolution sees


class StackAdapter(nn.Module):
    """A serial bridge: the states of a token side by side, then a SwiGLU, as Ultravox has it."""

    config: EmbedderConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, states_NxPxW: jax.Array, n_positions_N: jax.Array) -> jax.Array:
        """Returns [N, A, D] with A = ceil(P / frames_per_token); tokens past a clip's end hold no meaning.

        Args:
          n_positions_N: valid states of each clip; what follows does not change the valid tokens.
        """
        c = self.config
        dense = lambda width, name: nn.Dense(width, use_bias=False, dtype=self.dtype, name=name)
        x_NxAxW = stack_frames(states_NxPxW, n_positions_N, c.frames_per_token)
        x_NxAxW = nn.LayerNorm(dtype=self.dtype, name="norm")(x_NxAxW)
        x_NxAxH = nn.silu(dense(c.hidden, "gate")(x_NxAxW)) * dense(c.hidden, "up")(x_NxAxW)
        return sized_as_text(self, dense(c.out_width, "proj")(x_NxAxH), self.dtype)


class ConvAdapter(nn.Module):
    """BLSP's (arXiv 2309.00916): convolutions that halve the rate, each gated, then a bottleneck beside a residual."""

    config: EmbedderConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, states_NxPxW: jax.Array, n_positions_N: jax.Array) -> jax.Array:
        """As `StackAdapter`."""
        c = self.config
        x, n_valid_N = states_NxPxW, n_positions_N
        n_layers = c.frames_per_token.bit_length() - 1
        for layer in range(n_layers):
            # Zeros beyond the end are what the convolution's own padding supplies to a cut clip.
            x = jnp.where((jnp.arange(x.shape[1]) < n_valid_N[:, None])[..., None], x, 0)
            width = c.out_width if layer == n_layers - 1 else c.width
            conv = nn.Conv(2 * width, (_KERNEL,), 2, padding=_KERNEL // 2, dtype=self.dtype, name=f"conv{layer + 1}")
            x, n_valid_N = keep_rows(nn.glu(conv(x))), (n_valid_N + 1) // 2
        y_NxAxH = nn.gelu(nn.Dense(c.hidden, dtype=self.dtype, name="down")(nn.LayerNorm(name="norm")(x)))
        return sized_as_text(self, x + nn.Dense(c.out_width, dtype=self.dtype, name="up")(y_NxAxH), self.dtype)


ADAPTERS: dict[str, Any] = {"stack": StackAdapter, "conv": ConvAdapter}
