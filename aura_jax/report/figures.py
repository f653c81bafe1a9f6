"""The report's figures: each takes a part of the report's dictionary, and returns a matplotlib Figure.

`width` is in CSS pixels; below `theme.WIDE` panels stand under each other, as a phone needs.
"""

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import image
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from aura_jax.report import theme
from aura_jax.report.theme import ACCENT, BAND, FAINT, INK, LINE, MARK, PAGE, SMALL, SOFT, TEXT, TINT, WIDE

_TITLES = {
    "loss": "Total loss, weighted",
    "loss/distill": "Distillation loss",
    "loss/lm": "Language-model loss, nats a token",
    "loss/response_kd": "KD on the answer",
    "loss/input_kd": "KD on the input",
    "loss/quantity": "Number of audio tokens, relative error",
    "loss/hidden_l2": "State that answers, relative L2",
    "loss/embedding_l2": "Embeddings, relative L2",
    "loss/text_anchor": "Text anchor",
    "loss/text_kd": "Distillation on text",
    "grad_norm": "Gradient norm",
    "learning_rate": "Learning rate",
    "wer": "Validation word error rate, %",
}


def _numbers(values: Sequence[float | None]) -> np.ndarray:
    return np.array([math.nan if value is None else value for value in values], np.float64)


def _title(ax: Axes, text: str) -> None:
    ax.annotate(
        text,
        (0, 1),
        (0, 9),
        xycoords="axes fraction",
        textcoords="offset points",
        color=INK,
        size=TEXT,
        weight="bold",
        va="bottom",
    )


def _stage_name(stage: Mapping[str, Any], share: float, ax: Axes) -> str:
    """Returns the name of a stage, or nothing if its share of the axes is too narrow for it."""
    owner = ax.figure
    pixels = share * ax.get_position().width * owner.bbox.width
    return theme.literal(stage["name"]) if 0.65 * SMALL * len(stage["name"]) <= pixels else ""


def _stages(ax: Axes, stages: Sequence[Mapping[str, Any]], last: float) -> None:
    """Shades every other stage up to step `last`, and names each that has begun."""
    for i, stage in enumerate(stages):
        if stage["first"] >= last:
            break
        end = min(stage["end"], last)
        if i % 2:
            ax.axvspan(stage["first"], end, color=BAND, lw=0, zorder=0, gid="stage")
        where = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "ha": "center", "va": "top"}
        name = _stage_name(stage, (end - stage["first"]) / last, ax)
        ax.annotate(name, ((stage["first"] + end) / 2, 1), (0, -3), **where, color=SOFT, size=SMALL)


def _curve(ax: Axes, step: np.ndarray, value: np.ndarray, shown: FuncFormatter) -> None:
    """Draws one series in the accent, with its last value written beside its end."""
    real = np.isfinite(value)
    ax.plot(step, value, color=ACCENT, lw=1.6, marker="o" if real.sum() <= 24 else None, ms=4, zorder=3)
    if real.any():
        last = int(np.flatnonzero(real)[-1])
        where = {"textcoords": "offset points", "annotation_clip": False}
        ax.annotate(
            shown(value[last]), (step[last], value[last]), (6, 0), **where, color=ACCENT, size=SMALL, va="center"
        )


_PLAIN = FuncFormatter(lambda x, _: f"{x:.3g}")
_SHOWN = {
    "learning_rate": FuncFormatter(lambda x, _: re.sub(r"\.?0*e-0?", "e-", f"{x:.1e}") if x else "0"),
    "wer": FuncFormatter(lambda x, _: f"{100 * x:.3g}"),
}


def objectives(metrics: Mapping[str, Any]) -> list[str]:
    """Returns the losses that were recorded at least once, the total first: "loss", "loss/distill", ..."""
    names = [name for name in metrics if name == "loss" or (name.startswith("loss/") and name.count("/") == 1)]
    return sorted((name for name in names if np.isfinite(_numbers(metrics[name])).any()), key=lambda n: n != "loss")


