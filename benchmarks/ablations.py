"""AuRA with one thing changed at a time: `python benchmarks/ablations.py --runs runs/ablations [ARM ...]`.

Each arm is configs/compare.py, the quickstart's whole schedule, with one switch thrown, seed 0; what is compared is the
error rate on the training voices that were held out, never on a test set. Writes results/ablations.json after each arm.
Finished arms are not repeated, interrupted ones resume.
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import arms

from aura_jax import config
from aura_jax.data.manifest import load_manifest
from aura_jax.train.inputs import split_held_out

BASE = "configs/compare.py"
_NO_DISTILLATION_LATER = "train.stages.joint.objectives.distill=0.0"
ARMS: dict[str, tuple[str, ...]] = {
    "base": (),
    "causal mask": ("model.mask=causal",),
    "25 tokens a second": ("embedder.token_rate=25.0",),
    "LoRA on 20 blocks": ("lora.n_blocks=20",),
    "mel patches": ("embedder.kind=patch",),
    "raw targets": ("distill.target_norm=none",),
    "distil first only": (_NO_DISTILLATION_LATER,),
    "text unprotected": ("lora.text_energy=1.0", "train.stages.joint.objectives.text_anchor=0.0"),
    "last pairs": ("distill.layer_map=last",),
    "Whisper base": ("model.teacher=whisper-base-wheel",),
}


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
    results: dict[str, Any] = json.loads(path.read_text())["arms"] if path.is_file() else {}
    for name in args.arms or ARMS:
        results[name] = run(args.runs / name.replace(" ", "-"), ARMS[name], held_out)
        ordered = {arm: results[arm] for arm in ARMS if arm in results}
        arms.write("ablations", "AuRA with one switch thrown: held-out training voices, seed 0", {"arms": ordered})


def _held_out(path: Path) -> Path:
    """Writes the rows that training holds out as a manifest of their own."""
    c = config.load([f"--config={BASE}"])
    rows = [row for manifest, _ in c.data.train for row in split_held_out(load_manifest(manifest), c.data)[1]]
    lines = [{"audio": row.audio, "text": row.text} for row in rows]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(workdir: Path, overrides: tuple[str, ...], held_out: Path) -> dict[str, Any]:
    """Trains an arm and scores it; returns its scores, its learning curve, and the command that trained it."""
    command = ["train", f"--config={BASE}", *(f"--config.{override}" for override in overrides)]
    _aura_jax(*command, "--workdir", str(workdir))
    scores = workdir / "held_out.json"
    if not scores.is_file():
        _aura_jax("eval", "--workdir", str(workdir), "--data", str(held_out), "--json", str(scores))
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    curve = [[r["step"], r["validation/wer"]] for r in records if "validation/wer" in r]
    shown = shlex.join(["aura-jax", *command, "--workdir", workdir.name])
    return {"command": shown, "scores": json.loads(scores.read_text()), "curve": curve}


def _aura_jax(*arguments: str) -> None:
    print(f"== {shlex.join(arguments)}", flush=True)
    subprocess.run([sys.executable, "-m", "aura_jax.cli", *arguments], check=True)


if __name__ == "__main__":
    main()
