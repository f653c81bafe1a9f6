"""`aura-jax bench data`: how fast a run's clips become batches, each part alone on one core, then the whole.

Every measurement runs in a process of its own that is pinned to its cores from its start, so that native thread pools
see no others. Rates are seconds of audio a second and core: 200 means that a core feeds 200 times real time. What pads
a clip does not count as audio.
"""

import json
import math
import os
import platform
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import soundfile

from aura_jax import config as config_lib
from aura_jax import machine
from aura_jax.audio.features import SAMPLE_RATE
from aura_jax.audio.io import AudioError, load_audio
from aura_jax.config import Config
from aura_jax.data.manifest import Row, clip_samples, json_lines, load_manifest, manifest_lines
from aura_jax.errors import UserError
from aura_jax.experiments.bench import data_parts, data_pipeline
from aura_jax.train.inputs import split_held_out
from aura_jax.train.step import active_objectives

GOAL = 200  # times real time that a core should feed
_MOST_WORKERS = 8  # where the configuration names none
_PACKAGES = ("aura-jax", "numpy", "soundfile", "soxr", "grain", "jax", "transformers", "torch")

_T = TypeVar("_T")


class _Size(NamedTuple):
    """How much is measured."""

    seconds: float  # of audio that the whole pipeline reads in a pass
    clips: int  # that the parts read in a round
    part_rounds: int
    rounds: int  # of the whole pipeline


# 4000 seconds: the pipeline's memory for decoded clips holds them, and a later pass is what it is with them.
_FULL, _QUICK = _Size(4000, 256, 5, 3), _Size(40, 6, 2, 1)


