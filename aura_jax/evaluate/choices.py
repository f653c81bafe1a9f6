"""Multiple choice: which choice an answer names, and the share of answers that name none.

An answer is read by fixed forms and never guessed at: one that names no choice, or several, is unparsable and counts as
wrong. (VoiceBench's own script draws a random letter for it.)
"""

import re
import string
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from aura_jax.errors import UserError
from aura_jax.evaluate.score import interval

_LETTERS = string.ascii_uppercase
_FILLING = " \t\n\"'`*_\u201c\u201d\u2018\u2019"  # around an answer: quotes and Markdown's marks

# What may stand before the choice in a sentence that states it.
_LEAD = re.compile(
    r"(?:(?:so|therefore|thus|hence|i think|i believe|i would say|i choose|i pick)\b,?\s*)*(?:that\s+)?"
    r"(?:(?:the|my)\s+)?(?:(?:correct|right|best|final)\s+)?(?:answer|choice|option)(?:\s+is\b|\s*:|\s+(?=\(?[A-Z]\b))"
    r"\s*:?\s*(?:(?:option|choice|letter)\s+)?",
    re.IGNORECASE,
)
_STATED_AFTER = re.compile(
    r"(?:(?:option|choice|answer)\s+)?\(?([A-Z])\)?\s+is\s+(?:the\s+)?(?:correct|right|best)\b", re.IGNORECASE
)
_LETTER_ALONE = re.compile(r"\(?([A-Za-z])(?:\)|\.|:|\)\.|\):)?")
_LABEL = re.compile(r"(?:\(([A-Za-z])\)|([A-Z])(?:[).:]|\s+[-\u2013\u2014]))\s*(.+)", re.DOTALL)
# After a label: words that say something of the choice, and need not choose it.
_ABOUT_LABEL = re.compile(
    r"(?:is|isn['\u2019]?t|are|was|would|could|should|may|might|can|cannot|can['\u2019]t|does|doesn['\u2019]t|has|"
    r"seems?|looks?|and|or|nor|not|but|versus|vs)\b",
    re.IGNORECASE,
)
_LETTER_STATED = re.compile(r"(?:\(([A-Za-z])\)|([A-Z])\b\)?)(?=$|\s*[.,:;!?\u2013\u2014-]|\s+(?:because|since|as)\b)")
# Anywhere in an answer, to find what contradicts the rest of it.
_ALSO_STATED = re.compile(
    r"\b(?:answer|choice|option)(?:\s+is\b|\s*:)\s*\(?(?!A\s+[a-z])([A-Z])\b|"
    r"\b([A-Z])\)?\s+is\s+(?:the\s+)?(?:correct|right|best)\b"
)
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")
# A capital by itself: but not an article, and not the pronoun.
_MENTION = re.compile(r"(?<![\w'\u2019])(?!A\s+[a-z]|I(?:['\u2019]|\s+[a-z]))([A-Z])(?![\w'\u2019])")


class Choices(NamedTuple):
    """The texts that a question may be answered with, A first, and the index of the right one."""

    texts: tuple[str, ...]
    right: int

    @property
    def answer(self) -> str:
        """The right answer, such as "B. Paris"."""
        return f"{_LETTERS[self.right]}. {self.texts[self.right]}"


def read_choices(values: Mapping[str, Any], where: str) -> Choices | None:
    """Returns the choices that a row of a manifest has by its keys "choices" and "answer"; None if it has no choices.

    Args:
      values: the row's keys, `Row.extra`. "answer" is a letter or the text of a choice.
      where: the row's place, for errors.

    Raises:
      UserError: there are not 2 to 26 texts, there is no answer, or it names none of the texts, or two of them.
    """
    if "choices" not in values:
        return None
    texts, answer = values["choices"], values.get("answer")
    if not isinstance(texts, list) or not all(isinstance(text, str) and _plain(text) for text in texts):
        raise UserError(f'{where}: \'choices\' is not a list of texts: give ["...", "..."], the first one is A')
    if not 2 <= len(texts) <= len(_LETTERS):
        raise UserError(f"{where}: 'choices' has {len(texts)} texts: give 2 to {len(_LETTERS)}")
    letters = f"a letter from A to {_LETTERS[len(texts) - 1]}, or the text of a choice"
    if not isinstance(answer, str):
        raise UserError(f"{where}: 'choices' without an 'answer' that is a text: give {letters}")
    found = _by_text(answer, texts) | _by_letter(answer.strip(), len(texts))
    if len(found) != 1:
        problem = "names several of the choices" if found else "names none of the choices"
        raise UserError(f"{where}: 'answer' {answer!r} {problem}: give {letters}")
    return Choices(tuple(texts), found.pop())


