"""`aura-jax bench train`: one train step in jax beside the same step in plain torch, transformers and PEFT.

Every arm is a process of its own; all read the same batches, weights, lengths, objectives and optimizer. Before
anything is timed, the losses and gradient norms of all arms in float32 must agree. Then the arms take turns, batch by
batch in rotating order, and only one computes at a time: what else the machine does slows all alike.
"""

import dataclasses
import importlib.util
import json
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from aura_jax import machine
from aura_jax.errors import UserError
from aura_jax.experiments.bench import flops, train_cases, train_report
from aura_jax.experiments.bench.protocol import Worker, WorkerFailed
from aura_jax.experiments.bench.train_cases import Case, Measured, Point

PARITY = 1e-4  # relative, in float32
PEER = Path("benchmarks/peers/worker.py")


@dataclasses.dataclass(frozen=True)
class Arm:
    """A way to compute the step: `library` "jax" is ours, "torch" the peer."""

    name: str
    library: str
    precision: str
    compiled: bool

    @property
    def command(self) -> list[str]:
        return [
            sys.executable,
            *(["-m", "aura_jax.experiments.bench.worker"] if self.library == "jax" else [str(PEER)]),
        ]


REFERENCE = Arm("torch, eager, float32", "torch", "float32", False)
OURS = Arm("ours, float32", "jax", "float32", True)
ARMS = (
    REFERENCE,
    Arm("torch, compiled, float32", "torch", "float32", True),
    Arm("torch, eager, bfloat16", "torch", "bfloat16", False),
    OURS,
    Arm("ours, bfloat16", "jax", "bfloat16", True),
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much is measured: the quickstart's batches, and the points of the sweep, one factor at a time."""

    config: tuple[str, ...]
    per_bucket: int
    rounds: int
    base: Point
    factors: Mapping[str, Sequence[float]]
    sweep_rounds: int
    matmul_size: int
    matmul_seconds: float
    arms: tuple[Arm, ...] = ARMS

    def points(self) -> dict[str, list[Point]]:
        field = {"rows": "n_rows", "seconds": "seconds", "adapted blocks": "n_blocks", "rank": "rank"}
        return {
            factor: [dataclasses.replace(self.base, **{field[factor]: value}) for value in values]
            for factor, values in self.factors.items()
        }


FULL = Plan(
    config=("--config=configs/quickstart.py",),
    per_bucket=2,
    rounds=4,
    base=Point(8, 4.0, 12, 64),
    factors={
        "rows": (4, 8, 16, 32),
        "seconds": (2.0, 4.0, 8.0, 15.0),
        "adapted blocks": (6, 12, 24, 30),
        "rank": (16, 64, 256),
    },
    sweep_rounds=2,
    matmul_size=2048,
    matmul_seconds=3.0,
)
QUICK = Plan(
    config=("--config=configs/smoke.py", "--config.teacher.precompute=False"),
    per_bucket=1,
    rounds=2,
    base=Point(2, 1.0, 2, 8),
    factors={"rows": (2,), "rank": (8,)},
    sweep_rounds=2,
    matmul_size=256,
    matmul_seconds=0.1,
    arms=(REFERENCE, OURS),
)


def main(output: Path, quick: bool = False, figure: Path | None = None) -> int:
    """Measures, writes `output` (JSON) and the figure, prints the table; returns an exit code.

    Args:
      quick: random tiny models and few batches: shows that it works, measures nothing worth quoting.
      figure: an .svg or .png; None: beside `output`.

    Raises:
      UserError: torch or the peer is missing, a file cannot be written, or the arms disagree.
    """
    figure = figure or output.with_suffix(".svg")
    check(output, figure)
    clock = time.perf_counter()
    plan = QUICK if quick else FULL
    with tempfile.TemporaryDirectory(prefix="aura-bench-") as folder:
        results = measure(plan, Path(folder))
    results = {
        "what": "One train step in jax and in torch, transformers and PEFT: the same weights, batches and optimizer",
        "command": shlex.join(["aura-jax", *sys.argv[1:]]),
        "machine": machine.describe(),
        "seconds": time.perf_counter() - clock,
        **results,
    }
    partial = output.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1) + "\n")
    partial.replace(output)
    train_report.draw(results, figure)
    print(train_report.table(results))
    print(f"wrote {output} and {figure}")
    return 0


