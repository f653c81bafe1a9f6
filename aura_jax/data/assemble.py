"""Examples to columns: the arrays of a batch, in either layout, made by the same code."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from aura_jax.audio.features import n_audio_tokens
from aura_jax.data.batch import Batch, Reading
from aura_jax.data.plan import Shape


class Example(NamedTuple):
    """One example before it has columns."""

    prefix_ids: Sequence[int]
    suffix_ids: Sequence[int] = ()
    response_ids: Sequence[int] = ()  # targets; the last one is predicted, never read
    waveform_S: np.ndarray | None = None  # float32, 16 kHz; None = text-only
    teacher_PxAxE: np.ndarray | None = None  # float16, one state per audio token
    transcript_ids: Sequence[int] = ()  # what stands for the audio in the text reading


def assemble(
    rows: Sequence[Sequence[Example]],
    shape: Shape,
    *,
    layout: str,
    token_rate: float | None,
    teacher_shape: tuple[int, int] | None = None,
) -> Batch:
    """Lays examples out in columns.

    In the slot layout the audio starts at column `shape.n_prefix` of every row and owns A columns; what a prefix or a
    clip leaves free is padding. A text-only example runs through the columns before the slot, then those behind it.
    In the packed layout examples follow each other without holes.

    Args:
        rows: the examples of each row; a row without any is padding of weight 0.
        shape: static shape; `n_rows` is not read: the batch has `len(rows)` rows.
        layout: "slot" (one example a row at most) or "packed".
        token_rate: audio tokens a second (Hz); None: a clip has as many as its transcript.
        teacher_shape: (P, E) of the examples' teacher states. None: they have none.

    Returns:
        The batch, with no text pool.

    Raises:
        ValueError: something does not fit the shape, or a target has no column before it to predict it.
    """
    B, T, K, A, S, R = len(rows), shape.n_tokens, shape.n_clips, shape.n_audio, shape.n_samples, shape.n_targets
    columns_BxT = np.tile(np.arange(T, dtype=np.int32), (B, 1))
    batch = Batch(
        tokens_BxT=np.zeros((B, T), np.int32),
        position_BxT=np.zeros((B, T), np.int32),
        segment_BxT=np.zeros((B, T), np.int32),
        span_start_BxT=columns_BxT,
        span_end_BxT=columns_BxT + 1,
        audio_source_BxT=np.full((B, T), -1, np.int32),
        waveform_BxKxS=np.zeros((B, K, S), np.float32),
        n_samples_BxK=np.zeros((B, K), np.int32),
        audio_position_BxKxA=np.zeros((B, K, A), np.int32),
        request_audio_BxT=np.zeros((B, T), bool),
        target_position_BxR=np.zeros((B, R), np.int32),
        target_id_BxR=np.zeros((B, R), np.int32),
        target_weight_BxR=np.zeros((B, R), np.float32),
        teacher_BxKxPxAxE=np.zeros((B, K, teacher_shape[0], A, teacher_shape[1]), np.float16)
        if teacher_shape
        else None,
        reading=_empty_reading(shape, B) if shape.n_reading else None,
    )
    for b, examples in enumerate(rows):
        if layout == "slot" and len(examples) > 1:
            raise ValueError(f"{len(examples)} examples in a row of the slot layout")
        free = n_clips = n_targets = n_read = 0
        for segment, example in enumerate(examples, 1):
            n_audio = _n_audio(example, token_rate)
            free, columns = _columns(example, n_audio, free, shape, layout)
            if free > T or n_clips + bool(n_audio) > K or n_targets + len(example.response_ids) > R or n_audio > A:
                raise ValueError(f"an example does not fit {shape}")
            if batch.reading is not None:
                n_read = _write_reading(batch.reading, b, segment, example, n_read, n_clips, n_targets)
            n_targets = _write_text(batch, b, segment, example, columns, n_audio, n_targets)
            if n_audio:
                _write_clip(batch, b, n_clips, example, columns[len(example.prefix_ids) :][:n_audio])
                n_clips += 1
    return batch


def _n_audio(example: Example, token_rate: float | None) -> int:
    if example.waveform_S is None:
        return 0
    if token_rate is None:
        return len(example.transcript_ids)
    return int(n_audio_tokens(len(example.waveform_S), token_rate))


def _empty_reading(shape: Shape, n_rows: int) -> Reading:
    zeros = lambda *dims: np.zeros((n_rows, *dims), np.int32)
    return Reading(
        tokens_BxU=zeros(shape.n_reading),
        position_BxU=zeros(shape.n_reading),
        segment_BxU=zeros(shape.n_reading),
        target_position_BxR=zeros(shape.n_targets),
        transcript_position_BxKxI=zeros(shape.n_clips, shape.n_transcript),
        n_transcript_BxK=zeros(shape.n_clips),
    )


def _write_reading(reading: Reading, b: int, segment: int, example: Example, free: int, k: int, n_targets: int) -> int:
    """The example as text, from column `free` on. Returns the first column free after it."""
    before, spoken, n = len(example.prefix_ids), len(example.transcript_ids), len(example.response_ids)
    ids = [*example.prefix_ids, *example.transcript_ids, *example.suffix_ids, *example.response_ids[:-1]]
    end = free + len(ids)
    if end > reading.tokens_BxU.shape[1] or spoken > reading.transcript_position_BxKxI.shape[2]:
        raise ValueError(f"an example of {len(ids)} tokens with its transcript does not fit the text reading")
    columns = np.arange(free, end)
    reading.tokens_BxU[b, columns] = ids
    reading.position_BxU[b, columns] = columns - free
    reading.segment_BxU[b, columns] = segment
    reading.target_position_BxR[b, n_targets : n_targets + n] = columns[len(columns) - n :]
    if example.waveform_S is not None:
        reading.transcript_position_BxKxI[b, k, :spoken] = columns[before : before + spoken]
        reading.n_transcript_BxK[b, k] = spoken
    return end


def _columns(example: Example, n_audio: int, free: int, shape: Shape, layout: str) -> tuple[int, np.ndarray]:
    """The first column free after the example, and the columns of its tokens and audio tokens, in order."""
    before = len(example.prefix_ids)
    after = len(example.suffix_ids) + max(0, len(example.response_ids) - 1)
    if layout == "packed":
        end = free + before + n_audio + after
        return end, np.arange(free, end)
    slot_end = shape.n_prefix + shape.n_audio
    if not n_audio:
        text = before + after
        behind = max(0, text - shape.n_prefix)
        ahead = np.arange(min(text, shape.n_prefix))
        return slot_end + behind, np.concatenate([ahead, np.arange(slot_end, slot_end + behind)])
    if before > shape.n_prefix:
        raise ValueError(f"a prefix of {before} tokens does not fit {shape}")
    parts = (np.arange(before), shape.n_prefix + np.arange(n_audio), slot_end + np.arange(after))
    return slot_end + after, np.concatenate(parts)


def _write_text(
    batch: Batch, b: int, segment: int, example: Example, columns: np.ndarray, n_audio: int, n_targets: int
) -> int:
    """Everything but the clip itself. Returns the targets of the row so far."""
    read = np.array([*example.suffix_ids, *example.response_ids[:-1]], np.int32)
    before = len(example.prefix_ids)
    batch.tokens_BxT[b, columns[:before]] = example.prefix_ids
    batch.tokens_BxT[b, columns[before + n_audio :]] = read
    batch.position_BxT[b, columns] = np.arange(len(columns))
    batch.segment_BxT[b, columns] = segment
    batch.request_audio_BxT[b, columns] = n_audio > 0
    n = len(example.response_ids)
    if n:
        if n > len(columns):
            raise ValueError("a response with nothing before it: no column predicts its first token")
        targets = slice(n_targets, n_targets + n)
        batch.target_position_BxR[b, targets] = columns[len(columns) - n :]
        batch.target_id_BxR[b, targets] = example.response_ids
        batch.target_weight_BxR[b, targets] = 1.0
    return n_targets + n


def _write_clip(batch: Batch, b: int, k: int, example: Example, columns: np.ndarray) -> None:
    assert example.waveform_S is not None
    n_samples, n_audio, slots = len(example.waveform_S), len(columns), batch.audio_position_BxKxA.shape[2]
    batch.span_start_BxT[b, columns] = columns[0]
    batch.span_end_BxT[b, columns] = columns[-1] + 1
    batch.audio_source_BxT[b, columns] = k * slots + np.arange(n_audio)
    batch.audio_position_BxKxA[b, k, :n_audio] = columns
    batch.waveform_BxKxS[b, k, :n_samples] = example.waveform_S
    batch.n_samples_BxK[b, k] = n_samples
    if batch.teacher_BxKxPxAxE is not None:
        if example.teacher_PxAxE is None or example.teacher_PxAxE.shape[1] != n_audio:
            raise ValueError(f"teacher states do not cover the {n_audio} audio tokens of a clip")
        batch.teacher_BxKxPxAxE[b, k, :, :n_audio] = example.teacher_PxAxE
