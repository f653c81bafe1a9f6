"""From requests to a batch: token ids around the audio, and the arrays that a compiled program reads.

A row's columns are prefix, audio slot, suffix, answer; each part is as wide as the longest of the batch (rounded up, so
that compilations are few), and what a row leaves free is padding, segment 0. Positions count real tokens: an answer
depends neither on padding nor on the other rows.

Dimensions: B rows, T prompt columns, R answer tokens that are given, N samples of a clip.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from flax import struct

from aura_jax.audio import features
from aura_jax.data.assemble import Example, assemble
from aura_jax.data.plan import BUCKETS, Shape
from aura_jax.errors import UserError
from aura_jax.infer.sampling import MAX_SEED
from aura_jax.models.speech_llm import Columns
from aura_jax.system import System

_BEYOND_SECONDS = 10.0  # longer clips: multiples of this


@dataclasses.dataclass(frozen=True)
class Request:
    """One turn to answer.

    Attributes:
      waveform: float32 [samples] at 16 kHz, or None for a turn of text.
      prompt: the user's text: after the audio, or the turn itself. None beside audio: the prompt that the run was
        trained with.
      history: earlier turns, {"role": ..., "content": text}, oldest first.
      transcript: text that stands in the place of the audio, for the text oracle; not together with `waveform`.
      number: what sampling draws by beside the seed; None: the request's place in its list.
      wants_transcript: the words themselves are wanted. It is for a cascade, which writes them down anyway; a model
        does what it was trained to do.
    """

    waveform: np.ndarray | None = None
    prompt: str | None = None
    history: Sequence[Mapping[str, str]] = ()
    transcript: str | None = None
    number: int | None = None
    wants_transcript: bool = False


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A tokenised request: its place in the list, its number, ids before and after the audio, its bucket of samples.

    Text is in bucket 0.
    """

    index: int
    number: int
    waveform: np.ndarray | None
    prefix: Sequence[int]
    suffix: Sequence[int]
    n_bucket: int
    answer: Sequence[int] = ()  # read after it, not generated


@struct.dataclass
class Inputs:
    """A batch to read; `waveform_BxN` is None for text.

    Attributes:
      target_position_BxR: the columns that predict the tokens of given answers; of generation there are none.
    """

    columns: Columns
    target_position_BxR: jax.Array
    waveform_BxN: jax.Array | None
    n_samples_B: jax.Array | None


def tokenise(system: System, index: int, request: Request) -> Prompt:
    """Returns the prompt of a request, the one at `index` of its list.

    Raises:
      UserError: for a request with neither audio nor text, or with both audio and transcript; audio that is not a mono
        waveform, or longer than `eval.max_seconds`; a number that is out of range.
    """
    waveform = request.waveform
    number = index if request.number is None else request.number
    if not 0 <= number <= MAX_SEED:
        raise UserError(f"a request's number is 0 to {MAX_SEED}, not {number}")
    if waveform is not None and request.transcript is not None:
        raise UserError("a request has either a waveform or a transcript in its place: drop one")
    if waveform is None and request.transcript is None:
        if not request.prompt:
            raise UserError("nothing to answer: a request needs audio or a prompt")
        before, after = system.chat.encode(request.prompt, has_audio=False, history=request.history)
        return Prompt(index, number, None, [*before, *after], [], 0)
    prompt = system.config.data.prompt if request.prompt is None else request.prompt
    before, after = system.chat.encode(prompt, has_audio=True, history=request.history)
    if request.transcript is not None:
        middle = system.chat.text(request.transcript)
        return Prompt(index, number, None, [*before, *middle, *after], [], 0)
    waveform = np.asarray(waveform, np.float32)
    if waveform.ndim != 1 or not len(waveform):
        raise UserError(f"audio of shape {waveform.shape}: one mono waveform with at least one sample is needed")
    longest = max(system.config.eval.max_seconds, system.config.data.max_seconds)
    if len(waveform) > longest * features.SAMPLE_RATE:
        seconds = f"{len(waveform) / features.SAMPLE_RATE:.2f} s"
        raise UserError(f"audio of {seconds}, over the limit of {longest:g} s: split it or raise eval.max_seconds")
    n_bucket = _sample_bucket(len(waveform), system.config.data.buckets or BUCKETS)
    return Prompt(index, number, waveform, before, after, n_bucket)


def lay_out(system: System, batch: Sequence[Prompt], n_rows: int) -> Inputs:
    """Returns a batch of prompts, all spoken or all of text, as `n_rows` rows; those beyond them are empty."""
    n_prefix = _token_bucket(max(len(p.prefix) for p in batch))
    n_targets = max(len(p.answer) for p in batch)
    n_targets = _token_bucket(n_targets) if n_targets else 0
    n_suffix = _token_bucket(max(len(p.suffix) for p in batch)) + n_targets
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
    rows = [[Example(p.prefix, p.suffix, p.answer, waveform_S=p.waveform)] for p in batch]
    laid_out = assemble([*rows, *[[]] * (n_rows - len(batch))], shape, layout="slot", token_rate=rate)
    return Inputs(
        columns=Columns.of(laid_out),
        target_position_BxR=laid_out.target_position_BxR,
        waveform_BxN=laid_out.waveform_BxKxS[:, 0] if n_samples else None,
        n_samples_B=laid_out.n_samples_BxK[:, 0] if n_samples else None,
    )


def _sample_bucket(n_samples: int, seconds: Sequence[float]) -> int:
    """Returns the samples that a clip is padded to: a multiple of the hop."""
    for bucket in seconds:
        n = features.n_frames(round(bucket * features.SAMPLE_RATE)) * features.HOP
        if n_samples <= n:
            return n
    step = round(_BEYOND_SECONDS * features.SAMPLE_RATE)
    return -(-n_samples // step) * step


def _token_bucket(n: int) -> int:
    """Returns `n` rounded up: to a multiple of 8, and of ever larger steps from 64 on, by a quarter at most."""
    step = 8
    while n > 8 * step:
        step *= 2
    return -(-n // step) * step
