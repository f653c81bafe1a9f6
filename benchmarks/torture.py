"""Kills a training run at random moments and damages its checkpoints in between: benchmarks/results/torture.json.

    python benchmarks/torture.py --work runs/torture

`aura-jax train` on random tiny models, round by round: it starts, resumes, and is killed (SIGKILL) or told to stop
(SIGTERM), while it starts or while it takes steps. Then, at times, a file of a checkpoint is cut short, altered in one
bit, or deleted; one checkpoint at least is left alone. Each round is checked against a run that nothing interrupted:

  - lost steps: steps taken before the signal, less the step that the run resumes at. No more than one save interval;
  - after damage, it resumes at the newest undamaged checkpoint or a later one, and says which were damaged;
  - corrupt restores: a step whose losses and norms are not those of the uninterrupted run, to the bit;
  - orphaned files: files in the workdir, after an orderly end, that the uninterrupted run has not (but for corrupt/).

The same command goes on where it was interrupted. Exit code 1 if anything was wrong.
"""

import argparse
import collections
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from aura_jax import machine

ROOT = Path(__file__).parents[1]
EVERY, KEEP, KEEP_EVERY, STEPS = 5, 3, 20, 60
CONFIG = (
    "--config=configs/smoke.py",
    "--config.data.text_pool=",
    "--config.data.validation_values=()",
    "--config.data.speeds=(1.0,)",
    "--config.lora.text_energy=1.0",
    "--config.train.schedule=('joint',)",
    "--config.train.stages.joint.objectives.text_anchor=0.0",
    f"--config.train.stages.joint.steps={STEPS}",
    f"--config.train.checkpoint_every={EVERY}",
    f"--config.train.keep={KEEP}",
    f"--config.train.keep_every={KEEP_EVERY}",
    "--config.train.eval_every=0",
    "--config.train.profile_steps=0",
)
STOPPED = 75  # the exit code after SIGTERM
KINDS = ("truncate", "flip", "delete")
# What happens in the first rounds: a short test sees each signal, and damage.
FIRST = (
    ("SIGKILL", "training", ("truncate",)),
    ("SIGTERM", "training", ("delete",)),
    ("SIGKILL", "starting", ()),
    ("SIGKILL", "training", ("flip", "flip")),
    ("SIGTERM", "training", ()),
)
STEPS_OF_ROUND, SECONDS_BETWEEN = 20, 0.3  # a signal comes at most so many steps and seconds after the first step
LONGEST = 600  # seconds of a round: beyond it, it hangs


def plan(seed: int, index: int) -> tuple[str, str, tuple[str, ...]]:
    """Returns the signal of a round, when it comes, and what is done to checkpoints after it."""
    if index < len(FIRST):
        return FIRST[index]
    rng = random.Random(f"{seed}/{index}/plan")
    name = rng.choices(("SIGKILL", "SIGTERM"), (3, 2))[0]
    moment = rng.choices(("training", "starting"), (5, 1))[0]
    return name, moment, tuple(rng.choice(KINDS) for _ in range(rng.choices((0, 1, 2), (5, 4, 1))[0]))


def start(workdir: Path, log: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "aura_jax.cli", "train", *CONFIG, "--workdir", str(workdir)]
    with log.open("w") as file:
        return subprocess.Popen(
            command, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, stdout=file, stderr=subprocess.STDOUT
        )


