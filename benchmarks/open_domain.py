"""The error rate on recordings as training speech grows: `python benchmarks/open_domain.py --runs runs/open_domain`.

Speaks sentences of sample_data/text in many voices (`aura-jax data synthesize`, hours of it, never committed, the same
from the same seed), and trains AuRA and a bridge with configs/open_domain.py on more and more of them, in equally many
steps, scored on the test recordings, none of which was trained on. Writes results/open_domain.json after each run, and
docs/open_domain.svg. Finished runs are not repeated, interrupted ones resume.
"""

import argparse
import itertools
import json
import shlex
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
SYSTEMS = ("aura", "bridge")
OF_OPEN_SPEECH = "recordings"  # the test set that is no command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, required=True, help="where the speech and the workdirs go")
    parser.add_argument("--hours", type=float, nargs="+", default=(0.0, 0.5, 1.0, 2.0), help="of spoken sentences")
    args = parser.parse_args()
    speech = args.runs / "speech"
    of_text = ("--text", "sample_data/text/train.jsonl", "--sentences", "3,15", "--hours", f"{max(args.hours):g}")
    arms.aura_jax("data", "synthesize", *of_text, "--output", str(speech))
    found: dict[str, dict[str, Any]] = {name: {} for name in SYSTEMS}
    for hours, name in itertools.product(args.hours, SYSTEMS):
        train = OTHERS
        if hours:
            first = cut(speech.with_suffix(".jsonl"), hours, args.runs / f"speech-{hours:g}h.jsonl")
            train = ((str(first), 1.0), *OTHERS)
        arguments = [f"--config=configs/systems/{name}.py:{CONFIG}", f"--config.data.train={train!r}"]
        found[name][f"{hours:g}"] = run(args.runs / f"{name}-{hours:g}h", arguments)
        arms.write("open_domain", "Errors on recordings by hours of spoken sentences, seed 0", {"systems": found})
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


def run(workdir: Path, arguments: Sequence[str]) -> dict[str, Any]:
    """Trains a run and scores it on the test sets, or goes on with it; returns its command, scores and curve."""
    arms.aura_jax("train", *arguments, "--workdir", str(workdir))
    scores = workdir / "sets.json"
    if not scores.is_file():
        arms.aura_jax("eval", "--workdir", str(workdir), "--json", str(scores))
    command = shlex.join(["aura-jax", "train", *arguments, "--workdir", workdir.name])
    return {"command": command, "sets": json.loads(scores.read_text()), "curve": arms.curve(workdir)}


def draw(found: dict[str, dict[str, Any]]) -> None:
    """Draws the error rate on recordings against the hours, a line a system."""
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for name, runs in found.items():
        hours = [float(of) for of in runs]
        rates = [run["sets"][OF_OPEN_SPEECH]["wer"] for run in runs.values()]
        value = [100 * rate["value"] for rate in rates]
        spread = [[100 * abs(rate["value"] - rate[end]) for rate in rates] for end in ("low", "high")]
        axes.errorbar(hours, value, yerr=spread, label=name, marker="o", capsize=3)
    axes.set(xlabel="hours of spoken sentences in training", ylabel="WER on recordings, %", ylim=(0, None))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(FIGURE)


if __name__ == "__main__":
    main()
