"""What each stage of a configuration trains, and whether its batches divide over a mesh."""

from collections.abc import Collection, Sequence

import numpy as np
from jax.sharding import Mesh

from aura_jax import config as config_lib
from aura_jax import sharding
from aura_jax.config import Config
from aura_jax.errors import UserError
from aura_jax.train import objectives
from aura_jax.train import step as step_lib


def check_rows(config: Config, mesh: Mesh) -> None:
    """Raises UserError if the rows of a batch do not divide over the mesh and the micro-batches."""
    devices = int(np.prod([mesh.shape[axis] for axis in sharding.BATCH_AXES]))
    pieces = devices * config.train.accumulate
    keys = ["batch_size"]
    if any(step_lib.active_objectives(stage) & objectives.TEXT for _, stage in config_lib.stages(config)):
        keys.append("text_rows")
    for key in keys:
        if config.data[key] % pieces:
            raise UserError(
                f"data.{key} {config.data[key]} is not a multiple of {pieces}: mesh.data x mesh.fsdp {devices}, "
                f"train.accumulate {config.train.accumulate}"
            )


def rates_of_stages(
    config: Config, stages: Sequence[tuple[str, Config]], paths: Collection[str]
) -> list[dict[str, float]]:
    """Returns {path of a trained variable: multiplier of the rate} of every stage, from the paths of the first one.

    Raises:
      UserError: a row of a table matches nothing, or weights of an int8 LLM.
    """
    rates = []
    for name, stage in stages:
        if stage.merge_lora:
            paths = after_merge(paths)
        try:
            rates.append(sharding.learning_rates(paths, stage.trainable or config.trainable))
        except UserError as error:
            raise UserError(f"stage {name}: {error}") from error
        base = next((path for path in rates[-1] if path.startswith("params/llm/")), None)
        if base is not None and config.model.param_dtype == "int8":
            raise UserError(
                f"stage {name}: trainable matches {base}, but the LLM is held in int8, which cannot be trained: "
                "set model.param_dtype to bfloat16"
            )
    return rates


def after_merge(paths: Collection[str]) -> set[str]:
    """Returns paths with the kernels that LoRA was merged into in place of LoRA's."""
    adapters = {path for path in paths if path.startswith("lora/")}
    merged = {
        path.replace("lora/", "params/", 1).removesuffix("/a") + "/kernel" for path in adapters if path.endswith("/a")
    }
    return set(paths) - adapters | merged
