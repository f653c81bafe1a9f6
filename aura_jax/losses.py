"""Objectives: pure functions that return (sum, count), so that means over micro-batches, devices and hosts are exact.

Dimensions: B rows, R targets of a row (r in a chunk), D width of the student, E of the teacher, V vocabulary; `...` any
leading axes.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from aura_jax.errors import UserError, nearest

DISTILL_LOSSES = ("cosine", "mse", "nmse", "smooth_l1")

SumCount = tuple[jax.Array, jax.Array]


def _hide(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Puts ones where `mask` [...] is 0 in `x` [..., E], before any nonlinearity: padding may hold anything, and the
    gradient of a NaN that is left out afterwards is still NaN (NaN * 0)."""
    return jnp.where(mask[..., None] > 0, x, 1)


def _masked(value: jax.Array, mask: jax.Array) -> SumCount:
    # Select rather than multiply: a padded position may hold anything, NaN included.
    return jnp.where(mask > 0, value * mask, 0).sum(), mask.astype(jnp.float32).sum()


def distill(student: jax.Array, target: jax.Array, mask: jax.Array, kind: str) -> SumCount:
    """Returns the layer loss summed over tokens, and the number of tokens.

    Args:
      student, target: [..., E]; the loss is a mean over E, so that blocks of different widths compare.
      mask: [...], 1 where a token counts.
      kind: "cosine" (1 - cosine), "mse", "nmse" (squared error over the target's squared norm), "smooth_l1".
    """
    student, target = _hide(student.astype(jnp.float32), mask), _hide(target.astype(jnp.float32), mask)
    error = student - target
    if kind == "cosine":
        norms = jnp.sum(student**2, -1) * jnp.sum(target**2, -1)
        value = 1 - jnp.sum(student * target, -1) * jax.lax.rsqrt(norms + 1e-12)
    elif kind == "mse":
        value = jnp.mean(error**2, -1)
    elif kind == "nmse":
        value = jnp.sum(error**2, -1) / (jnp.sum(target**2, -1) + 1e-6)
    elif kind == "smooth_l1":
        size = jnp.abs(error)
        value = jnp.mean(jnp.where(size < 1, 0.5 * error**2, size - 0.5), -1)
    else:
        raise UserError(f"unknown distill.loss {kind!r}: {nearest(kind, DISTILL_LOSSES)}")
    return _masked(value, mask)


def relative_l2(h: jax.Array, base: jax.Array, mask: jax.Array) -> SumCount:
    """Returns the sum over tokens of |h - base|^2 / |base|^2, for h and base [..., D], and the number of tokens."""
    h, base = _hide(h.astype(jnp.float32), mask), _hide(base.astype(jnp.float32), mask)
    return _masked(jnp.sum((h - base) ** 2, -1) / (jnp.sum(base**2, -1) + 1e-6), mask)


def quantity(total: jax.Array, n_tokens: jax.Array) -> SumCount:
    """Returns the sum over clips of |total / n - 1|, and the number of clips.

    Args:
      total: [...], the tokens that an embedder would give each clip: its weights' sum (BLSP-KD, arXiv 2405.19041).
      n_tokens: [...], those that the clip's transcript has; 0 where there is no clip.
    """
    there = n_tokens > 0
    return _masked(jnp.abs(total / jnp.maximum(n_tokens, 1) - 1), there)


def _over_chunks(chunk_sum: Callable[..., jax.Array], arrays: tuple[jax.Array, ...], chunk: int) -> jax.Array:
    """Sums `chunk_sum` over chunks of about `chunk` targets, holding one chunk's logits at a time.

    Chunks run along axis 1: rows (axis 0) stay where the mesh put them.
    """
    n_rows, n = arrays[0].shape[:2]
    n_chunks = -(-n // max(1, chunk // n_rows))
    if n_chunks == 1:
        return chunk_sum(*arrays)  # its logits may as well be kept for the backward pass
    size = -(-n // n_chunks)

    def cut(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, n_chunks * size - n)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(n_rows, n_chunks, size, *x.shape[2:]), 1, 0)

    # Rematerialised: the backward pass computes a chunk's logits anew rather than keeping all of them.
    body = jax.checkpoint(lambda total, xs: (total + chunk_sum(*xs), None))
    return jax.lax.scan(body, jnp.float32(0), tuple(cut(x) for x in arrays))[0]


def cross_entropy(
    logits: Callable[[jax.Array], jax.Array],
    h_BxRxD: jax.Array,
    id_BxR: jax.Array,
    weight_BxR: jax.Array,
    chunk: int,
) -> SumCount:
    """Returns the weighted next-token cross-entropy in nats, and the sum of weights.

    Args:
      logits: maps [B, r, D] to float32 [B, r, V]; called on about `chunk` targets at a time.
      h_BxRxD: the states that predict, gathered at the targets.
      weight_BxR: 0 for padding.
    """

    def chunk_sum(h_BxrxD: jax.Array, id_Bxr: jax.Array, weight_Bxr: jax.Array) -> jax.Array:
        log_probs_BxrxV = jax.nn.log_softmax(logits(_hide(h_BxrxD, weight_Bxr)))
        nll_Bxr = -jnp.take_along_axis(log_probs_BxrxV, id_Bxr[..., None], axis=-1)[..., 0]
        return jnp.where(weight_Bxr > 0, nll_Bxr * weight_Bxr, 0).sum()

    return _over_chunks(chunk_sum, (h_BxRxD, id_BxR, weight_BxR), chunk), weight_BxR.astype(jnp.float32).sum()


def kl_divergence(
    logits: Callable[[jax.Array], jax.Array],
    teacher_BxRxD: jax.Array,
    student_BxRxD: jax.Array,
    weight_BxR: jax.Array,
    chunk: int,
    temperature: float = 1.0,
) -> SumCount:
    """Returns T^2 KL(teacher || student) of next-token distributions at temperature T in nats, and the sum of weights.

    Both readings go through the same head (BLSP-KD, arXiv 2405.19041: KL(text || speech)); no gradient flows to the
    teacher.
    """
    teacher_BxRxD = jax.lax.stop_gradient(teacher_BxRxD)

    def chunk_sum(teacher_BxrxD: jax.Array, student_BxrxD: jax.Array, weight_Bxr: jax.Array) -> jax.Array:
        p_BxrxV = jax.nn.log_softmax(logits(_hide(teacher_BxrxD, weight_Bxr)) / temperature)
        q_BxrxV = jax.nn.log_softmax(logits(_hide(student_BxrxD, weight_Bxr)) / temperature)
        kl_Bxr = jnp.sum(jnp.exp(p_BxrxV) * (p_BxrxV - q_BxrxV), -1) * temperature**2
        return jnp.where(weight_Bxr > 0, kl_Bxr * weight_Bxr, 0).sum()

    total = _over_chunks(chunk_sum, (teacher_BxRxD, student_BxRxD, weight_BxR), chunk)
    return total, weight_BxR.astype(jnp.float32).sum()
