"""The torch arm of `aura-jax bench train`: `python benchmarks/peers/worker.py`, spoken to by `protocol`."""

import importlib.metadata
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch_aura
import torch_step

from aura_jax.experiments.bench import protocol


class Arm:
    """The same train step in torch on the batches of a case folder (see `aura_jax.experiments.bench.cases`)."""

    def load(self, case: str, precision: str, compiled: bool) -> dict[str, Any]:
        """Reads weights and batches.

        Args:
          precision: "bfloat16": frozen weights in bfloat16, and autocast.
          compiled: with torch.compile.
        """
        c = json.loads((Path(case) / "config.json").read_text())
        about = json.loads((Path(case) / "case.json").read_text())
        setting = torch_aura.Setting(
            c, Path(about["llm_dir"]), Path(about["teacher_dir"]), about["pairs"], about["frames_per_token"]
        )
        with np.load(Path(case) / "weights.npz") as file:
            self._weights = dict(file)
        self._trainer = torch_step.Trainer(setting, self._weights, getattr(torch, precision), compiled)
        self._batches = {}
        for name, stage in about["batches"].items():
            with np.load(Path(case) / f"{name}.npz") as file:
                self._batches[name] = c["train"]["stages"][stage], dict(file)
        versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")}
        return {"versions": versions, "threads": torch.get_num_threads()}

    def reset(self) -> dict[str, Any]:
        """Starts anew from the case's weights."""
        self._trainer.load(self._weights)
        return {}

    def step(self, batch: str) -> dict[str, Any]:
        """Takes one step; from the batch in host memory to metrics in host memory."""
        stage, arrays = self._batches[batch]
        start = time.perf_counter()
        metrics = self._trainer.step(arrays, stage)
        return {"seconds": time.perf_counter() - start, "metrics": metrics}

    def matmul(self, size: int, seconds: float) -> dict[str, Any]:
        """Returns the most operations a second of a square product, by the dtype of its operands."""
        out = {}
        for dtype in ("float32", "bfloat16"):
            x = torch.randn(size, size).to(getattr(torch, dtype))
            best, end = float("inf"), time.perf_counter() + seconds
            while time.perf_counter() < end:
                start = time.perf_counter()
                torch.mm(x, x)
                best = min(best, time.perf_counter() - start)
            out[dtype] = 2 * size**3 / best
        return out


if __name__ == "__main__":
    protocol.serve(Arm())
