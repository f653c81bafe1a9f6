"""The null space of text: what spans it, and that A stays in it while everything else trains."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aura_jax import checkpoint, config, sharding, system
from aura_jax.errors import UserError
from aura_jax.train import null_space
from aura_jax.train import step as step_lib
from aura_jax.train.null_space import _trailing
from tests.train.conftest import trainable

TOKENS = np.arange(5, 5 + 6 * 16, dtype=np.int32).reshape(6, 16)
ENERGY = 0.1


@pytest.fixture(scope="module")
def found(tiny_config):
    built = system.build(tiny_config())
    mesh = checkpoint.system_mesh(built.config)
    params = system.initial_variables(built, mesh)["params"]
    return built, params, null_space.bases(built, params, [TOKENS[:3], TOKENS[3:]], ENERGY, mesh)


def test_the_smallest_eigenvalues_up_to_the_energy():
    moment = np.stack([np.diag([6.0, 0.3, 0.0, 3.0, 0.7]), np.diag([1.0, 1.0, 1.0, 1.0, 1.0])]).astype(np.float32)
    basis_NxIxC = _trailing(moment, 0.1, at_least=2)
    np.testing.assert_array_equal(np.abs(basis_NxIxC[0]).sum(1) > 0, [False, True, True, False, True])
    assert basis_NxIxC.shape == (2, 5, 3)
    # A tenth of a flat spectrum is no direction at all: A still gets as many as it has columns.
    assert (np.abs(basis_NxIxC[1]).sum(0) > 0).tolist() == [True, True, False]


def test_every_input_has_an_orthonormal_basis(found):
    built, _, bases = found
    llm = built.model.config.llm
    assert {name: basis.shape[1] for name, basis in bases.items()} == {
        "qkv": llm.width,
        "o": llm.n_heads * llm.head_width,
        "gate_up": llm.width,
        "down": llm.mlp_width,
    }
    for name, basis_NxIxC in bases.items():
        gram_NxCxC = np.einsum("nic,nid->ncd", basis_NxIxC, basis_NxIxC)
        kept_NxC = (np.abs(basis_NxIxC).sum(1) > 0).astype(np.float32)
        np.testing.assert_allclose(gram_NxCxC, np.eye(gram_NxCxC.shape[1]) * kept_NxC[:, None], atol=1e-5, err_msg=name)


def test_text_has_the_energy_asked_for_in_it(found):
    """The first block's input, by hand: embeddings, normalised."""
    _, params, bases = found
    x = np.asarray(params["llm"]["embed"]["embedding"])[TOKENS.reshape(-1)]
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * params["llm"]["adapted"]["input_norm"]["scale"][0]
    x = x / np.linalg.norm(x, axis=-1, keepdims=True)
    share = lambda n: ((x @ bases["qkv"][0][:, :n]) ** 2).sum() / len(x)
    n_kept = int((np.abs(bases["qkv"][0]).sum(0) > 0).sum())
    assert 0.5 * ENERGY < share(n_kept) <= ENERGY * 1.001


def test_confined_twice_is_confined_once(found):
    _, _, bases = found
    path = "lora/llm/adapted/mlp/down/a"
    leaves = {path: jax.random.normal(jax.random.key(0), (2, bases["down"].shape[1], 8)), "other": jnp.ones(3)}
    once = null_space.confine(leaves, bases)
    assert once["other"] is leaves["other"] and not np.allclose(once[path], leaves[path])
    np.testing.assert_allclose(null_space.confine(once, bases)[path], once[path], atol=1e-5)


@pytest.mark.slow
def test_a_stays_inside_while_it_learns(make_config, make_run):
    c = make_config(lm=1.0)
    c.optimizer.weight_decay = 0.1
    built, variables, batch, mesh = make_run(c)
    bases = null_space.bases(built, variables["params"], [TOKENS], ENERGY, mesh)
    variables = sharding.join(null_space.confine(sharding.flatten(variables), bases), {})
    rates, trained, frozen = trainable(built, variables)
    state = step_lib.new_state(c, trained, 0, mesh)
    before = jax.device_get(state.trained)
    step = step_lib.jit_step(built, c.train.stages.only, 0, rates, mesh)
    for _ in range(4):
        state, _ = step(state, frozen, step_lib.Constants(null_space=bases), batch)
    after = jax.device_get(state.trained)
    inside = null_space.confine(after, bases)
    adapters = [path for path in after if path.startswith("lora/") and path.endswith("/a")]
    assert len(adapters) == 7
    for path in adapters:
        assert np.abs(after[path] - before[path]).max() > 1e-3
        assert np.abs(after[path] - inside[path]).max() < 1e-5 * np.abs(after[path]).max(), path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora.text_energy": 0.0}, "lora.text_energy is a share above 0 and up to 1, not 0.0"),
        ({"lora.text_energy": 0.1, "data.text_pool": ""}, "lora.text_energy below 1 needs text to measure"),
    ],
)
def test_impossible_values_are_named(make_config, changes, message):
    c = make_config()
    c.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message):
        config.validate(c)
