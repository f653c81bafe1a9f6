"""From a configuration to batches: which rows train, which are held out, and the batches of each stage."""

import dataclasses
import zlib
from collections.abc import Generator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from aura_jax import checkpoint, hosts, sharding
from aura_jax import config as config_lib
from aura_jax.audio.features import SAMPLE_RATE
from aura_jax.config import Config
from aura_jax.data.batch import Batch
from aura_jax.data.manifest import ROUNDING, Row, clip_samples, load_manifest
from aura_jax.data.pipeline import make_dataset
from aura_jax.data.plan import BUCKETS, BatchPlan
from aura_jax.data.sources import Source, check_row, make_source
from aura_jax.data.text_pool import TextPool, load_documents
from aura_jax.errors import UserError
from aura_jax.system import System
from aura_jax.train import objectives
from aura_jax.train import step as step_lib
from aura_jax.train.teacher import Clip, TeacherStore, precompute, teacher_states

_TEXT_EDGES = (16, 32, 64, 128, 256)  # tokens of suffix and response
_CUDNN_TOKENS = 8  # its backward pass takes no odd lengths
_TEXT_BATCHES = 16  # of the text pool, read at once


class Inputs:
    """The data of one run.

    Attributes:
      validation_rows: rows of the training manifests that are held out by `data.validation_values`.
      remarks: lines worth telling: what was left out, and why.
    """

    def __init__(self, built: System, workdir: Path):
        self._built, self._workdir, self._mesh = built, workdir, checkpoint.system_mesh(built.config)
        c = built.config.data
        self.validation_rows: list[Row] = []
        self.remarks: list[str] = []
        self._part = sharding.part_of_host(self._mesh, jax.process_index())
        # Of each host its own: not every file system lets several append to one file.
        suffix = "" if hosts.is_first() else f"-{jax.process_index()}"
        self._quarantine = workdir / f"quarantine{suffix}.jsonl"
        if not c.train:
            raise UserError("data.train is empty: give (manifest, passes per epoch) pairs")
        self._sources, self._weights = [], []
        # One for all stages: those that read no transcript leave it alone.
        self._needed = _needed(built)
        for manifest, weight in c.train:
            self._sources.append(self._source(manifest))
            self._weights.append(weight)
        if c.validation_values and not self.validation_rows:
            raise UserError(
                f"data.validation_values: no training row has {c.validation_key} {c.validation_values}: "
                "name values that there are, or hold nothing out with --config.data.validation_values='()'"
            )
        self._text_pool: TextPool | None = None
        if c.text_pool:
            documents = load_documents(c.text_pool, built.chat)
            self._text_pool = TextPool(
                documents,
                n_rows=c.text_rows,
                n_tokens=c.text_length,
                seed=built.config.seed,
                chat_share=c.text_chat if c.text_chat >= 0 else None,
            )
        self._store: TeacherStore | None = None
        self._plans: dict[tuple[bool, bool], tuple[list[Source], BatchPlan]] = {}

    def _source(self, manifest: str) -> Source:
        """Reads a manifest and takes out the rows that are held out or of unwanted length."""
        c = self._built.config.data
        rows, held_out = split_held_out(load_manifest(manifest), c)
        self.validation_rows += held_out
        shortest, longest = (round(seconds * SAMPLE_RATE) for seconds in (c.min_seconds, c.max_seconds))
        kept, samples = [], []
        for row, n in zip(
            rows, clip_samples(rows, cache=self._workdir / "seconds.jsonl", keep=hosts.is_first()), strict=True
        ):
            if row.audio is None or shortest <= n <= longest + ROUNDING:
                kept.append(row)
                samples.append(min(n, longest))  # reading cuts the clip to what is planned
        if len(kept) < len(rows):
            self.remarks.append(
                f"{manifest}: {len(rows) - len(kept)} of {len(rows)} clips are outside "
                f"data.min_seconds {c.min_seconds:g} to data.max_seconds {c.max_seconds:g}, and left out"
            )
        if not kept:
            raise UserError(
                f"{manifest}: no row is left after data.validation_values, data.min_seconds and data.max_seconds: "
                "hold out fewer, or allow other lengths"
            )
        return make_source(kept, self._built.chat, prompt=c.prompt, n_samples=samples, **self._needed)

    def _planned(self, active: frozenset[str]) -> tuple[list[Source], BatchPlan]:
        """The sources and the plan of a stage: as much of every row, and as many readings, as its objectives need."""
        # Rows end with the audio span where nothing reads further.
        audio_only, reads = not active & objectives.ANSWERS, _reads(self._built, active)
        if (audio_only, reads) not in self._plans:
            c = self._built.config.data
            sources, passes = self._sources, self._weights
            if not reads:
                sources = [_unread(source) for source in sources]
            if audio_only:
                heard = [i for i, s in enumerate(sources) if any(row.audio is not None for row in s.rows)]
                if not heard:
                    raise UserError("distilling needs speech, and data.train is text only")
                sources, passes = [_audio_only(sources[i]) for i in heard], [passes[i] for i in heard]
            packed = c.layout == "packed"
            longest = c.max_seconds / min(c.speeds)
            plan = BatchPlan(
                [s.lengths for s in sources],
                batch_size=c.batch_size,
                bucket_seconds=c.buckets or (*(b for b in BUCKETS if b < longest), longest),
                token_rate=self._built.token_rate,
                seed=self._built.config.seed,
                weights=passes,
                speeds=tuple(c.speeds),
                layout=c.layout,
                text_edges=_TEXT_EDGES if not packed and not audio_only else None,
                pack_tokens=c.row_tokens if packed else None,
                pack_clips=c.row_clips if packed else None,
                token_multiple=_CUDNN_TOKENS if self._built.config.model.attention == "cudnn" else 1,
            )
            self._plans[audio_only, reads] = (sources, plan)
        return self._plans[audio_only, reads]

    def batches(self, active: frozenset[str], start: int, count: int | None = None) -> Generator[Batch, None, None]:
        """Yields this host's part of batches `start`, start + 1, ... of a stage with these objectives."""
        c = self._built.config.data
        sources, plan = self._planned(active)
        store = self._store.view([row for s in sources for row in s.rows]) if self._store else None
        dataset = make_dataset(
            sources,
            plan,
            position=start,
            part=self._part,
            teacher_store=store if "distill" in active else None,
            text_pool=self._text_pool if active & objectives.TEXT else None,
            quarantine=self._quarantine,
            n_threads=c.threads,
            n_workers=c.workers,
        )
        with dataset:
            for position, batch in dataset:
                if count is not None and position >= start + count:
                    return
                yield batch

    def plain_text(self, n_tokens: int) -> Generator[np.ndarray, None, None]:
        """Yields rows of the text pool, int32 [M, L], until they hold `n_tokens`, or a smaller pool was read once."""
        assert self._text_pool is not None
        seen, index = 0, 0
        while seen < n_tokens and index < self._text_pool.batches_per_pass:
            rows = np.concatenate([self._text_pool.batch(index + i)[0] for i in range(_TEXT_BATCHES)])
            index, seen = index + _TEXT_BATCHES, seen + rows.size
            yield rows

    def row_names(self, active: frozenset[str], index: int) -> list[str]:
        """Returns where the rows of batch `index` stand in their manifests."""
        _, plan = self._planned(active)
        return [plan.row_name(pick.row) for picks in plan.batch(index).examples for pick in picks]

    def digest(self) -> str:
        """Returns what differs wherever another host would plan other batches: rows, lengths, what is held out."""
        parts = [source.lengths for source in self._sources]
        names = [name for lengths in parts for name in lengths.names_N] + [row.where for row in self.validation_rows]
        total = zlib.crc32("\n".join(names).encode())
        for lengths in parts:
            for values_N in lengths[1:]:
                total = zlib.crc32(np.asarray(() if values_N is None else values_N, np.int64).tobytes(), total)
        return f"{len(names)} rows, {total:08x}"

    @property
    def share(self) -> float:
        """The share of a batch's rows that this host reads."""
        return len(self._part.blocks) / self._part.count

    def to_mesh(self, batch: Batch) -> Batch:
        """Returns the global batch whose rows on this host are `batch`."""
        rows = sharding.batch_sharding(self._mesh)
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(rows, x), batch)

    def precompute_teacher(self, weights: dict, fingerprint: str) -> None:
        """Runs the teacher over every clip at every speed, once: later runs find the states in the cache."""
        clips = [
            Clip(str(row.audio), int(n))
            for source in self._sources
            for row, n in zip(source.rows, source.lengths.n_samples_N, strict=True)
            if row.audio is not None
        ]
        _, plan = self._planned(frozenset({"distill"}))
        edges = sorted({shape.n_samples for shape in plan.shapes})
        speeds = tuple(self._built.config.data.speeds)
        self._store = precompute(self._built, weights, clips, speeds, edges, fingerprint, self._mesh)

    def teacher_samples(self, weights: dict, n_batches: int = 16) -> np.ndarray:
        """Returns teacher states [n, P, E] of many tokens: of the store, or else of the first batches of the plan.

        Raises:
            UserError: no clip of these batches can be read.
        """
        if self._store is not None:
            return self._store.sample()

        def states(weights: dict, batch: Batch) -> tuple[jax.Array, jax.Array]:
            B, K, S = batch.waveform_BxKxS.shape
            waveform_NxS, n_samples_N = batch.waveform_BxKxS.reshape(B * K, S), batch.n_samples_BxK.reshape(-1)
            h_NxPxAxE = teacher_states(self._built, weights, waveform_NxS, n_samples_N)
            return jnp.moveaxis(h_NxPxAxE, 1, 2), objectives.audio_mask(self._built, batch).reshape(B * K, -1)

        # Every host reads all of it.
        run = jax.jit(states, out_shardings=sharding.replicated(self._mesh))
        out = []
        batches = self.batches(frozenset({"distill"}), 0, n_batches)
        for batch in tqdm(batches, total=n_batches, desc="target statistics", disable=not hosts.is_first()):
            h_NxAxPxE, mask_NxA = jax.device_get(run(weights, self.to_mesh(batch)))
            out.append(h_NxAxPxE[mask_NxA > 0])
        states_nxPxE = np.concatenate(out)
        if not len(states_nxPxE):
            raise UserError(
                f"distill.target_norm: no clip of the first {n_batches} batches can be read: "
                f"{self._quarantine} says why"
            )
        return states_nxPxE


