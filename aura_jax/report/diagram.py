"""The method drawn with one run's dimensions: what hears, what teaches, what is trained, and what is dropped.

Two drawings of the same parts: from left to right for a screen, from top to bottom for a phone. Lengths are CSS pixels
from the upper left corner. Blocks are counted from 0, as in metrics and weights.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from aura_jax.report import theme
from aura_jax.report.theme import ACCENT, BAND, FAINT, INK, PAGE, SMALL, SOFT, TEXT, TINT, WARM, WARM_TINT, WIDE

_FILLS = {
    "trained": (TINT, ACCENT, "-"),
    "frozen": (BAND, FAINT, "-"),
    "dropped": (PAGE, FAINT, (0, (4, 3))),
    "heads": (WARM_TINT, WARM, (0, (4, 3))),
}
_CELL_TEXT = 10.5


@dataclasses.dataclass(frozen=True)
class Box:
    """A rectangle on the canvas: left, top, width, height."""

    x: float
    y: float
    w: float
    h: float

    @property
    def centre(self) -> tuple[float, float]:
        return self.x + self.w / 2, self.y + self.h / 2


class _Canvas:
    """A figure drawn on in pixels, y downwards."""

    def __init__(self, width: float, height: float):
        self.figure = theme.figure(width, height)
        self._ax = theme.axes(self.figure, 0, 0, width, height)
        self._ax.set_axis_off()
        self._ax.set_xlim(0, width)
        self._ax.set_ylim(height, 0)

    def box(self, box: Box, kind: str, *lines: str, size: float = SMALL, radius: float = 5, gid: str = "") -> None:
        """Draws a rounded box with centred lines of text, the first in ink."""
        fill, edge, dash = _FILLS[kind]
        style = f"round,pad=0,rounding_size={min(radius, box.w / 3, box.h / 3)}"
        patch = FancyBboxPatch((box.x, box.y), box.w, box.h, boxstyle=style, fc=fill, ec=edge, ls=dash, lw=1.1)
        patch.set_gid(gid or None)
        self._ax.add_patch(patch)
        x, y = box.centre
        for i, line in enumerate(lines):
            dy = (i - (len(lines) - 1) / 2) * (size + 4.5)
            self.text(x, y + dy, line, ha="center", va="center_baseline", size=size, color=INK if i == 0 else SOFT)

    def zone(self, box: Box) -> None:
        """Draws the dashed outline around what only training has."""
        self._ax.add_patch(Rectangle((box.x, box.y), box.w, box.h, fc="none", ec=FAINT, ls=(0, (1, 3)), lw=1.2))

    def text(self, x: float, y: float, text: str, **kwargs: Any) -> None:
        self._ax.text(x, y, text, **{"color": SOFT, "size": SMALL, "va": "center_baseline", **kwargs})

    def arrow(self, start: tuple[float, float], end: tuple[float, float], pull: bool = False, gid: str = "") -> None:
        colour = WARM if pull else SOFT
        style = "-|>,head_length=4.5,head_width=2.6"
        patch = FancyArrowPatch(
            start, end, arrowstyle=style, mutation_scale=1, color=colour, lw=1.3, shrinkA=0, shrinkB=0
        )
        patch.set_gid(gid or None)
        self._ax.add_patch(patch)

    def line(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        self._ax.plot(*zip(start, end, strict=True), color=SOFT, lw=1.3)

    def wave(self, box: Box) -> None:
        """Draws a word's worth of sound into a box."""
        n = 23
        for i in range(n):
            x = box.x + 10 + (box.w - 20) * i / (n - 1)
            loud = (0.25 + 0.75 * abs(math.sin(i * 0.9) * math.sin(0.35 + i * 0.31))) * (box.h / 2 - 9)
            self._ax.plot(
                [x, x], [box.centre[1] - loud, box.centre[1] + loud], color=SOFT, lw=1.5, solid_capstyle="round"
            )


