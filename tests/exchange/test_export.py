"""Exports: what is in them, what they refuse, and that nothing is left of one that failed."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from aura_jax import assets, checkpoint, config, sharding
from aura_jax.convert import hf, hf_write
from aura_jax.errors import UserError
from aura_jax.exchange import card, export
from aura_jax.models.lora import merge

COMMON = {
    "README.md",
    "audio_config.json",
    "audio_embedder.py",
    "chat_template.jinja",
    "processing_aura.py",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
}
FILES = {
    "peft": {"adapter_config.json", "adapter_model.safetensors", "audio_embedder.safetensors"},
    "hf": {"config.json", "configuration_aura.py", "generation_config.json", "model.safetensors", "modeling_aura.py"},
    "merged": {"audio_embedder.safetensors", "config.json", "generation_config.json", "model.safetensors"},
}


def variant(workdir: Path, target: Path, **changes) -> Path:
    """A copy of a workdir with other keys in its config."""
    shutil.copytree(workdir, target)
    c = config.from_json(target / "config.json")
    c.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    (target / "config.json").write_text(config.to_json(c))
    return target


@pytest.mark.parametrize("name", export.FORMATS)
def test_files(exported, name):
    assert {path.name for path in exported[name].iterdir()} == COMMON | FILES[name]
    for source in exported[name].glob("*.py"):
        assert not re.search(
            r"^\s*(?:from|import) (?:jax|flax|aura_jax|peft|librosa)", source.read_text(), re.MULTILINE
        )


def test_audio_config_says_all_that_an_import_needs(exported, workdir):
    about = json.loads((exported["peft"] / export.AUDIO_CONFIG).read_text())
    step, meta = checkpoint.inference_meta(workdir)
    assert about["step"] == step == 1
    assert about["base"]["fingerprint"] == meta["llm_fingerprint"]
    assert about["run"] == json.loads((workdir / "config.json").read_text())
    assert about["lora"] == {
        "n_blocks": 2,
        "rank": 8,
        "alpha": 8.0,
        "rslora": False,
        "targets": ["q", "k", "v", "o", "gate", "up", "down"],
        "scope": "request",
    }


def test_peft_loads_with_no_missing_and_no_unexpected_key(exported, tiny_llm_dir):
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_llm_dir, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, exported["peft"])
    loaded = peft.get_peft_model_state_dict(model)
    stored = load_file(exported["peft"] / "adapter_model.safetensors")
    assert loaded.keys() == stored.keys()
    for key, value in stored.items():
        np.testing.assert_array_equal(loaded[key].numpy(), value)
    result = model.load_adapter(exported["peft"], "again")
    assert not result.unexpected_keys and not [key for key in result.missing_keys if "again" in key]


def test_merged_weights(exported, workdir):
    built, variables = checkpoint.load_for_inference(workdir)
    lora = built.model.config.lora
    assert lora is not None
    wanted = sharding.flatten(merge(variables["params"]["llm"], variables["lora"]["llm"], lora))
    llm = hf.load_llm_config(exported["merged"])
    found = sharding.flatten(hf.load_llm(exported["merged"], llm, n_adapted=lora.n_blocks, dtype=np.float32))
    for path, value in wanted.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)
    _, info = transformers.AutoModelForCausalLM.from_pretrained(exported["merged"], output_loading_info=True)
    assert not any(info.values())


def test_other_dtype_and_several_files(workdir, tmp_path):
    folder = export.export_run(workdir, tmp_path / "bf16", "hf", dtype="bfloat16")
    kinds = {key: value.dtype.name for key, value in load_file(folder / "model.safetensors").items()}
    assert kinds["language_model.model.norm.weight"] == "bfloat16" and kinds["audio_embedder.norm.weight"] == "float32"
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"

    built, variables = checkpoint.load_for_inference(workdir)
    llm = variables["params"]["llm"]
    shutil.copy(built.llm_dir / "config.json", tmp_path)
    hf_write.write_llm(tmp_path, llm, n_adapted=2, dtype=np.dtype(np.float32), max_shard=100_000)
    index = json.loads((tmp_path / hf.INDEX).read_text())
    assert len(set(index["weight_map"].values())) > 2
    read = hf.load_llm(tmp_path, built.model.config.llm, n_adapted=2, dtype=np.float32)
    for path, value in sharding.flatten(llm).items():
        np.testing.assert_array_equal(sharding.flatten(read)[path], value)


def test_the_run_s_chat_template_travels(workdir, tmp_path):
    template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}<assistant>"
    changed = variant(workdir, tmp_path / "run", data__chat_template=template)
    folder = export.export_run(changed, tmp_path / "out", "peft")
    assert transformers.AutoTokenizer.from_pretrained(folder).chat_template == template


def test_a_machine_with_another_number_of_devices(workdir, tmp_path):
    changed = variant(workdir, tmp_path / "run", mesh__fsdp=16)
    with pytest.raises(UserError, match=r"fsdp=16.*change mesh"):
        export.export_run(changed, tmp_path / "out", "peft")
    folder = export.export_run(changed, tmp_path / "out", "peft", overrides=["--config.mesh.fsdp=1"])
    assert json.loads((folder / export.AUDIO_CONFIG).read_text())["run"]["mesh"]["fsdp"] == 16


@pytest.mark.parametrize(
    ("arguments", "changes", "match"),
    [
        (("onnx",), {}, "unknown --format 'onnx': valid: hf, merged, peft"),
        (("hf", "--dtype=int4"), {}, "unknown --dtype 'int4'"),
        (("peft", "--dtype=float16"), {}, "--dtype is for the LLM's weights"),
        (("hf", "--force"), {}, "--force is for the format merged"),
        (
            ("merged",),
            {"model__mask": "bidirectional"},
            "model.mask is 'bidirectional', but a plain LLM runtime masks audio causally",
        ),
        (
            ("merged", "--force"),
            {"lora__scope": "audio"},
            "PLoRA.*merged weights apply to every token: export it as hf",
        ),
        (("peft",), {"lora__scope": "audio"}, "PLoRA.*PEFT would apply it to every token"),
    ],
)
def test_refused(workdir, tmp_path, arguments, changes, match):
    changed = variant(workdir, tmp_path / "run", **changes)
    options = {"dtype": next((a.partition("=")[2] for a in arguments if a.startswith("--dtype")), None)}
    with pytest.raises(UserError, match=match):
        export.export_run(changed, tmp_path / "out", arguments[0], force="--force" in arguments, **options)
    assert not (tmp_path / "out").exists()


def test_a_causal_run_merges_unforced_and_its_card_says_so(workdir, exported, tmp_path):
    text = (exported["merged"] / "README.md").read_text()
    assert "The mask is causal, so any runtime that takes prompt embeddings can serve it" in text
    changed = variant(workdir, tmp_path / "run", model__mask="bidirectional")
    forced = (export.export_run(changed, tmp_path / "out", "merged", force=True) / "README.md").read_text()
    assert "mask over audio is bidirectional.** A plain LLM runtime masks causally" in forced


def test_a_run_whose_adapters_were_merged(tiny_loaded, tmp_path):
    """As after a stage with merge_lora: kernels of the LLM are the run's own, and there is no LoRA."""
    built, variables = tiny_loaded
    lora = built.model.config.lora
    llm = merge(variables["params"]["llm"], variables["lora"]["llm"], lora)
    own = {
        p: x for p, x in sharding.flatten({"params": {"llm": llm}}).items() if p.endswith("kernel") and "adapted" in p
    }
    own |= sharding.flatten({"params": {"embedder": variables["params"]["embedder"]}})
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "config.json").write_text(config.to_json(built.config))
    saved = checkpoint.Checkpoints(workdir, built.config)
    fingerprint = checkpoint.fingerprint(variables["params"]["llm"])
    saved.save(1, own, {"step": np.int32(1)}, {"llm_fingerprint": fingerprint, "seconds": 1.5})
    saved.close()

    with pytest.raises(UserError, match="there is no adapter: export it as hf or merged"):
        export.export_run(workdir, tmp_path / "peft", "peft")
    folder = export.export_run(workdir, tmp_path / "hf", "hf")
    stored = load_file(folder / "model.safetensors")
    assert not any("lora" in key for key in stored)
    kernel = sharding.flatten(llm)["adapted/attn/q/kernel"][1]
    np.testing.assert_array_equal(stored["language_model.model.layers.1.self_attn.q_proj.weight"], np.asarray(kernel).T)
    assert json.loads((folder / "config.json").read_text())["audio_config"]["lora"] is None


