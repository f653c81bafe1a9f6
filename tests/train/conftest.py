"""A tiny system, a batch of real speech, and everything a step needs."""

import json
from pathlib import Path

import jax
import pytest

from aura_jax import checkpoint, config, sharding, system
from aura_jax.train.inputs import Inputs


def write_manifest(path: Path, sample_data: Path, n: int = 24) -> Path:
    """Writes the first rows of the training commands with absolute paths; what was said is the response, too."""
    source = sample_data / "commands" / "train.jsonl"
    rows = [json.loads(line) for line in source.read_text().splitlines()[:n]]
    rows = [row | {"audio": str(source.parent / row["audio"]), "response": row["text"]} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_pool(path: Path) -> Path:
    words = "the cat sat on the mat and looked at a quiet river under the old stone bridge"
    rows = [{"text": " ".join(f"{w}{i}" for w in words.split())} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def make_config(tiny_config, sample_data, tmp_path):
    """Makes configs of a real run: tiny models, real speech."""

    def make(**objectives):
        c = tiny_config()
        c.data.train = ((str(write_manifest(tmp_path / "train.jsonl", sample_data)), 1.0),)
        c.data.text_pool = str(write_pool(tmp_path / "pool.jsonl"))
        c.data.update(batch_size=4, max_seconds=4.0, buckets=(4.0,), text_rows=2, text_length=32)
        c.lora.scope = "all"
        c.train.stages.only = config.stage(8, 1e-2, objectives or {"lm": 1.0, "distill": 1.0}, warmup_steps=2)
        c.train.schedule = ("only",)
        c.train.update(log_every=1, checkpoint_every=100, max_skipped=2)
        return c

    return make


@pytest.fixture
def make_run(tmp_path):
    """Returns (system, variables, first batch, mesh) of a config."""

    def make(c):
        mesh = checkpoint.system_mesh(c)
        built = system.build(c)
        inputs = Inputs(built, tmp_path)
        active = frozenset(name for name, weight in c.train.stages.only.objectives.items() if weight)
        batch = next(inputs.batches(active, 0))
        variables = system.initial_variables(built, mesh)
        return built, variables, inputs.to_mesh(batch), mesh

    return make


def trainable(built, variables):
    """Returns (rates, trained, frozen) by the config's table."""
    paths = sharding.flatten({k: v for k, v in variables.items() if k != "teacher"})
    rates = sharding.learning_rates(paths, built.config.trainable)
    return rates, *sharding.split(variables, rates)


def same(a, b) -> bool:
    """Whether two trees are equal bit by bit."""
    return all((x == y).all() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
