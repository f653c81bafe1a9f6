"""Scores of transcripts: word error rate, exact match, intent accuracy, each with a bootstrap interval.

Texts are compared after the normaliser of Whisper's authors (arXiv 2212.04356, appendix C): case, punctuation,
spelling, numerals and fillers do not count. It makes some texts empty ("#", "mm"): those have no words to miss, and
whatever is heard there counts as inserted.
"""

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from rapidfuzz.distance import Levenshtein

from aura_jax.errors import UserError

N_RESAMPLES = 1000
CONFIDENCE = 0.95


@functools.cache
def _normaliser() -> Callable[[str], str]:
    from whisper_normalizer.english import EnglishTextNormalizer  # a second to import

    return EnglishTextNormalizer()


@functools.lru_cache(maxsize=1 << 16)
def normalise(text: str) -> str:
    """Returns `text` as Whisper's English normaliser leaves it; it may be empty."""
    return " ".join(_normaliser()(text).split())


def word_errors(reference: str, hypothesis: str) -> tuple[int, int]:
    """Returns (words substituted, inserted or deleted; words of the reference), both normalised."""
    words = normalise(reference).split()
    return Levenshtein.distance(words, normalise(hypothesis).split()), len(words)


def interval(
    numerator_N: np.ndarray, denominator_N: np.ndarray, seed: int = 0, n_resamples: int = N_RESAMPLES
) -> dict[str, float]:
    """Returns sum(numerator) / sum(denominator) with its percentile bootstrap interval over utterances.

    Args:
      numerator_N, denominator_N: of each utterance. A sum of 0 below is counted as 1: one error where there is nothing
        to hear is an error rate of 1.
      seed: of the resampling.

    Returns:
      {"value", "low", "high"}, the latter two bounding the middle 95% of the resamples.
    """
    numerator_N, denominator_N = np.asarray(numerator_N, np.float64), np.asarray(denominator_N, np.float64)
    ratio = lambda top, bottom: top / np.maximum(bottom, 1)
    random, n = np.random.default_rng(seed), len(numerator_N)
    values = np.empty(n_resamples)
    for i in range(n_resamples):  # one at a time: a million utterances need no matrix of a thousand million
        index = random.integers(0, n, n)
        values[i] = ratio(numerator_N[index].sum(), denominator_N[index].sum())
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    value = ratio(numerator_N.sum(), denominator_N.sum())
    return {"value": float(value), "low": float(low), "high": float(high)}


class IntentClassifier:
    """The intent of a transcript: that of the nearest training sentence by word edit distance.

    Several sentences may be equally near: the intent that most of them have, then the first in the alphabet. A correct
    transcript of a sentence that was never trained on may be nearest to another intent, so that 100% can be out of
    reach there.
    """

    def __init__(self, examples: Sequence[tuple[str, str]]):
        """
        Args:
          examples: (sentence, intent) pairs; repetitions do not count.

        Raises:
          UserError: if there are none.
        """
        if not examples:
            raise UserError("no training sentence has an 'intent': nothing to classify intents by")
        self._examples = sorted({(normalise(text), intent) for text, intent in examples})
        self._words = [text.split() for text, _ in self._examples]
        self.classify = functools.lru_cache(maxsize=1 << 16)(self._classify)

    def _classify(self, text: str) -> str:
        """Returns the intent of `text`."""
        words = normalise(text).split()
        distances = [Levenshtein.distance(words, other) for other in self._words]
        nearest = min(distances)
        pairs = zip(distances, self._examples, strict=True)
        votes = Counter(intent for distance, (_, intent) in pairs if distance == nearest)
        return min(votes, key=lambda intent: (-votes[intent], intent))


def score(
    references: Sequence[str],
    hypotheses: Sequence[str],
    intents: Sequence[str] | None = None,
    classifier: IntentClassifier | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Scores a set of utterances.

    Args:
      references, hypotheses: what was said, and what was heard.
      intents: of each utterance; with `classifier`, intent accuracy is reported too.

    Returns:
      {"n", "wer": {"value", "low", "high"}, "exact_match": {...}, "intent_accuracy": {...}}, rates as fractions. WER is
      over the set (all errors over all words), and may exceed 1.

    Raises:
      UserError: for an empty set.
      ValueError: if the lengths differ.
    """
    if not references:
        raise UserError("no utterances to score: the set is empty")
    errors, words = np.array([word_errors(r, h) for r, h in zip(references, hypotheses, strict=True)]).T
    exact = [normalise(r) == normalise(h) for r, h in zip(references, hypotheses, strict=True)]
    ones = np.ones(len(exact))
    result = {
        "n": len(exact),
        "wer": interval(errors, words, seed),
        "exact_match": interval(np.array(exact), ones, seed),
    }
    if intents is not None and classifier is not None:
        right = [classifier.classify(h) == intent for h, intent in zip(hypotheses, intents, strict=True)]
        result["intent_accuracy"] = interval(np.array(right), ones, seed)
    return result


def table(sets: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the scores of several sets as a plain-text table, in percent with 95% intervals."""
    columns = {"wer": "WER %", "exact_match": "exact match %", "intent_accuracy": "intent %"}
    columns = {key: title for key, title in columns.items() if any(key in scores for scores in sets.values())}

    def cell(value: Mapping[str, float] | None) -> str:
        if value is None:
            return "-"
        return f"{100 * value['value']:.1f} [{100 * value['low']:.1f}, {100 * value['high']:.1f}]"

    rows = [["set", "n", *columns.values()]]
    rows += [[name, str(scores["n"]), *(cell(scores.get(key)) for key in columns)] for name, scores in sets.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    pad = lambda i, text: text.ljust(widths[i]) if i == 0 else text.rjust(widths[i])
    return "\n".join("  ".join(pad(i, text) for i, text in enumerate(row)).rstrip() for row in rows)