def test_an_output_that_is_not_free(workdir, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="full exists and is not empty: name another --output"):
        export.export_run(workdir, tmp_path / "full", "peft")
    with pytest.raises(UserError, match="not a folder"):
        export.export_run(workdir, tmp_path / "full" / "mine.txt", "peft")
    assert (tmp_path / "full" / "mine.txt").read_text() == "keep"
    (tmp_path / "empty").mkdir()
    assert export.export_run(workdir, tmp_path / "empty", "peft").is_dir()


@pytest.mark.slow
def test_a_full_disk_leaves_nothing(workdir, tmp_path):
    """The largest file that the process may write stands in for a disk that is full in mid-export."""
    arguments = [
        "-m",
        "aura_jax.cli",
        "export",
        "--workdir",
        workdir,
        "--format",
        "hf",
        "--output",
        tmp_path / "new/out",
    ]
    command = ["bash", "-c", 'ulimit -f 200; exec "$@"', "bash", sys.executable, *arguments]  # 200 KiB
    # No cache of compiled programs: it would meet the limit as well.
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "JAX_ENABLE_COMPILATION_CACHE": "false"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 2, result.stderr[-2000:]
    assert re.fullmatch(r"error: .*out: cannot be written \(.*File too large.*\n", result.stderr.splitlines(True)[-1])
    assert not list((tmp_path / "new").iterdir())


