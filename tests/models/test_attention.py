"""Attention against a loop over explicit sets of keys, and the intervals that spans get."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aura_jax.errors import UserError
from aura_jax.models.attention import attention, key_end

T = 14
# Two examples in a row. One: text, a clip of 7 tokens, text. The other: text and, back to back, clips of 2 and 1.
SEGMENT = np.array([1] * 10 + [2] * 4)
SPANS = [(2, 9), (11, 13), (13, 14)]
START, END = np.arange(T), np.arange(T) + 1
for first, last in SPANS:
    START[first:last], END[first:last] = first, last

# Exclusive ends, written out by hand.
EXPECTED_END = {
    ("causal", 0): [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14],
    ("bidirectional", 0): [1, 2, 9, 9, 9, 9, 9, 9, 9, 10, 11, 13, 13, 14],
    ("block", 3): [1, 2, 5, 5, 5, 8, 8, 8, 9, 10, 11, 13, 13, 14],
    ("block", 1): [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14],
    ("block", 7): [1, 2, 9, 9, 9, 9, 9, 9, 9, 10, 11, 13, 13, 14],
}

run = jax.jit(attention, static_argnames=("impl", "scale"))


def draw(*shape, seed: int = 0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def loop(q, k, v, allowed, scale):
    """Attention by the book: float64, one query and one head at a time, over the set of keys it may see."""
    B, T, H, _ = q.shape
    repeat = H // k.shape[2]
    out = np.zeros(q.shape)
    for b, t, h in np.ndindex(B, T, H):
        keys = sorted(allowed[b][t])
        if keys:
            scores = k[b, keys, h // repeat].astype(np.float64) @ q[b, t, h] * scale
            weights = np.exp(scores - scores.max())
            out[b, t, h] = weights @ v[b, keys, h // repeat] / weights.sum()
    return out


@pytest.mark.parametrize(("mask", "chunk"), EXPECTED_END)
def test_key_ends(mask, chunk):
    ends = key_end(jnp.asarray(START)[None], jnp.asarray(END)[None], mask, chunk)
    np.testing.assert_array_equal(ends, [EXPECTED_END[mask, chunk]])


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)], ids=["multi-head", "grouped", "one kv head"])
@pytest.mark.parametrize(("mask", "chunk"), [("causal", 0), ("bidirectional", 0), ("block", 3)])
def test_equals_a_loop_over_explicit_sets(mask, chunk, heads):
    """Two rows: the two examples above, and the first of them left-padded by 4 columns."""
    H, G = heads
    K = 5
    q, k, v = draw(2, T, H, K), draw(2, T, G, K, seed=1), draw(2, T, G, K, seed=2)
    ends = EXPECTED_END[mask, chunk]
    ends = np.array([ends, [1, 2, 3, 4, *(end + 4 for end in ends[:10])]])
    segment = np.array([SEGMENT, [0] * 4 + [1] * 10])
    allowed = [
        [{s for s in range(ends[b][t]) if segment[b][t] == segment[b][s] != 0} for t in range(T)] for b in (0, 1)
    ]
    assert allowed[1][:4] == [set()] * 4 and allowed[0][10] == {10} and allowed[1][4] == {4}
    out = run(q, k, v, ends, segment, segment)
    np.testing.assert_allclose(out, loop(q, k, v, allowed, K**-0.5), atol=2e-6)
    assert (np.asarray(out[1, :4]) == 0).all()


def test_queries_of_a_cache_see_columns_of_the_cache():
    """One query per row against 9 keys, with a scale of its own; a row whose query is padding gives zeros."""
    q, k, v = draw(3, 1, 4, 6), draw(3, 9, 2, 6, seed=1), draw(3, 9, 2, 6, seed=2)
    k_segment = np.array([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9, [1] * 9])
    ends, q_segment = np.array([[6], [9], [9]]), np.array([[1], [1], [0]])
    out = run(q, k, v, ends, q_segment, k_segment, scale=0.3)
    allowed = [[{2, 3, 4, 5}], [set(range(9))], [set()]]
    np.testing.assert_allclose(out, loop(q, k, v, allowed, 0.3), atol=2e-6)


def test_neighbours_in_a_row_and_padding_change_no_bit():
    H, K = 4, 5
    q, k, v = draw(1, T, H, K), draw(1, T, 2, K, seed=1), draw(1, T, 2, K, seed=2)
    ends = np.array([EXPECTED_END["bidirectional", 0]])
    segment = SEGMENT[None].copy()
    segment[0, 0] = 0  # padding at the start
    before = np.asarray(run(q, k, v, ends, segment, segment))
    for changed in (slice(10, 14), slice(0, 1)):
        k2, v2, q2 = k.copy(), v.copy(), q.copy()
        for x in (k2, v2, q2):
            x[:, changed] = 100 * draw(*x[:, changed].shape, seed=3)
        after = np.asarray(run(q2, k2, v2, ends, segment, segment))
        np.testing.assert_array_equal(after[:, 1:10], before[:, 1:10])
    assert np.abs(before[:, 1:10]).min() > 0


def test_gradients_are_finite_where_rows_have_no_key():
    q, k, v = draw(1, T, 2, 4), draw(1, T, 2, 4, seed=1), draw(1, T, 2, 4, seed=2)
    segment = np.where(np.arange(T) < 3, 0, SEGMENT)[None]
    ends = np.array([EXPECTED_END["causal", 0]])
    grads = jax.grad(lambda qkv: (run(*qkv, ends, segment, segment) ** 2).sum())((q, k, v))
    for grad in grads:
        assert np.isfinite(grad).all() and (np.asarray(grad[:, :3]) == 0).all() and np.any(grad[:, 3:])


def test_softmax_of_16_bit_inputs_runs_in_float32():
    """With scores in the hundreds, bfloat16 scores would be off by whole units."""
    q, k, v = (x.astype(jnp.bfloat16) for x in (20 * draw(1, T, 2, 8), 20 * draw(1, T, 2, 8, seed=1), draw(1, T, 2, 8)))
    ends, segment = np.array([EXPECTED_END["causal", 0]]), np.ones((1, T), np.int32)
    out = run(q, k, v, ends, segment, segment)
    assert out.dtype == jnp.bfloat16
    exact = run(*(x.astype(jnp.float32) for x in (q, k, v)), ends, segment, segment)
    np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=0.02)


def test_no_kernel_is_substituted():
    x, ends, segment = jnp.ones((1, 2, 1, 8)), jnp.ones((1, 2), jnp.int32), jnp.ones((1, 2), jnp.int32)
    call = functools.partial(attention, k_end_BxT=ends, q_segment_BxT=segment, k_segment_BxS=segment)
    for dtype in (jnp.float32, jnp.bfloat16):  # the tests' backend is the CPU
        with pytest.raises(UserError, match="'cudnn' needs an NVIDIA GPU"):
            call(*[x.astype(dtype)] * 3, impl="cudnn")
    with pytest.raises(UserError, match="unknown attention implementation 'flash': valid: xla, cudnn"):
        call(x, x, x, impl="flash")


def test_rows_longer_than_a_chunk_of_queries_give_the_same(monkeypatch):
    """Output and gradients, for a length that the chunks do not divide."""
    args = [draw(2, 23, 4, 8), draw(2, 23, 2, 8, seed=1), draw(2, 23, 2, 8, seed=2)]
    k_end = np.minimum(np.arange(23) + 4, 23)[None].repeat(2, 0)
    segment = np.repeat([[0, 1, 1, 2], [1, 1, 2, 2]], [6, 6, 6, 5], axis=1)

    def both(*args):
        out = attention(*args, k_end, segment, segment)
        return jnp.sum(jnp.sin(out)), out

    grad = jax.grad(both, argnums=(0, 1, 2), has_aux=True)
    expected = grad(*args)
    monkeypatch.setattr("aura_jax.models.attention._QUERIES", 5)
    for a, b in zip(jax.tree.leaves(grad(*args)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max())