def main(config: Config, output: Path, quick: bool = False, workdir: Path | None = None) -> int:
    """Measures, writes `output` (JSON), prints a table, and returns the exit code.

    Teacher states that the run precomputes are looked for in the cache, and made where they are missing.

    Args:
      config: of the run: its manifests, buckets, speeds, text pool, and counts of threads and workers.
      quick: few clips, and one round of the whole: shows that everything works, and measures nothing.
      workdir: of a run, whose metrics say how many of its steps waited for data.

    Raises:
      UserError: there is no training manifest; no clip can be used; the data fill no two batches; the workdir has no
        metrics; the system cannot pin a process to a core.
    """
    if not hasattr(os, "sched_setaffinity"):
        raise UserError(f"bench data pins processes to cores, which {platform.system()} cannot: run it on Linux")
    size, cores = _QUICK if quick else _FULL, sorted(os.sched_getaffinity(0))
    run = None if workdir is None else waits_of(workdir)
    active = frozenset().union(*(active_objectives(stage) for _, stage in config_lib.stages(config)))
    states = bool(config.teacher.precompute and "distill" in active)
    with tempfile.TemporaryDirectory() as folder:
        sample, rows = _sample(config, Path(folder), size.seconds)
        clips = _usable(rows, config.data.max_seconds, size.clips)
        path = Path(folder) / "config.json"
        path.write_text(config_lib.to_json(sample))
        fingerprint = _in_process(cores, data_pipeline.precompute_teacher, path) if states else None
        pipeline = [
            _in_process(cores[-n:], data_pipeline.measure, path, active, fingerprint, workers, size.rounds)
            for n, workers in _settings(config, len(cores))
        ]
        parts = _in_process(cores[-1:], data_parts.measure, path, clips, states, size.part_rounds, Path(folder))
    results = {
        "what": "Seconds of real audio a second and core: each part alone on one core, then the whole pipeline",
        "command": shlex.join(["aura-jax", *sys.argv[1:]]),
        "machine": machine.describe(),
        "versions": {"libsndfile": soundfile.__libsndfile_version__, **machine.versions(_PACKAGES)},
        "quick": quick,
        **_summary(parts, pipeline),
        **({} if run is None else {"run": run}),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.partial")
    partial.write_text(json.dumps(results, indent=1) + "\n")
    partial.replace(output)
    print(table(results))
    print(f"wrote {output}")
    return 0


def _sample(config: Config, folder: Path, seconds: float) -> tuple[Config, list[Row]]:
    """Returns the configuration with every row once a pass, of long data every n-th, and the speech rows of it.

    Raises:
      UserError: there is no manifest, or no speech in it.
    """
    out = config.copy_and_resolve_references()
    if not config.data.train:
        raise UserError("data.train is empty: give (manifest, passes per epoch) pairs")
    manifests = {manifest: split_held_out(load_manifest(manifest), config.data)[0] for manifest, _ in config.data.train}
    speech = [row for rows in manifests.values() for row in rows if row.audio is not None]
    if not speech:
        raise UserError(f"data.train: no row of {', '.join(manifests)} that trains has 'audio': nothing to measure")
    every = math.ceil(sum(clip_samples(speech)) / SAMPLE_RATE / seconds)
    if every == 1:
        out.data.train = tuple((manifest, 1.0) for manifest in manifests)
        return out, speech
    paths = []
    for manifest, rows in manifests.items():
        lines, part = dict(manifest_lines(manifest)), rows[::every]
        paths.append(folder / f"{len(paths)}.jsonl")
        # Paths relative to the manifest would not be found from here.
        values = [lines[row.where] | ({"audio": row.audio} if row.audio is not None else {}) for row in part]
        paths[-1].write_text("".join(json.dumps(line) + "\n" for line in values))
    out.data.train, out.data.validation_values = tuple((str(path), 1.0) for path in paths if path.stat().st_size), ()
    return out, [row for rows in manifests.values() for row in rows[::every] if row.audio is not None]


def _usable(rows: Sequence[Row], max_seconds: float, n: int) -> list[Row]:
    """Returns `n` rows at random, or all if they are fewer, of those whose clip can be decoded and is not too long."""
    chosen, error = [], None
    for i in np.random.default_rng(0).permutation(len(rows)):
        try:
            load_audio(str(rows[i].audio), max_seconds=max_seconds)
        except AudioError as of_this_clip:
            error = error or of_this_clip
            continue
        chosen.append(rows[i])
        if len(chosen) == n:
            break
    if not chosen:
        raise UserError(f"data.train: none of {len(rows)} clips can be used; one of them: {error}")
    return chosen


def _settings(config: Config, n_cores: int) -> list[tuple[int, int]]:
    """Returns (cores, worker processes): one core, then as many as the threads can use, then worker processes."""
    threads = min(n_cores, config.data.threads)
    workers = config.data.workers or min(n_cores, _MOST_WORKERS)
    return [(1, 0), *([(threads, 0)] if threads > 1 else []), (min(n_cores, workers), workers)]


def _in_process(cores: Sequence[int], function: Callable[..., _T], *args: Any) -> _T:
    """Calls a function in a fresh process on these cores."""
    allowed = os.sched_getaffinity(0)
    # The process inherits them: pinned later, its libraries would already have started threads for the others.
    os.sched_setaffinity(0, cores)
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(function, *args).result()
    finally:
        os.sched_setaffinity(0, allowed)


def waits_of(workdir: Path) -> dict[str, Any]:
    """Returns how many steps of a run waited for data, and how long its logged steps took.

    Raises:
      UserError: the workdir has no metrics, or none of steps that count who waited.
    """
    path = workdir / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"--workdir {workdir}: no metrics.jsonl: name the workdir of a run")
    lines = [values for _, values in json_lines(path) if "steps_that_waited" in values]
    if not lines:
        raise UserError(f"{path}: nothing says which steps waited for data: train again, or leave --workdir out")
    steps, waited = (sum(line[key] for line in lines) for key in ("steps_since_record", "steps_that_waited"))
    times = [line["step_seconds"] for line in lines if line["step"] > 1] or [lines[0]["step_seconds"]]  # 1 compiles
    return {
        "workdir": str(workdir),
        "steps": steps,
        "steps_that_waited": waited,
        "share_that_waited": waited / steps,
        "step_seconds": _spread(times),
    }


