"""From English text to phonemes by a dictionary, or not at all: what could be said in two ways is not guessed.

A transcript and its speech must say the same words. So a text is refused (`Unspoken`) that has digits, symbols, words
all in capitals or unknown ones, an abbreviation other than Mr., Mrs., Ms. and Dr., or a word whose pronunciation
depends on its meaning ("read", "live", "use").

Phonemes are those of the dictionary: IPA, with a capital letter for a diphthong, and marks of stress before the
syllable.
"""

import re
from collections.abc import Mapping

_VOWELS = frozenset("AIOQWYaiuæɐɑɒɔəɛɜɪʊʌᵊᵻ")
_STRESS = str.maketrans("", "", "ˈˌ")
_TITLES = ("Mr", "Mrs", "Ms", "Dr")
# A full stop after one of these does not end a sentence, and what is said for it is not what is written.
_ABBREVIATIONS = frozenset({
    "st", "capt", "col", "gen", "rev", "hon", "esq", "jr", "sr", "vol", "ch", "fig", "vs", "etc", "inc", "ltd", "viz",
    "cf", "al", "adj", "esp", "abbr",
})  # fmt: skip
_TOKEN = re.compile(rf"(?:{'|'.join(_TITLES)})\.|[A-Za-z]+(?:'[A-Za-z]+)*|[,.;:!?—]+|(?<=[A-Za-z])-(?=[A-Za-z])|[' ]")
_WORD = re.compile(r"[A-Za-z]")
_ONE_LETTER = ("a", "i", "o")

Entry = str | Mapping[str, str | None]


class Unspoken(Exception):
    """A text that cannot be spoken as it is written; says why."""


