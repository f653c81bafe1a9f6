"""What a run tells: a live progress line, metrics.jsonl, TensorBoard, commands.jsonl. On the first host only."""

import datetime
import json
import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter
from tqdm import tqdm

from aura_jax import hosts, machine


class Log:
    """Writes to a workdir; on hosts other than the first, every method does nothing."""

    def __init__(self, workdir: Path, first_step: int, last_step: int):
        self._on = hosts.is_first()
        if not self._on:
            return
        workdir.mkdir(parents=True, exist_ok=True)
        self._path = workdir / "metrics.jsonl"
        for name in ("metrics", "validation", "nonfinite", "commands"):
            _drop_after(workdir / f"{name}.jsonl", first_step)
        self._tensorboard = SummaryWriter(str(workdir / "tensorboard"), purge_step=first_step or None)
        self._bar = tqdm(
            total=last_step,
            initial=first_step,
            unit="step",
            dynamic_ncols=True,
            # A file or a pipe gets a line now and then instead of a moving one.
            mininterval=0.2 if sys.stderr.isatty() else 15,
            file=sys.stderr,
            bar_format="{desc} {percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
            colour=None if os.environ.get("NO_COLOR") else "green",
        )

    def command(self, first_step: int) -> None:
        """Appends the command that runs, and what it runs on, to commands.jsonl."""
        if not self._on:
            return
        line = {
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "first_step": first_step,
            "environment": machine.environment(),
        }
        with (self._path.parent / "commands.jsonl").open("a") as out:
            out.write(json.dumps(line) + "\n")

    def stage(self, name: str) -> None:
        if self._on:
            self._bar.set_description_str(name, refresh=False)

    def progress(self, step: int, metrics: Mapping[str, float]) -> None:
        """Moves the bar; shows the loss, its parts and the rates."""
        if not self._on:
            return
        shown = {k.removeprefix("loss/"): f"{v:.3f}" for k, v in metrics.items() if _shown(k)}
        shown["audio"] = f"{metrics['audio_seconds_per_second']:.0f}x"
        shown["tok/s"] = f"{metrics['tokens_per_second']:.0f}"
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update(step - self._bar.n)

    def record(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends one object to metrics.jsonl, and its numbers to TensorBoard."""
        if not self._on:
            return
        with self._path.open("a") as out:
            out.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            if isinstance(value, int | float):
                self._tensorboard.add_scalar(name, value, step)

    def say(self, line: str) -> None:
        """Prints a line above the progress bar."""
        if self._on:
            tqdm.write(line, file=sys.stderr)

    def close(self) -> None:
        if self._on:
            self._bar.close()
            self._tensorboard.close()


def _shown(name: str) -> bool:
    return name == "loss" or (name.startswith("loss/") and name.count("/") == 1)


def _drop_after(path: Path, step: int) -> None:
    """Drops a line that a kill cut short, and lines of steps after that at which a run resumes: they come again."""
    if not path.is_file():
        return
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line).get("step", 0) <= step]
    if len(kept) < len(lines):
        partial = path.with_suffix(".partial")
        partial.write_text("".join(kept))
        partial.replace(path)
