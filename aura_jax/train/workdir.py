"""Whose workdir it is: one run's, from its first checkpoint on."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from aura_jax import config as config_lib
from aura_jax.config import Config
from aura_jax.errors import UserError

# Keys that may differ between the runs that share a workdir: they change nothing that was computed so far.
_MAY_CHANGE = (
    "train.steps",
    "train.log_every",
    "train.eval_",
    "train.checkpoint_every",
    "train.keep",
    "train.max_skipped",
    "train.profile_",
    "eval.",
    "data.workers",
    "data.threads",
)


def claim(workdir: Path, config: Config) -> None:
    """Writes config.json; raises UserError if the workdir belongs to a run with another configuration.

    A workdir without a checkpoint belongs to no run yet: a mistake in the first attempt can be mended in place.
    """
    path, statistics = workdir / "config.json", workdir / "target_statistics.npz"
    checkpoints = workdir / "checkpoints"
    begun = checkpoints.is_dir() and any(entry.name.isdigit() for entry in checkpoints.iterdir())
    if path.is_file() and begun:
        old, new = (json.loads(config_lib.to_json(c)) for c in (config_lib.from_json(path), config))
        changed = [key for key in _differing(old, new) if not key.startswith(_MAY_CHANGE)]
        if changed:
            raise UserError(f"{workdir} belongs to a run with another {changed[0]}: choose another --workdir")
    elif path.is_file():
        statistics.unlink(missing_ok=True)
    elif workdir.is_dir() and any(workdir.iterdir()) and not checkpoints.is_dir():
        raise UserError(f"{workdir} is not empty and holds no run: choose another --workdir")
    if jax.process_index() == 0:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            partial.write_text(config_lib.to_json(config))
            partial.replace(path)
        except OSError as error:
            raise UserError(f"{workdir}: cannot be written ({error.strerror}): choose another --workdir") from error


def _differing(old: Any, new: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _differing(old.get(key), new.get(key), f"{prefix}{key}.")
    elif old != new:
        yield prefix.removesuffix(".")