def learning_curves(
    metrics: Mapping[str, Any],
    stages: Sequence[Mapping[str, Any]],
    validation: Mapping[str, Any] | None = None,
    width: float = WIDE,
) -> Figure:
    """Every objective, the gradient's norm, the learning rate and validation's error over steps, a panel each."""
    extra = [name for name in ("grad_norm", "learning_rate") if name in metrics]
    panels = [(name, metrics["step"], metrics[name]) for name in (*objectives(metrics), *extra)]
    if validation and len(validation["step"]) > 1:
        panels.append(("wer", validation["step"], validation["wer"]))
    columns = 2 if width >= WIDE else 1
    rows = -(-len(panels) // columns)
    left, right, pitch, panel = 46, 54, 206, 138
    each = width / columns - left - right
    out = theme.figure(width, rows * pitch + 24)
    last = max(metrics["step"], default=1)
    for i, (name, steps, values) in enumerate(panels):
        ax = theme.axes(out, left + (i % columns) * width / columns, 32 + i // columns * pitch, each, panel)
        ax.set_label(name)
        step, value = _numbers(steps), _numbers(values)
        _title(
            ax,
            "Validation word error rate, %"
            if name == "wer"
            else _TITLES.get(name, theme.literal(name.removeprefix("loss/"))),
        )
        _curve(ax, step, value, _SHOWN.get(name, _PLAIN))
        ax.set_xlim(0, last)
        low, high = (np.nanmin(value), np.nanmax(value)) if np.isfinite(value).any() else (0.0, 1.0)
        if name == "grad_norm" and low > 0:
            ax.set_yscale("log")
            ax.set_ylim(low / 1.3, high * 2.5)
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,), numticks=5))
            ax.yaxis.set_minor_formatter(NullFormatter())
        else:
            ax.set_ylim(min(0, low), high + 0.18 * (high - min(0, low)) or 1)
            ticks = MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]).tick_values(min(0, low), high)
            ax.set_yticks([tick for tick in ticks if tick <= 1.02 * high])
        ax.yaxis.set_major_formatter(_SHOWN.get(name, _PLAIN))
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        ax.grid(axis="y", color=LINE, lw=0.7, zorder=1)
        ax.spines["left"].set_visible(False)
        ax.tick_params(axis="y", length=0)
        _stages(ax, stages, last)
        if i + columns >= len(panels):
            ax.set_xlabel("step", labelpad=2)
    return out


def _edges(centres: np.ndarray) -> np.ndarray:
    """Returns the n + 1 edges of cells around n increasing places."""
    if len(centres) == 1:
        return np.array([centres[0] - 0.5, centres[0] + 0.5])
    middle = (centres[1:] + centres[:-1]) / 2
    return np.concatenate([[centres[0]], middle, [centres[-1]]])


def _scale(owner: Figure, left: float, top: float, width: float, low: float, high: float, text: str) -> None:
    """Draws the key of a heat map: a horizontal bar from low to high with its meaning."""
    ax = theme.axes(owner, left, top, width, 8)
    ax.imshow(np.linspace(0, 1, 128)[None], cmap=theme.HEAT, aspect="auto", extent=(low, high, 0, 1))
    ax.set_yticks([])
    ax.set_xticks([low, high])
    ax.xaxis.set_major_formatter(_PLAIN)
    for spine in ax.spines.values():
        spine.set_visible(False)
    ax.set_title(text, color=SOFT, size=SMALL, loc="left", pad=5)


