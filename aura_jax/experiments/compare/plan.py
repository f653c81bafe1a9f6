"""The jobs of a comparison: which systems with which seeds, for how many steps."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from aura_jax import config as config_lib
from aura_jax import system
from aura_jax.config import Config
from aura_jax.data.manifest import load_manifest
from aura_jax.errors import UserError, nearest
from aura_jax.evaluate.run import written_request
from aura_jax.experiments.quickstart import check
from aura_jax.infer.cascade import whisper_of
from aura_jax.train.inputs import check_rows

SYSTEMS = Path("configs/systems")  # below the root of the repository
UNTRAINED = ("cascade", "oracle")
SAME = 0.05  # a schedule that takes as long as another, within this share, is not run a second time

Budget = Literal["steps", "time"]


@dataclasses.dataclass(frozen=True)
class Job:
    """One system and one seed.

    Attributes:
      budget: what it has in common with the others: the number of steps, or the time that they take.
      workdir: of its training.
      output: its result.
      factor: what the base's number of steps is multiplied by.
    """

    system: str
    seed: int
    budget: Budget
    config: Config
    workdir: Path
    output: Path
    factor: float = 1.0

    def values(self, command: str) -> dict[str, Any]:
        """Returns the job as JSON."""
        return {
            "system": self.system,
            "seed": self.seed,
            "budget": self.budget,
            "factor": self.factor,
            "command": command,
            "config": json.loads(config_lib.to_json(self.config)),
            "workdir": str(self.workdir),
            "output": str(self.output),
        }


def equal_steps(
    systems: Sequence[str], seeds: Sequence[int], workdir: Path, results: Path, base: str, overrides: Sequence[str]
) -> list[Job]:
    """Returns the jobs, those of the first seed first; a system that learns nothing has one.

    Args:
      systems: names of files in `SYSTEMS`, of `UNTRAINED`, or paths of config files.
      base: the config that the systems take models, data and number of steps from.
      overrides: `--config.KEY=VALUE`, of every system.

    Raises:
      UserError: an unknown system, one named twice, a config that is wrong, or data that is missing or lacks what a
        system reads; before anything is trained.
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
            if seed == seeds[0]:
                _check(name, config)
            place = f"{Path(name).stem}-seed-{seed}"
            jobs.append(Job(Path(name).stem, seed, "steps", config, workdir / place, results / f"{place}.json"))
    if len({(job.system, job.seed) for job in jobs}) < len(jobs):
        raise UserError(f"--systems {','.join(systems)}: two have the same name")
    return jobs


def _check(name: str, config: Config) -> None:
    check(config)
    if name == "cascade":
        whisper_of(config)
    elif name == "oracle":
        for path in config.eval.sets.values():
            for row in load_manifest(path):
                written_request(row)
    else:
        check_rows(system.build(config))


def equal_time(jobs: Sequence[Job], timing: Mapping[str, Any]) -> list[Job]:
    """Returns for each job of another length one with as many steps as the first system's training has time for.

    Every stage keeps its share of the steps. Times that were taken anew change nothing of a result that is there, as
    long as its steps are as many within `SAME`.

    Args:
      jobs: of `equal_steps`.
      timing: of `timing.measure`, of the same systems.
    """
    factors = time_factors(timing)
    out = []
    for job in jobs:
        factor = factors.get(job.system, 1.0)
        if abs(factor - 1) < SAME:
            continue
        place = f"{job.system}-time-seed-{job.seed}"
        where = {"workdir": job.workdir.with_name(place), "output": job.output.with_name(f"{place}.json")}
        before = _factor_of(where["output"])
        if before is not None and abs(before / factor - 1) < SAME:
            factor = before
        config = job.config.copy_and_resolve_references()
        for name in config.train.schedule:
            stage = config.train.stages[name]
            stage.steps = max(1, round(factor * stage.steps))
        config.train.steps = round(factor * config.train.steps)
        out.append(dataclasses.replace(job, budget="time", config=config, factor=factor, **where))
    return out


def _factor_of(result: Path) -> float | None:
    """Returns what a result's number of steps was multiplied by; None if there is none yet."""
    try:
        return json.loads(result.read_text()).get("factor") if result.is_file() else None
    except ValueError as error:
        raise UserError(f"{result}: no result of a comparison: delete it") from error


def time_factors(timing: Mapping[str, Any]) -> dict[str, float]:
    """Returns of each trained system how many of its schedules the first one's training takes, in time.

    What a run computes before its first step counts: a teacher's pass over the training clips is time, too.
    """
    trained = {name: of for name, of in timing["systems"].items() if "schedule_seconds" in of}
    whole = [of["preparation_seconds"] + of["schedule_seconds"] for of in trained.values()]
    left = {name: whole[0] - of["preparation_seconds"] for name, of in trained.items()}
    return {name: round(max(left[name], 0.0) / of["schedule_seconds"], 2) for name, of in trained.items()}


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
