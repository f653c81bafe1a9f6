"""The report as one page that needs nothing else, and its figures as PNG beside it.

Every number in the page is written by `Numbers` from a place in the report's dictionary and carries that place with it
(`<data value=... data-key=...>`), so that the page can be checked against the dictionary.
"""

import base64
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from rapidfuzz.distance import Levenshtein

from aura_jax.evaluate.score import COLUMNS, normalise
from aura_jax.report import diagram, figures, theme

Key = Sequence[str | int]
Drawing = tuple[str, Callable[[float], Figure]]  # what a figure shows, and the figure at a width

# What a section says when its part is missing and `missing` has no line of its own for it.
ABSENT = {
    "metrics": "No step has been recorded yet: metrics.jsonl is missing or empty.",
    "validation": "No validation was recorded.",
    "alignment": "No distillation losses were recorded, block by block.",
    "similarity": "The states of student and teacher were not compared.",
    "cosine": "Nothing was distilled: no pairs of blocks to compare.",
    "scores": "No test set has been scored yet.",
    "text": "What became of the LLM's text was not measured.",
    "examples": "No transcripts were found to show.",
    "speed": "No times were recorded.",
    "breakdown": "The parts of a step were not timed.",
    "wall": "The parts of the whole run's time were not recorded.",
    "commands": "The commands that made this run were not recorded.",
    "environment": "The software and the device were not recorded.",
}
_MINUS, _NONE = "\u2212", Markup('<span class="none">\u2013</span>')
_OPTIONAL = (
    *("finished", "total_steps", "commands", "environment", "metrics", "validation"),
    *("alignment", "similarity", "scores", "examples", "speed"),
)


class Numbers:
    """Writes numbers of a dictionary as HTML that names their place in it."""

    def __init__(self, data: Mapping[str, Any]):
        self._data = data

    def _at(self, key: Key) -> Any:
        found: Any = self._data
        for part in key:
            found = found[part]
        return found

    def show(self, key: Key, digits: int | None = 0, scale: float = 1, plus: bool = False) -> Markup:
        """Returns the number at `key`, times `scale`, rounded to `digits`; a dash if there is none.

        Args:
          key: the keys and indices that lead to it.
          digits: after the point; None: as many as needed, up to six in all.
          plus: write the sign of a positive number too.
        """
        value = self._at(key)
        if value is None or not math.isfinite(value):
            return _NONE
        return self._data_element(value, ".".join(map(str, key)), None, digits, scale, plus)

    def combine(self, how: str, keys: Sequence[Key], digits: int = 0, scale: float = 1) -> Markup:
        """Returns the "sum" or "mean" of the numbers at `keys`, as `show` does; the element lists all keys."""
        value = math.fsum(self._at(key) for key in keys)
        value = value / len(keys) if how == "mean" else value
        names = json.dumps([".".join(map(str, key)) for key in keys])
        return self._data_element(value, names, how, digits, scale, False)

    def _data_element(
        self, value: float, key: str, how: str | None, digits: int | None, scale: float, plus: bool
    ) -> Markup:
        sign = "+" if plus else ""
        shown = f"{value * scale:{sign}g}" if digits is None else f"{value * scale:{sign},.{digits}f}"
        if float(shown.replace(",", "")) == 0:
            shown = shown.lstrip("+-")  # no signed zeros
        attributes = {"value": repr(value), "data-key": key}
        if how is not None:
            attributes["data-how"] = how
        if scale != 1:
            attributes["data-scale"] = repr(scale)
        written = "".join(f' {name}="{escape(text)}"' for name, text in attributes.items())
        return Markup(f"<data{written}>{shown.replace('-', _MINUS)}</data>")


def marked_words(reference: str, hypothesis: str) -> tuple[Markup, Markup]:
    """Returns both texts with the words that count as errors marked: <del> in the reference, <ins> in the hypothesis.

    Words are compared as they are scored. They are shown as written, or, where the normaliser joins or splits words
    ("forty two" and "42"), as normalised.
    """
    tokens = lambda words: [token for word in words for token in normalise(word).split()]
    texts = []
    for text in (reference, hypothesis):
        written, scored = text.split(), normalise(text).split()
        texts.append(written if tokens(written) == scored else scored)
    wrong: tuple[set[int], set[int]] = (set(), set())
    for edit in Levenshtein.editops(tokens(texts[0]), tokens(texts[1])):
        if edit.tag != "insert":
            wrong[0].add(edit.src_pos)
        if edit.tag != "delete":
            wrong[1].add(edit.dest_pos)
    out = []
    for written, places, tag in zip(texts, wrong, ("del", "ins"), strict=True):
        words, start = [], 0
        for word in written:
            end = start + len(tokens([word]))
            is_wrong = not places.isdisjoint(range(start, end))
            words.append(Markup(f"<{tag}>{escape(word)}</{tag}>") if is_wrong else escape(word))
            start = end
        out.append(Markup(" ").join(words))
    return out[0], out[1]


def _recorded(values: Sequence[float | None]) -> list[int]:
    """Returns where there are numbers: a stage without an objective leaves none."""
    return [i for i, value in enumerate(values) if value is not None and math.isfinite(value)] or [0]


