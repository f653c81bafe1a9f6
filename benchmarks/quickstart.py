"""The quickstart, and its training with other seeds and without distillation.

    python benchmarks/quickstart.py --runs runs/bench

runs it once as a user does, for its time and memory. The others are taken from what `aura-jax compare` wrote before:
configs/compare.py trains what the quickstart trains, and its systems are scored on the same sets. Writes
results/quickstart.json. A finished run is not repeated, an interrupted one resumes.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import arms

SEEDS = (0, 1, 2)
NOT_OF_A_QUICKSTART = ("noise", "likelihood")  # what a comparison scores beside


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, required=True, help="where the workdir goes")
    runs = parser.parse_args().runs
    first = {"seed": SEEDS[0], **arms.run(runs / f"seed-{SEEDS[0]}", [f"--config.seed={SEEDS[0]}"])}
    systems = {
        "AuRA": [first, *(of_comparison("aura", seed) for seed in SEEDS[1:])],
        "without distillation": [of_comparison("mel_llm", seed) for seed in SEEDS],
    }
    arms.write("quickstart", "configs/quickstart.py to its end: word error rates, text, time", {"systems": systems})


def of_comparison(system: str, seed: int) -> dict[str, Any]:
    """Returns the scores of a run of `aura-jax compare`, as `arms.run` returns those of a quickstart."""
    found = json.loads((arms.RESULTS / "compare" / f"{system}-seed-{seed}.json").read_text())
    scores = {name: of for name, of in found["scores"].items() if name not in NOT_OF_A_QUICKSTART}
    return {"seed": seed, "command": found["command"], **scores}


if __name__ == "__main__":
    main()
