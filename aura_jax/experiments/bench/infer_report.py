"""The tables and the figure of `aura-jax bench infer`, from what it wrote and nothing else."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from aura_jax.experiments.bench.train_report import lines, spread
from aura_jax.report import theme

_GIB = 2**30
_MILLISECONDS = (5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)
_MARKS = "osD^vP*X<>h"


def speech_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """Returns the cells of the arms that hear, the head first: medians."""
    arms: Mapping[str, Any] = results["arms"]
    lengths = list(next(iter(arms.values()))["first_token"])
    head = ["ms to a first token", *(f"{length} s" for length in lengths), "tokens/s", "real time", "clips/s", "batch"]
    out = [[*head, "GiB", "cold s", "warm s"]]
    for name, arm in arms.items():
        cells = [name, *(f"{1000 * arm['first_token'][length]['median']:.0f}" for length in lengths)]
        cells += [f"{arm['tokens_per_second']['median']:.1f}", f"{arm['real_time_factor']['median']:.2f}"]
        cells += [f"{arm['clips_per_second']['median']:.2f}", str(arm["batch"])]
        memory = arm["peak_memory_bytes"]
        cells.append(f"{memory / _GIB:.2f}" if memory else "?")
        starts = arm["start_seconds"]
        out.append([*cells, f"{starts['cold']:.1f}", f"{starts['warm']:.1f}" if "warm" in starts else "-"])
    return out


def error_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """Returns the cells of the arms' word error rates on the same clips, each with its interval."""
    sets = [f"{name}, {n} clips" for name, n in results["test"]["clips"].items()]
    out = [["WER % (95 % interval)", *sets]]
    for name, arm in results["arms"].items():
        rates = ({edge: 100 * of[edge] for edge in ("value", "low", "high")} for of in arm["wer"].values())
        out.append([name, *("{value:.1f} ({low:.1f} to {high:.1f})".format(**rate) for rate in rates)])
    return out


def times_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """Returns the cells of the arms' times beside the first one's in the same round."""
    arms: Mapping[str, Any] = results["arms"]
    first = next(iter(arms))
    lengths = list(arms[first]["first_token"])
    out = [[f"times as long as {first}: median (range)", *(f"{length} s" for length in lengths), "a batch"]]
    for name, arm in arms.items():
        of_lengths = [spread(arm["first_token"][length]["times"]) for length in lengths]
        out.append([name, *of_lengths, spread(arm["clips_per_second"]["times"])])
    return out


def decode_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """Returns the cells of the LLM alone."""
    out = [["the LLM alone", "ms/token: median (range)", "MB of weights", "GB/s"]]
    for name, arm in results["decode"]["arms"].items():
        token = {edge: 1000 * value for edge, value in arm["seconds_per_token"].items()}
        size, rate = arm["weight_bytes"] / 1e6, arm["weight_bytes_per_second"] / 1e9
        out.append([name, spread(token), f"{size:.0f}", f"{rate:.1f}"])
    return out


def table(results: Mapping[str, Any]) -> str:
    """Returns the plain tables: arms that hear, each beside the first, and the LLM alone."""
    decode = results["decode"]
    out = [results["machine"], *(f"left out: {line}" for line in results["left_out"])]
    for rows in (speech_rows(results), error_rows(results), times_rows(results), decode_rows(results)):
        out += ["", *lines(rows)]
    out += ["", f"a sum reads {decode['read_bytes_per_second'] / 1e9:.1f} GB/s"]
    return "\n".join([*out, *(f"{pair}: {spread(times)} times the time" for pair, times in decode["ratios"].items())])


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Draws the time to a first token over the length of the speech, and what a token of the LLM alone takes."""
    arms: Mapping[str, Any] = results["arms"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.2), width_ratios=(3, 2))
    values, colours = [], plt.get_cmap("tab20")
    for place, (name, arm) in enumerate(arms.items()):
        # Ten colours, then their lighter kin.
        colour, mark = colours(2 * place % 20 + place // 10 % 2), _MARKS[place % len(_MARKS)]
        first = arm["first_token"]
        seconds = [float(length) for length in first]
        median, low, high = ([1000 * of[edge] for of in first.values()] for edge in ("median", "low", "high"))
        label = f"{name}: {' / '.join(format(100 * of['value'], '.0f') for of in arm['wer'].values())}"
        style = "-" if arm["ours"] else "--"
        left.plot(seconds, median, mark, ls=style, ms=5, lw=1.5, color=colour, label=label)
        left.vlines(seconds, low, high, color=colour, lw=1.5, alpha=0.4)
        values += [*low, *high]
    left.set_xscale("log")
    left.set_yscale("log")
    near = [x for x in _MILLISECONDS if min(values) / 1.5 < x < 1.5 * max(values)]
    for axis, ticks in ((left.xaxis, seconds), (left.yaxis, near)):
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    left.grid(color=theme.LINE, lw=0.7)
    left.set_xlabel("seconds of speech")
    left.set_title("Milliseconds from the end of the speech to the LLM's first token", fontsize=10)
    left.legend(
        title=f"WER %: {' / '.join(results['test']['clips'])}",
        title_fontsize=8,
        fontsize=8,
        frameon=False,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.12),
        ncols=2,
    )

    decode: Mapping[str, Any] = results["decode"]["arms"]
    for row, arm in enumerate(decode.values()):
        token = {edge: 1000 * value for edge, value in arm["seconds_per_token"].items()}
        right.barh(row, token["median"], 0.7, color=theme.ACCENT if arm["ours"] else theme.FAINT)
        right.hlines(row, token["low"], token["high"], color=theme.INK, lw=1.2)
        text = f"  {token['median']:.1f} ms, {arm['weight_bytes'] / 1e6:.0f} MB"
        right.annotate(text, (token["high"], row), fontsize=8, va="center")
    right.set_yticks(range(len(decode)), list(decode), fontsize=9)
    right.invert_yaxis()
    right.margins(x=0.4)
    right.set_xlim(left=0)
    right.set_xlabel("milliseconds a token, and the bytes of weights that it reads")
    right.set_title("Decoding, the LLM alone", fontsize=10)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