def drawings(data: Mapping[str, Any]) -> dict[str, Drawing]:
    """Returns of each figure that the dictionary has data for what it shows, and its drawing at a width."""
    model, stages, pairs = data["model"], data["stages"], data["model"]["pairs"]
    out: dict[str, Drawing] = {
        "method": ("The method with the dimensions of this run", lambda width: diagram.method(model, width))
    }
    if metrics := data.get("metrics"):
        curves = lambda width: figures.learning_curves(metrics, stages, data.get("validation"), width)
        out["learning"] = ("Losses, gradient norm and learning rate over steps", curves)
    if part := data.get("alignment"):
        out["alignment"] = ("Alignment of each block over steps", lambda width: figures.alignment(part, stages, width))
    if similarity := data.get("similarity"):
        n_adapted = model["n_adapted"]
        if similarity["after"]["cosine"]:
            out["cosine"] = (
                "Cosine of each pair of blocks before and after training",
                lambda width: figures.cosine(similarity, pairs, width),
            )
        out["cka-blocks"] = (
            "CKA of every LLM block with its nearest teacher block, before and after",
            lambda width: figures.cka_blocks(similarity, pairs, n_adapted, width),
        )
        out["cka-maps"] = (
            "CKA of every LLM block with every teacher block, before and after",
            lambda width: figures.cka_maps(similarity, pairs, n_adapted, width),
        )
    scores = data.get("scores") or {}
    if sets := {name: of_set for name, of_set in (scores.get("sets") or {}).items() if "wer" in of_set}:
        out["word-errors"] = (
            "Word error rate of each test set with its interval",
            lambda width: figures.word_errors(sets, width),
        )
    if loss := (scores.get("text") or {}).get("loss"):
        out["text-rise"] = ("Rise of the loss on each kind of text", lambda width: figures.text_rise(loss, width))
    speed = data.get("speed") or {}
    if breakdown := speed.get("breakdown"):
        out["step-time"] = ("Parts of a step's time", lambda width: figures.parts(breakdown, width))
    if wall := speed.get("wall"):
        out["wall-time"] = ("Parts of the run's time", lambda width: figures.parts(wall, width))
    return out


def environment(folder: Path = Path(__file__).parent) -> jinja2.Environment:
    """Returns an environment for the templates of a folder, beside the parts that all pages share."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, Path(__file__).parent]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def inline(drawings: Mapping[str, Drawing]) -> dict[str, Markup]:
    """Returns every figure as SVG for the page."""
    return {name: _inline(name, *drawing) for name, drawing in drawings.items()}


def write_figures(drawings: Mapping[str, Drawing], folder: Path) -> None:
    """Writes every figure as a PNG into a folder, which need not be there."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (_, draw) in drawings.items():
        theme.png(draw(theme.WIDE), folder / f"{name}.png")


def _inline(name: str, label: str, draw: Callable[[float], Figure]) -> Markup:
    """Returns a figure for a screen and for a phone; the style sheet shows one of them."""
    wide = theme.inline_svg(draw(theme.WIDE), f"{name}-w", label)
    narrow = theme.inline_svg(draw(theme.NARROW), f"{name}-n", label)
    return Markup(f'<div class="wide">{wide}</div>\n<div class="narrow">{narrow}</div>')


def _as_written(shown: Markup, text: str) -> bool:
    return shown.striptags() == " ".join(text.split())


def _example(example: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what the template shows of an example beside its numbers."""
    reference, hypothesis = marked_words(example["reference"], example["hypothesis"])
    mel, audio = example.get("mel"), example.get("audio")
    picture = base64.b64encode(figures.mel_picture(mel)).decode() if mel else None
    return {
        "reference": reference,
        "hypothesis": hypothesis,
        # What was compared may be written quite differently: then it is shown as it stands, too.
        "written": None if _as_written(reference, example["reference"]) else example["reference"],
        "heard": None if _as_written(hypothesis, example["hypothesis"]) else example["hypothesis"],
        "picture": f"data:image/png;base64,{picture}" if picture else None,
        "audio": f"data:{audio['mime']};base64,{audio['base64']}" if audio else None,
    }


def render(data: Mapping[str, Any]) -> str:
    """Returns the page. `data` is what `aura_jax.report.collect` returns; optional parts may be missing or None."""
    data = {**dict.fromkeys(_OPTIONAL), **data}
    missing = data.get("missing") or {}
    numbers = Numbers(data)
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            data=data,
            num=numbers.show,
            combine=numbers.combine,
            svg=inline(drawings(data)),
            absent=lambda section: missing.get(section) or ABSENT[section],
            examples=[_example(example) for example in data["examples"] or ()],
            recorded=_recorded,
            columns=COLUMNS,
            shades=theme.shades,
            Markup=Markup,
            config=json.dumps(data["config"], indent=2, ensure_ascii=False),
        )
    )


def write(data: Mapping[str, Any], directory: Path) -> Path:
    """Writes `report.html` and `figures/*.png` into `directory`, each whole or not at all; returns the page's path."""
    write_figures(drawings(data), directory / "figures")
    path = directory / "report.html"
    partial = path.with_name(path.name + ".partial")
    partial.write_text(render(data), encoding="utf-8")
    partial.replace(path)
    return path
