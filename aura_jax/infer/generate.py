"""Batched decoding with a KV cache: one compiled prefill from waveform to first token, one compiled decode loop.

A row's columns are prefix, audio slot, suffix, answer; each part is as wide as the longest of the batch (rounded up, so
that compilations are few), and what a row leaves free is padding, segment 0. Positions count real tokens: an answer
depends neither on padding nor on the other rows.

Dimensions: B rows, T prompt columns, G columns of the answer, S = T + G columns of the cache, A audio tokens,
N samples of a clip, V vocabulary.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from aura_jax import sharding
from aura_jax import system as system_lib
from aura_jax.audio import features
from aura_jax.config import Config
from aura_jax.data.assemble import Example, assemble
from aura_jax.data.plan import BUCKETS, Shape
from aura_jax.errors import UserError
from aura_jax.infer.sampling import GREEDY, MAX_SEED, Choice, Sampling, next_token
from aura_jax.models.llm import Cache, Context
from aura_jax.models.speech_llm import Columns, text_context
from aura_jax.system import System

# Where LoRA acts on the tokens of a request. "off": the model is the base LLM, bit by bit.
_OFF, _EVERYWHERE, _AT_AUDIO = "off", "everywhere", "at_audio"

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
class Reply:
    """An answer.

    Attributes:
      text: what `tokens` say, without special tokens.
      tokens: generated ids, without the one that ended the turn.
      ended: the model ended its turn; False if `max_new_tokens` did.
      seconds: wall time of the batch that the request was in.
    """

    text: str
    tokens: tuple[int, ...]
    ended: bool
    seconds: float


@struct.dataclass
class _Inputs:
    """A batch for the prefill; `waveform_BxN` is None for text.

    Attributes:
      target_position_BxR: the columns that predict the tokens of given answers; of generation there are none.
    """

    columns: Columns
    target_position_BxR: jax.Array
    waveform_BxN: jax.Array | None
    n_samples_B: jax.Array | None


@dataclasses.dataclass(frozen=True)
class _Program:
    """What is static in a compiled program: Generators of equal models share what is compiled."""

    model: Any
    mesh: jax.sharding.Mesh | None
    lora: str
    n_new: int
    normalisation: str

    def apply(self, variables: Mapping[str, Any], *args: Any, method: str) -> Any:
        return self.model.apply(self.visible(variables), *args, method=method)

    def visible(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the collections that a pass may see: without `lora`, the model is the base LLM (or a merged one)."""
        names = ("params",) if self.lora == _OFF else ("params", "lora")
        return {name: variables[name] for name in names if name in variables}


@dataclasses.dataclass(frozen=True)
class _Prompt:
    """A tokenised request: its place in the list, its number, ids before and after the audio, its bucket of samples.

    Text is in bucket 0.
    """

    index: int
    number: int
    waveform: np.ndarray | None
    prefix: Sequence[int]
    suffix: Sequence[int]
    n_bucket: int
    lora: str
    answer: Sequence[int] = ()  # read after it, not generated


