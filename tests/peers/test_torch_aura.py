"""One train step here and in torch, transformers and PEFT, in float32: max|a - b| <= 1e-4 max|b|, never loosened."""

import json

import jax
import numpy as np
import pytest
import torch
import torch_audio
import torch_aura
import torch_step

from aura_jax import config, sharding
from aura_jax.audio import features
from aura_jax.train import step as step_lib
from tests.train.conftest import trainable

PARITY = 1e-4
ALL = {"lm": 1.0, "distill": 1.0, "text_anchor": 10.0}
# What each case changes, beside its objectives.
CASES = {
    "distil only": ({"distill": 1.0}, {}),
    "lm, distill and anchor": (ALL, {}),
    "causal": (ALL, {"model__mask": "causal", "distill__loss": "nmse"}),
    "chunks, KD": (
        {"lm": 1.0, "distill": 1.0, "text_kd": 1.0},
        {"model__mask": "block", "model__chunk": 4, "distill__loss": "smooth_l1", "distill__head": "shared"},
    ),
    "packed, rank-stabilised, patches": (
        ALL,
        {
            "data__layout": "packed",
            "data__row_tokens": 160,
            "data__row_clips": 4,
            "lora__rslora": True,
            "lora__targets": ("q", "v", "down"),
            "embedder__kind": "patch",
            "embedder__from_teacher": False,
            "model__normalisation": "streaming",
            "distill__loss": "mse",
        },
    ),
    "statistics, the teacher's window": (
        {"distill": 1.0},
        {"teacher__window": "30s", "distill__target_norm": "standardise", "optimizer__weight_decay": 0.5},
    ),
}


@pytest.fixture(autouse=True)
def one_torch_thread():
    """Models this small run faster in one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def close(ours, theirs, what: str) -> None:
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    error, size = np.abs(ours - theirs).max(), np.abs(ours).max()
    assert ours.shape == theirs.shape and error <= PARITY * size, f"{what}: {error} of {size}"


def both(make_config, make_run, objectives, changes):
    """Takes one step on both sides; returns (metrics, clipped gradients, trained variables) of each, and of before."""
    c = make_config(**objectives)
    c.distill.target_norm = "layernorm"
    c.trainable = (("params/embedder/(?!text_rms)", 2.0), ("lora/.*/a$", 1.0), ("lora/.*/b$", 4.0), ("heads/", 2.0))
    # Adam's first update is g / (|g| + eps): with the usual eps the sign of whatever rounding left of a zero.
    c.optimizer.eps = 1e-4
    c.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    built, variables, batch, mesh = make_run(c)
    leaves, tree = jax.tree.flatten(variables["lora"])
    draw = np.random.default_rng(0)
    variables["lora"] = jax.tree.unflatten(tree, [draw.normal(0, 0.1, x.shape).astype(np.float32) for x in leaves])
    statistics = {name: draw.uniform(0.5, 1.5, (len(built.pairs), 32)).astype(np.float32) for name in ("mean", "std")}

    rates, trained, frozen = trainable(built, variables)
    before = jax.device_get(trained)
    constants = step_lib.Constants(statistics=statistics if c.distill.target_norm == "standardise" else None)
    stage = c.train.stages.only
    step = step_lib.jit_step(built, stage, 0, rates, mesh)
    state, metrics = step(step_lib.new_state(c, trained, 0, mesh), frozen, constants, batch)
    gradients = {path: x / (1 - c.optimizer.b1) for path, x in state.moments[0].mu.items()}
    ours = (metrics, gradients, state.trained)

    weights = {path: np.asarray(x) for path, x in sharding.flatten(variables).items()} | {
        f"statistics/{name}": value for name, value in statistics.items()
    }
    settings = json.loads(config.to_json(c))
    setting = torch_aura.Setting(settings, built.llm_dir, built.teacher_dir, built.pairs, built.frames_per_token)
    trainer = torch_step.Trainer(setting, weights)
    assert trainer.rates == rates
    arrays = {name: np.asarray(x) for name, x in batch._asdict().items() if x is not None}
    metrics = trainer.step(arrays, settings["train"]["stages"]["only"])
    return ours, (metrics, trainer.gradients(), trainer.weights()), before


@pytest.mark.slow
@pytest.mark.parametrize(("objectives", "changes"), CASES.values(), ids=CASES.keys())
def test_losses_gradients_and_the_first_step_agree(make_config, make_run, objectives, changes):
    ours, theirs, before = both(make_config, make_run, objectives, changes)
    for name, value in theirs[0].items():
        close(ours[0][name], value, name)
    expected = {"loss", "grad_norm", *(f"loss/{name}" for name in objectives)}
    assert set(theirs[0]) == expected | {"loss/distill/block_00", "loss/distill/block_01"}
    assert set(theirs[1]) == set(theirs[2]) == set(before)
    for path in before:
        close(ours[1][path], theirs[1][path], f"gradient of {path}")
        close(ours[2][path], theirs[2][path], path)
        assert np.abs(theirs[2][path] - before[path]).max() > 0


@pytest.mark.parametrize("normalisation", ["whisper", "streaming"])
def test_log_mel_agrees(normalisation):
    draw = np.random.default_rng(0)
    n_samples = np.array([16000, 9999, 161], np.int32)
    waveform = draw.normal(0, 0.1, (3, 16000)).astype(np.float32)
    ours = features.log_mel(waveform, 80, n_samples_B=n_samples, normalisation=normalisation)
    theirs = torch_audio.log_mel(torch.tensor(waveform), 80, torch.tensor(n_samples), normalisation)
    close(ours, theirs, normalisation)
    close(
        features.log_mel(waveform, 80, reflect_end=True),
        torch_audio.log_mel(torch.tensor(waveform), 80, None, reflect_end=True),
        "a whole window",
    )


def test_the_rate_follows_the_same_schedule(make_config):
    stage = make_config().train.stages.only
    stage.update(steps=50, warmup_steps=7, learning_rate=1e-3, final_fraction=0.1)
    ours, values = step_lib.learning_rate(stage), json.loads(stage.to_json())
    for step in range(60):
        assert torch_step.schedule(values, step) == pytest.approx(float(ours(step)), rel=1e-5), step


@pytest.mark.parametrize(
    ("key", "value"), [("lora.scope", "audio"), ("lora.text_energy", 0.5), ("data.augment.freq_masks", 2)]
)
def test_what_the_peer_lacks_is_refused(make_config, tmp_path, key, value):
    c = make_config()
    c.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match="the peer"):
        torch_aura.Setting(json.loads(config.to_json(c)), tmp_path, tmp_path, (), 4)
