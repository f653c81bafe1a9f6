"""Hugging Face directories into stacked trees: every value where it belongs, and every misfit said in one line."""

import contextlib
import json
import re
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


@contextlib.contextmanager
def refused(match: str):
    """Expects a UserError of one line."""
    with pytest.raises(UserError, match=match) as caught:
        yield
    assert "\n" not in str(caught.value)


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
        for i, name in ((0, "q"), (2, "o")):
            proj = f"model.layers.{i}.self_attn.{name}"
            tensors[f"{proj}.weight"] = tensors.pop(f"{proj}_proj.weight")

    edit(copy, change)
    line = (
        "lacks model.layers.0.self_attn.q_proj.weight, model.layers.2.self_attn.o_proj.weight and has keys that the "
        "model lacks: model.layers.0.self_attn.q.weight, model.layers.2.self_attn.o.weight"
    )
    with refused(f"{re.escape(line)}$"):
        load(copy)


def test_long_lists_of_keys_end_in_a_count(copy):
    edit(copy, lambda tensors: tensors.update({f"x.{i}": np.ones(1, np.float32) for i in range(11)}))
    with refused(r"x\.0, .* and 3 more$"):
        load(copy)


def test_untied_config_without_a_head_is_an_error(copy):
    edit(copy, lambda tensors: tensors.pop("lm_head.weight"))
    with refused(r"lacks lm_head\.weight"):
        load(copy)


@pytest.mark.parametrize(
    ("key", "shape", "expected"),
    [
        ("model.norm.weight", [33], [32]),
        ("model.layers.1.mlp.up_proj.weight", [32, 40], [40, 32]),  # stored the other way round
        ("model.embed_tokens.weight", [62 * 32], [62, 32]),
        ("model.layers.2.self_attn.k_proj.weight", [32, 32], [16, 32]),  # a head for each query
    ],
)
def test_a_wrong_shape_is_named(copy, key, shape, expected):
    edit(copy, lambda tensors: tensors.update({key: np.ones(shape, np.float32)}))
    with refused(re.escape(f"{key} is {shape}, expected {expected}")):
        load(copy)


@pytest.mark.parametrize(
    ("dtype", "name"), [(np.int8, "I8"), (np.float64, "F64"), (ml_dtypes.float8_e4m3fn, "F8_E4M3"), (np.bool_, "BOOL")]
)
def test_a_dtype_that_weights_do_not_have_is_named(copy, dtype, name):
    key = "model.layers.1.mlp.up_proj.weight"
    edit(copy, lambda tensors: tensors.update({key: np.ones((40, 32), dtype)}))
    with refused(rf"{key} is {name}, expected one of F32, F16, BF16"):
        load(copy)


@pytest.mark.parametrize("kept", [0, 4, 100, -100])
def test_a_truncated_file_is_one_clear_line(copy, kept):
    """Nothing, a part of the header's length, of the header, and of the last tensor."""
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with refused(r"model\.safetensors: truncated or damaged \(\d+ bytes.*fetch it again"):
        load(copy)


