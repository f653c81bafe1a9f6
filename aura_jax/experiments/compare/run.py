"""The jobs of a comparison: which there are, which are done, and one after another those that are not."""

import dataclasses
import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aura_jax import config as config_lib
from aura_jax.config import Config
from aura_jax.errors import UserError, nearest
from aura_jax.experiments.compare import table
from aura_jax.experiments.quickstart import check

SYSTEMS = Path("configs/systems")  # below the root of the repository
UNTRAINED = ("cascade", "oracle")
_BASE = "configs/quickstart.py"


@dataclasses.dataclass(frozen=True)
class Job:
    """One system and one seed.

    Attributes:
      workdir: of its training.
      output: its result.
    """

    system: str
    seed: int
    config: Config
    workdir: Path
    output: Path

    def values(self, command: str) -> dict[str, Any]:
        """Returns the job as JSON."""
        return {
            "system": self.system,
            "seed": self.seed,
            "command": command,
            "config": json.loads(config_lib.to_json(self.config)),
            "workdir": str(self.workdir),
            "output": str(self.output),
        }


def plan(
    systems: Sequence[str], seeds: Sequence[int], workdir: Path, results: Path, base: str, overrides: Sequence[str]
) -> list[Job]:
    """Returns the jobs, those of the first seed first; a system that learns nothing has one.

    Args:
      systems: names of files in `SYSTEMS`, of `UNTRAINED`, or paths of config files.
      base: the config that the systems take models, data and number of steps from.
      overrides: `--config.KEY=VALUE`, of every system.

    Raises:
      UserError: an unknown system, one named twice, or a config that is wrong; before anything is trained.
    """
    files = {name: _file(name) for name in systems}
    jobs = []
    for seed in seeds:
        for name, file in files.items():
            if name in UNTRAINED and seed != seeds[0]:
                continue
            config = config_lib.load([f"--config={file}:{base}", *overrides, f"--config.seed={seed}"])
            if not config.eval.sets:
                raise UserError(f"{base}: eval.sets is empty, and there is nothing to compare on: name test sets")
            check(config)
            place = f"{Path(name).stem}-seed-{seed}"
            jobs.append(Job(Path(name).stem, seed, config, workdir / place, results / f"{place}.json"))
    if len({(job.system, job.seed) for job in jobs}) < len(jobs):
        raise UserError(f"--systems {','.join(systems)}: two have the same name")
    return jobs


def _file(name: str) -> Path:
    if name in UNTRAINED:
        return SYSTEMS / "aura.py"  # the base as it is
    if name.endswith(".py"):
        return Path(name)
    known = sorted(path.stem for path in SYSTEMS.glob("[!_]*.py"))
    if not known:
        raise UserError(f"no {SYSTEMS}: run this from the root of the repository, or name config files")
    if name not in known:
        raise UserError(f"unknown system {name!r}: {nearest(name, [*known, *UNTRAINED])}")
    return SYSTEMS / f"{name}.py"


def main(
    systems: Sequence[str],
    seeds: Sequence[int],
    workdir: Path,
    results: Path,
    base: str = _BASE,
    overrides: Sequence[str] = (),
) -> int:
    """Runs the jobs that have no result yet, and prints the table of all; returns an exit code.

    Raises:
      UserError: as `plan`, or a result is there that was made with another config.
    """
    jobs = plan(systems, seeds, workdir, results, base, overrides)
    missing = [job for job in jobs if not _is_done(job)]
    command = f"aura-jax {shlex.join(sys.argv[1:])}"
    for i, job in enumerate(missing, 1):
        print(f"{i} of {len(missing)}: {job.system}, seed {job.seed}", file=sys.stderr, flush=True)
        job.output.parent.mkdir(parents=True, exist_ok=True)
        file = job.workdir.with_name(f"{job.workdir.name}.json")
        file.write_text(json.dumps(job.values(command), indent=1) + "\n")
        code = _run([sys.executable, "-m", "aura_jax.experiments.compare.job", str(file)])
        if code:
            return code
    print(table.text([json.loads(job.output.read_text()) for job in jobs]))
    return 0


def _is_done(job: Job) -> bool:
    if not job.output.is_file():
        return False
    try:
        same = json.loads(job.output.read_text())["config"] == job.values("")["config"]
    except (ValueError, KeyError) as error:
        raise UserError(f"{job.output}: no result of a comparison: delete it") from error
    if not same:
        raise UserError(f"{job.output} was made with another config: delete it, or name another folder with --results")
    return True


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
