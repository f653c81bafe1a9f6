"""From a workdir to its report."""

import json
from pathlib import Path

from aura_jax.report import page
from aura_jax.report.collect import collect

_HEAVY = ("audio", "mel")  # of the examples: in the page, not among the numbers


def report_run(workdir: Path, output: Path | None = None, progress: bool = True) -> Path:
    """Writes `report.html`, its figures (`figures/*.png`) and its numbers (`report.json`); returns the page's path.

    Args:
      workdir: of a run, finished or not.
      output: the folder to write to; None: the workdir.

    Raises:
      UserError: it is no workdir, its files are malformed, or its models cannot be found.
    """
    data = collect(workdir, progress)
    path = page.write(data, output or workdir)
    examples = [{k: v for k, v in one.items() if k not in _HEAVY} for one in data.get("examples") or ()]
    partial = path.with_name(".report.json.partial")
    partial.write_text(json.dumps({**data, "examples": examples}, indent=1) + "\n")
    partial.replace(path.with_name("report.json"))
    return path
