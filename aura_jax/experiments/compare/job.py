"""One system and one seed, in a process of its own: trained, scored, and written down as JSON.

    python -m aura_jax.experiments.compare.job JOB.json

reads what `run.py` wrote, and writes the result where that says. A process of its own, so that its peak memory is its
own, and nothing is compiled that another one had compiled.
"""

import functools
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax

from aura_jax import assets, machine
from aura_jax import config as config_lib
from aura_jax.config import Config
from aura_jax.data.manifest import load_manifest
from aura_jax.errors import USER_MISTAKE, UserError
from aura_jax.evaluate import suite
from aura_jax.evaluate.noise import noises
from aura_jax.evaluate.padding import Padding, find_padding
from aura_jax.evaluate.run import Answers, evaluate_rows, training_classifier
from aura_jax.experiments.compare.plan import UNTRAINED
from aura_jax.infer.cascade import Cascade, Oracle, whisper_of
from aura_jax.infer.generate import plain_generator
from aura_jax.infer.transcriber import Transcriber
from aura_jax.report import collect
from aura_jax.train import loop
from aura_jax.train.inputs import split_held_out


def measure(name: str, config: Config, workdir: Path) -> dict[str, Any] | None:
    """Returns what is known of a system; None if a signal cut its training short, and the same call goes on."""
    if name in UNTRAINED:
        return _measure_untrained(name, config, workdir)
    if loop.train(config, workdir).interrupted:
        return None
    scores, _ = suite.score_run(workdir)
    of_run = collect.collect(workdir, progress=False)
    return {
        "scores": scores,
        "parameters": of_run["parameters"],
        "curves": {"metrics": of_run.get("metrics"), "validation": of_run.get("validation")},
        "similarity": of_run.get("similarity"),
    }


def _measure_untrained(name: str, config: Config, workdir: Path) -> dict[str, Any]:
    start = time.perf_counter()
    plain = plain_generator(config)
    out: dict[str, Any] = {}
    answers: Answers
    if name == "oracle":
        answers = Oracle(plain)
    else:
        # It may write as much as the others: where it repeats itself, it would go on to the end of its positions.
        most = {"batch_size": config.eval.batch_size, "max_new_tokens": config.eval.max_new_tokens}
        whisper = Transcriber(assets.resolve(whisper_of(config)), **most)
        if found := needed_padding(whisper, config):
            whisper = whisper.with_windows(found.windows, found.seconds or 0.0)
            out["padding"] = found.values()
        answers = Cascade(whisper, plain)
    rows = {of: load_manifest(path) for of, path in config.eval.sets.items()}
    # All of the config: no checkpoint says which models these are.
    kept = suite.kept_of(workdir, config, name, [json.loads(config_lib.to_json(config)), out])
    classifier = training_classifier(rows, config)
    out["scores"] = {"sets": evaluate_rows(answers, rows, classifier, kept)[0], "eval": suite.settings(config)}
    if name != "oracle":  # which does not listen
        levels = functools.partial(suite.sweep, answers, classifier, config.eval.noise.snr_db, kept)
        in_noise = {
            of: {kind: levels(noise, [of, kind]) for kind, noise in kinds.items()}
            for of, kinds in noises(config, rows).items()
        }
        out["scores"] |= {"noise": in_noise} if in_noise else {}
    out["scores"]["seconds"] = {"train": 0.0, "evaluate": kept.seconds + time.perf_counter() - start}
    kept.finish()
    return out


def needed_padding(whisper: Transcriber, config: Config, n_rows: int | None = None) -> Padding | None:
    """Returns how much silence this Whisper needs on voices that training holds out; None if it holds none out.

    Args:
      n_rows: of them, evenly spaced; None: all, as a clip that needs more than the others is rare.
    """
    rows = [row for manifest, _ in config.data.train for row in split_held_out(load_manifest(manifest), config.data)[1]]
    rows = [row for row in rows if row.audio is not None and row.text]
    n_rows = n_rows or len(rows)
    return find_padding(whisper, rows[:: max(1, len(rows) // n_rows)][:n_rows]) if rows else None


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
        **{key: job[key] for key in ("system", "seed", "budget", "factor", "command")},
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
