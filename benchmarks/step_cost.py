"""What a distil-only step costs beside the full one, and where their time goes: `python benchmarks/step_cost.py`.

Writes results/step_cost.json: steps in turn on the quickstart's batches of one bucket, so that a noisy machine slows
all; how long each part of them kept the cores busy; the operations that each part must do; and what rematerialisation
costs and saves. In float32, where every product costs alike, the ratio of times should not exceed that of operations.
The quickstart rounds the operands of products with frozen weights to bfloat16, which makes the full step cheaper by
more: LoRA stays in float32.
"""

import dataclasses
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import arms
import jax

from aura_jax import checkpoint, config, sharding, system
from aura_jax.data.batch import Batch
from aura_jax.experiments.bench import flops
from aura_jax.models.llm import REMAT
from aura_jax.train import profile
from aura_jax.train import step as step_lib
from aura_jax.train.inputs import Inputs

ROUNDS, TRACED = 20, 4
OBJECTIVES = {"distil": {"distill": 1.0}, "full": {"lm": 1.0, "distill": 1.0, "text_anchor": 10.0}}


@dataclasses.dataclass
class Run:
    """A step and all it takes; `seconds` are those of the rounds."""

    built: system.System
    step: Any
    frozen: dict
    state: step_lib.State
    batch: Batch
    active: frozenset[str]
    seconds: list[float] = dataclasses.field(default_factory=list)

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.state, self.frozen, step_lib.Constants(), self.batch

    def take(self) -> None:
        self.state, _ = jax.block_until_ready(self.step(*self.arguments))


def main() -> None:
    dtypes = {dtype: measure(dtype) for dtype in ("float32", "bfloat16")}
    results = {"rounds": ROUNDS, "matmul_dtype": dtypes, "remat": rematerialisation()}
    about = "Seconds of a distil-only step and of a full step, in turn, of their parts, and of rematerialisation"
    arms.write("step_cost", about, {"command": "python benchmarks/step_cost.py", **results})
    for dtype, result in dtypes.items():
        print(f"{dtype}: distil-only / full {result['ratio']['median']:.2f}; of operations {result['operations']:.2f}")


def measure(matmul_dtype: str) -> dict[str, Any]:
    """Returns the times of both steps, their ratio, and what each is made of."""
    runs = prepare({name: (objectives, {"matmul_dtype": matmul_dtype}) for name, objectives in OBJECTIVES.items()})
    take_turns(runs)
    steps = {name: describe(run) for name, run in runs.items()}
    operations = steps["distil"]["operations_total"] / steps["full"]["operations_total"]
    return {"steps": steps, "ratio": ratio(runs["distil"], runs["full"]), "operations": operations}


def rematerialisation() -> dict[str, Any]:
    """Returns of each `model.remat` what a full step in float32 takes, and its time over that of "none"."""
    runs = prepare({remat: (OBJECTIVES["full"], {"remat": remat, "matmul_dtype": "float32"}) for remat in REMAT})
    take_turns(runs)
    out = {}
    for remat, run in runs.items():
        temporary = run.step.lower(*run.arguments).compile().memory_analysis().temp_size_in_bytes
        out[remat] = {
            "median_seconds": statistics.median(run.seconds),
            "over_none": ratio(run, runs["none"]),
            "temporary_bytes": temporary,
        }
    return out


def prepare(steps: dict[str, tuple[dict[str, float], dict[str, str]]]) -> dict[str, Run]:
    """Returns a run of each {name: (objectives, changed keys of `model`)}, on the first batch of the longest bucket."""
    runs = {}
    for name, (objectives, changes) in steps.items():
        c = config.load(["--config=configs/quickstart.py"])
        c.model.update(changes)
        c.distill.target_norm, c.data.speeds, c.data.buckets = "none", (1.0,), (max(c.data.buckets),)
        mesh, built = checkpoint.system_mesh(c), system.build(c)
        with tempfile.TemporaryDirectory() as folder, jax.set_mesh(mesh):
            inputs, variables = Inputs(built, Path(folder)), system.initial_variables(built, mesh)
            teacher = variables.pop("teacher")
            inputs.precompute_teacher(teacher, checkpoint.fingerprint(teacher))
            rates = sharding.learning_rates(sharding.flatten(variables), c.trainable)
            trained, frozen = sharding.split(variables, rates)
            stage, active = config.stage(100, 1e-3, objectives), frozenset(objectives)
            step = step_lib.jit_step(built, stage, 0, rates, mesh)
            batch = inputs.to_mesh(next(inputs.batches(active, 0)))
            runs[name] = Run(built, step, frozen, step_lib.new_state(c, trained, 0, mesh), batch, active)
    return runs


def take_turns(runs: dict[str, Run]) -> None:
    for i in range(ROUNDS + 1):
        for run in runs.values():
            start = time.perf_counter()
            run.take()
            if i:  # the first compiles
                run.seconds.append(time.perf_counter() - start)


def describe(run: Run) -> dict[str, Any]:
    """Returns a step's time, memory, and parts."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(TRACED):
                run.take()
        (trace,) = Path(folder).rglob("*.xplane.pb")
        compiled = run.step.lower(*run.arguments).compile()
        busy = profile.breakdown(trace, compiled.as_text())["seconds"]
    model, teacher, sizes = run.built.model.config, run.built.teacher_config, flops.Sizes.of(run.batch)
    parts = flops.step(model, teacher, run.built.pairs, sizes, run.active)
    memory = compiled.memory_analysis()
    return {
        "batch": list(run.batch.tokens_BxT.shape),
        "median_seconds": statistics.median(run.seconds),
        "busy_seconds": busy,
        "operations": {part: dataclasses.asdict(cost) for part, cost in parts.items()},
        "operations_total": flops.total(parts).total,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
    }


def ratio(one: Run, other: Run) -> dict[str, float]:
    ratios = sorted(a / b for a, b in zip(one.seconds, other.seconds, strict=True))
    return {"median": statistics.median(ratios), "low": ratios[0], "high": ratios[-1]}


if __name__ == "__main__":
    main()
