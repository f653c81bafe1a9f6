"""`compare`: which jobs there are, what is not done again, the table, and all of it on random tiny models."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from aura_jax import cli, config, system
from aura_jax.errors import UserError
from aura_jax.experiments import quickstart
from aura_jax.experiments.compare import arm, figures, page, plan, run, summary, table, timing

SMALL = ("--config.train.steps=2", "--config.train.eval_every=0", "--config.data.validation_values=()")


@pytest.fixture
def planned(tmp_path):
    """Plans a comparison of systems with the smoke config as their base."""

    def jobs(*systems: str, seeds=(0,), overrides=()) -> list[plan.Job]:
        return plan.equal_steps(systems, seeds, tmp_path, tmp_path / "results", "configs/smoke.py", overrides)

    return jobs


def result(system: str, seed: int, wer: float, **more) -> dict:
    rate = {"value": wer, "low": 0.0, "high": 1.0, "n": 9}
    return {
        "system": system,
        "seed": seed,
        "budget": "steps",
        "command": f"a command of seed {seed}",
        "scores": {"sets": {"new": {"n": 9, "wer": rate}}, "step": 40},
        **more,
    }


def times(seconds: float, schedule: float, *ways: str) -> dict:
    """Times of a system whose first token takes `seconds`, and its schedule `schedule`."""
    spread = {"median": seconds, "low": seconds / 2, "high": 2 * seconds}
    first = {way: {length: spread | {"times": spread} for length in ("2", "10")} for way in ways}
    steps = {"only": {"seconds": schedule / 40, "n": 40}}
    return {
        "config": {},
        "first_token": first,
        "steps": steps,
        "preparation_seconds": 60.0,
        "schedule_seconds": schedule,
        "peak_memory_gib": 2.0,
    }


TIMING = {
    "command": "a command that times",
    "machine": "a machine",
    "in_turns": True,
    "systems": {"aura": times(0.03, 600, "separate", "merged")},
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
    ("name", "base", "last"),
    [
        ("aura", "quickstart", {"lm", "distill", "text_anchor"}),
        ("aura", "questions", {"response_kd", "distill", "text_anchor"}),
        ("mel_llm", "quickstart", {"lm", "text_anchor"}),
        ("mel_llm", "questions", {"response_kd", "text_anchor"}),
        ("bridge", "quickstart", {"lm"}),
        ("bridge", "questions", {"response_kd"}),
        ("blsp", "questions", {"lm"}),
        ("blsp_kd", "quickstart", {"lm", "input_kd", "quantity"}),
        ("blsp_kd", "questions", {"response_kd", "input_kd", "quantity"}),
        ("diva", "questions", {"embedding_l2", "hidden_l2"}),
    ],
)
def test_a_base_that_answers_questions_teaches_each_system_by_what_the_llm_says(name, base, last):
    train = config.load([f"--config=configs/systems/{name}.py:configs/{base}.py"]).train
    objectives = [{key for key, weight in train.stages[stage].objectives.items() if weight} for stage in train.schedule]
    assert objectives[-1] == last
    if name == "mel_llm":
        assert objectives[0] == last - {"text_anchor"}


def test_what_teaches_a_base_s_answers_keeps_its_weights():
    c = config.load(["--config=configs/quickstart.py", "--config.train.stages.joint.objectives.lm=0.5"])
    assert config.answer_objectives(c) == {"lm": 0.5}
    without = quickstart.without_distillation(c).train.stages
    assert [without[name].objectives.lm for name in c.train.schedule] == [0.5, 0.5]
    c.train.stages.joint.objectives.response_kd = 2.0
    assert config.answer_objectives(c) == {"lm": 0.5, "response_kd": 2.0}
    c.train.schedule = ("distil",)
    assert config.answer_objectives(c) == {"lm": 1.0}


@pytest.mark.parametrize("name", ["bridge", "blsp", "blsp_kd", "diva"])
def test_what_keeps_its_encoder_takes_a_base_that_streams(name):
    (job,) = plan.equal_steps([name], [0], Path("runs"), Path("results"), "configs/quickstart_streaming.py", [])
    system.build(job.config)


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
    monkeypatch.setattr(timing, "measure", lambda systems, command, paddings: TIMING)
    again = lambda *overrides: run.main(["aura"], [0], tmp_path, tmp_path / "results", "configs/smoke.py", overrides)
    del values["config"]["kd"]  # a key that there was not yet
    one.output.write_text(json.dumps(values))
    assert again() == 0
    assert "50.0" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"aura-seed-0.json was made with another config"):
        again("--config.lora.rank=4")
    one.output.write_text("{}")
    with pytest.raises(UserError, match=r"aura-seed-0.json: no result of a comparison: delete it"):
        again()


def test_the_page_may_be_of_what_is_finished(planned, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "_run", lambda command: pytest.fail("nothing is to be run"))
    monkeypatch.setattr(timing, "measure", lambda systems, command, paddings: TIMING)
    page_of = lambda: run.main(
        ["aura", "bridge"], [0, 1], tmp_path, tmp_path / "results", "configs/smoke.py", finished=True
    )
    with pytest.raises(UserError, match=r"--finished: .*results has no result of these systems and seeds"):
        page_of()
    one = planned("aura", seeds=(0, 1))[1]
    one.output.parent.mkdir()
    one.output.write_text(json.dumps(one.values("a command") | result("aura", 1, 0.5)))
    assert page_of() == 0
    assert "bridge" not in capsys.readouterr().out


def test_the_exit_code_of_a_job_ends_it(planned, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_run", lambda command: 75)
    assert run.main(["aura"], [0], tmp_path, tmp_path / "results", "configs/smoke.py", ()) == 75
    assert json.loads((tmp_path / "aura-seed-0.json").read_text())["config"]["seed"] == 0


def test_times_are_taken_anew_where_the_systems_are_others(planned, tmp_path, monkeypatch):
    taken = []
    monkeypatch.setattr(
        timing, "measure", lambda systems, command, paddings: taken.append(list(systems)) or measured(systems)
    )
    measured = lambda systems: {
        "in_turns": True,
        "systems": {n: {"config": json.loads(config.to_json(c))} for n, c in systems.items()},
    }
    file = tmp_path / "timing.json"
    for names in (["aura", "bridge"], ["aura", "bridge"], ["bridge", "aura"], ["bridge", "aura", "oracle"]):
        run._timed(planned(*names), file, "a command", {})
    assert taken == [["aura", "bridge"], ["bridge", "aura"]]  # the first is what the others are compared with
    found = json.loads(file.read_text())
    file.write_text(json.dumps({"systems": found["systems"]}))  # as it was written before systems could be timed alone
    run._timed(planned("bridge", "aura"), file, "a command", {})
    assert taken[2:] == [["bridge", "aura"]]
    file.write_text("{}")
    with pytest.raises(UserError, match=r"timing.json: no times of a comparison: delete it"):
        run._timed(planned("aura"), file, "a command", {})


def test_equal_time_counts_what_is_computed_before_the_first_step():
    slow, quick = times(1, 600, "none"), times(1, 600, "none") | {"preparation_seconds": 0.0}
    assert plan.time_factors({"systems": {"aura": slow, "bridge": quick}}) == {"aura": 1.0, "bridge": 1.1}
    assert plan.time_factors({"systems": {}}) == {}


def test_equal_time_gives_each_the_steps_that_the_first_has_time_for(planned):
    systems = {"aura": times(1, 600, "none"), "bridge": times(1, 800, "none"), "blsp": times(1, 620, "none")}
    jobs = planned("aura", "bridge", "blsp", "cascade", seeds=(0, 1))
    more = plan.equal_time(jobs, {"systems": systems})
    # The others take as long as the first, or learn nothing.
    assert [(job.system, job.seed, job.budget) for job in more] == [("bridge", 0, "time"), ("bridge", 1, "time")]
    assert more[0].workdir.name == "bridge-time-seed-0" and more[0].output.name == "bridge-time-seed-0.json"
    assert config.total_steps(more[0].config) == 9 and config.total_steps(jobs[1].config) == 12
    stopped = planned("aura", "bridge", overrides=["--config.train.steps=8"])
    (shorter,) = plan.equal_time(stopped, {"systems": systems})
    assert config.total_steps(shorter.config) == 6
    # Times that were taken anew, and differ by a little, leave a result as it is; by more, they do not.
    more[0].output.parent.mkdir()
    more[0].output.write_text(json.dumps(more[0].values("")))
    for schedule, steps in ((830, 9), (1200, 6)):
        again = plan.equal_time(jobs[:2], {"systems": systems | {"bridge": times(1, schedule, "none")}})
        assert [config.total_steps(job.config) for job in again] == [steps]


@pytest.mark.parametrize(
    ("system", "change", "match"),
    [
        ("aura", "c.data.train = (('none.jsonl', 1.0),)", "none.jsonl"),
        ("diva", "c.data.train = (('ROWS', 1.0),)", "rows.jsonl:1: no 'text', which an objective of this run reads"),
        ("cascade", "c.update_from_flattened_dict(NO_WHISPER)", "names no Whisper"),
        ("oracle", "c.eval.sets = {'rows': 'ROWS'}", "rows.jsonl:1: no 'text' for the oracle to read"),
    ],
)
def test_what_a_system_lacks_is_said_before_anything_is_trained(system, change, match, tmp_path):
    row = {"audio": "none.flac", "response": "Yes.", "seconds": 1}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    base = tmp_path / "base.py"
    no_whisper = {"model.teacher": "", "embedder.from_teacher": False, "train.stages.joint.objectives.distill": 0.0}
    change = change.replace("NO_WHISPER", str(no_whisper | {"train.schedule": ("joint",)}))
    change = change.replace("ROWS", str(tmp_path / "rows.jsonl"))
    base.write_text(
        "from aura_jax.config import read\n\n\ndef get_config():\n    c = read('configs/smoke.py')\n"
        f"    with c.ignore_type():\n        {change}\n    return c\n"
    )
    with pytest.raises(UserError, match=match):
        plan.equal_steps([system], [0], tmp_path, tmp_path, str(base), [])


def test_kd_on_answers_needs_them_before_anything_is_trained(planned):
    with pytest.raises(UserError, match=r"train.jsonl:1: no 'response'.*`aura-jax data continue`"):
        planned("bridge", overrides=["--config.train.stages.adapter.objectives.response_kd=1.0"])


def test_a_summary_has_means_over_seeds_with_their_range():
    parts = [{"part": "LoRA", "trained": 2_500_000, "frozen": 0, "kept": True}]
    curve = {"metrics": None, "validation": {"step": [20, 40], "wer": [1.0, 0.5]}}
    results = [
        result("aura", 0, 0.010, parameters=parts, curves=curve),
        result("oracle", 0, 0.5),
        result("aura", 1, 0.030, parameters=parts, curves=curve),
    ]
    found = summary.summarise(results, TIMING)
    aura, oracle = found["systems"]["aura"], found["systems"]["oracle"]
    assert aura["seeds"] == [0, 1] and aura["sets"]["new"]["wer"] == {
        "mean": 0.02,
        "low": 0.01,
        "high": 0.03,
        "runs": 2,
    }
    assert oracle["sets"]["new"]["wer"] == {"mean": 0.5, "low": 0.0, "high": 1.0, "runs": 1}  # of one: the bootstrap's
    assert [curve["seed"] for curve in aura["curves"]] == [0, 1] and "equal_time" not in aura
    head, *rows = table.rows(found)
    assert head[:4] == ["system", "seeds", "steps", "WER %, new"]
    both = "30 (30 merged)"
    assert rows[0] == ["aura", "2", "40", "2.0 (1.0 to 3.0)", both, both, "2.5", "1.0", "10.0", "2.0"]
    assert rows[1] == ["oracle", "1", "40", "50.0 [0.0, 100.0]", *["-"] * 6]
    assert table.text(found).splitlines()[1].startswith("aura  ")
    assert table.markdown(found).splitlines()[1] == "|---" + "|---:" * 9 + "|"


def test_a_table_shows_what_its_sets_are_scored_by_and_intervals_are_those_that_were_measured():
    asked = {"sets": {"questions": {"n": 9, "answered": {"value": 0.5, "low": 0.25, "high": 0.75, "n": 9}}}, "step": 4}
    reading = {"perplexity": {"value": 1.5, "low": 1.25, "high": 2.0}}
    likelihood = {"questions": {"speech": reading, "divergence": {"value": 0.3, "low": 0.2, "high": 0.4}}}
    one = result("aura", 0, 0.0) | {"scores": asked | {"likelihood": likelihood}}
    found = summary.summarise([one], TIMING)
    head, row = table.rows(found)
    assert head[3] == "answered %, questions" and row[3] == "50.0 [25.0, 75.0]"
    (panel,) = (ax for ax in figures.quality_over_first_token(found).axes if ax.get_label() == "questions")
    (point,) = panel.lines
    assert list(point.get_xydata()[0]) == pytest.approx([30, 50])  # ms, %
    assert (panel.get_ylabel(), panel.get_yscale()) == ("answered %", "linear")
    of_likelihood = found["systems"]["aura"]["likelihood"]["questions"]
    assert of_likelihood["perplexity"] == {"mean": 1.5, "low": 1.25, "high": 2.0, "runs": 1}
    assert ">1.25<" in page.render(found)
    text = {"loss": {"all": {"rise": 0.05}}, "questions": {"adapted": 7, "n": 10, "base": 8}}
    one["scores"]["text"] = {"adapters": "request", **text}
    html = page.render(summary.summarise([one], {**TIMING, "systems": {}}))
    assert "questions.mean" in html and "questions.low" not in html  # nothing was measured that says how sure it is


def test_what_does_not_transcribe_leaves_the_others_room():
    timed = {**TIMING, "systems": {name: times(0.03, 600, "none") for name in ("aura", "diva")}}
    found = summary.summarise([result("aura", 0, 0.02), result("diva", 0, 5.0)], timed)
    found["systems"]["diva"]["sets"]["new"]["wer"]["high"] = 6.0
    (panel,) = (ax for ax in figures.quality_over_first_token(found).axes if ax.get_label() == "new")
    good, bad = panel.lines
    assert (good.get_marker(), bad.get_marker()) == ("o", "^") and good.get_ydata()[0] == pytest.approx(2)
    assert bad.get_ydata()[0] < panel.get_ylim()[1] < 200


@pytest.mark.parametrize(("backend", "most"), [("cpu", 3), ("gpu", 3), ("tpu", 1)])
def test_where_a_device_belongs_to_one_process_each_system_is_timed_alone(planned, monkeypatch, backend, most):
    alive, counts = [], []

    class FakeWorker:
        def __init__(self, command, environment, log):
            self._name = log.stem
            alive.append(self._name)
            counts.append(len(alive))

        def ask(self, do, **arguments):
            slow = 3.0 if self._name == "bridge" else 1.0
            return {
                "backend": {"backend": backend},
                "load": {"adapters": ["merged"]},
                "answer": {"seconds": slow * arguments.get("length", 0)},
                "prepare_steps": {
                    "stages": ["adapter"] if self._name == "bridge" else ["distil", "joint"],
                    "seconds": 5,
                },
                "step": {"seconds": slow},
                "device_peak": {"gib": None if backend == "cpu" else 5.0},
                "peak": {"since_watch": 2**30},
            }.get(do, {})

        def close(self):
            alive.remove(self._name)

    monkeypatch.setattr(timing, "Worker", FakeWorker)
    systems = {job.system: job.config for job in planned("aura", "bridge", "cascade")}
    found = timing.measure(systems, "a command", {})
    assert max(counts) == most and not alive
    assert found["in_turns"] == (most > 1) and list(found["systems"]) == list(systems)
    first = {name: of["first_token"]["merged"]["2"] for name, of in found["systems"].items()}
    assert {name: (of["median"], of["times"]["median"]) for name, of in first.items()} == {
        **{"aura": (2.0, 1.0), "bridge": (6.0, 3.0), "cascade": (2.0, 1.0)}
    }
    assert found["systems"]["bridge"]["schedule_seconds"] == 3 * config.total_steps(systems["bridge"])
    assert found["systems"]["bridge"]["peak_memory_gib"] == (1.0 if backend == "cpu" else 5.0)
    html = page.render(summary.summarise([result(name, 0, 0.5) for name in systems], found))
    assert ("A TPU belongs to one process" in html) == (backend == "tpu")


def test_nothing_to_train_is_nothing_to_time(planned, tmp_path):
    assert timing._steps({}, {}, {}) is None
    found = run._timed(planned("oracle"), tmp_path / "timing.json", "a command", {})
    assert found["systems"] == {}
    assert "oracle" in table.text(summary.summarise([result("oracle", 0, 0.5)], found))


def test_what_takes_as_long_as_the_first_is_its_own_counterpart_in_equal_time():
    of = {"aura": times(1, 600, "none"), "bridge": times(1, 800, "none"), "blsp": times(1, 620, "none")}
    results = [result(name, 0, wer) for name, wer in (("aura", 0.1), ("bridge", 0.2), ("blsp", 0.3))]
    results.append(result("bridge", 1, 0.2))
    shorter = result("bridge", 0, 0.4, budget="time")
    shorter["scores"]["step"] = 30
    found = summary.summarise([*results, shorter], {**TIMING, "systems": of})
    timed = {name: system["equal_time"] for name, system in found["systems"].items()}
    assert {name: of["sets"]["new"]["wer"]["mean"] for name, of in timed.items()} == {
        "aura": 0.1,
        "bridge": 0.4,
        "blsp": 0.3,
    }
    assert timed["bridge"]["steps"] == 30
    bridge = table.rows(found, "time")[2]
    assert bridge[:2] == ["bridge", "1"] and bridge[-2] == "10.0"  # minutes: 30 of 40 steps


def test_the_page_writes_numbers_from_the_summary(tmp_path):
    noise = {"new": {"white": {"10": result("", 0, 0.7)["scores"]["sets"]["new"]}}}
    text = {"adapters": "request", "loss": {"all": {"rise": 0.05}}, "questions": {"adapted": 7, "n": 10, "base": 8}}
    one = result("aura", 0, 0.123, similarity={"after": {"cka": [[0.1, 0.9], [0.2, 0.8], [0.0, 0.5]]}})
    one["scores"] |= {"noise": noise, "text": text}
    one["curves"] = {"metrics": None, "validation": {"step": [20, 40], "wer": [1.0, 0.5]}}
    timed = {**TIMING, "systems": TIMING["systems"] | {"cascade": times(0.3, 0, "none")}}
    for what in ("preparation_seconds", "schedule_seconds", "steps"):
        del timed["systems"]["cascade"][what]
    rate = lambda value: {"value": value, "low": 0.0, "high": 1.0, "n": 9}
    padding = {"seconds": 10.0, "windows": [12.0], "wer": {"full": rate(0.04), "0": rate(4.321), "10": rate(0.045)}}
    found = summary.summarise([one, result("cascade", 0, 0.05, padding=padding)], timed)
    html = page.write(found, tmp_path).read_text()
    assert {path.stem for path in (tmp_path / "figures").glob("*.png")} == {
        *("quality", "first-token", "learning", "noise", "alignment", "forgetting")
    }
    shown = dict(re.findall(r'<data value="([^"]+)" data-key="([^"]+)"', html))
    of = json.loads((tmp_path / "summary.json").read_text())
    assert shown["0.123"] == "systems.aura.sets.new.wer.mean" and of["systems"]["aura"]["sets"]["new"]["wer"]["mean"]
    assert shown["4.321"] == "systems.cascade.padding.wer.0.value" and "s of silence: the least" in html
    assert "a command of seed 0" in html and "a command that times" in html
    assert "beside that of aura, separate, in the same round" in html
    # Nothing but scores: the sections of what was not measured are left out.
    bare = page.render(summary.summarise([result("oracle", 0, 0.5)], {**TIMING, "systems": {}}))
    assert "No system was timed" in bare and 'id="noise"' not in bare


def test_speech_of_each_length_is_cut_from_the_test_sets(sample_data):
    c = config.default()
    c.eval.sets = {"one": str(sample_data / "recordings" / "test.jsonl")}
    speech = arm.speech(c, timing.LENGTHS)
    assert [len(waveform) for waveform in speech.values()] == [16000 * s for s in (1, 2, 5, 10, 30)]
    assert all(np.abs(waveform).max() > 0 for waveform in speech.values())


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
    argv = ["compare", f"--config={base}", "--systems", "aura,cascade", "--workdir", str(tmp_path / "runs"), *SMALL]
    assert cli.main(argv) == 0
    out, err = capfd.readouterr()
    assert "aura" in out and "cascade" in out and "2 of 2: cascade, seed 0" in err
    results = tmp_path / "runs" / "results"
    aura, cascade = (json.loads((results / f"{name}-seed-0.json").read_text()) for name in ("aura", "cascade"))
    for found in (aura, cascade):
        assert found["scores"]["sets"]["rows"]["n"] == 3 and found["command"].startswith("aura-jax ")
    assert aura["scores"]["step"] == 2 and aura["curves"]["metrics"]["step"] == [1, 2]
    assert {part["part"] for part in aura["parameters"]} >= {"LoRA", "audio embedder"}
    timed = json.loads((results / "timing.json").read_text())["systems"]
    assert list(timed["aura"]["first_token"]) == ["separate", "merged"] and list(timed["cascade"]["first_token"]) == [
        "none"
    ]
    for of in timed.values():
        for first in of["first_token"].values():
            assert list(first) == ["1", "2", "5", "10", "30"]
            assert all(0 < x["low"] <= x["median"] <= x["high"] for x in first.values())
    assert [stage["n"] for stage in timed["aura"]["steps"].values()] == [2] and "steps" not in timed["cascade"]
    assert (results / "compare.html").is_file() and (results / "figures" / "quality.png").is_file()
    assert cli.main(argv) == 0  # all done
    assert "of 2" not in capfd.readouterr().err
