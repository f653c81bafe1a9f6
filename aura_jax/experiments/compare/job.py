"""One system and one seed, in a process of its own: trained, scored, timed, and written down as JSON.

    python -m aura_jax.experiments.compare.job JOB.json

reads what `run.py` wrote, and writes the result where that says. A process of its own, so that its peak memory is its
own, and nothing is compiled that another one had compiled.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from aura_jax import assets, checkpoint, machine
from aura_jax import config as config_lib
from aura_jax.audio.features import SAMPLE_RATE
from aura_jax.audio.io import load_audio
from aura_jax.config import Config
from aura_jax.data.manifest import load_manifest
from aura_jax.errors import USER_MISTAKE, UserError
from aura_jax.evaluate import suite
from aura_jax.evaluate.run import Answers, evaluate_sets
from aura_jax.experiments.compare.run import UNTRAINED
from aura_jax.infer.cascade import Cascade, Oracle
from aura_jax.infer.generate import Generator, Request, plain_generator
from aura_jax.infer.transcriber import Transcriber
from aura_jax.report import collect
from aura_jax.train import loop

SECONDS = (1.0, 2.0, 5.0, 10.0, 30.0)  # of the clips whose first token is timed
_REPEATS = 7


def measure(name: str, config: Config, workdir: Path) -> dict[str, Any] | None:
    """Returns what is known of a system; None if a signal cut its training short, and the same call goes on."""
    if name in UNTRAINED:
        return _measure_untrained(name, config)
    if loop.train(config, workdir).interrupted:
        return None
    scores, _ = suite.score_run(workdir)
    built, variables = checkpoint.load_for_inference(workdir)
    # Each length is padded to itself, as it would be where such clips are what is answered.
    timed = dataclasses.replace(built, config=_with_buckets(built.config))
    answers = Generator(timed, variables, batch_size=1, max_new_tokens=1)
    of_run = collect.collect(workdir, progress=False)
    return {
        "scores": scores,
        "parameters": of_run["parameters"],
        "curves": {"metrics": of_run.get("metrics"), "validation": of_run.get("validation")},
        "similarity": of_run.get("similarity"),
        "first_token": first_token(answers, clips(config)),
    }


def _with_buckets(config: Config) -> Config:
    config = config.copy_and_resolve_references()
    with config.ignore_type():
        config.data.buckets = SECONDS
    return config


def _measure_untrained(name: str, config: Config) -> dict[str, Any]:
    start = time.perf_counter()
    plain = lambda n_new=None: plain_generator(_with_buckets(config), n_new)
    whisper = config.model.teacher or config.model.encoder
    answers: Answers
    if name == "oracle":
        answers, first = Oracle(plain()), None
    else:
        answers = Cascade(Transcriber(assets.resolve(whisper), batch_size=config.eval.batch_size), plain())
        first = Cascade(Transcriber(assets.resolve(whisper), batch_size=1), plain(1))
    scores, _ = evaluate_sets(answers, dict(config.eval.sets), config)
    seconds = {"train": 0.0, "evaluate": time.perf_counter() - start}
    out: dict[str, Any] = {"scores": {"sets": scores, "seconds": seconds, "eval": suite.settings(config)}}
    if first is not None:
        out["first_token"] = first_token(first, clips(config))
    return out


def clips(config: Config) -> dict[float, np.ndarray]:
    """Returns speech of each of `SECONDS`: the test sets' clips one after another, cut."""
    speech: list[np.ndarray] = []
    for path in config.eval.sets.values():
        for row in load_manifest(path):
            if row.audio is not None and sum(map(len, speech)) < max(SECONDS) * SAMPLE_RATE:
                speech.append(load_audio(row.audio))
    joined = np.concatenate(speech)
    joined = np.tile(joined, -(-round(max(SECONDS) * SAMPLE_RATE) // len(joined)))
    return {seconds: joined[: round(seconds * SAMPLE_RATE)] for seconds in SECONDS}


def first_token(answers: Answers, speech: Mapping[float, np.ndarray]) -> dict[str, dict[str, float]]:
    """Returns {seconds of speech: {"median", "low", "high"}}, the wall time from a clip to the first token, in seconds.

    After a warm-up, which compiles; low and high are the fastest and the slowest of the others.
    """
    out = {}
    for seconds, waveform in speech.items():
        took = []
        for _ in range(1 + _REPEATS):
            start = time.perf_counter()
            answers.generate([Request(waveform)])
            took.append(time.perf_counter() - start)
        out[f"{seconds:g}"] = {"median": float(np.median(took[1:])), "low": min(took[1:]), "high": max(took[1:])}
    return out


def main(argv: list[str]) -> int:
    """Runs a job; returns an exit code: of `train` where a signal came."""
    job = json.loads(Path(argv[0]).read_text())
    config = config_lib.from_values(job["config"], Path(argv[0]))
    Path(job["workdir"]).mkdir(parents=True, exist_ok=True)
    try:
        found = measure(job["system"], config, Path(job["workdir"]))
    except UserError as error:
        print(f"error: {job['system']}, seed {job['seed']}: {error}", file=sys.stderr)
        return USER_MISTAKE
    if found is None:
        return loop.RESUME_EXIT_CODE
    out = Path(job["output"])
    result = {
        **{key: job[key] for key in ("system", "seed", "command")},
        "machine": machine.describe(),
        "device": str(jax.devices()[0].device_kind),
        "peak_memory_gib": machine.peak_memory_gib(),
        "config": job["config"],
        **found,
    }
    partial = out.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
