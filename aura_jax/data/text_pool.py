"""Plain text for the objectives that keep the LLM an LLM: rows of equal length, cut from streams of documents."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from aura_jax.data.prompts import ChatFormat
from aura_jax.errors import UserError


class Documents(NamedTuple):
    """Token ids of each document: prose of any kind, and conversations as the chat template renders them."""

    prose: list[tuple[int, ...]]
    chat: list[tuple[int, ...]]


def load_documents(path: str | Path, chat: ChatFormat) -> Documents:
    """Reads JSON lines {"text": ...} (prose) or {"messages": [{"role", "content"}, ...]} (chat), and tokenises them.

    Raises:
        UserError: the file is missing or empty, or a line is neither: names file and line.
    """
    path, documents = Path(path), Documents([], [])
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}): give JSON lines in UTF-8") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}: not JSON ({error.msg}): give one JSON object a line") from None
        if isinstance(values, dict) and isinstance(values.get("text"), str):
            documents.prose.append(chat.text(values["text"]))
        elif isinstance(values, dict) and isinstance(values.get("messages"), list):
            documents.chat.append(chat.conversation(values["messages"]))
        else:
            raise UserError(f"{path}:{number}: neither 'text' (a string) nor 'messages' (a list): give one of them")
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
            raise UserError(f"chat_share {chat_share} is not a share: give a number from 0 to 1")
        self.n_rows, self.n_tokens, self._seed = n_rows, n_tokens, seed
        self._kind_rows = (n_rows - chat_rows, chat_rows)
        for name, size, rows in zip(Documents._fields, sizes, self._kind_rows, strict=True):
            if rows and size < n_tokens:
                raise UserError(f"the text pool has {size} tokens of {name}, less than a row of {n_tokens}: give more")
        self._streams = [_joined(kind) for kind in documents]

    def batch(self, index: int, host: tuple[int, int] = (0, 1)) -> tuple[np.ndarray, np.ndarray]:
        """Returns (text_tokens_MxL, text_segment_MxL), int32, of batch `index`, or the slice for host (number, count).

        Raises:
            UserError: the count of hosts does not divide M.
        """
        number, count = host
        if self.n_rows % count:
            raise UserError(
                f"the text pool's {self.n_rows} rows are not a multiple of the {count} hosts: use one that is"
            )
        rows = [self._row(kind, index * n + place) for kind, n in enumerate(self._kind_rows) for place in range(n)]
        size = self.n_rows // count
        mine = rows[number * size : (number + 1) * size]
        return np.stack([tokens for tokens, _ in mine]), np.stack([segment for _, segment in mine])

    def _row(self, kind: int, place: int) -> tuple[np.ndarray, np.ndarray]:
        tokens, document = self._streams[kind]
        # The same count at every offset, so that a place belongs to one pass only.
        cuts = max(1, (len(tokens) - self.n_tokens + 1) // self.n_tokens)
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
