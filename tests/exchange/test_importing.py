"""Imports: bit-identical after a round trip, runs that go on from them, and what they refuse."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from aura_jax import checkpoint, cli, config, sharding
from aura_jax.convert import random_models
from aura_jax.errors import UserError
from aura_jax.exchange import export, importing

pytestmark = pytest.mark.slow  # each makes a run

ROOT = Path(__file__).parents[2]
SMOKE = f"--config={ROOT / 'configs' / 'smoke.py'}"


def variables_of(workdir):
    return sharding.flatten(checkpoint.load_for_inference(workdir)[1])


@pytest.mark.parametrize("name", ["peft", "hf"])
def test_a_round_trip_is_bit_identical(exported, workdir, tmp_path, name):
    read = importing.import_peft if name == "peft" else importing.import_hf
    lines = read(exported[name], tmp_path / "run")
    assert not any("fresh" in line for line in lines)
    before, after = variables_of(workdir), variables_of(tmp_path / "run")
    assert before.keys() == after.keys()
    for path, value in before.items():
        np.testing.assert_array_equal(after[path], value, err_msg=path)
    again = export.export_run(tmp_path / "run", tmp_path / "again", name)
    for file in exported[name].glob("*.safetensors"):
        one, two = load_file(file), load_file(again / file.name)
        assert one.keys() == two.keys()
        for key, value in one.items():
            np.testing.assert_array_equal(two[key], value, err_msg=key)


def test_training_goes_on_from_an_import(exported, tiny_whisper_dir, tmp_path, capsys):
    """An adapter that PEFT could have trained, then a step of training on it, all through the command line."""
    peft = tmp_path / "foreign"
    peft.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (peft / name).write_bytes((exported["peft"] / name).read_bytes())
    llm = json.loads((peft / "adapter_config.json").read_text())["base_model_name_or_path"]
    run = tmp_path / "run"
    changes = [
        SMOKE,
        f"--config.model.llm={llm}",
        f"--config.model.teacher={tiny_whisper_dir}",
        "--config.train.steps=1",
    ]
    assert cli.main(["import", "--peft", str(peft), "--workdir", str(run), *changes]) == 0
    said = capsys.readouterr().out
    assert "lora.scope is 'all', as the weights are" in said and "the audio embedder is fresh" in said
    assert config.from_json(run / "config.json").lora.scope == "all"  # PEFT applies an adapter to every token
    before = variables_of(run)
    stored = load_file(peft / "adapter_model.safetensors")["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"]
    np.testing.assert_array_equal(before["lora/llm/adapted/mlp/up/b"][1], stored.T)

    assert cli.main(["train", "--workdir", str(run)]) == 0
    after = variables_of(run)
    moved = np.abs(
        np.asarray(after["lora/llm/adapted/mlp/up/b"]) - np.asarray(before["lora/llm/adapted/mlp/up/b"])
    ).max()
    assert 0 < moved < 0.05
    assert checkpoint.newest_step(run)[0] == 1


def test_a_plain_llm_and_a_merged_one(exported, tiny_llm_dir, tmp_path):
    with pytest.raises(UserError, match=r"was not exported by aura-jax.*add --config=FILE"):
        importing.import_hf(tiny_llm_dir, tmp_path / "a")
    lines = importing.import_hf(tiny_llm_dir, tmp_path / "a", [SMOKE])
    assert {"LoRA is fresh: there is none in the directory"} < set(lines)
    lines = importing.import_hf(exported["merged"], tmp_path / "b")
    assert "LoRA is fresh: there is none in the directory" in lines and not any("embedder is" in line for line in lines)
    stored = load_file(exported["merged"] / "audio_embedder.safetensors")["proj.weight"]
    np.testing.assert_array_equal(variables_of(tmp_path / "b")["params/embedder/proj/kernel"], stored.T)


def test_gguf(tmp_path, capsys):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    assert cli.main(["import", "--gguf", str(tmp_path / "bad.gguf"), "--output", str(tmp_path / "out")]) == 2
    assert "not a complete GGUF file" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert cli.main(["import", "--gguf", str(tmp_path / "none.gguf"), "--output", str(tmp_path / "out")]) == 2
    assert "there is no such file" in capsys.readouterr().err


def edit(path: Path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_another_base(copied, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    random_models.build_llm(other, seed=1)
    with pytest.raises(UserError, match=r"weights are for another base: model.llm .*other has fingerprint"):
        importing.import_peft(copied("peft"), tmp_path / "run", [f"--config.model.llm={other}"])


def test_another_base_of_another_shape(copied, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    random_models.build_llm(other, width=32)
    with pytest.raises(UserError, match=r"does not fit the LLM: .*lora_A of .* is \[8, 64\], expected \[8, 32\]"):
        importing.import_peft(copied("peft"), tmp_path / "run", [f"--config.model.llm={other}"])


@pytest.mark.parametrize(
    ("name", "damage", "match"),
    [
        ("peft", lambda d: (d / "adapter_config.json").unlink(), "adapter_config.json: cannot be read"),
        (
            "peft",
            lambda d: edit(d / "adapter_config.json", lambda c: c.update(r=4)),
            "r = 4, but the tensors have rank 8",
        ),
        ("peft", lambda d: edit(d / "adapter_config.json", lambda c: c.update(lora_alpha=1)), "different adapters"),
        ("peft", lambda d: (d / "audio_embedder.safetensors").unlink(), "audio_embedder.safetensors: not there"),
        ("peft", lambda d: edit(d / "audio_config.json", lambda c: c.pop("mask")), "lacks mask: export it again"),
        ("peft", lambda d: edit(d / "audio_config.json", lambda c: c.update(format=9)), "another version of aura-jax"),
        ("hf", lambda d: (d / "config.json").unlink(), "config.json: cannot be read"),
        ("hf", lambda d: (d / "audio_config.json").unlink(), "without its audio_config.json"),
        ("hf", lambda d: (d / "model.safetensors").write_bytes(b"x"), "truncated or damaged"),
        ("hf", lambda d: edit(d / "audio_config.json", lambda c: c["lora"].update(rank=4)), "says rank 4"),
    ],
)
def test_damaged(copied, tmp_path, name, damage, match):
    directory = copied(name)
    damage(directory)
    with pytest.raises(UserError, match=match):
        (importing.import_peft if name == "peft" else importing.import_hf)(directory, tmp_path / "run")


def test_an_embedder_that_does_not_fit(copied, tmp_path):
    directory = copied("peft")
    file = directory / "audio_embedder.safetensors"
    good = load_file(file)
    save_file({**good, "extra": good["gain"]}, file)
    with pytest.raises(UserError, match="not the audio embedder that its config describes: it has unknown extra"):
        importing.import_peft(directory, tmp_path / "run")
    save_file({**good, "proj.bias": good["proj.bias"][:-1].copy()}, file)
    with pytest.raises(UserError, match=r"proj.bias is \[63\]"):
        importing.import_peft(directory, tmp_path / "run")


def test_mistakes_of_the_command_line(exported, workdir, tmp_path, capsys):
    def line(*argv):
        assert cli.main([str(a) for a in argv]) == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    peft = exported["peft"]
    assert "--peft goes with --workdir" in line("import", "--peft", peft, "--output", tmp_path / "x")
    assert "--gguf goes with --output" in line("import", "--gguf", peft, "--workdir", tmp_path / "x")
    assert "is not empty: name another --workdir" in line("import", "--peft", peft, "--workdir", workdir)
    taken = line("import", "--peft", peft, "--workdir", tmp_path / "y", "--config.lora.rank=4")
    assert "lora.rank belongs to the weights" in taken and "drop --config.lora.rank" in taken
    assert "takes no config" in line("import", "--gguf", peft, "--output", tmp_path / "x", "--config.seed=1")
    assert "one of the arguments --peft --hf --gguf is required" in line("import", "--workdir", tmp_path / "x")
    assert "unknown --format 'gguf'" in line(
        "export", "--workdir", workdir, "--output", tmp_path / "z", "--format", "gguf"
    )
