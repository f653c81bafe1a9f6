"""Attention whose mask is one interval per query, and the intervals that audio spans get.

Dimensions: B rows, T queries, S keys, H query heads, G key/value heads, K width of a head.
"""

import jax
import jax.numpy as jnp

from aura_jax.errors import UserError
from aura_jax.models.splash import splash_attention

MASKS = ("causal", "bidirectional", "block")
IMPLEMENTATIONS = ("xla", "cudnn", "splash")
_QUERIES = 512  # of "xla", whose scores are held at a time: those of all would be most of a long row's memory


def key_end(span_start_BxT: jax.Array, span_end_BxT: jax.Array, mask: str, chunk: int = 0) -> jax.Array:
    """Returns for each query the exclusive end of the key columns that it may see, int32 [B, T].

    Text is causal under every mask. Inside an audio span, "causal" keeps that, "bidirectional" opens the whole span,
    and "block" opens the span up to the end of the query's chunk of `chunk` tokens, which is what can be streamed.

    Args:
      span_start_BxT: first column of the span a token belongs to; its own column for text.
      span_end_BxT: exclusive last column of that span; its own column + 1 for text.
    """
    q_T = jnp.arange(span_start_BxT.shape[1], dtype=jnp.int32)
    if mask == "causal":
        return jnp.broadcast_to(q_T + 1, span_end_BxT.shape)
    if mask == "bidirectional":
        return span_end_BxT
    chunk_end_BxT = span_start_BxT + ((q_T - span_start_BxT) // chunk + 1) * chunk
    return jnp.minimum(chunk_end_BxT, span_end_BxT)


def columns_ahead(mask: str, chunk: int, n_audio: int) -> int:
    """Returns how many columns behind its own a query sees at most under `key_end`, in spans of up to `n_audio`."""
    span = {"causal": 1, "bidirectional": n_audio, "block": min(chunk, n_audio)}[mask]
    return max(span - 1, 0)


def attention(
    q_BxTxHxK: jax.Array,
    k_BxSxGxK: jax.Array,
    v_BxSxGxK: jax.Array,
    k_end_BxT: jax.Array,
    q_segment_BxT: jax.Array,
    k_segment_BxS: jax.Array,
    impl: str = "xla",
    scale: float | None = None,
    ahead: int | None = None,
) -> jax.Array:
    """Returns attention's output [B, T, H, K] in the dtype of `v`.

    Query q sees key s if s < k_end[q] and both are in the same segment; segment 0 is padding, sees nothing, and gets
    zeros. Softmax runs in float32. Grouped-query attention if G < H.

    Args:
      impl: "xla", the reference on every backend, "cudnn" (NVIDIA GPU, 16-bit inputs), or "splash" (TPU).
      scale: of the scores; K ** -0.5 if None.
      ahead: a promise that `k_end[t] <= t + 1 + ahead`, by which "splash" passes over the keys behind; None: none.

    Raises:
      UserError: for "cudnn" without an NVIDIA GPU or with 32-bit inputs, and for "splash" without a TPU or on a mesh
        that splits the heads unevenly: no other kernel is substituted.
    """
    B, T, H, K = q_BxTxHxK.shape
    S = k_BxSxGxK.shape[1]
    factor = K**-0.5 if scale is None else scale
    if impl == "splash":
        return splash_attention(q_BxTxHxK, k_BxSxGxK, v_BxSxGxK, k_end_BxT, q_segment_BxT, k_segment_BxS, factor, ahead)
    in_reach_BxTxS = jnp.arange(S) < k_end_BxT[:, :, None]
    same_BxTxS = (q_segment_BxT[:, :, None] == k_segment_BxS[:, None, :]) & (q_segment_BxT[:, :, None] != 0)
    mask_BxTxS = in_reach_BxTxS & same_BxTxS

    if impl == "cudnn":
        if jax.default_backend() != "gpu" or q_BxTxHxK.dtype not in (jnp.bfloat16, jnp.float16):
            raise UserError("attention 'cudnn' needs an NVIDIA GPU and a 16-bit dtype: set model.attention='xla'")
        out_BxTxHxK = jax.nn.dot_product_attention(
            q_BxTxHxK, k_BxSxGxK, v_BxSxGxK, mask=mask_BxTxS[:, None], scale=factor, implementation="cudnn"
        )
        # cuDNN averages over all keys where none is allowed.
        return jnp.where(mask_BxTxS.any(-1)[:, :, None, None], out_BxTxHxK, 0)
    if impl != "xla":
        raise UserError(f"unknown attention implementation {impl!r}: valid: {', '.join(IMPLEMENTATIONS)}")

    n_chunks = -(-T // _QUERIES)
    if n_chunks <= 1:
        return _attend(q_BxTxHxK, k_BxSxGxK, v_BxSxGxK, mask_BxTxS, factor)
    size = -(-T // n_chunks)

    def cut(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, n_chunks * size - T)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, n_chunks, size, *x.shape[2:]), 1, 0)

    # Rematerialised: the backward pass computes a chunk's scores anew rather than keeping those of all.
    body = jax.checkpoint(lambda xs: _attend(xs[0], k_BxSxGxK, v_BxSxGxK, xs[1], factor))
    out_NxBxTxHxK = jax.lax.map(body, (cut(q_BxTxHxK), cut(mask_BxTxS)))
    return jnp.moveaxis(out_NxBxTxHxK, 0, 1).reshape(B, n_chunks * size, H, K)[:, :T]


def _attend(
    q_BxTxHxK: jax.Array, k_BxSxGxK: jax.Array, v_BxSxGxK: jax.Array, mask_BxTxS: jax.Array, factor: float
) -> jax.Array:
    """Attention that holds the scores of all these queries."""
    B, T, H, K = q_BxTxHxK.shape
    G = k_BxSxGxK.shape[2]
    q_BxTxGxRxK = q_BxTxHxK.reshape(B, T, G, H // G, K)
    scores = jnp.einsum("btgrk,bsgk->bgrts", q_BxTxGxRxK, k_BxSxGxK, preferred_element_type=jnp.float32)
    mask = mask_BxTxS[:, None, None]
    probs = jax.nn.softmax(jnp.where(mask, scores * factor, jnp.finfo(jnp.float32).min), axis=-1)
    probs = jnp.where(mask, probs, 0).astype(v_BxSxGxK.dtype)
    return jnp.einsum("bgrts,bsgk->btgrk", probs, v_BxSxGxK).reshape(B, T, H, K)