class Lexicon:
    """The pronunciations of one accent of English."""

    def __init__(self, entries: Mapping[str, Entry], british: bool):
        """
        Args:
          entries: of each word its phonemes; or several, by the word's part of speech, "DEFAULT" for all others, and
            "None" before a pause.
        """
        self._entries = entries
        self._british = british

    def phonemes(self, text: str) -> str:
        """Returns how `text` is said, with its punctuation.

        Raises:
          Unspoken: as the module says.
        """
        tokens, end = [], 0
        for match in _TOKEN.finditer(text):
            if match.start() != end:
                break
            tokens.append(match[0])
            end = match.end()
        if end != len(text):
            raise Unspoken(f"a sign: {text[end]!r}")
        _check_stops(tokens)
        said: list[str] = []
        # From the end: "a", "the" and "to" depend on the sound that follows, other words on a pause.
        following = ""
        for token in reversed(tokens):
            if _WORD.match(token):
                following = self._in_context(token, following)
                said.append(following)
            elif token in "- ":
                said.append(" ")
            elif token != "'":
                following = ""
                said.append(token)
        phonemes = re.sub(r" +", " ", "".join(reversed(said))).strip()
        if not following and not any(_WORD.match(token) for token in tokens):
            raise Unspoken("no words")
        return phonemes

    def _in_context(self, word: str, following: str) -> str:
        """Returns how a word is said before the phonemes `following`, "" for a pause."""
        before_vowel = following.translate(_STRESS)[:1] in _VOWELS if following else None
        match word.lower():
            case "a":
                return "ɐ"
            case "an":
                return "ɐn"
            case "the":
                return "ði" if before_vowel else "ðə"
            case "to" if before_vowel is not None:
                return "tʊ" if before_vowel else "tə"
        entry = self._look_up(word)
        if isinstance(entry, str):
            return entry
        said = entry.get("None") if not following else None
        return said or entry["DEFAULT"] or ""

    def _look_up(self, word: str) -> Entry:
        """Returns the entry of a word, of which all pronunciations differ by no more than stress."""
        if (len(word) == 1 and word.lower() not in _ONE_LETTER) or (len(word) > 1 and word.isupper()):
            raise Unspoken(f"letters or capitals: {word!r}")
        found = [entry for name in dict.fromkeys((word, word.lower())) if (entry := self._entries.get(name))]
        if not found and word.islower() and word.capitalize() in self._entries:
            found = [self._entries[word.capitalize()]]
        if not found:
            found = [said for said in (self._inflected(word.lower()), self._possessive(word)) if said]
        if not found:
            raise Unspoken(f"an unknown word: {word!r}")
        if len({_sounds(said) for entry in found for said in _variants(entry)}) > 1:
            raise Unspoken(f"said in two ways: {word!r}")
        return found[0]

    def _possessive(self, word: str) -> str:
        stem, apostrophe, _ = word.rpartition("'")
        return self._with_s(_plain(self._look_up(stem))) if apostrophe and word.endswith("'s") else ""

    def _inflected(self, word: str) -> str:
        """Returns how a regular plural, past or present participle is said whose stem is known; "" if it is none."""
        if word.endswith("s") and not word.endswith("ss"):
            stems = [word[:-3] + "y"] if word.endswith("ies") else [word[:-1]]
            stems += [word[:-2]] if word.endswith("es") else []
            return self._with_s(self._stem(stems))
        if word.endswith("ed"):
            stems = [word[:-3] + "y"] if word.endswith("ied") else _stems(word[:-2])
            return self._with_ed(self._stem(stems))
        if word.endswith("ing"):
            return self._with_ing(word, self._stem(_stems(word[:-3])))
        return ""

    def _stem(self, candidates: list[str]) -> str:
        """Returns how the first known one is said; "" if none is.

        Raises:
          Unspoken: it is said in two ways.
        """
        known = next((stem for stem in candidates if len(stem) > 1 and stem in self._entries), None)
        return "" if known is None else _plain(self._look_up(known))

    @property
    def _weak_vowel(self) -> str:
        return "ɪ" if self._british else "ᵻ"

    def _with_s(self, stem: str) -> str:
        if not stem:
            return ""
        if stem[-1] in "szʃʒʧʤ":
            return stem + self._weak_vowel + "z"
        return stem + ("s" if stem[-1] in "ptkfθ" else "z")

    def _with_ed(self, stem: str) -> str:
        if not stem:
            return ""
        if stem[-1] in "td":
            return stem + self._weak_vowel + "d"
        return stem + ("t" if stem[-1] in "pkfθsʃʧ" else "d")

    def _with_ing(self, word: str, stem: str) -> str:
        if not stem:
            return ""
        # A British r that is silent at the end of a word is said before a vowel.
        return stem + ("ɹ" if self._british and word.endswith("ring") and stem[-1] != "ɹ" else "") + "ɪŋ"


def _stems(rest: str) -> list[str]:
    """Returns the stems that spelling allows before "ed" or "ing", likeliest first."""
    if re.search(r"([bdfgklmnprtvz])\1$", rest):
        return [rest, rest[:-1]]
    # "hoping" is of "hope": "hop" would have doubled its last letter. "visiting" is not of "visite".
    silent_e = re.search(r"(?:^|[^aeiou])[aeiouy][^aeiouwxy]$", rest)
    return [rest + "e", rest] if silent_e else [rest, rest + "e"]


def _variants(entry: Entry) -> list[str]:
    return [entry] if isinstance(entry, str) else [said for said in entry.values() if said]


def _plain(entry: Entry) -> str:
    return _variants(entry)[0]


def _sounds(said: str) -> str:
    return said.translate(_STRESS)


def _check_stops(tokens: list[str]) -> None:
    """Raises Unspoken where a full stop is that of an abbreviation."""
    for i, token in enumerate(tokens):
        if token == "." and 0 < i < len(tokens) - 1:
            after = next((other for other in tokens[i + 1 :] if _WORD.match(other)), "")
            if tokens[i + 1] != " " or after[:1].islower():
                raise Unspoken(f"an abbreviation: '{tokens[i - 1]}.'")
        if token == "." and i and tokens[i - 1].lower() in _ABBREVIATIONS:
            raise Unspoken(f"an abbreviation: '{tokens[i - 1]}.'")