def check(output: Path, figure: Path) -> None:
    """Raises UserError for whatever would stop the measurement, before it starts."""
    if not PEER.is_file():
        raise UserError(f"no {PEER}: run this from the root of the repository")
    missing = [name for name in ("torch", "peft") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f'the peer needs {" and ".join(missing)}: pip install -e ".[torch]"')
    if figure.suffix not in (".svg", ".png"):
        raise UserError(f"{figure}: a figure is an .svg or a .png")
    for path in (output, figure):
        if not path.parent.is_dir():
            raise UserError(f"{path}: there is no folder {path.parent}: make it, or name another")


def measure(plan: Plan, folder: Path) -> dict[str, Any]:
    """Returns everything that is measured, as it is written."""
    c = train_cases.base_config(plan.config)
    case = train_cases.of_run(c, folder / "base", plan.per_bucket)
    base = base_case(plan, case, folder)
    sweep = {}
    for factor, points in plan.points().items():
        sweep[factor] = [
            {"value": value, "name": train_cases.point_name(point)}
            for value, point in zip(plan.factors[factor], points, strict=True)
        ]
    measured = sweep_points(plan, c, folder)
    for entries in sweep.values():
        for entry in entries:
            entry |= measured[entry.pop("name")]
    return {"config": plan.config, "base": base, "sweep": sweep}


class Running:
    """An arm's process on a case, with the seconds of its start and of the first step on every batch."""

    def __init__(self, arm: Arm, case: Case, folder: Path):
        self.arm, self.case = arm, case
        name = f"{arm.name.replace(', ', '-')}-{case.directory.name}"
        # Compilers start with nothing kept from earlier runs.
        caches = {
            "JAX_COMPILATION_CACHE_DIR": str(folder / f"{name}-jax"),
            "TORCHINDUCTOR_CACHE_DIR": str(folder / f"{name}-inductor"),
        }
        clock = time.perf_counter()
        self.worker = Worker(arm.command, caches, folder / f"{name}.log")
        self.worker.ask("ready")
        self.start = {"imports": time.perf_counter() - clock}
        clock = time.perf_counter()
        self.about = self.worker.ask("load", case=str(case.directory), precision=arm.precision, compiled=arm.compiled)
        self.start["load"] = time.perf_counter() - clock
        self.first: dict[str, dict[str, Any]] = {}

    def take_first_steps(self) -> None:
        """Steps once on every batch, always from the case's weights: compiles, and shows what the losses are."""
        for batch in self.case.batches:
            self.worker.ask("reset")
            self.first[batch.name] = self.worker.ask("step", batch=batch.name)


@contextmanager
def started(arms: Sequence[Arm], case: Case, folder: Path) -> Iterator[tuple[list[Running], dict[str, str]]]:
    """Starts the arms one after the other, and checks that they agree; yields them, and why any failed.

    Only a compiled peer may fail; it is then left out.
    """
    with ExitStack() as stack:
        running, failed = [], {}
        for arm in arms:
            print(f"starting {arm.name} on {case.directory.name}", file=sys.stderr, flush=True)
            one = Running(arm, case, folder)
            stack.callback(one.worker.close)
            try:
                one.take_first_steps()
            except WorkerFailed as error:
                if not (arm.library == "torch" and arm.compiled):
                    raise
                failed[arm.name] = str(error)
                one.worker.close()
                continue
            running.append(one)
        check_agreement(running)
        yield running, failed


