"""What teaching it to hear cost the LLM: its loss on ordinary text, and its answers to plain questions.

Each is taken twice: of the base LLM, and with the adapters on for every token, as in a text turn that follows a spoken
one, or merged. Under `lora.scope` "audio" they never act on text, and the two are the same by construction.
Dimensions: B rows, T tokens, R targets, D width.
"""

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from aura_jax import checkpoint, losses
from aura_jax.data.manifest import json_lines
from aura_jax.data.prompts import ChatFormat
from aura_jax.errors import UserError
from aura_jax.evaluate.score import interval
from aura_jax.infer.generate import Generator
from aura_jax.infer.prompting import Request
from aura_jax.models.speech_llm import text_context
from aura_jax.system import System, load_llm

_ROWS = 4
_LENGTH = 256  # tokens: longer texts are cut into pieces, each read by itself
_ROUND = 64  # rows are padded to a multiple of it: few compilations


class TextRow(NamedTuple):
    """A piece of held-out text: its kind, the text it is of, its tokens, and the first to be predicted (at least 1)."""

    kind: str
    text: str
    tokens: tuple[int, ...]
    first_target: int


class Question(NamedTuple):
    """A plain question, and patterns (regular expressions, any case): a right answer has one of them."""

    prompt: str
    patterns: tuple[str, ...]


def load_heldout(path: str | Path, chat: ChatFormat) -> list[TextRow]:
    """Reads held-out text: JSON lines {"text": ..., "kind": ...} or {"messages": [{"role", "content"}, ...]}.

    Of a conversation, the assistant's words count (and the end of its turn): what the template writes is no text.

    Raises:
      UserError: the file is missing or empty, or a line is neither: names file and line.
    """
    rows = []
    for where, values in json_lines(path):
        text, messages = values.get("text"), values.get("messages")
        if isinstance(text, str):
            tokens, kind = chat.text(text), str(values.get("kind", "text"))
            pieces = [tokens[i : i + _LENGTH] for i in range(0, len(tokens), _LENGTH)]
            rows += [TextRow(kind, where, piece, 1) for piece in pieces if len(piece) > 1]
        elif isinstance(messages, list) and all(_is_turn(message) for message in messages):
            rows += _chat_rows(messages, chat, str(values.get("kind", "chat")), where)
        else:
            raise UserError(f"{where}: neither 'text' nor 'messages' with 'role' and 'content': give one of them")
    if not rows:
        raise UserError(f"{path}: no text: give one JSON object a line")
    return rows


def _chat_rows(messages: Sequence[Mapping[str, str]], chat: ChatFormat, kind: str, text: str) -> Iterator[TextRow]:
    for i, message in enumerate(messages):
        if message["role"] == "assistant" and i and messages[i - 1]["role"] == "user":
            prefix, _ = chat.encode(messages[i - 1]["content"], has_audio=False, history=messages[: i - 1])
            yield TextRow(kind, text, (*prefix, *chat.response(message["content"])), len(prefix))


def load_questions(path: str | Path) -> list[Question]:
    """Reads JSON lines {"prompt": ..., "patterns": [pattern, ...]}.

    Raises:
      UserError: the file is missing or empty, or a line has another form: names file and line.
    """
    questions = []
    for where, values in json_lines(path):
        prompt, patterns = values.get("prompt"), values.get("patterns")
        if not isinstance(prompt, str) or not prompt or not isinstance(patterns, list) or not patterns:
            raise UserError(f"{where}: give 'prompt' (a question) and 'patterns' (a list of right answers)")
        try:
            for pattern in patterns:
                re.compile(pattern)
        except (re.error, TypeError) as error:
            raise UserError(f"{where}: 'patterns' {patterns!r} are not all regular expressions: {error}") from error
        questions.append(Question(prompt, tuple(patterns)))
    if not questions:
        raise UserError(f"{path}: no questions: give one JSON object a line")
    return questions


def _is_turn(message: Any) -> bool:
    return (
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
    )


@functools.partial(jax.jit, static_argnames=("model", "chunk"))
def _loss(
    variables: Mapping[str, Any], tokens_BxT: jax.Array, weight_BxT: jax.Array, *, model: Any, chunk: int
) -> jax.Array:
    """Returns [B]: the cross-entropy in nats summed over a row's tokens of weight 1, each given those before it."""
    position_BxT = jnp.broadcast_to(jnp.arange(tokens_BxT.shape[1]), tokens_BxT.shape)
    # One segment for padding too: it comes last, where nothing that counts sees it.
    ctx = text_context(position_BxT, jnp.ones_like(tokens_BxT))
    x_BxTxD = model.apply(variables, tokens_BxT, method="embed_text")
    x_BxTxD, _, _ = model.apply(variables, x_BxTxD, ctx, method="adapted_blocks")
    h_BxTxD, _ = model.apply(variables, x_BxTxD, ctx, method="plain_blocks")
    logits = lambda h: model.apply(variables, h, method="logits")

    def of_row(h_TxD: jax.Array, tokens_T: jax.Array, weight_T: jax.Array) -> jax.Array:
        total, _ = losses.cross_entropy(logits, h_TxD[None], tokens_T[None], weight_T[None], chunk)
        return total

    return jax.vmap(of_row)(h_BxTxD[:, :-1], tokens_BxT[:, 1:], weight_BxT[:, 1:])


