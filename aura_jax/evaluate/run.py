"""Decodes a whole set and scores it: one function for the command line, periodic evaluation and reports."""

import dataclasses
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from aura_jax import hosts
from aura_jax.audio.features import SAMPLE_RATE
from aura_jax.audio.io import AudioError, load_audio
from aura_jax.config import Config
from aura_jax.data.manifest import Row, clip_samples, load_manifest
from aura_jax.errors import UserError
from aura_jax.evaluate.score import IntentClassifier, score
from aura_jax.infer.generate import Reply, Request

_AT_A_TIME = 128  # clips in memory
_READERS = 4  # threads


class Answers(Protocol):
    """What is evaluated: `infer.generate.Generator`, `infer.cascade.Cascade`, or another with their `generate`."""

    batch_size: int

    def generate(self, requests: Sequence[Request], progress: Callable[[int], Any] | None = None) -> list[Reply]: ...


@dataclasses.dataclass(frozen=True)
class Output:
    """One utterance: its row's id, what was to be said, and what the system said."""

    id: str
    reference: str
    hypothesis: str


@dataclasses.dataclass(frozen=True)
class Result:
    """A set's evaluation.

    Attributes:
      scores: of `score.score`.
      outputs: in the order of the rows.
      unreadable: what is wrong with each clip that was left out.
      audio_seconds, seconds: of the clips, and of wall time for decoding them, compilation included.
    """

    scores: dict[str, Any]
    outputs: list[Output]
    unreadable: list[str]
    audio_seconds: float
    seconds: float


def evaluate_set(
    answers: Answers,
    rows: Sequence[Row],
    *,
    name: str = "evaluation",
    classifier: IntentClassifier | None = None,
    skip_unreadable: bool = False,
    progress: bool = True,
) -> Result:
    """Answers every row and scores the answers against what the rows want said.

    Args:
      answers: the system.
      rows: of a manifest; a row's own prompt and history are used. Chat rows without audio are answered too.
      name: of the progress bar.
      classifier: with it, rows with an `intent` get intent accuracy.
      skip_unreadable: leave clips that cannot be read out, rather than raise.
      progress: show a progress bar on standard error.

    Raises:
      UserError: for plain text among the rows, nothing left to score, or a clip that cannot be read.
    """
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
            read = list(pool.map(_request, [rows[i] for i in part]))
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
    outputs = [Output(rows[i].id, rows[i].target, replies[i]) for i in heard]
    intents = [rows[i].extra.get("intent") for i in heard]
    scores = score(
        [o.reference for o in outputs],
        [o.hypothesis for o in outputs],
        [str(intent) for intent in intents] if None not in intents else None,
        classifier,
    )
    return Result(scores, outputs, unreadable, n_samples / SAMPLE_RATE, seconds)


def evaluate_sets(
    answers: Answers, sets: Mapping[str, str | Path], config: Config
) -> tuple[dict[str, dict[str, Any]], dict[str, list[dict[str, str]]]]:
    """Evaluates named manifests; returns the scores of each, and {set: [{"id", "reference", "hypothesis"}, ...]}.

    Intents are classified by the sentences of the run's training data, as long as those can be read.

    Raises:
      UserError: as `evaluate_set`, or a manifest is missing or malformed.
    """
    rows = {name: load_manifest(path) for name, path in sets.items()}
    classifier = None
    if any("intent" in row.extra for of_set in rows.values() for row in of_set):
        try:
            classifier = intent_classifier(path for path, _ in config.data.train)
        except UserError as error:  # the training data may have moved, and the rest is worth having
            print(f"intent accuracy is left out: {error}", file=sys.stderr)
    results = {name: evaluate_set(answers, rows[name], name=name, classifier=classifier) for name in rows}
    scores = {name: result.scores for name, result in results.items()}
    return scores, {name: [dataclasses.asdict(output) for output in result.outputs] for name, result in results.items()}


def _request(row: Row) -> Request | AudioError:
    if row.audio is None:
        return Request(prompt=row.prompt, history=row.history)
    try:
        return Request(load_audio(row.audio), row.prompt, row.history)
    except AudioError as error:
        return error


def intent_classifier(manifests: Iterable[str | Path]) -> IntentClassifier | None:
    """Returns the classifier of the training manifests' sentences; None if none of their rows has an `intent`."""
    rows = [row for path in manifests for row in load_manifest(path)]
    examples = [(row.text, str(row.extra["intent"])) for row in rows if row.text and "intent" in row.extra]
    return IntentClassifier(examples) if examples else None
