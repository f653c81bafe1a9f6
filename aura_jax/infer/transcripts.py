"""What a Whisper hears in the clips of a manifest: the transcripts of speech that has none.

They are written in `parts`. A clip that is longer than Whisper's window is cut in its pauses, and what is heard in the
pieces is joined.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from aura_jax import assets, checkpoint
from aura_jax.audio.features import SAMPLE_RATE
from aura_jax.audio.io import AudioError, load_audio
from aura_jax.audio.pauses import cut_in_pauses
from aura_jax.data.manifest import check_folders
from aura_jax.errors import UserError
from aura_jax.infer import parts
from aura_jax.infer.parts import Line, Part
from aura_jax.infer.prompting import Request
from aura_jax.infer.transcriber import Transcriber

# What transcripts depend on, and how an error calls it.
_NAMES = {
    "whisper": "Whisper",
    "language": "--language",
    "all": "choice of rows (--all)",
    "weights": "Whisper's weights",
}
_READERS = 8  # threads that decode the clips of a batch


class Transcript(NamedTuple):
    """What was heard in a clip.

    Attributes:
      text: empty if there was nothing to hear, or to read.
      ended: whether Whisper ended it: at the longest length it mostly repeats itself.
      problem: why the clip cannot be read.
    """

    text: str
    ended: bool
    problem: str | None


@dataclass(frozen=True)
class Report:
    """What was written.

    Attributes:
      path: of the manifest, or of the part.
      n_transcripts: that are not empty.
      n_kept: clips that an earlier call had heard.
      n_cut: transcripts that the longest length ended.
      n_empty: clips in which nothing was heard.
      n_others: rows that are as they were.
      problems: a line for each clip that cannot be read.
    """

    path: Path
    n_transcripts: int
    n_kept: int
    n_cut: int
    n_empty: int
    n_others: int
    problems: list[str]

    @property
    def summary(self) -> str:
        """The report in one line."""
        text = f"{self.path}: {self.n_transcripts} transcripts"
        text += f" ({self.n_kept} clips were heard before)" if self.n_kept else ""
        text += f", {self.n_cut} cut at the longest length" if self.n_cut else ""
        text += f"; left out: {self.n_empty} clips in which nothing was heard" if self.n_empty else ""
        text += f"; left out: {len(self.problems)} that cannot be read" if self.problems else ""
        return text + (f"; {self.n_others} rows as they were" if self.n_others else "")


def write(
    manifest: str,
    output: Path,
    whisper: str,
    *,
    language: str | None = None,
    batch_size: int = 16,
    anew: bool = False,
    limit: int | None = None,
    part: Part | None = None,
    progress: bool = True,
) -> Report:
    """Writes the manifest with what is heard as the `text` of every speech row that has none.

    Rows in whose clips nothing is heard, or which cannot be read, are left out: nothing that wants a transcript could
    use them. Their parts say which, and why.

    Args:
      manifest: a manifest, or a folder of shards.
      output: of the new manifest; paths are made relative to it.
      whisper: a directory, an asset's name or hf://owner/name.
      language: of the speech, as of `Transcriber`.
      batch_size: clips, or pieces of long ones, heard together.
      anew: in the place of the texts that there are, too.
      limit: the first rows only; None: all.
      part: write this part only. None: join the parts there are; if there are none, write all rows.
      progress: show a progress bar on standard error.

    Raises:
      UserError: for a manifest that will not do; a part that was made of something else or is not finished; an
        `output` that is there already without its parts; a Whisper that cannot be found, or not speak the language.
    """
    if batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, not {batch_size}")
    lines = parts.read(manifest, limit, untranscribed=True)
    spoken = [place for place, line in enumerate(lines) if line.row.audio is not None]
    places = [place for place in spoken if anew or not (lines[place].row.text or "").strip()]
    if not spoken:
        raise UserError(f"{manifest}: no row with 'audio': there is nothing to hear")
    if not places:
        raise UserError(f"{manifest}: every speech row has its 'text': add --all to write them all anew")
    check_folders(lines[place].row for place in places)
    column = parts.Column(
        format="aura-jax transcripts",
        entry=Transcript,
        places=places,
        making={"whisper": whisper, "language": language, "all": anew},
        names=_NAMES,
        load=lambda: _load(lines, whisper, language, batch_size),
        values=lambda heard: {"text": heard.text} if heard.text else None,
    )
    path, heard, n_kept, is_whole = parts.write(manifest, output, lines, column, part, progress)
    problems = [f"{lines[place].row.where}: {entry.problem}" for place, entry in heard.items() if entry.problem]
    n_transcripts = sum(bool(entry.text) for entry in heard.values())
    return Report(
        path=path,
        n_transcripts=n_transcripts,
        n_kept=n_kept,
        n_cut=sum(bool(entry.text) and not entry.ended for entry in heard.values()),
        n_empty=len(heard) - n_transcripts - len(problems),
        n_others=len(lines) - len(heard) if is_whole else 0,
        problems=problems,
    )


def _load(lines: Sequence[Line], whisper: str, language: str | None, batch_size: int) -> parts.Writer[Transcript]:
    """Returns what hears: the Whisper."""
    transcriber = Transcriber(assets.resolve(whisper), batch_size=batch_size, language=language)
    longest = round(transcriber.window_seconds * SAMPLE_RATE)

    def pieces(place: int) -> list[np.ndarray] | AudioError:
        try:
            waveform_S = load_audio(lines[place].row.audio or "")
        except AudioError as error:
            return error
        return [waveform_S[start:end] for start, end in cut_in_pauses(waveform_S, longest)]

    def hear(places: Sequence[int]) -> list[Transcript]:
        with ThreadPoolExecutor(_READERS) as pool:
            clips = list(pool.map(pieces, places))
        requests = [Request(piece) for clip in clips if not isinstance(clip, AudioError) for piece in clip]
        replies = iter(transcriber.generate(requests))
        transcripts = []
        for clip in clips:
            if isinstance(clip, AudioError):
                transcripts.append(Transcript("", True, str(clip)))
                continue
            heard = [next(replies) for _ in clip]
            text = " ".join(reply.text for reply in heard if reply.text)
            transcripts.append(Transcript(text, all(reply.ended for reply in heard), None))
        return transcripts

    return parts.Writer(hear, transcriber.batch_size, checkpoint.fingerprint(transcriber.params))
