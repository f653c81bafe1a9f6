"""The model card of an export: what it is, how to use it, what it was trained on, what it scored, whose it is."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from aura_jax import __version__, assets

_TEMPLATE = Path(__file__).parent / "card.md.j2"


def scores_of(workdir: Path, step: int) -> dict[str, Any] | None:
    """Returns the run's own scores (`aura-jax eval` without sets), if they are of this step's weights."""
    path = workdir / "scores.json"
    if not path.is_file():
        return None
    scores = json.loads(path.read_text(encoding="utf-8"))
    return scores if scores.get("scored_step") == step else None


def model_card(format: str, about: Mapping[str, Any], scores: Mapping[str, Any] | None, dtype: str) -> str:
    """Returns the card's Markdown.

    Args:
      about: `audio_config.json`.
      scores: as `scores_of`.
      dtype: of the LLM's weights in this directory.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATE.parent),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["percent"] = lambda rate: f"{100 * rate:.1f}"
    base, teacher = about["base"]["name"], (about["teacher"] or {}).get("name")
    return environment.get_template(_TEMPLATE.name).render(
        format=format,
        about=about,
        run=about["run"],
        scores=scores,
        dtype=dtype,
        base=base,
        base_licence=assets.licence(base),
        teacher=teacher,
        teacher_licence=assets.licence(teacher) if teacher else None,
        version=__version__,
    )
