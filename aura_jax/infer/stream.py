"""Speech that is heard while it is spoken: each piece goes into the KV cache as soon as its samples are there.

After the end of speech only the last piece and the text behind the audio are left to read, however long the speech
was. Nothing is computed again, so the model must not look ahead: a mask that is "causal" or "block", a normalisation
that is "streaming", and an embedder of frames. Of those, "stem" waits for 12.5 ms after a token's own samples, "patch"
for 2.5 ms.

The answer is that of `Generator.generate` to the same samples, in whichever portions they come. Columns of the cache
are tokens, without padding between them: what a piece leaves free is written over by the next.

Dimensions: B rows, all alike (more than one only where a mesh splits rows); T columns of a pass; S columns of the
cache; W samples of a window, F its mel frames; V vocabulary.
"""

import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from aura_jax.audio import features
from aura_jax.audio.io import AudioError, Blocks
from aura_jax.config import Config
from aura_jax.errors import UserError
from aura_jax.infer.answer_text import AnswerText, checked_stop
from aura_jax.infer.generate import Answers, Generator, Prompted, Reply, first_tokens, told
from aura_jax.infer.prompting import check_turns, padded_length
from aura_jax.infer.reading import AT_AUDIO, Program
from aura_jax.infer.sampling import GREEDY, Choice, Sampling
from aura_jax.models.embedder import FRAMES_AHEAD
from aura_jax.models.llm import Cache, Context

# What the mask "causal" reads at a time. Each piece is a pass over all weights, so shorter ones cost more; longer ones
# leave more to the end.
_PIECE_SECONDS = 0.32
_HALF_WINDOW = features.N_FFT // 2


def check_streams(c: Config) -> None:
    """Raises UserError for a model that has to know the end of a clip before it hears its beginning."""
    kinds = " or ".join(map(repr, sorted(FRAMES_AHEAD)))
    mend = (
        "train configs/quickstart_streaming.py, or your own config with model.normalisation 'streaming', model.mask "
        f"'causal' or 'block', and embedder.kind {kinds}"
    )
    if c.embedder.kind not in FRAMES_AHEAD:
        raise UserError(f"embedder.kind {c.embedder.kind!r} keeps an encoder, which hears whole clips only: {mend}")
    if c.model.mask == "bidirectional":
        raise UserError(f"model.mask 'bidirectional' hears whole clips only: {mend}")
    if c.model.normalisation != "streaming":
        raise UserError(f"model.normalisation {c.model.normalisation!r} hears whole clips only: {mend}")


@struct.dataclass
class _Heard:
    """What was heard so far; the cache is beside it, because it is donated.

    Attributes:
      n_columns: scalar, of the cache that hold tokens.
      maximum_1: the largest log power of the frames before the next window.
    """

    n_columns: Any
    maximum_1: Any


@struct.dataclass
class _Piece:
    """Audio tokens to read next, and the samples around them.

    Attributes:
      window_W: float32, as `features.log_mel_of_piece` takes it. It begins with a token that has been read, because the
        embedder looks back; at the start of a clip with the piece itself.
      first: scalar, the number in its clip of the window's first token.
      n_before: scalar, tokens of the window before the piece: 1, or 0 at the start.
      n_tokens: scalar, of the piece.
      n_frames: scalar, of the window that are of the clip.
      start: scalar, the column of the clip's first token.
      n_audio: scalar, tokens of the clip; while it goes on, those read once the piece is.
    """

    window_W: Any
    first: Any
    n_before: Any
    n_tokens: Any
    n_frames: Any
    start: Any
    n_audio: Any


