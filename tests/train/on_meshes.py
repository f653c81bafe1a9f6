"""Steps of a tiny run on meshes of eight CPU devices, against one device: `python -m tests.train.on_meshes CONFIG DIR`.

A process of its own, because the number of devices is settled when jax starts. It prints a line for each mesh.
"""

import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from aura_jax import config, sharding, system
from aura_jax.config import Config
from aura_jax.train import step as step_lib
from aura_jax.train.inputs import Inputs
from tests.train.conftest import trainable

STEPS = 2
# (data, fsdp, tensor), where LoRA acts, micro-batches. Every mesh, both parts of the batch's split, every scope and
# accumulation are there, not all of their combinations: each is a compilation.
CASES = (
    ((8, 1, 1), "request", 2),
    ((1, 8, 1), "all", 1),
    ((1, 4, 2), "audio", 2),
    ((2, 2, 2), "all", 2),
)
TOLERANCE = 1e-4  # of the largest entry


class Outcome(NamedTuple):
    """Metrics of every step, gradients of the first (up to one factor), and what is trained after the last."""

    metrics: list[dict[str, Any]]
    gradients: dict[str, np.ndarray]
    trained: dict[str, np.ndarray]


def with_scope(c: Config, scope: str, accumulate: int) -> Config:
    c = c.copy_and_resolve_references()
    c.lora.scope, c.train.accumulate = scope, accumulate
    if scope != "all":  # "audio" never touches text, and to compile the objective once will do
        c.train.stages.only.objectives.text_anchor = 0.0
    return c


def first_batches(c: Config, directory: Path) -> list[Any]:
    """Returns whole batches, in numpy."""
    active = step_lib.active_objectives(c.train.stages.only)
    batches = Inputs(system.build(c), directory).batches(active, 0, STEPS)
    return list(batches)


def draw(c: Config) -> dict:
    """Returns all variables, in numpy; B is not zero, so that every gradient has something to be."""
    built = system.build(c)
    variables = jax.device_get(system.initial_variables(built, sharding.make_mesh(8, 1, 1)))
    random = np.random.default_rng(0)
    noise = lambda x: x + (0.1 * random.normal(size=x.shape)).astype(x.dtype)
    return {**variables, "lora": jax.tree.map(noise, variables["lora"])}


def run(c: Config, variables: dict, batches: list[Any], mesh: jax.sharding.Mesh) -> Outcome:
    built = system.build(c)
    placed = jax.device_put(variables, sharding.tree_shardings(variables, mesh))
    rates, trained, frozen = trainable(built, placed)
    state = step_lib.new_state(c, trained, 0, mesh)
    step = step_lib.jit_step(built, c.train.stages.only, 0, rates, mesh)
    metrics, gradients = [], {}
    with jax.set_mesh(mesh):
        for batch in batches:
            state, found = step(
                state, frozen, step_lib.Constants(), jax.device_put(batch, sharding.batch_sharding(mesh))
            )
            metrics.append(jax.device_get(found))
            gradients = gradients or jax.device_get(state.moments[0].mu)  # Adam's mean of one gradient is a part of it
    for path, x in state.trained.items():
        place = jax.sharding.NamedSharding(mesh, sharding.parameter_spec(path, x.shape, mesh))
        assert x.sharding.is_equivalent_to(place, x.ndim), path
    return Outcome(metrics, gradients, jax.device_get(state.trained))


def compare(got: Outcome, expected: Outcome, what: str) -> None:
    for i, (a, b) in enumerate(zip(got.metrics, expected.metrics, strict=True)):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=TOLERANCE, err_msg=f"{what}: {name} of step {i}")
    for field in ("gradients", "trained"):
        leaves, others = getattr(got, field), getattr(expected, field)
        assert leaves.keys() == others.keys()
        for path, other in others.items():
            largest = np.abs(other).max()
            assert largest > 0 or path.endswith("text_rms"), f"{field} {path}"
            np.testing.assert_allclose(
                leaves[path], other, rtol=0, atol=TOLERANCE * largest, err_msg=f"{what}: {field} {path}"
            )


def check_bytes(c: Config) -> None:
    """Every matrix is an eighth on every device, trained or frozen; what is whole on all of them is vectors and alike.

    Raises:
      AssertionError: a device holds another number of bytes than that makes.
    """
    mesh = sharding.make_mesh(1, 8, 1)
    flat = sharding.flatten(system.initial_variables(system.build(c), mesh))
    split = {p for p in flat if p.rpartition("/")[2] in ("kernel", "embedding", "a", "b")}
    assert {p.rpartition("/")[2] for p in flat.keys() - split} == {"scale", "bias", "positions", "text_rms", "gain"}
    expected = sum(x.nbytes // 8 if p in split else x.nbytes for p, x in flat.items())
    held = dict.fromkeys(jax.devices(), 0)
    for x in flat.values():
        for shard in x.addressable_shards:
            held[shard.device] += shard.data.nbytes
    assert set(held.values()) == {expected}, (held, expected)
    assert sum(flat[p].nbytes for p in split) % 8 == 0


def main(config_path: Path, directory: Path) -> None:
    c = config.from_json(config_path)
    check_bytes(c)
    print("every device holds its eighth", flush=True)
    variables, one = draw(c), sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    expected = {}
    for axes, scope, accumulate in CASES:
        if scope not in expected:
            plain = with_scope(c, scope, 1)
            batches = first_batches(plain, directory)
            expected[scope] = batches, run(plain, variables, batches, one)
        batches, outcome = expected[scope]
        got = run(with_scope(c, scope, accumulate), variables, batches, sharding.make_mesh(*axes))
        compare(got, outcome, f"{axes}, {scope}, {accumulate}")
        print(f"same on {axes}, {scope}, {accumulate}", flush=True)


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
