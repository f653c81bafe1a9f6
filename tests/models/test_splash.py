"""The splash kernel, its body run as ordinary operations, against `xla`; and compiled for TPUs, with none."""

import functools
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
from jax.sharding import NamedSharding, PartitionSpec

from aura_jax import cli, sharding, system
from aura_jax.errors import UserError
from aura_jax.experiments.compile import chips
from aura_jax.infer.generate import Generator
from aura_jax.infer.prompting import Request
from aura_jax.models import attention as attention_lib
from aura_jax.models import splash
from aura_jax.models.attention import columns_ahead, key_end
from aura_jax.models.speech_llm import SpeechLLM
from aura_jax.models.whisper import WhisperConfig, WhisperEncoder
from tests.models import test_speech_llm as speech

ROOT = Path(__file__).parents[2]
attention: Any = attention_lib.attention  # numpy arrays do as well
interpreted: Any = functools.partial(splash.splash_attention, interpret=True)


def draw(*shape, seed: int = 0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def close(a, b) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-4 * np.abs(y).max(), rtol=0)


def with_gradients(function, q, k, v, weight):
    """Returns the output, and gradients by queries, keys and values."""

    def loss(q, k, v):
        out = function(q, k, v)
        return (out * weight).sum(), out

    gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return out, gradients


def rows_with_spans(B: int, T: int, n_audio: int):
    """Returns segments, and the spans' first and last columns: two requests a row and padding, each with its clip."""
    column = np.tile(np.arange(T), (B, 1))
    segment, start, end = np.zeros((B, T), int), column.copy(), column + 1
    for b in range(B):
        middle, last = T // 2 + b, T - 1 - 2 * b
        segment[b, b:middle], segment[b, middle:last] = 1, 2
        for first, n in ((b + 1, n_audio), (middle + 2, n_audio - 1)):
            start[b, first : first + n], end[b, first : first + n] = first, first + n
    return segment, start, end


# Of short rows one block; of long ones several, some of which no query of another reads.
SIZES = {"one block": (2, 23, 4, 2, 16, 6), "several": (2, 1101, 4, 1, 64, 150), "wide heads": (1, 300, 2, 2, 128, 40)}


@pytest.mark.parametrize(
    ("mask", "chunk", "size"),
    [
        ("causal", 0, "several"),
        ("bidirectional", 0, "one block"),
        ("bidirectional", 0, "several"),
        ("block", 3, "wide heads"),
    ],
)
def test_equals_xla_forward_and_backward(mask, chunk, size):
    B, T, H, G, K, n_audio = SIZES[size]
    q, k, v, weight = draw(B, T, H, K), draw(B, T, G, K, seed=1), draw(B, T, G, K, seed=2), draw(B, T, H, K, seed=3)
    segment, start, end = rows_with_spans(B, T, n_audio)
    k_end = key_end(jnp.asarray(start), jnp.asarray(end), mask, chunk)
    ahead = columns_ahead(mask, chunk, n_audio)
    assert (k_end - np.arange(T) - 1).max() == ahead
    expected = with_gradients(lambda *x: attention(*x, k_end, segment, segment), q, k, v, weight)
    for promised in (ahead, None):
        kernel = lambda *x: interpreted(*x, k_end, segment, segment, K**-0.5, promised)  # noqa: B023
        close(with_gradients(kernel, q, k, v, weight), expected)
    out, (q_gradient, *_) = expected
    assert (np.asarray(out)[segment == 0] == 0).all() and (np.asarray(q_gradient)[segment == 0] == 0).all()


def test_more_keys_than_queries_and_queries_that_see_none():
    q, k, v, weight = draw(2, 5, 4, 8), draw(2, 140, 2, 8, seed=1), draw(2, 140, 2, 8, seed=2), draw(2, 5, 4, 8, seed=3)
    k_end = np.array([[1, 0, 100, 140, 140], [130, 131, 132, 133, 140]])
    q_segment, k_segment = np.array([[1, 1, 1, 2, 3], [0, 1, 1, 1, 1]]), np.repeat([[1, 2], [0, 1]], 70, axis=1)
    expected = with_gradients(lambda *x: attention(*x, k_end, q_segment, k_segment, scale=0.3), q, k, v, weight)
    got = with_gradients(lambda *x: interpreted(*x, k_end, q_segment, k_segment, 0.3), q, k, v, weight)
    close(got, expected)
    assert (np.asarray(got[0][0, [1, 4]]) == 0).all() and (np.asarray(got[0][1, 0]) == 0).all()


