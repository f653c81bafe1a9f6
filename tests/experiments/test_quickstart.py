"""The quickstart as a whole, through the command line, on random tiny models."""

import json
from pathlib import Path

import pytest

from aura_jax import cli, config
from aura_jax.errors import UserError
from aura_jax.evaluate import suite
from aura_jax.experiments import quickstart
from aura_jax.train import loop

ROOT = Path(__file__).parents[2]


SMALL = """
from aura_jax.config import read


def get_config():
    c = read({smoke!r})
    c.eval.sets = {sets!r}
    return c
"""


@pytest.mark.slow
def test_smoke_trains_evaluates_reports_and_answers(sample_data, tmp_path, monkeypatch, capsys):
    """But for what it scores, which is the first rows of each set: `make smoke` scores them all."""
    monkeypatch.chdir(ROOT)
    smoke, sets, workdir = ROOT / "configs" / "smoke.py", {}, tmp_path / "run"
    for i, (name, path) in enumerate(config.read(str(smoke)).eval.sets.items()):
        rows = [json.loads(line) for line in Path(path).read_text().splitlines()[: 3 + i]]
        rows = [row | {"audio": str((Path(path).parent / row["audio"]).resolve())} for row in rows]
        sets[name] = str(tmp_path / f"{i}.jsonl")
        Path(sets[name]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "small.py").write_text(SMALL.format(smoke=str(smoke), sets=sets))
    assert cli.main(["quickstart", f"--config={tmp_path / 'small.py'}", "--workdir", str(workdir)]) == 0
    out = capsys.readouterr().out
    scores = json.loads((workdir / "scores.json").read_text())
    assert scores["step"] == 12
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    # At step 6, too, it would be due, but a stage that only distils teaches no answers.
    assert [record["step"] for record in records if "validation/wer" in record] == [12]
    assert {name: s["n"] for name, s in scores["sets"].items()} == {
        "new sentences": 3,
        "new voices": 4,
        "new voices and sentences": 5,
        "recordings": 6,
    }
    assert f"{100 * scores['sets']['new voices']['wer']['value']:.1f}" in out
    assert str(workdir) in out
    assert scores["text"]["questions"]["n"] == 10
    assert f"look at it: {workdir / 'report.html'}" in out and (workdir / "report.html").is_file()
    assert json.loads((workdir / "report.json").read_text())["missing"] == {}
    assert f"take it to PyTorch: {workdir / 'peft'}" in out
    assert json.loads((workdir / "peft" / "audio_config.json").read_text())["step"] == 12

    assert cli.main(["generate", "--workdir", str(workdir), "--prompt", "Hello", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "Hello"


def scores_of(step: int = 1100, wer: float = 0.0, **text) -> dict:
    rate = {"value": wer, "low": wer, "high": wer}
    exact = {"value": 1 - wer, "low": 1 - wer, "high": 1 - wer}
    out = {"step": step, "scored_step": step, "sets": {"new voices": {"n": 93, "wer": rate, "exact_match": exact}}}
    out |= {"seconds": {"train": 60.0, "evaluate": 60.0}, "peak_memory_gib": 1.0}
    return out | ({"text": text} if text else {})


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """In place of runs: `runs[0]` is what the next one scores; returns the workdirs that were used, too."""
    canned, used = [], []
    monkeypatch.setattr(quickstart, "check", lambda config: None)
    monkeypatch.setattr(quickstart, "run", lambda config, workdir: used.append(workdir) or canned.pop(0))
    monkeypatch.setattr(quickstart, "report_run", lambda workdir: workdir / "report.html")
    monkeypatch.setattr(quickstart, "export_model", lambda workdir, config, step: workdir / "peft")
    monkeypatch.setattr(quickstart, "COMMITTED", tmp_path / "committed.json")
    return canned, used


def test_the_ablation_is_a_column(runs, tmp_path, capsys):
    canned, used = runs
    canned += [scores_of(), scores_of(wer=0.5)]
    assert quickstart.main(tmp_path / "run", config.default(), ablation=True) == 0
    assert used == [tmp_path / "run", tmp_path / "run-ablation"]
    head, _, row = capsys.readouterr().out.strip().splitlines()[:3]
    assert head.split("  ")[0] == "test set" and head.endswith("without distillation")
    assert row.split()[:3] == ["new", "voices", "93"] and "0.0 (0.0 to 0.0)" in row and "50.0 (50.0 to 50.0)" in row


def test_an_interrupted_ablation_is_to_be_resumed(runs, tmp_path):
    runs[0].extend([scores_of(), None])
    assert quickstart.main(tmp_path / "run", config.default(), ablation=True) == loop.RESUME_EXIT_CODE


@pytest.mark.parametrize(("step", "shown"), [(1100, True), (12, False)])
def test_the_committed_column_is_of_the_same_experiment(runs, tmp_path, capsys, step, shown):
    quickstart.COMMITTED.write_text(json.dumps({"systems": {"without distillation": [scores_of(wer=0.25)]}}))
    runs[0].append(scores_of(step))
    assert quickstart.main(tmp_path / "run", config.default()) == 0
    out = capsys.readouterr().out
    assert ("no distillation (committed)" in out) == ("25.0 (25.0 to 25.0)" in out) == shown


@pytest.mark.parametrize(("adapters", "exact"), [("request", True), ("audio", True), ("all", False), ("merged", False)])
def test_text_is_called_untouched_only_where_it_is(adapters, exact):
    loss = {"all": {"adapted": 3.2, "base": 3.1, "rise": 0.1}}
    lines = suite.text_lines(scores_of(adapters=adapters, loss=loss, questions={"adapted": 8, "base": 9, "n": 10}))
    assert ("not a bit changes" in lines) == exact
    assert "3.20 nats a token, the base LLM 3.10 (+0.100)" in lines and "8 of 10 right, the base LLM 9" in lines
    assert "questions" not in suite.text_lines(scores_of(adapters=adapters, loss=loss))


def test_the_model_is_exported_once_a_step_in_a_format_that_can_say_it(tmp_path, monkeypatch):
    written = []

    def export_run(workdir, output, format):
        written.append(format)
        output.mkdir()
        (output / "audio_config.json").write_text(json.dumps({"step": 5 + len(written)}))
        return output

    monkeypatch.setattr(quickstart.export, "export_run", export_run)
    c = config.load([f"--config={ROOT / 'configs' / 'smoke.py'}"])
    assert quickstart.export_model(tmp_path, c, 6) == tmp_path / "peft"
    assert quickstart.export_model(tmp_path, c, 6) == tmp_path / "peft" and written == ["peft"]
    quickstart.export_model(tmp_path, c, 7)
    assert written == ["peft", "peft"]
    c.lora.scope = "audio"
    assert quickstart.export_model(tmp_path, c, 8) == tmp_path / "hf"
    assert written == ["peft", "peft", "hf"]


def test_the_run_without_distillation_is_the_same_but_for_it():
    c = config.load([f"--config={ROOT / 'configs' / 'quickstart.py'}"])
    before = config.to_json(c)
    without = quickstart.without_distillation(c)
    config.validate(without)
    assert config.to_json(c) == before
    for name in c.train.schedule:
        ours, theirs = c.train.stages[name], without.train.stages[name]
        assert (theirs.objectives.lm, theirs.objectives.distill, theirs.clip_norm) == (1.0, 0.0, 1.0)
        assert ours.objectives.distill > 0 and ours.objectives.text_anchor == theirs.objectives.text_anchor
        ours.objectives, ours.clip_norm = theirs.objectives, theirs.clip_norm
    assert config.to_json(c) == config.to_json(without)


def test_sets_that_want_no_transcript_are_shown_by_what_they_are_scored_by():
    answered = {"value": 0.5, "low": 0.25, "high": 0.75}
    shown = quickstart.table({"AuRA": {"sets": {"new questions": {"n": 40, "answered": answered}}}})
    assert "answered %" in shown and "50.0 [25.0, 75.0]" in shown and "WER" not in shown


def test_scores_are_taken_again_where_step_or_evaluation_changed(monkeypatch, tmp_path):
    step, evaluated = 12, []
    monkeypatch.setattr(loop, "train", lambda config, workdir: loop.Result(step, False, {}, seconds=12.5))
    c = config.default()

    def score_run(workdir):
        evaluated.append(step)
        scores = {"step": step, "eval": suite.settings(c)}
        (workdir / "scores.json").write_text(json.dumps(scores))
        return scores, {}

    monkeypatch.setattr(suite, "score_run", score_run)
    scores = quickstart.run(c, tmp_path)
    assert scores is not None and scores["step"] == 12
    assert quickstart.run(c, tmp_path) == scores and len(evaluated) == 1
    c.eval.max_new_tokens += 1
    quickstart.run(c, tmp_path)
    assert len(evaluated) == 2
    step = 13
    quickstart.run(c, tmp_path)
    assert len(evaluated) == 3


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("sets", "{", "file.jsonl:1: not JSON"),
        ("text_questions", '{"prompt": "Why?"}\n', "file.jsonl:1: give 'prompt'"),
        ("text_heldout", "[]\n", "file.jsonl:1: "),
        ("text_heldout", None, "file.jsonl is missing: run the quickstart from the root"),
    ],
)
def test_files_of_the_evaluation_are_read_before_training(tiny_config, tmp_path, monkeypatch, key, text, message):
    monkeypatch.setattr(quickstart, "run", lambda *_: pytest.fail("trained"))
    c, path = tiny_config(), tmp_path / "file.jsonl"
    c.eval[key] = {"mine": str(path)} if key == "sets" else str(path)
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError) as error:
        quickstart.main(tmp_path / "run", c)
    assert message in str(error.value)


def test_an_evaluation_without_text_needs_none():
    quickstart.check(config.default())
