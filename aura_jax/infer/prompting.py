"""From requests to a batch: token ids around the audio, and the arrays that a compiled program reads.

A row's columns are prefix, audio slot, suffix, answer; each part is as wide as the longest of the batch (rounded up, so
that compilations are few), and what a row leaves free is padding, segment 0. Positions count real tokens: an answer
depends neither on padding nor on the other rows. In a conversation of several clips the parts follow each other without
holes, and the row as a whole is rounded up, and the number of its clips to a power of two.

Dimensions: B rows, T prompt columns, K clips of a row, R answer tokens that are given, N samples of a clip.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import struct

from aura_jax.audio import features
from aura_jax.config import Config
from aura_jax.data.assemble import Example, assemble
from aura_jax.data.batch import Batch
from aura_jax.data.plan import BUCKETS, Shape
from aura_jax.errors import UserError
from aura_jax.infer.sampling import MAX_SEED
from aura_jax.models.speech_llm import Columns
from aura_jax.system import System

_UNIT = features.SAMPLE_RATE // 4  # samples: clips beyond the buckets have a `padded_length` of these


@dataclasses.dataclass(frozen=True)
class Request:
    """One turn to answer.

    Attributes:
      waveform: float32 [samples] at 16 kHz, or None for a turn of text.
      prompt: the user's text: after the audio, or the turn itself. None beside audio: the prompt that the run was
        trained with.
      history: earlier turns, {"role": ..., "content": text}, oldest first. A user's may have a clip too, "audio":
        waveform, and is then like this one: "content" of None, or none, is the prompt that the run was trained with.
      transcript: text that stands in the place of the audio, for the text oracle; not together with `waveform`.
      number: what sampling draws by beside the seed; None: the request's place in its list.
      wants_transcript: the words themselves are wanted. It is for a cascade, which writes them down anyway; a model
        does what it was trained to do.
    """

    waveform: np.ndarray | None = None
    prompt: str | None = None
    history: Sequence[Mapping[str, Any]] = ()
    transcript: str | None = None
    number: int | None = None
    wants_transcript: bool = False


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A tokenised request.

    Attributes:
      index, number: its place in the list, and its number.
      texts: ids before, between and after the clips: one sequence more than there are clips.
      clips: waveforms.
      n_bucket: samples that each clip is padded to; 0 without any.
      answer: ids that are read after it, not generated.
    """

    index: int
    number: int
    texts: Sequence[Sequence[int]]
    clips: Sequence[np.ndarray]
    n_bucket: int
    answer: Sequence[int] = ()

    @property
    def n_places(self) -> int:
        """How many clips there is room for: their number rounded up to a power of two; 0 for text."""
        return 1 << (len(self.clips) - 1).bit_length() if self.clips else 0

    def n_tokens(self, token_rate: float) -> int:
        """Returns how many tokens are read before the answer, of text and of audio at that rate (Hz)."""
        n_audio = sum(int(features.n_audio_tokens(len(clip), token_rate)) for clip in self.clips)
        return n_audio + sum(map(len, self.texts))


@struct.dataclass
class Inputs:
    """A batch to read; `waveform_BxKxN` is None for text.

    Attributes:
      target_position_BxR: the columns that predict the tokens of given answers; of generation there are none.
    """

    columns: Columns
    target_position_BxR: jax.Array
    waveform_BxKxN: jax.Array | None
    n_samples_BxK: jax.Array | None


def tokenise(system: System, index: int, request: Request) -> Prompt:
    """Returns the prompt of a request, the one at `index` of its list.

    Raises:
      UserError: for a request with neither audio nor text, or with both audio and transcript; audio that is not a mono
        waveform, or not a user's, or longer than `eval.max_seconds`; an earlier turn without text; a number that is out
        of range.
    """
    number = index if request.number is None else request.number
    if not 0 <= number <= MAX_SEED:
        raise UserError(f"a request's number is 0 to {MAX_SEED}, not {number}")
    if request.waveform is not None and request.transcript is not None:
        raise UserError("a request has either a waveform or a transcript in its place: drop one")
    turns = [*request.history, {"role": "user", "content": request.prompt, "audio": request.waveform}]
    clips = [_clip(turn, system.config) for turn in turns if turn.get("audio") is not None]
    is_audio = [turn.get("audio") is not None for turn in turns]
    is_audio[-1] |= request.transcript is not None
    contents = [turn.get("content") for turn in turns]
    if not is_audio[-1] and not contents[-1]:
        raise UserError("nothing to answer: a request needs audio or a prompt")
    trained = system.config.data.prompt
    turns = [
        {**turn, "content": trained if content is None and audio else content, "audio": audio}
        for turn, content, audio in zip(turns, contents, is_audio, strict=True)
    ]
    check_turns(turns)
    texts = system.chat.around(turns)
    if request.transcript is not None:
        *texts, before, after = texts
        texts = [*texts, (*before, *system.chat.text(request.transcript), *after)]
    longest = max(map(len, clips), default=0)
    n_bucket = _sample_bucket(longest, system.config.data.buckets or BUCKETS) if clips else 0
    return Prompt(index, number, texts, clips, n_bucket)