class Session:
    """One spoken turn, heard while it is spoken, and its answer.

    Attributes:
      n_samples: heard so far, at 16 kHz.
      n_most: tokens that are read at most, text and speech.
      n_new: tokens of the longest answer.
      logits_V: float32, those that the answer's first token is chosen by; None until the speech has ended. Another
        implementation can be compared with them.
    """

    def __init__(
        self,
        generator: Generator,
        prompt: str | None = None,
        *,
        history: Sequence[Mapping[str, str]] = (),
        rate: float = features.SAMPLE_RATE,
        max_seconds: float | None = None,
        sampling: Sampling = GREEDY,
        stop: Sequence[str] = (),
    ):
        """
        Args:
          generator: of a model that streams.
          prompt: the user's text after the speech; None: the prompt that the run was trained with.
          history: earlier turns of text, {"role", "content"}, oldest first.
          rate: of the samples to come, in Hz.
          max_seconds: of speech, for which there is room in the cache; None: `data.max_seconds`.
          sampling, stop: as of `Generator.generate`.

        Raises:
          UserError: the model does not stream, a turn of the history has audio, or a value is out of range.
        """
        system = generator.system
        c, config = system.config, system.model.config
        check_streams(c)
        self._max_seconds: float = c.data.max_seconds if max_seconds is None else max_seconds
        longest = max(c.eval.max_seconds, c.data.max_seconds)
        if not 0 < self._max_seconds <= longest:
            raise UserError(f"max_seconds {self._max_seconds:g}: give more than 0, and {longest:g} at most")
        if any(turn.get("audio") is not None for turn in history):
            raise UserError("the history of a session is text: give what was said in a turn as its content")
        self._generator, self._sampling, self._stop = generator, sampling, checked_stop(stop)
        self._blocks, self._rate = Blocks(rate), rate
        turns = [*history, {"role": "user", "content": c.data.prompt if prompt is None else prompt, "audio": True}]
        check_turns(turns)
        texts = system.chat.around(turns)
        self._prefix_T, self._suffix_T = (np.asarray(ids, np.int32) for ids in texts)

        self._frames = 2 * config.embedder.frames_per_token  # of the log-mel, a token
        self._token = self._frames * features.HOP  # samples
        self._ahead = (FRAMES_AHEAD[config.embedder.kind] - 1) * features.HOP + _HALF_WINDOW  # samples
        self._n_piece = config.chunk or max(1, round(_PIECE_SECONDS * features.SAMPLE_RATE / self._token))  # tokens
        n_samples = round(self._max_seconds * features.SAMPLE_RATE) + 1  # a resampler may round up
        self._n_audio_most = -(-n_samples // self._token)
        self.n_most, self.n_new = sum(map(len, texts)) + self._n_audio_most, generator.max_new_tokens
        # From half a window before the clip to what the last piece's window may span after it.
        self._samples_S = np.zeros(_HALF_WINDOW + (self._n_audio_most + self._n_piece + 4) * self._token, np.float32)
        self.n_samples, self._n_read = 0, 0
        self.logits_V: jax.Array | None = None

        program = generator.program(is_spoken=True, n_new=self.n_new)
        self._variables, self._program = generator.held(program, generator.n_rows(1))
        prefix_T, suffix_T = _padded(self._prefix_T), _padded(self._suffix_T)
        n_columns = len(prefix_T) + self._n_audio_most + self._n_piece + 1 + len(suffix_T) + self.n_new
        self._cache: Cache | None
        self._cache = Cache.zeros(config.llm, generator.n_rows(1), n_columns, self._program.model.dtype)
        self._heard = _Heard(np.int32(0), np.full(1, -np.inf, np.float32))
        self._read(_read_text, prefix_T, np.int32(len(self._prefix_T)))

    def push(self, samples_S: np.ndarray) -> None:
        """Hears more speech: reads the pieces that are complete, and does not wait for the device.

        Args:
          samples_S: floats in [-1, 1], any number of them.

        Raises:
          UserError: as `audio.io.Blocks.push`, for more than `max_seconds` (nothing of it is heard then), or after the
            end of speech.
        """
        self._check_open()
        samples_S = np.atleast_1d(np.asarray(samples_S))
        seconds = (self._blocks.n_samples + len(samples_S)) / self._rate
        if seconds > self._max_seconds:
            raise AudioError(
                f"{seconds:.2f} s of speech, and this session has room for {self._max_seconds:g} s: finish it, or open "
                "the next with a larger max_seconds"
            )
        self._hear(self._blocks.push(samples_S))

    def wait(self) -> None:
        """Waits until what was pushed has been read."""
        jax.block_until_ready(self._cache)

    def finish(self, every: int = 1) -> Iterator[str]:
        """Ends the speech; returns an iterator over pieces of the answer, each there as soon as it is certain.

        Args:
          every: tokens decoded at a time.

        Raises:
          UserError: nothing was said, the speech has ended already, or `every` is below 1.
        """
        if every < 1:
            raise UserError(f"every {every}: at least 1 token at a time")
        return told(self._end(every))

    def reply(self) -> Reply:
        """Ends the speech and returns the whole answer; its `seconds` begin here. Raises as `finish`."""
        start = time.perf_counter()
        *_, (answer,) = self._end(self.n_new)
        return Reply(answer.text, tuple(answer.tokens), answer.ended, time.perf_counter() - start)

    def _end(self, every: int) -> Iterator[list[AnswerText]]:
        self._check_open()
        if not self._blocks.n_samples:
            raise UserError("nothing was said: push samples before the end of speech")
        self._hear(self._blocks.end())  # of a low rate, the filter may have held more than a piece
        if not self.n_samples:
            raise UserError("what was said is too short for a sample at 16 kHz: open a session, and push more")
        generator, program = self._generator, self._program
        n_audio = -(-self.n_samples // self._token)
        # Of a token whose own samples are there, those that the embedder looks ahead to may not have been: one more.
        piece = self._piece(self._n_piece + 1, n_audio=n_audio)
        text_1xT = np.concatenate([self._prefix_T, self._suffix_T])[None]
        text_BxT = np.repeat(text_1xT, generator.n_rows(1), axis=0)
        number_B, is_text_BxT = np.zeros(len(text_BxT), int), np.ones(text_BxT.shape, bool)
        choice = Choice.of(self._sampling, number_B, text_BxT, is_text_BxT, program.model.config.llm.vocab)
        suffix = _padded(self._suffix_T), np.int32(len(self._suffix_T))
        stop_ids = np.asarray(generator.system.chat.stop_ids, np.int32)
        cache, state, prompted, self.logits_V = _read_end(
            self._variables, self._cache, self._heard, program, piece, self._n_audio_most, *suffix, stop_ids, choice
        )
        self._cache = None
        return generator.decoded(cache, state, prompted, program, 1, self._stop, every)

    def _check_open(self) -> None:
        if self._cache is None:
            raise UserError("this turn has ended: open a session for the next")

    def _read(self, program: Any, *arguments: Any) -> None:
        self._cache, self._heard = program(self._variables, self._cache, self._heard, self._program, *arguments)

    def _hear(self, waveform_S: np.ndarray) -> None:
        """Reads the pieces that are complete with these samples."""
        start = _HALF_WINDOW + self.n_samples
        self._samples_S[start : start + len(waveform_S)] = waveform_S
        self.n_samples += len(waveform_S)
        while (self._n_read + self._n_piece) * self._token + self._ahead <= self.n_samples:
            piece = self._piece(self._n_piece, n_audio=self._n_read + self._n_piece)
            self._read(_read_speech, piece, self._n_audio_most)
            self._n_read += self._n_piece

    def _piece(self, n_tokens: int, n_audio: int) -> _Piece:
        """Returns the piece that comes next, in a window for up to `n_tokens` of it.

        Args:
          n_audio: tokens of the clip so far, this piece's included.
        """
        first = max(self._n_read - 1, 0)
        if first == 0:
            self._samples_S[:_HALF_WINDOW] = self._samples_S[2 * _HALF_WINDOW : _HALF_WINDOW : -1]
        start = first * self._token
        # The embedder's frames ahead are within two; hops are two more than frames.
        window_W = self._samples_S[start : start + (1 + n_tokens) * self._token + 4 * features.HOP].copy()
        return _Piece(
            window_W=window_W,
            first=np.int32(first),
            n_before=np.int32(self._n_read - first),
            n_tokens=np.int32(n_audio - self._n_read),
            n_frames=np.int32(features.n_frames(self.n_samples) - first * self._frames),
            start=np.int32(len(self._prefix_T)),
            n_audio=np.int32(n_audio),
        )


def _padded(ids_T: np.ndarray) -> np.ndarray:
    """Returns ids followed by zeros, so that texts have few lengths."""
    return np.pad(ids_T, (0, padded_length(len(ids_T)) - len(ids_T)))


@functools.partial(jax.jit, static_argnames="program", donate_argnames="cache")
def _read_text(
    variables: Mapping[str, Any], cache: Cache, heard: _Heard, program: Program, ids_T: jax.Array, n: jax.Array
) -> tuple[Cache, _Heard]:
    """Reads the first n tokens of a text."""
    x_TxD = program.apply(variables, ids_T, method="embed_text")
    _, cache = _pass(variables, cache, heard, program, x_TxD, n, None)
    return cache, _Heard(heard.n_columns + n, heard.maximum_1)


@functools.partial(jax.jit, static_argnames=("program", "n_most"), donate_argnames="cache")
def _read_speech(
    variables: Mapping[str, Any], cache: Cache, heard: _Heard, program: Program, piece: _Piece, n_most: int
) -> tuple[Cache, _Heard]:
    """Reads a piece of a clip that goes on; clips have `n_most` tokens at most."""
    x_TxD, maximum_1 = _embed(variables, heard, program, piece, n_most)
    _, cache = _pass(variables, cache, heard, program, x_TxD, piece.n_tokens, piece)
    return cache, _Heard(heard.n_columns + piece.n_tokens, maximum_1)


@functools.partial(jax.jit, static_argnames=("program", "n_most"), donate_argnames="cache")
def _read_end(
    variables: Mapping[str, Any],
    cache: Cache,
    heard: _Heard,
    program: Program,
    piece: _Piece,
    n_most: int,
    suffix_T: jax.Array,
    n_suffix: jax.Array,
    stop_ids: jax.Array,
    choice: Choice,
) -> tuple[Cache, Answers, Prompted, jax.Array]:
    """Reads a clip's last piece and the text behind it; returns what decoding goes on from, and the logits [V]."""
    audio_TxD, _ = _embed(variables, heard, program, piece, n_most)
    text_TxD = program.apply(variables, suffix_T, method="embed_text")
    # One after the other, without the columns that the piece leaves free.
    i_T, n = jnp.arange(len(audio_TxD) + len(text_TxD)), piece.n_tokens
    x_TxD = jnp.concatenate([audio_TxD, text_TxD])[jnp.where(i_T < n, i_T, len(audio_TxD) + i_T - n)]
    n += n_suffix
    h_BxTxD, cache = _pass(variables, cache, heard, program, x_TxD, n, piece)
    h_BxD = jax.lax.dynamic_index_in_dim(h_BxTxD, n - 1, axis=1, keepdims=False)
    logits_BxV = program.apply(variables, h_BxD, method="logits")
    n_columns, (n_rows, length) = heard.n_columns + n, cache.k_LxBxSxGxK.shape[1:3]
    prompted = Prompted(jnp.ones((n_rows, length), jnp.int32), n_columns, jnp.broadcast_to(n_columns, n_rows))
    return cache, first_tokens(logits_BxV, stop_ids, program, choice), prompted, logits_BxV[0]


def _embed(
    variables: Mapping[str, Any], heard: _Heard, program: Program, piece: _Piece, n_most: int
) -> tuple[jax.Array, jax.Array]:
    """Returns the audio tokens [T, D] of a piece, and the largest log power before the next window's first frame."""
    c = program.model.config.embedder
    mel_1xFxM, maximum_1xG = features.log_mel_of_piece(piece.window_W[None], heard.maximum_1, c.n_mels)
    frames = 2 * c.frames_per_token
    n_tokens = mel_1xFxM.shape[1] // frames - 1  # of the piece, at most: one more is before it, or has no frames ahead
    x_1xAxD = program.apply(variables, mel_1xFxM, piece.n_frames[None], piece.first, n_most, method="embed_piece")
    x_TxD = jax.lax.dynamic_slice_in_dim(x_1xAxD[0], piece.n_before, n_tokens)
    # The next window begins with the last token of this piece.
    n_frames = (piece.n_before + piece.n_tokens - 1) * frames
    return x_TxD, jax.lax.dynamic_index_in_dim(maximum_1xG, n_frames, axis=1, keepdims=False)


def _pass(
    variables: Mapping[str, Any],
    cache: Cache,
    heard: _Heard,
    program: Program,
    x_TxD: jax.Array,
    n: jax.Array,
    piece: _Piece | None,
) -> tuple[jax.Array, Cache]:
    """Puts n tokens of `x` behind those in the cache; returns normed hidden states [B, T, D] and the cache.

    Args:
      piece: of which the first tokens are; None: all are text.
    """
    c, (n_rows, length) = program.model.config, cache.k_LxBxSxGxK.shape[1:3]
    i_T = jnp.arange(len(x_TxD))
    column_T = heard.n_columns + i_T
    k_end_T, is_audio_T = column_T + 1, jnp.zeros(len(x_TxD), bool)
    if piece is not None:
        is_audio_T = i_T < piece.n_tokens
        chunk = max(c.chunk, 1)
        # As `attention.key_end`, in columns of the cache.
        audio_end_T = jnp.minimum(((column_T - piece.start) // chunk + 1) * chunk, piece.n_audio)
        k_end_T = jnp.where(is_audio_T, piece.start + audio_end_T, k_end_T)
    rows = lambda x_T: jnp.broadcast_to(x_T, (n_rows, len(x_T)))
    ctx = Context(
        position_BxT=rows(column_T),
        k_end_BxT=rows(k_end_T),
        q_segment_BxT=rows((i_T < n).astype(jnp.int32)),
        k_segment_BxS=jnp.ones((n_rows, length), jnp.int32),
        lora_mask_BxT=rows(is_audio_T) if program.lora == AT_AUDIO else None,
        cache_start=heard.n_columns,
    )
    x_BxTxD = jnp.broadcast_to(x_TxD, (n_rows, *x_TxD.shape))
    x_BxTxD, cache_, _ = program.apply(variables, x_BxTxD, ctx, cache, method="adapted_blocks")
    return program.apply(variables, x_BxTxD, ctx, cache_, method="plain_blocks")
