"""Writes the README's table of measured results from results/quickstart.json: `python benchmarks/tables.py`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from arms import RESULTS, spread

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- table: python benchmarks/tables.py -->\n", "<!-- end of table -->"


def table(systems: dict[str, list[dict[str, Any]]]) -> str:
    """Returns the Markdown table: a column a system; means over seeds, with the range where there are several."""
    row = lambda name, cells: f"| {name} | " + " | ".join(cells) + " |"
    count = lambda runs: f"{len(runs)} seeds" if len(runs) > 1 else "1 seed"
    lines = [row("", [f"{name} ({count(runs)})" for name, runs in systems.items()]), "|---" * (1 + len(systems)) + "|"]

    def add(name: str, value: Callable[[dict], float | None], scale: float = 1.0, digits: int = 1) -> None:
        """A value is None where it was not measured."""
        values = [[x for run in runs if (x := value(run)) is not None] for runs in systems.values()]
        lines.append(row(name, [spread(of_system, scale, digits) if of_system else "" for of_system in values]))

    sets = next(iter(systems.values()))[0]["sets"]
    for name, scores in sets.items():
        add(f"WER %, {name} ({scores['n']} clips)", lambda run, name=name: run["sets"][name]["wer"]["value"], 100)
    add("rise of the loss on held-out text, adapters on, nats", lambda run: run["text"]["loss"]["all"]["rise"], 1, 3)
    n = next(iter(systems.values()))[0]["text"]["questions"]["n"]
    add(f"plain text questions right, adapters on (of {n})", lambda run: run["text"]["questions"]["adapted"], 1, 0)
    # The others shared the machine.
    for part in ("train", "evaluate"):
        add(
            f"minutes to {part} on two cores", lambda r, part=part: r["seconds"][part] / 60 if r["cores"] == 2 else None
        )
    add("peak memory, GiB", lambda run: run["peak_memory_gib"])
    return "\n".join(lines) + "\n"


def with_table(readme: str) -> str:
    """Returns the README with the table of the committed results between its markers."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    systems = json.loads((RESULTS / "quickstart.json").read_text())["systems"]
    return before + BEGIN + "\n" + table(systems) + "\n" + END + after


if __name__ == "__main__":
    README.write_text(with_table(README.read_text()))
