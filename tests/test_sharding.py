"""The two tables (where parameters live, which are trained), and that a mesh changes no result."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from aura_jax import sharding, system
from aura_jax.errors import UserError
from aura_jax.models.embedder import EmbedderConfig
from aura_jax.models.llm import LLMConfig
from aura_jax.models.lora import LoRAConfig
from aura_jax.models.speech_llm import SpeechLLM, SpeechLLMConfig, text_context
from aura_jax.models.whisper import WhisperConfig, WhisperDecoder, WhisperEncoder

LLAMA = LLMConfig("llama", 40, 24, 32, 3, 4, 2, 8, 1000.0)
FAMILIES = {
    "llama": LLAMA,
    "llama, untied": dataclasses.replace(LLAMA, tied=False),
    "qwen2": dataclasses.replace(LLAMA, qkv_bias=True),
    "qwen3": dataclasses.replace(LLAMA, qk_norm=True, tied=False),
}
MESH = AbstractMesh((2, 2, 2), sharding.MESH_AXES)


def abstract_variables(llm: LLMConfig, kind: str) -> dict:
    embedder = EmbedderConfig(kind, n_mels=8, width=12, out_width=llm.width, frames_per_token=4)
    model = SpeechLLM(SpeechLLMConfig(llm, embedder, LoRAConfig(n_blocks=2, rank=3, alpha=3.0)))
    tokens = jnp.zeros((1, 1), jnp.int32)

    def touch_everything(m: SpeechLLM):
        m.embed_audio(jnp.zeros((1, 1, 8, 8)), tokens + 8, 1)
        return m.logits(m.llm(m.embed_text(tokens), text_context(tokens, tokens + 1))[0])

    keys = {"params": jax.random.key(0), "lora": jax.random.key(0)}
    return jax.eval_shape(lambda: model.init(keys, method=touch_everything))


def specs(tree) -> dict[str, PartitionSpec]:
    return {path: sharding.parameter_spec(path, leaf.shape, MESH) for path, leaf in sharding.flatten(tree).items()}


@pytest.mark.parametrize("kind", ["stem", "patch"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_has_a_row_and_every_matrix_is_split(family, kind):
    tree = abstract_variables(FAMILIES[family], kind)
    table, shapes = specs(tree), {path: leaf.shape for path, leaf in sharding.flatten(tree).items()}
    for path, spec in table.items():
        assert len(spec) <= len(shapes[path])
        is_matrix = path.rpartition("/")[2] in ("kernel", "embedding", "a", "b")
        assert bool(spec) == (is_matrix or path.split("/")[-2:] in [[x, "bias"] for x in "qkv"]), path
        if "/adapted/" in path or "/plain/" in path:
            assert not spec or spec[0] is None  # the scan's axis


def test_rows_agree_with_each_other():
    """A delta x A B must leave its shards as x W does; what one linear splits, the next one contracts.

    The side of an adapter that has no axis of its own is split further, over fsdp: nothing of the state is repeated.
    """
    table = specs(abstract_variables(FAMILIES["qwen2"], "stem"))
    root = "llm/adapted"
    for room, names in (("attn", "qkvo"), ("mlp", ("gate", "up", "down"))):
        for name in names:
            kernel = table[f"params/{root}/{room}/{name}/kernel"]
            a, b = (table[f"lora/{root}/{room}/{name}/{x}"] for x in "ab")
            outer = lambda axis: ("tensor", "fsdp") if axis == "tensor" else axis
            assert a == PartitionSpec(None, outer(kernel[1]))
            assert b == PartitionSpec(None, None, outer(kernel[2]))
            fans_out = name not in ("o", "down")
            assert kernel == PartitionSpec(None, *(("fsdp", "tensor") if fans_out else ("tensor", "fsdp")))
    assert table[f"params/{root}/attn/q/bias"] == PartitionSpec(None, "tensor")
    assert table["params/llm/embed/embedding"] == PartitionSpec("tensor", "fsdp")
    assert table["params/embedder/stem/conv1/kernel"] == PartitionSpec(None, None, "fsdp")


def test_whisper_and_heads_have_rows_too(tiny_config):
    whisper = WhisperConfig(8, 12, 2, 2, 16, 2, 2, 16, 20, 10, 8)
    encoder, decoder = WhisperEncoder(whisper), WhisperDecoder(whisper)
    key = jax.random.key(0)
    for tree in (
        jax.eval_shape(lambda: encoder.init(key, jnp.zeros((1, 4, 8)))),
        jax.eval_shape(lambda: decoder.init(key, jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 2, 12)))),
    ):
        table = specs(tree)
        assert all(table[p] for p in table if p.endswith(("kernel", "embedding")))
    heads = system.abstract_variables(system.build(tiny_config()))["heads"]
    assert specs({"heads": heads}) == {"heads/kernel": PartitionSpec(None, "fsdp"), "heads/scale": PartitionSpec()}


def test_a_parameter_is_gathered_over_the_axes_of_rows_only():
    with jax.sharding.use_abstract_mesh(MESH):
        trace = jax.make_jaxpr(lambda x: sharding.gathered("params/llm/lm_head/kernel", x))(jnp.zeros((8, 12)))
    assert trace.eqns[0].params["sharding"].spec == PartitionSpec(None, "tensor")
    x = jnp.zeros((3, 4))
    assert sharding.gathered("params/q/kernel", x) is x and sharding.keep_rows(x) is x


def test_an_unknown_parameter_or_a_mesh_that_does_not_divide_is_an_error():
    with pytest.raises(UserError, match=r"no row of sharding.PARAMETER_AXES matches params/llm/new/weight"):
        sharding.parameter_spec("params/llm/new/weight", (4, 4), MESH)
    with pytest.raises(UserError, match=r"fsdp=2 does not divide params/q/kernel \(5, 4\): change mesh.fsdp"):
        sharding.parameter_spec("params/q/kernel", (5, 4), MESH)
    one = AbstractMesh((1, 1, 1), sharding.MESH_AXES)
    assert sharding.parameter_spec("params/q/kernel", (5, 4), one) == PartitionSpec()


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ((0, 1, 1), "mesh data=0, fsdp=1, tensor=1: axes are positive, and at most one is -1"),
        ((-1, -1, 1), "at most one is -1"),
        ((1, -2, 1), "axes are positive"),
        ((2, 2, 1), "mesh data=2, fsdp=2, tensor=1 needs 4 devices, and there are 1: change mesh"),
        ((3, -1, 1), "mesh data=3, fsdp=-1, tensor=1 does not divide 1 devices: change mesh"),
    ],
)
def test_impossible_meshes_are_named(axes, message):
    with pytest.raises(UserError, match=message) as caught:
        sharding.make_mesh(*axes, devices=jax.devices()[:1])
    assert "\n" not in str(caught.value)


def test_minus_one_takes_the_devices_that_are_left():
    mesh = sharding.make_mesh(1, -1, 1, devices=jax.devices()[:1])
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1}


TREE = {
    "params": {"llm": {"kernel": 1.0, "bias": 2.0}, "embedder": {"gain": 3.0}},
    "lora": {"llm": {"a": 4.0, "b": 5.0}},
}


def test_flatten_split_and_their_inverses():
    flat = sharding.flatten(TREE)
    assert flat["params/llm/kernel"] == 1.0 and len(flat) == 5
    assert sharding.unflatten(flat) == TREE
    trained, frozen = sharding.split(TREE, ["lora/llm/a", "params/embedder/gain"])
    assert trained == {"lora/llm/a": 4.0, "params/embedder/gain": 3.0}
    assert frozen == {"params": {"llm": {"kernel": 1.0, "bias": 2.0}}, "lora": {"llm": {"b": 5.0}}}
    assert sharding.join(trained, frozen) == TREE
    assert sharding.join({"lora/llm/a": 9.0}, TREE)["lora"] == {"llm": {"a": 9.0, "b": 5.0}}


def test_learning_rates_take_the_first_row_that_matches_the_start_of_a_path():
    paths = sharding.flatten(TREE)
    rates = sharding.learning_rates(paths, [("lora/.*/b", 2.0), ("lora/", 1.0), ("params/embedder", 0.5)])
    assert rates == {"lora/llm/a": 1.0, "lora/llm/b": 2.0, "params/embedder/gain": 0.5}
    with pytest.raises(
        UserError, match=r"'loar/' matches no parameter; there are lora/llm, params/embedder, params/llm"
    ):
        sharding.learning_rates(paths, [("lora/", 1.0), ("loar/", 1.0)])
    with pytest.raises(UserError, match="'llm' matches no parameter"):
        sharding.learning_rates(paths, [("llm", 1.0)])


ON_A_MESH = """
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_num_cpu_devices", 8)
from aura_jax import sharding
from aura_jax.models.llm import LLM, LLMConfig
from aura_jax.models.lora import LoRAConfig
from aura_jax.models.speech_llm import text_context

