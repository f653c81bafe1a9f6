"""What a run computes once from its data: the teacher's states, the statistics of the targets, the null space."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from aura_jax import config as config_lib
from aura_jax import hosts, sharding
from aura_jax.system import System
from aura_jax.train import null_space, teacher
from aura_jax.train.inputs import Inputs
from aura_jax.train.step import Constants

_TOKENS_PER_DIRECTION = 8  # of text, for a fair estimate of how much it uses each direction of a linear's input


def prepare(
    built: System,
    inputs: Inputs,
    variables: Mapping[str, Any],
    teacher_fingerprint: str | None,
    workdir: Path,
    mesh: Mesh,
    say: Callable[[str], Any],
) -> tuple[Constants, dict[str, Any]]:
    """Returns what every step reads, and the variables to start from; `inputs` has the teacher's states from now on.

    A teacher that no step will hear is not among these variables; LoRA is confined to its null space.

    Args:
      variables: as `system.initial_variables` has them.
      teacher_fingerprint: of its weights, if there is a teacher.
      workdir: keeps the statistics of the targets.
      say: told what was found, a line at a time.
    """
    variables = dict(variables)
    statistics = _hear_teacher(built, inputs, variables, teacher_fingerprint, workdir, mesh, say)
    if built.config.lora.text_energy == 1:
        return Constants(statistics=statistics), variables
    bases = _find_null_space(built, inputs, variables, mesh, say)
    variables = sharding.join(null_space.confine(sharding.flatten(variables), bases), {})
    return Constants(statistics=statistics, null_space=bases), variables


def _hear_teacher(
    built: System,
    inputs: Inputs,
    variables: dict[str, Any],
    fingerprint: str | None,
    workdir: Path,
    mesh: Mesh,
    say: Callable[[str], Any],
) -> dict[str, jax.Array] | None:
    """Precomputes the teacher's states if so configured, and returns the statistics that standardise them."""
    c = built.config
    stages: list[tuple[str, Any]] = config_lib.stages(c)
    distils = any(stage.objectives.distill for _, stage in stages)
    statistics = None
    if distils and c.teacher.precompute:
        assert fingerprint is not None
        inputs.precompute_teacher(variables["teacher"], fingerprint)
    if distils and c.distill.target_norm == "standardise":
        path = workdir / "target_statistics.npz"
        known = hosts.on_first(path.is_file)
        samples = None if known else inputs.teacher_samples(variables["teacher"])
        found, baseline = teacher.statistics(samples, path)
        statistics = jax.device_put(found, sharding.replicated(mesh))
        scores = ", ".join(f"{x:.2f}" for x in baseline)
        say(f"predicting the mean of the raw teacher blocks would score a cosine of {scores}")
    if not distils or c.teacher.precompute:
        variables.pop("teacher", None)
    return statistics


def _find_null_space(
    built: System, inputs: Inputs, variables: Mapping[str, Any], mesh: Mesh, say: Callable[[str], Any]
) -> dict[str, jax.Array]:
    """Returns bases of the directions that text hardly uses."""
    say("looking for the directions that text hardly uses")
    llm = built.model.config.llm
    text = inputs.plain_text(max(16384, _TOKENS_PER_DIRECTION * max(llm.width, llm.mlp_width)))
    bases = null_space.bases(built, variables["params"], text, built.config.lora.text_energy, mesh)
    widths = ", ".join(f"{basis.shape[2]} of {basis.shape[1]} ({name})" for name, basis in bases.items())
    say(f"directions of its inputs that LoRA reads, at most: {widths}")
    return jax.device_put(bases, sharding.replicated(mesh))
