"""Which rows make up batch i: a pure function of (seed, epoch, index), so that the position in the data is one integer.

The plan knows lengths only, no files. Every decision that the contents of a batch depend on (shuffling, source weights,
the speed of each clip, length buckets, packing) is made here, for the whole batch, before any host takes its part:
hosts, threads and workers cannot change the order.

Letters beside those of `batch`: N rows of a source, V speeds.
"""

import bisect
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from aura_jax.audio.features import SAMPLE_RATE, encoder_samples, frames_per_token, n_audio_tokens
from aura_jax.data.batch import WHOLE, Part
from aura_jax.data.packing import Bins, first_fit
from aura_jax.errors import UserError, nearest

LAYOUTS = ("slot", "packed")
BUCKETS = (2.0, 4.0, 8.0, 16.0, 30.0)  # seconds, where data.buckets names none
_READING_STEP = 8  # columns: text readings are as long as a multiple of it
_SHUFFLE, _SUBSET, _ORDER = range(3)  # what a random stream of an epoch is for


class Lengths(NamedTuple):
    """The lengths of one source's rows, int64 [N] each."""

    names_N: Sequence[str]  # what error messages call each row, such as "train.jsonl:12"
    n_samples_N: np.ndarray  # at speed 1; 0 = a text-only row
    n_prefix_N: np.ndarray  # tokens before the audio; of a text-only row, all before the response
    n_suffix_N: np.ndarray  # tokens between audio and response
    n_response_N: np.ndarray  # targets
    n_transcript_N: np.ndarray | None = None  # tokens of a clip's transcript; None: rows are not read as text


class Shape(NamedTuple):
    """The static shape of a whole batch, in the letters of `batch`; the slot layout's audio starts at `n_prefix`."""

    n_rows: int  # B
    n_tokens: int  # T
    n_clips: int  # K
    n_audio: int  # A
    n_samples: int  # S
    n_targets: int  # R
    n_prefix: int
    n_reading: int = 0  # U; 0: rows are not read as text
    n_transcript: int = 0  # I


class Pick(NamedTuple):
    """One example: the row's number across all sources, in their order, and the factor its clip is sped up by."""

    row: int
    speed: float


class PlannedBatch(NamedTuple):
    """`examples[b]` are the examples of batch row b: one at most in the slot layout; none = a row of weight 0.

    `shape.n_rows` counts the rows of the whole batch even where `examples` is a part of it.
    """

    index: int
    epoch: int
    shape: Shape
    examples: tuple[tuple[Pick, ...], ...]


