"""The teacher's states at the student's token rate: inside the step, or computed once and kept on disk.

Dimensions: N clips, S samples, F frames (50 Hz), A audio tokens, P pairs of blocks, E width of the teacher.
"""

import collections
import dataclasses
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from aura_jax import cache, hosts, sharding
from aura_jax.audio import augment, features
from aura_jax.audio.io import AudioError, load_audio, stamp
from aura_jax.data.manifest import Row
from aura_jax.errors import UserError
from aura_jax.models.align import pool_frames
from aura_jax.system import System

_FORMAT = 1  # of what the cache holds: another number has every cache made again
_ROWS = 16  # at a time, or as many as there are devices
_READ_AHEAD = 4  # groups of decoded clips that wait for the teacher


def teacher_states(system: System, teacher: dict, waveform_NxS: jax.Array, n_samples_N: jax.Array) -> jax.Array:
    """Returns the outputs of the paired teacher blocks, pooled to audio tokens, float32 [N, P, A, E].

    With `teacher.window` "30s" the teacher hears each clip padded to 30 s with silence, as Whisper was trained;
    "unpadded", it hears the clip alone, whatever the batch is padded to. Tokens after a clip's end are 0.

    Raises:
      UserError: the batch is a token or more longer than the teacher's window.
    """
    assert system.teacher is not None and system.teacher_config is not None
    window = features.encoder_samples(system.teacher_config.n_positions)
    if waveform_NxS.shape[1] >= window + features.encoder_samples(system.frames_per_token):
        raise UserError(
            f"clips of {waveform_NxS.shape[1] / features.SAMPLE_RATE:g} s are longer than the teacher's window of "
            f"{window / features.SAMPLE_RATE:g} s: lower data.max_seconds, and data.buckets if it names any"
        )
    # The window may end within the last token of a batch, which is padded to whole tokens.
    waveform_NxS, n_samples_N = waveform_NxS[:, :window], jnp.minimum(n_samples_N, window)
    n_samples = waveform_NxS.shape[1]
    n_frames, n_frames_N = features.n_encoder_frames(n_samples), features.n_encoder_frames(n_samples_N)
    n_blocks = 1 + max(block for _, block in system.pairs)
    encoder: Any = system.teacher.clone(
        config=dataclasses.replace(system.teacher_config, encoder_blocks=n_blocks),
        tap=lambda h_NxFxE: pool_frames(h_NxFxE[:, :n_frames], n_frames_N, system.frames_per_token),
    )
    teacher = {**teacher, "blocks": jax.tree.map(lambda leaf: leaf[:n_blocks], teacher["blocks"])}
    n_mels = system.teacher_config.n_mels
    if system.config.teacher.window == "30s":
        waveform_NxS = jnp.pad(waveform_NxS, ((0, 0), (0, window - n_samples)))
        mel_NxFxM = features.log_mel(waveform_NxS, n_mels, reflect_end=True)
        _, taps_LxNxAxE = encoder.apply({"params": teacher}, mel_NxFxM)
    else:
        mel_NxFxM = features.log_mel(waveform_NxS, n_mels, n_samples_B=n_samples_N)
        _, taps_LxNxAxE = encoder.apply({"params": teacher}, mel_NxFxM, features.n_frames(n_samples_N))
    blocks = [block for _, block in system.pairs]
    return jnp.moveaxis(taps_LxNxAxE[jnp.asarray(blocks)], 0, 1)


class Clip(NamedTuple):
    """A clip's file or record, and its samples at speed 1."""

    path: str
    n_samples: int


