"""What keeps the LLM an LLM, and what it costs in speech: `python benchmarks/forgetting.py --runs runs/forgetting`.

Each arm is configs/forgetting.py with one protection of the text. Writes results/forgetting.json and
docs/forgetting.svg. Finished arms are not repeated, interrupted ones resume.
"""

import argparse
from pathlib import Path
from typing import Any

import arms
import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

CONFIG = "--config=configs/forgetting.py"
FIGURE = Path(__file__).parents[1] / "docs" / "forgetting.svg"


def _both_stages(objective: str, weight: float) -> tuple[str, ...]:
    return tuple(f"train.stages.{stage}.objectives.{objective}={weight}" for stage in ("distil", "joint"))


_NULL_SPACE = "lora.text_energy=0.03"
_JOINT_ANCHOR = "train.stages.joint.objectives.text_anchor=10.0"
ARMS: dict[str, tuple[str, ...]] = {
    "nothing": (),
    "anchor 10": _both_stages("text_anchor", 10.0),
    "anchor 10, prose only": (*_both_stages("text_anchor", 10.0), "data.text_chat=0.0"),
    "anchor 30": _both_stages("text_anchor", 30.0),
    "KD on text": _both_stages("text_kd", 1.0),
    "PLoRA": ("lora.scope=audio",),
    "null space": (_NULL_SPACE,),
    "null space, anchor 10 at last": (_NULL_SPACE, _JOINT_ANCHOR),  # the quickstart's
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, required=True, help="where the workdirs go")
    runs = parser.parse_args().runs
    results: dict[str, dict[str, Any]] = {}
    for name, overrides in ARMS.items():
        workdir = runs / name.replace(", ", "-").replace(" ", "-")
        results[name] = arms.run(workdir, [CONFIG, *(f"--config.{override}" for override in overrides)])
        arms.write("forgetting", "Protections of the LLM's text, one seed each, on a short schedule", {"arms": results})
    draw(results)


def draw(results: dict[str, dict[str, Any]]) -> None:
    """Draws both costs of every arm: errors in speech, and what the loss on text rose by."""
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for name, scores in results.items():
        wer = 100 * scores["sets"]["new voices"]["wer"]["value"]
        rise, questions = scores["text"]["loss"]["all"]["rise"], scores["text"]["questions"]
        axes.plot(wer, rise, "o", color="tab:orange" if "null" in name else "tab:blue")
        label = f"{name} ({questions['adapted']}/{questions['n']})"
        axes.annotate(label, (wer, rise), xytext=(6, 4), textcoords="offset points", fontsize=9)
    axes.axhline(0.1, color="grey", linewidth=0.8, linestyle="--")
    axes.set_xlabel("word error rate on new voices, %")
    axes.set_ylabel("rise of the loss on held-out text, nats a token")
    axes.set_title("Both costs of each protection (plain questions still right)", fontsize=10)
    axes.set_yscale("symlog", linthresh=0.1)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(FIGURE, metadata={"Date": None})
    print(f"wrote {FIGURE}")


if __name__ == "__main__":
    main()