class _Epoch(NamedTuple):
    rows: np.ndarray  # int64: rows in the order of their use
    speeds: np.ndarray  # int8: index into the plan's speeds
    ends: np.ndarray  # int64 [batches * B]: where each batch row's part of the two ends
    shapes: np.ndarray  # int32 [batches]: index into the plan's shapes


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser: every bit of the uint64 result depends on every bit of `x`."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class BatchPlan:
    """`plan.batch(index)` says which rows are batch `index`, and which shape it has.

    Training: every epoch takes each source `weight` times (a fraction as a random subset), shuffles, sorts into length
    buckets and cuts full batches. A bucket's remainder moves into the next larger one; what is left of the largest is
    dropped, and the batches are shuffled. Epochs follow each other without end. Sequential (evaluation): every row
    exactly once, shortest first, the last batch filled up with rows of weight 0; then the end.

    Args:
        lengths: one per source; rows are numbered across them.
        batch_size: rows of a whole batch, over all hosts.
        bucket_seconds: upper edges of the audio buckets, after the change of speed, each rounded up to whole audio
            tokens. Text-only rows go into the smallest.
        token_rate: audio tokens a second (Hz); None: a clip has as many as its transcript.
        seed: of all randomness here.
        weights: passes that an epoch makes over each source; default 1 each.
        speeds: factors; each row has one of them in each epoch, by a hash of (seed, epoch, row).
        layout: "slot" (one example a row, audio at a fixed offset) or "packed" (several a row, no holes).
        text_edges: slot: upper edges of the buckets of suffix and response tokens; the longest row's is always one.
        pack_tokens: packed: T. R is a quarter more than the average share of it.
        pack_clips: packed: K.
        token_multiple: T is rounded up to a multiple of this.
        sequential: evaluation order.

    Attributes:
        shapes: every shape that a batch can have: one per pair of buckets.
        layout, batch_size, token_rate, speeds, sequential: the arguments.
        n_rows: rows of all sources together.

    Raises:
        UserError: a row fits no bucket (it is named, with the mend), there are no rows, or a value is out of range;
            in the words of the configuration.
        ValueError: arguments contradict each other.
    """

    def __init__(
        self,
        lengths: Sequence[Lengths],
        *,
        batch_size: int,
        bucket_seconds: Sequence[float],
        token_rate: float | None,
        seed: int = 0,
        weights: Sequence[float] | None = None,
        speeds: Sequence[float] = (1.0,),
        layout: str = "slot",
        text_edges: Sequence[int] | None = None,
        pack_tokens: int | None = None,
        pack_clips: int | None = None,
        token_multiple: int = 1,
        sequential: bool = False,
    ):
        self.batch_size, self.token_rate, self.layout, self.sequential = batch_size, token_rate, layout, sequential
        self.speeds = tuple(float(speed) for speed in speeds)
        self.weights = tuple(float(weight) for weight in weights) if weights is not None else (1.0,) * len(lengths)
        self._seed, self._names = seed, [source.names_N for source in lengths]
        self._source_sizes = [len(source.n_samples_N) for source in lengths]
        self.n_rows = sum(self._source_sizes)
        self._check_arguments(layout, text_edges, pack_tokens, pack_clips)

        samples_N, prefix_N, suffix_N, response_N = (
            np.concatenate([np.asarray(source[field], np.int64) for source in lengths]) for field in range(1, 5)
        )
        if token_rate is None and any(source.n_transcript_N is None for source in lengths):
            raise ValueError("without a token rate every source needs n_transcript_N")
        reads = all(source.n_transcript_N is not None for source in lengths)
        transcript_N = np.concatenate(
            [
                np.zeros(len(source.n_samples_N), np.int64) if source.n_transcript_N is None else source.n_transcript_N
                for source in lengths
            ]
        )
        hears_N = samples_N > 0
        # The last token of a response is predicted, never read: it takes no column.
        text_N = prefix_N + suffix_N + np.maximum(response_N - 1, 0)
        # audio.augment.speed_samples, for whole arrays.
        self._samples_VxN = np.stack([np.rint(samples_N / speed) for speed in self.speeds]).astype(np.int64)
        whole_token = encoder_samples(1 if token_rate is None else frames_per_token(token_rate))
        edges = {-(-round(edge * SAMPLE_RATE) // whole_token) * whole_token for edge in bucket_seconds}
        self._sample_edges = sorted(edges) or [0]
        self._check_audio_fits()

        if layout == "slot":
            self._pack_limits = None
            n_prefix = int(prefix_N[hears_N].max(initial=0))
            # A text-only row fills the columns before the slot, then those behind it.
            after_N = np.where(hears_N, text_N - prefix_N, np.maximum(text_N - n_prefix, 0))
            longest = int(after_N.max())
            after_edges = [*sorted({int(edge) for edge in text_edges or () if edge < longest}), longest]
            self._text_bucket_N = np.searchsorted(after_edges, after_N)
            # A row of a smaller bucket may be promoted into this one, so its targets must fit too.
            targets = [int(response_N[self._text_bucket_N <= j].max(initial=1)) for j in range(len(after_edges))]
            text_shapes = list(zip(after_edges, targets, strict=True))
            audio_bucket_N = np.searchsorted(self._sample_edges, self._samples_VxN.min(axis=0))

            def readings(i: int, j: int) -> tuple[int, int]:
                """(U, I) of the rows that may come into a bucket: its own, and those promoted from smaller ones."""
                in_N = (audio_bucket_N <= i) & (self._text_bucket_N <= j)
                longest = int((text_N + transcript_N)[in_N].max(initial=1))
                return -(-longest // _READING_STEP) * _READING_STEP, int(transcript_N[in_N].max(initial=1))
        else:
            assert pack_tokens is not None and pack_clips is not None  # _check_arguments saw to it
            n_prefix, self._text_bucket_N = 0, np.zeros(self.n_rows, np.int64)
            spoken = transcript_N if token_rate is None else n_audio_tokens(self._samples_VxN, token_rate)
            tokens_VxN = np.broadcast_to(text_N + spoken, self._samples_VxN.shape)
            share = response_N.sum() / max(1, tokens_VxN[0].sum())
            pack_targets = max(1, int(response_N.max()), int(np.ceil(1.25 * share * pack_tokens)))
            sizes, self._pack_limits = [tokens_VxN, hears_N, response_N], (pack_tokens, pack_clips, pack_targets)
            if reads:
                sizes.append(text_N + transcript_N)
                self._pack_limits += (pack_tokens,)
            self._pack_sizes_VxNxC = np.stack(np.broadcast_arrays(*sizes), axis=-1)
            self._check_packs_fit()
            text_shapes = [(pack_tokens, pack_targets)]
            readings = lambda i, j: (pack_tokens, int(transcript_N.max(initial=1)))

        self.shapes = tuple(
            self._shape(
                n_samples,
                n_text,
                n_targets,
                n_prefix,
                pack_clips or 1,
                token_multiple,
                *(readings(i, j) if reads else (0, 0)),
            )
            for i, n_samples in enumerate(self._sample_edges)
            for j, (n_text, n_targets) in enumerate(text_shapes)
        )
        self._n_text_buckets = len(text_shapes)
        self._cache: dict[int, _Epoch] = {}
        self._epoch_starts = [0]  # the first batch of each epoch, as far as known
        if not self.batches_per_epoch():
            raise UserError(
                f"an epoch of {self.n_rows} rows fills no batch of data.batch_size {batch_size}: "
                "lower data.batch_size, or give more data"
            )

    # --- what may be asked

    @property
    def n_batches(self) -> int | None:
        """Batches of a sequential plan; None for training, which has no end."""
        return self.batches_per_epoch() if self.sequential else None

    def batches_per_epoch(self, epoch: int = 0) -> int:
        """Batches of that epoch; in the packed layout epochs may differ."""
        return len(self._epoch(epoch).shapes)

    def batch(self, index: int, part: Part = WHOLE) -> PlannedBatch:
        """Batch `index`, from 0, or a part of its rows.

        Raises:
            IndexError: past the end of a sequential plan.
            UserError: the batch does not divide into such parts.
        """
        wanted = part.rows("data.batch_size", self.batch_size)
        epoch_number, place = self._locate(index)
        epoch = self._epoch(epoch_number)
        first = place * self.batch_size
        examples = tuple(self._picks(epoch, first + i) for i in wanted)
        return PlannedBatch(index, epoch_number, self.shapes[epoch.shapes[place]], examples)

    def _picks(self, epoch: _Epoch, row: int) -> tuple[Pick, ...]:
        """The examples of a row, counted over all batches of the epoch."""
        start, end = int(epoch.ends[row - 1]) if row else 0, int(epoch.ends[row])
        return tuple(Pick(int(epoch.rows[e]), self.speeds[epoch.speeds[e]]) for e in range(start, end))

    def row_name(self, row: int) -> str:
        """What error messages call row `row`, numbered across the sources."""
        for names, size in zip(self._names, self._source_sizes, strict=True):
            if row < size:
                return names[row]
            row -= size
        raise IndexError(row)

    # --- how epochs are made

    def _locate(self, index: int) -> tuple[int, int]:
        """The epoch of batch `index`, and its place there."""
        if index < 0:
            raise IndexError(index)
        # Threads may do this at once: each extends its own copy, and whichever is kept is right.
        starts = self._epoch_starts
        while index >= starts[-1]:
            if self.sequential and len(starts) == 2:
                raise IndexError(f"batch {index} of a plan with {starts[-1]}")
            starts = [*starts, starts[-1] + self.batches_per_epoch(len(starts) - 1)]
            if starts[-1] == starts[-2]:
                raise UserError(f"epoch {len(starts) - 2} fills no batch: lower data.batch_size, or give more data")
        self._epoch_starts = starts
        epoch = bisect.bisect_right(starts, index) - 1
        return epoch, index - starts[epoch]

    def _epoch(self, epoch: int) -> _Epoch:
        made = self._cache.get(epoch)
        if made is None:
            made = self._make_epoch(epoch)
            # Reading threads meet at the end of an epoch, so its neighbours stay.
            self._cache = {e: kept for e, kept in self._cache.items() if abs(e - epoch) == 1} | {epoch: made}
        return made

    def _generator(self, *purpose: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence([self._seed, *purpose]))

    def _make_epoch(self, epoch: int) -> _Epoch:
        rows, speeds = self._entries(epoch)
        samples = self._samples_VxN[speeds, rows]
        shape = np.searchsorted(self._sample_edges, samples) * self._n_text_buckets + self._text_bucket_N[rows]

        def pack(entries: list[int]) -> Bins:
            if self._pack_limits is None:
                return [[entry] for entry in entries]
            sizes = self._pack_sizes_VxNxC[speeds[entries], rows[entries]]
            return [[entries[i] for i in one] for one in first_fit(sizes, self._pack_limits)]

        if self.sequential:
            batches = self._cut_sorted(pack(np.lexsort((rows, samples, shape)).tolist()), shape)
        else:
            order = self._generator(epoch, _SHUFFLE).permutation(len(rows))
            batches = self._cut_buckets(order, shape[order], pack)
            batches = [batches[i] for i in self._generator(epoch, _ORDER).permutation(len(batches))]
        bins = [one for _, batch in batches for one in batch]
        used = np.fromiter((entry for one in bins for entry in one), np.int64)
        ends = np.cumsum([len(one) for one in bins], dtype=np.int64)
        return _Epoch(rows[used], speeds[used], ends, np.array([number for number, _ in batches], np.int32))

    def _entries(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows of the epoch, a row twice where its source's weight says so, and each one's index of speed."""
        parts, copies, offset = [], [], 0
        for source, (size, weight) in enumerate(zip(self._source_sizes, self.weights, strict=True)):
            whole, part = int(weight), weight - int(weight)
            subset = self._generator(epoch, _SUBSET, source).permutation(size)[: round(part * size)]
            for copy, chosen in enumerate([np.arange(size)] * whole + [np.sort(subset)]):
                parts.append(offset + chosen)
                copies.append(np.full(len(chosen), copy))
            offset += size
        rows = np.concatenate(parts)
        key = np.random.SeedSequence([self._seed, epoch]).generate_state(1, np.uint64)[0]
        hashed = _mix(_mix(rows.astype(np.uint64)) ^ _mix(np.concatenate(copies).astype(np.uint64) + key))
        return rows, (_mix(hashed) % np.uint64(len(self.speeds))).astype(np.int8)

    def _cut_buckets(
        self, order: np.ndarray, shape: np.ndarray, pack: Callable[[list[int]], Bins]
    ) -> list[tuple[int, Bins]]:
        """Full batches of each bucket; remainders move up, first to longer text, then to longer audio."""
        batches: list[tuple[int, Bins]] = []
        waiting: dict[int, list[int]] = {}
        for number in range(len(self.shapes)):
            bins = pack(waiting.pop(number, []) + order[shape == number].tolist())
            full = len(bins) // self.batch_size * self.batch_size
            batches += [(number, bins[i : i + self.batch_size]) for i in range(0, full, self.batch_size)]
            longest_text = (number + 1) % self._n_text_buckets == 0
            larger = number + (self._n_text_buckets if longest_text else 1)
            waiting.setdefault(larger, []).extend(entry for one in bins[full:] for entry in one)
        return batches

    def _cut_sorted(self, bins: Bins, shape: np.ndarray) -> list[tuple[int, Bins]]:
        """Batches of all bins in their order, each in the smallest shape that holds it, the last one filled up."""
        batches: list[tuple[int, Bins]] = []
        for i in range(0, len(bins), self.batch_size):
            chosen = bins[i : i + self.batch_size]
            audio, text = np.divmod(shape[[entry for one in chosen for entry in one]], self._n_text_buckets)
            filler: Bins = [[] for _ in range(self.batch_size - len(chosen))]
            batches.append((int(audio.max() * self._n_text_buckets + text.max()), chosen + filler))
        return batches

    def _shape(
        self,
        n_samples: int,
        n_text: int,
        n_targets: int,
        n_prefix: int,
        n_clips: int,
        token_multiple: int,
        n_reading: int,
        n_transcript: int,
    ) -> Shape:
        n_audio = n_transcript if self.token_rate is None else n_audio_tokens(n_samples, self.token_rate)
        n_tokens = n_prefix + n_audio + n_text if self._pack_limits is None else n_text
        n_tokens = -(-n_tokens // token_multiple) * token_multiple
        sizes = (n_tokens, n_clips, n_audio, n_samples, n_targets, n_prefix, n_reading, n_transcript)
        return Shape(self.batch_size, *sizes)

    # --- what is refused

    def _check_arguments(self, layout, text_edges, pack_tokens, pack_clips) -> None:
        if layout not in LAYOUTS:
            raise UserError(f"unknown data.layout {layout!r}: {nearest(layout, LAYOUTS)}")
        packing = (pack_tokens is not None, pack_clips is not None)
        if packing != (layout == "packed",) * 2:
            raise ValueError("pack_tokens and pack_clips go with layout 'packed', and only with it")
        if layout == "packed" and text_edges is not None:
            raise ValueError("text_edges are for layout 'slot'")
        if len(self.weights) != len(self._names):
            raise ValueError(f"{len(self.weights)} weights for {len(self._names)} sources")
        if not self.n_rows:
            raise UserError("no rows: give at least one source with rows")
        if self._seed < 0:
            raise UserError(f"seed {self._seed} must not be negative")
        if self.batch_size < 1:
            raise UserError(f"data.batch_size {self.batch_size} must be at least 1")
        if not self.speeds or min(self.speeds) <= 0:
            raise UserError(f"data.speeds {self.speeds} must be positive factors, such as (0.9, 1.0, 1.1)")
        if min(self.weights) < 0 or not any(
            round(w * n) for w, n in zip(self.weights, self._source_sizes, strict=True)
        ):
            raise UserError(f"data.train: the passes {self.weights} choose no row: give a positive number of passes")
        if self.sequential and (len(self.speeds) > 1 or set(self.weights) != {1.0}):
            raise ValueError("a sequential plan reads every row once: give it one speed, and weights of 1")

    def _check_audio_fits(self) -> None:
        largest = self._sample_edges[-1]
        speed, row = np.unravel_index(np.argmax(self._samples_VxN), self._samples_VxN.shape)
        longest = self._samples_VxN[speed, row]
        if longest > largest:
            n = int((self._samples_VxN.max(axis=0) > largest).sum())
            raise UserError(
                f"{self.row_name(int(row))}: {longest / SAMPLE_RATE:.2f} s of audio at speed {self.speeds[speed]:.3g} "
                f"({n} rows are as bad) do not fit the largest bucket of {largest / SAMPLE_RATE:.2f} s: "
                f"add {np.ceil(longest / SAMPLE_RATE):.0f} to data.buckets, or lower data.max_seconds"
            )

    def _check_packs_fit(self) -> None:
        assert self._pack_limits is not None
        sizes_NxC = self._pack_sizes_VxNxC.max(axis=0)
        # Targets always fit: their limit is at least the longest response.
        limited = (("tokens", "tokens"), ("clips", "clips"), None, ("tokens with its transcript", "tokens"))
        for of, size_N, limit in zip(limited, sizes_NxC.T, self._pack_limits, strict=False):
            row = int(np.argmax(size_N))
            if of is not None and size_N[row] > limit:
                what, key = of
                raise UserError(
                    f"{self.row_name(row)} has {size_N[row]} {what}, and data.row_{key} is {limit}: "
                    f"set data.row_{key} to {size_N[row]} or more, or take the row out of the manifest"
                )
