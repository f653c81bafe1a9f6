"""The figures of a comparison: each takes its summary, and returns a matplotlib Figure of a width in CSS pixels."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from aura_jax.evaluate.score import COLUMNS, ERRORS
from aura_jax.experiments.compare.summary import metric_of
from aura_jax.report import theme
from aura_jax.report.theme import INK, LINE, PAGE, SMALL, SOFT, TEXT, WIDE

Summary = Mapping[str, Any]

_Panels = tuple[Figure, list[Axes]]

_LEFT, _RIGHT, _TOP, _PITCH, _HEIGHT, _LINE = 50, 24, 40, 290, 200, 22
_RATES = (0, 1, 2, 5, 10, 20, 50, 100, 200, 400)
_WORST = 150  # %: a higher error rate is drawn there
_MILLISECONDS = (10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)


def _colours(summary: Summary) -> dict[str, str]:
    return dict(zip(summary["systems"], theme.series(len(summary["systems"])), strict=True))


def _panels(titles: Sequence[str], names: Sequence[str], colours: Mapping[str, str], width: float) -> _Panels:
    """Returns a figure with a key of the systems and axes below it, in two columns or, on a phone, in one."""
    columns = 2 if width >= WIDE and len(titles) > 1 else 1
    lines = _lines(names, width)
    top = _LINE * len(lines) + 12 if lines else 0
    out = theme.figure(width, top + -(-len(titles) // columns) * _PITCH)
    if lines:
        _key(out, lines, colours, width)
    each = width / columns
    panels = []
    for i, title in enumerate(titles):
        left, down = i % columns * each + _LEFT, top + i // columns * _PITCH + _TOP
        ax = theme.axes(out, left, down, each - _LEFT - _RIGHT, _HEIGHT)
        where: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points"}
        ax.annotate(theme.literal(title, 48), (0, 1), (0, 12), **where, color=INK, size=TEXT, weight="bold")
        ax.grid(color=LINE, lw=0.7, zorder=0)
        ax.set_label(title)
        panels.append(ax)
    return out, panels


def _room(name: str) -> float:
    return 34 + 0.62 * SMALL * len(name)


def _lines(names: Sequence[str], width: float) -> list[list[str]]:
    """Returns the names of a key in lines that are no wider than the figure."""
    out: list[list[str]] = []
    for name in names:
        if out and sum(map(_room, [*out[-1], name])) <= width:
            out[-1].append(name)
        else:
            out.append([name])
    return out


def _key(owner: Figure, lines: Sequence[Sequence[str]], colours: Mapping[str, str], width: float) -> None:
    ax = theme.axes(owner, 0, 0, width, _LINE * len(lines))
    ax.set_axis_off()
    ax.set_xlim(0, width)
    ax.set_ylim(_LINE * len(lines), 0)
    for i, names in enumerate(lines):
        x, y = 0.0, _LINE * (i + 0.5)
        for name in names:
            ax.plot([x + 6], [y], "o", ms=8, color=colours[name])
            ax.text(x + 15, y, theme.literal(name), color=INK, size=SMALL, va="center_baseline")
            x += _room(name)


def _scores(ax: Axes, metric: str, highest: float) -> None:
    """Dresses the upward axis for one of `COLUMNS`."""
    label, _ = COLUMNS[metric]
    if metric in ERRORS:
        _rates(ax, highest, label)
    else:
        ax.set_ylim(0, max(highest * 1.08, 1.0))
        ax.set_ylabel(label, labelpad=4)


def _rates(ax: Axes, highest: float, label: str) -> None:
    """Dresses the upward axis: rates in percent, by their square roots, so that small ones can be told apart."""
    ax.set_yscale("function", functions=(lambda y: np.sqrt(np.maximum(y, 0)), np.square))
    top = max(highest * 1.08, 1.0)
    ax.set_ylim(0, top)
    ticks = [0.0]
    for rate in _RATES[1:]:
        if rate <= top and math.sqrt(rate) - math.sqrt(ticks[-1]) >= 0.07 * math.sqrt(top):
            ticks.append(rate)
    ax.yaxis.set_major_locator(FixedLocator(ticks))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    ax.set_ylabel(label, labelpad=4)


def _logarithmic(axis: Any, low: float, high: float, ticks: Sequence[float], shown: FuncFormatter) -> None:
    setting = "set_xscale" if axis.axis_name == "x" else "set_yscale"
    getattr(axis.axes, setting)("log")
    axis.set_view_interval(low, high, ignore=True)
    axis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(shown)


_PLAIN = FuncFormatter(lambda x, _: f"{x:,g}")


def _best_first_token(system: Mapping[str, Any]) -> Mapping[str, Any] | None:
    ways = (system.get("timing") or {}).get("first_token")
    return None if not ways else ways.get("merged") or next(iter(ways.values()))


def quality_over_first_token(summary: Summary, seconds: str = "2", width: float = WIDE) -> Figure:
    """The first score of every set against the time to the first token of a clip of so many seconds."""
    colours = _colours(summary)
    shown = [name for name, of in summary["systems"].items() if _best_first_token(of)]
    out, panels = _panels(list(summary["sets"]), shown, colours, width)
    for ax, name in zip(panels, summary["sets"], strict=True):
        metric = metric_of(summary, name)
        scale = COLUMNS[metric][1]
        points = {}
        for system, of in summary["systems"].items():
            score, first = of["sets"][name].get(metric), _best_first_token(of)
            if score is not None and first is not None:
                points[system] = 1000 * first[seconds]["median"], score
        if not points:
            continue
        times = [x for x, _ in points.values()]
        _logarithmic(ax.xaxis, min(times) / 1.4, max(times) * 1.4, _MILLISECONDS, _PLAIN)
        # A system that does not transcribe at all would leave the others no room.
        worst = _WORST if metric in ERRORS else math.inf
        _scores(ax, metric, min(scale * max(score["high"] for _, score in points.values()), worst))
        for system, (x, score) in points.items():
            low, mean, high = (min(scale * score[key], worst) for key in ("low", "mean", "high"))
            marker = "^" if scale * score["mean"] > worst else "o"
            ax.vlines(x, low, high, color=colours[system], lw=2, alpha=0.5, zorder=2)
            ax.plot([x], [mean], marker, ms=9, color=colours[system], mec=PAGE, mew=1.5, zorder=3)
        ax.set_xlabel(f"first token of a clip of {seconds} s, ms", labelpad=2)
    return out


def learning(summary: Summary, width: float = WIDE) -> Figure:
    """The word error rate on held-out training voices over steps, and over the minutes that these steps take."""
    colours = _colours(summary)
    shown = [name for name, of in summary["systems"].items() if of.get("curves")]
    out, panels = _panels(("Over steps", "Over minutes of training"), shown, colours, width)
    highest = 0.0
    for ax, minutes in zip(panels, (False, True), strict=True):
        for name, system in summary["systems"].items():
            steps = (system.get("timing") or {}).get("steps")
            for curve in system.get("curves") or ():
                y = np.minimum(100 * np.asarray(curve["wer"], float), _RATES[-1])
                x = np.asarray(curve["step"], float)
                if minutes:
                    if not steps:
                        continue
                    x = _minutes(x, steps)
                # A stretch in which nothing was validated is a gap, not a line.
                between = np.diff(curve["step"])
                cuts = 1 + np.flatnonzero(between > 1.5 * np.median(between)) if len(between) else []
                for part in zip(np.split(x, cuts), np.split(y, cuts), strict=True):
                    ax.plot(*part, color=colours[name], lw=1.6, marker="o", ms=3.5, zorder=3)
                highest = max(highest, float(np.median(y)), float(y[-1]))
        ax.set_xlim(left=0)
        ax.set_xlabel("minutes" if minutes else "step", labelpad=2)
        ax.xaxis.set_major_formatter(_PLAIN)
        _rates(ax, min(max(highest, 20), 120), "WER, %")
    return out


def _minutes(step: np.ndarray, stages: Mapping[str, Mapping[str, float]]) -> np.ndarray:
    """Returns the minutes that so many steps take, from the seconds of a step of each stage."""
    out, left = np.zeros(len(step)), step.copy()
    for stage in stages.values():
        taken = np.minimum(left, stage["n"])
        out += taken * stage["seconds"]
        left -= taken
    return out / 60


def first_tokens(summary: Summary, width: float = WIDE) -> Figure:
    """The time to the first token over the seconds of speech, both on logarithmic axes."""
    colours = _colours(summary)
    shown = [name for name, of in summary["systems"].items() if _best_first_token(of)]
    out, (ax,) = _panels(("Time to the first token, ms",), shown, colours, width)
    values = []
    for name, system in summary["systems"].items():
        first = _best_first_token(system)
        if first is None:
            continue
        x, y = [float(seconds) for seconds in first], [1000 * of["median"] for of in first.values()]
        low, high = ([1000 * of[edge] for of in first.values()] for edge in ("low", "high"))
        ax.fill_between(x, low, high, color=colours[name], alpha=0.15, lw=0)
        ax.plot(x, y, color=colours[name], lw=1.8, marker="o", ms=4, zorder=3)
        values += y
    seconds = sorted({float(s) for system in summary["systems"].values() for s in _best_first_token(system) or ()})
    _logarithmic(ax.xaxis, seconds[0] / 1.1, seconds[-1] * 1.1, seconds, _PLAIN)
    _logarithmic(ax.yaxis, min(values) / 1.3, max(values) * 1.3, _MILLISECONDS, _PLAIN)
    ax.set_xlabel("seconds of speech", labelpad=2)
    return out


def noise(summary: Summary, width: float = WIDE) -> Figure:
    """The first score of a set over the level of each kind of noise; "clean" is the set as it is."""
    colours = _colours(summary)
    names = dict.fromkeys(
        (name, kind)
        for system in summary["systems"].values()
        for name, kinds in system.get("noise", {}).items()
        for kind in kinds
    )
    shown = [name for name, of in summary["systems"].items() if of.get("noise")]
    out, panels = _panels([f"{kind}, {name}" for name, kind in names], shown, colours, width)
    for ax, (name, kind) in zip(panels, names, strict=True):
        metric, highest = metric_of(summary, name), 0.0
        for system, of in summary["systems"].items():
            levels = of.get("noise", {}).get(name, {}).get(kind)
            if not levels or metric not in of["sets"][name]:
                continue
            heard = [of["sets"][name][metric], *(level[metric] for level in levels.values())]
            ticks = ["clean", *levels]
            y = [min(COLUMNS[metric][1] * score["mean"], _WORST) for score in heard]
            ax.plot(range(len(y)), y, color=colours[system], lw=1.6, marker="o", ms=4, zorder=3)
            ax.set_xticks(range(len(ticks)), ticks)
            highest = max(highest, *y)
        ax.set_xlabel("signal to noise, dB", labelpad=2)
        _scores(ax, metric, highest)
    return out


def alignment(summary: Summary, width: float = WIDE) -> Figure:
    """The CKA of every LLM block with every teacher block after training, a panel a system that has a teacher."""
    maps = {name: of["similarity"]["after"]["cka"] for name, of in summary["systems"].items() if of.get("similarity")}
    out, panels = _panels(list(maps), (), {}, width)
    for ax, cka in zip(panels, maps.values(), strict=True):
        ax.grid(visible=False)
        ax.imshow(
            np.array(cka, float).T,
            cmap=theme.HEAT,
            vmin=0,
            vmax=1,
            aspect="auto",
            origin="lower",
            interpolation="nearest",
        )
        ax.tick_params(length=0)
        ax.yaxis.set_major_locator(FixedLocator(range(len(cka[0]))))
        ax.set_xlabel("LLM block", labelpad=2)
        ax.set_ylabel("teacher block", labelpad=4)
        for spine in ax.spines.values():
            spine.set_visible(False)
    return out


def forgetting(summary: Summary, width: float = WIDE) -> Figure:
    """What the adapters, forced on for every token, add to the loss on ordinary text, in nats a token."""
    rows = {name: of["text"]["rise"] for name, of in summary["systems"].items() if "rise" in of.get("text", {})}
    colours = _colours(summary)
    left = 16 + 0.61 * TEXT * max(map(len, rows))
    out = theme.figure(width, 28 * len(rows) + 52)
    ax = theme.axes(out, left, 8, width - left - 70, 28 * len(rows))
    place = {"textcoords": "offset points", "va": "center", "annotation_clip": False, "size": SMALL}
    for i, (name, rise) in enumerate(rows.items()):
        ax.barh(i, rise["mean"], 0.5, color=colours[name], zorder=2)
        ax.hlines(i, rise["low"], rise["high"], color=INK, lw=1.5, zorder=3)
        ax.annotate(
            f"{rise['mean']:+.3f}".replace("-", "\u2212"), (max(rise["high"], 0), i), (7, 0), **place, color=SOFT
        )
    ax.set_xlim(
        min(0.0, *(1.1 * rise["low"] for rise in rows.values())), max(0.01, *(r["high"] for r in rows.values()))
    )
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_yticks(range(len(rows)), list(rows))
    ax.tick_params(axis="y", length=0, labelcolor=INK, labelsize=TEXT)
    ax.spines["left"].set_visible(False)
    ax.grid(axis="x", color=LINE, lw=0.7, zorder=0)
    ax.set_xlabel("rise of the loss on text, nats a token", labelpad=4)
    return out