def _blocks(canvas: _Canvas, boxes: Sequence[Box], kind: str, name: str) -> None:
    """Draws a stack of blocks, with their numbers if there is room for them."""
    for i, box in enumerate(boxes):
        fits = box.h >= _CELL_TEXT + 2 and box.w >= 0.75 * _CELL_TEXT * len(str(len(boxes) - 1))
        canvas.box(box, kind, *([str(i)] if fits else []), size=_CELL_TEXT, radius=3, gid=f"{name}-{i}")


def _rest(model: Mapping[str, Any]) -> str | None:
    """Returns the numbers of the blocks without LoRA, or None if every block has it."""
    first, last = model["n_adapted"], model["llm_blocks"] - 1
    return None if first > last else (str(first) if first == last else f"{first} to {last}")


def _clamp(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def method(model: Mapping[str, Any], width: float = WIDE) -> Figure:
    """The method with this run's dimensions. `model` is the report's dictionary of that name."""
    if model.get("encoder"):
        return _chain(model, width)
    return _across(model) if width >= WIDE else _down(model, width)


def _chain(model: Mapping[str, Any], width: float) -> Figure:
    """A system that keeps its encoder: one part after the other."""
    n, rate = model["n_adapted"], model["token_rate"]
    parts = [
        ("frozen", theme.literal(model["encoder"], 24), f"encoder, {model['encoder_blocks']} blocks"),
        ("trained", "audio embedder", f"{model['embedder']}, " + (f"{rate:g} tokens/s" if rate else "as many as text")),
        (
            "trained" if n else "frozen",
            theme.literal(model["llm"], 24),
            f"LoRA of rank {model['rank']} on {n} of {model['llm_blocks']}" if n else f"{model['llm_blocks']} blocks",
        ),
    ]
    across = width >= WIDE
    canvas = _Canvas(width, 148 if across else 392)
    w, h, step = (200, 54, 226) if across else (220, 54, 82)
    speech = Box(1, 24, 84, h) if across else Box(width / 2 - 56, 2, 112, 44)
    canvas.box(speech, "frozen")
    canvas.wave(speech)
    at = (speech.x + speech.w, speech.centre[1]) if across else (width / 2, speech.y + speech.h)
    for i, (kind, *lines) in enumerate(parts):
        box = Box(111 + i * step, 24, w - 14, h) if across else Box((width - w) / 2, 74 + i * step, w, h)
        end = (box.x - 2, box.centre[1]) if across else (width / 2, box.y - 2)
        canvas.arrow((at[0] + 2, at[1]) if across else (at[0], at[1] + 2), end)
        canvas.box(box, kind, *lines, size=SMALL - 1)
        at = (box.x + box.w, box.centre[1]) if across else (width / 2, box.y + box.h)
    end = (at[0] + 20, at[1]) if across else (at[0], at[1] + 22)
    canvas.arrow((at[0] + 2, at[1]) if across else (at[0], at[1] + 2), end)
    canvas.text(
        end[0] + (5 if across else 0),
        end[1] + (0 if across else 11),
        "answer",
        color=INK,
        ha="left" if across else "center",
    )
    _legend(canvas, 1, 124 if across else 374, teacher=False)
    return canvas.figure


def _across(model: Mapping[str, Any]) -> Figure:
    teacher = model.get("teacher")
    shift = 0 if teacher else -196
    canvas = _Canvas(WIDE, 372 + shift)
    y_student = 250 + shift
    left, cells_width = 264, 384
    speech = Box(9, y_student, 84, 54)
    embedder = Box(122, y_student, 116, 54)
    cell = cells_width / model["n_adapted"]
    adapted = [
        Box(left + i * cell + min(1, cell / 10), y_student, cell - min(2, cell / 5), 54)
        for i in range(model["n_adapted"])
    ]
    if teacher:
        _teacher_across(canvas, model, adapted)
    canvas.box(speech, "frozen")
    canvas.wave(speech)
    canvas.text(speech.centre[0], y_student + 70, "speech", ha="center", color=INK)
    canvas.text(speech.centre[0], y_student + 86, f"{model['n_mels']} mel bins", ha="center")
    canvas.arrow((94, y_student + 27), (120, y_student + 27))
    canvas.box(embedder, "trained", "audio embedder", f"{model['token_rate']:g} tokens/s")
    canvas.text(embedder.centre[0], y_student + 70, f"{model['embedder']},", ha="center")
    canvas.text(embedder.centre[0], y_student + 86, f"{model['frames_per_token']} frames a token", ha="center")
    canvas.arrow((240, y_student + 27), (left - 2, y_student + 27))
    _blocks(canvas, adapted, "trained", "adapted")
    edge = left + cells_width
    canvas.text(
        left + 2,
        y_student - 16 if not teacher else y_student + 70,
        theme.literal(model["llm"]),
        color=INK,
        weight="bold",
    )
    below = f"blocks 0 to {model['n_adapted'] - 1} with LoRA of rank {model['rank']}"
    canvas.text(left + 2, y_student + (70 if not teacher else 86), below, color=ACCENT)
    rest = _rest(model)
    if rest:
        canvas.arrow((edge + 2, y_student + 27), (edge + 20, y_student + 27))
        canvas.box(Box(edge + 22, y_student, 86, 54), "frozen", rest, "frozen")
        edge += 108
    canvas.arrow((edge + 2, y_student + 27), (edge + 26, y_student + 27))
    canvas.text(edge + 32, y_student + 27, "answer", color=INK)
    _legend(canvas, 1, y_student + 114, bool(teacher))
    return canvas.figure


def _teacher_across(canvas: _Canvas, model: Mapping[str, Any], adapted: Sequence[Box]) -> None:
    left, right = adapted[0].x - 1, adapted[-1].x + adapted[-1].w + 1
    top, n = 62, model["teacher_blocks"]
    canvas.zone(Box(106, 8, right - 106 + 84, 212))
    canvas.text(122, 32, f"Teacher: {theme.literal(model['teacher'])}", color=INK, weight="bold", size=TEXT)
    canvas.text(right + 70, 32, "in training only, then dropped", ha="right", style="italic")
    stem = Box(122, top, 116, 54)
    canvas.box(stem, "dropped", "conv stem", "frozen")
    # One wave goes two ways: up to the teacher, and on to the embedder.
    canvas.line((51, adapted[0].y - 2), (51, top + 27))
    canvas.arrow((51, top + 27), (120, top + 27))
    pitch = (right - left) / n
    gap = min(4, pitch / 5)
    boxes = [Box(left + i * pitch + gap / 2, top, pitch - gap, 54) for i in range(n)]
    canvas.arrow((240, top + 27), (left - 1, top + 27))
    _blocks(canvas, boxes, "dropped", "teacher")
    canvas.text(right + 12, top + 19, f"{n} blocks,")
    canvas.text(right + 12, top + 35, f"width {model['teacher_width']}")
    heads = Box(left, 152, right - left, 30)
    for student, teacher in model["pairs"]:
        x = adapted[student].centre[0]
        start = _clamp(x, boxes[teacher].x + 3, boxes[teacher].x + boxes[teacher].w - 3)
        canvas.arrow((start, top + 56), (x, heads.y - 2), pull=True)
        canvas.arrow((x, heads.y + heads.h + 2), (x, adapted[0].y - 3), pull=True, gid=f"pair-{student}-{teacher}")
    text = f"projection heads: {model['llm_width']} to {model['teacher_width']}, one for each pair"
    canvas.box(heads, "heads", text)
    canvas.text(right + 12, heads.y + 15, "distillation", color=WARM)


def _legend(canvas: _Canvas, x: float, y: float, teacher: bool) -> None:
    entries = [("trained", "trained"), ("frozen", "frozen"), ("dropped", "dropped after training")]
    for kind, text in entries[: 3 if teacher else 2]:
        canvas.box(Box(x, y - 7, 20, 14), kind, radius=3)
        canvas.text(x + 27, y, text)
        x += 27 + 30 + 5.6 * len(text)


def _down(model: Mapping[str, Any], width: float) -> Figure:
    teacher = model.get("teacher")
    row = _clamp(330 / model["n_adapted"], 9, 26)
    stack = row * model["n_adapted"]
    top = 186
    rest = _rest(model)
    legend = top + stack + (128 if rest else 104 if teacher else 64)
    canvas = _Canvas(width, legend + 16)
    x, w = (1, 122) if teacher else (80, 198)
    middle = x + w / 2
    speech = Box(width / 2 - 56, 2, 112, 44)
    canvas.box(speech, "frozen")
    canvas.wave(speech)
    canvas.text(width / 2 + 66, 17, "speech", color=INK)
    canvas.text(width / 2 + 66, 33, f"{model['n_mels']} mel bins")
    embedder = Box(x, 112, w, 50)
    canvas.arrow((speech.centre[0] - (30 if teacher else 0), 49), (middle, embedder.y - 2))
    canvas.box(
        embedder, "trained", "audio embedder", f"{model['embedder']}, {model['token_rate']:g} tokens/s", size=SMALL - 1
    )
    canvas.arrow((middle, embedder.y + 52), (middle, top - 2))
    adapted = [Box(x, top + i * row + 1, w, row - 2) for i in range(model["n_adapted"])]
    if teacher:
        _teacher_down(canvas, model, adapted, width)
    _blocks(canvas, adapted, "trained", "adapted")
    y = top + stack
    if rest:
        canvas.arrow((middle, y + 2), (middle, y + 18))
        canvas.box(Box(x, y + 20, w, 44), "frozen", rest, "frozen")
        y += 64
    canvas.arrow((middle, y + 2), (middle, y + 22))
    canvas.text(middle, y + 32, "answer", ha="center", color=INK)
    if teacher:
        y = top + stack
        canvas.text(x + w + 16, y + 34, theme.literal(model["llm"], 28), color=INK, weight="bold")
        canvas.text(x + w + 16, y + 51, f"blocks 0 to {model['n_adapted'] - 1}:", color=ACCENT)
        canvas.text(x + w + 16, y + 67, f"LoRA of rank {model['rank']}", color=ACCENT)
    _legend(canvas, 1, legend, bool(teacher))
    return canvas.figure


def _teacher_down(canvas: _Canvas, model: Mapping[str, Any], adapted: Sequence[Box], width: float) -> None:
    n, top = model["teacher_blocks"], adapted[0].y - 1
    bottom = adapted[-1].y + adapted[-1].h + 1
    x, w = width - 100, 88
    canvas.zone(Box(152, 74, width - 153, bottom - 74 + 12))
    canvas.text(162, 91, theme.literal(model["teacher"], 24), color=INK, weight="bold")
    canvas.text(162, 106, "in training only, then dropped", size=SMALL - 1, style="italic")
    canvas.arrow((width / 2 + 30, 49), (x + w / 2, 72))
    canvas.box(Box(x, 120, w, 42), "dropped", "conv stem", "frozen", size=SMALL - 1)
    canvas.arrow((x + w / 2, 164), (x + w / 2, top - 2))
    pitch = (bottom - top) / n
    gap = min(4, pitch / 5)
    boxes = [Box(x, top + i * pitch + gap / 2, w, pitch - gap) for i in range(n)]
    _blocks(canvas, boxes, "dropped", "teacher")
    heads = Box(178, top, 50, bottom - top)
    for student, teacher in model["pairs"]:
        y = adapted[student].centre[1]
        start = _clamp(y, boxes[teacher].y + 3, boxes[teacher].y + boxes[teacher].h - 3)
        canvas.arrow((x - 2, start), (heads.x + heads.w + 2, y), pull=True)
        canvas.arrow((heads.x - 2, y), (adapted[0].x + adapted[0].w + 2, y), pull=True, gid=f"pair-{student}-{teacher}")
    canvas.box(heads, "heads", "heads", str(model["llm_width"]), "to", str(model["teacher_width"]), size=SMALL - 1)
