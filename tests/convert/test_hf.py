"""Hugging Face directories into stacked trees: every value where it belongs, and every misfit said in one line."""

import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from aura_jax.convert import hf
from aura_jax.errors import UserError

SIZES = {
    "vocab_size": 62,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config, "qwen3": transformers.Qwen3Config}


def save_llm(directory, family: str = "llama", tied: bool = False, **options):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family](**SIZES, tie_word_embeddings=tied))
    with torch.no_grad():  # norms and biases start at 1 and 0, which would hide a mix-up
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(directory, **options)
    return {key: value.numpy() for key, value in model.state_dict().items()}


def edit(directory, change) -> None:
    """Rewrites model.safetensors with `change(tensors)` applied."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    directory = tmp_path_factory.mktemp("llama")
    return directory, save_llm(directory)


@pytest.fixture
def copy(llama, tmp_path):
    """A Llama directory that a test may damage."""
    return shutil.copytree(llama[0], tmp_path / "model")


def load(directory, n_adapted: int = 2, **options):
    return hf.load_llm(
        directory, hf.load_llm_config(directory), n_adapted=n_adapted, **({"dtype": jnp.float32} | options)
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_value_lands_in_its_place(tmp_path, family, tied):
    state = save_llm(tmp_path, family, tied)
    params = load(tmp_path, n_adapted=2)
    used = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    np.testing.assert_array_equal(params["embed"]["embedding"], state["model.embed_tokens.weight"])
    np.testing.assert_array_equal(params["final_norm"]["scale"], state["model.norm.weight"])
    if tied:
        assert "lm_head" not in params
    else:
        np.testing.assert_array_equal(params["lm_head"]["kernel"], state["lm_head.weight"].T)
    for i in range(3):
        block = jax.tree.map(lambda x, i=i: x[i] if i < 2 else x[i - 2], params["adapted" if i < 2 else "plain"])
        rows = {"input_layernorm": block["input_norm"], "post_attention_layernorm": block["post_norm"]}
        rows |= {f"mlp.{x}_proj": block["mlp"][x] for x in ("gate", "up", "down")}
        rows |= {f"self_attn.{x}_proj": block["attn"][x] for x in "qkvo"}
        rows |= {f"self_attn.{x}_norm": block["attn"][f"{x}_norm"] for x in "qk" if f"{x}_norm" in block["attn"]}
        for name, leaves in rows.items():
            for leaf, value in leaves.items():
                key = f"model.layers.{i}.{name}.{'bias' if leaf == 'bias' else 'weight'}"
                np.testing.assert_array_equal(value, state[key].T if leaf == "kernel" else state[key])
                used.add(key)
    assert used == set(state)


@pytest.mark.parametrize("n_adapted", [0, 3])
def test_one_stack_when_all_or_no_blocks_are_adapted(llama, n_adapted):
    params = load(llama[0], n_adapted)
    stack, absent = ("adapted", "plain") if n_adapted else ("plain", "adapted")
    assert absent not in params
    assert params[stack]["attn"]["q"]["kernel"].shape == (3, 32, 32)


def test_sharded_index_gives_the_same_tree(llama, tmp_path):
    save_llm(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert not (tmp_path / "model.safetensors").exists()
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path), load(llama[0]))


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16])
def test_16_bit_files_are_read_and_cast(copy, stored):
    full = load(copy)
    edit(copy, lambda tensors: tensors.update({k: v.astype(stored) for k, v in tensors.items()}))
    rounded = jax.tree.map(lambda x: np.asarray(x).astype(stored), full)
    jax.tree.map(np.testing.assert_array_equal, load(copy, dtype=stored), rounded)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(np.float32)), load(copy), rounded)


def test_old_and_new_rope_keys_mean_the_same(copy):
    file = copy / "config.json"
    content = json.loads(file.read_text())
    content.pop("rope_parameters")
    file.write_text(json.dumps(content | {"rope_theta": 12345.0}))
    old = hf.load_llm_config(copy)
    file.write_text(json.dumps(content | {"rope_parameters": {"rope_type": "default", "rope_theta": 12345.0}}))
    assert old == hf.load_llm_config(copy)
    assert old.rope_theta == 12345.0


def test_known_superfluous_keys_are_ignored(tmp_path):
    save_llm(tmp_path, tied=True)
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
        "lm_head.weight": np.ones((62, 32)),
    }
    edit(tmp_path, lambda tensors: tensors.update(extra))
    assert "lm_head" not in load(tmp_path)


def test_missing_and_unknown_keys_are_listed(copy):
    def change(tensors):
        tensors["model.layers.0.self_attn.q.weight"] = tensors.pop("model.layers.0.self_attn.q_proj.weight")

    edit(copy, change)
    with pytest.raises(
        UserError, match=r"lacks model.layers.0.self_attn.q_proj.weight and has keys that the model lacks"
    ):
        load(copy)


def test_long_lists_of_keys_end_in_a_count(copy):
    edit(copy, lambda tensors: tensors.update({f"x.{i}": np.ones(1, np.float32) for i in range(11)}))
    with pytest.raises(UserError, match=r"x\.0, .* and 3 more$"):
        load(copy)


def test_untied_config_without_a_head_is_an_error(copy):
    edit(copy, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(UserError, match=r"lacks lm_head\.weight"):
        load(copy)


def test_a_wrong_shape_is_named(copy):
    edit(copy, lambda tensors: tensors.update({"model.norm.weight": np.ones(33, np.float32)}))
    with pytest.raises(UserError, match=r"model\.norm\.weight is \[33\], expected \[32\]"):
        load(copy)


def test_quantised_weights_are_refused(copy):
    key = "model.layers.1.mlp.up_proj.weight"
    edit(copy, lambda tensors: tensors.update({key: np.ones((40, 32), np.int8)}))
    with pytest.raises(UserError, match=rf"{key} is I8, expected one of F32, F16, BF16"):
        load(copy)


def test_a_truncated_file_is_one_clear_line(copy):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors: truncated or damaged \(\d+ bytes.*fetch it again"):
        load(copy)


def test_a_missing_shard_is_named(tmp_path):
    save_llm(tmp_path, max_shard_size="20KB")
    shard = min(tmp_path.glob("model-*.safetensors"))
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name}: named in model.safetensors.index.json, but missing"):
        load(tmp_path)


def test_a_directory_without_safetensors_is_refused(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no model\.safetensors .*pytorch_model\.bin is not read"):
        load(copy)


def test_config_errors_name_the_file(copy):
    file = copy / "config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in content.items() if k != "hidden_size"}))
    with pytest.raises(UserError, match=r"config\.json: has no 'hidden_size'"):
        hf.load_llm_config(copy)
    file.write_text("{")
    with pytest.raises(UserError, match=r"config\.json: not JSON"):
        hf.load_llm_config(copy)
    file.unlink()
    with pytest.raises(UserError, match=r"config\.json: cannot be read"):
        hf.load_llm_config(copy)
    with pytest.raises(UserError, match=r"config\.json: model_type 'llama' is not a Whisper"):
        file.write_text(json.dumps(content))
        hf.load_whisper_config(copy)


def test_whisper_halves_share_a_file_and_foreign_keys_are_errors(tiny_whisper_dir, tmp_path):
    config = hf.load_whisper_config(tiny_whisper_dir)
    assert "embed" in hf.load_whisper_decoder(tiny_whisper_dir, config, dtype=jnp.float32)
    directory = shutil.copytree(tiny_whisper_dir, tmp_path / "whisper")
    edit(directory, lambda tensors: tensors.update({"classifier.weight": np.ones(2, np.float32)}))
    for read in (hf.load_whisper_encoder, hf.load_whisper_decoder):
        with pytest.raises(UserError, match=r"has keys that the model lacks: classifier\.weight"):
            read(directory, config, dtype=jnp.float32)


_ON_FOUR_DEVICES = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
from aura_jax.convert import hf
mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
matrix = lambda path: path.endswith(("kernel", "embedding"))
spec = lambda path, shape: NamedSharding(mesh, P(*[None] * (len(shape) - 2), "x", "y") if matrix(path) else P())
config = hf.load_llm_config(sys.argv[1])
split = hf.load_llm(sys.argv[1], config, n_adapted=1, dtype=jnp.float32, sharding=spec)
whole = hf.load_llm(sys.argv[1], config, n_adapted=1, dtype=jnp.float32)
kernel = split["plain"]["mlp"]["down"]["kernel"]
assert kernel.addressable_shards[0].data.shape == (2, 20, 16), kernel.addressable_shards[0].data.shape
jax.tree.map(np.testing.assert_array_equal, split, whole)
"""


def test_leaves_split_over_devices_hold_the_same_values(llama):
    subprocess.run([sys.executable, "-c", _ON_FOUR_DEVICES, str(llama[0])], check=True, timeout=120)