def disagreement(one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[float, str]:
    """Returns the largest relative difference of two arms' metrics on first steps, and where it is."""
    return max(
        (abs(other[batch]["metrics"][name] - value) / max(abs(value), 1e-12), f"{name} of batch {batch!r}")
        for batch, step in one.items()
        for name, value in step["metrics"].items()
    )


def check_agreement(running: Sequence[Running]) -> None:
    """Raises UserError if an arm in float32 does not compute what the first one does: it must not be timed."""
    reference = running[0]
    for one in running[1:]:
        difference, where = disagreement(reference.first, one.first)
        if one.arm.precision == "float32" and not difference <= PARITY:
            raise UserError(
                f"{one.arm.name!r} disagrees with {reference.arm.name!r}: {where} differs by {difference:.1e} "
                f"(allowed: {PARITY:g}): different steps are not timed"
            )


def take_turns(running: Sequence[Running], batches: Sequence[str], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Returns {arm: {batch: seconds of each round}}; the arm that goes first changes from step to step."""
    seconds = {one.arm.name: {batch: [] for batch in batches} for one in running}
    for turn in range(rounds):
        for i, batch in enumerate(batches):
            first = (turn + i) % len(running)
            for one in (*running[first:], *running[:first]):
                seconds[one.arm.name][batch].append(one.worker.ask("step", batch=batch)["seconds"])
    return seconds


def base_case(plan: Plan, case: Case, folder: Path) -> dict[str, Any]:
    """Returns what every arm does with the quickstart's own batches."""
    with started(plan.arms, case, folder) as (running, failed):
        peaks: dict[str, dict[str, float]] = {}
        for one in running:
            peaks.setdefault(one.arm.library, {})
            found = one.worker.ask("matmul", size=plan.matmul_size, seconds=plan.matmul_seconds)
            for dtype, value in found.items():
                peaks[one.arm.library][dtype] = max(value, peaks[one.arm.library].get(dtype, 0.0))
            one.worker.ask("watch")
        print("the arms take turns", file=sys.stderr, flush=True)
        seconds = take_turns(running, [batch.name for batch in case.batches], plan.rounds)
        peak = {dtype: max(of_library[dtype] for of_library in peaks.values()) for dtype in ("float32", "bfloat16")}
        arms = {one.arm.name: arm_result(one, seconds[one.arm.name], peak, running[0]) for one in running}
    return {
        "batches": [batch_result(batch) for batch in case.batches],
        "steps_of_bucket": {
            stage: {str(b): n for b, n in counts.items()} for stage, counts in case.steps_of_bucket.items()
        },
        "matmul_flops_per_second": peaks,
        "arms": arms,
        "failed": failed,
        "ratios": ratios(running, seconds, case, arms),
    }


def batch_result(batch: Measured) -> dict[str, Any]:
    parts = {name: dataclasses.asdict(cost) for name, cost in batch.parts.items()}
    return {**dataclasses.asdict(batch), "parts": parts, "flops": flops.total(batch.parts).total}


def arm_result(one: Running, seconds: Mapping[str, Sequence[float]], peak: Mapping[str, float], reference: Running):
    """Returns one arm's speed by stage, its start, its memory, and the schedule's time that follows from them."""
    batches, stages = one.case.batches, {}
    for stage in dict.fromkeys(batch.stage for batch in batches):
        of_stage = [batch for batch in batches if batch.stage == stage]
        spent = {batch.name: statistics.median(seconds[batch.name]) for batch in of_stage}
        whole = sum(spent.values())
        work = sum(flops.total(batch.parts).total for batch in of_stage)
        stages[stage] = {
            "seconds_per_step": whole / len(of_stage),
            "tokens_per_second": sum(batch.tokens for batch in of_stage) / whole,
            "audio_seconds_per_second": sum(batch.audio_seconds for batch in of_stage) / whole,
            "flops_per_second": work / whole,
            "share_of_matmul_peak": work / whole / peak[one.arm.precision],
        }
    first = {batch.name: one.first[batch.name]["seconds"] for batch in batches}
    difference, where = disagreement(reference.first, one.first)
    start = {**one.start, "first_step": first[batches[0].name]}
    return {
        **dataclasses.asdict(one.arm),
        **one.about,
        "stages": stages,
        "seconds": {name: list(values) for name, values in seconds.items()},
        "start_seconds": {**start, "total": sum(start.values())},
        "first_step_seconds": first,
        "peak_memory_bytes": one.worker.ask("peak"),
        "difference": {"largest": difference, "of": where},
        "schedule": schedule(one, seconds, first),
    }


def schedule(one: Running, seconds: Mapping[str, Sequence[float]], first: Mapping[str, float]) -> dict[str, Any]:
    """Returns the seconds of the whole schedule, computed from measured parts.

    Start-up, what the first step of every shape took beyond a later one, and the steps of each bucket at its mean time;
    without reading data, checkpoints and evaluation.
    """
    steps = compiling = 0.0
    for stage, counts in one.case.steps_of_bucket.items():
        for bucket, n in counts.items():
            batches = [b for b in one.case.batches if (b.stage, b.bucket_seconds) == (stage, bucket)]
            mean = statistics.mean(statistics.median(seconds[batch.name]) for batch in batches)
            steps += n * mean
            compiling += max(0.0, first[batches[0].name] - mean)
    start = sum(one.start.values())
    total = start + compiling + steps
    return {"computed_from": "measured parts", "start": start, "compiling": compiling, "steps": steps, "total": total}


def ratios(
    running: Sequence[Running],
    seconds: Mapping[str, Mapping[str, Sequence[float]]],
    case: Case,
    arms: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns how many times as fast each of ours is as each peer, {ours: {peer: {stage or "memory": ...}}}."""
    out: dict[str, Any] = {}
    for ours in [one.arm.name for one in running if one.arm.library == "jax"]:
        out[ours] = {}
        for peer in [one.arm.name for one in running if one.arm.library == "torch"]:
            stages = {}
            for stage in dict.fromkeys(batch.stage for batch in case.batches):
                names = [batch.name for batch in case.batches if batch.stage == stage]
                pairs = [pair for name in names for pair in zip(seconds[peer][name], seconds[ours][name], strict=True)]
                stages[stage] = spread([theirs / own for theirs, own in pairs])
            memory = [arms[name]["peak_memory_bytes"]["since_watch"] for name in (ours, peer)]
            out[ours][peer] = {"speed": stages, "memory": memory[0] / memory[1] if all(memory) else None}
    return out


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def sweep_points(plan: Plan, c: Any, folder: Path) -> dict[str, dict[str, Any]]:
    """Returns {name of a point: seconds of both arms, their ratio, and the work}; a model's points share processes."""
    by_model: dict[tuple[int, int], list[Point]] = {}
    for point in dict.fromkeys(point for points in plan.points().values() for point in points):
        by_model.setdefault((point.n_blocks, point.rank), []).append(point)
    out = {}
    for (n_blocks, rank), points in by_model.items():
        # From small to large: what an allocator keeps of a larger batch would count for a smaller one.
        points = sorted(points, key=lambda point: point.n_rows * point.seconds)
        case = train_cases.of_point(c, points, folder / f"{n_blocks}-blocks-rank-{rank}")
        with started((REFERENCE, OURS), case, folder) as (running, _):
            for batch in case.batches:
                for one in running:
                    one.worker.ask("watch")
                seconds = take_turns(running, [batch.name], plan.sweep_rounds)
                theirs, own = (seconds[arm.name][batch.name] for arm in (REFERENCE, OURS))
                memory = {one.arm.name: one.worker.ask("peak")["since_watch"] for one in running}
                out[batch.name] = {
                    "seconds": {REFERENCE.name: theirs, OURS.name: own},
                    "speed": spread([a / b for a, b in zip(theirs, own, strict=True)]),
                    "first_step_seconds": {one.arm.name: one.first[batch.name]["seconds"] for one in running},
                    "peak_memory_bytes": memory,
                    "flops": flops.total(batch.parts).total,
                    "parts": {name: cost.total for name, cost in batch.parts.items()},
                }
    return out
