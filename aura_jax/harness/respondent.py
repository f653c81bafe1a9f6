"""What answers for a harness: a run, or the cascade of its base models, however long each answer may be.

Dimensions: B rows, R tokens of an answer, D width, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aura_jax import assets, checkpoint
from aura_jax import config as config_lib
from aura_jax.audio.io import AudioError, from_samples, load_audio
from aura_jax.errors import UserError, nearest
from aura_jax.infer.cascade import Cascade, whisper_of
from aura_jax.infer.generate import Generator, Reply, plain_generator
from aura_jax.infer.prompting import Request
from aura_jax.infer.sampling import GREEDY, Sampling
from aura_jax.infer.transcriber import Transcriber

SYSTEMS = ("student", "cascade")
_CHECKPOINTS = ("best", "latest")


class Respondent:
    """Answers requests with a run's model, or with its Whisper and plain LLM.

    The weights are loaded once; each longest answer is a program of its own.

    Attributes:
      batch_size: most requests answered together.
      max_new_tokens: the run's own longest answer, `eval.max_new_tokens`.
    """

    def __init__(
        self,
        workdir: str | Path,
        *,
        system: str = "student",
        which: str = "best",
        batch_size: int | None = None,
    ):
        """
        Args:
          workdir: of a run.
          system: "student", the run's model; "cascade", its Whisper's transcripts answered by its plain LLM.
          which: the student's checkpoint, "best" by validation or "latest".
          batch_size: most requests answered together; None: `eval.batch_size`.

        Raises:
          UserError: for another system or checkpoint, or as `checkpoint.load_for_inference`, `Generator` and, for a
            cascade, `whisper_of` and `Transcriber`.
        """
        workdir = Path(workdir)
        for name, value, valid in (("system", system, SYSTEMS), ("which", which, _CHECKPOINTS)):
            if value not in valid:
                raise UserError(f"{name}={value}: {nearest(value, valid)}")
        overrides = [] if batch_size is None else [f"--config.eval.batch_size={batch_size}"]
        self._transcriber: Transcriber | None = None
        if system == "student":
            self._system, self._variables = checkpoint.load_for_inference(workdir, which, overrides)
        else:
            if which != "best":
                raise UserError(f"which={which} names a checkpoint, and a cascade has none: leave it out")
            config = config_lib.from_json(workdir / "config.json")
            config = config_lib.override(config, overrides, checkpoint.INFERENCE_KEYS)
            whisper = assets.resolve(whisper_of(config))
            plain = plain_generator(config)
            self._system, self._variables = plain.system, plain.variables
            self._transcriber = Transcriber(whisper, batch_size=config.eval.batch_size)
        self._generators: dict[int, Generator] = {}
        self.max_new_tokens: int = self._system.config.eval.max_new_tokens
        self.batch_size = self.generator(self.max_new_tokens).batch_size

    def generator(self, max_new_tokens: int) -> Generator:
        """Returns the speech LLM, or the cascade's plain one, that writes at most so many tokens."""
        if max_new_tokens not in self._generators:
            on_text = None if self._transcriber is None else False
            self._generators[max_new_tokens] = Generator(
                self._system, self._variables, max_new_tokens=max_new_tokens, adapters_on_text=on_text
            )
        return self._generators[max_new_tokens]

    def generate(
        self,
        requests: Sequence[Request],
        max_new_tokens: int,
        *,
        sampling: Sampling = GREEDY,
        stop: Sequence[str] = (),
        progress: Callable[[int], Any] | None = None,
    ) -> list[Reply]:
        """Returns the answer to each request, in order. A cascade's LLM answers those without audio as they are.

        Args:
          requests: spoken and written ones.
          sampling, stop, progress: as `Generator.generate`.

        Raises:
          UserError: as `Generator.generate` and `Cascade.generate`.
        """
        generator = self.generator(max_new_tokens)
        if self._transcriber is None:
            return generator.generate(requests, progress, sampling, stop)
        numbered = [
            request if request.number is not None else dataclasses.replace(request, number=i)
            for i, request in enumerate(requests)
        ]
        replies: dict[int, Reply] = {}
        for places, answers in zip(_by_kind(numbered), (Cascade(self._transcriber, generator), generator), strict=True):
            found = answers.generate([numbered[i] for i in places], progress, sampling, stop)
            replies.update(zip(places, found, strict=True))
        return [replies[i] for i in range(len(requests))]

    def losses(self, requests: Sequence[Request], answers: Sequence[str]) -> list[tuple[float, bool]]:
        """Reads given answers after their requests.

        Args:
          requests: at most `batch_size`.
          answers: not empty; the end of the turn is not read.

        Returns:
          for each, the mean nats of its tokens, and whether each is the likeliest after those before it.

        Raises:
          UserError: for a cascade, an answer without tokens, or as `Generator.generate`.
        """
        if self._transcriber is not None:
            raise UserError("a cascade writes answers and rates none: use system=student, or tasks that generate")
        tokens = [self._system.chat.text(answer) for answer in answers]
        if not all(tokens):
            raise UserError("an empty answer has no likelihood: take it out of the task's choices")
        generator, found = self.generator(self.max_new_tokens), {}
        for places in _by_kind(requests):
            if not places:
                continue
            states_BxRxD = generator.answer_states([requests[i] for i in places], [tokens[i] for i in places])
            id_BxR = np.full(states_BxRxD.shape[:2], -1, np.int32)
            for id_R, i in zip(id_BxR, places, strict=False):
                id_R[: len(tokens[i])] = tokens[i]
            params = {"params": self._variables["params"]}
            nats_B, likeliest_B = _compare(params, states_BxRxD, id_BxR, model=self._system.model)
            pairs = zip(np.asarray(nats_B).tolist(), np.asarray(likeliest_B).tolist(), strict=True)
            found.update(zip(places, pairs, strict=False))
        return [found[i] for i in range(len(requests))]