def test_a_truncated_shard_is_named(tmp_path):
    save_llm(tmp_path, max_shard_size="20KB")
    shard = max(tmp_path.glob("model-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with refused(f"{shard.name}: truncated or damaged"):
        load(tmp_path)


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"weight_map": ["model.safetensors"]}'])
def test_a_damaged_index_is_named(copy, content):
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors.index.json").write_text(content)
    with refused(r"model\.safetensors\.index\.json: not "):
        load(copy)


def test_a_missing_shard_is_named(tmp_path):
    save_llm(tmp_path, max_shard_size="20KB")
    shard = min(tmp_path.glob("model-*.safetensors"))
    shard.unlink()
    with refused(f"{shard.name}: named in model.safetensors.index.json, but missing"):
        load(tmp_path)


def test_a_directory_without_safetensors_is_refused(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with refused(r"no model\.safetensors .*pytorch_model\.bin is not read"):
        load(copy)
    (copy / "pytorch_model.bin").unlink()
    with refused(r"no model\.safetensors and no model\.safetensors\.index\.json: name a directory with weights$"):
        load(copy)


def test_config_errors_name_the_file(copy):
    file = copy / "config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in content.items() if k != "hidden_size"}))
    with refused(rf"^{file}: has no 'hidden_size'"):
        hf.load_llm_config(copy)
    file.write_text("{")
    with refused(rf"^{file}: not JSON"):
        hf.load_llm_config(copy)
    file.write_text("[]")
    with refused(rf"^{file}: not a JSON object"):
        hf.load_llm_config(copy)
    file.write_text(json.dumps(content))
    with refused(rf"^{file}: model_type 'llama' is not a Whisper"):
        hf.load_whisper_config(copy)


def test_a_directory_without_a_config_is_refused(copy):
    (copy / "config.json").unlink()
    for directory in (copy, copy / "elsewhere"):
        for read in (hf.load_llm_config, hf.load_whisper_config):
            with refused(rf"^{directory}/config\.json: cannot be read \(No such file.*\): name a Hugging Face"):
                read(directory)


def test_whisper_halves_share_a_file_and_foreign_keys_are_errors(tiny_whisper_dir, tmp_path):
    config = hf.load_whisper_config(tiny_whisper_dir)
    assert "embed" in hf.load_whisper_decoder(tiny_whisper_dir, config, dtype=jnp.float32)
    directory = shutil.copytree(tiny_whisper_dir, tmp_path / "whisper")
    edit(directory, lambda tensors: tensors.update({"classifier.weight": np.ones(2, np.float32)}))
    for read in (hf.load_whisper_encoder, hf.load_whisper_decoder):
        with refused(r"has keys that the model lacks: classifier\.weight"):
            read(directory, config, dtype=jnp.float32)


_ON_FOUR_DEVICES = """
import contextlib, sys, types, weakref
import jax, jax.numpy as jnp, numpy as np, safetensors
from jax.sharding import NamedSharding, PartitionSpec as P
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
from aura_jax.convert import hf

reads = {}  # key -> how many numbers, reading by reading
held = lambda: None  # what the last reading gave, while it is alive

class Slice:
    def __init__(self, key, stored):
        self.key, self.stored = key, stored
        self.get_shape, self.get_dtype = stored.get_shape, stored.get_dtype

    def __getitem__(self, at):
        global held
        assert held() is None, f"{self.key} is read while another reading is held"
        part = self.stored[at]
        held = weakref.ref(part)
        reads.setdefault(self.key, []).append(part.size)
        return part

@contextlib.contextmanager
def opened(*args):
    with safetensors.safe_open(*args) as file:
        yield types.SimpleNamespace(keys=file.keys, get_slice=lambda key: Slice(key, file.get_slice(key)))

hf.safe_open = opened
mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

def spec(path, shape):
    if path.endswith("kernel"):
        return NamedSharding(mesh, P(*[None] * (len(shape) - 2), "x", "y"))
    return NamedSharding(mesh, P("x") if path.endswith("embedding") else P())

config = hf.load_llm_config(sys.argv[1])
split = hf.load_llm(sys.argv[1], config, n_adapted=1, dtype=jnp.float32, sharding=spec)
kernel = split["plain"]["mlp"]["down"]["kernel"]
assert kernel.addressable_shards[0].data.shape == (2, 20, 16), kernel.addressable_shards[0].data.shape
# Quarters of the kernels; halves of the embedding, each once for the two devices that have it; the norms once for all.
assert reads.pop("model.embed_tokens.weight") == [31 * 32] * 2
assert reads.pop("model.layers.2.mlp.down_proj.weight") == [20 * 16] * 4
for key, sizes in reads.items():
    assert len(sizes) == (1 if "norm" in key else 4) and len(set(sizes)) == 1, (key, sizes)
whole = hf.load_llm(sys.argv[1], config, n_adapted=1, dtype=jnp.float32)
jax.tree.map(np.testing.assert_array_equal, split, whole)
"""


def test_devices_read_their_parts_once_and_hold_the_same_values(llama):
    subprocess.run([sys.executable, "-c", _ON_FOUR_DEVICES, str(llama[0])], check=True, timeout=120)
