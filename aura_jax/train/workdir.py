"""Whose workdir it is: one run's, from its first checkpoint on."""

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from aura_jax import config as config_lib
from aura_jax import hosts, machine
from aura_jax.config import Config
from aura_jax.errors import UserError

# Keys that may differ between the runs that share a workdir: they change nothing that was computed so far, and of what
# will be computed nothing but what their names say.
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
    # Sums are rounded in another order; what is drawn and which rows a step takes depends on no mesh.
    "mesh.",
)


def agree(config: Config) -> None:
    """Raises UserError, on every host, if one has another configuration or other versions than host 0."""
    mine = {"config": json.loads(config_lib.to_json(config)), "version of": machine.versions()}
    first = hosts.on_first(lambda: mine)

    def compare() -> None:
        for key in _differing(first, mine):
            raise UserError(f"{key.replace('of.', 'of ')} differs from that of host 0: start all hosts with the same")

    hosts.together(compare)


def claim(workdir: Path, config: Config) -> None:
    """Writes config.json, by which a workdir belongs to a run.

    A workdir without a checkpoint belongs to no run yet: a mistake in the first attempt can be mended in place.

    Raises:
      UserError: it belongs to a run with another configuration, or not all hosts see it.
    """
    hosts.on_first(lambda: _claim(workdir, config))
    if jax.process_count() > 1:
        _check_shared(workdir)


def _check_shared(workdir: Path) -> None:
    """Raises UserError, on every host, if one does not see a file that host 0 writes."""

    def write() -> str:
        file, path = tempfile.mkstemp(prefix=".seen-by-all-", dir=workdir)  # a name that no file system can remember
        os.close(file)
        return Path(path).name

    name = hosts.on_first(write)

    def look() -> None:
        if not (workdir / name).is_file():
            raise UserError(f"{workdir} is not the folder that host 0 calls so: give a workdir that all hosts share")

    try:
        hosts.together(look)
    finally:
        if hosts.is_first():
            (workdir / name).unlink()


def _claim(workdir: Path, config: Config) -> None:
    path, statistics = workdir / "config.json", workdir / "target_statistics.npz"
    partial = path.with_suffix(".partial")
    checkpoints = workdir / "checkpoints"
    begun = checkpoints.is_dir() and any(entry.name.isdigit() for entry in checkpoints.iterdir())
    if path.is_file() and begun:
        old, new = (json.loads(config_lib.to_json(c)) for c in (config_lib.from_json(path), config))
        changed = [key for key in _differing(old, new) if not key.startswith(_MAY_CHANGE)]
        if changed:
            raise UserError(f"{workdir} belongs to a run with another {changed[0]}: choose another --workdir")
    elif path.is_file():
        statistics.unlink(missing_ok=True)
    elif workdir.is_dir() and set(workdir.iterdir()) - {partial} and not checkpoints.is_dir():
        raise UserError(f"{workdir} is not empty and holds no run: choose another --workdir")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
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
