"""Every objective against numpy, on what padding holds, and over chunks and micro-batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aura_jax import losses
from aura_jax.errors import UserError

B, R, D, V = 3, 7, 5, 11


def draw(*shape, seed: int = 0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module")
def layer():
    """Student, target and mask; what is masked out is NaN."""
    student, target = draw(B, R, D), 2 * draw(B, R, D, seed=1)
    mask = (np.arange(R) < np.array([[2], [7], [4]])).astype(np.float32)[:, ::-1]
    assert len(set(mask.sum(1))) == B  # rows of different lengths
    student[mask == 0] = target[mask == 0] = np.nan
    return student, target, mask


def numpy_distill(s, t, kind):
    if kind == "cosine":
        return 1 - s @ t / np.sqrt((s @ s) * (t @ t))
    if kind == "mse":
        return ((s - t) ** 2).mean()
    if kind == "nmse":
        return ((s - t) ** 2).sum() / (t**2).sum()
    error = np.abs(s - t)
    return np.where(error < 1, error**2 / 2, error - 0.5).mean()


@pytest.mark.parametrize("kind", losses.DISTILL_LOSSES)
def test_layer_losses_are_those_of_numpy_and_padding_counts_nowhere(layer, kind):
    student, target, mask = layer
    expected = sum(numpy_distill(student[i], target[i], kind) for i in zip(*np.nonzero(mask), strict=True))
    loss = lambda s: losses.distill(s, target, mask, kind)
    (total, count), grad = jax.jit(jax.value_and_grad(loss, has_aux=True))(student)
    assert count == mask.sum()
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    grad = np.asarray(grad)
    assert np.isfinite(grad).all()
    assert (grad[mask == 0] == 0).all() and (grad[mask > 0] != 0).any(-1).all()


def test_smooth_l1_covers_both_of_its_branches(layer):
    student, target, mask = layer
    error = np.abs(student - target)[mask > 0]
    assert (error < 1).any() and (error > 1).any()


@pytest.mark.parametrize("kind", losses.DISTILL_LOSSES)
def test_equal_states_lose_nothing_and_zeros_have_finite_gradients(kind):
    h, zeros, mask = draw(B, R, D), np.zeros((B, R, D), np.float32), np.ones((B, R))
    loss = jax.jit(jax.value_and_grad(lambda s, t: losses.distill(s, t, mask, kind)[0]))
    np.testing.assert_allclose(loss(h, h)[0], 0, atol=1e-5)
    assert np.isfinite(loss(zeros, h)[1]).all() and np.isfinite(loss(zeros, zeros)[1]).all()


def test_layer_losses_of_an_empty_mask_are_zero(layer):
    student, target, mask = layer
    run = jax.jit(lambda: [losses.distill(student, target, 0 * mask, kind) for kind in losses.DISTILL_LOSSES])
    assert run() == [(0, 0)] * len(losses.DISTILL_LOSSES)


def test_layer_losses_run_in_float32():
    student, target = (draw(B, R, D, seed=s).astype(jnp.bfloat16) for s in (0, 1))
    total, _ = losses.distill(student, target, np.ones((B, R)), "mse")
    assert total.dtype == jnp.float32
    exact = ((student.astype(np.float32) - target.astype(np.float32)) ** 2).mean(-1).sum()
    np.testing.assert_allclose(total, exact, rtol=1e-6)


def test_unknown_layer_loss_suggests_the_nearest():
    with pytest.raises(UserError, match="did you mean 'cosine'"):
        losses.distill(jnp.ones((1, 2)), jnp.ones((1, 2)), jnp.ones(1), "cosin")


def test_relative_l2_is_that_of_numpy_and_padding_counts_nowhere(layer):
    h, base, mask = layer
    loss = lambda h: losses.relative_l2(h, base, mask)
    valid = mask > 0
    expected = (((h - base) ** 2).sum(-1) / (base**2).sum(-1))[valid].sum()
    (total, count), grad = jax.jit(jax.value_and_grad(loss, has_aux=True))(h)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert count == mask.sum()
    grad = np.asarray(grad)
    assert np.isfinite(grad).all() and (grad[~valid] == 0).all() and (grad[valid] != 0).all()


def log_softmax(x):
    x = x.astype(np.float64)
    return x - x.max(-1, keepdims=True) - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))


@pytest.fixture(scope="module")
def targets():
    """Head [D, V], two readings [B, R, D], ids and weights; what has weight 0 is NaN."""
    head, teacher, student = draw(D, V), draw(B, R, D, seed=1), draw(B, R, D, seed=2)
    ids = np.random.default_rng(3).integers(0, V, (B, R))
    weight = np.random.default_rng(4).choice([0.0, 0.5, 1.0, 2.0], (B, R)).astype(np.float32)
    assert (weight == 0).any()
    teacher[weight == 0] = student[weight == 0] = np.nan
    return head, teacher, student, ids, weight


# One target at a time, chunks that do and do not divide R = 7, and more than all targets.
CHUNKS = [1, 2 * B, 4 * B, 10_000]


def cross_entropy(head, h, ids, weight, chunk):
    return losses.cross_entropy(lambda h: h @ head, h, ids, weight, chunk)


def kl(head, teacher, student, weight, chunk, temperature=1.0):
    return losses.kl_divergence(lambda h: h @ head, teacher, student, weight, chunk, temperature)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_cross_entropy_and_its_gradients_are_those_of_numpy_for_every_chunk(targets, chunk):
    head, _, h, ids, weight = targets
    loss = lambda head, h: cross_entropy(head, h, ids, weight, chunk)
    (total, count), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(head, h)
    clean = np.nan_to_num(h)
    log_probs = log_softmax(clean @ head)
    nll = -np.take_along_axis(log_probs, ids[..., None], -1)[..., 0]
    np.testing.assert_allclose(total, (nll * weight).sum(), rtol=1e-5)
    assert count == weight.sum()
    error = (np.exp(log_probs) - np.eye(V)[ids]) * weight[..., None]
    np.testing.assert_allclose(grads[0], np.einsum("brd,brv->dv", clean, error), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(grads[1], error @ head.T, rtol=1e-4, atol=1e-5)


@pytest.mark.optimised
def test_no_array_holds_the_logits_of_all_targets():
    """Neither forward nor backward, in the compiled program."""
    n_rows, n_targets, vocab = 2, 64, 999
    h, head = jnp.ones((n_rows, n_targets, D)), jnp.ones((D, vocab))
    ids, weight = jnp.zeros((n_rows, n_targets), jnp.int32), jnp.ones((n_rows, n_targets))
    loss = lambda head, h, chunk: cross_entropy(head, h, ids, weight, chunk)[0]
    temp = [
        jax.jit(jax.grad(lambda head, h, c=c: loss(head, h, c), argnums=(0, 1))).lower(head, h).compile()
        .memory_analysis().temp_size_in_bytes
        for c in (8, n_rows * n_targets)
    ]  # fmt: skip
    all_logits = 4 * n_rows * n_targets * vocab
    assert temp[0] < all_logits / 3 < all_logits <= temp[1]


@pytest.mark.parametrize(("chunk", "temperature"), [(1, 1.0), (2 * B, 2.0), (10_000, 0.5)])
def test_kl_is_that_of_numpy_and_teaches_the_student_only(targets, chunk, temperature):
    head, teacher, student, _, weight = targets
    loss = lambda teacher, student: kl(head, teacher, student, weight, chunk, temperature)
    (total, count), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(teacher, student)
    p, q = (log_softmax(np.nan_to_num(h) @ head / temperature) for h in (teacher, student))
    expected = ((np.exp(p) * (p - q)).sum(-1) * temperature**2 * weight).sum()
    np.testing.assert_allclose(total, expected, rtol=1e-4)
    assert count == weight.sum()
    # In the logits, the gradient is T (q - p).
    error = temperature * (np.exp(q) - np.exp(p)) * weight[..., None]
    np.testing.assert_allclose(grads[1], error @ head.T, rtol=1e-3, atol=1e-5)
    assert (np.asarray(grads[0]) == 0).all()


def test_kl_of_equal_readings_is_zero_and_so_is_its_gradient(targets):
    head, teacher, _, _, weight = targets
    value, grad = jax.jit(jax.value_and_grad(lambda s: kl(head, teacher, s, weight, 6)[0]))(teacher)
    np.testing.assert_allclose(value, 0, atol=1e-5)
    np.testing.assert_allclose(grad, 0, atol=1e-5)


def test_sums_and_counts_of_micro_batches_add_up(layer, targets):
    """The mean over all rows is not the mean of the micro-batches' means."""
    student, target, mask = layer
    head, teacher, h, ids, weight = targets

    @jax.jit
    def objectives(student, target, mask, teacher, h, ids, weight):
        return jnp.array(
            [
                losses.distill(student, target, mask, "cosine"),
                losses.relative_l2(student, target, mask),
                cross_entropy(head, h, ids, weight, 4),
                kl(head, teacher, h, weight, 4, 2.0),
            ]
        )

    arrays = (student, target, mask, teacher, h, ids, weight)
    whole = objectives(*arrays)
    parts = [objectives(*(x[rows] for x in arrays)) for rows in (slice(0, 1), slice(1, B))]
    np.testing.assert_allclose(parts[0] + parts[1], whole, rtol=1e-5)
    means = [part[:, 0] / part[:, 1] for part in (*parts, whole)]
    assert (np.abs((means[0] + means[1]) / 2 - means[2]) > 1e-3).all()
