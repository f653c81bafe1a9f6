"""The quickstart as a whole, through the command line, on random tiny models; and the local launcher."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def aura_jax(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "aura_jax.cli", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=580
    )


@pytest.mark.slow
def test_smoke_trains_evaluates_reports_and_answers(tmp_path):
    workdir = tmp_path / "run"
    run = aura_jax("quickstart", "--config=configs/smoke.py", "--workdir", str(workdir))
    assert run.returncode == 0, run.stderr[-3000:]
    scores = json.loads((workdir / "scores.json").read_text())
    assert scores["step"] == 12
    assert {name: s["n"] for name, s in scores["sets"].items()} == {
        "new voices": 93,
        "new sentences": 80,
        "new voices and sentences": 55,
    }
    assert f"{100 * scores['sets']['new voices']['wer']['value']:.1f}" in run.stdout
    assert str(workdir) in run.stdout
    assert scores["text"]["questions"]["n"] == 10

    answer = aura_jax("generate", "--workdir", str(workdir), "--prompt", "Hello", "--json")
    assert answer.returncode == 0, answer.stderr[-3000:]
    assert json.loads(answer.stdout)["prompt"] == "Hello"


def test_the_launcher_passes_a_users_mistake_on(tmp_path):
    command = ["bash", "launch/local.sh", "configs/none.py", str(tmp_path / "run")]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment)
    assert run.returncode == 2
    assert "configs/none.py" in run.stderr and len(run.stderr.strip().splitlines()) == 1
