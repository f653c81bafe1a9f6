"""Writes the tables of README and benchmarks/README.md from results/: `python benchmarks/tables.py`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from arms import RESULTS, spread

BEGIN, END = "<!-- table: python benchmarks/tables.py -->\n", "<!-- end of table -->"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _head(cells: list[str]) -> list[str]:
    return [_row(cells), "|---" * len(cells) + "|"]


def quickstart(results: dict[str, Any]) -> str:
    """Returns the table of results/quickstart.json: a column a system; means over seeds, with the range."""
    systems: dict[str, list[dict[str, Any]]] = results["systems"]
    count = lambda runs: f"{len(runs)} seeds" if len(runs) > 1 else "1 seed"
    lines = _head(["", *(f"{name} ({count(runs)})" for name, runs in systems.items())])

    def add(name: str, value: Callable[[dict], float | None], scale: float = 1.0, digits: int = 1) -> None:
        """A value is None where it was not measured."""
        values = [[x for run in runs if (x := value(run)) is not None] for runs in systems.values()]
        lines.append(_row([name, *(spread(of_system, scale, digits) if of_system else "" for of_system in values)]))

    sets = next(iter(systems.values()))[0]["sets"]
    for name, scores in sets.items():
        add(f"WER %, {name} ({scores['n']} clips)", lambda run, name=name: run["sets"][name]["wer"]["value"], 100)
    add("rise of the loss on held-out text, adapters on, nats", lambda run: run["text"]["loss"]["all"]["rise"], 1, 3)
    n = next(iter(systems.values()))[0]["text"]["questions"]["n"]
    add(f"plain text questions right, adapters on (of {n})", lambda run: run["text"]["questions"]["adapted"], 1, 0)
    # The others shared the machine.
    for part in ("train", "evaluate"):
        minutes = lambda run, part=part: run["seconds"][part] / 60 if run["cores"] == 2 else None
        add(f"minutes to {part} on two cores", minutes)
    add("peak memory, GiB", lambda run: run["peak_memory_gib"])
    return "\n".join(lines) + "\n"


def forgetting(results: dict[str, Any]) -> str:
    """Returns the table of results/forgetting.json: a row a protection."""
    sections = {"": results["arms"], "whole schedule: ": results["whole_schedule"]}
    runs = {f"{prefix}{name}": run for prefix, arms in sections.items() for name, run in arms.items()}
    n = next(iter(runs.values()))["text"]["questions"]["n"]
    lines = _head(
        ["protection", "WER %, new voices (95% interval)", "rise of the loss on text, nats", f"questions of {n}"]
    )
    for name, run in runs.items():
        wer, text = run["sets"]["new voices"]["wer"], run["text"]
        cells = [name, f"{100 * wer['value']:.1f} ({100 * wer['low']:.1f} to {100 * wer['high']:.1f})"]
        lines.append(_row([*cells, f"{text['loss']['all']['rise']:.3f}", str(text["questions"]["adapted"])]))
    return "\n".join(lines) + "\n"


PAGES = {Path(__file__).parents[1] / "README.md": quickstart, Path(__file__).parent / "README.md": forgetting}


def with_table(page: Path) -> str:
    """Returns the page with the table of the committed results between its markers."""
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    of = PAGES[page]
    return before + BEGIN + "\n" + of(json.loads((RESULTS / f"{of.__name__}.json").read_text())) + "\n" + END + after


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(with_table(path))
