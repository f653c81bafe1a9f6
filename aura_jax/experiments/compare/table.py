"""The results of a comparison as a table: a row a system, means over seeds with the range."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_FIRST_TOKEN = ("2", "10")  # seconds of speech


def rows(results: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Returns the table's cells, the head first; systems in the order of their first result."""
    systems: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        systems.setdefault(result["system"], []).append(result)
    sets = list(dict.fromkeys(name for result in results for name in result["scores"]["sets"]))
    head = ["system", "seeds", *(f"WER %, {name}" for name in sets)]
    head += [f"first token of {seconds} s, ms" for seconds in _FIRST_TOKEN]
    head += ["trained, M", "train, min", "peak, GiB"]
    out = [head]
    for name, of_system in systems.items():
        cells = [name, str(len(of_system))]
        cells += [_cell(of_system, lambda r, s=s: 100 * r["scores"]["sets"][s]["wer"]["value"]) for s in sets]
        cells += [_cell(of_system, lambda r, s=s: 1000 * r["first_token"][s]["median"], 0) for s in _FIRST_TOKEN]
        cells.append(_cell(of_system[:1], lambda r: sum(part["trained"] for part in r["parameters"]) / 1e6))
        cells.append(_cell(of_system, lambda r: r["scores"]["seconds"]["train"] / 60))
        cells.append(_cell(of_system, lambda r: r["peak_memory_gib"]))
        out.append(cells)
    return out


def text(results: Sequence[Mapping[str, Any]]) -> str:
    """Returns the table as plain text."""
    cells = rows(results)
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    pad = lambda i, word: word.ljust(widths[i]) if i == 0 else word.rjust(widths[i])
    return "\n".join("  ".join(pad(i, word) for i, word in enumerate(row)).rstrip() for row in cells)


def markdown(results: Sequence[Mapping[str, Any]]) -> str:
    """Returns the table in Markdown."""
    head, *body = ("| " + " | ".join(row) + " |" for row in rows(results))
    return "\n".join([head, "|---" + "|---:" * (len(rows(results)[0]) - 1) + "|", *body])


def _cell(results: Sequence[Mapping[str, Any]], value: Callable[[Mapping[str, Any]], float], digits: int = 1) -> str:
    """Returns the mean of a value, with its range if there are several; "-" where it was not measured."""
    try:
        values = [value(result) for result in results]
    except KeyError:
        return "-"
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"
