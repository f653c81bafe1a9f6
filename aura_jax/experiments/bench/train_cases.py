"""What the arms of `aura-jax bench train` are given: folders with a configuration, initial weights and batches.

A case folder holds config.json, weights.npz (every variable that is neither the LLM's nor the teacher's, by its path,
and the statistics of the targets), NAME.npz for each batch (the fields of `data.batch.Batch`), and case.json:
{"llm_dir", "teacher_dir", "pairs", "frames_per_token", "batches": {NAME: stage}}.
"""

import collections
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from aura_jax import checkpoint, config, sharding, system
from aura_jax.audio.features import SAMPLE_RATE, encoder_samples, n_audio_tokens
from aura_jax.config import Config
from aura_jax.data.assemble import Example, assemble
from aura_jax.data.batch import Batch
from aura_jax.data.plan import Shape
from aura_jax.experiments.bench import flops
from aura_jax.train import step as step_lib
from aura_jax.train.inputs import Inputs
from aura_jax.train.teacher import statistics

_B_SIZE = 0.05  # standard deviation of LoRA's B, which else starts at 0, where A has no gradient to compare
_PREFIX, _SUFFIX, _RESPONSE = 3, 8, 12  # text tokens of a synthetic row


@dataclasses.dataclass(frozen=True)
class Measured:
    """A batch that is measured.

    Attributes:
      tokens: real ones, of speech rows; padding and plain text are not counted.
      audio_seconds: real ones.
      parts: what the step must compute, by part.
    """

    name: str
    stage: str
    bucket_seconds: float
    tokens: int
    audio_seconds: float
    parts: dict[str, flops.Cost]


@dataclasses.dataclass(frozen=True)
class Case:
    """A case folder, and what is known of it.

    Attributes:
      steps_of_bucket: {stage: {bucket in seconds: steps of the whole schedule}}.
    """

    directory: Path
    batches: tuple[Measured, ...]
    steps_of_bucket: Mapping[str, Mapping[float, int]]


def base_config(arguments: Sequence[str]) -> Config:
    """Reads a configuration, without what is no part of the comparison: augmentation and the null space."""
    c = config.load(arguments)
    c.lora.text_energy, c.model.matmul_dtype = 1.0, ""
    c.data.augment.update(gain_db=(0.0, 0.0), noise_probability=0.0, freq_masks=0, time_masks=0)
    return c


def of_run(c: Config, directory: Path, per_bucket: int) -> Case:
    """Makes the case of a real run: its own first `per_bucket` batches of each bucket of each stage, in their order."""
    mesh, built = checkpoint.system_mesh(c), system.build(c)
    directory.mkdir()
    with jax.set_mesh(mesh):
        variables = system.initial_variables(built, mesh)
        inputs = Inputs(built, directory)
        if c.teacher.precompute:
            inputs.precompute_teacher(variables["teacher"], checkpoint.fingerprint(variables["teacher"]))
        samples = inputs.teacher_samples(variables["teacher"])
        found, _ = statistics(samples, directory / "target_statistics.npz")
        kept: dict[str, tuple[str, Batch]] = {}
        steps: dict[str, collections.Counter[float]] = {}
        first = 0
        stages: list[tuple[str, Any]] = config.stages(c)
        for name, stage in stages:
            steps[name] = collections.Counter()
            shape_of: dict[float, tuple[int, ...]] = {}
            found_of: collections.Counter[float] = collections.Counter()
            for batch in inputs.batches(step_lib.active_objectives(stage), first, stage.steps):
                bucket = _bucket(batch)
                steps[name][bucket] += 1
                # A few batches have longer text than the rest of their bucket: not worth a compilation of their own.
                if shape_of.setdefault(bucket, batch.tokens_BxT.shape) != batch.tokens_BxT.shape:
                    continue
                found_of[bucket] += 1
                if found_of[bucket] <= per_bucket:
                    kept[f"{name} {bucket:.2f} s {found_of[bucket]}"] = name, batch
            first += stage.steps
    return _write(c, built, variables, found, kept, directory, steps)


def _bucket(batch: Batch) -> float:
    return batch.waveform_BxKxS.shape[2] / SAMPLE_RATE


@dataclasses.dataclass(frozen=True)
class Point:
    """A synthetic shape: rows, seconds of each clip, adapted blocks, rank."""

    n_rows: int
    seconds: float
    n_blocks: int
    rank: int


