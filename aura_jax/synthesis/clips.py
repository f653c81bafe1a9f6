"""Clips of spoken text and their manifest, the same however often the work was stopped.

    OUT/af_sky_000017.ogg   a clip: its voice, and the place of its text in the input
    OUT/making.json         what the clips are made of and by
    OUT.jsonl               the manifest; written last, whole or not at all

Voice and speed of a clip follow from the seed and the place of its text alone, and under `hours` the order in which
texts are taken from the seed: more hours of the same are the clips that are there, and further ones.
"""

import collections
import contextlib
import hashlib
import itertools
import json
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import soundfile
from tqdm import tqdm

from aura_jax.audio.features import SAMPLE_RATE
from aura_jax.audio.io import AudioError, audio_seconds
from aura_jax.errors import UserError, nearest
from aura_jax.storage import Folder
from aura_jax.synthesis.pronounce import Unspoken
from aura_jax.synthesis.sentences import Utterance

_MAKING = "making.json"
# What clips are made of and by, and how an error calls it.
_NAMES = {
    "text": "text (--text or --sentences)",
    "voices": "--voices",
    "speeds": "--speeds",
    "readings": "--readings",
    "seed": "--seed",
    "model": "model",
}


class Synthesizer(Protocol):
    """What speaks: `kokoro.Kokoro`, or another with these."""

    model: str
    voices: Sequence[str]

    def check(self, text: str) -> None: ...

    def speak(self, text: str, voice: str, speed: float) -> np.ndarray: ...


class Clip(NamedTuple):
    """What one clip is to be."""

    id: str
    utterance: Utterance
    voice: str
    speed: float


@dataclass(frozen=True)
class Report:
    """What was written.

    Attributes:
      path: of the manifest.
      n_kept: clips that an earlier call had written.
      left_out: why texts could not be spoken, with how many, most first.
      wanted: seconds that were asked for, if there was not text enough for them.
    """

    path: Path
    n_clips: int
    seconds: float
    n_kept: int
    left_out: dict[str, int]
    wanted: float | None

    @property
    def summary(self) -> str:
        """The report in one line."""
        kept = f" ({self.n_kept} of them were there)" if self.n_kept else ""
        text = f"{self.path}: {self.n_clips} clips{kept}, {self.seconds / 3600:.2f} h"
        if self.wanted is not None:
            text += f" of {self.wanted / 3600:g} h: there is no more text (--readings N reads each N times)"
        if self.left_out:
            reasons = ", ".join(f"{n} {reason}" for reason, n in self.left_out.items())
            text += f"; {sum(self.left_out.values())} texts left out: {reasons}"
        return text


def choose_voices(wanted: str | None, all_voices: Sequence[str], held_out: Sequence[str]) -> list[str]:
    """Returns the voices that "a,b,...", "all" or None (all but `held_out`) stand for, sorted.

    Raises:
      UserError: there is no such voice; the line suggests the nearest.
    """
    if wanted is None:
        return sorted(set(all_voices) - set(held_out))
    if wanted == "all":
        return sorted(all_voices)
    names = sorted({name.strip() for name in wanted.split(",") if name.strip()})
    for name in names:
        if name not in all_voices:
            raise UserError(f"--voices: unknown voice {name!r}: {nearest(name, all_voices)}")
    if not names:
        raise UserError("--voices names none: give names with commas between them, or all")
    return names


def write(
    utterances: Sequence[Utterance],
    output: Path,
    synthesizer: Synthesizer,
    *,
    voices: Sequence[str],
    speeds: tuple[float, float] = (0.85, 1.2),
    readings: int = 1,
    hours: float | None = None,
    seed: int = 0,
    n_threads: int = 1,
    progress: bool = True,
) -> Report:
    """Writes clips (Ogg Opus, 16 kHz) into the folder `output`, and their manifest beside it.

    Args:
      utterances: the texts; those that `synthesizer.check` refuses are left out and counted.
      speeds: lowest and highest; drawn evenly.
      readings: how many voices read each text.
      hours: of speech to write, of texts in an order drawn from the seed. None: all texts, in their own order.
      n_threads: clips spoken at once.
      progress: show a progress bar on standard error.

    Raises:
      UserError: nothing can be spoken; more readings than voices; a value out of range; the folder holds clips made
        otherwise, or cannot be written.
    """
    low, high = speeds
    if not 0.5 <= low <= high <= 2:
        raise UserError(f"--speeds {low:g},{high:g}: give the lowest and the highest, between 0.5 and 2")
    if hours is not None and not hours > 0:
        raise UserError(f"--hours must be more than 0, not {hours:g}")
    if not 1 <= readings <= len(voices):
        raise UserError(f"--readings must be from 1 to the number of voices ({len(voices)}), not {readings}")
    spoken, left_out = _speakable(utterances, synthesizer)
    if not spoken:
        raise UserError(f"none of {len(utterances)} texts can be spoken as written: {', '.join(left_out)}")
    making = _making(utterances, synthesizer, voices, speeds, readings, seed)
    try:
        _begin(output, making)
        plan = list(_plan(utterances, spoken, voices, speeds, readings, seed, shuffle=hours is not None))
        rows, n_kept, seconds = _speak_all(plan, output, synthesizer, hours, n_threads, progress)
        with Folder(output.parent.absolute()).new_file(f"{output.name}.jsonl") as path:
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    except (OSError, soundfile.LibsndfileError) as error:
        raise UserError(f"{output}: cannot be written ({error}): mend that, and call again to go on") from error
    wanted = hours * 3600 if hours is not None and seconds < hours * 3600 else None
    return Report(output.parent / f"{output.name}.jsonl", len(rows), seconds, n_kept, left_out, wanted)


