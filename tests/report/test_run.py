"""From a workdir to its report: a real run on random tiny models, whole, cut short, and with pieces missing."""

import json
import shutil
from pathlib import Path

import jax
import pytest

from aura_jax import checkpoint, cli, config
from aura_jax.errors import UserError
from aura_jax.evaluate import suite
from aura_jax.report import collect, run
from aura_jax.train import loop
from tests.train.conftest import write_manifest

pytestmark = pytest.mark.slow  # a run is trained for them


@pytest.fixture(scope="module")
def finished(tiny_config, sample_data, tmp_path_factory) -> Path:
    """A run of two stages, scored on two sets."""
    home = tmp_path_factory.mktemp("report")
    rows = write_manifest(home / "train.jsonl", sample_data)
    test = write_manifest(home / "test.jsonl", sample_data, n=5)
    c = tiny_config()
    c.data.train = ((str(rows), 1.0),)
    c.data.validation_values = (json.loads(rows.read_text().splitlines()[0])["voice"],)
    c.data.update(batch_size=4, max_seconds=4.0, buckets=(4.0,))
    c.train.stages.distil = config.stage(4, 1e-2, {"distill": 1.0}, warmup_steps=2)
    c.train.stages.joint = config.stage(4, 1e-2, {"lm": 1.0, "distill": 1.0}, warmup_steps=2)
    c.train.schedule = ("distil", "joint")
    c.train.update(log_every=1, checkpoint_every=4, profile_start=6, profile_steps=2, eval_rows=2)
    c.eval.sets = {"test": str(test)}
    loop.train(c, home / "run")
    suite.score_run(home / "run")
    return home / "run"