def clip(audio: Any, name: str) -> np.ndarray:
    """Returns what a harness calls audio as a waveform, float32 [samples] at 16 kHz.

    Args:
      audio: the path of a file, or something with an "array" of one channel and its "sampling_rate", as `datasets` has
        it (a dictionary, or what decodes when it is asked).
      name: what an error calls it.

    Raises:
      UserError: it is neither, or as `audio.io.load_audio` and `audio.io.from_samples`.
    """
    if isinstance(audio, (str, Path)):
        return load_audio(audio)
    try:
        samples, rate = audio["array"], audio["sampling_rate"]
    except (KeyError, TypeError, AttributeError):
        raise AudioError(
            f"{name}: {type(audio).__name__}, not audio: aura_jax takes 'array' with 'sampling_rate', or a path"
        ) from None
    return from_samples(np.asarray(samples), rate, name=name)


def _by_kind(requests: Sequence[Request]) -> tuple[list[int], list[int]]:
    """Returns the places of the spoken requests, and of the others."""
    spoken = [i for i, request in enumerate(requests) if request.waveform is not None]
    return spoken, [i for i, request in enumerate(requests) if request.waveform is None]


@functools.partial(jax.jit, static_argnames="model")
def _compare(
    params: Mapping[str, Any], states_BxRxD: jax.Array, id_BxR: np.ndarray, *, model: Any
) -> tuple[jax.Array, jax.Array]:
    """Returns the mean nats [B] of each row's tokens, and whether all of them are the likeliest [B]; -1 is no token."""

    def row(states_and_ids: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        h_RxD, id_R = states_and_ids
        logits_RxV = model.apply(params, h_RxD, method="logits")
        is_token_R = id_R >= 0
        nats_R = -jnp.take_along_axis(jax.nn.log_softmax(logits_RxV), jnp.maximum(id_R, 0)[:, None], axis=-1)[:, 0]
        likeliest_R = jnp.argmax(logits_RxV, axis=-1) == id_R
        return jnp.mean(nats_R, where=is_token_R), jnp.all(likeliest_R | ~is_token_R)

    return jax.lax.map(row, (states_BxRxD, jnp.asarray(id_BxR)))  # one row's logits at a time
