"""Runs of `aura-jax` with keys changed, one process each, and their scores as results to commit."""

import json
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from aura_jax import machine

RESULTS = Path(__file__).parent / "results"


def aura_jax(*arguments: str) -> None:
    """Runs the command line in a process of its own."""
    print(f"== {shlex.join(arguments)}", flush=True)
    subprocess.run([sys.executable, "-m", "aura_jax.cli", *arguments], check=True)


def run(workdir: Path, arguments: Sequence[str], scores_of: Path | None = None) -> dict[str, Any]:
    """Runs the quickstart in `workdir`, or goes on with it, and returns its scores and the command that made them.

    Args:
      arguments: of the quickstart, beside --workdir.
      scores_of: the workdir whose scores are meant, if it is another.
    """
    aura_jax("quickstart", "--workdir", str(workdir), *arguments)
    scores = json.loads(((scores_of or workdir) / "scores.json").read_text())
    return {"command": shlex.join(["aura-jax", "quickstart", "--workdir", workdir.name, *arguments]), **scores}


def curve(workdir: Path) -> list[tuple[int, float]]:
    """Returns the error rate of each validation of a run, with its step."""
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["validation/wer"]) for r in records if "validation/wer" in r]


def write(name: str, what: str, results: dict[str, Any]) -> None:
    """Writes results/NAME.json: what was measured, on which machine, and `results`."""
    path = RESULTS / f"{name}.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"what": what, "machine": machine.describe(), **results}, indent=1) + "\n")
    partial.replace(path)
    print(f"wrote {path}")


def spread(values: Iterable[float], scale: float = 1.0, digits: int = 1) -> str:
    """Returns the mean, and the range where there is more than one value."""
    scaled = [value * scale for value in values]
    mean = f"{sum(scaled) / len(scaled):.{digits}f}"
    return mean if len(scaled) == 1 else f"{mean} ({min(scaled):.{digits}f} to {max(scaled):.{digits}f})"
