"""Decodes a whole set and scores it: one function for the command line, periodic evaluation and reports."""

import dataclasses
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from tqdm import tqdm

from aura_jax import hosts
from aura_jax.audio.features import SAMPLE_RATE
from aura_jax.audio.io import AudioError, load_audio
from aura_jax.config import Config
from aura_jax.data.manifest import Row, clip_samples, load_manifest
from aura_jax.errors import UserError, nearest
from aura_jax.evaluate.choices import Choices, read_choices, score_choices
from aura_jax.evaluate.kept import Kept, identity
from aura_jax.evaluate.score import Accepted, IntentClassifier, bleu, read_accepted, score, score_answered
from aura_jax.infer.generate import Reply
from aura_jax.infer.prompting import Request

_AT_A_TIME = 128  # clips in memory
_READERS = 4  # threads


class Answers(Protocol):
    """What is evaluated: `infer.generate.Generator`, `infer.transcriber.Transcriber`, or another with their `generate`.

    One with a true attribute `reads` is given the transcript of each row in the place of its clip.
    """

    batch_size: int

    def generate(self, requests: Sequence[Request], progress: Callable[[int], Any] | None = None) -> list[Reply]: ...


@dataclasses.dataclass(frozen=True)
class Output:
    """One utterance: its row's id, what was to be said, and what the system said.

    The reference of multiple choice is the right choice, such as "B. Paris"; that of a question the first of `answers`.
    """

    id: str
    reference: str
    hypothesis: str


@dataclasses.dataclass(frozen=True)
class Result:
    """A set's evaluation.

    Attributes:
      scores: "n", and those of `score.score`, of `score.bleu` ("bleu"), of `choices.score_choices` and of
        `score.score_answered`, each over the rows that are scored so (`how_scored`), if there are any.
      outputs: in the order of the rows.
      unreadable: what is wrong with each clip that was left out.
      audio_seconds, seconds: of the clips, and of wall time for decoding them, compilation included.
    """

    scores: dict[str, Any]
    outputs: list[Output]
    unreadable: list[str]
    audio_seconds: float
    seconds: float


def how_scored(row: Row) -> Choices | Accepted | Literal["bleu", "text"]:
    """Returns how a row of a manifest is to be scored by its keys "choices" with "answer", "answers", and "metric".

    Returns:
      its choices; its accepted answers; "bleu", for `"metric": "bleu"`; "text" without these keys: all that
      `score.score` has.

    Raises:
      UserError: as `choices.read_choices` and `score.read_accepted`, for another metric, two ways at once, or a
        translation without `response`.
    """
    named = [key for key in ("choices", "answers", "metric") if row.extra.get(key) is not None]
    if len(named) > 1:
        both = " and ".join(map(repr, named[:2]))
        raise UserError(f"{row.where}: both {both}: a row is scored in one way, drop one of them")
    metric = row.extra.get("metric")
    if metric is None:
        return read_choices(row.extra, row.where) or read_accepted(row.extra, row.where) or "text"
    if metric != "bleu":
        raise UserError(f"{row.where}: unknown 'metric' {metric!r}: {nearest(str(metric), ['bleu'])}")
    if row.response is None:
        raise UserError(f"{row.where}: 'metric' is bleu, and there is no 'response': give the translation there")
    return "bleu"


