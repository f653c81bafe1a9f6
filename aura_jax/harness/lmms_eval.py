"""A run as a model of lmms-eval (github.com/EvolvingLMMs-Lab/lmms-eval): `--model aura_jax`.

The interface is that of a "simple" model of lmms-eval 0.7.3 (`lmms_eval/api/model.py`): a request's `args` are its
text, its generation settings or the answer to rate, a function from a document to its media, and where the document is.
"Chat" models get the messages instead, in which a clip of a dataset is called a video (`doc_to_messages` of
`lmms_eval/api/task.py`); audio tasks are written for simple ones.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from lmms_eval.api.instance import GenerationResult  # pyright: ignore[reportMissingImports]
from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
from tqdm import tqdm

from aura_jax.errors import UserError, nearest
from aura_jax.harness.respondent import Respondent, clip
from aura_jax.infer.prompting import Request
from aura_jax.infer.sampling import Sampling

_AT_A_TIME = 128  # clips in memory
_ARGUMENTS = ("workdir", "system", "which", "prompt", "batch_size")
_SETTINGS = (
    "max_new_tokens",
    "until",
    "do_sample",
    "temperature",
    "top_p",
    "repetition_penalty",
    "seed",
    "num_beams",
)


class AuraJax(lmms):
    """Answers lmms-eval's tasks: audio with text, or text alone."""

    is_simple = True

    def __init__(
        self,
        workdir: str | None = None,
        system: str = "student",
        which: str = "best",
        prompt: str | None = None,
        batch_size: int | str = 1,
        **others: Any,
    ):
        """
        Args:
          workdir, system, which: as `Respondent`.
          prompt: what stands beside audio in the place of the task's text; None: the task's text.
          batch_size: most requests answered together, of --batch_size; "auto": the run's `eval.batch_size`.
          others: what lmms-eval hands on of its command line and no one here takes.

        Raises:
          UserError: for arguments of another name, no workdir, a batch size that is no number, several processes, or as
            `Respondent`.
        """
        super().__init__()
        for name in others:
            raise UserError(
                f"aura_jax takes no {name!r}, on the command line or in --model_args: " + nearest(name, _ARGUMENTS)
            )
        if workdir is None:
            raise UserError("aura_jax answers with a run: add --model_args workdir=runs/quickstart")
        if batch_size != "auto" and not str(batch_size).isdecimal():
            raise UserError(f"--batch_size {batch_size}: give a number, or auto for the run's eval.batch_size")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError("aura_jax is one process, which takes all devices: start lmms-eval without a launcher")
        self._prompt = prompt
        self._respondent = Respondent(
            str(workdir), system=system, which=which, batch_size=None if batch_size == "auto" else int(batch_size)
        )

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Returns the answer to each request, in order, up to the first of its stop strings.

        Args:
          requests: `Instance`s whose `args` are text, generation settings, media of a document, its id, task, split.

        Raises:
          UserError: as `decoding_of`, `respondent.clip` and `Respondent.generate`, or for several clips at once.
        """
        groups: dict[Decoding, list[int]] = {}
        for place, instance in enumerate(requests):
            decoding = decoding_of(instance.args[1], self._respondent.max_new_tokens)
            groups.setdefault(decoding, []).append(place)
        size = max(1, _AT_A_TIME // self._respondent.batch_size) * self._respondent.batch_size
        answers = [""] * len(requests)
        with tqdm(total=len(requests), desc="aura_jax") as bar:
            for decoding, places in groups.items():
                for part in (places[start : start + size] for start in range(0, len(places), size)):
                    asked = [self._request(requests[place], place) for place in part]
                    replies = self._respondent.generate(
                        asked,
                        decoding.max_new_tokens,
                        sampling=decoding.sampling,
                        stop=decoding.until,
                        progress=bar.update,
                    )
                    for place, reply in zip(part, replies, strict=True):
                        answers[place] = reply.text
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """Returns the mean nats of each answer's tokens, and whether greedy decoding would write it.

        It is a loss, as other models of lmms-eval return it: its multiple choice takes the smallest.

        Args:
          requests: as of `generate_until`, with the answer, or a function from a document to it, as the second.

        Returns:
          `GenerationResult`s of pairs: of a bare pair the evaluator of 0.7.3 makes text (`unwrap_generation_output`).

        Raises:
          UserError: as `generate_until` and `Respondent.losses`.
        """
        found: list[Any] = []
        size = self._respondent.batch_size
        for start in tqdm(range(0, len(requests), size), desc="aura_jax"):
            part = requests[start : start + size]
            asked = [self._request(instance, start + i) for i, instance in enumerate(part)]
            answers = [_answer(instance, self.task_dict) for instance in part]
            found += map(GenerationResult, self._respondent.losses(asked, answers))
        return found

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Raises UserError: there is no task of several rounds with audio, and none is answered."""
        raise UserError(f"{requests[0].task_name}: a task of several rounds, of which aura_jax has none: leave it out")

    def _request(self, instance: Any, number: int) -> Request:
        text, _, media_of, doc_id, task, split = _arguments(instance)
        media = media_of(self.task_dict[task][split][doc_id]) or []
        if not media:
            return Request(prompt=text, number=number)
        name = f"{task}, document {doc_id}"
        if len(media) > 1:
            raise UserError(f"{name}: {len(media)} clips or pictures, and aura_jax hears one clip: leave the task out")
        return Request(clip(media[0], name), text if self._prompt is None else str(self._prompt), number=number)


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How a request is to be answered.

    Attributes:
      until: the answer ends before the first of them.
    """

    max_new_tokens: int
    sampling: Sampling
    until: tuple[str, ...]


def decoding_of(settings: Mapping[str, Any], max_new_tokens: int) -> Decoding:
    """Returns what a task's `generation_kwargs` ask for; what is None counts as not given.

    Tokens are drawn if there is a temperature, unless `do_sample` is false. What only drawing knows (`top_p`, `seed`)
    says nothing where none is done.

    Args:
      max_new_tokens: where the task does not say.

    Raises:
      UserError: for a setting that is unknown or out of range.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    for name in given:
        if name not in _SETTINGS:
            raise UserError(
                f"aura_jax knows no generation setting {name!r} (generation_kwargs): {nearest(name, _SETTINGS)}"
            )
    if given.get("num_beams", 1) != 1:
        raise UserError(f"num_beams {given['num_beams']}: there is no beam search: add --gen_kwargs num_beams=1")
    until = given.get("until", ())
    until = (until,) if isinstance(until, str) else tuple(until)
    if not all(isinstance(stop, str) for stop in until):
        raise UserError(f"until {until!r}: give strings")
    until = tuple(stop for stop in until if stop)  # tasks write "" where nothing is meant
    n_new = given.get("max_new_tokens", max_new_tokens)
    if not isinstance(n_new, int) or n_new < 1:
        raise UserError(f"max_new_tokens {n_new}: give a whole number from 1 on")
    draws = given.get("do_sample", True)
    temperature = float(given.get("temperature", 1.0 if "do_sample" in given else 0.0)) if draws else 0.0
    sampling = Sampling(
        temperature=temperature,
        top_p=float(given.get("top_p", 1.0)) if temperature else 1.0,
        repetition_penalty=float(given.get("repetition_penalty", 1.0)),
        seed=given.get("seed", 0) if temperature else 0,
    )
    return Decoding(n_new, sampling, until)


def _answer(instance: Any, documents: Mapping[str, Any]) -> str:
    """Returns the answer to rate. It begins the assistant's turn, so that the blank that parts it from text goes."""
    _, answer, _, doc_id, task, split = _arguments(instance)
    return (answer if isinstance(answer, str) else answer(documents[task][split][doc_id])).lstrip()


def _arguments(instance: Any) -> tuple[Any, ...]:
    if len(instance.args) != 6:
        raise UserError(
            f"{instance.task_name}: a request of {len(instance.args)} parts, not lmms-eval's 6: leave the metric "
            "acc_mutual_info out, which asks without a document"
        )
    return instance.args
