"""The page of a comparison: one file, its figures as PNG beside it, and the numbers that both are made of."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aura_jax.evaluate.score import COLUMNS
from aura_jax.experiments.compare import figures
from aura_jax.report import page as report_page
from aura_jax.report.page import Drawing, Numbers


def drawings(summary: Mapping[str, Any]) -> dict[str, Drawing]:
    """Returns the figures that there are numbers for."""
    systems = summary["systems"].values()
    has = lambda key: any(system.get(key) for system in systems)
    out: dict[str, Drawing] = {}
    timed = any((system.get("timing") or {}).get("first_token") for system in systems)
    if timed:
        out["quality"] = (
            "Scores against the time to the first token",
            lambda width: figures.quality_over_first_token(summary, width=width),
        )
        out["first-token"] = (
            "Time to the first token over seconds of speech",
            lambda width: figures.first_tokens(summary, width),
        )
    if has("curves"):
        out["learning"] = (
            "Word error rate on held-out voices over training",
            lambda width: figures.learning(summary, width),
        )
    if has("noise"):
        out["noise"] = ("Scores in noise", lambda width: figures.noise(summary, width))
    if has("similarity"):
        out["alignment"] = (
            "CKA of LLM blocks with teacher blocks, of each system",
            lambda width: figures.alignment(summary, width),
        )
    if any("rise" in system.get("text", {}) for system in systems):
        out["forgetting"] = ("Rise of the loss on text", lambda width: figures.forgetting(summary, width))
    return out


def render(summary: Mapping[str, Any]) -> str:
    """Returns the page. `summary` is what `summary.summarise` returns."""
    template = report_page.environment(Path(__file__).parent).get_template("compare.html.j2")
    return template.render(
        data=summary, num=Numbers(summary).show, svg=report_page.inline(drawings(summary)), columns=COLUMNS
    )


def write(summary: Mapping[str, Any], directory: Path) -> Path:
    """Writes `compare.html`, `summary.json` and `figures/*.png` into `directory`; returns the page's path."""
    report_page.write_figures(drawings(summary), directory / "figures")
    path = directory / "compare.html"
    for file, text in ((path, render(summary)), (directory / "summary.json", json.dumps(summary, indent=1) + "\n")):
        partial = file.with_name(f"{file.name}.partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(file)
    return path
