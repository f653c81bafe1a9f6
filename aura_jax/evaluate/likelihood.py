"""How likely a system finds the right answers, heard and read, and how far hearing is from reading.

Each answer is read, token by token, after the spoken request, and by the base LLM (no adapters) after the same request
with the transcript in place of the audio: the text oracle. The divergence is KL(text || speech) of the two predictions
of the next token (BLSP-KD, arXiv 2405.19041), averaged over the tokens of the answers.

Dimensions: B rows, R targets of a row, D width. Logits are held of `train.loss_chunk` targets at a time.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from aura_jax import losses
from aura_jax.audio.io import AudioError
from aura_jax.data.manifest import Row, clip_samples
from aura_jax.errors import UserError
from aura_jax.evaluate.run import read_request
from aura_jax.evaluate.score import interval
from aura_jax.evaluate.text import base_variables
from aura_jax.infer.prompting import Request
from aura_jax.infer.reading import Reader
from aura_jax.system import System

_READERS = 4  # threads


def comparable(rows: Sequence[Row], name: str) -> list[Row]:
    """Returns the rows that can be both heard and read, and have one answer: those with audio and its transcript.

    The transcript of a question with `answers` or `choices` and no `response` is not its answer.

    Raises:
      UserError: there is none in the set `name`.
    """
    of_text = lambda row: row.response is not None or not {"answers", "choices"} & set(row.extra)
    found = [row for row in rows if row.audio is not None and row.text and of_text(row)]
    if not found:
        raise UserError(
            f"eval.likelihood: no row of the set {name!r} has both 'audio' and 'text', and one answer: leave it out"
        )
    return found


def likelihood(
    system: System, variables: Mapping[str, Any], rows: Sequence[Row], name: str = "likelihood", progress: bool = True
) -> dict[str, Any]:
    """Returns the likelihood of the rows' targets, heard and read, and the divergence of the two readings.

    Args:
      variables: `params` and `lora`; after a merge `params` alone, and the base LLM's weights are read again.
      rows: of `comparable`; a target is the row's response, or the transcript itself.
      name: of the progress bar.

    Returns:
      {"n": rows, "tokens": targets, each answer's end among them, "speech": {"nats", "perplexity"}, "text": likewise,
      "divergence"}: nats a token, each a mean over all tokens with its bootstrap interval over rows, as
      `score.interval`; perplexity is exp(nats).

    Raises:
      UserError: a clip cannot be read.
    """
    hears = Reader(system, variables)
    reads = Reader(system, base_variables(system, variables), adapters_on_text=False)
    order = np.argsort(np.asarray(clip_samples(rows)), kind="stable")  # the clips of a batch are about equally long
    sums_3xN, tokens_N = np.zeros((3, len(rows))), np.zeros(len(rows), np.int64)
    with (
        ThreadPoolExecutor(_READERS) as pool,
        tqdm(total=len(rows), desc=name, unit="row", disable=not progress) as bar,
    ):
        for start in range(0, len(rows), hears.batch_size):
            places = order[start : start + hears.batch_size]
            batch = [rows[int(i)] for i in places]
            spoken = [_spoken(request) for request in pool.map(read_request, batch)]
            written = [Request(prompt=row.prompt, history=row.history, transcript=row.text) for row in batch]
            answers = [system.chat.response(row.target, row.ended) for row in batch]
            sums_3xN[:, places] = _compare(hears, reads, spoken, written, answers)
            tokens_N[places] = [len(answer) for answer in answers]
            bar.update(len(batch))
    found: dict[str, Any] = {"n": len(rows), "tokens": int(tokens_N.sum())}
    for reading, sum_N in zip(("speech", "text"), sums_3xN, strict=False):
        nats = interval(sum_N, tokens_N)
        found[reading] = {"nats": nats, "perplexity": {k: x if k == "n" else math.exp(x) for k, x in nats.items()}}
    return found | {"divergence": interval(sums_3xN[2], tokens_N)}


def _spoken(request: Request | AudioError) -> Request:
    if isinstance(request, AudioError):
        raise request
    return request


def _compare(
    hears: Reader,
    reads: Reader,
    spoken: Sequence[Request],
    written: Sequence[Request],
    answers: Sequence[Sequence[int]],
) -> np.ndarray:
    """Returns the nats of each answer heard and read, and their divergence, each summed over its tokens: [3, rows]."""
    speech_BxRxD, text_BxRxD = hears.answer_states(spoken, answers), reads.answer_states(written, answers)
    id_BxR, weight_BxR = np.zeros(speech_BxRxD.shape[:2], np.int32), np.zeros(speech_BxRxD.shape[:2], np.float32)
    for b, answer in enumerate(answers):
        id_BxR[b, : len(answer)], weight_BxR[b, : len(answer)] = answer, 1
    system = hears.system
    sums_3xB = _sums(
        {"params": reads.variables["params"]},
        (speech_BxRxD, text_BxRxD, id_BxR, weight_BxR),
        model=system.model,
        chunk=max(1, system.config.train.loss_chunk // len(id_BxR)),
    )
    return np.asarray(sums_3xB, np.float64)[:, : len(answers)]


@functools.partial(jax.jit, static_argnames=("model", "chunk"))
def _sums(variables: Mapping[str, Any], batch: tuple[jax.Array, ...], *, model: Any, chunk: int) -> jax.Array:
    """Returns [3, B]: sums over each row's targets. Both readings go through one head, which no adapter is in."""
    logits = lambda h: model.apply(variables, h, method="logits")

    def row(
        speech_RxD: jax.Array, text_RxD: jax.Array, id_R: jax.Array, weight_R: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        speech, text, ids, weight = (x[None] for x in (speech_RxD, text_RxD, id_R, weight_R))
        heard, _ = losses.cross_entropy(logits, speech, ids, weight, chunk)
        read, _ = losses.cross_entropy(logits, text, ids, weight, chunk)
        divergence, _ = losses.kl_divergence(logits, text, speech, weight, chunk)
        return heard, read, divergence

    sums_3xB = jnp.stack(jax.vmap(row)(*batch))
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size > 1:  # every host reads all of them
        sums_3xB = jax.lax.with_sharding_constraint(sums_3xB, jax.sharding.PartitionSpec())
    return sums_3xB


def lines(scores: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns a line for each set: the perplexity of its answers heard and read, and the divergence."""
    of = lambda value: f"{value['value']:.2f} [{value['low']:.2f}, {value['high']:.2f}]"
    out = []
    for name, found in scores.items():
        speech, text = (of(found[reading]["perplexity"]) for reading in ("speech", "text"))
        out.append(
            f"{name} ({found['n']} rows, {found['tokens']} tokens): perplexity of the answers heard {speech}, read by "
            f"the base LLM {text}; divergence {of(found['divergence'])} nats a token"
        )
    return "\n".join(out)