llm = LLM(LLMConfig("qwen2", 40, 24, 32, 3, 4, 2, 8, 1000.0, tied=False, qkv_bias=True), LoRAConfig(2, 4, 4.0))
tokens = jnp.asarray(np.random.default_rng(0).integers(0, 40, (8, 6)))
ctx = text_context(jnp.tile(jnp.arange(6), (8, 1)), jnp.ones((8, 6), jnp.int32))

def forward(m, tokens, ctx):
    return m.logits(m(m.embed(tokens), ctx)[0])

variables = llm.init({"params": jax.random.key(0), "lora": jax.random.key(1)}, tokens, ctx, method=forward)
variables = jax.tree.map(lambda x: x + 0.1 * jnp.sin(jnp.arange(x.size)).reshape(x.shape), variables)

def loss(variables, tokens, ctx):
    logits = llm.apply(variables, tokens, ctx, method=forward)
    return jnp.mean(jax.nn.log_softmax(logits)[..., 0] ** 2), logits

def step(variables, tokens, ctx):
    (_, logits), grads = jax.value_and_grad(loss, has_aux=True)(variables, tokens, ctx)
    return logits, grads

expected = jax.device_get(jax.jit(step)(variables, tokens, ctx))
for axes in ((2, 2, 2), (1, -1, 1), (2, 1, 4)):  # the last one cuts through key/value heads
    mesh = sharding.make_mesh(*axes)
    assert mesh.size == 8
    placed = jax.device_put(variables, sharding.tree_shardings(variables, mesh))
    rows = sharding.batch_sharding(mesh)
    shards = sharding.flatten(placed)["params/adapted/mlp/up/kernel"].addressable_shards
    assert len({str(shard.index) for shard in shards}) == mesh.shape["fsdp"] * mesh.shape["tensor"]
    batch = jax.device_put((tokens, ctx), rows)
    with jax.set_mesh(mesh):
        got = jax.device_get(jax.block_until_ready(jax.jit(step)(placed, *batch)))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6 + 1e-5 * np.abs(b).max())
print("same on every mesh")
"""


@pytest.mark.slow  # a process of its own, with eight devices
def test_forward_and_gradients_on_eight_devices_are_those_of_one():
    run = subprocess.run(
        [sys.executable, "-c", ON_A_MESH],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.stdout == "same on every mesh\n", run.stderr[-3000:]
