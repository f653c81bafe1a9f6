"""Layer maps over blocks, and the pooling of teacher frames into tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aura_jax.errors import UserError
from aura_jax.models.align import LAYER_MAPS, layer_map, pool_frames


@pytest.mark.parametrize(
    ("kind", "n_student", "n_teacher", "expected"),
    [
        ("stride", 12, 4, [(2, 0), (5, 1), (8, 2), (11, 3)]),
        ("stride", 4, 12, [(0, 2), (1, 5), (2, 8), (3, 11)]),
        ("stride", 5, 4, [(0, 0), (1, 1), (2, 2), (4, 3)]),
        ("stride", 3, 3, [(0, 0), (1, 1), (2, 2)]),
        ("identity", 12, 4, [(0, 0), (1, 1), (2, 2), (3, 3)]),
        ("identity", 2, 4, [(0, 0), (1, 1)]),
        ("last", 12, 4, [(8, 0), (9, 1), (10, 2), (11, 3)]),
        ("last", 2, 4, [(0, 2), (1, 3)]),
        ("list", 12, 4, [(0, 3), (11, 0)]),
    ],
)
def test_layer_maps(kind, n_student, n_teacher, expected):
    pairs = expected if kind == "list" else ()
    assert layer_map(kind, n_student, n_teacher, pairs) == tuple(expected)


@pytest.mark.parametrize("kind", [k for k in LAYER_MAPS if k != "list"])
def test_layer_maps_stay_in_range_ascend_and_use_all_of_the_shallower_model(kind):
    for n_student in range(1, 14):
        for n_teacher in range(1, 14):
            students, teachers = zip(*layer_map(kind, n_student, n_teacher), strict=True)
            assert len(students) == min(n_student, n_teacher)
            for blocks, n in ((students, n_student), (teachers, n_teacher)):
                assert list(blocks) == sorted(set(blocks)) and blocks[0] >= 0 and blocks[-1] < n
            if kind == "stride":
                assert (students[-1], teachers[-1]) == (n_student - 1, n_teacher - 1)


@pytest.mark.parametrize(
    ("kind", "pairs", "message"),
    [
        ("strides", (), "unknown distill.layer_map 'strides': did you mean 'stride'?"),
        ("list", (), "distill.pairs is empty"),
        ("list", ((0, 4),), r"\(0, 4\) is out of range: 12 adapted student blocks and 4 teacher blocks"),
        ("list", ((12, 0),), r"\(12, 0\) is out of range"),
        ("list", ((-1, 0),), r"\(-1, 0\) is out of range"),
        ("list", ((3, 0), (3, 1)), r"must ascend without repetition, not \[3, 3\]"),
        ("list", ((5, 0), (3, 1)), r"must ascend without repetition, not \[5, 3\]"),
        ("stride", ((0, 0),), "distill.layer_map is 'stride': drop one of them"),
    ],
)
def test_layer_map_errors(kind, pairs, message):
    with pytest.raises(UserError, match=message) as caught:
        layer_map(kind, 12, 4, pairs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("frames_per_token", [2, 4, 6, 8])
def test_an_impulse_lands_in_the_token_that_covers_its_frame(frames_per_token):
    n_frames = 21
    impulses_NxFxE = np.eye(n_frames, dtype=np.float32)[:, :, None]  # clip n rings at frame n
    pooled_NxA = np.asarray(pool_frames(impulses_NxFxE, np.full(n_frames, n_frames), frames_per_token))[..., 0]
    assert pooled_NxA.shape == (n_frames, -(-n_frames // frames_per_token))
    for frame, tokens_A in enumerate(pooled_NxA):
        token = frame // frames_per_token
        covered = min(frames_per_token, n_frames - token * frames_per_token)  # the last token covers what is left
        np.testing.assert_array_equal(tokens_A, np.where(np.arange(len(tokens_A)) == token, np.float32(1 / covered), 0))


def test_pooling_means_valid_frames_only_and_does_not_depend_on_the_bucket():
    n_frames_N, frames_per_token = np.array([0, 1, 4, 9, 11]), 4
    h_NxFxE = np.random.default_rng(0).normal(size=(5, 11, 3)).astype(np.float32)
    expected = np.zeros((5, 3, 3), np.float32)
    for n, length in enumerate(n_frames_N):
        for a in range(-(-length // frames_per_token)):
            expected[n, a] = h_NxFxE[n, a * frames_per_token : min(length, (a + 1) * frames_per_token)].mean(0)
    for n_frames in (11, 12, 17):  # none is a multiple of another
        padded = np.full((5, n_frames, 3), np.nan, np.float32)
        for n, length in enumerate(n_frames_N):
            padded[n, :length] = h_NxFxE[n, :length]
        pooled = np.asarray(pool_frames(padded, n_frames_N, frames_per_token))
        np.testing.assert_allclose(pooled[:, :3], expected, atol=1e-6)
        assert (pooled[:, 3:] == 0).all()


def test_pooling_runs_in_float32_and_its_gradient_ignores_padding():
    h_NxFxE = jnp.full((1, 6, 2), jnp.nan, jnp.bfloat16).at[:, :3].set(1.0)
    assert pool_frames(h_NxFxE, jnp.array([3]), 2).dtype == jnp.float32
    grad = jax.grad(lambda h: pool_frames(h, jnp.array([3]), 2).sum())(h_NxFxE.astype(jnp.float32))
    np.testing.assert_array_equal(grad[0, :, 0], [0.5, 0.5, 1, 0, 0, 0])