class Generator:
    """Answers requests with a speech LLM.

    A spoken request uses the adapters as `lora.scope` says; one without audio runs without the `lora` collection under
    the scopes "request" and "audio", and is then the base LLM's answer to the bit.

    Attributes:
      batch_size: most rows decoded together.
      variables: `params` and `lora`; other trees replace them between calls without compiling anew (during training).
      shapes: (LoRA, B, T, samples) of every batch so far: one compilation each.
    """

    def __init__(
        self,
        system: System,
        variables: Mapping[str, Any],
        *,
        batch_size: int | None = None,
        max_new_tokens: int | None = None,
        adapters_on_text: bool | None = None,
    ):
        """
        Args:
          system: from `system.build`.
          variables: `params` and `lora`; after a merge `params` alone.
          batch_size: most rows decoded together; None: `eval.batch_size`.
          max_new_tokens: None: `eval.max_new_tokens`.
          adapters_on_text: adapters in requests without audio: True as after a merge, or in a text turn after a spoken
            one; False for the base LLM; None: as `lora.scope` says.

        Raises:
          UserError: if adapters are asked for on text that scope "audio" never lets act there.
        """
        scope = system.model.config.lora.scope if system.model.config.lora else "request"
        if adapters_on_text and scope == "audio":
            raise UserError("lora.scope 'audio' acts at audio tokens only: text with adapters on does not exist")
        on_text = scope == "all" if adapters_on_text is None else adapters_on_text
        self.system = system
        # The splash kernel reads queries by the hundred, and a step of decoding has one.
        model: Any = system.model
        self._model = model.clone(attention_impl="xla") if model.attention_impl == "splash" else model
        self.variables = variables
        self.shapes: set[tuple[str, int, int, int]] = set()
        self.batch_size = system.config.eval.batch_size if batch_size is None else batch_size
        self._max_new = system.config.eval.max_new_tokens if max_new_tokens is None else max_new_tokens
        if self.batch_size < 1 or self._max_new < 1:
            raise UserError(f"batch size {self.batch_size}, {self._max_new} new tokens: both must be at least 1")
        self._text_lora = _EVERYWHERE if on_text else _OFF
        self._speech_lora = _AT_AUDIO if scope == "audio" else _EVERYWHERE
        self._mesh = _mesh_of(variables)
        self._row_multiple = self._mesh.shape["data"] * self._mesh.shape["fsdp"] if self._mesh else 1

    def generate(
        self,
        requests: Sequence[Request],
        progress: Callable[[int], Any] | None = None,
        sampling: Sampling = GREEDY,
    ) -> list[Reply]:
        """Returns the answer to each request, in order.

        Args:
          requests: any mixture of spoken and text turns; they are sorted into batches by kind and length.
          progress: called after each batch with the number of requests in it.
          sampling: how tokens are picked; the default is greedy. What is drawn for a request depends on the seed and
            its number alone.

        Raises:
          UserError: for a request with neither audio nor text, audio that is not a mono waveform, or a number that is
            out of range.
        """
        prompts = [self._prompt(i, request) for i, request in enumerate(requests)]
        prompts.sort(key=lambda p: (p.lora, p.n_bucket, len(p.prefix), len(p.suffix)))
        replies: list[Reply | None] = [None] * len(requests)
        start = 0
        while start < len(prompts):
            # Text and speech, and adapters on and off, are different programs.
            kind = (prompts[start].lora, prompts[start].n_bucket > 0)
            batch = [p for p in prompts[start : start + self.batch_size] if (p.lora, p.n_bucket > 0) == kind]
            for prompt, reply in zip(batch, self._run(batch, sampling), strict=True):
                replies[prompt.index] = reply
            start += len(batch)
            if progress is not None:
                progress(len(batch))
        return [reply for reply in replies if reply is not None]

    def prompt_logits(self, request: Request) -> np.ndarray:
        """Returns the logits [T, V], float32, at every token of the request's prompt, audio tokens included.

        They are what another implementation of the same model can be compared with.

        Raises:
          UserError: as `generate`.
        """
        prompt = self._prompt(0, request)
        inputs = self._inputs([prompt], self._row_multiple)
        logits_BxTxV, segment_BxT = _prompt_logits(self.variables, inputs, self._program(prompt.lora, n_new=0))
        return np.asarray(logits_BxTxV)[0, np.asarray(segment_BxT)[0] != 0]

    def answer_states(self, requests: Sequence[Request], answers: Sequence[Sequence[int]]) -> jax.Array:
        """Reads given answers after their requests; returns the normed hidden states that predict their tokens.

        Args:
          requests: all spoken, or all of text; one batch of at most `batch_size`.
          answers: ids of each.

        Returns:
          [B, R, D] on the variables' mesh: row i has the states of answer i first, and anything after them. B and R are
          rounded up from the number and the longest of the answers, by nothing else: they are the same for a spoken
          and a written reading.

        Raises:
          UserError: as `generate`.
        """
        prompts = [
            dataclasses.replace(self._prompt(i, request), answer=answer)
            for i, (request, answer) in enumerate(zip(requests, answers, strict=True))
        ]
        inputs = self._inputs(prompts, self._n_rows(len(prompts)))
        return _answer_states(self.variables, inputs, self._program(prompts[0].lora, n_new=0))

    def _prompt(self, index: int, request: Request) -> _Prompt:
        system, waveform = self.system, request.waveform
        number = index if request.number is None else request.number
        if not 0 <= number <= MAX_SEED:
            raise UserError(f"a request's number is 0 to {MAX_SEED}, not {number}")
        if waveform is not None and request.transcript is not None:
            raise UserError("a request has either a waveform or a transcript in its place: drop one")
        if waveform is None and request.transcript is None:
            if not request.prompt:
                raise UserError("nothing to answer: a request needs audio or a prompt")
            before, after = system.chat.encode(request.prompt, has_audio=False, history=request.history)
            return _Prompt(index, number, None, [*before, *after], [], 0, self._text_lora)
        prompt = system.config.data.prompt if request.prompt is None else request.prompt
        before, after = system.chat.encode(prompt, has_audio=True, history=request.history)
        if request.transcript is not None:
            middle = system.chat.text(request.transcript)
            return _Prompt(index, number, None, [*before, *middle, *after], [], 0, self._text_lora)
        waveform = np.asarray(waveform, np.float32)
        if waveform.ndim != 1 or not len(waveform):
            raise UserError(f"audio of shape {waveform.shape}: one mono waveform with at least one sample is needed")
        n_bucket = _sample_bucket(len(waveform), system.config.data.buckets or BUCKETS)
        return _Prompt(index, number, waveform, before, after, n_bucket, self._speech_lora)

    def _run(self, batch: Sequence[_Prompt], sampling: Sampling) -> list[Reply]:
        start = time.perf_counter()
        lora, n_new, n_rows = batch[0].lora, self._max_new, self._n_rows(len(batch))
        inputs = self._inputs(batch, n_rows)
        n_samples = 0 if inputs.waveform_BxN is None else inputs.waveform_BxN.shape[1]
        self.shapes.add((lora, n_rows, inputs.columns.tokens_BxT.shape[1], n_samples))

        program, columns = self._program(lora, n_new), inputs.columns
        number_B = np.array([p.number for p in batch] + [0] * (n_rows - len(batch)))
        is_text_BxT = np.asarray((columns.segment_BxT != 0) & (columns.audio_source_BxT < 0))
        tokens_BxT, vocab = np.asarray(columns.tokens_BxT), self._model.config.llm.vocab
        choice = Choice.of(sampling, number_B, tokens_BxT, is_text_BxT, vocab)
        cache, token_B, segment_BxT = _prefill(self.variables, inputs, program, choice)
        stop_ids = np.asarray(self.system.chat.stop_ids, np.int32)
        answer_BxG, _ = _decode(self.variables, cache, token_B, segment_BxT, stop_ids, program, choice)
        answer_BxG = np.asarray(answer_BxG)
        seconds = time.perf_counter() - start
        return [self._reply(answer_G, seconds) for answer_G in answer_BxG[: len(batch)]]

    def _n_rows(self, n: int) -> int:
        # Up to a power of two (then the mesh's multiple): the last batch of a set must not compile anew each time.
        n_rows = min(1 << (n - 1).bit_length(), self.batch_size)
        return -(-n_rows // self._row_multiple) * self._row_multiple

    def _program(self, lora: str, n_new: int) -> _Program:
        return _Program(self._model, self._mesh, lora, n_new, self.system.config.model.normalisation)

    def _inputs(self, batch: Sequence[_Prompt], n_rows: int) -> _Inputs:
        n_prefix = _token_bucket(max(len(p.prefix) for p in batch))
        n_targets = max(len(p.answer) for p in batch)
        n_targets = _token_bucket(n_targets) if n_targets else 0
        n_suffix = _token_bucket(max(len(p.suffix) for p in batch)) + n_targets
        n_samples = max(p.n_bucket for p in batch)
        rate = self.system.config.embedder.token_rate
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
        return _Inputs(
            columns=Columns.of(laid_out),
            target_position_BxR=laid_out.target_position_BxR,
            waveform_BxN=laid_out.waveform_BxKxS[:, 0] if n_samples else None,
            n_samples_B=laid_out.n_samples_BxK[:, 0] if n_samples else None,
        )

    def _reply(self, answer_G: np.ndarray, seconds: float) -> Reply:
        stops = np.flatnonzero(np.isin(answer_G, list(self.system.chat.stop_ids)))
        tokens = answer_G[: stops[0]] if len(stops) else answer_G
        text = self.system.tokenizer.decode(tokens.tolist(), skip_special_tokens=True).strip()
        return Reply(text, tuple(tokens.tolist()), bool(len(stops)), seconds)


def plain_generator(config: Config, max_new_tokens: int | None = None) -> Generator:
    """Returns a generator of a config's LLM alone, which answers text and transcripts.

    Raises:
      UserError: as `system.build`.
    """
    built = system_lib.build_text(config)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    variables = {"params": {"llm": system_lib.load_llm(built, mesh)}}
    return Generator(built, variables, max_new_tokens=max_new_tokens, adapters_on_text=False)


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


def _mesh_of(variables: Any) -> jax.sharding.Mesh | None:
    """Returns the mesh that the variables are spread over; None for a single device."""
    for leaf in jax.tree.leaves(variables):
        if isinstance(leaf, jax.Array) and isinstance(leaf.sharding, jax.sharding.NamedSharding):
            mesh = leaf.sharding.mesh
            return mesh if isinstance(mesh, jax.sharding.Mesh) and mesh.size > 1 else None
    return None


def _rows_on_mesh(tree: Any, mesh: jax.sharding.Mesh | None) -> Any:
    if mesh is None:
        return tree
    place = lambda x: jax.lax.with_sharding_constraint(x, sharding.batch_sharding(mesh))
    return jax.tree.map(place, tree)


@functools.partial(jax.jit, static_argnames="program")
def _prefill(
    variables: Mapping[str, Any], inputs: _Inputs, program: _Program, choice: Choice
) -> tuple[Cache, jax.Array, jax.Array]:
    """Reads the prompts; returns the cache, T + n_new columns long, the first token of each answer, and the segments
    [B, T] of the columns that were read."""
    h_BxTxD, cache, segment_BxT = _read(variables, inputs, program)
    last_B = segment_BxT.shape[1] - 1 - jnp.argmax(segment_BxT[:, ::-1] != 0, axis=1)
    h_BxD = jnp.take_along_axis(h_BxTxD, last_B[:, None, None], axis=1)[:, 0]
    return cache, next_token(program.apply(variables, h_BxD, method="logits"), choice, 0), segment_BxT


@functools.partial(jax.jit, static_argnames="program")
def _prompt_logits(variables: Mapping[str, Any], inputs: _Inputs, program: _Program) -> tuple[jax.Array, jax.Array]:
    """Reads the prompts; returns the logits [B, T, V] at all their columns, and the columns' segments [B, T]."""
    h_BxTxD, _, segment_BxT = _read(variables, inputs, program)
    return program.apply(variables, h_BxTxD, method="logits"), segment_BxT


@functools.partial(jax.jit, static_argnames="program")
def _answer_states(variables: Mapping[str, Any], inputs: _Inputs, program: _Program) -> jax.Array:
    """Reads prompts and answers; returns the hidden states [B, R, D] that predict the answers."""
    h_BxTxD, *_ = _read(variables, inputs, program)
    return jnp.take_along_axis(h_BxTxD, inputs.target_position_BxR[..., None], axis=1)


def _read(variables: Mapping[str, Any], inputs: _Inputs, program: _Program) -> tuple[jax.Array, Cache, jax.Array]:
    """Returns normed hidden states [B, T, D] of the prompts, the cache, T + n_new columns long, and the segments
    [B, T]: 0 where there is no token, or an embedder that decides made none."""
    inputs = _rows_on_mesh(inputs, program.mesh)
    columns, c = inputs.columns, program.model.config
    if inputs.waveform_BxN is None:
        x_BxTxD = program.apply(variables, columns.tokens_BxT, method="embed_text")
        ctx = text_context(columns.position_BxT, columns.segment_BxT)
    else:
        mel_BxFxM = features.log_mel(
            inputs.waveform_BxN,
            c.embedder.n_mels,
            n_samples_B=inputs.n_samples_B,
            normalisation=program.normalisation,
        )
        n_frames_B = features.n_frames(inputs.n_samples_B)
        heard = program.apply(variables, columns, mel_BxFxM[:, None], n_frames_B[:, None], False, method="hear")
        x_BxTxD, columns = heard.x_BxTxD, heard.columns
        ctx = program.apply(variables, columns, method="context").replace(tap_position_BxQ=None)
        if program.lora == _EVERYWHERE:
            ctx = ctx.replace(lora_mask_BxT=None)  # all tokens of a spoken request, so no select
    n_rows, n_columns = columns.tokens_BxT.shape
    k_segment_BxS = jnp.pad(columns.segment_BxT, ((0, 0), (0, program.n_new)))
    ctx = dataclasses.replace(ctx, k_segment_BxS=k_segment_BxS, cache_start=jnp.int32(0))
    cache = Cache.zeros(c.llm, n_rows, n_columns + program.n_new, program.model.dtype)
    x_BxTxD, cache, _ = program.apply(variables, x_BxTxD, ctx, cache, method="adapted_blocks")
    h_BxTxD, cache = program.apply(variables, x_BxTxD, ctx, cache, method="plain_blocks")
    return h_BxTxD, cache, columns.segment_BxT


@functools.partial(jax.jit, static_argnames="program", donate_argnames="cache")
def _decode(
    variables: Mapping[str, Any],
    cache: Cache,
    token_B: jax.Array,
    segment_BxT: jax.Array,
    stop_ids: jax.Array,
    program: _Program,
    choice: Choice,
) -> tuple[jax.Array, Cache]:
    """Returns the answers [B, n_new], padded with a stop id after the first one, and the cache (it is donated).

    Args:
      cache: of the prefill.
      token_B: first token of each answer.
      segment_BxT: of the prompt's columns; a row without any is empty.
      stop_ids: ids that end an answer.
      choice: as the prefill had it.
    """
    if program.lora == _AT_AUDIO:  # answer tokens are text, and see the base LLM's weights
        program = dataclasses.replace(program, lora=_OFF)
    n_new = program.n_new
    n_rows, first_column = segment_BxT.shape
    n_real_B = (segment_BxT != 0).sum(1)  # the position of the first answer token
    segment_BxS = jnp.pad(segment_BxT, ((0, 0), (0, n_new)), constant_values=1)
    ended = lambda token_B: jnp.isin(token_B, stop_ids)

    def unfinished(state: tuple) -> jax.Array:
        n_done, _, finished_B, *_ = state
        return (n_done < n_new) & ~finished_B.all()

    def one_token(state: tuple) -> tuple:
        n_done, token_B, finished_B, answer_BxG, cache, choice = state
        column = first_column + n_done - 1
        ctx = Context(
            position_BxT=(n_real_B + n_done - 1)[:, None],
            k_end_BxT=jnp.broadcast_to(column + 1, (n_rows, 1)),
            q_segment_BxT=jnp.ones((n_rows, 1), jnp.int32),
            k_segment_BxS=segment_BxS,
            cache_start=column,
        )
        x_Bx1xD = program.apply(variables, token_B[:, None], method="embed_text")
        x_Bx1xD, cache, _ = program.apply(variables, x_Bx1xD, ctx, cache, method="adapted_blocks")
        h_Bx1xD, cache = program.apply(variables, x_Bx1xD, ctx, cache, method="plain_blocks")
        logits_BxV = program.apply(variables, h_Bx1xD[:, 0], method="logits")
        token_B = jnp.where(finished_B, stop_ids[0], next_token(logits_BxV, choice, n_done))
        answer_BxG = jax.lax.dynamic_update_slice(answer_BxG, token_B[:, None], (0, n_done))
        return n_done + 1, token_B, finished_B | ended(token_B), answer_BxG, cache, choice.after(token_B)

    answer_BxG = jnp.full((n_rows, n_new), stop_ids[0]).at[:, 0].set(token_B)
    state = (jnp.int32(1), token_B, ended(token_B) | (n_real_B == 0), answer_BxG, cache, choice.after(token_B))
    *_, answer_BxG, cache, _ = jax.lax.while_loop(unfinished, one_token, state)
    if program.mesh is not None:  # every host reads all answers
        answer_BxG = jax.lax.with_sharding_constraint(answer_BxG, sharding.replicated(program.mesh))
    return answer_BxG, cache
