"""A run as a voice assistant of VoiceBench (arXiv 2410.17196, github.com/MatthewCYM/VoiceBench).

The interface is `VoiceAssistant` of its `src/models/base.py` and what its `main.py` calls, at commit 5338154 (June
2025): a class that is made without arguments, with `generate_audio`, `generate_text` and `generate_ttft`. Nothing of
VoiceBench is imported; docs/harnesses.md has the lines that name this class there.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aura_jax.harness.respondent import Respondent, clip
from aura_jax.infer.prompting import Request

_MAX_NEW_TOKENS = 2048  # as in VoiceBench, of answers to speech and to text


class AuraAssistant:
    """Answers VoiceBench's questions, one at a time and greedily."""

    def __init__(self, workdir: str | Path, *, system: str = "student", which: str = "best", prompt: str | None = None):
        """
        Args:
          workdir, system, which: as `Respondent`.
          prompt: what stands beside each spoken question; None: the run's own `data.prompt`.

        Raises:
          UserError: as `Respondent`.
        """
        self._respondent = Respondent(workdir, system=system, which=which)
        self._prompt = prompt

    def generate_audio(self, audio: Mapping[str, Any], max_new_tokens: int = _MAX_NEW_TOKENS) -> str:
        """Returns the answer to a spoken question.

        Args:
          audio: {"array": floats [samples], "sampling_rate": Hz}; any rate.

        Raises:
          UserError: as `respondent.clip` and `Respondent.generate`.
        """
        request = Request(clip(audio, "the question"), self._prompt)
        return self._respondent.generate([request], max_new_tokens)[0].text

    def generate_text(self, text: str) -> str:
        """Returns the answer to a written question: the base LLM's, unless `lora.scope` is "all"."""
        return self._respondent.generate([Request(prompt=text)], _MAX_NEW_TOKENS)[0].text

    def generate_ttft(self, audio: Mapping[str, Any]) -> float:
        """Returns the time to the first token in seconds: the wall time of an answer of one token, by VoiceBench's
        definition. A shape that has not been compiled is answered once more, and the second time counts.

        Raises:
          UserError: as `generate_audio`.
        """
        shapes = self._respondent.generator(1).shapes
        while True:
            n_compiled, start = len(shapes), time.perf_counter()
            self.generate_audio(audio, max_new_tokens=1)
            seconds = time.perf_counter() - start
            if len(shapes) == n_compiled:
                return seconds
