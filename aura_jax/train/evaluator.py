"""Periodic evaluation on held-out training rows, with transcripts to look at."""

import json
from collections.abc import Sequence
from pathlib import Path

from aura_jax import hosts
from aura_jax.data.manifest import Row
from aura_jax.evaluate.run import evaluate_set
from aura_jax.infer.generate import Generator
from aura_jax.system import System

_SHOWN = 4


class Evaluator:
    """Decodes the same rows at each call; compiles once."""

    def __init__(self, rows: Sequence[Row], workdir: Path):
        self._rows = [row for row in rows if not row.is_plain_text]
        self._path = workdir / "validation.jsonl"
        self._generator: Generator | None = None

    def has(self, step: int) -> bool:
        """Whether that step was evaluated already, or there is nothing to evaluate it on."""
        return not self._rows or hosts.on_first(lambda: self._noted(step))

    def _noted(self, step: int) -> bool:
        if not self._path.is_file():
            return False
        return any(json.loads(line)["step"] == step for line in self._path.read_text().splitlines())

    def __call__(self, built: System, variables: dict, step: int) -> dict[str, float] | None:
        """Returns scores of a student; None if nothing is held out. Transcripts go to `validation.jsonl`."""
        n = built.config.train.eval_rows
        rows = self._rows[:: max(1, len(self._rows) // n)][:n]
        if not rows:
            return None
        if self._generator is None:
            self._generator = Generator(built, variables)
        self._generator.variables = variables
        # A clip that broke since the run began must not end the run.
        result = evaluate_set(
            self._generator,
            rows,
            name=f"validation at step {step}",
            skip_unreadable=True,
            progress=hosts.is_first(),
            by_row=False,  # against what it is trained to say
        )
        shown = [{"reference": o.reference, "hypothesis": o.hypothesis} for o in result.outputs[:_SHOWN]]
        if hosts.is_first():
            with self._path.open("a") as out:
                line = {"step": step, "n": len(result.outputs), "unreadable": result.unreadable, "samples": shown}
                out.write(json.dumps(line) + "\n")
        return {name: result.scores[name]["value"] for name in ("wer", "exact_match")}
