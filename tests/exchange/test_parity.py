"""Runs against their exports in torch, in float32: max|a - b| <= 1e-4 max|b|, never loosened, and the same tokens."""

import numpy as np
import pytest
import torch
from torch_exports import Exported

from aura_jax import assets, checkpoint, config, system
from aura_jax.audio.io import load_audio
from aura_jax.convert import random_models
from aura_jax.data.manifest import load_manifest
from aura_jax.exchange import importing
from aura_jax.exchange.export import FORMATS, export_run
from aura_jax.infer.generate import Generator
from aura_jax.infer.prompting import Request

PARITY = 1e-4
FAMILIES = {
    "llama, tied": dict(family="llama"),
    "llama, untied": dict(family="llama", tied=False),
    "qwen2, untied": dict(family="qwen2", tied=False),
    "qwen3, tied": dict(family="qwen3"),
}

FAST = "qwen2, untied"  # biases and a head of its own


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread():
    """Models this small run faster in one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def relative(a, b) -> float:
    """max|a - b| / max|b|"""
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape
    return float(np.abs(a - b).max() / np.abs(b).max())


def prompt_logits(built, variables, clip) -> np.ndarray:
    return Generator(built, variables).prompt_logits(Request(clip))


def noise(n_samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, n_samples).astype(np.float32)


@pytest.mark.parametrize(
    "case", [FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name != FAST)]
)
def test_every_family_in_every_format(case, tiny_config, random_variables, write_workdir, tmp_path):
    llm = tmp_path / "llm"
    llm.mkdir()
    random_models.build_llm(llm, **FAMILIES[case])
    c = tiny_config()
    c.model.llm, c.data.prompt = str(llm), "What was said?"
    c.model.mask = "bidirectional"  # which torch does not have by itself
    c.train.schedule, c.train.stages.joint = ("joint",), config.stage(2, 1e-3, {"lm": 1.0})
    c.data.train = (("sample_data/commands/train.jsonl", 1.0),)
    built = system.build(c)
    variables = random_variables(built)
    workdir = write_workdir(built, variables, tmp_path / "run")
    clip = noise(14_321)
    wanted = prompt_logits(built, variables, clip)
    for name in FORMATS:
        folder = export_run(workdir, tmp_path / name, name, force=name == "merged")
        assert relative(Exported(name, folder, llm).logits(clip), wanted) < PARITY, name
        if name != "merged":
            read = importing.import_peft if name == "peft" else importing.import_hf
            read(folder, tmp_path / f"{name} again")
            again = checkpoint.load_for_inference(tmp_path / f"{name} again")
            np.testing.assert_array_equal(prompt_logits(*again, clip), wanted, err_msg=name)


@pytest.mark.optimised
@pytest.mark.slow
def test_the_real_small_weights(random_variables, write_workdir, sample_data, tmp_path):
    """Logits, and the greedy tokens of 20 recordings: in JAX, in the hf export, and in base + PEFT + embedder."""
    c = config.load(["--config=configs/quickstart.py", "--config.model.matmul_dtype=", "--config.eval.batch_size=20"])
    c.eval.max_new_tokens = 12
    built = system.build(c)
    variables = random_variables(built, size=0.03)
    workdir = write_workdir(built, variables, tmp_path / "run")
    rows = load_manifest(sample_data / "recordings" / "test.jsonl")[:20]
    clips = [load_audio(row.audio) for row in rows]
    wanted = [list(reply.tokens) for reply in Generator(built, variables).generate([Request(clip) for clip in clips])]
    assert len({tuple(tokens) for tokens in wanted}) > 1  # the clips are heard
    logits = prompt_logits(built, variables, clips[0])
    for name in ("hf", "peft"):
        folder = export_run(workdir, tmp_path / name, name)
        model = Exported(name, folder, assets.resolve(c.model.llm))
        assert relative(model.logits(clips[0]), logits) < PARITY, name
        assert model.tokens(clips, c.eval.max_new_tokens) == wanted, name
