"""`compare`: which jobs there are, what is not done again, the table, and all of it on random tiny models."""

import json
from pathlib import Path

import numpy as np
import pytest

from aura_jax import cli, config
from aura_jax.errors import UserError
from aura_jax.experiments.compare import job, run, table
from aura_jax.infer.generate import Reply

SMALL = ("--config.train.steps=2", "--config.train.eval_every=0", "--config.data.validation_values=()")


@pytest.fixture
def planned(tmp_path):
    """Plans a comparison of systems with the smoke config as their base."""

    def plan(*systems: str, seeds=(0,), overrides=()) -> list[run.Job]:
        return run.plan(systems, seeds, tmp_path, tmp_path / "results", "configs/smoke.py", overrides)

    return plan


def result(system: str, seed: int, wer: float, **more) -> dict:
    rate = {"value": wer, "low": 0.0, "high": 1.0, "n": 9}
    return {
        "system": system,
        "seed": seed,
        "scores": {"sets": {"new": {"n": 9, "wer": rate}}, "seconds": {"train": 120.0 + 60 * seed}},
        "peak_memory_gib": 2.0,
        **more,
    }


def test_jobs_are_of_every_system_and_seed_and_what_learns_nothing_has_one(planned):
    jobs = planned("bridge", "cascade", seeds=(3, 4))
    assert [(job.system, job.seed) for job in jobs] == [("bridge", 3), ("cascade", 3), ("bridge", 4)]
    assert [job.config.seed for job in jobs] == [3, 3, 4]
    assert jobs[0].output.name == "bridge-seed-3.json" and jobs[0].workdir.name == "bridge-seed-3"


@pytest.mark.parametrize("name", ["aura", "mel_llm", "bridge", "blsp", "blsp_kd", "diva"])
def test_systems_take_models_data_and_steps_from_the_base(planned, name):
    base = config.load(["--config=configs/smoke.py"])
    (one,) = planned(name)
    c = one.config
    assert config.total_steps(c) == config.total_steps(base) == 12
    assert c.model.llm == base.model.llm and (c.model.teacher or c.model.encoder) == base.model.teacher
    assert json.loads(config.to_json(c))["data"]["train"] == json.loads(config.to_json(base))["data"]["train"]
    assert planned(name, overrides=["--config.train.steps=3"])[0].config.train.steps == 3


@pytest.mark.parametrize(
    ("systems", "match"),
    [
        (["brigde"], r"unknown system 'brigde': did you mean 'bridge'\?"),
        (["none"], "unknown system 'none': .*bridge.*cascade.*oracle"),
        (["bridge", "bridge", "configs/systems/bridge.py"], "two have the same name"),
        (["configs/none.py"], "no config file configs/none.py"),
    ],
)
def test_mistakes(planned, systems, match):
    with pytest.raises(UserError, match=match):
        planned(*systems)


@pytest.mark.parametrize("seeds", ["0,0", "one", "", "-1"])
def test_seeds_are_whole_numbers(capsys, tmp_path, seeds):
    assert cli.main(["compare", "--workdir", str(tmp_path), "--seeds", seeds]) == 2
    assert "write whole numbers, each once, such as --seeds 0,1,2" in capsys.readouterr().err


def test_a_result_is_not_made_again_and_one_of_another_config_is_refused(planned, tmp_path, monkeypatch, capsys):
    (one,) = planned("aura")
    one.output.parent.mkdir()
    values = one.values("a command") | result("aura", 0, 0.5)
    one.output.write_text(json.dumps(values))
    monkeypatch.setattr(run, "_run", lambda command: pytest.fail("it is done"))
    again = lambda *overrides: run.main(["aura"], [0], tmp_path, tmp_path / "results", "configs/smoke.py", overrides)
    assert again() == 0
    assert "50.0" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"aura-seed-0.json was made with another config"):
        again("--config.lora.rank=4")
    one.output.write_text("{}")
    with pytest.raises(UserError, match=r"aura-seed-0.json: no result of a comparison: delete it"):
        again()


