"""Batched decoding with a KV cache: one compiled prefill from waveform to first token, one compiled decode loop.

Dimensions: B rows, T prompt columns, G columns of the answer, S = T + G columns of the cache, N samples of a clip,
V vocabulary.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aura_jax import sharding
from aura_jax import system as system_lib
from aura_jax.config import Config
from aura_jax.errors import UserError
from aura_jax.infer.prompting import Inputs, Prompt, Request, lay_out, tokenise
from aura_jax.infer.reading import AT_AUDIO, OFF, Program, Reader, read
from aura_jax.infer.sampling import GREEDY, Choice, Sampling, next_token
from aura_jax.models.llm import Cache, Context
from aura_jax.system import System


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


class Generator(Reader):
    """Answers requests with a speech LLM: a reader that goes on.

    Attributes:
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
          system, variables, batch_size, adapters_on_text: as of `Reader`.
          max_new_tokens: None: `eval.max_new_tokens`.

        Raises:
          UserError: as `Reader`, or no token may be written.
        """
        super().__init__(system, variables, batch_size=batch_size, adapters_on_text=adapters_on_text)
        self.shapes: set[tuple[str, int, int, int]] = set()
        self._max_new = system.config.eval.max_new_tokens if max_new_tokens is None else max_new_tokens
        if self._max_new < 1:
            raise UserError(f"{self._max_new} new tokens: must be at least 1")

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
          UserError: as `prompting.tokenise`.
        """
        prompts = [tokenise(self.system, i, request) for i, request in enumerate(requests)]
        prompts.sort(key=lambda p: (p.n_bucket, len(p.prefix), len(p.suffix)))
        replies: list[Reply | None] = [None] * len(requests)
        start = 0
        while start < len(prompts):
            # Text and speech are different programs.
            is_text = prompts[start].waveform is None
            batch = [p for p in prompts[start : start + self.batch_size] if (p.waveform is None) == is_text]
            for prompt, reply in zip(batch, self._run(batch, sampling), strict=True):
                replies[prompt.index] = reply
            start += len(batch)
            if progress is not None:
                progress(len(batch))
        return [reply for reply in replies if reply is not None]

    def _run(self, batch: Sequence[Prompt], sampling: Sampling) -> list[Reply]:
        start = time.perf_counter()
        n_rows, program = self._n_rows(len(batch)), self._program(batch[0], self._max_new)
        inputs = lay_out(self.system, batch, n_rows)
        columns, waveform_BxN = inputs.columns, inputs.waveform_BxN
        n_samples = 0 if waveform_BxN is None else waveform_BxN.shape[1]
        self.shapes.add((program.lora, n_rows, columns.tokens_BxT.shape[1], n_samples))

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


@functools.partial(jax.jit, static_argnames="program")
def _prefill(
    variables: Mapping[str, Any], inputs: Inputs, program: Program, choice: Choice
) -> tuple[Cache, jax.Array, jax.Array]:
    """Reads the prompts; returns the cache, T + n_new columns long, the first token of each answer, and the segments
    [B, T] of the columns that were read."""
    h_BxTxD, cache, segment_BxT = read(variables, inputs, program)
    last_B = segment_BxT.shape[1] - 1 - jnp.argmax(segment_BxT[:, ::-1] != 0, axis=1)
    h_BxD = jnp.take_along_axis(h_BxTxD, last_B[:, None, None], axis=1)[:, 0]
    return cache, next_token(program.apply(variables, h_BxD, method="logits"), choice, 0), segment_BxT


@functools.partial(jax.jit, static_argnames="program", donate_argnames="cache")
def _decode(
    variables: Mapping[str, Any],
    cache: Cache,
    token_B: jax.Array,
    segment_BxT: jax.Array,
    stop_ids: jax.Array,
    program: Program,
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
    if program.lora == AT_AUDIO:  # answer tokens are text, and see the base LLM's weights
        program = dataclasses.replace(program, lora=OFF)
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
