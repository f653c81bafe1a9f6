"""The loop: resuming, signals, stages, and what a run leaves behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from aura_jax import checkpoint, config, sharding, system
from aura_jax.errors import UserError
from aura_jax.models.lora import merge
from aura_jax.train import loop

pytestmark = pytest.mark.slow  # each run compiles its own steps


def lines(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def losses(workdir: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in lines(workdir) if "loss" in line}


@pytest.fixture
def two_stages(make_config):
    """A run of 5 + 5 steps: distil alone, then jointly, augmented, with a text anchor, in the null space of text."""
    c = make_config()
    c.lora.text_energy = 0.2
    c.teacher.precompute = True
    c.model.matmul_dtype = "bfloat16"
    c.train.stages.distil = config.stage(5, 1e-2, {"distill": 1.0, "text_anchor": 1.0}, warmup_steps=2)
    c.train.stages.joint = config.stage(5, 1e-2, {"lm": 1.0, "distill": 1.0}, warmup_steps=2)
    c.train.schedule = ("distil", "joint")
    c.data.speeds = (0.9, 1.1)
    c.data.augment.update(gain_db=(-3.0, 3.0), noise_probability=0.5, freq_masks=1, time_masks=1)
    return c


def test_losses_after_a_resume_are_bit_identical(two_stages, tmp_path):
    loop.train(two_stages, tmp_path / "whole")
    two_stages.train.steps = 3
    assert loop.train(two_stages, tmp_path / "parts").step == 3
    two_stages.train.steps = 7  # the second stage begins in between
    loop.train(two_stages, tmp_path / "parts")
    two_stages.train.steps = 0
    result = loop.train(two_stages, tmp_path / "parts")
    assert result.step == 10 and not result.interrupted
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert sorted(losses(tmp_path / "whole")) == list(range(1, 11))

    trained = [checkpoint.load_for_inference(tmp_path / name, "latest")[1]["lora"] for name in ("whole", "parts")]
    for a, b in zip(*map(jax.tree.leaves, trained), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("cut", [3, 5])  # within the merged stage, and just before it
def test_a_resume_across_a_change_of_what_is_trained(make_config, tmp_path, cut):
    c = make_config()
    c.model.param_dtype = "bfloat16"
    c.train.stages.only.steps = 3
    c.train.stages.heads = config.stage(2, 1e-2, {"distill": 1.0}, trainable=(("heads/", 1.0),))
    c.train.stages.merged = config.stage(
        2, 1e-3, {"lm": 1.0}, merge_lora=True, trainable=(("params/llm/adapted/attn/", 1.0),)
    )
    c.train.schedule = ("only", "heads", "merged")
    loop.train(c, tmp_path / "whole")
    c.train.steps = cut
    loop.train(c, tmp_path / "parts")
    c.train.steps = 0
    loop.train(c, tmp_path / "parts")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    # Merged kernels that are not trained keep the dtype of frozen weights, also on their way to inference.
    llm = checkpoint.load_for_inference(tmp_path / "parts", "latest")[1]["params"]["llm"]["adapted"]
    assert llm["mlp"]["up"]["kernel"].dtype == "bfloat16" and llm["attn"]["q"]["kernel"].dtype == "float32"


def test_metrics_have_the_promised_keys(two_stages, tmp_path):
    two_stages.train.steps = 6
    loop.train(two_stages, tmp_path / "run")
    first, *_, last, spent = lines(tmp_path / "run")
    shared = {"step", "loss", "loss/distill", "loss/distill/block_00", "grad_norm", "learning_rate", "skipped"}
    shared |= {"step_seconds", "tokens_per_second", "audio_seconds_per_second"}
    shared |= {"peak_memory_gib", "steps_since_record", "steps_that_waited"}
    assert shared | {"loss/text_anchor"} <= set(first) and "loss/lm" not in first
    assert shared | {"loss/lm"} <= set(last)
    assert set(spent) == {"step", "seconds/preparing", "seconds/steps", "seconds/checkpoints"}
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_what_ran_is_noted_once_for_each_call_that_takes_steps(make_config, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bin/aura-jax", "train", "--workdir", "a b"])
    c = make_config()
    for c.train.steps in (1, 1, 3):  # the second finds all done
        loop.train(c, tmp_path / "run")
    commands = [json.loads(line) for line in (tmp_path / "run" / "commands.jsonl").read_text().splitlines()]
    assert [line["first_step"] for line in commands] == [0, 1]
    assert commands[0]["command"] == "aura-jax train --workdir 'a b'"
    assert commands[0]["environment"]["jax"] == jax.__version__


def test_periodic_evaluation_tracks_the_best_checkpoint(make_config, tmp_path):
    c = make_config()
    c.data.validation_values = ("af_sky", "af_aoede", "af_alloy")
    c.train.update(eval_every=2, eval_rows=2, steps=4)
    loop.train(c, tmp_path / "run")
    scores = [line for line in lines(tmp_path / "run") if "validation/wer" in line]
    assert [line["step"] for line in scores] == [2, 4]
    best = min(line["validation/wer"] for line in scores)
    manager = checkpoint.Checkpoints(tmp_path / "run", c)
    meta = manager.best()
    manager.close()
    assert meta is not None and meta["validation"]["wer"] == best
    transcripts = tmp_path / "run" / "validation.jsonl"
    whole = transcripts.read_text()
    samples = json.loads(whole.splitlines()[0])["samples"]
    assert samples and set(samples[0]) == {"reference", "hypothesis"}

    # A run that was killed in its last evaluation makes up for it.
    transcripts.write_text(whole.splitlines(keepends=True)[0])
    loop.train(c, tmp_path / "run")
    assert transcripts.read_text() == whole


def test_the_best_checkpoint_of_a_step_that_is_taken_again_is_kept(make_config, tmp_path):
    c = make_config()
    for _ in range(2):  # the second time on a reopened workdir, as after a kill
        manager = checkpoint.Checkpoints(tmp_path, c)
        manager.save_best(2, {"lora/x": jax.numpy.ones(3)}, {"validation": {"wer": 0.5}})
        manager.save_best(2, {"lora/x": jax.numpy.ones(3)}, {"validation": {"wer": 0.5}})
        best = manager.best()
        manager.close()
        assert best is not None and best["own"] == {"lora/x": "float32"}


def test_a_merged_stage_trains_the_llm_itself(make_config, tmp_path):
    c = make_config()
    c.train.stages.only.steps = 3
    c.train.stages.merged = config.stage(
        3, 1e-3, {"lm": 1.0}, merge_lora=True, trainable=(("params/llm/adapted/", 1.0), ("params/embedder/gain", 1.0))
    )
    c.train.schedule = ("only", "merged")
    loop.train(c, tmp_path / "run")
    built, variables = checkpoint.load_for_inference(tmp_path / "run", "latest")
    assert "lora" not in variables
    base = system.load_llm(built, checkpoint.system_mesh(c))
    moved = variables["params"]["llm"]["adapted"]["attn"]["q"]["kernel"] - base["adapted"]["attn"]["q"]["kernel"]
    assert float(abs(moved).max()) > 1e-4
    np.testing.assert_array_equal(
        variables["params"]["llm"]["plain"]["attn"]["q"]["kernel"], base["plain"]["attn"]["q"]["kernel"]
    )


def test_merge_equals_the_adapted_model(make_config, make_run):
    from aura_jax.models.speech_llm import Columns
    from aura_jax.train import objectives
    from tests.train.conftest import trainable

    built, variables, batch, _ = make_run(make_config())
    _, trained, frozen = trainable(built, variables)
    key = jax.random.key(3)
    noisy = {p: x + 0.05 * jax.random.normal(key, x.shape) if p.startswith("lora") else x for p, x in trained.items()}
    variables = sharding.join(noisy, frozen)
    mel, n_frames = objectives.student_mel(built, batch, None)
    cols = Columns.of(batch)
    adapted, _ = built.model.apply({k: variables[k] for k in ("params", "lora")}, cols, mel, n_frames)
    merged = merge(variables["params"]["llm"], variables["lora"]["llm"], built.model.config.lora)
    params = {**variables["params"], "llm": merged}
    plain, _ = built.model.apply({"params": params}, cols, mel, n_frames)
    base, _ = built.model.apply({"params": variables["params"]}, cols, mel, n_frames)
    valid = np.asarray(batch.segment_BxT) != 0
    np.testing.assert_allclose(adapted[valid], plain[valid], atol=2e-5 * float(abs(plain[valid]).max()))
    assert float(abs(adapted[valid] - base[valid]).max()) > 1e-2


def test_another_runs_workdir_is_refused(make_config, tmp_path):
    c = make_config()
    c.train.steps = 1
    loop.train(c, tmp_path / "run")
    c.lora.rank = 4
    with pytest.raises(UserError, match=r"another lora\.rank"):
        loop.train(c, tmp_path / "run")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="not empty"):
        loop.train(c, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize(
    ("key", "wrong", "message"),
    [
        ("lora.rank", 0, "rank"),
        ("lora.n_blocks", 99, "blocks"),
        ("data.train", (("nowhere.jsonl", 1.0),), "nowhere.jsonl"),
        ("train.accumulate", 3, "multiple"),
    ],
)
def test_a_mistake_can_be_mended_in_the_same_workdir(make_config, tmp_path, key, wrong, message):
    c = make_config()
    c.train.steps = 1
    right = c.copy_and_resolve_references()
    room, _, name = key.partition(".")
    c[room][name] = wrong
    with pytest.raises(UserError, match=message):
        loop.train(c, tmp_path / "run")
    if name == "rank":  # one that is trained is enough
        assert loop.train(right, tmp_path / "run").step == 1


def test_a_mistake_in_a_late_stage_is_found_before_the_first_step(make_config, tmp_path):
    c = make_config()
    c.train.stages.merged = config.stage(2, 1e-3, {"lm": 1.0}, merge_lora=True)  # the default table trains LoRA
    c.train.schedule = ("only", "merged")
    with pytest.raises(UserError, match="stage merged: trainable: 'lora/' matches no parameter"):
        loop.train(c, tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_profiling_writes_the_chosen_steps_also_after_a_resume_inside_them(make_config, tmp_path):
    c = make_config()
    c.train.update(steps=2, profile_start=1, profile_steps=3)
    loop.train(c, tmp_path / "run")  # ends inside the window
    c.train.steps = 5
    loop.train(c, tmp_path / "run")
    assert len(list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))) == 2


def test_a_profile_says_where_a_steps_time_goes(make_config, tmp_path):
    c = make_config()
    c.train.update(steps=3, profile_start=2, profile_steps=1)
    loop.train(c, tmp_path / "run")
    profile = json.loads((tmp_path / "run" / "profile.json").read_text())
    assert (profile["step"], profile["steps"]) == (3, 1)
    seconds = {part: sum(ways.values()) for part, ways in profile["seconds"].items()}
    assert {"adapted blocks", "upper blocks", "LM head", "optimizer", "audio embedder"} <= seconds.keys()
    assert all(value > 0 for value in seconds.values())
    # What runs in the scans' bodies is named, not left over.
    assert seconds["copies and the rest"] < seconds["adapted blocks"] + seconds["upper blocks"] + seconds["LM head"]


def test_gradients_that_stay_non_finite_stop_the_run_and_name_the_rows(make_config, tmp_path):
    c = make_config()
    c.train.stages.only.learning_rate = 1e30
    with pytest.raises(UserError, match="not finite 2 steps in a row"):
        loop.train(c, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "nonfinite.jsonl").read_text().splitlines()[0])
    assert all("train.jsonl:" in row for row in record["rows"]) and len(record["rows"]) == 4


def test_a_corrupt_checkpoint_is_noticed(make_config, tmp_path):
    c = make_config()
    c.train.steps = 1
    loop.train(c, tmp_path / "run")
    data = max((tmp_path / "run" / "checkpoints" / "1" / "own").rglob("*"), key=lambda p: p.stat().st_size)
    content = bytearray(data.read_bytes())
    for i in range(len(content) // 3, len(content) // 3 + 64):
        content[i] ^= 0xFF
    data.write_bytes(bytes(content))
    c.train.steps = 2
    with pytest.raises(UserError, match="no checkpoint is intact"):
        loop.train(c, tmp_path / "run")


def test_other_base_weights_are_refused(make_config, tmp_path):
    from aura_jax.convert import random_models

    c = make_config()
    c.train.steps = 1
    model = tmp_path / "llm"
    model.mkdir()
    random_models.build_llm(model, seed=5)
    c.model.llm = str(model)
    loop.train(c, tmp_path / "run")
    for path in model.iterdir():
        path.unlink()
    random_models.build_llm(model, seed=6)
    c.train.steps = 2
    with pytest.raises(UserError, match="another llm"):
        loop.train(c, tmp_path / "run")
    with pytest.raises(UserError, match="not the LLM"):
        checkpoint.load_for_inference(tmp_path / "run", "latest")


PROGRAM = """
import sys
from pathlib import Path
from aura_jax import config
from aura_jax.train import loop
c = config.from_json(Path(sys.argv[1]))
result = loop.train(c, Path(sys.argv[2]))
sys.exit(loop.RESUME_EXIT_CODE if result.interrupted else 0)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_saves_first_and_the_same_command_resumes(make_config, tmp_path, number):
    c = make_config()
    c.train.stages.only.steps = 400
    c.train.checkpoint_every = 2
    (tmp_path / "c.json").write_text(config.to_json(c))
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "c.json"), str(tmp_path / "run")]
    process = subprocess.Popen(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.time() + 300
    while time.time() < deadline and not (metrics.is_file() and len(metrics.read_text().splitlines()) >= 5):
        time.sleep(0.1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    if number == signal.SIGKILL:  # nobody can save then: it goes on from the last checkpoint
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == loop.RESUME_EXIT_CODE, errors
        assert "saved at step" in errors
    done = max(losses(tmp_path / "run"))
    c.train.steps = done + 2
    result = loop.train(c, tmp_path / "run")
    assert result.step == done + 2
    loop.train(c, tmp_path / "whole")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
