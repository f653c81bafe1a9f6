"""What the notebooks in colab/ show: curves that move while a run trains, clips to listen to, tables.

It needs IPython, which every notebook brings along and nothing else here does.
"""

import base64
import contextlib
import contextvars
import io
import json
import math
import mimetypes
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from IPython.display import HTML, DisplayHandle, Image, Markdown, display
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from aura_jax import config as config_lib
from aura_jax.audio import features
from aura_jax.audio.io import load_audio
from aura_jax.config import Config
from aura_jax.report import figures, theme
from aura_jax.report.page import marked_words

_LABEL = "display: inline-block; width: 4.5em; opacity: 0.6"


def picture(of: Figure) -> Image:
    """Returns a figure as a notebook shows it: a PNG of two pixels a point."""
    buffer = io.BytesIO()
    of.savefig(buffer, format="png", dpi=144, facecolor=theme.PAGE)
    return Image(buffer.getvalue(), width=round(of.get_size_inches()[0] * 72))


@contextlib.contextmanager
def live_curves(config: Config, workdir: Path, every: float = 4.0) -> Iterator[None]:
    """Shows the losses of a run while the block trains it, and as they are at its end.

    The block keeps the main thread, so that interrupting it reaches the training, which saves first.

    Args:
      config: of the run.
      every: seconds between drawings.
    """
    shown = display(Markdown("*Loading and compiling: the first points take a minute.*"), display_id=True)
    assert shown is not None
    stages = _stages(config)
    over = threading.Event()

    def follow() -> None:
        while not over.wait(every):
            _draw(shown, workdir, stages)

    # In the context of this cell, or its output would go elsewhere.
    thread = threading.Thread(target=contextvars.copy_context().run, args=(follow,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        _draw(shown, workdir, stages)


def _stages(config: Config) -> list[dict[str, Any]]:
    out: list[dict[str, Any]] = []
    first: Any = 0
    for name, stage in config_lib.stages(config):
        end = min(first + stage.steps, config_lib.total_steps(config))
        out.append({"name": name, "first": first, "end": end})
        first = end
    return out


def _draw(shown: DisplayHandle, workdir: Path, stages: Sequence[dict[str, Any]]) -> None:
    path = workdir / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]  # the last may be half written
    records = [record for record in records if "loss" in record]
    if not records:
        return
    names = {name for record in records for name in record if name.startswith("loss/") and name.count("/") == 1}
    metrics: dict[str, list[float | None]] = defaultdict(list)
    for record in records:
        for name in ("step", "loss", *sorted(names)):
            metrics[name].append(record.get(name))
    shown.update(picture(figures.learning_curves(metrics, stages)))


def clip(path: str | Path, said: str, heard: str | None = None, title: str = "") -> HTML:
    """Returns a clip to listen to: a player, its log-mel, what was said and what was heard, wrong words marked.

    Words of what was said that were not heard are struck out, those that were heard in their place underlined.

    Args:
      path: of a file that a browser plays (WAV, FLAC, Ogg, MP3).
      heard: None: nothing was.
      title: above it.
    """
    data, kind = Path(path).read_bytes(), mimetypes.guess_type(path)[0] or "audio/wav"
    player = f"data:{kind};base64,{base64.b64encode(data).decode()}"
    waveform_S = load_audio(path)
    width = round(160 * min(len(waveform_S) / features.SAMPLE_RATE, 4))
    mel = f"data:image/png;base64,{base64.b64encode(figures.mel_picture(_log_mel(waveform_S))).decode()}"
    lines = [("said", escape(said))]
    if heard is not None:
        reference, hypothesis = marked_words(said, heard)
        lines = [("said", reference), ("heard", hypothesis or Markup("<em>nothing</em>"))]
    texts = Markup("").join(
        Markup('<div><span style="{}">{}</span>{}</div>').format(_LABEL, label, text) for label, text in lines
    )
    return HTML(
        Markup(
            '<div style="margin: 0.6em 0 1.4em; line-height: 1.7">'
            '<div style="opacity: 0.6">{}</div>'
            '<div style="display: flex; flex-wrap: wrap; align-items: center; gap: 1em; margin: 0.3em 0">'
            '<img src="{}" alt="log-mel" style="width: {}px; height: 64px; margin: 0; border-radius: 4px">'
            '<audio controls src="{}" style="height: 40px"></audio></div>{}</div>'
        ).format(title, mel, width, player, texts)
    )


def _log_mel(waveform_S: np.ndarray) -> list[list[float]]:
    n = len(waveform_S)
    # Whole seconds: few shapes to compile.
    padded_S = np.pad(waveform_S, (0, math.ceil(n / features.SAMPLE_RATE) * features.SAMPLE_RATE - n))
    mel_1xFxM = features.log_mel(padded_S[None], 80, n_samples_B=np.array([n]))
    return np.asarray(jax.device_get(mel_1xFxM))[0, : features.n_frames(n)].tolist()


def durations(seconds_N: np.ndarray, buckets: Sequence[float] = ()) -> Image:
    """Returns a histogram of the lengths of clips, with the upper edges of their buckets."""
    width, height = 560, 210
    out = theme.figure(width, height)
    ax = theme.axes(out, 52, 24, width - 72, height - 68)
    ax.hist(seconds_N, bins=48, color=theme.ACCENT, rwidth=0.86, zorder=2)
    for bucket in buckets:
        ax.axvline(bucket, color=theme.MARK, lw=1.6, zorder=3)
        where = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "annotation_clip": False}
        ax.annotate(f"{bucket:g}", (bucket, 1), (0, 5), **where, color=theme.WARM, size=theme.SMALL, ha="center")
    ax.set_xlim(0, max([float(np.max(seconds_N)), *buckets]) * 1.01)
    ax.grid(axis="y", color=theme.LINE, lw=0.7, zorder=1)
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel("seconds", labelpad=2)
    ax.set_ylabel("clips", labelpad=6)
    return picture(out)


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> Markdown:
    """Returns a table: numbers, and what begins like one, to the right."""
    right = [all(str(row[i])[:1] in "0123456789-+<" for row in rows) for i in range(len(head))]
    cell = lambda value: str(value).replace("|", r"\|").replace("\n", " ")
    line = lambda cells: "| " + " | ".join(map(cell, cells)) + " |"
    rule = "|" + "|".join("---:" if x else ":---" for x in right) + "|"
    return Markdown("\n".join([line(head), rule, *map(line, rows)]))
