"""Steps on several meshes of eight devices give what one device gives, and no device holds more than its part."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jax.sharding import AbstractMesh
from safetensors.numpy import load_file, save_file

from aura_jax import cli, config, sharding
from aura_jax.convert import random_models
from aura_jax.errors import UserError
from aura_jax.train import stages
from tests.train import on_meshes


def build_llm(directory: Path) -> None:
    """Writes a random LLM whose vocabulary a mesh divides."""
    directory.mkdir()
    random_models.build_llm(directory, family="qwen2")
    path, weights = directory / "config.json", directory / "model.safetensors"
    values, tensors = json.loads(path.read_text()), load_file(weights)
    table = tensors["model.embed_tokens.weight"]
    tensors["model.embed_tokens.weight"] = np.pad(table, ((0, -len(table) % 8), (0, 0)))
    path.write_text(json.dumps(values | {"vocab_size": len(tensors["model.embed_tokens.weight"])}))
    save_file(tensors, weights, {"format": "pt"})


@pytest.mark.slow  # a process of its own, with eight devices and as many compilations
@pytest.mark.timeout(1800)
def test_steps_on_meshes_of_eight_devices_are_those_of_one(make_config, tmp_path):
    build_llm(tmp_path / "llm")
    c = make_config(lm=1.0, distill=1.0, text_anchor=1.0)
    c.model.llm = str(tmp_path / "llm")
    c.distill.target_norm = "layernorm"
    c.data.update(batch_size=16, text_rows=16, text_length=16, max_seconds=2.0, buckets=(2.0,))
    # Adam's first steps are signs, and that of rounding is anything: so small gradients count as such.
    c.optimizer.eps = 1e-3
    (tmp_path / "config.json").write_text(config.to_json(c))
    run = subprocess.run(
        [sys.executable, "-m", "tests.train.on_meshes", str(tmp_path / "config.json"), str(tmp_path)],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=1500,
    )
    lines = ["every device holds its eighth"]
    lines += [f"same on {axes}, {scope}, {accumulate}" for axes, scope, accumulate in on_meshes.CASES]
    assert run.stdout.splitlines() == lines, run.stderr[-3000:]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data.batch_size": 12}, "data.batch_size 12 is not a multiple of 8: mesh.data x mesh.fsdp 8, train.acc"),
        ({"data.text_rows": 4}, "data.text_rows 4 is not a multiple of 8: mesh.data x mesh.fsdp 8, train.accumulate 1"),
        ({"train.accumulate": 4}, "data.batch_size 16 is not a multiple of 32: mesh.data x mesh.fsdp 8, train.accumu"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_mesh_that_does_not_divide_the_batch_is_one_line(values, message, make_config):
    c = make_config(lm=1.0, text_anchor=1.0)
    c.data.update(batch_size=16, text_rows=8)
    mesh: Any = AbstractMesh((2, 4, 2), sharding.MESH_AXES)
    stages.check_rows(c, mesh)
    c.update_from_flattened_dict(values)
    with pytest.raises(UserError, match=message) as caught:
        stages.check_rows(c, mesh)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("mesh.data=3", "mesh data=3, fsdp=-1, tensor=1 does not divide 1 devices: change mesh.*"),
        ("model.attention=splash", "attention 'splash' needs a TPU: set model.attention='xla'"),
    ],
    ids=["mesh", "splash"],
)
def test_training_says_what_this_machine_cannot_do(override, message, make_config, tmp_path, capsys):
    path, values = tmp_path / "run.py", tmp_path / "values.json"
    values.write_text(config.to_json(make_config()))
    read = f"aura_jax.config.from_json(pathlib.Path({str(values)!r}))"
    path.write_text(f"import pathlib\nimport aura_jax.config\nget_config = lambda: {read}\n")
    argv = ["train", f"--config={path}", "--workdir", str(tmp_path / "run"), f"--config.{override}"]
    assert cli.main(argv) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {message}"
