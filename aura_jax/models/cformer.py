"""CFormer (BLSP-KD, arXiv 2405.19041): as many audio tokens as the transcript has, by continuous integrate-and-fire.

Dimensions: N clips, P encoder positions (50 Hz), W width of the encoder, A audio tokens, D width of the LLM.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from aura_jax.models.embedder import EmbedderConfig, sinusoids, sized_as_text
from aura_jax.models.whisper import EncoderBlock, WhisperConfig

_LEAST = 1e-4  # tokens that a clip weighs at least: what is scaled is divided by it


def integrate_and_fire(weight_NxP: jax.Array, n_tokens: int) -> jax.Array:
    """Returns the share [N, n_tokens, P] of every frame in every token (CIF, arXiv 1905.11235).

    Weights accumulate, and each time their sum passes a whole number a token is complete; the frame at which it does is
    split. So token k takes of a frame what its stretch of the sum, from the frame before to its own, has in [k, k + 1].
    """
    end_Nx1xP = jnp.cumsum(weight_NxP, axis=1)[:, None]
    start_Nx1xP = end_Nx1xP - weight_NxP[:, None]
    k_Ax1 = jnp.arange(n_tokens, dtype=weight_NxP.dtype)[:, None]
    return jnp.maximum(jnp.minimum(end_Nx1xP, k_Ax1 + 1) - jnp.maximum(start_Nx1xP, k_Ax1), 0)


class CFormer(nn.Module):
    """Blocks of an encoder, a weight for each state, the states summed to tokens by it, and blocks again.

    Told how many tokens a clip has, as in training, the weights are scaled to that sum; otherwise to their own sum,
    rounded. How far both are apart is what the objective `quantity` makes small.
    """

    config: EmbedderConfig
    encoder: WhisperConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, states_NxPxW: jax.Array, n_positions_N: jax.Array, n_slots: int, n_tokens_N: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns tokens [N, A, D], of which the first `n` hold meaning, n int32 [N], and the weights' sum [N].

        Args:
          n_positions_N: valid states of each clip; what follows does not change the valid tokens.
          n_slots: A; a clip gets no more tokens.
          n_tokens_N: int32, how many tokens each clip is to have; None: as many as its weights say, but at least 1.
        """
        c = self.config
        valid_NxP = jnp.arange(states_NxPxW.shape[1]) < n_positions_N[:, None]
        x_NxPxW = self._blocks("before", c.n_before)(states_NxPxW, valid_NxP)
        weight_NxP = jnp.where(valid_NxP, nn.sigmoid(x_NxPxW[..., -1].astype(jnp.float32)), 0)
        total_N = jnp.maximum(weight_NxP.sum(1), _LEAST)
        n_N = jnp.maximum(jnp.round(total_N).astype(jnp.int32), 1) if n_tokens_N is None else n_tokens_N
        n_N = jnp.minimum(n_N, n_slots)
        share_NxAxP = integrate_and_fire(weight_NxP * (n_N / total_N)[:, None], n_slots)
        x_NxAxW = jnp.einsum("nap,npw->naw", share_NxAxP.astype(self.dtype), x_NxPxW[..., :-1])
        x_NxAxW = nn.Dense(c.width, dtype=self.dtype, name="fired")(x_NxAxW)
        x_NxAxW = x_NxAxW + jnp.asarray(sinusoids(n_slots, c.width), self.dtype)
        fired_NxA = jnp.arange(n_slots) < n_N[:, None]
        x_NxAxW = self._blocks("after", c.n_after)(x_NxAxW, fired_NxA)
        x_NxAxW = nn.LayerNorm(dtype=self.dtype, name="norm")(x_NxAxW)
        return (
            sized_as_text(self, nn.Dense(c.out_width, dtype=self.dtype, name="proj")(x_NxAxW), self.dtype),
            n_N,
            total_N,
        )

    def _blocks(self, name: str, length: int) -> Any:
        if not length:
            return lambda x, valid: x
        in_axes: Any = nn.broadcast
        blocks = nn.scan(
            EncoderBlock, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=in_axes, length=length
        )(self.encoder, self.dtype, jnp.float32, "xla", None, name=name)

        def run(x: jax.Array, valid: jax.Array) -> jax.Array:
            k_end = jnp.broadcast_to(valid.sum(1)[:, None], valid.shape)
            return blocks(x, k_end, valid.astype(jnp.int32))[0]

        return run