def alignment(part: Mapping[str, Any], stages: Sequence[Mapping[str, Any]], width: float = WIDE) -> Figure:
    """The closeness (cosine) or loss of each distilled block over steps, as a heat map: rows are student blocks."""
    cosine = part["loss_kind"] == "cosine"
    step, value = _numbers(part["step"]), np.array([_numbers(row) for row in part["value"]])
    rows = len(part["blocks"])
    pitch = 26 if rows <= 12 else max(6, 220 / rows)
    height = pitch * rows
    left, right, top = 62, 20, 74
    out = theme.figure(width, top + height + 44)
    finite = value[np.isfinite(value)]
    low = min([0.0, *finite]) if cosine else 0.0
    low = 0.0 if low > -0.05 else low  # noise about 0 needs no colours of its own
    high = 1.0 if cosine else max(finite, default=1.0)
    meaning = "cosine to the teacher's state" if cosine else f"{part['loss_kind']} loss: dark is close"
    _scale(out, left, 22, min(220, width - left - right), low, high, meaning)
    ax = theme.axes(out, left, top, width - left - right, height)
    ax.set_label("alignment")
    mesh = ax.pcolormesh(_edges(step), np.arange(rows + 1), value, cmap=theme.HEAT, vmin=low, vmax=high)
    mesh.set_rasterized(True)
    ax.set_ylim(rows, 0)
    every = math.ceil(14 / pitch)
    ax.set_yticks(np.arange(rows)[::every] + 0.5, [f"block {block}" for block in part["blocks"][::every]])
    ax.tick_params(axis="y", length=0)
    for i in range(1, rows):
        ax.axhline(i, color=PAGE, lw=2 if rows <= 12 else 1)
    last = float(step[-1])
    for stage in stages:
        if stage["first"] >= last:
            continue
        if stage["first"] > step[0]:
            ax.axvline(stage["first"], color=PAGE, lw=2)
        where = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
        name = _stage_name(stage, (min(stage["end"], last) - stage["first"]) / last, ax)
        ax.annotate(name, (max(stage["first"], step[0]), 1), (1, 5), **where, color=SOFT, size=SMALL)
    ax.spines["left"].set_visible(False)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    ax.set_xlabel("step", labelpad=2)
    return out


def cosine(part: Mapping[str, Any], pairs: Sequence[Sequence[int]], width: float = WIDE) -> Figure:
    """The cosine of each pair of blocks before and after training, a row a pair."""
    rows = len(pairs)
    pitch = 30 if rows <= 12 else 18
    left, right, top = (150 if width >= WIDE else 138), 46, 40
    out = theme.figure(width, top + rows * pitch + 44)
    ax = theme.axes(out, left, top, width - left - right, rows * pitch)
    ax.set_label("cosine")
    before, after, y = _numbers(part["before"]["cosine"]), _numbers(part["after"]["cosine"]), np.arange(rows)
    ax.hlines(y, before, after, color=TINT, lw=6, zorder=2)
    ax.plot(before, y, "o", ms=8, mfc=PAGE, mec=FAINT, mew=2, zorder=3, label="before")
    ax.plot(after, y, "o", ms=9, color=ACCENT, zorder=4, label="after")
    for row in range(rows):
        if np.isfinite(after[row]):
            place = {"textcoords": "offset points", "va": "center", "annotation_clip": False}
            ax.annotate(f"{after[row]:.2f}", (after[row], row), (10, 0), **place, color=ACCENT, size=SMALL)
    low = min(0.0, np.nanmin([before, after]))
    ax.set_xlim(low - 0.03, 1)
    ax.set_ylim(rows - 0.4, -0.6)
    ax.set_yticks(y, [f"block {student}  ·  teacher {teacher}" for student, teacher in pairs])
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.axvline(0, color=LINE, lw=1, zorder=1)
    ax.grid(axis="x", color=LINE, lw=0.7, zorder=0)
    ax.set_xlabel("cosine to the teacher's state", labelpad=4)
    _key(out, left, 14)
    return out


def _key(owner: Figure, left: float, y: float) -> None:
    """Draws the key of before and after at a height of the figure."""
    ax = theme.axes(owner, left, y - 8, 220, 16)
    ax.set_axis_off()
    ax.set_xlim(0, 220)
    ax.set_ylim(0, 16)
    ax.plot([6], [8], "o", ms=8, mfc=PAGE, mec=FAINT, mew=2)
    ax.plot([76], [8], "o", ms=9, color=ACCENT)
    for x, text in ((16, "before"), (86, "after training")):
        ax.text(x, 8, text, color=SOFT, size=SMALL, va="center_baseline")