def of_point(c: Config, points: Sequence[Point], directory: Path) -> Case:
    """Makes the case of synthetic batches, one a point: noise, random tokens, and the teacher inside the step.

    All points have one N and one rank; every step is a full one: LM and distillation.
    """
    c = c.copy_and_resolve_references()
    ((n_blocks, rank),) = {(point.n_blocks, point.rank) for point in points}
    c.lora.update(n_blocks=n_blocks, rank=rank, alpha=float(rank))
    c.teacher.precompute = False
    with c.train.stages.unlocked():
        c.train.stages.full = config.stage(1000, 1e-3, {"lm": 1.0, "distill": 1.0})
    c.train.schedule = ("full",)
    mesh, built = checkpoint.system_mesh(c), system.build(c)
    directory.mkdir()
    with jax.set_mesh(mesh):
        variables = system.initial_variables(built, mesh)
    assert built.teacher_config is not None
    draw = np.random.default_rng(c.seed)
    targets = (len(built.pairs), built.teacher_config.width)
    found = {"mean": draw.normal(size=targets).astype(np.float32), "std": np.ones(targets, np.float32)}
    batches = {point_name(point): ("full", _synthetic(built, point, draw)) for point in points}
    return _write(c, built, variables, found, batches, directory, {})


def point_name(point: Point) -> str:
    return f"{point.n_rows} rows of {point.seconds:g} s, {point.n_blocks} blocks, rank {point.rank}"


def _synthetic(built: system.System, point: Point, draw: np.random.Generator) -> Batch:
    n_samples = round(point.seconds * SAMPLE_RATE)
    whole = encoder_samples(built.frames_per_token)
    padded = -(-n_samples // whole) * whole
    rate = built.config.embedder.token_rate
    n_audio = int(n_audio_tokens(padded, rate))
    n_tokens = _PREFIX + n_audio + _SUFFIX + _RESPONSE - 1
    shape = Shape(point.n_rows, n_tokens, 1, n_audio, padded, _RESPONSE, _PREFIX)
    ids = lambda n: draw.integers(3, built.model.config.llm.vocab, n).tolist()
    rows = [
        [Example(ids(_PREFIX), ids(_SUFFIX), ids(_RESPONSE), draw.normal(0, 0.1, n_samples).astype(np.float32))]
        for _ in range(point.n_rows)
    ]
    return assemble(rows, shape, layout="slot", token_rate=rate)


def _write(
    c: Config,
    built: system.System,
    variables: dict,
    target_statistics: Mapping[str, np.ndarray],
    batches: Mapping[str, tuple[str, Batch]],
    directory: Path,
    steps_of_bucket: Mapping[str, Mapping[float, int]],
) -> Case:
    (directory / "config.json").write_text(config.to_json(c))
    about = {
        "llm_dir": str(built.llm_dir),
        "teacher_dir": str(built.teacher_dir),
        "pairs": built.pairs,
        "frames_per_token": built.frames_per_token,
        "batches": {name: stage for name, (stage, _) in batches.items()},
    }
    (directory / "case.json").write_text(json.dumps(about))
    flat = sharding.flatten(variables)
    weights = {path: np.asarray(x) for path, x in flat.items() if not path.startswith(("params/llm/", "teacher/"))}
    draw = np.random.default_rng(c.seed)
    for path in [path for path in weights if path.startswith("lora/") and path.endswith("/b")]:
        weights[path] = draw.normal(0, _B_SIZE, weights[path].shape).astype(np.float32)
    weights |= {f"statistics/{name}": np.asarray(target_statistics[name], np.float32) for name in ("mean", "std")}
    np.savez(directory / "weights.npz", allow_pickle=False, **weights)
    stages, measured = dict(config.stages(c)), []
    for name, (stage, batch) in batches.items():
        fields = {field: x for field, x in batch._asdict().items() if x is not None}
        np.savez(directory / f"{name}.npz", allow_pickle=False, **fields)
        parts = flops.step(
            built.model.config,
            built.teacher_config,
            built.pairs,
            flops.Sizes.of(batch),
            step_lib.active_objectives(stages[stage]),
        )
        tokens = int((batch.segment_BxT != 0).sum())
        audio_seconds = float(batch.n_samples_BxK.sum()) / SAMPLE_RATE
        measured.append(Measured(name, stage, _bucket(batch), tokens, audio_seconds, parts))
    return Case(directory, tuple(measured), steps_of_bucket)
