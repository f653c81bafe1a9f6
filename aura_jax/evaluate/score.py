"""Scores of answers: error rates of words and characters, exact match, intents, BLEU, questions answered.

Each has a bootstrap interval.

Texts are compared after the normaliser of Whisper's authors (arXiv 2212.04356, appendix C): case, punctuation,
spelling, numerals and fillers do not count. It makes some texts empty ("#", "mm"): those have no words to miss, and
whatever is heard there counts as inserted. BLEU takes the texts as they are.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

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


def character_errors(reference: str, hypothesis: str) -> tuple[int, int]:
    """Returns (characters substituted, inserted or deleted; characters of the reference), normalised, with spaces."""
    characters = normalise(reference)
    return Levenshtein.distance(characters, normalise(hypothesis)), len(characters)


class Accepted(NamedTuple):
    """The forms of a right answer to a question, such as ("twelve", "a dozen")."""

    forms: tuple[str, ...]

    @property
    def answer(self) -> str:
        """The first form."""
        return self.forms[0]

    def answered_by(self, text: str) -> bool:
        """Whether `text` holds one of the forms as whole words, all of them normalised."""
        words = f" {normalise(text)} "
        return any(f" {normalise(form)} " in words for form in self.forms)


def read_accepted(values: Mapping[str, Any], where: str) -> Accepted | None:
    """Returns the right answers that a row of a manifest has by its key "answers"; None if it has none.

    Args:
      values: the row's keys, `Row.extra`.
      where: the row's place, for errors.

    Raises:
      UserError: they are not a list of texts, or one has no words for the normaliser.
    """
    if "answers" not in values:
        return None
    forms = values["answers"]
    if not isinstance(forms, list) or not forms or not all(isinstance(form, str) for form in forms):
        raise UserError(f'{where}: \'answers\' is not a list of texts: give ["...", "..."], any of which is right')
    for form in forms:
        if not normalise(form):
            raise UserError(f"{where}: 'answers' has {form!r}, of which the normaliser leaves no word: drop it")
    return Accepted(tuple(forms))


def _resamples(n: int, seed: int, n_resamples: int) -> Iterator[np.ndarray]:
    """Yields the utterances of each resample: one at a time, so that a million need no matrix of a thousand million."""
    random = np.random.default_rng(seed)
    for _ in range(n_resamples):
        yield random.integers(0, n, n)


def _bounds(values: Sequence[float]) -> dict[str, float]:
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return {"low": float(low), "high": float(high)}


def interval(
    numerator_N: np.ndarray, denominator_N: np.ndarray, seed: int = 0, n_resamples: int = N_RESAMPLES
) -> dict[str, Any]:
    """Returns sum(numerator) / sum(denominator) with its percentile bootstrap interval over utterances.

    Args:
      numerator_N, denominator_N: of each utterance. A sum of 0 below is counted as 1: one error where there is nothing
        to hear is an error rate of 1.
      seed: of the resampling.

    Returns:
      {"value", "low", "high", "n"}: low and high bound the middle 95% of the resamples; n utterances.
    """
    numerator_N, denominator_N = np.asarray(numerator_N, np.float64), np.asarray(denominator_N, np.float64)
    ratio = lambda top, bottom: top / np.maximum(bottom, 1)
    values = [
        ratio(numerator_N[index].sum(), denominator_N[index].sum())
        for index in _resamples(len(numerator_N), seed, n_resamples)
    ]
    value = ratio(numerator_N.sum(), denominator_N.sum())
    return {"value": float(value), **_bounds(values), "n": len(numerator_N)}


def bleu(
    references: Sequence[str], hypotheses: Sequence[str], seed: int = 0, n_resamples: int = N_RESAMPLES
) -> dict[str, Any]:
    """Returns the corpus BLEU of sacrebleu (arXiv 1804.08771) with its percentile bootstrap interval over sentences.

    Of tokenizer 13a with exponential smoothing, which are sacrebleu's defaults: case and punctuation count. 13a splits
    no words of languages that are written without spaces.

    Args:
      references, hypotheses: a sentence each, as it is to be read.
      seed: of the resampling.

    Returns:
      {"value", "low", "high", "n"}, from 0 to 100 as BLEU is always given.
    """
    from sacrebleu.metrics.bleu import BLEU

    metric = BLEU(force=True)  # texts that look tokenized are none of our business
    found = [metric.corpus_score([h], [[r]]) for r, h in zip(references, hypotheses, strict=True)]
    # All that BLEU depends on are sums over sentences, so that a resample costs next to nothing.
    counts_Nx10 = np.array([[one.sys_len, one.ref_len, *one.counts, *one.totals] for one in found])

    def of(total: np.ndarray) -> float:
        n_hypothesis, n_reference, *counts = total.tolist()
        n = len(counts) // 2
        return metric.compute_bleu(counts[:n], counts[n:], n_hypothesis, n_reference, metric.smooth_method).score

    values = [of(counts_Nx10[index].sum(0)) for index in _resamples(len(found), seed, n_resamples)]
    return {"value": of(counts_Nx10.sum(0)), **_bounds(values), "n": len(found)}


class IntentClassifier:
    """The intent of a transcript: that of the nearest training sentence by word edit distance.

    Several sentences may be equally near: the intent that most of them have, then the first in the alphabet. A correct
    transcript of a sentence that was never trained on may be nearest to another intent, so that 100% can be out of
    reach there.

    Attributes:
      examples: (normalised sentence, intent) pairs, sorted.
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
        self.examples = sorted({(normalise(text), intent) for text, intent in examples})
        self._words = [text.split() for text, _ in self.examples]
        self.classify = functools.lru_cache(maxsize=1 << 16)(self._classify)

    def _classify(self, text: str) -> str:
        """Returns the intent of `text`."""
        words = normalise(text).split()
        distances = [Levenshtein.distance(words, other) for other in self._words]
        nearest = min(distances)
        pairs = zip(distances, self.examples, strict=True)
        votes = Counter(intent for distance, (_, intent) in pairs if distance == nearest)
        return min(votes, key=lambda intent: (-votes[intent], intent))


