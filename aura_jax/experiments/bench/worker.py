"""Our arm of `aura-jax bench train`: `python -m aura_jax.experiments.bench.worker`, spoken to by `protocol`."""

import importlib.metadata
import json
import os
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aura_jax import checkpoint, config, sharding, system
from aura_jax.data.batch import Batch
from aura_jax.experiments.bench import protocol
from aura_jax.train import step as step_lib


class Arm:
    """The train step of this package on the batches of a case folder (see `cases`)."""

    def load(self, case: str, precision: str, compiled: bool) -> dict[str, Any]:
        """Reads weights and batches.

        Args:
          precision: "bfloat16" is `model.matmul_dtype`: operands of the products with frozen weights.
          compiled: True: jax compiles.
        """
        assert compiled
        c = config.from_json(Path(case) / "config.json")
        c.model.matmul_dtype = "bfloat16" if precision == "bfloat16" else ""
        about = json.loads((Path(case) / "case.json").read_text())
        self._mesh, built = checkpoint.system_mesh(c), system.build(c)
        with np.load(Path(case) / "weights.npz") as file:
            weights = dict(file)
        statistics = {name: jnp.asarray(weights.pop(f"statistics/{name}")) for name in ("mean", "std")}
        self._constants = step_lib.Constants(statistics=statistics)
        variables = system.initial_variables(built, self._mesh)
        if c.teacher.precompute:
            del variables["teacher"]
        rates = sharding.learning_rates(weights, c.trainable)
        # The case's weights in place of those just drawn.
        variables = sharding.join({path: jnp.asarray(x) for path, x in weights.items()}, variables)
        trained, self._frozen = sharding.split(variables, rates)
        with jax.set_mesh(self._mesh):
            self._state = step_lib.new_state(c, trained, 0, self._mesh)
            self._steps = {
                name: step_lib.jit_step(built, stage, 0, rates, self._mesh) for name, stage in config.stages(c)
            }
        self._start = jax.device_get(self._state)
        self._batches = {}
        for name, stage in about["batches"].items():
            with np.load(Path(case) / f"{name}.npz") as file:
                self._batches[name] = stage, Batch(**file)
        jax.block_until_ready(self._frozen)
        versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")}
        return {"versions": versions, "threads": len(os.sched_getaffinity(0))}

    def reset(self) -> dict[str, Any]:
        """Starts anew from the case's weights."""
        self._state = jax.device_put(self._start, step_lib.state_shardings(self._start, self._mesh))
        return {}

    def step(self, batch: str) -> dict[str, Any]:
        """Takes one step; from the batch in host memory to metrics in host memory."""
        stage, arrays = self._batches[batch]
        start = time.perf_counter()
        with jax.set_mesh(self._mesh):
            on_mesh = jax.device_put(arrays, sharding.batch_sharding(self._mesh))
            self._state, metrics = self._steps[stage](self._state, self._frozen, self._constants, on_mesh)
            metrics = jax.device_get(jax.block_until_ready(metrics))
        seconds = time.perf_counter() - start
        kept = {name: float(x) for name, x in metrics.items() if name.startswith("loss") or name == "grad_norm"}
        return {"seconds": seconds, "metrics": kept}

    def matmul(self, size: int, seconds: float) -> dict[str, Any]:
        """Returns the most operations a second of a square product, by the dtype of its operands; sums are float32."""
        out = {}
        for dtype in ("float32", "bfloat16"):
            x = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)
            product = jax.jit(lambda x: jnp.dot(x, x, preferred_element_type=jnp.float32))
            product(x).block_until_ready()
            best, end = float("inf"), time.perf_counter() + seconds
            while time.perf_counter() < end:
                start = time.perf_counter()
                product(x).block_until_ready()
                best = min(best, time.perf_counter() - start)
            out[dtype] = 2 * size**3 / best
        return out


if __name__ == "__main__":
    protocol.serve(Arm())
