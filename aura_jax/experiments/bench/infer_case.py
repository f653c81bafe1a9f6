"""What the arms of `aura-jax bench infer` are given: the same clips, the same prompt around a transcript.

A case folder holds clips.npz, waveforms at 16 kHz by name: "5" is 5 s of speech for the times, "test 3" a clip of the
test sets; and case.json, for arms that know nothing of this package.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from aura_jax import machine
from aura_jax.audio.features import SAMPLE_RATE
from aura_jax.audio.io import load_audio
from aura_jax.config import Config
from aura_jax.data.manifest import load_manifest
from aura_jax.errors import UserError
from aura_jax.experiments.compare.arm import speech
from aura_jax.system import System

# What the LLM alone is asked, to compare decoding.
TEXT = (
    "I would like to learn how a steam engine works. Please explain it step by step, from the fire below the boiler to "
    "the wheels, and say which part of the heat is lost on the way."
)
_LONGEST = 30.0  # seconds: Whisper's window


@dataclasses.dataclass(frozen=True)
class Case:
    """A case folder, and what is known of it.

    Attributes:
      sets: {test set: {name of a clip: what is said in it}}.
      batch: names of those that are answered together.
      seconds: of all test clips together.
    """

    directory: Path
    sets: Mapping[str, Mapping[str, str]]
    batch: tuple[str, ...]
    seconds: float

    @property
    def tests(self) -> tuple[str, ...]:
        """The names of all test clips."""
        return tuple(name for clips in self.sets.values() for name in clips)


def write(
    built: System,
    lengths: Sequence[float],
    n_test: int,
    n_batch: int,
    transcript_tokens: int,
    context: int,
    directory: Path,
) -> Case:
    """Makes the case of a run.

    Args:
      built: its system: the prompt and the test sets are its own.
      lengths: of the speech that is timed, in seconds.
      n_test: clips of each test set, evenly spaced.
      n_batch: test clips that are answered together.
      transcript_tokens: of the longest transcript.
      context: columns of a KV cache that has a fixed size.

    Raises:
      UserError: the run names no test set with transcripts.
    """
    config: Config = built.config
    clips = {f"{length:g}": waveform for length, waveform in speech(config, lengths).items()}
    sets: dict[str, dict[str, str]] = {}
    tests: list[str] = []
    for set_name, path in config.eval.sets.items():
        rows = [row for row in load_manifest(path) if row.audio is not None and row.text]
        for row in rows[:: max(1, len(rows) // n_test)][:n_test]:
            assert row.audio is not None and row.text is not None
            waveform = load_audio(row.audio)
            if len(waveform) <= _LONGEST * SAMPLE_RATE:
                tests.append(f"test {len(tests)}")
                clips[tests[-1]] = waveform
                sets.setdefault(set_name, {})[tests[-1]] = row.text
    if not tests:
        raise UserError("bench infer: no clip with a transcript in the run's eval.sets: no time is without its quality")
    directory.mkdir()
    np.savez(directory / "clips.npz", allow_pickle=False, **clips)
    batch = tuple(tests[:: max(1, len(tests) // n_batch)][:n_batch])
    before_ids, after_ids = built.chat.encode(config.data.prompt, has_audio=True)
    about = {
        "text_ids": built.chat.encode(TEXT, has_audio=False)[0],
        "before_ids": before_ids,
        "after_ids": after_ids,
        "stop_ids": built.chat.stop_ids,
        "llm_dir": str(built.llm_dir),
        "batch": batch,
        "max_new_tokens": config.eval.max_new_tokens,
        "transcript_tokens": transcript_tokens,
        "context": context,
        "threads": machine.n_cores(),
    }
    (directory / "case.json").write_text(json.dumps(about))
    seconds = sum(len(clips[name]) for name in tests) / SAMPLE_RATE
    return Case(directory, sets, batch, seconds)
