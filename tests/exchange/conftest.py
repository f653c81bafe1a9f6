"""Exports of the random run, and copies of them that a test may damage."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from aura_jax import config
from aura_jax.exchange.export import FORMATS, export_run


@pytest.fixture(scope="session")
def workdir(tiny_workdir, sample_data, tmp_path_factory) -> Path:
    """The random run with a schedule to go on with, for reading only."""
    folder = shutil.copytree(tiny_workdir, tmp_path_factory.mktemp("runs") / "tiny")
    c = config.from_json(folder / "config.json")
    c.data.train, c.data.batch_size = ((str(sample_data / "commands" / "train.jsonl"), 1.0),), 4
    c.train.schedule, c.train.stages.joint = ("joint",), config.stage(2, 1e-3, {"lm": 1.0})
    (folder / "config.json").write_text(config.to_json(c))
    return folder


@pytest.fixture(scope="session")
def exported(workdir, tmp_path_factory) -> dict[str, Path]:
    """Format -> export of `workdir`, for reading only."""
    root = tmp_path_factory.mktemp("exported")
    return {name: export_run(workdir, root / name, name) for name in FORMATS}


@pytest.fixture
def copied(exported, tmp_path) -> Callable[[str], Path]:
    """Format -> a copy."""
    return lambda name: shutil.copytree(exported[name], tmp_path / f"copy of {name}")