def score(
    references: Sequence[str],
    hypotheses: Sequence[str],
    intents: Sequence[str | None] = (),
    classifier: IntentClassifier | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Scores a set of utterances.

    Args:
      references, hypotheses: what was said, and what was heard.
      intents: of each utterance, None where it has none; with `classifier`, intent accuracy is reported too, over the
        utterances that have one. Empty: none has.

    Returns:
      {"n", "wer": of `interval`, "cer": ..., "exact_match": ..., "intent_accuracy": ...}, rates as fractions. WER and
      CER are over the set (all errors over all words, or characters), and may exceed 1.

    Raises:
      UserError: for an empty set.
      ValueError: if the lengths differ.
    """
    if not references:
        raise UserError("no utterances to score: the set is empty")
    pairs = list(zip(references, hypotheses, strict=True))
    words_2xN = np.array([word_errors(*pair) for pair in pairs]).T
    characters_2xN = np.array([character_errors(*pair) for pair in pairs]).T
    exact = [normalise(r) == normalise(h) for r, h in pairs]
    ones = np.ones(len(exact))
    result = {
        "n": len(exact),
        "wer": interval(words_2xN[0], words_2xN[1], seed),
        "cer": interval(characters_2xN[0], characters_2xN[1], seed),
        "exact_match": interval(np.array(exact), ones, seed),
    }
    if classifier is not None:
        known = [(h, intent) for h, intent in zip(hypotheses, intents, strict=bool(intents)) if intent is not None]
        if known:
            right = np.array([classifier.classify(h) == intent for h, intent in known])
            result["intent_accuracy"] = interval(right, np.ones(len(right)), seed)
    return result


def score_answered(hypotheses: Sequence[str], questions: Sequence[Accepted], seed: int = 0) -> dict[str, Any]:
    """Returns {"answered": of `interval`}: the share of the questions whose answer holds a right one (`Accepted`)."""
    right = [question.answered_by(text) for text, question in zip(hypotheses, questions, strict=True)]
    return {"answered": interval(np.array(right), np.ones(len(right)), seed)}


# Every score that a set may have: its title, and what it is multiplied by to be shown.
ERRORS = frozenset({"wer", "cer", "unparsable"})  # of all scores, these are better when they are lower
COLUMNS = {
    "wer": ("WER %", 100),
    "cer": ("CER %", 100),
    "exact_match": ("exact match %", 100),
    "intent_accuracy": ("intent %", 100),
    "bleu": ("BLEU", 1),
    "multiple_choice": ("multiple choice %", 100),
    "unparsable": ("unparsable %", 100),
    "answered": ("answered %", 100),
}


def table(sets: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns whatever scores the sets have as a plain-text table, rates in percent, with 95% intervals."""
    columns = [key for key in COLUMNS if any(key in scores for scores in sets.values())]

    def cell(scores: Mapping[str, Any], key: str) -> str:
        if key not in scores:
            return "-"
        scale = COLUMNS[key][1]
        value, low, high = (scale * scores[key][name] for name in ("value", "low", "high"))
        return f"{value:.1f} [{low:.1f}, {high:.1f}]"

    rows = [["set", "n", *(COLUMNS[key][0] for key in columns)]]
    rows += [[name, str(scores["n"]), *(cell(scores, key) for key in columns)] for name, scores in sets.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    pad = lambda i, text: text.ljust(widths[i]) if i == 0 else text.rjust(widths[i])
    return "\n".join("  ".join(pad(i, text) for i, text in enumerate(row)).rstrip() for row in rows)
