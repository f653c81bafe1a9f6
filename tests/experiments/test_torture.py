"""`benchmarks/torture.py`: five rounds of it, and that its checks notice what they are there for."""

import importlib.util
import json
import random
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("torture", ROOT / "benchmarks" / "torture.py")
assert _spec is not None and _spec.loader is not None
torture = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(torture)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # seven starts of a run; the programs are compiled once
def test_five_rounds(tmp_path):
    out = tmp_path / "torture.json"
    arguments = ["--work", str(tmp_path / "work"), "--rounds", "5", "--output", str(out)]
    assert torture.main(arguments) == 0
    found = json.loads(out.read_text())["results"]
    assert found["wrong"] == [] and found["corrupt restores"] == found["orphaned files"] == 0
    assert found["rounds"] == 5 and sum(found["files damaged"].values()) >= 1
    assert found["exit codes"]["SIGKILL"].keys() == {"-9"} and "75" in found["exit codes"]["SIGTERM"]
    assert torture.main(arguments) == 0  # all rounds are done: nothing is run


def test_the_plan_of_a_seed_is_always_the_same_and_has_all_that_can_happen():
    rounds = [torture.plan(0, i) for i in range(200)]
    assert rounds == [torture.plan(0, i) for i in range(200)]
    assert {(name, moment) for name, moment, _ in rounds} == {
        (name, moment) for name in ("SIGKILL", "SIGTERM") for moment in ("training", "starting")
    }
    assert {kind for *_, kinds in rounds for kind in kinds} == set(torture.KINDS)
    assert {kind for *_, kinds in rounds[:5] for kind in kinds} == set(torture.KINDS)


@pytest.mark.parametrize(("kind", "left"), [("truncate", range(8)), ("flip", (8,)), ("delete", (None,))])
def test_damage_changes_a_file(tmp_path, kind, left):
    path = tmp_path / "file"
    path.write_bytes(b"12345678")
    torture.damage(path, kind, random.Random(0))
    assert (len(path.read_bytes()) if path.is_file() else None) in left
    assert not path.is_file() or path.read_bytes() != b"12345678"


LEFT = {"taken": 13, "saved": [5, 10], "damaged": [], "unfinished": False, "code": -9}


@pytest.mark.parametrize(
    ("left", "resumed", "set_aside", "wrong"),
    [
        ({}, 10, 0, None),
        ({}, 5, 1, "resumed at 5, with"),
        ({"taken": 16}, 10, 0, "lost 6 steps"),
        ({"taken": 15, "unfinished": True}, 10, 0, None),
        ({"taken": 16, "unfinished": True}, 10, 0, "lost 6 steps"),
        ({"code": 75}, 10, 0, "lost 3 steps"),
        ({"damaged": [10]}, 5, 1, None),
        ({"damaged": [10]}, 5, 0, "did not say why"),
        ({"damaged": [10]}, 10, 0, None),  # the damage did not matter
        ({"damaged": [10]}, 0, 2, "resumed at 0, with"),
    ],
)
def test_a_resume_at_a_wrong_step_is_noticed(left, resumed, set_aside, wrong):
    case = torture.Torture.__new__(torture.Torture)
    case._left = LEFT | left
    found = list(case._check_resumed({"resumed_at": resumed, "set_aside": set_aside}))
    assert found == [] if wrong is None else wrong in " ".join(found)


def test_files_that_a_clean_run_has_not_are_noticed(tmp_path):
    def make(folder: Path, *names: str) -> Path:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
        return folder

    case = torture.Torture.__new__(torture.Torture)
    clean = make(tmp_path / "clean", "config.json", f"checkpoints/60/own/d/{'0' * 32}", "tensorboard/x.tfevents.1.a")
    case._files = torture.kinds_of_files(clean)
    names = ["config.json", f"checkpoints/35/own/d/{'a' * 32}", "tensorboard/x.tfevents.2.b", "corrupt/5/x"]
    assert not list(case._orphans(make(tmp_path / "run", *names)))
    make(tmp_path / "run", "config.partial", "checkpoints/40.orbax-checkpoint-tmp/own/x")
    assert len(list(case._orphans(tmp_path / "run"))) == 2
    make(tmp_path / "kept", *(f"checkpoints/{step}/own/d/{'0' * 32}" for step in (5, 20, 25, 30, 35)))
    assert list(case._orphans(tmp_path / "kept")) == ["checkpoints/5"]
