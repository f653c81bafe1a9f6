"""The quickstart with three seeds, and without distillation: `python benchmarks/quickstart.py --runs runs/bench`.

Writes results/quickstart.json. Finished runs are not repeated, interrupted ones resume.
"""

import argparse
from pathlib import Path

import arms

SEEDS = (0, 1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, required=True, help="where the workdirs go")
    runs = parser.parse_args().runs
    systems = {"AuRA": [], "without distillation": []}

    def write() -> None:
        arms.write("quickstart", "configs/quickstart.py to its end: word error rates, text, time", {"systems": systems})

    for seed in SEEDS:
        systems["AuRA"].append({"seed": seed, **arms.run(runs / f"seed-{seed}", [f"--config.seed={seed}"])})
        write()
    scores = arms.run(runs / "seed-0", ["--config.seed=0", "--ablation"], scores_of=runs / "seed-0-ablation")
    systems["without distillation"].append({"seed": 0, **scores})
    write()


if __name__ == "__main__":
    main()