# --- the report


def _spread(values: Iterable[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {"median": statistics.median(ordered), "low": ordered[0], "high": ordered[-1]}


def _rates(times: Iterable[float]) -> dict[str, dict[str, float]]:
    spread = _spread(times)
    hours = {name: value / 3600 for name, value in spread.items()}
    return {"times_real_time_per_core": spread, "audio_hours_per_second_per_core": hours}


def _summary(parts: Sequence[dict[str, Any]], pipeline: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns medians, lows and highs in place of rounds, rates a core, and whether the goal is reached."""
    out: dict[str, Any] = {
        "rounds": {"parts": len(parts[0]["rounds"]), "pipeline": len(pipeline[0]["batches_per_second"])},
        "parts": [{k: v for k, v in part.items() if k != "rounds"} | _rates(part["rounds"]) for part in parts],
        "pipeline": [],
    }
    for whole in pipeline:
        plain = {k: v for k, v in whole.items() if not isinstance(v, list | dict)}
        spreads = {k: _spread(v) for k, v in whole.items() if isinstance(v, list)}
        per_core = {k: _rates(x / whole["cores"] for x in v) for k, v in whole["times_real_time"].items()}
        out["pipeline"].append({**plain, "passes": per_core, **spreads})
    rates = [of_pass["times_real_time_per_core"]["median"] for of_pass in out["pipeline"][0]["passes"].values()]
    goal = {"times_real_time_per_core": GOAL, "slower_pass_on_one_core": min(rates), "reached": min(rates) >= GOAL}
    return {"goal": goal, **out}


def table(results: dict[str, Any]) -> str:
    """Returns the results as a plain table."""
    rates = {f"{part['part']}: {part['detail']}": part for part in results["parts"]}
    for whole in results["pipeline"]:
        rates |= {f"pipeline, {_setting(whole)}: {name}": of_pass for name, of_pass in whole["passes"].items()}
    width = max(map(len, rates))
    lines = [results["machine"], "", f"{'':{width}}  x real time a core               hours a second"]
    lines.append(f"{'':{width}}  {'median':>9}{'low':>9}{'high':>9}{'median':>12}")
    for name, rate in rates.items():
        times, hours = rate["times_real_time_per_core"], rate["audio_hours_per_second_per_core"]
        numbers = f"{times['median']:9.0f}{times['low']:9.0f}{times['high']:9.0f}{hours['median']:12.4f}"
        lines.append(f"{name:{width}}  {numbers}")
    lines.append("")
    for whole in results["pipeline"]:
        step, rate = whole["fastest_step_seconds"]["median"], whole["batches_per_second"]["median"]
        lines.append(
            f"{_setting(whole)}: {rate:.1f} batches a second; fewer than {data_pipeline.FEW:.0%} of the steps wait "
            f"if a step takes {1000 * step:.1f} ms or more"
        )
    if "run" in results:
        run = results["run"]
        lines.append(
            f"{run['workdir']}: {run['steps_that_waited']} of {run['steps']} steps waited for data "
            f"({run['share_that_waited']:.1%}); a step took {1000 * run['step_seconds']['median']:.1f} ms"
        )
    goal = results["goal"]
    verdict = "reached" if goal["reached"] else "NOT reached"
    lines.append(
        f"goal of {goal['times_real_time_per_core']} times real time a core: {verdict}, "
        f"{goal['slower_pass_on_one_core']:.0f} in the slower pass on one core"
    )
    return "\n".join(lines)


def _setting(whole: dict[str, Any]) -> str:
    names = (("core", "cores"), ("thread", "threads"), ("worker", "workers"))
    return ", ".join(f"{whole[many]} {one if whole[many] == 1 else many}" for one, many in names)