def parse(answer: str, texts: Sequence[str]) -> int | None:
    """Returns the index of the choice that an answer names; None if it names none, or several.

    The forms: a letter alone ("B", "B.", "(b)"), a letter as a label of what follows ("B) Paris", "(B) because ..."), a
    choice's own text, a sentence that states a letter or such a text ("The answer is B.", "Answer: Paris", "I think the
    correct option is (B) because ...", "B is correct."). Case, quotes, Markdown and a final full stop do not count.
    """
    answer = _bare(answer)
    # A choice's text may itself look like a letter: then both readings must agree.
    found = _by_text(answer, texts)
    if found:
        found |= _by_letter(answer, len(texts))
        return found.pop() if len(found) == 1 else None
    found = _by_letter(answer, len(texts)) | _by_label(answer, texts)
    sentences = [_bare(sentence) for sentence in _SENTENCE.split(answer)]
    for sentence in sentences:
        found |= _stated(sentence, texts)
    if found:
        for sentence in sentences:
            found |= _by_text(sentence, texts)
        for match in _ALSO_STATED.finditer(answer):
            found |= _index(match[1] or match[2], len(texts))
    return found.pop() if len(found) == 1 else None


def score_choices(answers: Sequence[str], questions: Sequence[Choices], seed: int = 0) -> dict[str, Any]:
    """Returns the share of right answers and that of unparsable ones, which are wrong, with intervals over questions.

    Returns:
      {"multiple_choice": of `score.interval`, "unparsable": likewise}, as fractions.
    """
    found = [parse(answer, question.texts) for answer, question in zip(answers, questions, strict=True)]
    right = np.array([one == question.right for one, question in zip(found, questions, strict=True)])
    unparsable = np.array([one is None for one in found])
    ones = np.ones(len(found))
    return {"multiple_choice": interval(right, ones, seed), "unparsable": interval(unparsable, ones, seed)}


def _bare(text: str) -> str:
    """Returns a text without the quotes and Markdown's marks around it, or around a letter in it."""
    return re.sub(r"(\*\*|__)(\(?[A-Z]\)?[.:]?)\1", r"\2", text).strip(_FILLING)


def _plain(text: str) -> str:
    """Returns what two texts have in common that are the same choice."""
    return " ".join(text.strip(_FILLING).rstrip(".").strip(_FILLING).casefold().split())


def _by_text(answer: str, texts: Sequence[str]) -> set[int]:
    return {i for i, text in enumerate(texts) if _plain(text) == _plain(answer)}


def _index(letter: str, n: int) -> set[int]:
    place = _LETTERS.find(letter.upper())
    return {place} if 0 <= place < n else set()


def _by_letter(answer: str, n: int) -> set[int]:
    match = _LETTER_ALONE.fullmatch(answer)
    return _index(match[1], n) if match else set()


def _by_label(answer: str, texts: Sequence[str]) -> set[int]:
    """The letter that an answer begins with, if what follows is its choice's text, or names no choice."""
    match = _LABEL.fullmatch(answer)
    if match is None or _ABOUT_LABEL.match(match[3]):
        return set()
    found, rest = _index(match[1] or match[2], len(texts)), match[3]
    named = _by_text(rest, texts)
    if not found or found & named:
        return found
    return found | named | _mentioned(rest, len(texts))


def _stated(sentence: str, texts: Sequence[str]) -> set[int]:
    """The choices of a sentence that says outright which one it is."""
    after = _STATED_AFTER.match(sentence)
    if after is not None:
        return _index(after[1], len(texts)) | _mentioned(sentence[after.end() :], len(texts))
    lead = _LEAD.match(sentence)
    if lead is None:
        return set()
    rest = _bare(sentence[lead.end() :])
    found = _by_label(rest, texts) | _by_text(rest, texts)
    letter = _LETTER_STATED.match(rest)
    if not found and letter is not None:
        found = _index(letter[1] or letter[2], len(texts)) | _mentioned(rest[letter.end() :], len(texts))
    return found


def _mentioned(text: str, n: int) -> set[int]:
    """The letters of choices that stand by themselves in a text."""
    return set().union(*(_index(letter, n) for letter in _MENTION.findall(text)))
