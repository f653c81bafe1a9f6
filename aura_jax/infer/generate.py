"""Batched decoding with a KV cache: one compiled prefill from waveform to first token, one compiled decode loop.

The loop runs up to a number of tokens that it is given. Where the host has to see the text before an answer's end, for
stop strings and to stream, it runs in pieces, and the host reads what is there between two of them. The number is
traced, so pieces and whole answers are the same compiled loop; a match of strings on the device would need the texts of
a whole vocabulary there, and a callback inside the loop the host at every token.

Dimensions: B rows, T prompt columns, G columns of the answer, S = T + G columns of the cache, N samples of a clip,
V vocabulary.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from aura_jax import sharding
from aura_jax import system as system_lib
from aura_jax.config import Config
from aura_jax.errors import UserError
from aura_jax.infer.answer_text import AnswerText, checked_stop
from aura_jax.infer.prompting import Inputs, Prompt, Request, lay_out, tokenise
from aura_jax.infer.reading import AT_AUDIO, OFF, Program, Reader, Weights, read
from aura_jax.infer.sampling import GREEDY, Choice, Sampling, next_token
from aura_jax.models.llm import Cache, Context
from aura_jax.system import System

# Tokens between two looks for stop strings: few, as a row goes on for as many in vain, and not one, as each look waits
# for the device.
_PIECE = 8


@dataclasses.dataclass(frozen=True)
class Reply:
    """An answer.

    Attributes:
      text: what `tokens` say, without special tokens, up to a stop string.
      tokens: generated ids, without the one that ended the turn; a stop string's are among them.
      ended: the model ended its turn, or a stop string did; False if `max_new_tokens` did.
      seconds: wall time of the batch that the request was in.
    """

    text: str
    tokens: tuple[int, ...]
    ended: bool
    seconds: float


@struct.dataclass
class Prompted:
    """What the decode loop has to know of the prompts in a cache.

    Attributes:
      segment_BxS: of the cache's columns: 0 where there is no token; 1 in those of the answer.
      n_columns: scalar, where the answer begins.
      n_tokens_B: read so far, padding left out: the position of the answer's first token.
    """

    segment_BxS: jax.Array
    n_columns: jax.Array
    n_tokens_B: jax.Array


@struct.dataclass
class Answers:
    """What the decode loop carries beside the cache.

    Attributes:
      n_done: scalar, tokens of each answer so far.
      token_BxG: padded with a stop id after the first one.
      finished_B: rows that need no more.
      choice: of the next token.
    """

    n_done: jax.Array
    token_BxG: jax.Array
    finished_B: jax.Array
    choice: Choice


class Generator(Reader):
    """Answers requests with a speech LLM: a reader that goes on.

    Attributes:
      max_new_tokens: of the longest answer.
      shapes: (LoRA, B, T, samples of a row's clips) of every batch so far: one compilation each.
    """

    def __init__(
        self,
        system: System,
        variables: Mapping[str, Any] | Weights,
        *,
        batch_size: int | None = None,
        max_new_tokens: int | None = None,
        adapters_on_text: bool | None = None,
    ):
        """
        Args:
          system, variables, batch_size, adapters_on_text: as of `Reader`.
          max_new_tokens: None: `eval.max_new_tokens`.

        Raises:
          UserError: as `Reader`, or no token may be written.
        """
        super().__init__(system, variables, batch_size=batch_size, adapters_on_text=adapters_on_text)
        self.shapes: set[tuple[str, int, int, int]] = set()
        self.max_new_tokens = system.config.eval.max_new_tokens if max_new_tokens is None else max_new_tokens
        if not isinstance(self.max_new_tokens, (int, np.integer)) or self.max_new_tokens < 1:
            raise UserError(f"{self.max_new_tokens} new tokens: give a whole number from 1 on")

    def generate(
        self,
        requests: Sequence[Request],
        progress: Callable[[int], Any] | None = None,
        sampling: Sampling = GREEDY,
        stop: Sequence[str] = (),
    ) -> list[Reply]:
        """Returns the answer to each request, in order.

        Args:
          requests: any mixture of spoken and text turns; they are sorted into batches by kind and length.
          progress: called after each batch with the number of requests in it.
          sampling: how tokens are picked; the default is greedy. What is drawn for a request depends on the seed and
            its number alone.
          stop: an answer ends where its text first holds one of these, and does not include it.

        Raises:
          UserError: as `prompting.tokenise`, or for an empty stop string.
        """
        stop = checked_stop(stop)
        prompts = [tokenise(self.system, i, request) for i, request in enumerate(requests)]
        prompts.sort(key=lambda p: (p.n_places, p.n_bucket, len(p.texts[0]), len(p.texts[-1])))
        replies: list[Reply | None] = [None] * len(requests)
        start = 0
        while start < len(prompts):
            # Text, speech, and speech of several clips are different programs.
            n_places = prompts[start].n_places
            batch = [p for p in prompts[start : start + self.batch_size] if p.n_places == n_places]
            for prompt, reply in zip(batch, self._run(batch, sampling, stop), strict=True):
                replies[prompt.index] = reply
            start += len(batch)
            if progress is not None:
                progress(len(batch))
        return [reply for reply in replies if reply is not None]

    def stream(
        self, request: Request, *, sampling: Sampling = GREEDY, stop: Sequence[str] = (), every: int = 1
    ) -> Iterator[str]:
        """Returns an iterator over pieces of a request's answer, each there as soon as it is certain.

        Together they are the text of `generate`'s reply. What a later token may change waits for it: half a character,
        white space that may be the last, the beginning of a stop string.

        Args:
          sampling, stop: as of `generate`.
          every: tokens decoded at a time.

        Raises:
          UserError: as `generate`, or for `every` below 1.
        """
        if every < 1:
            raise UserError(f"every {every}: at least 1 token at a time")
        return told(self._decoded([tokenise(self.system, 0, request)], sampling, checked_stop(stop), every))

    def _run(self, batch: Sequence[Prompt], sampling: Sampling, stop: Sequence[str]) -> list[Reply]:
        start = time.perf_counter()
        *_, answers = self._decoded(batch, sampling, stop, _PIECE if stop else self.max_new_tokens)
        seconds = time.perf_counter() - start
        return [Reply(answer.text, tuple(answer.tokens), answer.ended, seconds) for answer in answers]

    def _decoded(
        self, batch: Sequence[Prompt], sampling: Sampling, stop: Sequence[str], every: int
    ) -> Iterator[list[AnswerText]]:
        """Yields the answers to a batch after `every` tokens, after twice as many, and so on to their ends."""
        n_rows, program = self.n_rows(len(batch)), self.program(bool(batch[0].clips), self.max_new_tokens)
        inputs = lay_out(self.system, batch, n_rows)
        columns, waveform_BxKxN = inputs.columns, inputs.waveform_BxKxN
        n_samples = 0 if waveform_BxKxN is None else math.prod(waveform_BxKxN.shape[1:])
        self.shapes.add((program.lora, n_rows, columns.tokens_BxT.shape[1], n_samples))

        number_B = np.array([p.number for p in batch] + [0] * (n_rows - len(batch)))
        is_text_BxT = np.asarray((columns.segment_BxT != 0) & (columns.audio_source_BxT < 0))
        tokens_BxT, vocab = np.asarray(columns.tokens_BxT), self._model.config.llm.vocab
        choice = Choice.of(sampling, number_B, tokens_BxT, is_text_BxT, vocab)
        stop_ids = np.asarray(self.system.chat.stop_ids, np.int32)
        variables, program = self.held(program, n_rows)
        cache, state, prompted = _prefill(variables, inputs, stop_ids, program, choice)
        yield from self.decoded(cache, state, prompted, program, len(batch), stop, every)

    def decoded(
        self,
        cache: Cache,
        state: Answers,
        prompted: Prompted,
        program: Program,
        n_answers: int,
        stop: Sequence[str],
        every: int,
    ) -> Iterator[list[AnswerText]]:
        """Yields the answers in the first rows after `every` tokens, after twice as many, and so on to their ends.

        Args:
          cache: of prompts that have been read; it is donated.
          state: the first tokens of their answers.
        """
        stop_ids = np.asarray(self.system.chat.stop_ids, np.int32)
        answers = [AnswerText(self.system.tokenizer, self.system.chat.stop_ids, stop) for _ in range(n_answers)]
        finished_B = np.arange(len(state.finished_B)) >= n_answers
        variables, program = self.held(program, len(finished_B))
        for n_until in [*range(every, program.n_new, every), program.n_new]:
            cache, state = _decode(variables, cache, state, prompted, stop_ids, finished_B, np.int32(n_until), program)
            for answer, token_G in zip(answers, np.asarray(state.token_BxG), strict=False):
                answer.read(token_G[:n_until].tolist(), is_whole=n_until == program.n_new)
            yield answers
            finished_B[:n_answers] = [answer.ended for answer in answers]
            if finished_B.all():
                return


def told(readings: Iterator[list[AnswerText]]) -> Iterator[str]:
    """Yields what each reading of one answer knows beyond the one before."""
    n_told = 0
    for (answer,) in readings:
        if len(answer.text) > n_told:
            yield answer.text[n_told:]
            n_told = len(answer.text)


def plain_generator(config: Config, max_new_tokens: int | None = None) -> Generator:
    """Returns a generator of a config's LLM alone, which answers text and transcripts.

    Raises:
      UserError: as `system.build`.
    """
    built = system_lib.build_text(config)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    variables = {"params": {"llm": system_lib.load_llm(built, mesh)}}
    return Generator(built, variables, max_new_tokens=max_new_tokens, adapters_on_text=False)


@functools.partial(jax.jit, static_argnames="program")
def _prefill(
    variables: Mapping[str, Any], inputs: Inputs, stop_ids: jax.Array, program: Program, choice: Choice
) -> tuple[Cache, Answers, Prompted]:
    """Reads the prompts; returns the cache, T + n_new columns long, the answers with their first tokens, and what
    decoding goes on from."""
    h_BxTxD, cache, segment_BxT = read(variables, inputs, program)
    n_columns = segment_BxT.shape[1]
    last_B = n_columns - 1 - jnp.argmax(segment_BxT[:, ::-1] != 0, axis=1)
    h_BxD = jnp.take_along_axis(h_BxTxD, last_B[:, None, None], axis=1)[:, 0]
    state = first_tokens(program.apply(variables, h_BxD, method="logits"), stop_ids, program, choice)
    segment_BxS = jnp.pad(segment_BxT, ((0, 0), (0, program.n_new)), constant_values=1)
    return cache, state, Prompted(segment_BxS, jnp.int32(n_columns), (segment_BxT != 0).sum(1))


def first_tokens(logits_BxV: jax.Array, stop_ids: jax.Array, program: Program, choice: Choice) -> Answers:
    """Returns the answers that begin where prompts end: `logits_BxV` are of their last tokens."""
    token_B = next_token(logits_BxV, choice, 0)
    token_BxG = jnp.full((len(token_B), program.n_new), stop_ids[0]).at[:, 0].set(token_B)
    state = Answers(jnp.int32(1), token_BxG, jnp.isin(token_B, stop_ids), choice.after(token_B))
    return _for_all_hosts(state, program)


@functools.partial(jax.jit, static_argnames="program", donate_argnames="cache")
def _decode(
    variables: Mapping[str, Any],
    cache: Cache,
    state: Answers,
    prompted: Prompted,
    stop_ids: jax.Array,
    finished_B: jax.Array,
    n_until: jax.Array,
    program: Program,
) -> tuple[Cache, Answers]:
    """Decodes until the answers have `n_until` tokens or are finished; returns the cache (it is donated) and the state.

    Args:
      cache, state: of the prefill, or of the piece before.
      stop_ids: ids that end an answer.
      finished_B: rows that the host knows to need no more: empty ones, and those that a stop string ended.
      n_until: scalar, at most n_new.
    """
    if program.lora == AT_AUDIO:  # answer tokens are text, and see the base LLM's weights
        program = dataclasses.replace(program, lora=OFF)
    n_rows = len(prompted.n_tokens_B)

    def unfinished(carry: tuple[Cache, Answers]) -> jax.Array:
        _, state = carry
        return (state.n_done < n_until) & ~state.finished_B.all()

    def one_token(carry: tuple[Cache, Answers]) -> tuple[Cache, Answers]:
        cache, state = carry
        column = prompted.n_columns + state.n_done - 1
        ctx = Context(
            position_BxT=(prompted.n_tokens_B + state.n_done - 1)[:, None],
            k_end_BxT=jnp.broadcast_to(column + 1, (n_rows, 1)),
            q_segment_BxT=jnp.ones((n_rows, 1), jnp.int32),
            k_segment_BxS=prompted.segment_BxS,
            cache_start=column,
        )
        token_Bx1 = jax.lax.dynamic_slice_in_dim(state.token_BxG, state.n_done - 1, 1, axis=1)
        x_Bx1xD = program.apply(variables, token_Bx1, method="embed_text")
        x_Bx1xD, cache, _ = program.apply(variables, x_Bx1xD, ctx, cache, method="adapted_blocks")
        h_Bx1xD, cache = program.apply(variables, x_Bx1xD, ctx, cache, method="plain_blocks")
        logits_BxV = program.apply(variables, h_Bx1xD[:, 0], method="logits")
        token_B = jnp.where(state.finished_B, stop_ids[0], next_token(logits_BxV, state.choice, state.n_done))
        return cache, Answers(
            n_done=state.n_done + 1,
            token_BxG=jax.lax.dynamic_update_slice(state.token_BxG, token_B[:, None], (0, state.n_done)),
            finished_B=state.finished_B | jnp.isin(token_B, stop_ids),
            choice=state.choice.after(token_B),
        )

    state = dataclasses.replace(state, finished_B=state.finished_B | finished_B)
    cache, state = jax.lax.while_loop(unfinished, one_token, (cache, state))
    return cache, _for_all_hosts(state, program)


def _for_all_hosts(state: Answers, program: Program) -> Answers:
    """Every host reads all answers."""
    if program.mesh is None:
        return state
    return jax.lax.with_sharding_constraint(state, sharding.replicated(program.mesh))
