"""How much silence Whisper needs after a clip: the shortest that keeps the error rate of its full window.

Whisper was trained on windows of 30 s. In shorter ones it is faster, and with too little silence it repeats itself, so
no time of a shorter window says anything without the error rate that goes with it.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from aura_jax.audio.io import load_audio
from aura_jax.data.manifest import Row
from aura_jax.errors import UserError
from aura_jax.evaluate.score import score
from aura_jax.infer.prompting import Request
from aura_jax.infer.transcriber import Transcriber

PADDINGS = (0.0, 1.0, 2.0, 3.0, 5.0, 10.0, 15.0)  # seconds
TOLERANCE = 0.01  # of the word error rate: one point


@dataclasses.dataclass(frozen=True)
class Padding:
    """How much silence is enough.

    Attributes:
      seconds: the least silence after a clip; None: nothing shorter than the full window will do.
      windows: what `Transcriber.with_windows` takes beside it, in seconds; None with None.
      wer: of each padding, and of the full window under None; as `score.interval`.
    """

    seconds: float | None
    windows: tuple[float, ...] | None
    wer: Mapping[float | None, Mapping[str, Any]]

    def values(self) -> dict[str, Any]:
        """Returns it as JSON: {"seconds", "windows", "wer": {seconds, or "full" for the full window: ...}}."""
        wer = {"full" if seconds is None else f"{seconds:g}": of for seconds, of in self.wer.items()}
        return {"seconds": self.seconds, "windows": self.windows, "wer": wer}


def find_padding(
    transcriber: Transcriber,
    rows: Sequence[Row],
    paddings: Sequence[float] = PADDINGS,
    tolerance: float = TOLERANCE,
    progress: bool = True,
) -> Padding:
    """Returns the shortest padding whose word error rate is at most the full window's and `tolerance`.

    Windows are whole seconds, so a clip is followed by up to a second more than its padding. The rows should be none
    that anything is tested on.

    Args:
      rows: with audio and its transcript.
      paddings: the candidates, in seconds of silence after a clip.
      tolerance: a fraction of the words.

    Raises:
      UserError: for no rows, one without audio or transcript, a clip that cannot be read or is longer than the window.
    """
    requests, references = [], []
    for row in rows:
        if row.audio is None or not row.text:
            raise UserError(f"{row.where}: the error rate needs 'audio' and 'text': leave the row out")
        requests.append(Request(load_audio(row.audio)))
        references.append(row.text)
    full = transcriber.with_windows(None)
    windows = (*map(float, range(1, math.ceil(full.window_seconds))), full.window_seconds)
    # As if every clip were heard once: a second hearing would hide how often the silence is too short.
    by_padding = {
        seconds: transcriber.with_windows(windows, seconds, hears_again=False) for seconds in sorted(paddings)
    }
    wer: dict[float | None, Mapping[str, Any]] = {}
    with tqdm(total=len(rows) * (len(by_padding) + 1), desc="padding", unit="row", disable=not progress) as bar:
        for seconds, hears in ({None: full} | by_padding).items():
            heard = hears.generate(requests, bar.update)
            wer[seconds] = score(references, [reply.text for reply in heard])["wer"]
    most = wer[None]["value"] + tolerance
    enough = next((seconds for seconds in by_padding if wer[seconds]["value"] <= most), None)
    return Padding(enough, None if enough is None else windows, wer)
