"""What is to be said: the lines of a file, or the sentences in them."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from aura_jax.data.manifest import json_lines
from aura_jax.errors import UserError

_PLAIN = str.maketrans({"\u2019": "'", "\u2018": "'", "\u201c": '"', "\u201d": '"', "\u2013": "\u2014", "\u00a0": " "})
_SENTENCE_END = re.compile(r"(?<!\bMr\.)(?<!\bMs\.)(?<!\bDr\.)(?<!\bMrs\.)(?<=[.!?])\s+(?=[A-Z])")


class Utterance(NamedTuple):
    """A text to be said, and what else its line says."""

    text: str
    extra: Mapping[str, Any]


def read(path: str | Path, words: tuple[int, int] | None = None) -> list[Utterance]:
    """Reads the texts of a file.

    Args:
      path: JSON lines with `text` (other keys are kept, but for those of a clip), or with `messages` (conversations:
        each turn is a text); or, if it ends in .txt, plain lines.
      words: cut texts into sentences, and keep each that has so many words, from the first number to the second, once;
        None: texts stay whole.

    Raises:
      UserError: the file cannot be read, holds no text, or a line has another form; no number of words is in `words`.
    """
    if words and not 1 <= words[0] <= words[1]:
        raise UserError(f"sentences of {words[0]} to {words[1]} words: give the fewest, at least 1, and then the most")
    utterances = []
    for text, extra in _plain_lines(path) if str(path).endswith(".txt") else _texts(path):
        utterances += [Utterance(piece, extra) for piece in (_sentences(text, *words) if words else [normalise(text)])]
    if words:
        utterances = list({utterance.text: utterance for utterance in reversed(utterances)}.values())[::-1]
    if not utterances:
        what = f"no sentence of {words[0]} to {words[1]} words" if words else "no text"
        raise UserError(f"{path}: {what}: give one text a line")
    return utterances


def normalise(text: str) -> str:
    """Returns a text with plain quotes, dashes and spaces, and without what is not heard: quotation marks, emphasis."""
    # Two hyphens are a dash, but not before a word alone, as in "--option".
    text = re.sub(r"\s*\u2014\s*|(?<=\S)--+\s*|\s--+(?=\s|$)", " \u2014 ", text.translate(_PLAIN))
    text = re.sub(r"(?<![A-Za-z])'|'(?![A-Za-z])", "", re.sub(r'["_*]', "", text))
    return " ".join(text.split()).strip("\u2014 ")


def _plain_lines(path: str | Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}): give a file of UTF-8 text") from None
    yield from ((line, {}) for line in text.splitlines() if line.strip())


def _texts(path: str | Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for where, values in json_lines(path):
        text, messages = values.get("text"), values.get("messages")
        if isinstance(text, str) and text.strip():
            yield text, {key: x for key, x in values.items() if key not in ("text", "id", "audio", "voice", "seconds")}
        elif isinstance(messages, list) and all(isinstance(turn, dict) for turn in messages):
            yield from ((str(turn.get("content", "")), {}) for turn in messages)
        else:
            raise UserError(f"{where}: neither 'text' nor 'messages': give what is to be said as 'text'")


def _sentences(text: str, fewest: int, most: int) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", text):
        for sentence in _SENTENCE_END.split(normalise(paragraph)):
            whole = sentence[:1].isupper() and sentence[-1] in ".!?"
            if whole and fewest <= len(sentence.split()) <= most:
                yield sentence
