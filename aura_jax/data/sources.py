"""A source: the rows of a manifest, tokenised and measured, ready to be planned."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from aura_jax.data.manifest import LET_TRANSCRIBE, Row, clip_samples
from aura_jax.data.plan import Lengths
from aura_jax.data.prompts import ChatFormat
from aura_jax.errors import UserError


@dataclass(frozen=True)
class Source:
    """Rows with the token ids of each, and their lengths for the plan."""

    rows: Sequence[Row]
    prefix_ids: Sequence[tuple[int, ...]]
    suffix_ids: Sequence[tuple[int, ...]]
    response_ids: Sequence[tuple[int, ...]]
    lengths: Lengths
    transcript_ids: Sequence[tuple[int, ...]] | None = None  # of speech rows; None: rows are not read as text


def make_source(
    rows: Sequence[Row],
    chat: ChatFormat,
    *,
    prompt: str = "",
    n_samples: Sequence[int] | None = None,
    transcripts: bool = False,
    responses: bool = False,
) -> Source:
    """Tokenises rows and measures their clips.

    Args:
        rows: of a manifest, or a part of one.
        chat: the chat format.
        prompt: for speech rows without a prompt of their own.
        n_samples: of each clip. None: by `manifest.clip_samples`.
        transcripts: tokenise those, too, for objectives that read them in place of the audio.
        responses: as of `check_row`.

    Raises:
        UserError: there are no rows; a plain text has fewer than two tokens; the chat template fails; or as
            `check_row`.
    """
    if not rows:
        raise UserError("a source without rows: give a manifest, or a part of one, that has some")
    prefixes, suffixes, targets = [], [], []
    for row in rows:
        check_row(row, transcripts, responses)
        if row.is_plain_text:
            prefix, target = _plain_text(row, chat)
            suffix = ()
        else:
            words = row.prompt if row.prompt is not None else prompt
            prefix, suffix = chat.encode(words, row.audio is not None, row.history)
            target = chat.response(row.target, row.ended)
        prefixes.append(prefix)
        suffixes.append(suffix)
        targets.append(target)
    n_prefix, n_suffix, n_response = (np.array([len(ids) for ids in part]) for part in (prefixes, suffixes, targets))
    samples = np.array(clip_samples(rows) if n_samples is None else n_samples)
    lengths = Lengths([row.where for row in rows], samples, n_prefix, n_suffix, n_response)
    if not transcripts:
        return Source(rows, prefixes, suffixes, targets, lengths)
    spoken = [_transcript(row, chat) for row in rows]
    lengths = lengths._replace(n_transcript_N=np.array([len(ids) for ids in spoken]))
    return Source(rows, prefixes, suffixes, targets, lengths, spoken)


def check_row(row: Row, transcripts: bool, responses: bool) -> None:
    """Checks that a spoken row has what the objectives of a run read.

    Args:
        transcripts: they read its transcript.
        responses: they compare answers, which are to be the LLM's own: to answer is not to repeat what was said.

    Raises:
        UserError: it has not.
    """
    if row.audio is None:
        return
    if transcripts and not row.text:
        raise UserError(f"{row.where}: no 'text', which an objective of this run reads: add it, or {LET_TRANSCRIBE}")
    if responses and row.response is None:
        raise UserError(
            f"{row.where}: no 'response', and the objective response_kd compares answers: let `aura-jax data continue` "
            "write what the LLM itself answers"
        )


def _transcript(row: Row, chat: ChatFormat) -> tuple[int, ...]:
    """The tokens that stand for the audio where a row is read as text."""
    if row.audio is None:
        return ()
    assert row.text is not None
    return chat.text(row.text)


def _plain_text(row: Row, chat: ChatFormat) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The token that begins a text, and those to be predicted."""
    assert row.text is not None
    ids = chat.text(row.text)
    bos = chat.tokenizer.bos_token_id
    if getattr(chat.tokenizer, "add_bos_token", False) and bos is not None:
        ids = (bos, *ids)
    if len(ids) < 2:
        raise UserError(f"{row.where}: a plain text of {len(ids)} tokens predicts nothing: give a longer one")
    return ids[:1], ids[1:]
