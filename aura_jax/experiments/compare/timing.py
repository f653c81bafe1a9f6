"""How fast the systems of a comparison answer and train, side by side: they take turns, one computes at a time.

What else the machine does slows all alike, so that what is to be trusted is a ratio. A TPU belongs to one process:
there each system is timed after the one before it.
"""

import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from aura_jax import config as config_lib
from aura_jax import machine
from aura_jax.config import Config
from aura_jax.experiments.bench.protocol import Worker
from aura_jax.experiments.bench.train import spread
from aura_jax.experiments.compare.plan import UNTRAINED

LENGTHS = (1.0, 2.0, 5.0, 10.0, 30.0)  # seconds of speech
UNTIMED = ("oracle",)  # reads
_ANSWERS, _STEPS, _BATCHES = 7, 5, 4  # rounds; batches of a stage, the same rows for all

_Arm = TypeVar("_Arm")
_Seconds = dict[tuple[str, str], dict[float, list[float]]]  # of each round, by system and adapters, and by length


def measure(
    systems: Mapping[str, Config],
    command: str,
    paddings: Mapping[str, Mapping[str, Any]],
    lengths: Sequence[float] = LENGTHS,
) -> dict[str, Any]:
    """Returns times of the first token and of a train step of each system, and what they need of memory.

    Args:
      systems: their configs by name, `plan.UNTRAINED` among them; the first is what the others are compared with.
      paddings: of cascades: how much silence their Whisper needs, as `Arm.load` takes it.
      lengths: of the clips, in seconds.

    Returns:
      {"command", "machine", "in_turns": whether they took turns, "systems": {name: {"config", "first_token": {adapters:
      {length: {"median", "low", "high", and "times": of the same round of the first system with its first adapters}}},
      "steps": {stage: {"seconds": of one, "n": in the schedule}}, "preparation_seconds", "schedule_seconds",
      "peak_memory_gib"}}}.
      Seconds of a schedule are those of its steps, those of preparation are of what a run computes before them; a
      system that learns nothing has neither.
    """
    names = [name for name in systems if name not in UNTIMED]
    out: dict[str, Any] = {name: {"config": json.loads(config_lib.to_json(systems[name]))} for name in names}
    seconds: _Seconds = {}
    with tempfile.TemporaryDirectory(prefix="aura-compare-") as folder:
        groups = _groups(names, Path(folder))
        for group in groups:
            with _started(group, Path(folder)) as workers:
                about = {}
                for name in tqdm(group, desc="loading"):
                    place = Path(folder, name)
                    place.mkdir()
                    values = {"system": name, "config": out[name]["config"], "folder": str(place)}
                    about[name] = workers[name].ask("load", **values, lengths=lengths, padding=paddings.get(name))
                seconds |= _first_tokens(workers, about, lengths)
                _steps({name: worker for name, worker in workers.items() if name not in UNTRAINED}, systems, out)
    for (name, adapters), found in seconds.items():
        of_first = next(iter(seconds.values()))
        out[name].setdefault("first_token", {})[adapters] = {
            f"{length:g}": spread(own) | {"times": spread(_ratios(own, of_first[length]))}
            for length, own in found.items()
        }
    return {"command": command, "machine": machine.describe(), "in_turns": len(groups) < 2, "systems": out}


def _groups(names: Sequence[str], folder: Path) -> list[Sequence[str]]:
    """Returns the systems in groups that may hold the devices at once: all of them, or, on a TPU, each alone."""
    if len(names) > 1:
        with _started(names[:1], folder) as workers:
            if workers[names[0]].ask("backend")["backend"] == "tpu":
                return [[name] for name in names]
    return [names]


@contextmanager
def _started(names: Sequence[str], folder: Path) -> Iterator[dict[str, Worker]]:
    command = [sys.executable, "-m", "aura_jax.experiments.compare.arm"]
    with ExitStack() as stack:
        workers = {}
        for name in names:
            workers[name] = Worker(command, {}, folder / f"{name}.log")
            stack.callback(workers[name].close)
        yield workers


def _first_tokens(workers: Mapping[str, Worker], about: Mapping[str, Any], lengths: Sequence[float]) -> _Seconds:
    arms = [(name, adapters) for name in workers for adapters in about[name]["adapters"]]
    seconds: _Seconds = {arm: {length: [] for length in lengths} for arm in arms}
    # The first round compiles. Who goes first changes from round to round.
    for turn in tqdm(range(1 + _ANSWERS), desc="first tokens", unit="round"):
        for length in lengths:
            for name, adapters in _turned(arms, turn):
                took = workers[name].ask("answer", adapters=adapters, length=length)["seconds"]
                if turn:
                    seconds[name, adapters][length].append(took)
    return seconds


def _steps(workers: Mapping[str, Worker], systems: Mapping[str, Config], out: dict[str, Any]) -> None:
    """Adds what is known of its training to what is known of each system."""
    arms = []
    for name in tqdm(workers, desc="preparing to train"):
        ready = workers[name].ask("prepare_steps", n_batches=_BATCHES)
        out[name]["preparation_seconds"] = ready["seconds"]
        arms += [(name, stage) for stage in ready["stages"]]
        workers[name].ask("watch")
    seconds: dict[tuple[str, str], list[list[float]]] = {arm: [[] for _ in range(_BATCHES)] for arm in arms}
    for turn in tqdm(range(1 + _STEPS), desc="steps", unit="round"):
        for batch in range(_BATCHES):
            for name, stage in _turned(arms, turn):
                took = workers[name].ask("step", stage=stage, batch=batch)["seconds"]
                if turn:
                    seconds[name, stage][batch].append(took)
    for name, worker in workers.items():
        of_stages: list[tuple[str, Any]] = config_lib.stages(systems[name])
        left, steps = config_lib.total_steps(systems[name]), {}
        for stage, c in of_stages:
            each = statistics.mean(statistics.median(of_batch) for of_batch in seconds[name, stage])
            steps[stage] = {"seconds": each, "n": min(c.steps, left)}
            left -= steps[stage]["n"]
        out[name]["steps"] = steps
        out[name]["schedule_seconds"] = sum(of["seconds"] * of["n"] for of in steps.values())
        out[name]["peak_memory_gib"] = _gib(worker)


def _turned(arms: Sequence[_Arm], turn: int) -> Sequence[_Arm]:
    """Returns the arms, beginning with another one each turn."""
    first = turn % max(1, len(arms))
    return [*arms[first:], *arms[:first]]


def _gib(worker: Worker) -> float | None:
    """Returns the most memory that was in use: on a CPU of the process in its steps, else of the device in its life."""
    of_device = worker.ask("device_peak")["gib"]
    if of_device is not None:
        return of_device
    peak = worker.ask("peak")["since_watch"]
    return None if peak is None else peak / 2**30


def _ratios(seconds: Sequence[float], of_first: Sequence[float]) -> list[float]:
    return [own / first for own, first in zip(seconds, of_first, strict=True)]
