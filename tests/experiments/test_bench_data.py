"""`aura-jax bench data` as a whole on a tiny run, what it reckons from times, and its answers to bad input."""

import json

import numpy as np
import pytest

from aura_jax import config
from aura_jax.errors import UserError
from aura_jax.experiments.bench import data, data_pipeline

SPREAD = {"median", "low", "high"}


def write_manifest(path, sample_data, n=24, **changes):
    """Writes the first rows of the training commands with absolute paths."""
    source = sample_data / "commands" / "train.jsonl"
    rows = [json.loads(line) for line in source.read_text().splitlines()[:n]]
    rows = [row | {"audio": str(source.parent / row["audio"])} | changes for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def run_config(tiny_config, sample_data, tmp_path, monkeypatch):
    """A run on 24 clips with precomputed teacher states, and a cache of its own."""
    monkeypatch.setenv("AURA_JAX_CACHE", str(tmp_path / "cache"))
    c = tiny_config()
    c.data.train = ((str(write_manifest(tmp_path / "train.jsonl", sample_data)), 0.5),)
    c.data.update(batch_size=4, max_seconds=3.5, buckets=(4.0,), speeds=(0.9, 1.0))
    c.data.update(validation_values=("af_nicole",))
    c.teacher.precompute = True
    c.train.stages.distil = config.stage(4, 1e-3, {"distill": 1.0})
    c.train.stages.joint = config.stage(4, 1e-3, {"lm": 1.0, "distill": 1.0})
    c.train.schedule = ("distil", "joint")
    return c


def is_spread(values) -> bool:
    return set(values) == SPREAD and 0 < values["low"] <= values["median"] <= values["high"]


@pytest.mark.slow
def test_a_tiny_run_is_measured_and_the_table_shows_the_results(run_config, tmp_path, capfd):
    output, workdir = tmp_path / "out" / "data.json", tmp_path / "run"
    workdir.mkdir()
    logged = [{"step": 1, "step_seconds": 9.0, "steps_since_record": 1, "steps_that_waited": 0}]
    logged += [{"step": i, "step_seconds": 0.5, "steps_since_record": 10, "steps_that_waited": 1} for i in (10, 20)]
    lines = [*logged, {"step": 20, "validation/wer": 0.1}]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert data.main(run_config, output, quick=True, workdir=workdir) == 0

    results = json.loads(output.read_text())
    assert results["machine"] and results["command"] and results["versions"]["jax"]
    names = [part["part"] for part in results["parts"]]
    assert names == ["decode"] * 3 + ["resample"] * 2 + ["change of speed", "log-mel", "log-mel", "assemble"]
    details = [part["detail"] for part in results["parts"]]
    assert details[0] == "OGG OPUS 16 kHz, as found" and details[5] == "factors 0.9"
    assert details[-1] == "columns and teacher states, slot layout"
    rated = [*results["parts"], *(of_pass for whole in results["pipeline"] for of_pass in whole["passes"].values())]
    for rate in rated:
        times, hours = rate["times_real_time_per_core"], rate["audio_hours_per_second_per_core"]
        assert is_spread(times) and is_spread(hours)
        assert hours["median"] == pytest.approx(times["median"] / 3600)
    alone = results["pipeline"][0]
    assert (alone["cores"], alone["workers"]) == (1, 0) and results["pipeline"][-1]["workers"] > 0
    assert list(alone["passes"]) == list(data_pipeline.PASSES)
    for whole in results["pipeline"]:
        assert whole["batches_per_pass"] >= 2
        for key in ("seconds_to_first_batch", "batches_per_second", "fastest_step_seconds"):
            assert is_spread(whole[key])
    slower = min(of_pass["times_real_time_per_core"]["median"] for of_pass in alone["passes"].values())
    goal = results["goal"]
    assert goal == {"times_real_time_per_core": 200, "slower_pass_on_one_core": slower, "reached": slower >= 200}
    assert results["run"]["share_that_waited"] == pytest.approx(2 / 21)
    assert results["run"]["step_seconds"] == {"median": 0.5, "low": 0.5, "high": 0.5}

    shown = capfd.readouterr().out
    assert data.table(results) in shown
    rows = [line.split() for line in shown.splitlines()]
    for rate in rated:
        times, hours = rate["times_real_time_per_core"], rate["audio_hours_per_second_per_core"]
        numbers = [f"{times[key]:.0f}" for key in ("median", "low", "high")] + [f"{hours['median']:.4f}"]
        assert any(row[-4:] == numbers for row in rows)
    assert "2 of 21 steps waited for data (9.5%)" in shown


def test_how_many_steps_wait():
    ready = np.arange(101) * 0.1  # a batch every tenth of a second
    assert data_pipeline.share_waiting(ready, 0.11) == 0
    assert data_pipeline.share_waiting(ready, 0.09) > 0.9
    assert data_pipeline.fastest_step(ready) == pytest.approx(0.1, rel=1e-3)
    # One batch in ten takes half a second, and the nine before it are made ahead, as far as the buffer goes.
    seconds = np.where(np.arange(200) % 10 == 9, 0.5, 0.01)
    bursts = np.cumsum([0, *seconds])
    assert data_pipeline.share_waiting(bursts, 0.05) == pytest.approx(0.1, abs=0.01)
    assert 0.059 < data_pipeline.fastest_step(bursts) < 0.5
    assert data_pipeline.share_waiting(bursts, 0.5) == 0


def test_long_data_are_sampled(run_config, sample_data, tmp_path):
    everything, rows = data._sample(run_config, tmp_path, 1000)
    assert everything.data.train == ((run_config.data.train[0][0], 1.0),)
    assert rows and all(row.extra["voice"] != "af_nicole" for row in rows)
    part, fewer = data._sample(run_config, tmp_path, 10)
    assert 0 < sum(row.seconds for row in fewer) < 14 and {row.audio for row in fewer} < {row.audio for row in rows}
    assert part.data.validation_values == ()
    assert run_config.data.validation_values == ("af_nicole",)


def test_mistakes(run_config, sample_data, tmp_path):
    output, good = tmp_path / "data.json", run_config.data.train
    run_config.data.train = ()
    with pytest.raises(UserError, match=r"data.train is empty"):
        data.main(run_config, output, quick=True)
    (tmp_path / "text.jsonl").write_text('{"text": "Once upon a time."}\n')
    run_config.data.train = ((str(tmp_path / "text.jsonl"), 1.0),)
    with pytest.raises(UserError, match=r"text.jsonl that trains has 'audio'"):
        data.main(run_config, output, quick=True)
    run_config.data.train = ((str(tmp_path / "none.jsonl"), 1.0),)
    with pytest.raises(UserError, match=r"none.jsonl: cannot be read"):
        data.main(run_config, output, quick=True)
    bad = write_manifest(tmp_path / "bad.jsonl", sample_data, audio=str(tmp_path / "gone.wav"))
    run_config.data.train = ((str(bad), 1.0),)
    with pytest.raises(UserError, match=r"none of \d+ clips can be used; .*gone.wav: no such audio file"):
        data.main(run_config, output, quick=True)
    run_config.data.train = good
    with pytest.raises(UserError, match=r"no metrics.jsonl: name the workdir of a run"):
        data.main(run_config, output, quick=True, workdir=tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "step_seconds": 0.5}\n')
    with pytest.raises(UserError, match=r"nothing says which steps waited"):
        data.main(run_config, output, quick=True, workdir=tmp_path)
    assert not output.exists()


@pytest.mark.slow
def test_too_little_data_for_two_batches(run_config, tmp_path):
    run_config.data.update(batch_size=8, validation_values=())
    run_config.teacher.precompute = False
    with pytest.raises(UserError, match=r"fill no two batches: lower data.batch_size"):
        data.main(run_config, tmp_path / "data.json", quick=True)