def cka_blocks(part: Mapping[str, Any], pairs: Sequence[Sequence[int]], n_adapted: int, width: float = WIDE) -> Figure:
    """The CKA of every LLM block with the teacher block nearest to it, before and after; pairs are marked by dots."""
    left, right, top, height = 44, 20, 40, 190
    out = theme.figure(width, top + height + 44)
    ax = theme.axes(out, left, top, width - left - right, height)
    ax.set_label("cka")
    n_blocks = len(part["after"]["cka"])
    ax.axvspan(-0.5, n_adapted - 0.5, color=BAND, lw=0, zorder=0)
    for name, colour, fill in (("before", FAINT, PAGE), ("after", ACCENT, ACCENT)):
        cka = np.array(part[name]["cka"], np.float64)
        ax.plot(np.arange(n_blocks), cka.max(axis=1), color=colour, lw=1.8, zorder=2, label=name)
        for student, teacher in pairs:
            ax.plot([student], [cka[student, teacher]], "o", ms=8, mfc=fill, mec=colour, mew=2, zorder=3, label="pair")
    where = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "va": "top", "size": SMALL}
    ax.annotate("adapted by LoRA", (-0.5, 1), (8, -6), **where, color=SOFT)
    if n_adapted < n_blocks:
        ax.annotate("frozen", (n_adapted - 0.5, 1), (8, -6), **where, color=SOFT)
    ax.set_xlim(-0.5, n_blocks - 0.5)
    ax.set_ylim(min(0.0, *(np.min(part[name]["cka"]) for name in ("before", "after"))), 1.2)
    ax.set_yticks([0, 0.5, 1])
    ax.xaxis.set_major_locator(MaxNLocator(10 if width >= WIDE else 6, integer=True))
    ax.grid(axis="y", color=LINE, lw=0.7, zorder=1)
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel("LLM block", labelpad=2)
    _key(out, left, 14)
    return out


def cka_maps(part: Mapping[str, Any], pairs: Sequence[Sequence[int]], n_adapted: int, width: float = WIDE) -> Figure:
    """The CKA of every LLM block (across) with every teacher block (up), before and after; pairs are outlined."""
    maps = {name: np.array(part[name]["cka"], np.float64).T for name in ("before", "after")}
    n_teacher, n_student = maps["after"].shape
    left, right, top, gap = 52, 20, 92, 62
    across = width - left - right
    height = max(min(n_teacher * across / n_student, 360), 22 * min(n_teacher, 6))
    out = theme.figure(width, top + 2 * height + gap + 44)
    _scale(out, left, 22, min(220, across), 0, 1, "CKA: 0 unlike, 1 alike")
    for i, (name, cka) in enumerate(maps.items()):
        ax = theme.axes(out, left, top + i * (height + gap), across, height)
        ax.set_label(name)
        ax.imshow(cka, cmap=theme.HEAT, vmin=0, vmax=1, aspect="auto", origin="lower", interpolation="nearest")
        for student, teacher in pairs:
            box = Rectangle((student - 0.5, teacher - 0.5), 1, 1, fill=False, ec=MARK, lw=2.5, zorder=3)
            box.set_clip_on(False)
            ax.add_patch(box)
        if n_adapted < n_student:
            ax.axvline(n_adapted - 0.5, color=PAGE, lw=2)
        _title(ax, {"before": "Before training", "after": "After"}[name])
        ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        ax.xaxis.set_major_locator(MaxNLocator(10 if width >= WIDE else 6, integer=True))
        ax.tick_params(length=0)
        ax.set_ylabel("teacher", labelpad=6)
        for spine in ax.spines.values():
            spine.set_visible(False)
    out.axes[-1].set_xlabel("LLM block", labelpad=4)
    return out


def _room(names: Sequence[str]) -> float:
    """Returns the width that the names need to the left of an axis; DejaVu Sans, in the PNGs, is the widest in use."""
    return 16 + 0.61 * TEXT * max(map(len, names))


