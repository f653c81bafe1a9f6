"""The text of an answer while its tokens come: where a stop string ends it, and how much of it is certain."""

import re
from collections.abc import Sequence
from typing import Any

from aura_jax.errors import UserError

# A byte of a character that a SentencePiece vocabulary lacks: how it is decoded depends on the bytes after it.
_BYTE = re.compile("<0x[0-9A-F]{2}>")


def checked_stop(stop: Sequence[str]) -> tuple[str, ...]:
    """Returns the stop strings. Raises UserError if they are one string, or one of them is empty."""
    if isinstance(stop, str):
        raise UserError(f"stop {stop!r}: give a list of strings, such as [{stop!r}]")
    if not all(stop):
        raise UserError("stop '': an empty string is everywhere: give at least one character")
    return tuple(stop)


class AnswerText:
    """One answer, read again whenever more of its tokens are there.

    It ends at a stop id, or where its text first holds a stop string in full: as if the text were read character by
    character, so the result does not depend on how many tokens come at a time.

    Attributes:
      tokens: ids so far, without a stop id; of one that a stop string ended, those up to that string's last.
      text: what is certain: what `tokens` say, without special tokens, up to the stop string and without white space
        around it. Until the answer is whole it lacks an end that later tokens may change, and only grows.
      ended: a stop id or a stop string ended it.
    """

    def __init__(self, tokenizer: Any, stop_ids: Sequence[int], stop: Sequence[str] = ()):
        """
        Args:
          tokenizer: of transformers.
          stop_ids: ids that end an answer.
          stop: of `checked_stop`.
        """
        self._tokenizer, self._stop_ids, self._stop = tokenizer, frozenset(stop_ids), stop
        self.tokens: list[int] = []
        self.text, self.ended = "", False

    def read(self, tokens: Sequence[int], *, is_whole: bool) -> None:
        """Reads the answer as far as it is.

        Args:
          tokens: from its first on; anything after a stop id. Of an answer that has ended they do not matter.
          is_whole: there will be no more.
        """
        if self.ended:
            return
        end = next((i for i, token in enumerate(tokens) if token in self._stop_ids), None)
        self.tokens, self.ended = list(tokens[:end]), end is not None
        is_whole |= self.ended
        text = self._decode(self.tokens) if is_whole else self._settled(self.tokens)
        cut = self._first_stop(text)
        if cut is not None:
            enough = (
                n for n in range(len(self.tokens)) if self._first_stop(self._settled(self.tokens[:n])) is not None
            )
            self.tokens, self.ended = self.tokens[: next(enough, None)], True
            text = text[:cut]
        elif not is_whole:
            text = self._without_part_of_a_stop(text)
        text = text.strip()
        if is_whole or self.ended or len(text) > len(self.text):  # a tokenizer may settle less than it had
            self.text = text

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)

    def _settled(self, tokens: Sequence[int]) -> str:
        """Returns the longest known start of the text that is the same whatever tokens follow."""
        n = len(tokens)
        while n and _BYTE.fullmatch(self._tokenizer.convert_ids_to_tokens(tokens[n - 1]) or ""):
            n -= 1
        text = self._decode(tokens[:n]).rstrip("\ufffd")  # a character whose last bytes are to come
        if getattr(self._tokenizer, "clean_up_tokenization_spaces", False):
            # "do n", when "'t" follows, is "don't", and so is "do n '", when " t" does.
            text, _, last = text.rpartition(" ")
            text = (text.rpartition(" ")[0] if last == "'" else text).rstrip(" ")
        return text

    def _first_stop(self, text: str) -> int | None:
        """Returns where the stop string begins that is complete first; the longest of several that end together."""
        ends = [(place + len(stop), place) for stop in self._stop if (place := text.find(stop)) >= 0]
        return min(ends)[1] if ends else None

    def _without_part_of_a_stop(self, text: str) -> str:
        parts = (n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n]))
        return text[: len(text) - max(parts, default=0)]
