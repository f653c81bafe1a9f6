"""The whole pipeline as a run uses it, and how fast the steps may be that it feeds."""

import itertools
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from aura_jax import checkpoint, system
from aura_jax import config as config_lib
from aura_jax.audio.features import SAMPLE_RATE
from aura_jax.errors import UserError
from aura_jax.train.inputs import Inputs

FEW = 0.01  # of the steps may wait for data
PASSES = ("first pass", "next pass")  # without decoded clips in memory, and with them
_READ_AHEAD = 4  # batches that `make_dataset` holds ready


def precompute_teacher(config_path: Path) -> str:
    """Sees to it that the cache holds the teacher's states; returns the fingerprint of the teacher's weights."""
    built = system.build(config_lib.from_json(config_path))
    mesh = checkpoint.system_mesh(built.config)
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as workdir:
        weights = system.load_teacher(built, mesh)
        fingerprint = checkpoint.fingerprint(weights)
        Inputs(built, Path(workdir)).precompute_teacher(weights, fingerprint)
    return fingerprint


def measure(
    config_path: Path, active: frozenset[str], fingerprint: str | None, workers: int, rounds: int
) -> dict[str, Any]:
    """Reads two passes over the data in each round, the first with no clip decoded yet.

    Args:
      config_path: the run's configuration, as JSON.
      active: the objectives that the batches are for.
      fingerprint: of the teacher whose states the cache holds. None: the batches have none.
      workers: processes beside this one, in place of the configuration's.

    Returns:
      {"cores", "threads", "workers", "batches_per_pass"} and, a value a round, {"times_real_time": {of each pass},
      "seconds_to_first_batch", "batches_per_second", "fastest_step_seconds"}.

    Raises:
      UserError: the data fill fewer than two batches.
    """
    c = config_lib.from_json(config_path)
    c.data.workers = workers
    rates: dict[str, list[float]] = {name: [] for name in PASSES}
    starts, per_second, steps = [], [], []
    with tempfile.TemporaryDirectory() as workdir:
        inputs = Inputs(system.build(c), Path(workdir))
        if fingerprint is not None:
            inputs.precompute_teacher({}, fingerprint)  # the states are there by now: no weights are needed
        n = _batches_of_a_pass(inputs, active)
        with tqdm(total=rounds * 2 * n, desc=f"pipeline, {workers} workers", unit="batch") as bar:
            for _ in range(rounds):
                ready, heard, clock = [], [], time.perf_counter()
                for batch in inputs.batches(active, 0, 2 * n):
                    ready.append(time.perf_counter() - clock)
                    heard.append(int(batch.n_samples_BxK.sum()) / SAMPLE_RATE)
                    bar.update()
                # The first batch waits for threads and processes to start: the clock of the rates runs from it on.
                rates[PASSES[0]].append(sum(heard[1:n]) / (ready[n - 1] - ready[0]))
                rates[PASSES[1]].append(sum(heard[n:]) / (ready[-1] - ready[n - 1]))
                starts.append(ready[0])
                per_second.append((len(ready) - 1) / (ready[-1] - ready[0]))
                steps.append(fastest_step(ready))
    return {
        "cores": len(os.sched_getaffinity(0)),
        "threads": c.data.threads,
        "workers": workers,
        "batches_per_pass": n,
        "times_real_time": rates,
        "seconds_to_first_batch": starts,
        "batches_per_second": per_second,
        "fastest_step_seconds": steps,
    }


def _batches_of_a_pass(inputs: Inputs, active: frozenset[str]) -> int:
    """Counts the batches until a row comes again."""
    seen: set[str] = set()
    for index in itertools.count():
        names = inputs.row_names(active, index)
        if not seen.isdisjoint(names):
            break
        seen.update(names)
    if index < 2:
        raise UserError(f"data.train: {len(seen)} rows fill no two batches: lower data.batch_size, or give more data")
    return index


def share_waiting(ready: Sequence[float], step_seconds: float) -> float:
    """Returns the share of steps whose batch would come late, if a step took `step_seconds`.

    Args:
      ready: seconds at which each batch came to a reader that took it at once: how long each took to make. A full
        buffer halts the making of batches; that a step may need the same cores is not reckoned with.
    """
    made, taken, late = 0.0, [], 0
    for i, seconds in enumerate(np.diff(ready)):
        made = max(made, taken[i - _READ_AHEAD] if i >= _READ_AHEAD else 0.0) + float(seconds)
        due = taken[-1] + step_seconds if taken else made
        late += made > due
        taken.append(max(made, due))
    return late / len(taken)


def fastest_step(ready: Sequence[float]) -> float:
    """Returns the seconds of the shortest step at which fewer than 1% of the steps wait; `ready` as above."""
    low, high = 0.0, float(np.diff(ready).max())
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if share_waiting(ready, middle) < FEW else (middle, high)
    return high