def check_turns(turns: Sequence[Mapping[str, Any]]) -> None:
    """Raises UserError for a turn, {"role", "content"}, that no chat template can write down."""
    for turn in turns:
        content = turn.get("content")
        if content is None:
            raise UserError("an earlier turn has neither audio nor content: give it one of them")
        if not isinstance(content, str):
            raise UserError(f"a turn's text is one string, not {type(content).__name__}: give one prompt for all clips")
        try:
            content.encode()
        except UnicodeEncodeError:
            raise UserError(f"a turn's text is not Unicode, {content[:40]!r}: write it in UTF-8") from None


def _clip(turn: Mapping[str, Any], config: Config) -> np.ndarray:
    """Returns the waveform of a turn."""
    waveform = np.asarray(turn["audio"], np.float32)
    if waveform.ndim != 1 or not len(waveform):
        raise UserError(f"audio of shape {waveform.shape}: one mono waveform with at least one sample is needed")
    if turn.get("role") != "user":
        raise UserError(f"audio in a turn of {turn.get('role')!r}: only the user's turns are heard")
    longest = max(config.eval.max_seconds, config.data.max_seconds)
    if len(waveform) > longest * features.SAMPLE_RATE:
        seconds = f"{len(waveform) / features.SAMPLE_RATE:.2f} s"
        raise UserError(f"audio of {seconds}, over the limit of {longest:g} s: split it or raise eval.max_seconds")
    return waveform


def lay_out(system: System, batch: Sequence[Prompt], n_rows: int) -> Inputs:
    """Returns a batch of prompts as `n_rows` rows; those beyond them are empty.

    Args:
      batch: of the same `n_places`.
    """
    laid_out = (_conversations if batch[0].n_places > 1 else _slots)(system, batch, n_rows)
    has_audio = batch[0].n_places > 0
    return Inputs(
        columns=Columns.of(laid_out),
        target_position_BxR=laid_out.target_position_BxR,
        waveform_BxKxN=laid_out.waveform_BxKxS if has_audio else None,
        n_samples_BxK=laid_out.n_samples_BxK if has_audio else None,
    )


def _slots(system: System, batch: Sequence[Prompt], n_rows: int) -> Batch:
    """Prompts of text, or of one clip: the audio of all rows is in the same columns."""
    n_targets = _n_targets(batch)
    n_prefix = padded_length(max(len(p.texts[0]) for p in batch))
    n_suffix = padded_length(max(len(p.texts[1]) if p.clips else 0 for p in batch)) + n_targets
    n_samples = max(p.n_bucket for p in batch)
    rate = system.config.embedder.token_rate
    n_audio = int(features.n_audio_tokens(n_samples, rate))
    shape = Shape(
        n_rows=n_rows,
        n_tokens=n_prefix + n_audio + n_suffix,
        n_clips=1,
        n_audio=n_audio,
        n_samples=n_samples,
        n_targets=n_targets,
        n_prefix=n_prefix,
    )
    rows = [
        [Example(p.texts[0], p.texts[1], p.answer, p.clips[0]) if p.clips else Example(p.texts[0], (), p.answer)]
        for p in batch
    ]
    return assemble([*rows, *[[]] * (n_rows - len(batch))], shape, layout="slot", token_rate=rate)


def _conversations(system: System, batch: Sequence[Prompt], n_rows: int) -> Batch:
    """Prompts of several clips: a row is packed with an example a clip, which are then one segment."""
    rate = system.config.embedder.token_rate
    n_targets, n_samples = _n_targets(batch), max(p.n_bucket for p in batch)
    shape = Shape(
        n_rows=n_rows,
        n_tokens=padded_length(max(p.n_tokens(rate) for p in batch)) + n_targets,
        n_clips=batch[0].n_places,
        n_audio=int(features.n_audio_tokens(n_samples, rate)),
        n_samples=n_samples,
        n_targets=n_targets,
        n_prefix=0,
    )
    rows = []
    for p in batch:
        *earlier, (before, clip) = zip(p.texts[:-1], p.clips, strict=True)
        rows.append(
            [
                *(Example(text, waveform_S=heard) for text, heard in earlier),
                Example(before, p.texts[-1], p.answer, clip),
            ]
        )
    laid_out = assemble([*rows, *[[]] * (n_rows - len(batch))], shape, layout="packed", token_rate=rate)
    is_token_BxT = laid_out.segment_BxT != 0
    return laid_out._replace(
        segment_BxT=is_token_BxT.astype(np.int32),
        position_BxT=np.where(is_token_BxT, np.arange(shape.n_tokens, dtype=np.int32), 0),
    )


def _n_targets(batch: Sequence[Prompt]) -> int:
    """Returns the columns for given answers."""
    n_targets = max(len(p.answer) for p in batch)
    return padded_length(n_targets) if n_targets else 0


def _sample_bucket(n_samples: int, seconds: Sequence[float]) -> int:
    """Returns the samples that a clip is padded to: a multiple of the hop."""
    for bucket in seconds:
        n = features.n_frames(round(bucket * features.SAMPLE_RATE)) * features.HOP
        if n_samples <= n:
            return n
    return padded_length(-(-n_samples // _UNIT)) * _UNIT


def padded_length(n: int) -> int:
    """Returns `n` rounded up: to a multiple of 8, and of ever larger steps from 64 on, by a quarter at most."""
    step = 8
    while n > 8 * step:
        step *= 2
    return -(-n // step) * step
