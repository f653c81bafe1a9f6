"""From a plan to batches: decoding, columns and reading ahead, with grain.

A grain element is one host's part of one whole batch, so that neither threads nor worker processes can change what is
in a batch or in which order batches come; the position is the index of the next batch.
"""

import fcntl
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import grain
import numpy as np

from aura_jax.audio.augment import change_speed
from aura_jax.audio.features import SAMPLE_RATE
from aura_jax.audio.io import AudioError, load_audio
from aura_jax.data.assemble import Example, assemble
from aura_jax.data.batch import WHOLE, Batch, Part
from aura_jax.data.plan import BatchPlan, Pick
from aura_jax.data.sources import Source
from aura_jax.data.text_pool import TextPool
from aura_jax.errors import UserError

_TRIMMED_SECONDS = 0.05  # a clip may outrun its manifest's `seconds` by this: the surplus is cut

log = logging.getLogger(__name__)


class TeacherStore(Protocol):
    """Precomputed teacher states of clean clips."""

    def read(self, row: int, speed: float) -> np.ndarray:
        """float16 [P, A_i, E]: pooled to the audio tokens of a row's clip at that speed; KeyError if there are none."""
        ...


def make_dataset(
    sources: Sequence[Source],
    plan: BatchPlan,
    *,
    position: int = 0,
    part: Part = WHOLE,
    teacher_store: TeacherStore | None = None,
    text_pool: TextPool | None = None,
    quarantine: Path | None = None,
    n_threads: int = 2,
    n_workers: int = 0,
    read_ahead: int = 4,
    cache_bytes: int = 256 << 20,
) -> "BatchIterator":
    """Iterates over (position, batch), from batch `position` of the plan to its end; a training plan has none.

    A clip that cannot be read becomes a row of weight 0, a warning, and a line in the quarantine. Close the iterator,
    or use it in a `with`: it holds threads, and perhaps processes.

    Args:
        sources: those whose lengths the plan was made of, in the same order.
        plan: which rows are in which batch.
        position: index of the first batch wanted: a checkpoint's last position + 1.
        part: what of every batch (and of the text pool) this process reads.
        teacher_store: fills `teacher_BxKxPxAxE`. None: the field is None.
        text_pool: fills `text_tokens_MxL` and `text_segment_MxL`. None: they are None.
        quarantine: a file (JSON lines) that each unreadable clip is added to, once.
        n_threads: batches decoded at once, in each process.
        n_workers: processes beside this one. They need `if __name__ == "__main__":` in the program and take seconds to
            start: worth it on many-core hosts only.
        read_ahead: batches held ready, in each process.
        cache_bytes: decoded clips that each process keeps in memory, those that come first; 256 MiB hold 70 minutes.

    Raises:
        UserError: the sources are not the plan's; the batch does not divide into such parts; the teacher store lacks a
            clip; a shard is missing or cut off.
    """
    elements = _Batches(sources, plan, position, part, teacher_store, text_pool, quarantine, cache_bytes)
    dataset = grain.MapDataset.source(elements).to_iter_dataset(
        grain.ReadOptions(num_threads=n_threads, prefetch_buffer_size=max(n_threads, read_ahead))
    )
    if n_workers:
        # grain's workers read absl's flags, which a program that has no absl main never parses.
        from absl import flags

        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=n_workers))
    return BatchIterator(iter(dataset), position)


class BatchIterator(Iterator[tuple[int, Batch]]):
    """Yields (position, batch). `position` is also kept here: the index of the batch that comes next."""

    def __init__(self, elements: grain.DatasetIterator, position: int):
        self._elements, self.position = elements, position

    def __next__(self) -> tuple[int, Batch]:
        position, batch = next(self._elements)
        if position != self.position:
            raise RuntimeError(f"batch {position} came where batch {self.position} was due")
        self.position += 1
        return position, batch

    def close(self) -> None:
        """Ends its threads and processes."""
        self._elements.close()

    def __enter__(self) -> "BatchIterator":
        return self

    def __exit__(self, *_) -> None:
        self.close()


