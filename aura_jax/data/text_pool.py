"""Plain text for the objectives that keep the LLM an LLM: rows of equal length, cut from streams of documents."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from aura_jax.data.batch import WHOLE, Part
from aura_jax.data.manifest import json_lines
from aura_jax.data.prompts import ChatFormat
from aura_jax.errors import UserError


class Documents(NamedTuple):
    """Token ids of each document: prose of any kind, and conversations as the chat template renders them."""

    prose: list[tuple[int, ...]]
    chat: list[tuple[int, ...]]


def load_documents(path: str | Path, chat: ChatFormat) -> Documents:
    """Reads JSON lines {"text": ...} (prose) or {"messages": [{"role", "content"}, ...]} (chat), and tokenises them.

    Raises:
        UserError: as `json_lines`; the file is empty, or a line is neither: names file and line.
    """
    documents = Documents([], [])
    for where, values in json_lines(path):
        if isinstance(values.get("text"), str):
            documents.prose.append(chat.text(values["text"]))
        elif isinstance(values.get("messages"), list):
            documents.chat.append(chat.conversation(values["messages"]))
        else:
            raise UserError(f"{where}: neither 'text' (a string) nor 'messages' (a list): give one of them")
    if not documents.prose and not documents.chat:
        raise UserError(f"{path}: no documents: give one JSON object a line")
    return documents


class TextPool:
    """Rows of plain text for batch `index`: a pure function of (seed, index).

    Documents of a kind are joined end to end, the stream is cut into rows, and each pass over it takes every row once,
    in a new order and cut at a new offset.

    Args:
        documents: of `load_documents`.
        n_rows: M, rows of a whole batch, over all hosts.
        n_tokens: L.
        seed: of the order and the offsets.
        chat_share: the share of the rows that are cut from conversations, rounded to whole rows. None: as the documents
            have it by tokens, but at least one row where there are any.

    Raises:
        UserError: a stream is shorter than one row, or `chat_share` asks for documents that are not there.
    """

    def __init__(
        self, documents: Documents, *, n_rows: int, n_tokens: int, seed: int = 0, chat_share: float | None = None
    ):
        sizes = [sum(map(len, kind)) for kind in documents]
        if chat_share is None:
            chat_rows = round(n_rows * sizes[1] / max(1, sum(sizes)))
            chat_rows = min(max(chat_rows, bool(sizes[1])), n_rows - bool(sizes[0])) if n_rows > 1 else chat_rows
        elif 0 <= chat_share <= 1:
            chat_rows = round(n_rows * chat_share)
        else:
            raise UserError(f"data.text_chat {chat_share} is not a share: give a number from 0 to 1")
        self.n_rows, self.n_tokens, self._seed = n_rows, n_tokens, seed
        self._kind_rows = (n_rows - chat_rows, chat_rows)
        for name, size, rows in zip(Documents._fields, sizes, self._kind_rows, strict=True):
            if rows and size < n_tokens:
                raise UserError(
                    f"data.text_pool has {size} tokens of {name}, less than a row of {n_tokens}: "
                    "give more, or lower data.text_length"
                )
        self._streams = [_joined(kind) for kind in documents]

    def batch(self, index: int, part: Part = WHOLE) -> tuple[np.ndarray, np.ndarray]:
        """Returns (text_tokens_MxL, text_segment_MxL), int32, of batch `index`, or a part of its rows.

        Raises:
            UserError: M does not divide into such parts.
        """
        wanted = part.rows("data.text_rows", self.n_rows)
        rows = [self._row(kind, index * n + place) for kind, n in enumerate(self._kind_rows) for place in range(n)]
        mine = [rows[i] for i in wanted]
        return np.stack([tokens for tokens, _ in mine]), np.stack([segment for _, segment in mine])

    @property
    def batches_per_pass(self) -> int:
        """Batches until every row has been taken once; those of the shorter stream come more often."""
        return max(-(-self._cuts(kind) // rows) for kind, rows in enumerate(self._kind_rows) if rows)

    def _cuts(self, kind: int) -> int:
        """The rows of a pass: as many at every offset, so that a place belongs to one pass only."""
        return max(1, (len(self._streams[kind][0]) - self.n_tokens + 1) // self.n_tokens)

    def _row(self, kind: int, place: int) -> tuple[np.ndarray, np.ndarray]:
        tokens, document = self._streams[kind]
        cuts = self._cuts(kind)
        generator = np.random.default_rng(np.random.SeedSequence([self._seed, kind, place // cuts]))
        offset = int(generator.integers(0, min(self.n_tokens, len(tokens) - cuts * self.n_tokens + 1)))
        start = offset + int(generator.permutation(cuts)[place % cuts]) * self.n_tokens
        cut = slice(start, start + self.n_tokens)
        segment = 1 + np.cumsum(np.diff(document[cut], prepend=document[start]) != 0)
        return tokens[cut], segment.astype(np.int32)


def _joined(documents: Sequence[tuple[int, ...]]) -> tuple[np.ndarray, np.ndarray]:
    """All tokens end to end, and the number of each one's document."""
    tokens = np.array([token for document in documents for token in document], np.int32)
    return tokens, np.repeat(np.arange(len(documents)), [len(document) for document in documents])