def check_rows(built: System) -> None:
    """Raises UserError for a training manifest that cannot be read, or lacks what a run's objectives need."""
    for manifest, _ in built.config.data.train:
        for row in split_held_out(load_manifest(manifest), built.config.data)[0]:
            check_row(row, **_needed(built))


def _needed(built: System) -> dict[str, bool]:
    """Returns what the stages need of rows, as `check_row` takes it."""
    stages = [step_lib.active_objectives(stage) for _, stage in config_lib.stages(built.config)]
    return {
        "transcripts": any(_reads(built, active) for active in stages),
        "responses": any("response_kd" in active for active in stages),
    }


def _reads(built: System, active: frozenset[str]) -> bool:
    """Whether a stage needs transcripts: to read them, or to know how many audio tokens a clip has."""
    return bool(active & objectives.READING) or built.token_rate is None


def split_held_out(rows: Sequence[Row], data: Config) -> tuple[list[Row], list[Row]]:
    """Returns the rows that train, and those that `data.validation_values` holds out."""
    kept, held_out = [], []
    for row in rows:
        out = data.validation_values and row.extra.get(data.validation_key) in data.validation_values
        (held_out if out else kept).append(row)
    return kept, held_out


def _unread(source: Source) -> Source:
    """A source without its transcripts."""
    return dataclasses.replace(source, lengths=source.lengths._replace(n_transcript_N=None), transcript_ids=None)


def _audio_only(source: Source) -> Source:
    """The speech rows of a source, without what follows the audio."""
    speech = [i for i, row in enumerate(source.rows) if row.audio is not None]
    take = lambda items: [items[i] for i in speech]
    spoken_N = source.lengths.n_transcript_N
    lengths = source.lengths._replace(
        names_N=take(source.lengths.names_N),
        n_samples_N=source.lengths.n_samples_N[speech],
        n_prefix_N=source.lengths.n_prefix_N[speech],
        n_suffix_N=np.zeros(len(speech), np.int64),
        n_response_N=np.zeros(len(speech), np.int64),
        n_transcript_N=None if spoken_N is None else spoken_N[speech],
    )
    nothing = [()] * len(speech)
    return dataclasses.replace(
        source,
        rows=take(source.rows),
        prefix_ids=take(source.prefix_ids),
        suffix_ids=nothing,
        response_ids=nothing,
        lengths=lengths,
        transcript_ids=None if source.transcript_ids is None else take(source.transcript_ids),
    )
