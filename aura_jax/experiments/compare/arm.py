"""One system of a comparison that is timed beside the others: a process of its own, spoken to by `bench.protocol`.

    python -m aura_jax.experiments.compare.arm

Its weights are those that a run starts from: how long an answer or a step takes depends on shapes alone.
"""

import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from aura_jax import assets, checkpoint, machine, sharding, system
from aura_jax import config as config_lib
from aura_jax.audio.features import SAMPLE_RATE
from aura_jax.audio.io import load_audio
from aura_jax.config import Config
from aura_jax.data.manifest import load_manifest
from aura_jax.evaluate.run import Answers
from aura_jax.experiments.bench import protocol
from aura_jax.experiments.compare.plan import UNTRAINED
from aura_jax.infer.cascade import Cascade, whisper_of
from aura_jax.infer.generate import Generator, plain_generator
from aura_jax.infer.prompting import Request
from aura_jax.infer.transcriber import Transcriber
from aura_jax.models.lora import merge
from aura_jax.train import stages
from aura_jax.train import step as step_lib
from aura_jax.train.inputs import Inputs
from aura_jax.train.prepare import prepare

_TRANSCRIPT = 200  # tokens: more than 30 s of speech have


class Arm:
    """Answers, and steps, of one system."""

    def load(
        self,
        system: str,
        config: Mapping[str, Any],
        lengths: Sequence[float],
        folder: str,
        padding: Mapping[str, Any] | None,
    ) -> dict[str, Any]:
        """Builds what answers, and reads the speech.

        Args:
          lengths: of the clips to answer, in seconds.
          folder: an empty one, for what a run keeps in its workdir.
          padding: of a cascade: the "seconds" of silence after a clip, and the "windows" to choose from; None: 30 s.

        Returns:
          {"adapters": the ways in which its adapters can lie: "separate" and "merged"; ["none"] without any}.
        """
        c = config_lib.from_values(config, Path(folder) / "config.json")
        self._speech = speech(c, lengths)
        # Each length is padded to itself, as it would be where such clips are what is answered.
        answering = c.copy_and_resolve_references()
        with answering.ignore_type():
            answering.data.buckets = tuple(lengths)
        if system in UNTRAINED:
            whisper = Transcriber(assets.resolve(whisper_of(c)), batch_size=1, max_new_tokens=_TRANSCRIPT)
            if padding is not None:
                whisper = whisper.with_windows(padding["windows"], padding["seconds"] or 0.0)
            self._answers: dict[str, Answers] = {"none": Cascade(whisper, plain_generator(answering, 1))}
        else:
            self._build(c, answering, Path(folder))
        return {"adapters": list(self._answers)}

    def _build(self, c: Config, answering: Config, folder: Path) -> None:
        self._folder, self._mesh, self._built = folder, checkpoint.system_mesh(c), system.build(c)
        with jax.set_mesh(self._mesh):
            self._variables = system.initial_variables(self._built, self._mesh)
        built = dataclasses.replace(self._built, config=answering)
        one = lambda variables: Generator(built, variables, batch_size=1, max_new_tokens=1)
        student = {name: self._variables[name] for name in ("params", "lora") if name in self._variables}
        lora = self._built.model.config.lora
        self._answers = {"separate" if lora else "none": one(student)}
        if lora is not None and lora.scope != "audio":
            params = student["params"]
            merged = {**params, "llm": merge(params["llm"], student["lora"]["llm"], lora)}
            self._answers["merged"] = one({"params": merged})

    def backend(self) -> dict[str, str]:
        """Returns what kind of device computes."""
        return {"backend": jax.default_backend()}

    def device_peak(self) -> dict[str, float | None]:
        """Returns the most memory that was in use on the device; None on a CPU, where it is the process's."""
        return {"gib": None if jax.default_backend() == "cpu" else machine.peak_memory_gib()}

    def answer(self, adapters: str, length: float) -> dict[str, Any]:
        """Returns the wall time from a clip of so many seconds to the first token of its answer."""
        start = time.perf_counter()
        self._answers[adapters].generate([Request(self._speech[length])])
        return {"seconds": time.perf_counter() - start}

    def prepare_steps(self, n_batches: int) -> dict[str, Any]:
        """Makes ready to train on the first batches of the plan.

        Returns:
          {"stages": their names, in order; "seconds": that it took before the first step: a teacher's pass over the
          training clips, and what else a run computes once from its data}.
        """
        self._answers.clear()
        c, mesh = self._built.config, self._mesh
        of_stages = config_lib.stages(c)
        with jax.set_mesh(mesh):
            teacher = self._variables.get("teacher")
            fingerprint = checkpoint.fingerprint(teacher) if teacher is not None else None
            inputs = Inputs(self._built, self._folder)
            # An earlier run may have left the teacher's states in the cache: this one is to hear the clips itself.
            os.environ["AURA_JAX_CACHE"] = str(self._folder)
            start = time.perf_counter()
            self._constants, variables = prepare(
                self._built, inputs, self._variables, fingerprint, self._folder, mesh, lambda line: None
            )
            jax.block_until_ready(self._constants)
            seconds = time.perf_counter() - start
            paths = {path for path in sharding.flatten(variables) if not path.startswith("teacher/")}
            self._stages = {}
            for (name, stage), rates in zip(of_stages, stages.rates_of_stages(c, of_stages, paths), strict=True):
                trained, frozen = sharding.split(variables, rates)
                state = step_lib.new_state(c, trained, 0, mesh)
                step = step_lib.jit_step(self._built, stage, 0, rates, mesh)
                active = step_lib.active_objectives(stage)
                batches = [inputs.to_mesh(batch) for batch in inputs.batches(active, 0, n_batches)]
                self._stages[name] = [step, state, frozen, batches]
        return {"stages": list(self._stages), "seconds": seconds}

    def step(self, stage: str, batch: int) -> dict[str, Any]:
        """Takes a step of a stage on one of its batches; returns its wall time."""
        step, state, frozen, batches = self._stages[stage]
        start = time.perf_counter()
        with jax.set_mesh(self._mesh):
            state, metrics = step(state, frozen, self._constants, batches[batch])
            jax.block_until_ready(metrics)
        seconds = time.perf_counter() - start
        self._stages[stage][1] = state
        return {"seconds": seconds}


def speech(config: Config, lengths: Sequence[float]) -> dict[float, np.ndarray]:
    """Returns speech of each length in seconds: the test sets' clips one after another, cut."""
    wanted = round(max(lengths) * SAMPLE_RATE)
    clips: list[np.ndarray] = []
    for path in config.eval.sets.values():
        for row in load_manifest(path):
            if row.audio is not None and sum(map(len, clips)) < wanted:
                clips.append(load_audio(row.audio))
    joined = np.concatenate(clips)
    joined = np.tile(joined, -(-wanted // len(joined)))
    return {length: joined[: round(length * SAMPLE_RATE)] for length in lengths}


if __name__ == "__main__":
    protocol.serve(Arm())