def word_errors(sets: Mapping[str, Mapping[str, Any]], width: float = WIDE) -> Figure:
    """The word error rate of each test set in percent with its interval, on an axis of square roots."""
    rows, pitch = len(sets), 34 if width >= WIDE else 46
    names = [theme.literal(name) for name in sets]
    left, right, top = (_room(names), 60, 8) if width >= WIDE else (8, 52, 8)
    out = theme.figure(width, top + rows * pitch + 44)
    ax = theme.axes(out, left, top, width - left - right, rows * pitch)
    ax.set_label("wer")
    ax.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
    value, low, high = (
        100 * np.array([scores["wer"][k] for scores in sets.values()], float) for k in ("value", "low", "high")
    )
    y = np.arange(rows)
    ax.hlines(y, low, high, color=ACCENT, lw=3, alpha=0.35, zorder=2)
    ax.plot(value, y, "o", ms=8, color=ACCENT, zorder=3)
    for row, name in enumerate(names):
        place = {"textcoords": "offset points", "va": "center", "annotation_clip": False}
        ax.annotate(f"{value[row]:.1f}", (high[row], row), (8, 0), **place, color=ACCENT, size=SMALL)
        if width < WIDE:
            ax.annotate(name, (0, row), (0, 16), **place, color=INK, size=SMALL)
    top_value = max(float(high.max()), 1.0) * 1.02
    ax.set_xlim(0, top_value)
    ticks = [tick for tick in (0, 1, 2, 5, 10, 25, 50, 100, 200, 400, 1000) if tick <= top_value]
    ax.set_xticks(ticks, [f"{tick}" for tick in ticks])
    ax.minorticks_off()
    ax.set_ylim(rows - 0.4, -0.6)
    ax.set_yticks(y, names if width >= WIDE else [""] * rows)
    ax.tick_params(axis="y", length=0, labelcolor=INK, labelsize=TEXT)
    ax.spines["left"].set_visible(False)
    ax.grid(axis="x", color=LINE, lw=0.7, zorder=0)
    ax.set_xlabel("word error rate, % (square-root axis)", labelpad=4)
    return out


def text_rise(loss: Mapping[str, Mapping[str, float]], width: float = WIDE) -> Figure:
    """The rise of the loss on each kind of text in nats a token, as bars about 0."""
    rows = len(loss)
    names = [theme.literal(kind) for kind in loss]
    left, right, top = _room(names), 64, 8
    out = theme.figure(width, top + rows * 26 + 44)
    ax = theme.axes(out, left, top, width - left - right, rows * 26)
    ax.set_label("rise")
    rise, y = np.array([kind["rise"] for kind in loss.values()], float), np.arange(rows)
    ax.barh(y, rise, 0.5, color=[INK if kind == "all" else ACCENT for kind in loss], zorder=2)
    for row in range(rows):
        place = {"textcoords": "offset points", "va": "center", "annotation_clip": False, "size": SMALL}
        ax.annotate(f"{rise[row]:+.3f}".replace("-", "\u2212"), (max(rise[row], 0), row), (7, 0), **place, color=SOFT)
    ax.set_xlim(min(0, rise.min() * 1.05), max(rise.max() * 1.05, 0.01))
    ax.set_ylim(rows - 0.4, -0.6)
    ax.set_yticks(y, names)
    ax.tick_params(axis="y", length=0, labelcolor=INK, labelsize=TEXT)
    ax.spines["left"].set_visible(False)
    ax.axvline(0, color=FAINT, lw=1, zorder=3)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.grid(axis="x", color=LINE, lw=0.7, zorder=0)
    ax.set_xlabel("rise of the loss, nats a token (left of 0: it fell)", labelpad=4)
    return out


def parts(values: Sequence[Mapping[str, Any]], width: float = WIDE) -> Figure:
    """The parts of a time as one stacked bar; the page's table beside it is its key."""
    out = theme.figure(width, 34)
    ax = theme.axes(out, 0, 2, width, 30)
    ax.set_label("parts")
    ax.set_axis_off()
    total = sum(part["seconds"] for part in values) or 1.0
    start = 0.0
    for part, colour in zip(values, theme.shades(len(values)), strict=True):
        ax.barh(0, part["seconds"], 1, start, color=colour, ec=PAGE, lw=1.5, label=part["part"])
        start += part["seconds"]
    ax.set_xlim(0, total)
    ax.set_ylim(-0.5, 0.5)
    return out


def mel_picture(mel: Sequence[Sequence[float]]) -> bytes:
    """Returns log-mel [frames][mels] as a PNG: time to the right, pitch upwards, light where it is loud."""
    buffer = io.BytesIO()
    image.imsave(buffer, np.array(mel, np.float64).T, cmap=theme.HEAT, origin="lower", format="png")
    return buffer.getvalue()
