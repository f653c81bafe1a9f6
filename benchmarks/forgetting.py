"""What keeps the LLM an LLM, and what it costs in speech: `python benchmarks/forgetting.py --runs runs/forgetting`.

Each arm is configs/forgetting.py, a short schedule, with one protection of the text; the strongest rival of the
quickstart's protection also runs on the quickstart's own schedule. Writes results/forgetting.json and
docs/forgetting.svg. Finished arms are not repeated, interrupted ones resume.
"""

import argparse
from pathlib import Path
from typing import Any

import arms
import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

FIGURE = Path(__file__).parents[1] / "docs" / "forgetting.svg"


def _both_stages(objective: str, weight: float) -> tuple[str, ...]:
    return tuple(f"train.stages.{stage}.objectives.{objective}={weight}" for stage in ("distil", "joint"))


_KD = _both_stages("text_kd", 1.0)
_NULL_SPACE = "lora.text_energy=0.03"
_JOINT_ANCHOR = "train.stages.joint.objectives.text_anchor=10.0"
ARMS: dict[str, tuple[str, ...]] = {
    "nothing": (),
    "anchor 10": _both_stages("text_anchor", 10.0),
    "anchor 10, prose only": (*_both_stages("text_anchor", 10.0), "data.text_chat=0.0"),
    "anchor 30": _both_stages("text_anchor", 30.0),
    "KD on text": _KD,
    "PLoRA": ("lora.scope=audio",),
    "null space": (_NULL_SPACE,),
    "null space, anchor 10 at last": (_NULL_SPACE, _JOINT_ANCHOR),  # the quickstart's
}

WHOLE_SCHEDULE = {
    "KD on text": (*_KD, "lora.text_energy=1.0", "train.stages.joint.objectives.text_anchor=0.0"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, required=True, help="where the workdirs go")
    runs = parser.parse_args().runs
    results: dict[str, dict[str, Any]] = {"arms": {}, "whole_schedule": {}}
    for name, overrides in ARMS.items():
        results["arms"][name] = run(runs, name, "forgetting", overrides)
    for name, overrides in WHOLE_SCHEDULE.items():
        results["whole_schedule"][name] = run(runs, f"whole schedule, {name}", "quickstart", overrides)
    arms.write("forgetting", "Protections of the LLM's text, one seed each", results)
    draw(results["arms"])


def run(runs: Path, name: str, config: str, overrides: tuple[str, ...]) -> dict[str, Any]:
    workdir = runs / name.replace(", ", "-").replace(" ", "-")
    return arms.run(workdir, [f"--config=configs/{config}.py", *(f"--config.{override}" for override in overrides)])


def draw(results: dict[str, dict[str, Any]]) -> None:
    """Draws both costs of every arm: errors in speech with their 95% interval, and what the loss on text rose by."""
    figure, axes = plt.subplots(figsize=(8, 5))
    for name, scores in results.items():
        wer = {key: 100 * scores["sets"]["new voices"]["wer"][key] for key in ("value", "low", "high")}
        rise, questions = scores["text"]["loss"]["all"]["rise"], scores["text"]["questions"]
        reach = [[wer["value"] - wer["low"]], [wer["high"] - wer["value"]]]
        colour = "tab:orange" if "null" in name else "tab:blue"
        axes.errorbar(wer["value"], rise, xerr=reach, fmt="o", color=colour, elinewidth=0.8)
        label = f"{name} ({questions['adapted']}/{questions['n']})"
        axes.annotate(label, (wer["value"], rise), xytext=(0, 5), textcoords="offset points", fontsize=9, ha="center")
    axes.axhline(0.1, color="grey", linewidth=0.8, linestyle="--")
    axes.annotate("at most 0.1", (1, 0.1), xycoords=("axes fraction", "data"), fontsize=8, color="grey", ha="right")
    axes.set_xlabel("word error rate on new voices after a short schedule, % (95% interval)")
    axes.set_ylabel("rise of the loss on held-out text, nats a token")
    axes.set_title("Both costs of each protection (plain questions still right)", fontsize=10)
    axes.set_yscale("symlog", linthresh=0.1)
    axes.set_ylim(-0.03, 3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(FIGURE, metadata={"Date": None})
    print(f"wrote {FIGURE}")


if __name__ == "__main__":
    main()
