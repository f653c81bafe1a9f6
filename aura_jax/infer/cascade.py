"""Systems that nothing trains: Whisper's transcript answered by the plain LLM, and the true one answered by it."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from aura_jax.config import Config
from aura_jax.errors import UserError
from aura_jax.infer.generate import Generator, Reply
from aura_jax.infer.prompting import Request
from aura_jax.infer.sampling import GREEDY, Sampling
from aura_jax.infer.transcriber import Transcriber


class Cascade:
    """Whisper writes down what it hears, and the LLM answers the text.

    Attributes:
      batch_size: most requests decoded together.
    """

    def __init__(self, transcriber: Transcriber, generator: Generator):
        """
        Args:
          generator: of the plain LLM: its adapters, if it has any, do not act on text.
        """
        self._transcriber, self._generator = transcriber, generator
        self.batch_size = transcriber.batch_size

    def generate(
        self,
        requests: Sequence[Request],
        progress: Callable[[int], Any] | None = None,
        sampling: Sampling = GREEDY,
        stop: Sequence[str] = (),
    ) -> list[Reply]:
        """Returns the answer to each spoken request, in order; the transcript where that is what is wanted.

        Args:
          requests: with audio, each one clip.
          progress: called after each batch with the number of requests in it.
          sampling: how the LLM picks its tokens; Whisper's are always the likeliest.
          stop: of the LLM's answer, as of `Generator.generate`.

        Raises:
          UserError: as `Transcriber.generate` and `Generator.generate`.
        """
        if any("audio" in turn for request in requests for turn in request.history):
            raise UserError("a cascade hears one clip: give the earlier turns of its request as text")
        heard = self._transcriber.generate([Request(request.waveform) for request in requests], progress)
        answered = [i for i, request in enumerate(requests) if not request.wants_transcript]
        written = [
            dataclasses.replace(requests[i], waveform=None, transcript=heard[i].text, number=_number(requests[i], i))
            for i in answered
        ]
        for i, reply in zip(answered, self._generator.generate(written, sampling=sampling, stop=stop), strict=True):
            heard[i] = dataclasses.replace(reply, seconds=heard[i].seconds + reply.seconds)
        return heard


class Oracle:
    """The plain LLM reads what was truly said: the best that a cascade can do.

    Attributes:
      batch_size: most requests decoded together.
      reads: it is given the transcript of a row in the place of its clip.
    """

    reads = True

    def __init__(self, generator: Generator):
        """
        Args:
          generator: as of `Cascade`.
        """
        self._generator = generator
        self.batch_size = generator.batch_size

    def generate(self, requests: Sequence[Request], progress: Callable[[int], Any] | None = None) -> list[Reply]:
        """Returns the answer to each request, in order.

        Raises:
          UserError: for a request with audio, or as `Generator.generate`.
        """
        if any(request.waveform is not None for request in requests):
            raise UserError("the oracle reads: give it the transcript in the place of the audio")
        return self._generator.generate(requests, progress)


def whisper_of(config: Config) -> str:
    """Returns the Whisper that a config has to write down speech: the teacher, or else the encoder.

    Raises:
      UserError: there is neither.
    """
    name = config.model.teacher or config.model.encoder
    if not name:
        raise UserError("the config names no Whisper to write down speech: set model.teacher or model.encoder")
    return name


def _number(request: Request, place: int) -> int:
    return place if request.number is None else request.number