class TeacherStore:
    """Pooled teacher states of clips at several speeds, float16, in one memory-mapped file.

    Read through a `view`, which says which clip a row of the plan is.
    """

    def __init__(self, directory: Path):
        self._states_NxPxE = np.load(directory / "states.npy", mmap_mode="r")
        self._places = {
            (path, speed): (start, n) for path, speed, start, n in json.loads((directory / "places.json").read_text())
        }

    def view(self, rows: Sequence[Row]) -> "_View":
        return _View(self, [row.audio for row in rows])

    def states(self, path: str, speed: float) -> np.ndarray:
        """Returns [P, A, E] of a clip; raises KeyError if it could not be read when the store was made."""
        start, n = self._places[path, speed]
        return np.moveaxis(self._states_NxPxE[start : start + n], 0, 1)

    def sample(self, n: int = 20_000) -> np.ndarray:
        """Returns float32 [n, P, E]: the states of n tokens spread evenly over all clips."""
        step = max(1, len(self._states_NxPxE) // n)
        return np.asarray(self._states_NxPxE[::step], np.float32)


class _View:
    def __init__(self, store: TeacherStore, paths: Sequence[str | None]):
        self._store, self._paths = store, paths

    def read(self, row: int, speed: float) -> np.ndarray:
        path = self._paths[row]
        assert path is not None
        return self._store.states(str(path), speed)


def precompute(
    system: System,
    weights: dict,
    clips: Sequence[Clip],
    speeds: Sequence[float],
    sample_edges: Sequence[int],
    fingerprint: str,
    mesh: Mesh,
) -> TeacherStore:
    """Runs the teacher over every clip at every speed, unless the cache holds the result already.

    Every host reads every clip and keeps all states, unless hosts share a cache: whatever row it reads, they are there.

    Args:
      sample_edges: bucket sizes in samples: one compilation each.
      fingerprint: of the teacher's weights.
      mesh: over which the clips are split.

    Raises:
      UserError: none of the clips can be read, or the buckets are longer than the teacher's window.
    """
    c = system.config
    what = [_FORMAT, fingerprint, c.model.dtype, c.teacher.window, system.pairs, system.frames_per_token, list(speeds)]
    what += [[clip.path, clip.n_samples, _stamp(clip.path)] for clip in clips]
    digest = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
    directory = cache.directory() / "teacher-states" / digest
    if any(hosts.anywhere([not directory.is_dir()])):
        _run_teacher(system, weights, clips, speeds, sample_edges, mesh, directory)
    return TeacherStore(directory)


def _stamp(path: str) -> list[int]:
    try:
        return list(stamp(path))
    except OSError:
        return []  # the pipeline will quarantine it


def _run_teacher(system, weights, clips, speeds, sample_edges, mesh: Mesh, directory: Path) -> None:
    jobs = sorted(
        ((int(augment.speed_samples(clip.n_samples, speed)), clip, speed) for clip in clips for speed in speeds),
        key=lambda job: job[0],
    )
    n_blocks = math.prod(mesh.shape[axis] for axis in sharding.BATCH_AXES)
    n_rows = -(-_ROWS // n_blocks) * n_blocks
    groups = [
        (edge, part[i : i + n_rows])
        for edge, low in zip(sample_edges, [0, *sample_edges], strict=False)
        for part in [[job for job in jobs if low < job[0] <= edge]]
        for i in range(0, len(part), n_rows)
    ]

    def states(weights: dict, waveform_NxS: jax.Array, n_samples_N: jax.Array) -> jax.Array:
        h_NxPxAxE = teacher_states(system, weights, sharding.keep_rows(waveform_NxS), n_samples_N)
        return jnp.moveaxis(h_NxPxAxE, 1, 2).astype(jnp.float16)

    run = jax.jit(states, out_shardings=sharding.replicated(mesh))
    unreadable: list[AudioError] = []

    def read(group: tuple[int, list]) -> tuple[np.ndarray, list[int]]:
        edge, part = group
        waveform_NxS, counts = np.zeros((n_rows, edge), np.float32), [0] * n_rows
        for i, (_, clip, speed) in enumerate(part):
            try:
                waveform_S = load_audio(clip.path)[: clip.n_samples]
            except AudioError as error:
                unreadable.append(error)
                continue  # the pipeline will quarantine it
            waveform_S = waveform_S if speed == 1.0 else augment.change_speed(waveform_S, speed)
            waveform_NxS[i, : len(waveform_S)], counts[i] = waveform_S, len(waveform_S)
        return waveform_NxS, counts

    pieces, places, start = [], [], 0
    with (
        ThreadPoolExecutor(2) as pool,
        tqdm(total=len(jobs), desc="teacher", unit="clip", disable=not hosts.is_first()) as bar,
    ):
        for (_, part), (waveform_NxS, read_here) in zip(groups, _read_ahead(pool, read, groups), strict=True):
            # What one host cannot read, none keeps: they compute it together.
            lost = hosts.anywhere([count == 0 for count in read_here])
            counts = [0 if is_lost else count for count, is_lost in zip(read_here, lost, strict=True)]
            out_NxAxPxE = np.asarray(run(weights, waveform_NxS, np.array(counts, np.int32)))
            for (_, clip, speed), count, clip_AxPxE in zip(part, counts, out_NxAxPxE, strict=False):
                if count:
                    n = int(features.n_audio_tokens(count, system.config.embedder.token_rate))
                    pieces.append(clip_AxPxE[:n])
                    places.append((clip.path, speed, start, n))
                    start += n
            bar.update(len(part))
    if not pieces:
        raise UserError(f"teacher.precompute: none of {len(clips)} clips can be read; the first: {unreadable[0]}")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as partial:
        np.save(Path(partial) / "states.npy", np.concatenate(pieces))
        (Path(partial) / "places.json").write_text(json.dumps(places))
        finished = Path(partial) / "finished"
        finished.mkdir()
        for name in ("states.npy", "places.json"):
            os.replace(Path(partial) / name, finished / name)
        try:
            os.replace(finished, directory)
        except OSError:
            if not directory.is_dir():  # else another process was first
                raise


def _read_ahead(pool: ThreadPoolExecutor, read: Callable[[Any], Any], groups: Sequence) -> Iterator[Any]:
    """Yields `read` of every group in order, few ahead of their use: `pool.map` would hold all that is decoded."""
    reading: collections.deque[Future] = collections.deque()
    for group in groups:
        reading.append(pool.submit(read, group))
        if len(reading) == _READ_AHEAD:
            yield reading.popleft().result()
    while reading:
        yield reading.popleft().result()


def statistics(states_nxPxE: np.ndarray | None, path: Path) -> tuple[dict[str, np.ndarray], list[float]]:
    """Returns mean and std [P, E] per channel, and the cosine that predicting the mean scores for each pair.

    They are written to `path`, and read from there when a run resumes: then `states_nxPxE` is None.
    """

    def take() -> dict[str, np.ndarray]:
        if states_nxPxE is not None:
            _write_statistics(states_nxPxE, path)
        with np.load(path) as values:
            return dict(values)

    values = hosts.arrays_of_first(take)
    return {"mean": values["mean"], "std": values["std"]}, values["baseline"].tolist()


def _write_statistics(states_nxPxE: np.ndarray, path: Path) -> None:
    mean_PxE, std_PxE = states_nxPxE.mean(0), states_nxPxE.std(0) + 1e-3
    norms = np.linalg.norm(states_nxPxE, axis=-1) * np.linalg.norm(mean_PxE, axis=-1)
    baseline_P = (np.einsum("npe,pe->np", states_nxPxE, mean_PxE) / norms).mean(0)
    # Always the same name: what a killed run left of it, the next one overwrites.
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.savez(file, mean=mean_PxE, std=std_PxE, baseline=baseline_P)
    partial.replace(path)