def evaluate_set(
    answers: Answers,
    rows: Sequence[Row],
    *,
    name: str = "evaluation",
    classifier: IntentClassifier | None = None,
    skip_unreadable: bool = False,
    progress: bool = True,
    change: Callable[[Row, np.ndarray], np.ndarray] | None = None,
    by_row: bool = True,
) -> Result:
    """Answers every row and scores the answers against what the rows want said.

    Args:
      answers: the system.
      rows: of a manifest; a row's own prompt and history are used. Chat rows without audio are answered too.
      name: of the progress bar.
      classifier: with it, rows with an `intent` get intent accuracy.
      skip_unreadable: leave clips that cannot be read out, rather than raise.
      progress: show a progress bar on standard error.
      change: what the system hears of a row's clip, float32 at 16 kHz; None: the clip. It is called in threads.
      by_row: score every row as it asks for; False: all of them as text, against their targets.

    Raises:
      UserError: for plain text among the rows, nothing left to score, a clip that cannot be read, or as `how_scored`.
    """
    reads = getattr(answers, "reads", False)
    request_of = written_request if reads else lambda row: read_request(row, change)
    ways = [how_scored(row) if by_row else "text" for row in rows]
    for row in rows:
        if row.is_plain_text:
            raise UserError(f"{row.where}: plain text has no answer to score: evaluate speech or chat rows")
    # Shortest first: the clips of a batch are about equally long.
    order = np.argsort(np.asarray(clip_samples(rows)), kind="stable") if rows else []
    replies: dict[int, str] = {}
    unreadable: list[str] = []
    n_samples, seconds = 0, 0.0
    size = max(1, _AT_A_TIME // answers.batch_size) * answers.batch_size
    with (
        ThreadPoolExecutor(_READERS) as pool,
        tqdm(total=len(rows), desc=name, unit="row", disable=not progress) as bar,
    ):
        for start in range(0, len(order), size):
            places, requests = [], []
            part = [int(i) for i in order[start : start + size]]
            read = list(pool.map(request_of, [rows[i] for i in part]))
            # What one host cannot read, none decodes: they do it together.
            lost = hosts.anywhere([isinstance(request, AudioError) for request in read])
            for place, request, is_lost in zip(part, read, lost, strict=True):
                if isinstance(request, AudioError) and not skip_unreadable:
                    raise request
                if is_lost or isinstance(request, AudioError):
                    unreadable.append(
                        f"{rows[place].where}: {request if isinstance(request, AudioError) else 'elsewhere'}"
                    )
                    bar.update()
                else:
                    places.append(place)
                    requests.append(request)
                    n_samples += 0 if request.waveform is None else len(request.waveform)
            clock = time.perf_counter()
            for place, reply in zip(places, answers.generate(requests, bar.update), strict=True):
                replies[place] = reply.text
            seconds += time.perf_counter() - clock
    heard = [i for i in range(len(rows)) if i in replies]
    if not heard:
        raise UserError(f"{name}: no row to evaluate")
    wanted = [row.target if isinstance(way, str) else way.answer for way, row in zip(ways, rows, strict=True)]
    outputs = [Output(rows[i].id, wanted[i], replies[i]) for i in heard]
    scores = _scores([rows[i] for i in heard], [ways[i] for i in heard], outputs, classifier)
    return Result(scores, outputs, unreadable, n_samples / SAMPLE_RATE, seconds)


def _compared(row: Row, output: Output) -> str:
    """Returns the answer, and of one that is to be like a response that was cut, as many words as that has."""
    if row.ended or output.reference != row.target:
        return output.hypothesis
    return " ".join(output.hypothesis.split()[: len(row.target.split())])


def _scores(
    rows: Sequence[Row],
    ways: Sequence[Choices | Accepted | str],
    outputs: Sequence[Output],
    classifier: IntentClassifier | None,
) -> dict[str, Any]:
    scores: dict[str, Any] = {"n": 0}
    text, translated, chosen, asked = [], [], [], []
    for i, way in enumerate(ways):
        if isinstance(way, str):
            (translated if way == "bleu" else text).append(i)
        else:
            (chosen if isinstance(way, Choices) else asked).append(i)
    of = lambda places: ([outputs[i].reference for i in places], [_compared(rows[i], outputs[i]) for i in places])
    if text:
        intents = [rows[i].extra.get("intent") for i in text]
        scores |= score(*of(text), [None if intent is None else str(intent) for intent in intents], classifier)
    if translated:
        scores["bleu"] = bleu(*of(translated))
    if chosen:
        scores |= score_choices(of(chosen)[1], [way for way in ways if isinstance(way, Choices)])
    if asked:
        scores |= score_answered(of(asked)[1], [way for way in ways if isinstance(way, Accepted)])
    scores["n"] = len(outputs)
    return scores


def evaluate_sets(
    answers: Answers, sets: Mapping[str, str | Path], config: Config, kept: Kept | None = None
) -> tuple[dict[str, dict[str, Any]], dict[str, list[dict[str, str]]]]:
    """Evaluates named manifests; returns the scores of each, and {set: [{"id", "reference", "hypothesis"}, ...]}.

    Intents are classified by the sentences of the run's training data, as long as those can be read.

    Args:
      kept: where the results of each set are kept as soon as it is finished, and found again; None: nowhere.

    Raises:
      UserError: as `evaluate_set`, or a manifest is missing or malformed; before anything is decoded.
    """
    rows = {name: load_manifest(path) for name, path in sets.items()}
    return evaluate_rows(answers, rows, training_classifier(rows, config), kept)


def evaluate_rows(
    answers: Answers, sets: Mapping[str, Sequence[Row]], classifier: IntentClassifier | None, kept: Kept | None
) -> tuple[dict[str, dict[str, Any]], dict[str, list[dict[str, str]]]]:
    """As `evaluate_sets`, of named rows of manifests."""
    for of_set in sets.values():
        for row in of_set:
            how_scored(row)
    scores, transcripts = {}, {}
    for name, of_set in sets.items():
        found = evaluate_kept(answers, of_set, [name], kept, classifier=classifier)
        scores[name], transcripts[name] = found["scores"], found["outputs"]
    return scores, transcripts


def evaluate_kept(
    answers: Answers,
    rows: Sequence[Row],
    name: Sequence[str],
    kept: Kept | None,
    *,
    classifier: IntentClassifier | None = None,
    change: Callable[[Row, np.ndarray], np.ndarray] | None = None,
) -> dict[str, Any]:
    """Returns {"scores", "outputs": [{"id", "reference", "hypothesis"}, ...]} of `evaluate_set`, kept if so asked.

    Args:
      name: of the set, and of how it is heard: what `change` does must not depend on anything else.
    """

    def evaluate() -> dict[str, Any]:
        result = evaluate_set(answers, rows, name=", ".join(name), classifier=classifier, change=change)
        return {"scores": result.scores, "outputs": [dataclasses.asdict(output) for output in result.outputs]}

    if kept is None:
        return evaluate()
    data = [identity(rows), classifier.examples if classifier else None]
    return kept.part(["sets", *name], data, evaluate)


def read_request(row: Row, change: Callable[[Row, np.ndarray], np.ndarray] | None = None) -> Request | AudioError:
    """Returns the request that a row makes, with its clip changed by `change`, or what is wrong with a clip."""
    if row.audio is None:
        return Request(prompt=row.prompt, history=row.history)
    try:
        waveform = load_audio(row.audio)
        waveform = waveform if change is None else change(row, waveform)
        # A question wants its answer, whether or not that is written down as a response.
        wants_transcript = row.response is None and not {"choices", "answers"} & row.extra.keys()
        return Request(waveform, row.prompt, row.history, wants_transcript=wants_transcript)
    except AudioError as error:
        return error


def written_request(row: Row) -> Request:
    """Returns the request that a row makes with its transcript in the place of its clip.

    Raises:
      UserError: there is no transcript.
    """
    if row.audio is None:
        return Request(prompt=row.prompt, history=row.history)
    if not row.text:
        raise UserError(f"{row.where}: no 'text' for the oracle to read: add the transcript")
    return Request(prompt=row.prompt, history=row.history, transcript=row.text)


def training_classifier(sets: Mapping[str, Sequence[Row]], config: Config) -> IntentClassifier | None:
    """Returns the classifier of the training data's sentences; None if no row has an `intent`, or they are gone."""
    if not any("intent" in row.extra for rows in sets.values() for row in rows):
        return None
    try:
        return intent_classifier(path for path, _ in config.data.train)
    except UserError as error:  # the training data may have moved, and the rest is worth having
        print(f"intent accuracy is left out: {error}", file=sys.stderr)
        return None


def intent_classifier(manifests: Iterable[str | Path]) -> IntentClassifier | None:
    """Returns the classifier of the training manifests' sentences; None if none of their rows has an `intent`."""
    rows = [row for path in manifests for row in load_manifest(path)]
    examples = [(row.text, str(row.extra["intent"])) for row in rows if row.text and "intent" in row.extra]
    return IntentClassifier(examples) if examples else None
