"""The table and the figure of `aura-jax bench train`, from what it wrote and nothing else."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

_GIB = 2**30
_COLOURS = {"torch": "tab:blue", "jax": "tab:orange"}


def lines(rows: list[list[str]]) -> list[str]:
    """Aligns a first column to the left and the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in rows
    ]


def spread(values: Mapping[str, float]) -> str:
    """Returns a median and its range."""
    return f"{values['median']:.2f} ({values['low']:.2f} to {values['high']:.2f})"


def table(results: Mapping[str, Any]) -> str:
    """Returns the plain tables: arms, how they compare, and the sweep."""
    base = results["base"]
    arms: Mapping[str, Any] = base["arms"]
    stages = list(next(iter(arms.values()))["stages"])
    head = ["arm"]
    for stage in stages:
        head += [f"s/step, {stage}", "tokens/s", "audio s/s", "of peak"]
    rows = [[*head, "start s", "GiB", "schedule min"]]
    for name, arm in arms.items():
        cells = [name]
        for stage in stages:
            of = arm["stages"][stage]
            cells += [f"{of['seconds_per_step']:.3f}", f"{of['tokens_per_second']:.0f}"]
            cells += [f"{of['audio_seconds_per_second']:.1f}", f"{100 * of['share_of_matmul_peak']:.0f}%"]
        memory = arm["peak_memory_bytes"]["since_watch"]
        cells += [f"{arm['start_seconds']['total']:.1f}", f"{memory / _GIB:.2f}" if memory else "?"]
        rows.append([*cells, f"{arm['schedule']['total'] / 60:.1f}"])
    out = [results["machine"], "", *lines(rows), ""]
    out += [f"{name} failed: {reason}" for name, reason in base["failed"].items()]

    rows = [["times as fast: median (range)", *stages, "memory"]]
    for ours, peers in base["ratios"].items():
        for peer, ratio in peers.items():
            memory = "?" if ratio["memory"] is None else f"{ratio['memory']:.2f}"
            rows.append([f"{ours} / {peer}", *(spread(ratio["speed"][stage]) for stage in stages), memory])
    out += [*lines(rows), ""]

    rows = [["sweep, full step with the teacher", "value", "times as fast"]]
    for factor, points in results["sweep"].items():
        rows += [[factor, f"{point['value']:g}", spread(point["speed"])] for point in points]
    peaks = [
        f"{library} {dtype} {value / 1e9:.0f}"
        for library, of_library in base["matmul_flops_per_second"].items()
        for dtype, value in of_library.items()
    ]
    return "\n".join([*out, *lines(rows), "", f"best square product, GFLOP/s: {', '.join(peaks)}"])


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Draws tokens a second of every arm, and the sweep's ratios."""
    arms: Mapping[str, Any] = results["base"]["arms"]
    stages = list(next(iter(arms.values()))["stages"])
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), width_ratios=(3, 2))
    height = 0.8 / len(stages)
    for i, stage in enumerate(stages):
        for row, arm in enumerate(arms.values()):
            value = arm["stages"][stage]["tokens_per_second"]
            y = row + (i - (len(stages) - 1) / 2) * height
            left.barh(y, value, 0.9 * height, color=_COLOURS[arm["library"]], alpha=1.0 if i else 0.6)
            left.annotate(f" {value:.0f}, {stage}", (value, y), fontsize=8, va="center")
    left.set_yticks(range(len(arms)), list(arms), fontsize=9)
    left.invert_yaxis()
    left.margins(x=0.2)
    left.set_xlabel("speech rows' tokens a second, on the quickstart's batches")
    left.set_title("Train step: tokens a second", fontsize=10)

    for factor, points in results["sweep"].items():
        places = [x / max(1, len(points) - 1) for x in range(len(points))]
        median = [point["speed"]["median"] for point in points]
        reach = [
            [point["speed"]["median"] - point["speed"]["low"] for point in points],
            [point["speed"]["high"] - point["speed"]["median"] for point in points],
        ]
        values = ", ".join(f"{point['value']:g}" for point in points)
        right.errorbar(places, median, yerr=reach, marker="o", markersize=4, capsize=2, label=f"{factor}: {values}")
    right.axhline(1.0, color="grey", linewidth=0.8, linestyle="--")
    right.set_xticks([])
    right.set_xlabel("smallest to largest value of one factor")
    right.set_ylim(bottom=0)
    right.set_title("ours / torch eager, float32: times as fast", fontsize=10)
    right.legend(fontsize=8, frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
