"""A comparison from its jobs to its page: what has a result is not done again."""

import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aura_jax import config as config_lib
from aura_jax import machine
from aura_jax.errors import UserError
from aura_jax.experiments.compare import page, plan, table, timing
from aura_jax.experiments.compare.plan import Job
from aura_jax.experiments.compare.summary import summarise

_BASE = "configs/compare.py"
_TIMING = "timing.json"


def main(
    systems: Sequence[str],
    seeds: Sequence[int],
    workdir: Path,
    results: Path,
    base: str = _BASE,
    overrides: Sequence[str] = (),
    equal_time: bool = False,
    finished: bool = False,
) -> int:
    """Runs what has no result yet, writes the page and its figures, and prints the table; returns an exit code.

    Args:
      equal_time: train each system a second time, for as long as the first one takes.
      finished: run nothing but the times: the page is of what has a result.

    Raises:
      UserError: as `plan.equal_steps`, a result is there that was made with another config, or none is that is wanted.
    """
    jobs = plan.equal_steps(systems, seeds, workdir, results, base, overrides)
    command = f"aura-jax {shlex.join(sys.argv[1:])}"
    if finished:
        jobs = _finished(jobs, results)
    if code := _run_missing(jobs, command):
        return code
    found = [json.loads(job.output.read_text()) for job in jobs]
    paddings = {result["system"]: result["padding"] for result in found if "padding" in result}
    times = _timed(jobs, results / _TIMING, command, paddings)
    if equal_time:
        more = plan.equal_time(jobs, times)
        if finished:
            more = [job for job in more if _is_done(job)]
        if code := _run_missing(more, command):
            return code
        jobs += more
    summary = summarise([json.loads(job.output.read_text()) for job in jobs], times)
    print(table.text(summary))
    print(f"wrote {page.write(summary, results)}")
    return 0


def _finished(jobs: Sequence[Job], results: Path) -> list[Job]:
    done = [job for job in jobs if _is_done(job)]
    if not done:
        raise UserError(f"--finished: {results} has no result of these systems and seeds: leave it out")
    return done


def _run_missing(jobs: Sequence[Job], command: str) -> int:
    missing = [job for job in jobs if not _is_done(job)]
    for i, job in enumerate(missing, 1):
        print(f"{i} of {len(missing)}: {job.system}, seed {job.seed}", file=sys.stderr, flush=True)
        job.output.parent.mkdir(parents=True, exist_ok=True)
        file = job.workdir.with_name(f"{job.workdir.name}.json")
        file.write_text(json.dumps(job.values(command), indent=1) + "\n")
        if code := _run([sys.executable, "-m", "aura_jax.experiments.compare.job", str(file)]):
            return code
    return 0


def _is_done(job: Job) -> bool:
    if not job.output.is_file():
        return False
    try:
        same = _completed(json.loads(job.output.read_text())["config"], job.output) == job.values("")["config"]
    except (ValueError, KeyError) as error:
        raise UserError(f"{job.output}: no result of a comparison: delete it") from error
    if not same:
        raise UserError(f"{job.output} was made with another config: delete it, or name another folder with --results")
    return True


def _completed(values: Any, file: Path) -> dict[str, Any]:
    """Returns a config that was written down, with the defaults of the keys that there were not yet."""
    return json.loads(config_lib.to_json(config_lib.from_values(values, file)))


def _timed(
    jobs: Sequence[Job], file: Path, command: str, paddings: Mapping[str, Mapping[str, Any]]
) -> Mapping[str, Any]:
    """Returns the times of the systems; measured anew if those that are there are not of these systems."""
    systems = {}
    for job in jobs:
        systems.setdefault(job.system, job.config)
    wanted = {name: json.loads(config_lib.to_json(c)) for name, c in systems.items() if name not in timing.UNTIMED}
    try:
        nothing = {"command": command, "machine": machine.describe(), "in_turns": True, "systems": {}}
        found = json.loads(file.read_text()) if file.is_file() else nothing
        have = {name: _completed(of["config"], file) for name, of in found["systems"].items()}
    except (ValueError, KeyError) as error:
        raise UserError(f"{file}: no times of a comparison: delete it") from error
    # The order matters: the first is what the others are compared with.
    if "in_turns" in found and list(have.items()) == list(wanted.items()):
        return found
    found = timing.measure(systems, command, paddings)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(found, indent=1) + "\n")
    partial.replace(file)
    return found


def _run(command: Sequence[str]) -> int:
    """Runs a job and passes signals on: it saves, and this call returns the exit code that says so."""
    process = subprocess.Popen(command, start_new_session=True)
    pass_on = lambda number, _: process.send_signal(number)
    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code  # as a shell says that a signal ended it