class _Batches:
    """Random access to (position, batch): what grain reads."""

    def __init__(
        self,
        sources: Sequence[Source],
        plan: BatchPlan,
        position: int,
        part: Part,
        teacher_store: TeacherStore | None,
        text_pool: TextPool | None,
        quarantine: Path | None,
        cache_bytes: int,
    ):
        self._sources, self._plan, self._first, self._part = list(sources), plan, position, part
        self._teacher_store, self._text_pool = teacher_store, text_pool
        self._quarantine = Quarantine(quarantine)
        self._decoded: dict[str, np.ndarray] = {}
        self._cache_left = cache_bytes
        n_rows = [len(source.rows) for source in sources]
        if sum(n_rows) != plan.n_rows:
            raise UserError(f"the plan has {plan.n_rows} rows, its sources {sum(n_rows)}: plan the sources given here")
        self._first_rows = np.cumsum([0, *n_rows])
        if plan.n_batches is None:
            plan.batch(position, part)
        self._teacher_shape = None if teacher_store is None else self._find_teacher_shape(teacher_store)

    def __len__(self) -> int:
        n_batches = self._plan.n_batches
        return sys.maxsize // 2 if n_batches is None else max(0, n_batches - self._first)

    def __getitem__(self, index: int) -> tuple[int, Batch]:
        planned = self._plan.batch(self._first + int(index), self._part)
        rows = [[e for pick in picks if (e := self._example(pick)) is not None] for picks in planned.examples]
        batch = assemble(
            rows,
            planned.shape,
            layout=self._plan.layout,
            token_rate=self._plan.token_rate,
            teacher_shape=self._teacher_shape,
        )
        if self._text_pool is not None:
            tokens, segment = self._text_pool.batch(planned.index, self._part)
            batch = batch._replace(text_tokens_MxL=tokens, text_segment_MxL=segment)
        return planned.index, batch

    def __repr__(self) -> str:
        return "Batches"  # grain prints its source in logs: not the whole manifest

    def _find(self, row: int) -> tuple[Source, int]:
        source = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        return self._sources[source], row - int(self._first_rows[source])

    def _example(self, pick: Pick) -> Example | None:
        """The example with its clip decoded, or None if the clip cannot be read."""
        source, i = self._find(pick.row)
        row = source.rows[i]
        waveform_S = teacher_PxAxE = None
        if row.audio is not None:
            try:
                waveform_S = self._waveform(row.audio, int(source.lengths.n_samples_N[i]), pick.speed)
            except AudioError as error:
                self._quarantine.add(row.audio, row.where, str(error))
                return None
            if self._teacher_store is not None:
                try:
                    teacher_PxAxE = self._teacher_store.read(pick.row, pick.speed)
                except KeyError:
                    raise UserError(
                        f"{row.where}: no teacher states for this clip at speed {pick.speed:.3g}: compute them again"
                    ) from None
        ids = source.prefix_ids[i], source.suffix_ids[i], source.response_ids[i]
        spoken = source.transcript_ids[i] if source.transcript_ids is not None else ()
        return Example(*ids, waveform_S=waveform_S, teacher_PxAxE=teacher_PxAxE, transcript_ids=spoken)

    def _waveform(self, path: str, planned: int, speed: float) -> np.ndarray:
        """The clip at `speed`, no longer than planned, so that it fits the batch's shape."""
        waveform_S = self._decoded.get(path)
        if waveform_S is None:
            waveform_S = load_audio(path)
            if waveform_S.nbytes <= self._cache_left:
                self._cache_left -= waveform_S.nbytes
                self._decoded[path] = waveform_S
        if len(waveform_S) > planned + _TRIMMED_SECONDS * SAMPLE_RATE:
            raise AudioError(
                f"{path}: {len(waveform_S) / SAMPLE_RATE:.3f} s, but the manifest or the header says "
                f"{planned / SAMPLE_RATE:.3f} s: mend 'seconds' in the manifest, or export the clip again"
            )
        waveform_S = waveform_S[:planned]
        return waveform_S if speed == 1.0 else change_speed(waveform_S, speed)

    def _find_teacher_shape(self, store: TeacherStore) -> tuple[int, int]:
        """(P, E), of the first clip that the store has: a batch of unreadable clips needs them too."""
        for source, first in zip(self._sources, self._first_rows, strict=False):
            for i, row in enumerate(source.rows):
                if row.audio is not None:
                    try:
                        pairs, _, width = store.read(int(first) + i, self._plan.speeds[0]).shape
                    except KeyError:
                        continue
                    return pairs, width
        raise UserError("the teacher store has none of the clips: compute it for these sources")


class Quarantine:
    """A list of the clips that could not be read: a file of JSON lines, each clip once, whoever finds it."""

    def __init__(self, path: Path | None):
        self._path = path
        self._seen: set[str] = set()

    def add(self, audio: str, where: str, error: str) -> None:
        """Records a clip, unless it is recorded already, by this process or another."""
        if audio in self._seen:
            return
        # On disk first: when a batch without the clip comes out, the line is there, whichever thread met it.
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path, "ab+") as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # given back when the file closes
                file.seek(0)
                content = file.read()
                whole = content[: content.rfind(b"\n") + 1]  # a kill may have cut the last line short
                if all(json.loads(line)["audio"] != audio for line in whole.splitlines()):
                    file.truncate(len(whole))
                    file.write(json.dumps({"audio": audio, "row": where, "error": error}).encode() + b"\n")
        if audio not in self._seen:
            self._seen.add(audio)
            log.warning("left out: %s (%s)", error, where)