def test_the_exit_code_of_a_job_ends_it(planned, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_run", lambda command: 75)
    assert run.main(["aura"], [0], tmp_path, tmp_path / "results", "configs/smoke.py", ()) == 75
    assert json.loads((tmp_path / "aura-seed-0.json").read_text())["config"]["seed"] == 0


def test_the_table_has_means_over_seeds_with_their_range():
    times = {"2": {"median": 0.0312}, "10": {"median": 0.1}}
    parts = [{"part": "LoRA", "trained": 2_500_000, "frozen": 0, "kept": True}]
    results = [
        result("aura", 0, 0.010, first_token=times, parameters=parts),
        result("oracle", 0, 0.5),
        result("aura", 1, 0.030, first_token=times, parameters=parts),
    ]
    head, aura, oracle = table.rows(results)
    assert head[:3] == ["system", "seeds", "WER %, new"]
    assert aura[:5] == ["aura", "2", "2.0 (1.0 to 3.0)", "31 (31 to 31)", "100 (100 to 100)"]
    assert aura[5:] == ["2.5", "2.5 (2.0 to 3.0)", "2.0 (2.0 to 2.0)"]
    assert oracle == ["oracle", "1", "50.0", "-", "-", "-", "2.0", "2.0"]
    assert table.text(results).splitlines()[1].startswith("aura  ")
    assert table.markdown(results).splitlines()[1] == "|---" + "|---:" * 7 + "|"


def test_first_tokens_are_timed_after_a_warm_up_on_speech_of_each_length(sample_data):
    c = config.default()
    c.eval.sets = {"one": str(sample_data / "recordings" / "test.jsonl")}
    speech = job.clips(c)
    assert [len(waveform) for waveform in speech.values()] == [16000 * s for s in (1, 2, 5, 10, 30)]
    assert all(np.abs(waveform).max() > 0 for waveform in speech.values())

    class Slow:
        batch_size, asked = 1, 0

        def generate(self, requests, progress=None):
            self.asked += 1
            return [Reply("", (), True, 0.0)]

    slow = Slow()
    found = job.first_token(slow, {1.0: speech[1.0]})
    assert slow.asked == 8 and 0 <= found["1"]["low"] <= found["1"]["median"] <= found["1"]["high"]


@pytest.mark.slow
def test_the_whole_of_it_on_random_tiny_models(tmp_path, capfd, sample_data):
    lines = (sample_data / "commands" / "test_new_voices.jsonl").read_text().splitlines()[:3]
    rows = [json.loads(line) for line in lines]
    rows = [row | {"audio": str(sample_data / "commands" / row["audio"])} for row in rows]
    manifest = tmp_path / "rows.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = tmp_path / "configs" / "base.py"
    base.parent.mkdir()
    base.write_text(
        "from aura_jax.config import read\n\n\ndef get_config():\n"
        f"    c = read({str(Path('configs/smoke.py').resolve())!r})\n"
        f"    c.eval.sets = {{'rows': {str(manifest)!r}}}\n"
        "    c.eval.text_heldout = c.eval.text_questions = ''\n    return c\n"
    )
    argv = ["compare", f"--config={base}", "--systems", "bridge,cascade", "--workdir", str(tmp_path / "runs"), *SMALL]
    assert cli.main(argv) == 0
    out, err = capfd.readouterr()
    assert "bridge" in out and "cascade" in out and "2 of 2: cascade, seed 0" in err
    bridge, cascade = (
        json.loads((tmp_path / "runs" / "results" / f"{name}-seed-0.json").read_text())
        for name in ("bridge", "cascade")
    )
    for found in (bridge, cascade):
        assert found["scores"]["sets"]["rows"]["n"] == 3 and found["command"].startswith("aura-jax ")
        assert list(found["first_token"]) == ["1", "2", "5", "10", "30"]
    assert bridge["scores"]["step"] == 2 and bridge["curves"]["metrics"]["step"] == [1, 2]
    assert {part["part"] for part in bridge["parameters"]} >= {"encoder", "audio embedder"}
    assert cli.main(argv) == 0  # all done
    assert "of 2" not in capfd.readouterr().err