def text_loss(
    system: System, variables: Mapping[str, Any], rows: Sequence[TextRow], adapters: bool, progress: bool = True
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns for each kind the cross-entropy of every text in nats, and how many tokens it is summed over.

    The texts of a kind are in an order of their own, which is the same for all variables.

    Args:
      variables: `params` and `lora`; after a merge `params` alone.
      adapters: act on all tokens (under scope "audio" on none, text or not); False: without them.
    """
    on = adapters and "lora" in variables and system.config.lora.scope != "audio"
    visible = {name: variables[name] for name in ("params", "lora") if name == "params" or on}
    rows = sorted(rows, key=lambda row: (row.kind, len(row.tokens)))
    nats: dict[str, list[float]] = {}
    loss = functools.partial(_loss, model=system.model, chunk=max(1, system.config.train.loss_chunk // _ROWS))
    with tqdm(
        total=len(rows), desc=f"text, adapters {'on' if adapters else 'off'}", unit="row", disable=not progress
    ) as bar:
        start = 0
        while start < len(rows):
            kind = rows[start].kind
            batch = [row for row in rows[start : start + _ROWS] if row.kind == kind]
            length = -(-max(len(row.tokens) for row in batch) // _ROUND) * _ROUND
            tokens_BxT, weight_BxT = np.zeros((_ROWS, length), np.int32), np.zeros((_ROWS, length), np.float32)
            for b, row in enumerate(batch):
                tokens_BxT[b, : len(row.tokens)] = row.tokens
                weight_BxT[b, row.first_target : len(row.tokens)] = 1
            nats_B = np.asarray(loss(visible, tokens_BxT, weight_BxT), np.float64)
            nats.setdefault(kind, []).extend(nats_B[: len(batch)])
            start += len(batch)
            bar.update(len(batch))
    out = {}
    for kind, of_kind in nats.items():
        pieces = [row for row in rows if row.kind == kind]
        _, text = np.unique([piece.text for piece in pieces], return_inverse=True)
        n_tokens = [len(piece.tokens) - piece.first_target for piece in pieces]
        out[kind] = (np.bincount(text, of_kind), np.bincount(text, n_tokens))
    return out


def base_variables(system: System, variables: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns variables that are the base LLM's with the adapters off: after a merge its weights are read again."""
    if "lora" in variables or system.model.config.lora is None:
        return variables
    llm = load_llm(system, checkpoint.system_mesh(system.config))
    return {"params": {**variables["params"], "llm": llm}}


def compare_text(
    system: System, variables: Mapping[str, Any], rows: Sequence[TextRow], progress: bool = True
) -> dict[str, dict[str, float]]:
    """Returns the loss on held-out text of the base LLM, and with the adapters on or merged, in nats a token.

    Returns:
      {kind: {"n": texts, "tokens", "base", "adapted", "rise", "low", "high"}}, for each kind of text and for "all". The
      last two bound the rise's bootstrap interval over texts, as of `score.interval`: pieces of one text go together.
    """
    base = text_loss(system, base_variables(system, variables), rows, adapters=False, progress=progress)
    adapted = text_loss(system, variables, rows, adapters=True, progress=progress)
    for found in (base, adapted):
        nats, tokens = zip(*found.values(), strict=True)
        found["all"] = (np.concatenate(nats), np.concatenate(tokens))
    result = {}
    for kind, (nats_N, tokens_N) in base.items():
        adapted_N, _ = adapted[kind]
        rise = interval(adapted_N - nats_N, tokens_N)
        means = {"base": nats_N.sum() / tokens_N.sum(), "adapted": adapted_N.sum() / tokens_N.sum()}
        edges = {edge: rise[edge] for edge in ("low", "high")}
        result[kind] = {"n": rise["n"], "tokens": int(tokens_N.sum()), **means, "rise": rise["value"], **edges}
    return result


def ask(
    system: System,
    variables: Mapping[str, Any],
    questions: Sequence[Question],
    max_new_tokens: int | None = None,
) -> dict[str, Any]:
    """Asks plain questions in text of the base LLM, and with the adapters on or merged, and checks the answers.

    Returns:
      {"n", "base": right answers, "adapted": right answers, "low", "high": that bound the latter's bootstrap interval,
      as of `score.interval`, "answers": [{"question", "base", "base_right", "adapted", "adapted_right"}, ...]}.
    """
    on = system.config.lora.scope != "audio"
    answers: list[dict[str, Any]] = [{"question": question.prompt} for question in questions]
    for name, adapters, of in (("base", False, base_variables(system, variables)), ("adapted", on, variables)):
        generator = Generator(system, of, max_new_tokens=max_new_tokens, adapters_on_text=adapters)
        replies = generator.generate([Request(prompt=question.prompt) for question in questions])
        for answer, question, reply in zip(answers, questions, replies, strict=True):
            answer[name] = reply.text
            answer[f"{name}_right"] = any(re.search(p, reply.text, re.IGNORECASE) for p in question.patterns)
    right = {name: sum(answer[f"{name}_right"] for answer in answers) for name in ("base", "adapted")}
    share = interval(np.array([answer["adapted_right"] for answer in answers]), np.ones(len(answers)))
    edges = {edge: len(questions) * share[edge] for edge in ("low", "high")}
    return {"n": len(questions), **right, **edges, "answers": answers}