def test_keys_beyond_the_promise_are_not_read():
    T = 1100
    q, k, v = draw(1, T, 1, 8), draw(1, T, 1, 8, seed=1), draw(1, T, 1, 8, seed=2)
    k_end, segment = np.arange(1, T + 1)[None], np.ones((1, T), int)
    poisoned = [x.at[:, 800:].set(np.nan) for x in (k, v)]
    for ahead, finite in ((0, True), (None, False)):
        out = interpreted(q, *poisoned, k_end, segment, segment, 1.0, ahead)
        assert np.isfinite(out[:, :300]).all() == finite


def test_16_bit_inputs():
    q, k, v = (x.astype(jnp.bfloat16) for x in (draw(1, 40, 4, 64), draw(1, 40, 2, 64, seed=1), draw(1, 40, 2, 64)))
    k_end, segment = jnp.arange(1, 41)[None], jnp.ones((1, 40), int)
    out = interpreted(q, k, v, k_end, segment, segment, 64**-0.5, 0)
    assert out.dtype == jnp.bfloat16
    expected = attention(q, k, v, k_end, segment, segment)
    np.testing.assert_allclose(out.astype(jnp.float32), expected.astype(jnp.float32), atol=0.03)


@pytest.fixture
def on_the_cpu(monkeypatch):
    """Has models run the kernel's body wherever they would run the kernel."""
    monkeypatch.setattr("aura_jax.models.attention.splash_attention", interpreted)


@pytest.mark.slow  # compiles whole models
@pytest.mark.parametrize(
    ("variant", "layout"),
    [("bidirectional, request", "PACKED"), ("causal, audio", "SPREAD"), ("block, all, patch", "SPREAD")],
)
def test_a_speech_llm_in_either_layout(on_the_cpu, variant, layout):
    config, (columns, mel, n_frames) = speech.VARIANTS[variant], getattr(speech, layout)
    variables = speech.draw(config)
    run = lambda impl: jax.jit(SpeechLLM(config, attention_impl=impl).apply)(variables, columns, mel, n_frames)[0]
    real = columns.segment_BxT != 0
    close(run("splash")[real], run("xla")[real])


@pytest.mark.slow
def test_the_teacher(on_the_cpu):
    config = WhisperConfig(8, 12, 2, 2, 16, 2, 2, 16, 20, 80, 8)
    mel, n_frames = draw(3, 150, 8), np.array([150, 77, 2])
    variables = WhisperEncoder(config).init(jax.random.key(0), mel)
    for arguments in ((mel,), (mel, n_frames)):
        run = lambda impl: jax.jit(WhisperEncoder(config, attention_impl=impl).apply)(variables, *arguments)[0]  # noqa: B023
        close(run("splash"), run("xla"))


def call(n_kv_heads: int = 2):
    q, k, segment = jnp.ones((2, 3, 4, 8)), jnp.ones((2, 3, n_kv_heads, 8)), jnp.ones((2, 3), jnp.int32)
    return attention(q, k, k, segment, segment, segment, "splash")


def test_without_a_tpu_it_is_refused():
    with pytest.raises(UserError, match=r"^attention 'splash' needs a TPU: set model.attention='xla'$"):
        call()
    with jax.set_mesh(sharding.make_mesh(1, 1, 1)), pytest.raises(UserError, match="needs a TPU"):
        jax.eval_shape(call)


def test_a_mesh_that_splits_heads_unevenly_is_refused():
    with jax.set_mesh(sharding.make_mesh(1, 2, 2, devices=chips.topology("v5e:2x2").devices)):
        assert jax.eval_shape(call).shape == (2, 3, 4, 8)
        with pytest.raises(UserError, match=r"mesh.tensor=2 does not divide 1 heads of keys: change mesh.tensor, or"):
            jax.eval_shape(functools.partial(call, 1))