def _speakable(utterances: Sequence[Utterance], synthesizer: Synthesizer) -> tuple[list[int], dict[str, int]]:
    """Returns the places of the texts that can be spoken, and how many cannot for which reason."""
    spoken, reasons = [], collections.Counter[str]()
    for place, utterance in enumerate(utterances):
        try:
            synthesizer.check(utterance.text)
            spoken.append(place)
        except Unspoken as reason:
            reasons[str(reason).partition(":")[0]] += 1
    return spoken, dict(reasons.most_common())


def _plan(
    utterances: Sequence[Utterance],
    spoken: Sequence[int],
    voices: Sequence[str],
    speeds: tuple[float, float],
    readings: int,
    seed: int,
    shuffle: bool,
) -> Iterator[Clip]:
    places = np.random.default_rng(seed).permutation(spoken).tolist() if shuffle else spoken
    # All first readings before any second one: few hours are of many texts.
    for reading, place in itertools.product(range(readings), places):
        random = np.random.default_rng((seed, place))
        voice = voices[int(random.permutation(len(voices))[reading])]
        speed = round(float(random.uniform(*speeds, readings)[reading]), 3)
        yield Clip(f"{voice}_{place:06d}", utterances[place], voice, speed)


def _speak_all(
    plan: Sequence[Clip],
    output: Path,
    synthesizer: Synthesizer,
    hours: float | None,
    n_threads: int,
    progress: bool,
) -> tuple[list[dict[str, Any]], int, float]:
    """Writes the clips that are missing; returns the rows of all, how many there were, and their seconds."""
    rows, n_kept, total = [], 0, 0.0
    bar = tqdm(desc=output.name, total=len(plan) if hours is None else None, unit="clip", disable=not progress)
    speak = lambda clip: (
        None if _there(output, clip) else synthesizer.speak(clip.utterance.text, clip.voice, clip.speed)
    )
    with bar, ThreadPoolExecutor(n_threads) as pool, contextlib.closing(_ahead(pool, speak, plan, n_threads)) as spoken:
        for clip, waveform_S in spoken:
            name = f"{clip.id}.ogg"
            if waveform_S is None:
                n_kept += 1
            else:
                with Folder(output).new_file(name) as path:
                    soundfile.write(path, waveform_S, SAMPLE_RATE, format="OGG", subtype="OPUS")
            seconds = round(audio_seconds(output / name), 3)
            row = {"id": clip.id, "audio": f"{output.name}/{name}", "text": clip.utterance.text}
            rows.append(row | dict(clip.utterance.extra) | {"voice": clip.voice, "seconds": seconds})
            total += seconds
            bar.update()
            bar.set_postfix_str(f"{total / 3600:.3f} h")
            if hours is not None and total >= hours * 3600:
                break
    return rows, n_kept, total


def _there(output: Path, clip: Clip) -> bool:
    with contextlib.suppress(AudioError):
        return audio_seconds(output / f"{clip.id}.ogg") > 0
    return False


def _ahead(
    pool: ThreadPoolExecutor, function: Callable[[Clip], Any], clips: Sequence[Clip], n: int
) -> Generator[tuple[Clip, Any], None, None]:
    """Yields (clip, what `function` returns for it) in order, while the next n are worked on."""
    waiting: collections.deque[tuple[Clip, Future]] = collections.deque()
    try:
        for clip in clips:
            waiting.append((clip, pool.submit(function, clip)))
            if len(waiting) > n:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        for _, future in waiting:
            future.cancel()


def _making(
    utterances: Sequence[Utterance],
    synthesizer: Synthesizer,
    voices: Sequence[str],
    speeds: tuple[float, float],
    readings: int,
    seed: int,
) -> dict[str, Any]:
    digest = hashlib.sha256()
    for utterance in utterances:
        digest.update(json.dumps(utterance.text).encode() + b"\n")
    return {
        "text": f"{len(utterances)} texts, {digest.hexdigest()[:16]}",
        "voices": list(voices),
        "speeds": list(speeds),
        "readings": readings,
        "seed": seed,
        "model": synthesizer.model,
    }


def _begin(output: Path, making: dict[str, Any]) -> None:
    """Writes what the clips of a folder are made of, or compares it with what is there."""
    output.mkdir(parents=True, exist_ok=True)
    path = output / _MAKING
    if not path.exists():
        if any(output.glob("*.ogg")):
            raise UserError(f"{output}: clips are there, and no {_MAKING}: name another --output")
        with Folder(output.absolute()).new_file(_MAKING) as partial:
            partial.write_text(json.dumps(making, indent=2) + "\n", encoding="utf-8")
        return
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
        different = next((name for name, value in making.items() if old[name] != value), None)
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: damaged: remove {output} to write it anew") from None
    if different is not None:
        raise UserError(
            f"{output}: written with another {_NAMES[different]} ({old[different]}, now {making[different]}): "
            "name another --output, or remove it"
        )
