"""The train step: one jitted function of state, frozen weights and a batch."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding

from aura_jax import sharding
from aura_jax.config import OBJECTIVES, Config
from aura_jax.data.batch import Batch
from aura_jax.system import System
from aura_jax.train import null_space, objectives


@struct.dataclass
class State:
    """All that a step changes, and all that a checkpoint holds.

    Attributes:
      step: int32, steps taken over all stages.
      trained: {path: float32 leaf}, the trained variables by their paths.
      moments: AdamW's.
      skipped: int32, steps in a row whose gradients were not finite.
    """

    step: jax.Array
    trained: dict[str, jax.Array]
    moments: optax.OptState
    skipped: jax.Array


@struct.dataclass
class Constants:
    """What a run computes once from its data, and every step reads.

    Attributes:
      statistics: mean and std [P, E] of the teacher's states where targets are standardised.
      null_space: {input of adapted linears: the basis that every A which reads it is confined to}.
    """

    statistics: dict[str, jax.Array] | None = None
    null_space: dict[str, jax.Array] = struct.field(default_factory=dict)


def _adam(config: Config) -> optax.GradientTransformation:
    c = config.optimizer
    decayed = lambda trained: {path: path.rpartition("/")[2] in ("kernel", "a", "b") for path in trained}
    return optax.chain(optax.scale_by_adam(c.b1, c.b2, c.eps), optax.add_decayed_weights(c.weight_decay, mask=decayed))


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """Returns the sharding of every leaf of a (possibly abstract) state: moments lie where their variables lie."""

    def of(path: Any, leaf: Any) -> NamedSharding:
        if not leaf.shape:
            return sharding.replicated(mesh)
        return NamedSharding(mesh, sharding.parameter_spec(sharding.path_string(path), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(of, state)


def new_state(config: Config, trained: dict[str, jax.Array], step: int, mesh: Mesh) -> State:
    """Returns the state at the start of a stage: float32 masters of `trained`, copied, and fresh moments."""

    def make(trained: dict[str, jax.Array]) -> State:
        # Masters are float32 whatever the frozen weights are stored in; copies, because steps donate them.
        masters = jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), trained)
        return State(jnp.int32(step), masters, _adam(config).init(masters), jnp.int32(0))

    return jax.jit(make, out_shardings=state_shardings(jax.eval_shape(make, trained), mesh))(trained)


def learning_rate(stage: Config) -> optax.Schedule:
    """Linear warm-up to the stage's rate, then a cosine down to `final_fraction` of it at the stage's last step."""
    return optax.warmup_cosine_decay_schedule(
        init_value=stage.learning_rate / max(stage.warmup_steps, 1),
        peak_value=stage.learning_rate,
        warmup_steps=min(stage.warmup_steps, stage.steps - 1),
        decay_steps=stage.steps,
        end_value=stage.learning_rate * stage.final_fraction,
    )


def active_objectives(stage: Config) -> frozenset[str]:
    return frozenset(name for name in OBJECTIVES if stage.objectives[name])


def _micro(batch: Batch, keys_BxK: jax.Array, n: int) -> tuple[Batch, jax.Array]:
    """Cuts rows into n micro-batches on a new leading axis; rows are dealt out, so each keeps its place on the mesh."""
    deal = lambda x: jnp.moveaxis(x.reshape(x.shape[0] // n, n, *x.shape[1:]), 1, 0)
    return jax.tree.map(deal, (batch, keys_BxK))


def step_function(
    system: System, stage: Config, first_step: int, rates: Mapping[str, float]
) -> Callable[[State, dict, Constants, Batch], tuple[State, dict[str, jax.Array]]]:
    """Returns step(state, frozen, constants, batch) -> (state, metrics), to be jitted.

    Args:
      stage: one of `config.stages`.
      first_step: the step count at which the stage starts.
      rates: {path of a trained variable: multiplier of the learning rate}.
    """
    config, active = system.config, active_objectives(stage)
    weights = {name: stage.objectives[name] for name in active}
    schedule, adam = learning_rate(stage), _adam(config)

    def loss(trained, frozen, statistics, batch, keys_BxK, counts):
        variables = sharding.join(trained, frozen)
        sums, blocks = objectives.sums(system, variables, batch, active, keys_BxK, statistics)
        total = sum(weights[name] * sums[name] / counts[name] for name in sums)
        return total, (sums, blocks)

    gradient = jax.grad(loss, has_aux=True)

    @jax.named_scope("optimizer")
    def update(state, grads, constants):
        grads = null_space.confine(grads, constants.null_space)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(norm)
        clip = jnp.minimum(1.0, stage.clip_norm / (norm + 1e-12))
        # Zero where not finite: the moments that are computed and then thrown away should not raise NaN checks.
        grads = jax.tree.map(lambda g: jnp.where(finite, g * clip, 0), grads)
        updates: Any
        updates, moments = adam.update(grads, state.moments, state.trained)
        # Once more: Adam scales each entry by itself, which leads out of any subspace.
        updates = null_space.confine(updates, constants.null_space)
        rate = schedule(state.step - first_step)
        trained = {path: x - rate * rates[path] * updates[path] for path, x in state.trained.items()}
        keep = lambda new, old: jax.tree.map(functools.partial(jnp.where, finite), new, old)
        new = State(
            step=state.step + 1,
            trained=keep(trained, state.trained),
            moments=keep(moments, state.moments),
            skipped=jnp.where(finite, 0, state.skipped + 1),
        )
        return new, norm, rate

    def step(state, frozen, constants, batch):
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        keys_BxK = objectives.clip_keys(key, batch)
        counts = objectives.counts(system, batch, active)
        of = lambda micro, keys: gradient(state.trained, frozen, constants.statistics, micro, keys, counts)
        if config.train.accumulate == 1:
            grads, (sums, blocks) = of(batch, keys_BxK)
        else:
            micros = _micro(batch, keys_BxK, config.train.accumulate)
            zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(of, *jax.tree.map(lambda x: x[0], micros)))
            add = lambda total, xs: (jax.tree.map(jnp.add, total, of(*xs)), None)
            (grads, (sums, blocks)), _ = jax.lax.scan(add, zeros, micros)

        state, norm, rate = update(state, grads, constants)
        metrics = {f"loss/{name}": sums[name] / counts[name] for name in sums}
        metrics["loss"] = sum(weights[name] * metrics[f"loss/{name}"] for name in sums)
        for student, _ in system.pairs if blocks else ():
            block = blocks["sum"][student] / jnp.maximum(blocks["count"][student], 1)
            metrics[f"loss/distill/block_{student:02d}"] = block
        metrics |= {"grad_norm": norm, "learning_rate": rate, "skipped_in_a_row": state.skipped}
        return state, metrics

    return step


def jit_step(system: System, stage: Config, first_step: int, rates: Mapping[str, float], mesh: Mesh) -> Any:
    """Jits `step_function`; the state is donated, and stays where `state_shardings` put it."""
    function = step_function(system, stage, first_step, rates)

    def step(state, frozen, constants, batch):
        state, metrics = function(state, frozen, constants, batch)
        return jax.lax.with_sharding_constraint(state, state_shardings(state, mesh)), metrics

    return jax.jit(step, donate_argnums=0)