def test_the_card(exported, workdir, tmp_path):
    text = (exported["peft"] / "README.md").read_text()
    assert "Nothing was measured with these weights." in text and "library_name: peft" in text
    scored = shutil.copytree(workdir, tmp_path / "run")
    rate = {"value": 0.0125, "low": 0.002, "high": 0.0305}
    scores = {"scored_step": 1, "sets": {"new voices": {"n": 93, "wer": rate, "exact_match": {"value": 0.95}}}}
    (scored / "scores.json").write_text(json.dumps(scores))
    text = (export.export_run(scored, tmp_path / "out", "hf") / "README.md").read_text()
    assert "| new voices | 93 | 1.2 (0.2 to 3.0) | 95.0 |" in text and "library_name: transformers" in text
    assert card.scores_of(scored, 2) is None  # of other weights
    about = json.loads((tmp_path / "out" / export.AUDIO_CONFIG).read_text())
    about["base"]["name"], about["teacher"]["name"] = "smollm2-135m-instruct-q4_1-wheel", "whisper-tiny.en-wheel"
    text = card.model_card("peft", about, None, "float32")
    assert "license: apache-2.0" in text and "starts from the first layers: MIT" in text


def test_models_of_the_hub_are_named_as_the_hub_names_them():
    hub = next(asset for asset in assets.list_assets() if asset.kind == "hub")
    assert assets.published_name(hub.name) == hub.source
    assert assets.published_name("hf://owner/name@abc") == "owner/name"
    assert assets.published_name("./mine") == "./mine"
    assert assets.licence(f"hf://{hub.source}") == hub.licence and assets.licence("./mine") is None
