"""One system and one seed, in a process of its own: trained, scored, and written down as JSON.

    python -m aura_jax.experiments.compare.job JOB.json

reads what `run.py` wrote, and writes the result where that says. A process of its own, so that its peak memory is its
own, and nothing is compiled that another one had compiled.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import jax

from aura_jax import assets, machine
from aura_jax import config as config_lib
from aura_jax.config import Config
from aura_jax.errors import USER_MISTAKE, UserError
from aura_jax.evaluate import suite
from aura_jax.evaluate.run import Answers, evaluate_sets
from aura_jax.experiments.compare.plan import UNTRAINED
from aura_jax.infer.cascade import Cascade, Oracle, whisper_of
from aura_jax.infer.generate import plain_generator
from aura_jax.infer.transcriber import Transcriber
from aura_jax.report import collect
from aura_jax.train import loop


def measure(name: str, config: Config, workdir: Path) -> dict[str, Any] | None:
    """Returns what is known of a system; None if a signal cut its training short, and the same call goes on."""
    if name in UNTRAINED:
        return _measure_untrained(name, config)
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


def _measure_untrained(name: str, config: Config) -> dict[str, Any]:
    start = time.perf_counter()
    plain = plain_generator(config)
    answers: Answers
    if name == "oracle":
        answers = Oracle(plain)
    else:
        answers = Cascade(Transcriber(assets.resolve(whisper_of(config)), batch_size=config.eval.batch_size), plain)
    scores, _ = evaluate_sets(answers, dict(config.eval.sets), config)
    seconds = {"train": 0.0, "evaluate": time.perf_counter() - start}
    return {"scores": {"sets": scores, "seconds": seconds, "eval": suite.settings(config)}}


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
        **{key: job[key] for key in ("system", "seed", "budget", "command")},
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
