"""The error rate on recordings as training speech grows: `python benchmarks/open_domain.py --runs runs/open_domain`.

Speaks sentences of sample_data/text in many voices (`aura-jax data synthesize`, hours of it, never committed, the same
from the same seed), and trains configs/open_domain.py on more and more of them, in equally many steps, scored on the
test recordings, of which no word was trained on. Writes results/open_domain.json after each run, and
docs/open_domain.svg. Finished runs are not repeated, interrupted ones resume.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import arms
import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from aura_jax.config import read
from aura_jax.data.manifest import load_manifest

CONFIG = "configs/open_domain.py"
FIGURE = Path(__file__).parents[1] / "docs" / "open_domain.svg"
OTHERS = tuple(read(CONFIG).data.train[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, required=True, help="where the speech and the workdirs go")
    parser.add_argument("--hours", type=float, nargs="+", default=(0.0, 0.5, 2.0), help="of spoken sentences")
    args = parser.parse_args()
    speech = args.runs / "speech"
    command = ["data", "synthesize", "--text", "sample_data/text/train.jsonl", "--sentences"]
    command += ["--hours", f"{max(args.hours):g}", "--output", str(speech)]
    subprocess.run([sys.executable, "-m", "aura_jax.cli", *command], check=True)
    found: dict[str, Any] = {}
    for hours in args.hours:
        train = OTHERS
        if hours:
            first = cut(speech.with_suffix(".jsonl"), hours, args.runs / f"speech-{hours:g}h.jsonl")
            train = ((str(first), 1.0), *OTHERS)
        arguments = [f"--config={CONFIG}", f"--config.data.train={train!r}"]
        found[f"{hours:g}"] = arms.run(args.runs / f"{hours:g}h", arguments)
        arms.write("open_domain", "Errors on recordings by hours of spoken sentences, seed 0", {"hours": found})
    draw(found)


def cut(manifest: Path, hours: float, path: Path) -> Path:
    """Writes the first rows of a manifest, as many as last so long; they are in an order that a seed drew."""
    seconds, lines = 0.0, []
    for line, row in zip(manifest.read_text().splitlines(), load_manifest(manifest), strict=True):
        if seconds >= 3600 * hours:
            break
        seconds += json.loads(line)["seconds"]
        lines.append(json.dumps(json.loads(line) | {"audio": row.audio}) + "\n")
    path.write_text("".join(lines))
    return path


def draw(found: dict[str, dict[str, Any]]) -> None:
    """Draws the error rate of each test set against the hours."""
    hours: Sequence[float] = [float(name) for name in found]
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for name in next(iter(found.values()))["sets"]:
        rates = [run["sets"][name]["wer"] for run in found.values()]
        value = [100 * rate["value"] for rate in rates]
        spread = [[100 * abs(rate["value"] - rate[end]) for rate in rates] for end in ("low", "high")]
        axes.errorbar(hours, value, yerr=spread, label=name, marker="o", capsize=3)
    axes.set(xlabel="hours of spoken sentences in training", ylabel="WER, %", ylim=(0, None))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(FIGURE)


if __name__ == "__main__":
    main()