@pytest.fixture
def workdir(finished, tmp_path) -> Path:
    """A copy to break."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_a_finished_run_is_reported_whole(finished, tmp_path):
    page = run.report_run(finished, tmp_path, progress=False)
    assert page == tmp_path / "report.html" and (tmp_path / "figures" / "method.png").is_file()
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["missing"] == {} and data["finished"] and data["step"] == data["total_steps"] == 8
    steps = [record for record in lines(finished / "metrics.jsonl") if "loss" in record]
    for name, values in data["metrics"].items():
        assert values == [record.get(name) for record in steps]
    assert data["metrics"]["loss/lm"][:4] == [None] * 4 and None not in data["metrics"]["loss/lm"][4:]
    assert data["scores"] == json.loads((finished / "scores.json").read_text())
    assert data["stages"] == [
        {"name": "distil", "first": 0, "end": 4, "objectives": {"distill": 1.0}, "learning_rate": 1e-2},
        {"name": "joint", "first": 4, "end": 8, "objectives": {"lm": 1.0, "distill": 1.0}, "learning_rate": 1e-2},
    ]
    block = data["alignment"]["blocks"].index(1)
    assert data["alignment"]["value"][block] == [1 - record["loss/distill/block_01"] for record in steps]
    validation = [record for record in lines(finished / "metrics.jsonl") if "validation/wer" in record]
    assert data["validation"]["wer"] == [record["validation/wer"] for record in validation]
    assert {one["part"] for one in data["speed"]["wall"]} == {
        "preparing", "steps", "checkpoints", "validation", "evaluation"
    }  # fmt: skip
    profile = json.loads((finished / "profile.json").read_text())["seconds"]
    assert {one["part"]: one["seconds"] for one in data["speed"]["breakdown"]} == {
        part: sum(ways.values()) for part, ways in profile.items()
    }
    assert data["speed"]["stages"][1]["wait_share"] == pytest.approx(
        sum(record["steps_that_waited"] for record in steps[4:]) / 4
    )
    similarity = data["similarity"]
    assert "held out by voice" in similarity["set"] and 0 < similarity["n_clips"] <= 24
    for when in ("before", "after"):
        assert len(similarity[when]["cosine"]) == 2
        assert [len(row) for row in similarity[when]["cka"]] == [2] * 4  # every block of the LLM and the teacher
    # Of training, the heads have learnt at least this.
    assert sum(similarity["after"]["cosine"]) > sum(similarity["before"]["cosine"])
    assert "audio" not in data["examples"][0] and "flac;base64" in page.read_text()


def test_parameters_are_those_that_there_are(finished):
    data = collect.collect(finished, progress=False)
    _, variables = checkpoint.load(finished, "latest")
    size = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    parts = {one["part"]: one for one in data["parameters"]}
    assert parts["LoRA"] == {"part": "LoRA", "trained": size(variables["lora"]), "frozen": 0, "kept": True}
    assert parts["distillation heads"]["trained"] == size(variables["heads"])
    assert not parts["distillation heads"]["kept"] and not parts["teacher's encoder"]["kept"]
    assert (parts["audio embedder"]["frozen"], parts["teacher's encoder"]["trained"]) == (1, 0)  # text_rms
    of_llm = [one["frozen"] for part, one in parts.items() if part.startswith("LLM")]
    assert sum(of_llm) == size(variables["params"]["llm"])


def test_a_run_that_was_cut_short_is_reported_as_far_as_it_got(workdir, tmp_path):
    (workdir / "scores.json").unlink()
    (workdir / "transcripts.json").unlink()
    (workdir / "profile.json").unlink()
    shutil.rmtree(workdir / "checkpoints")
    shutil.rmtree(workdir / "best")
    text = (workdir / "metrics.jsonl").read_text()
    (workdir / "metrics.jsonl").write_text("".join(text.splitlines(keepends=True)[:3]) + '{"step": 4, "lo')
    page = run.report_run(workdir, progress=False)
    data = json.loads((workdir / "report.json").read_text())
    assert data["step"] == 3 and not data["finished"]
    assert "aura-jax eval --workdir run" in data["missing"]["scores"]
    assert "holds no checkpoint yet" in data["missing"]["similarity"]
    shown = page.read_text()
    assert all(line in shown for line in data["missing"].values())


def test_a_workdir_without_metrics_says_so(workdir):
    for name in ("metrics.jsonl", "commands.jsonl", "scores.json", "transcripts.json"):
        (workdir / name).unlink()
    run.report_run(workdir, progress=False)
    data = json.loads((workdir / "report.json").read_text())
    assert data["step"] == 0 and data["missing"]["metrics"] == "no step is logged in run/metrics.jsonl: train first"


def test_a_clip_that_vanished_is_a_problem_of_its_example_alone(workdir, tmp_path, sample_data):
    manifest = Path(config.from_json(workdir / "config.json").eval.sets["test"])
    rows = lines(manifest)
    gone = tmp_path / "clips" / "gone.ogg"
    gone.parent.mkdir()
    for row in rows[:1]:
        row["audio"] = str(gone)
    moved = tmp_path / "test.jsonl"
    moved.write_text("".join(json.dumps(row) + "\n" for row in rows))
    c = config.from_json(workdir / "config.json")
    c.eval.sets = {"test": str(moved)}
    (workdir / "config.json").write_text(config.to_json(c))
    transcripts = {
        "test": [
            {"id": row["id"], "reference": row["text"], "hypothesis": heard}
            for row, heard in zip(rows, "abcde", strict=True)
        ]
    }
    transcripts["other"] = [{"id": "1", "reference": "yes", "hypothesis": "yes"}]
    transcripts["test"][0]["hypothesis"] = "never mind the weather " * 9  # the worst
    (workdir / "transcripts.json").write_text(json.dumps(transcripts))
    examples = collect.collect(workdir, progress=False)["examples"]
    assert examples[0]["audio"] is None and str(gone) in examples[0]["problem"]
    assert examples[1]["audio"] is not None and examples[1]["problem"] is None
    assert examples[-1]["problem"] == "the run's eval.sets names no 'other'"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", None, "config.json"),
        ("metrics.jsonl", "{\n", "metrics.jsonl: not JSON lines"),
        ("scores.json", "{", "scores.json: not JSON"),
    ],
)
def test_a_broken_workdir_is_one_clear_line(workdir, capsys, name, text, message):
    if text is None:
        (workdir / name).unlink()
    else:
        (workdir / name).write_text(text)
    assert cli.main(["report", "--workdir", str(workdir)]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and error.startswith("error: ") and len(error.splitlines()) == 1


def test_a_run_without_a_teacher_has_nothing_to_compare(tiny_config):
    c = tiny_config()
    c.model.teacher = ""
    with pytest.raises(UserError, match="no teacher to compare with"):
        collect._held_out(c)
