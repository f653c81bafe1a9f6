"""A comparison as a table: a row a system, means over seeds with the range."""

from collections.abc import Mapping
from typing import Any

from aura_jax.evaluate.score import COLUMNS
from aura_jax.experiments.compare.summary import metric_of

_FIRST_TOKEN = ("2", "10")  # seconds of speech


def rows(summary: Mapping[str, Any], budget: str = "steps") -> list[list[str]]:
    """Returns the table's cells, the head first.

    Args:
      summary: of `summary.summarise`.
      budget: "time" for what the systems learnt in equal time; those that have no such result are left out.
    """
    metrics = {name: metric_of(summary, name) for name in summary["sets"]}
    head = ["system", "seeds", "steps", *(f"{COLUMNS[metric][0]}, {name}" for name, metric in metrics.items())]
    head += [f"first token of {seconds} s, ms" for seconds in _FIRST_TOKEN]
    head += ["trained, M", "before the first step, min", "steps, min", "peak memory, GiB"]
    out = [head]
    for name, system in summary["systems"].items():
        of = system if budget == "steps" else system.get("equal_time")
        if of is None:
            continue
        timing = system.get("timing") or {}
        cells = [name, str(len(of["seeds"])), f"{of['steps']:,}" if of.get("steps") else "-"]
        cells += [_spread(of["sets"][one].get(metric), COLUMNS[metric][1]) for one, metric in metrics.items()]
        cells += [first_token(timing, seconds) for seconds in _FIRST_TOKEN]
        cells.append(f"{system['parameters']['trained'] / 1e6:.1f}" if "parameters" in system else "-")
        cells += ["-", "-"]
        if "schedule_seconds" in timing:
            minutes = timing["schedule_seconds"] / 60
            if budget == "time":
                minutes *= of["steps"] / system["steps"]
            cells[-2:] = [f"{timing['preparation_seconds'] / 60:.1f}", f"{minutes:.1f}"]
        memory = timing.get("peak_memory_gib")
        cells.append(f"{memory:.1f}" if memory else "-")
        out.append(cells)
    return out


def text(summary: Mapping[str, Any]) -> str:
    """Returns the table as plain text; what was learnt in equal time below it, if anything was."""
    return "\n\n".join(_plain(cells) for budget in ("steps", "time") if len(cells := rows(summary, budget)) > 1)


def _plain(cells: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    pad = lambda i, word: word.ljust(widths[i]) if i == 0 else word.rjust(widths[i])
    return "\n".join("  ".join(pad(i, word) for i, word in enumerate(row)).rstrip() for row in cells)


def markdown(summary: Mapping[str, Any], budget: str = "steps") -> str:
    """Returns the table in Markdown."""
    head, *body = ("| " + " | ".join(row) + " |" for row in rows(summary, budget))
    return "\n".join([head, "|---" + "|---:" * (head.count("|") - 2) + "|", *body])


def first_token(timing: Mapping[str, Any], seconds: str) -> str:
    """Returns the milliseconds to the first token, and with the adapters merged where they can be."""
    ways = timing.get("first_token")
    if not ways:
        return "-"
    shown = {way: f"{1000 * of[seconds]['median']:.0f}" for way, of in ways.items()}
    merged = f" ({shown.pop('merged')} merged)" if "merged" in shown else ""
    return next(iter(shown.values())) + merged


def _spread(value: Mapping[str, float] | None, scale: float, digits: int = 1) -> str:
    """Returns a mean with its range over seeds, (A to B); of one seed the middle 95% of a bootstrap, [A, B], if there
    is one; "-" if it was not measured."""
    if value is None:
        return "-"
    mean, low, high = (f"{scale * value[key]:.{digits}f}" for key in ("mean", "low", "high"))
    if value["runs"] > 1:
        return f"{mean} ({low} to {high})"
    return f"{mean} [{low}, {high}]" if value["low"] != value["high"] else mean
