"""What a distil-only step costs beside the full one, on the quickstart's batches: `python benchmarks/step_cost.py`.

Writes results/step_cost.json: both steps in turn on batches of the same bucket, so that a noisy machine slows both; and
the share of the full step's multiplications that the adapted blocks make. In float32, where every product costs alike,
the ratio of times should not exceed it. The quickstart rounds the operands of products with frozen weights to bfloat16,
which makes the full step cheaper by more: LoRA, in the adapted blocks, stays in float32.
"""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import arms
import jax

from aura_jax import checkpoint, config, sharding, system
from aura_jax.data.batch import Batch
from aura_jax.train import step as step_lib
from aura_jax.train.inputs import Inputs

ROUNDS = 20
OBJECTIVES = {"distil": {"distill": 1.0}, "full": {"lm": 1.0, "distill": 1.0}}


def main() -> None:
    results = {dtype: measure(dtype) for dtype in ("float32", "bfloat16")}
    about = {"command": "python benchmarks/step_cost.py", "rounds": ROUNDS, "matmul_dtype": results}
    arms.write("step_cost", "Seconds of a distil-only step and of a full step, in turn", about)
    for dtype, result in results.items():
        share = result["adapted_blocks_share_of_multiplications"]
        print(f"{dtype}: distil-only / full {result['ratio']['median']:.2f}; the adapted blocks' share {share:.2f}")


def measure(matmul_dtype: str) -> dict[str, Any]:
    """Returns the times of both steps, their ratio, and the adapted blocks' share."""
    c = config.load(["--config=configs/quickstart.py", f"--config.model.matmul_dtype={matmul_dtype}"])
    c.distill.target_norm, c.data.speeds, c.data.buckets = "none", (1.0,), (max(c.data.buckets),)
    mesh, built = checkpoint.system_mesh(c), system.build(c)
    with tempfile.TemporaryDirectory() as workdir, jax.set_mesh(mesh):
        inputs, variables = Inputs(built, Path(workdir)), system.initial_variables(built, mesh)
        inputs.precompute_teacher(variables["teacher"], checkpoint.fingerprint(variables["teacher"]))
        paths = sharding.flatten({k: v for k, v in variables.items() if k != "teacher"})
        rates = sharding.learning_rates(paths, c.trainable)
        trained, frozen = sharding.split(variables, rates)
        runs: dict[str, Any] = {}
        for name, objectives in OBJECTIVES.items():
            stage = config.stage(100, 1e-3, objectives)
            batch = inputs.to_mesh(next(inputs.batches(frozenset(objectives), 0)), mesh)
            state = step_lib.new_state(c, trained, 0, mesh)
            runs[name] = [step_lib.jit_step(built, stage, 0, rates, mesh), state, batch, []]
        for i in range(ROUNDS + 1):
            for run in runs.values():
                start = time.perf_counter()
                run[1], _ = jax.block_until_ready(run[0](run[1], frozen, step_lib.Constants(), run[2]))
                if i:  # the first compiles
                    run[3].append(time.perf_counter() - start)
    distil, full = runs["distil"][3], runs["full"][3]
    ratios = sorted(a / b for a, b in zip(distil, full, strict=True))
    return {
        "batch": {name: list(run[2].tokens_BxT.shape) for name, run in runs.items()},
        "median_seconds": {name: statistics.median(run[3]) for name, run in runs.items()},
        "ratio": {"median": statistics.median(ratios), "low": ratios[0], "high": ratios[-1]},
        "adapted_blocks_share_of_multiplications": adapted_share(built, trained, runs["full"][2]),
    }


def adapted_share(built: system.System, trained: dict[str, jax.Array], full: Batch) -> float:
    """Returns the share of multiplications by frozen kernels and LoRA, forward and backward, that adapted blocks make.

    A frozen kernel costs a product forward and one backward, a trained matrix one forward and two backward; the head is
    computed once more in the backward pass, at the targets alone.
    """
    c = built.model.config.llm
    block = c.width * c.head_width * 2 * (c.n_heads + c.n_kv_heads) + 3 * c.width * c.mlp_width
    lora = sum(x.size for path, x in trained.items() if path.startswith("lora/"))
    n_adapted = built.model.config.lora.n_blocks
    tokens, targets = full.tokens_BxT.size, full.target_id_BxR.size
    adapted = tokens * (2 * n_adapted * block + 3 * lora)
    rest = tokens * 2 * (c.n_blocks - n_adapted) * block + targets * 3 * c.width * c.vocab
    return adapted / (adapted + rest)


if __name__ == "__main__":
    main()
