"""The whole train step on abstract arguments: shapes and shardings as a run has them, no weights, no data.

Dimensions as in data/batch.py; N adapted blocks, I width of a linear's input.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from aura_jax import config as config_lib
from aura_jax import sharding, system
from aura_jax.audio.features import SAMPLE_RATE
from aura_jax.config import Config
from aura_jax.data.assemble import assemble
from aura_jax.data.batch import Batch
from aura_jax.data.plan import BUCKETS, BatchPlan, Lengths
from aura_jax.errors import UserError, nearest
from aura_jax.experiments.bench import flops
from aura_jax.train import null_space, objectives, stages
from aura_jax.train import step as step_lib

# The text around a clip, where only data could say: a chat template with a short prompt, and an answer of four tokens
# for every second of speech, which is what a transcript takes.
PREFIX_TOKENS, SUFFIX_TOKENS, TOKENS_PER_SECOND = 32, 16, 4.0


@dataclasses.dataclass(frozen=True)
class Program:
    """One stage's step, ready to be lowered.

    Attributes:
      step: what `train.step.jit_step` returns.
      arguments: its arguments, as ShapeDtypeStructs with shardings.
      parts: floating-point operations of one step on all devices, by part.
    """

    stage: str
    step: Any
    arguments: tuple[Any, ...]
    parts: dict[str, flops.Cost]

    @property
    def batch(self) -> Batch:
        return self.arguments[3]


def make(built: system.System, mesh: Mesh, stage_name: str = "") -> Program:
    """Returns the step of a stage; "": of the one that computes most.

    Raises:
      UserError: there is no such stage, or rows or parameters do not divide over the mesh.
    """
    config = built.config
    stages.check_rows(config, mesh)
    all_stages: list[tuple[str, Any]] = config_lib.stages(config)
    names = [name for name, _ in all_stages]
    if stage_name and stage_name not in names:
        raise UserError(f"no stage {stage_name!r} in train.schedule: {nearest(stage_name, names)}")
    batches = [_batch(built, step_lib.active_objectives(stage), mesh) for _, stage in all_stages]
    parts = [_parts(built, stage, batch) for (_, stage), batch in zip(all_stages, batches, strict=True)]
    most = max(range(len(names)), key=lambda i: flops.total(parts[i]).total)
    i = names.index(stage_name) if stage_name else most

    variables = _variables(built, any(stage.merge_lora for _, stage in all_stages[: i + 1]))
    paths = {path for path in sharding.flatten(_variables(built, merged=False)) if not path.startswith("teacher/")}
    rates = stages.rates_of_stages(config, all_stages, paths)[i]
    distils = any(stage.objectives.distill for _, stage in all_stages)
    if not distils or config.teacher.precompute:
        variables.pop("teacher", None)  # as the loop does
    trained, frozen = sharding.split(variables, rates)
    state = jax.eval_shape(lambda x: step_lib.new_state(config, x, 0, mesh), trained)
    arguments = (
        _placed(state, step_lib.state_shardings(state, mesh)),
        _placed(frozen, sharding.tree_shardings(frozen, mesh)),
        _replicated(_constants(built, distils), mesh),
        batches[i],
    )
    return Program(names[i], step_lib.jit_step(built, all_stages[i][1], 0, rates, mesh), arguments, parts[i])


def _variables(built: system.System, merged: bool) -> dict:
    variables = system.abstract_variables(built)
    if merged:
        variables.pop("lora")
    if built.teacher is not None:
        variables["teacher"] = system.abstract_teacher(built)
    return variables


def _constants(built: system.System, distils: bool) -> step_lib.Constants:
    statistics: Any = None
    bases: Any = {}
    if distils and built.config.distill.target_norm == "standardise":
        assert built.teacher_config is not None
        row = jax.ShapeDtypeStruct((len(built.pairs), built.teacher_config.width), jnp.float32)
        statistics = {"mean": row, "std": row}
    lora = built.model.config.lora
    if built.config.lora.text_energy < 1 and lora is not None:
        widths = null_space.input_widths(built.model.config)
        # As many directions as there are: how many text leaves free, only weights can say.
        bases = {name: jax.ShapeDtypeStruct((lora.n_blocks, n, n), jnp.float32) for name, n in widths.items()}
    return step_lib.Constants(statistics=statistics, null_space=bases)


def _batch(built: system.System, active: frozenset[str], mesh: Mesh) -> Batch:
    """Returns the largest batch that a stage with these objectives meets, of clips of `data.max_seconds`."""
    c = built.config.data
    longest = c.max_seconds / min(c.speeds)
    hears_only = not active & objectives.ANSWERS
    n_response = math.ceil(c.max_seconds * TOKENS_PER_SECOND)
    text = [PREFIX_TOKENS, *((0, 0) if hears_only else (SUFFIX_TOKENS, n_response))]
    one = lambda n: np.array([n], np.int64)
    reads = active & objectives.READING or built.token_rate is None
    spoken = one(math.ceil(c.max_seconds * TOKENS_PER_SECOND)) if reads else None
    packed = c.layout == "packed"
    prefix, suffix, response = map(one, text)
    lengths = Lengths(
        ("a clip of data.max_seconds",), one(round(c.max_seconds * SAMPLE_RATE)), prefix, suffix, response, spoken
    )
    plan = BatchPlan(
        [lengths],
        batch_size=1,
        bucket_seconds=c.buckets or (*(b for b in BUCKETS if b < longest), longest),
        token_rate=built.token_rate,
        layout=c.layout,
        pack_tokens=c.row_tokens if packed else None,
        pack_clips=c.row_clips if packed else None,
    )
    teacher_shape = None
    if built.config.teacher.precompute and "distill" in active:
        assert built.teacher_config is not None
        teacher_shape = (len(built.pairs), built.teacher_config.width)
    row = assemble(
        [[]],
        plan.shapes[-1],
        layout=c.layout,
        token_rate=built.token_rate,
        teacher_shape=teacher_shape,
    )
    if c.text_pool and active & objectives.TEXT:
        tokens = np.zeros((1, c.text_length), np.int32)
        row = row._replace(text_tokens_MxL=tokens, text_segment_MxL=tokens)
    rows = sharding.batch_sharding(mesh)

    def of(path: Any, x: np.ndarray) -> jax.ShapeDtypeStruct:
        n_rows = c.text_rows if path[0].name.startswith("text_") else c.batch_size
        return jax.ShapeDtypeStruct((n_rows, *x.shape[1:]), x.dtype, sharding=rows)

    return jax.tree_util.tree_map_with_path(of, row)


def _parts(built: system.System, stage: Config, batch: Batch) -> dict[str, flops.Cost]:
    sizes = flops.Sizes.of(batch)
    active = step_lib.active_objectives(stage)
    return flops.step(built.model.config, built.teacher_config, built.pairs, sizes, active)


def _placed(tree: Any, shardings: Any) -> Any:
    place = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
    return jax.tree.map(place, tree, shardings)


def _replicated(tree: Any, mesh: Mesh) -> Any:
    where: NamedSharding = sharding.replicated(mesh)
    return jax.tree.map(functools.partial(_place_at, where), tree)


def _place_at(where: NamedSharding, x: Any) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
