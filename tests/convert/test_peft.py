"""PEFT's adapters: what is written is what PEFT reads, and what PEFT trained is read."""

import json
import shutil

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from aura_jax.convert import hf
from aura_jax.convert import peft as ours
from aura_jax.errors import UserError
from aura_jax.models.lora import LoRAConfig


@pytest.fixture(scope="module")
def llm(tiny_llm_dir):
    return hf.load_llm_config(tiny_llm_dir)


@pytest.fixture(scope="module")
def trained(tiny_llm_dir, tmp_path_factory):
    """Returns a function: fields of PEFT's config -> a directory that PEFT wrote, with B drawn at random."""

    def train(**fields):
        torch.manual_seed(0)
        base = transformers.AutoModelForCausalLM.from_pretrained(tiny_llm_dir, dtype=torch.float32)
        model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **fields))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.3)
        directory = tmp_path_factory.mktemp("peft")
        model.save_pretrained(directory)
        return directory

    return train


@pytest.fixture(scope="module")
def plain(trained):
    return trained(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], layers_to_transform=[1])


@pytest.fixture
def adapter(plain, tmp_path):
    """A copy of `plain` that a test may damage."""
    return shutil.copytree(plain, tmp_path / "adapter")


def edit(directory, **fields):
    path = directory / ours.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_an_adapter_that_peft_trained(plain, llm):
    lora, leaves = ours.load_adapter(plain, llm, "all")
    assert lora == LoRAConfig(n_blocks=2, rank=4, alpha=8.0, targets=("q", "down"))
    assert leaves.keys() == {f"llm/adapted/{path}/{x}" for path in ("attn/q", "mlp/down") for x in "ab"}
    stored = load_file(plain / ours.WEIGHTS)
    a, b = leaves["llm/adapted/mlp/down/a"], leaves["llm/adapted/mlp/down/b"]
    key = "base_model.model.model.layers.1.mlp.down_proj.lora_"
    np.testing.assert_array_equal(a[1], stored[f"{key}A.weight"].T)
    np.testing.assert_array_equal(b[1], stored[f"{key}B.weight"].T)
    assert not a[0].any() and not b[0].any()  # PEFT leaves that block alone

    again = ours.to_tensors(leaves, ours.PREFIX, ".weight", zeros=False)
    assert again.keys() == stored.keys()
    for name, tensor in again.items():
        np.testing.assert_array_equal(tensor, stored[name])
    assert len(ours.to_tensors(leaves, ours.PREFIX, ".weight", zeros=True)) == 2 * len(again)
    written, read = ours.adapter_config(again, lora, "base"), json.loads((plain / ours.CONFIG).read_text())
    for name in ("r", "lora_alpha", "use_rslora", "layers_to_transform"):
        assert written[name] == read[name]
    assert set(written["target_modules"]) == set(read["target_modules"])


def test_rank_stabilised_and_half_precision(trained, llm):
    directory = trained(r=8, lora_alpha=4, use_rslora=True, target_modules="all-linear")
    file = directory / ours.WEIGHTS
    save_file({key: value.astype(np.float16) for key, value in load_file(file).items()}, file)
    lora, leaves = ours.load_adapter(directory, llm, "request")
    assert lora.rslora and lora.scale == 4 / 8**0.5 and lora.n_blocks == llm.n_blocks and len(lora.targets) == 7
    assert all(leaf.dtype == np.float32 for leaf in leaves.values())


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"use_dora": True}, "use_dora true is not supported"),
        ({"bias": "lora_only"}, 'bias "lora_only"'),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"r": 16}, "r = 16, but the tensors have rank 4"),
    ],
)
def test_what_lora_here_does_not_express(adapter, llm, fields, match):
    edit(adapter, **fields)
    with pytest.raises(UserError, match=match):
        ours.load_adapter(adapter, llm, "all")


def test_no_adapter(tmp_path, adapter, llm):
    with pytest.raises(UserError, match=r"adapter_config.json: cannot be read .* name a PEFT adapter's directory"):
        ours.load_adapter(tmp_path, llm, "all")
    (adapter / ours.CONFIG).write_text("{}")
    with pytest.raises(UserError, match="has no 'r'"):
        ours.load_adapter(adapter, llm, "all")


def test_tensors_that_do_not_fit(adapter, llm):
    file = adapter / ours.WEIGHTS
    good = load_file(file)
    key = "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"

    def fails(tensors, match):
        save_file(tensors, file)
        with pytest.raises(UserError, match=match):
            ours.load_adapter(adapter, llm, "all")

    fails(
        good | {key: good[key][:, :-1].copy()}, r"lora_A of mlp.down_proj in block 1 is \[4, 127\], expected \[4, 128\]"
    )
    fails({k: v for k, v in good.items() if k != key}, "only one of lora_A and lora_B is there for mlp.down_proj of")
    fails(good | {key.replace("layers.1", "layers.9"): good[key]}, "only one of")
    far = {k.replace("layers.1", "layers.9"): v for k, v in good.items()}
    fails(far, "adapts block 9, but the LLM has 4: it is for another base")
    fails(good | {"base_model.model.lm_head.lora_A.weight": good[key]}, "no LoRA of a linear .*lm_head.lora_A")
    fails({}, "holds no adapter")
    save_file(good, file)
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match="truncated or damaged"):
        ours.load_adapter(adapter, llm, "all")
    file.unlink()
    with pytest.raises(UserError, match="not there"):
        ours.load_adapter(adapter, llm, "all")
