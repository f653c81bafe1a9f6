"""AuRA with one thing changed at a time: `python benchmarks/ablations.py --runs runs/ablations [ARM ...]`.

Each arm is configs/compare.py with what it changes, seed 0, scored on the training voices that were held out, never on
a test set. The two masks take the quickstart's whole schedule, all others half of it: the whole leaves so few errors
that nothing could be told apart. Writes results/ablations.json after each arm. Finished arms are not repeated,
interrupted ones resume.
"""

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

import arms

from aura_jax import config
from aura_jax.data.manifest import load_manifest
from aura_jax.train.inputs import split_held_out

BASE = "configs/compare.py"
HALF = ("train.stages.distil.steps=300", "train.stages.joint.steps=250")
GROUPS: dict[str, dict[str, tuple[str, ...]]] = {
    "mask": {"bidirectional mask": ("model.mask=bidirectional",), "causal mask": ("model.mask=causal",)},
    "switches": {
        "base": HALF,
        "25 tokens a second": (*HALF, "embedder.token_rate=25.0"),
        "mel patches": (*HALF, "embedder.kind=patch"),
        "raw targets": (*HALF, "distill.target_norm=none"),
        "distil first only": (*HALF, "train.stages.joint.objectives.distill=0.0"),
        "last pairs": (*HALF, "distill.layer_map=last"),
        "Whisper base": (*HALF, "model.teacher=whisper-base-wheel"),
    },
    # What a bridge's lead suggests: its encoder has heard noise and many voices, and it has more to fit with.
    "changes": {
        "noise for the student": (*HALF, "data.augment.noise_probability=0.5"),
        "rank 128": (*HALF, "lora.rank=128", "lora.alpha=128.0"),
        "longer distillation": ("train.stages.distil.steps=425", "train.stages.joint.steps=125"),
    },
}
ARMS = {name: overrides for group in GROUPS.values() for name, overrides in group.items()}
NOISE_DB = 10.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, required=True, help="where the workdirs go")
    parser.add_argument("arms", nargs="*", metavar="ARM", help=f"of {', '.join(ARMS)} (default: all)")
    args = parser.parse_args()
    if unknown := set(args.arms) - set(ARMS):
        parser.error(f"unknown {', '.join(sorted(unknown))}: there are {', '.join(ARMS)}")
    args.runs.mkdir(parents=True, exist_ok=True)
    held_out = _held_out(args.runs / "held_out.jsonl")
    path = arms.RESULTS / "ablations.json"
    results: dict[str, Any] = json.loads(path.read_text())["groups"] if path.is_file() else {}
    for name in args.arms or ARMS:
        found = run(args.runs / name.replace(" ", "-"), ARMS[name], held_out)
        results = {
            group: {arm: done for arm in of if (done := found if arm == name else results.get(group, {}).get(arm))}
            for group, of in GROUPS.items()
        }
        what = "AuRA with one thing changed at a time: held-out training voices, seed 0; the mask on the whole schedule"
        arms.write("ablations", what, {"groups": results})


def _held_out(path: Path) -> Path:
    """Writes the rows that training holds out as a manifest of their own."""
    c = config.load([f"--config={BASE}"])
    rows = [row for manifest, _ in c.data.train for row in split_held_out(load_manifest(manifest), c.data)[1]]
    lines = [{"audio": row.audio, "text": row.text} for row in rows]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(workdir: Path, overrides: tuple[str, ...], held_out: Path) -> dict[str, Any]:
    """Trains an arm and scores it, in noise too; returns its scores, its learning curve, and what trained it."""
    command = ["train", f"--config={BASE}", *(f"--config.{override}" for override in overrides)]
    arms.aura_jax(*command, "--workdir", str(workdir))
    scores = workdir / "scores.json"
    if not scores.is_file():
        name = "held out"
        of_eval = {
            **{"sets": {name: str(held_out)}, "text_questions": "", "likelihood": ()},
            **{"noise.kinds": ("white", "babble"), "noise.sets": (name,), "noise.snr_db": (NOISE_DB,)},
        }
        of_eval = {k: x if isinstance(x, str) else repr(x) for k, x in of_eval.items()}
        arms.aura_jax("eval", "--workdir", str(workdir), *(f"--config.eval.{k}={x}" for k, x in of_eval.items()))
    shown = shlex.join(["aura-jax", *command, "--workdir", workdir.name])
    return {"command": shown, "scores": json.loads(scores.read_text()), "curve": arms.curve(workdir)}


if __name__ == "__main__":
    main()
