"""The parts of the way from files to batches, each alone: decoding, resampling, speed, log-mel, assembly."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import soundfile
import soxr
import transformers
from tqdm import tqdm

from aura_jax import config as config_lib
from aura_jax import system
from aura_jax.audio.augment import change_speed
from aura_jax.audio.features import SAMPLE_RATE, log_mel, n_audio_tokens
from aura_jax.audio.io import load_audio
from aura_jax.data.assemble import Example, assemble
from aura_jax.data.batch import Batch
from aura_jax.data.manifest import Row
from aura_jax.data.plan import BUCKETS, BatchPlan
from aura_jax.data.sources import make_source

_COPIES = (("WAV", SAMPLE_RATE), ("FLAC", SAMPLE_RATE), ("WAV", 48000), ("WAV", 44100))
_WINDOW = 30  # seconds that WhisperFeatureExtractor pads to, and cuts at


class _Part(NamedTuple):
    """A part: what it is, the seconds of real audio that a call goes through, and the call."""

    name: str
    detail: str
    seconds: float
    run: Callable[[], Any]


def measure(config_path: Path, rows: Sequence[Row], states: bool, rounds: int, folder: Path) -> list[dict[str, Any]]:
    """Returns of each part {"part", "detail", "audio_seconds", "rounds": times real time in each round}.

    Args:
      config_path: the run's configuration, as JSON.
      rows: whose clips are measured; all can be read.
      states: batches hold teacher states.
      folder: for copies of the clips.
    """
    built = system.build(config_lib.from_json(config_path))
    waveforms = [load_audio(str(row.audio)) for row in rows]
    parts = [*_file_parts(rows, waveforms, folder), *_array_parts(built, rows, waveforms, states, folder)]
    taken: list[list[float]] = [[] for _ in parts]
    # Part after part in every round: a slow minute of the machine hits all of them.
    turns = [(i, *turn) for i in range(rounds + 1) for turn in zip(parts, taken, strict=True)]
    for i, part, seconds in tqdm(turns, "parts", unit="part"):
        start = time.perf_counter()
        part.run()
        if i:  # the first call compiles, imports and fills the file cache
            seconds.append(time.perf_counter() - start)
    return [
        {"part": p.name, "detail": p.detail, "audio_seconds": p.seconds, "rounds": [p.seconds / t for t in seconds]}
        for p, seconds in zip(parts, taken, strict=True)
    ]


def _file_parts(rows: Sequence[Row], waveforms: Sequence[np.ndarray], folder: Path) -> list[_Part]:
    """Returns reading of the clips as they are found, and of copies in other formats and at other rates."""
    seconds = {str(row.audio): len(x) / SAMPLE_RATE for row, x in zip(rows, waveforms, strict=True)}
    found: dict[str, list[str]] = {}
    for path in seconds:
        info = soundfile.info(path)
        found.setdefault(f"{info.format} {info.subtype} {info.samplerate / 1000:g} kHz, as found", []).append(path)
    load = lambda paths: lambda: [load_audio(path) for path in paths]
    parts = [_Part("decode", detail, sum(seconds[p] for p in paths), load(paths)) for detail, paths in found.items()]
    for kind, rate in _COPIES:
        paths = [str(folder / f"{i}_{rate}.{kind.lower()}") for i in range(len(waveforms))]
        for path, waveform_S in zip(paths, waveforms, strict=True):
            soundfile.write(path, soxr.resample(waveform_S, SAMPLE_RATE, rate), rate, "PCM_16")
        name, how = ("decode", "copies") if rate == SAMPLE_RATE else ("resample", "copies, decoding included")
        detail = f"{kind} PCM_16 {rate / 1000:g} kHz, {how}"
        parts.append(_Part(name, detail, sum(map(len, waveforms)) / SAMPLE_RATE, load(paths)))
    return parts


def _array_parts(
    built: system.System, rows: Sequence[Row], waveforms: Sequence[np.ndarray], states: bool, folder: Path
) -> list[_Part]:
    """Returns what happens to decoded clips."""
    c = built.config
    seconds = sum(map(len, waveforms)) / SAMPLE_RATE
    factors = [speed for speed in c.data.speeds if speed != 1] or [0.9]
    change = lambda: [change_speed(x, factor) for x in waveforms for factor in factors]

    extractor = transformers.WhisperFeatureExtractor(feature_size=built.n_mels)
    library = "torch" if transformers.is_torch_available() else "numpy"
    groups = [list(waveforms[i : i + c.data.batch_size]) for i in range(0, len(waveforms), c.data.batch_size)]
    heard = sum(min(len(x) / SAMPLE_RATE, _WINDOW) for x in waveforms)
    theirs = lambda: [extractor(group, sampling_rate=SAMPLE_RATE, return_tensors="np") for group in groups]

    assembled = _assembly(built, rows, waveforms, states, folder)
    flat = [(x.waveform_BxKxS.reshape(-1, x.waveform_BxKxS.shape[2]), x.n_samples_BxK.ravel()) for x in assembled()]
    on_device = jax.device_put(flat)
    normalisation, device = c.model.normalisation, jax.devices()[0].device_kind
    ours = lambda: jax.block_until_ready(
        [log_mel(x, built.n_mels, n_samples_B=n, normalisation=normalisation) for x, n in on_device]
    )
    columns = "columns and teacher states" if states else "columns"
    return [
        _Part("change of speed", f"factors {', '.join(f'{f:g}' for f in factors)}", seconds * len(factors), change),
        _Part("log-mel", f"WhisperFeatureExtractor ({library}), padded to {_WINDOW} s", heard, theirs),
        _Part("log-mel", f"aura_jax on {device}, padded to the bucket", seconds, ours),
        _Part("assemble", f"{columns}, {c.data.layout} layout", seconds, assembled),
    ]


def _assembly(
    built: system.System, rows: Sequence[Row], waveforms: Sequence[np.ndarray], states: bool, folder: Path
) -> Callable[[], list[Batch]]:
    """Returns what assembles all clips, in the shapes of their buckets, with states from a file like the teacher's."""
    c = built.config.data
    packed = c.layout == "packed"
    source = make_source(rows, built.chat, prompt=c.prompt, n_samples=[len(x) for x in waveforms])
    plan = BatchPlan(
        [source.lengths],
        batch_size=c.batch_size,
        bucket_seconds=c.buckets or (*BUCKETS, c.max_seconds),
        token_rate=built.config.embedder.token_rate,
        layout=c.layout,
        pack_tokens=c.row_tokens if packed else None,
        pack_clips=c.row_clips if packed else None,
        sequential=True,
    )
    planned = [plan.batch(i) for i in range(plan.batches_per_epoch())]
    starts = np.cumsum([0, *(int(n_audio_tokens(len(x), built.config.embedder.token_rate)) for x in waveforms)])
    teacher_shape = states_NxPxE = None
    if states:
        assert built.teacher_config is not None
        teacher_shape, path = (len(built.pairs), built.teacher_config.width), folder / "states.npy"
        np.save(path, np.ones((starts[-1], *teacher_shape), np.float16))
        states_NxPxE = np.load(path, mmap_mode="r")

    def example(i: int) -> Example:
        teacher_PxAxE = None
        if states_NxPxE is not None:
            teacher_PxAxE = np.moveaxis(states_NxPxE[starts[i] : starts[i + 1]], 0, 1)
        ids = source.prefix_ids[i], source.suffix_ids[i], source.response_ids[i]
        return Example(*ids, waveform_S=waveforms[i], teacher_PxAxE=teacher_PxAxE)

    def run() -> list[Batch]:
        return [
            assemble(
                [[example(pick.row) for pick in picks] for picks in batch.examples],
                batch.shape,
                layout=plan.layout,
                token_rate=plan.token_rate,
                teacher_shape=teacher_shape,
            )
            for batch in planned
        ]

    return run