def whole_lines(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def steps_taken(workdir: Path) -> dict[int, dict[str, float]]:
    """Returns {step: what must be the same in every run} of a workdir's metrics."""
    exact = lambda line: {k: v for k, v in line.items() if k.startswith("loss") or k in ("grad_norm", "learning_rate")}
    return {line["step"]: exact(line) for line in whole_lines(workdir / "metrics.jsonl") if "loss" in line}


def saved_steps(workdir: Path) -> list[int]:
    folder = workdir / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []


def kinds_of_files(workdir: Path) -> dict[str, str]:
    """Returns {what kind of file it is: one of its paths}, but for corrupt/: numbers and random names do not count."""
    found = {}
    for path in sorted(workdir.rglob("*")):
        name = str(path.relative_to(workdir))
        if path.is_file() and not name.startswith("corrupt/"):
            kind = re.sub(r"[0-9a-f]{32}$", "RANDOM", re.sub(r"^checkpoints/\d+/", "checkpoints/STEP/", name))
            found[re.sub(r"tfevents\..*", "tfevents", kind)] = name
    return found


def checksums(workdir: Path) -> dict[str, str]:
    """Returns the checksums of what a finished run's last checkpoint holds."""
    values = json.loads((workdir / "checkpoints" / str(STEPS) / "meta" / "metadata").read_text())["checksums"]
    return {name: values[name] for name in ("own", "rest")}


def damage(path: Path, kind: str, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    if kind == "delete":
        path.unlink()
    elif kind == "truncate":
        path.write_bytes(data[: rng.randrange(max(len(data), 1))])
    elif data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)


class Torture:
    """The rounds, and what they left to be checked.

    Attributes:
      rounds: what happened in each, and what was wrong.
    """

    def __init__(self, work: Path, seed: int):
        self.work, self.seed, self._state_file = work, seed, work / "state.json"
        (work / "logs").mkdir(parents=True, exist_ok=True)
        state = json.loads(self._state_file.read_text()) if self._state_file.is_file() else {}
        if state.get("seed", seed) != seed:
            raise SystemExit(f"{work} was begun with --seed {state['seed']}: give another --work")
        self.rounds: list[dict[str, Any]] = state.get("rounds", [])
        self._run = state.get("run", 0) + 1  # a new one: whoever interrupted us may have left a process in the last
        self._left: dict[str, Any] | None = None  # by the round before, in the same workdir
        self._starting = 5.0  # seconds from the start to the first step
        self._make_reference()

    def _make_reference(self) -> None:
        workdir = self.work / "reference"
        if len(steps_taken(workdir)) < STEPS:
            shutil.rmtree(workdir, ignore_errors=True)
            if start(workdir, self.work / "logs" / "reference.txt").wait():
                raise SystemExit(f"the uninterrupted run failed: see {self.work / 'logs' / 'reference.txt'}")
        self._reference, self._files = steps_taken(workdir), kinds_of_files(workdir)
        self._checksums = checksums(workdir)

    def round(self) -> dict[str, Any]:
        """Starts, interrupts, checks and damages a run; returns what happened."""
        index = len(self.rounds)
        name, moment, kinds = plan(self.seed, index)
        rng = random.Random(f"{self.seed}/{index}")
        workdir, log = self.work / f"run-{self._run}", self.work / "logs" / f"{index}.txt"
        begun = time.monotonic()
        seen, code, resumed = self._interrupt(workdir, log, name, moment, rng)
        taken = steps_taken(workdir)
        out = {
            "signal": name,
            "moment": moment,
            "code": code,
            "resumed_at": resumed,
            "taken": max(taken, default=0),
            "seconds": round(time.monotonic() - begun, 1),
        }
        said = log.read_text().count("is damaged")
        out["set_aside"] = said
        wrong = list(self._check_code(out, seen))
        wrong += self._check_resumed(out)
        differ = [step for step in taken if taken[step] != self._reference[step]]
        out["corrupt"] = len(differ)
        if differ:
            wrong.append(f"step {differ[0]} is not that of the uninterrupted run")
        if list(taken) != list(range(1, len(taken) + 1)):
            wrong.append("metrics.jsonl lacks steps, or has some twice")
        if code in (0, STOPPED):
            out["orphans"] = list(self._orphans(workdir))
            wrong += [f"orphaned: {path}" for path in out["orphans"]]
        if code == 0 and checksums(workdir) != self._checksums:
            wrong.append("the finished run's weights are not those of the uninterrupted run")
        out["wrong"] = wrong
        if wrong or code == 0:
            self._run, self._left = self._run + 1, None
            if not wrong:  # what went wrong stays to be looked at
                shutil.rmtree(workdir)
        else:
            if resumed is not None or self._left is None:
                # Damaged checkpoints that are older than what it resumed at are still there.
                damaged = [step for step in self._left["damaged"] if step < resumed] if self._left else []
                unfinished = any((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"))
                self._left = {"code": code, "taken": out["taken"], "unfinished": unfinished, "damaged": damaged}
            self._left["saved"] = saved_steps(workdir)
            out["damaged"] = [done for kind in kinds if (done := self._damage(workdir, kind, rng))]
        self.rounds.append(out)
        self._write_state()
        return out

    def _interrupt(
        self, workdir: Path, log: Path, name: str, moment: str, rng: random.Random
    ) -> tuple[bool, int | None, int | None]:
        """Returns whether it was seen to train before the signal, the exit code, and the step that it resumed at."""
        commands = len(whole_lines(workdir / "commands.jsonl"))
        process, begun = start(workdir, log), time.monotonic()
        first: int | None = None
        n_steps = rng.randint(1, STEPS_OF_ROUND)

        def stepped() -> bool:
            nonlocal first
            if first is None and len(lines := whole_lines(workdir / "commands.jsonl")) > commands:
                first = lines[-1]["first_step"]
            return first is not None and max(steps_taken(workdir), default=0) >= first + n_steps

        if moment == "starting":
            wait(process, lambda: False, rng.uniform(0, self._starting))
        else:
            wait(process, stepped, LONGEST)
            self._starting = time.monotonic() - begun
            wait(process, lambda: False, rng.uniform(0, SECONDS_BETWEEN))
        seen = stepped()
        process.send_signal(getattr(signal, name))
        try:
            code = process.wait(LONGEST)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = None
        stepped()
        return seen, code, first

    def _check_code(self, out: dict[str, Any], seen: bool) -> Iterator[str]:
        expected = {0, -signal.SIGKILL} if out["signal"] == "SIGKILL" else {0, STOPPED}
        if out["signal"] == "SIGTERM" and (not seen or out["taken"] == STEPS):
            expected.add(-signal.SIGTERM)  # nobody listens yet, or any more
        if out["code"] not in expected:
            yield f"exit code {out['code']}"

    def _check_resumed(self, out: dict[str, Any]) -> Iterator[str]:
        """Checks where a round went on against what the one before left."""
        left, resumed = self._left, out["resumed_at"]
        if resumed is None:
            return
        left = left or {"taken": 0, "saved": [], "damaged": [], "unfinished": False, "code": None}
        intact = [step for step in left["saved"] if step not in left["damaged"]]
        out["lost"] = left["taken"] - resumed
        out["after_damage"], out["while_saving"] = bool(left["damaged"]), left["unfinished"]
        if resumed not in (left["saved"] or [0]) or resumed < max(intact, default=0):
            yield f"resumed at {resumed}, with {left['saved']} saved and {left['damaged']} of them damaged"
        if resumed < max(left["saved"], default=0) and not out["set_aside"]:
            yield f"resumed at {resumed} of {left['saved']} and did not say why"
        most = 0 if left["code"] == STOPPED else EVERY
        if not left["damaged"] and out["lost"] > most:
            yield f"lost {out['lost']} steps"

    def _orphans(self, workdir: Path) -> Iterator[str]:
        for kind, path in kinds_of_files(workdir).items():
            if kind not in self._files:
                yield path
        saved = saved_steps(workdir)
        yield from (f"checkpoints/{step}" for step in saved[:-KEEP] if step % KEEP_EVERY)

    def _damage(self, workdir: Path, kind: str, rng: random.Random) -> list | None:
        """Damages a file of a checkpoint, mostly the newest; returns its step, its name and how."""
        assert self._left is not None
        damaged = self._left["damaged"]
        intact = [step for step in saved_steps(workdir) if step not in damaged]
        if len(intact) < 2:
            return None
        step = intact[-1] if rng.random() < 0.75 else rng.choice(intact)
        folder = workdir / "checkpoints" / str(step)
        file = rng.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
        damage(file, kind, rng)
        damaged.append(step)
        return [step, kind, str(file.relative_to(folder))]

    def _write_state(self) -> None:
        partial = self._state_file.with_suffix(".partial")
        partial.write_text(json.dumps({"seed": self.seed, "run": self._run, "rounds": self.rounds}))
        partial.replace(self._state_file)


def wait(process: subprocess.Popen, until: Callable[[], bool], seconds: float) -> None:
    """Waits until a condition holds, the process ends, or the time is up."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None and not until():
        time.sleep(0.02)


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the counts of all rounds."""
    count = lambda values: dict(sorted(collections.Counter(map(str, values)).items()))
    most = lambda lost: max(lost, default=0)
    known = [r for r in rounds if "lost" in r]
    damages = [damage for r in rounds for damage in r.get("damaged", ())]
    return {
        "rounds": len(rounds),
        "wrong": [f"round {i}: {what}" for i, r in enumerate(rounds) for what in r["wrong"]],
        "corrupt restores": sum(bool(r["corrupt"]) for r in rounds),
        "orphaned files": sum(len(r.get("orphans", ())) for r in rounds),
        "signals": count(f"{r['signal']} while {r['moment']}" for r in rounds),
        "exit codes": {
            name: count(r["code"] for r in rounds if r["signal"] == name) for name in ("SIGKILL", "SIGTERM")
        },
        "finished runs": sum(r["code"] == 0 for r in rounds),
        "files damaged": count(kind for _, kind, _ in damages),
        "checkpoints set aside": sum(r["set_aside"] for r in rounds),
        "save interval, steps": EVERY,
        "most steps lost": {
            "no save under way": most(r["lost"] for r in known if not r["after_damage"] and not r["while_saving"]),
            "during a save": most(r["lost"] for r in known if not r["after_damage"] and r["while_saving"]),
            "after damage": most(r["lost"] for r in known if r["after_damage"]),
        },
        "resumed": len(known),
    }


def main(argv: list[str] | None = None) -> int:
    """Goes on until there are enough rounds; returns 0 if nothing was wrong in any."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/torture"), help="where the workdirs and logs go")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "torture.json")
    args = parser.parse_args(argv)
    torture = Torture(args.work.absolute(), args.seed)
    while len(torture.rounds) < args.rounds:
        print(json.dumps(torture.round()), flush=True)
    found = summary(torture.rounds)
    out = {
        "command": f"python benchmarks/torture.py --rounds {len(torture.rounds)} --seed {args.seed}",
        "machine": machine.describe(),
        "results": found,
    }
    args.output.write_text(json.dumps(out, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    return bool(found["wrong"])


if __name__ == "__main__":
    sys.exit(main())