@pytest.mark.slow
def test_parameters_and_answers_need_no_tpu(tiny_config, tiny_loaded):
    """Answers are decoded by `xla`; and shapes of parameters are wanted where nothing runs."""
    built, variables = tiny_loaded
    c = tiny_config()
    c.model.attention = "splash"
    trained = system.build(c)
    assert trained.teacher is not None
    assert trained.model.attention_impl == trained.teacher.attention_impl == "splash"
    assert jax.tree.all(
        jax.tree.map(lambda x, y: x.shape == y.shape, *map(system.abstract_variables, (trained, built)))
    )
    request = [Request(prompt="what"), Request(waveform=np.zeros(8000, np.float32))]
    a, b = (Generator(one, variables).generate(request) for one in (trained, built))
    assert [reply.tokens for reply in a] == [reply.tokens for reply in b]


ON_A_MESH = """
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 8)
from aura_jax import sharding
from tests.models.test_splash import attention, close, draw, interpreted, rows_with_spans, with_gradients

for B in (8, 3):  # rows that divide over the devices, and rows that do not
    q, k, v, weight = draw(B, 40, 4, 16), draw(B, 40, 2, 16, seed=1), draw(B, 40, 2, 16, seed=2), draw(B, 40, 4, 16)
    segment, start, end = rows_with_spans(B, 40, 5)
    expected = with_gradients(lambda *x: attention(*x, end, segment, segment), q, k, v, weight)
    for axes in ((2, 2, 2), (1, 8, 1)):
        with jax.set_mesh(sharding.make_mesh(*axes)):
            got = with_gradients(lambda *x: interpreted(*x, end, segment, segment, 16**-0.5, 4), q, k, v, weight)
            close(jax.device_get(got), expected)
print("same on every mesh")
"""


@pytest.mark.slow  # a process of its own, with eight devices
def test_a_mesh_of_eight_devices_changes_nothing():
    run = subprocess.run(
        [sys.executable, "-c", ON_A_MESH],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.stdout == "same on every mesh\n", run.stderr[-3000:]


@pytest.mark.optimised
@pytest.mark.slow  # a compiler for TPUs
@pytest.mark.parametrize("axes", [(1, 4, 1), (1, 2, 2)])
@pytest.mark.parametrize(("T", "K", "ahead"), [(2048, 128, 374), (1500, 64, None)], ids=["student", "teacher"])
def test_compiles_for_tpus_forward_and_backward_and_moves_nothing(T, K, ahead, axes):
    mesh = sharding.make_mesh(*axes, devices=chips.topology("v5e:2x2").devices)
    heads, rows = (PartitionSpec(sharding.BATCH_AXES, *rest) for rest in ((None, "tensor"), ()))
    shape = lambda dims, dtype, spec: jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, spec))
    q, k = (shape((8, T, n, K), jnp.bfloat16, heads) for n in (28, 4))
    row = shape((8, T), jnp.int32, rows)

    def loss(q, k, v, *masks):
        return jnp.sum(attention(q, k, v, *masks, "splash", ahead=ahead).astype(jnp.float32) ** 2)

    with jax.set_mesh(mesh):
        program = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, k, row, row, row).compile()
    text = program.as_text() or ""
    assert len(re.findall(r"custom_call_target=\"tpu_custom_call\"", text)) == 3  # forward; keys and values; queries
    assert not re.search(r"all-(gather|to-all|reduce)|collective-permute", text)


@pytest.mark.slow  # half a minute of a compiler
@pytest.mark.parametrize("layout", ["slot", "packed"])
def test_the_whole_step_compiles_for_tpus(layout, tmp_path, capsys):
    out, text = tmp_path / "out.json", tmp_path / "program.txt"
    argv = ["compile", f"--config={ROOT / 'configs' / 'smoke.py'}", "--topology", "v5e:2x2"]
    argv += ["--config.data.text_rows=4", "--config.teacher.precompute=False", f"--config.data.layout={layout}"]
    argv += ["--config.model.attention=splash", "--config.model.remat=full"]
    assert cli.main([*argv, "--json", str(out), "--hlo", str(text)]) == 0, capsys.readouterr()
    assert json.loads(out.read_text())["fits"] and "tpu_custom_call" in text.read_text()
