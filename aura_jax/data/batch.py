"""The one thing the model room receives from the data room: a batch of numpy arrays with static shapes.

Dimensions, used in every array name of this room:

    B  rows of the batch             S  samples of a clip at 16 kHz
    T  token columns of a row        R  targets of a row
    K  clips of a row                P  taught pairs of blocks (teacher taps)
    A  audio tokens of a clip        E  width of the teacher
    U  columns of a text reading     I  tokens of a transcript
    M  rows of plain text            L  tokens of a row of plain text

A row holds one example or several (packed). An example is a *segment* of columns: prefix, audio span, suffix, response.
What a padding column holds never matters: its segment is 0.
"""

from typing import Any, NamedTuple, TypeAlias

from aura_jax.errors import UserError

Array: TypeAlias = Any  # numpy on the host, a jax.Array once it is on the mesh


class Part(NamedTuple):
    """What a host reads of every batch: the blocks of rows that its devices hold.

    Attributes:
        blocks: their numbers, ascending. They need not be neighbours: the chips of a host are a square of a pod.
        count: of equal blocks in a whole batch.
    """

    blocks: tuple[int, ...] = (0,)
    count: int = 1

    def rows(self, key: str, n_rows: int) -> list[int]:
        """Returns which of `n_rows` rows these are.

        Raises:
            UserError: they do not divide into so many blocks; `key` of the configuration has their number.
        """
        if n_rows % self.count:
            raise UserError(f"{key} {n_rows} is not a multiple of the {self.count} parts that devices take: change it")
        size = n_rows // self.count
        return [block * size + i for block in self.blocks for i in range(size)]


WHOLE = Part()


class Reading(NamedTuple):
    """The same rows read as text: in every speech example the transcript's tokens stand where the audio does.

    Examples follow each other without holes. What is text only in the batch is the same here.

    Attributes:
        tokens_BxU, position_BxU, segment_BxU: int32, as of the batch; a segment has the same number in both.
        target_position_BxR: int32, the column whose hidden state predicts the batch's target.
        transcript_position_BxKxI: int32, the columns of the transcript of that clip; 0 where there is none.
        n_transcript_BxK: int32, its tokens.
    """

    tokens_BxU: Array
    position_BxU: Array
    segment_BxU: Array
    target_position_BxR: Array
    transcript_position_BxKxI: Array
    n_transcript_BxK: Array


class Batch(NamedTuple):
    """One batch, or one host's part of it.

    Attributes:
        tokens_BxT: int32, token ids; 0 at audio and padding columns.
        position_BxT: int32, RoPE position: counts the real tokens (text and audio) of the segment from 0; 0 at padding.
        segment_BxT: int32, 0 = padding, 1.. = the examples of the row.
        span_start_BxT: int32, first column of the clip that this audio token belongs to; the column itself elsewhere.
        span_end_BxT: int32, one past the last column of that clip; the column + 1 elsewhere.
        audio_source_BxT: int32, k * A + a where the column holds audio token a of clip k; -1 elsewhere.
        waveform_BxKxS: float32 in [-1, 1], 16 kHz, clean (a change of speed is applied already); zeros after
            `n_samples_BxK`.
        n_samples_BxK: int32, valid samples; 0 = no clip.
        audio_position_BxKxA: int32, the column of that audio token; 0 where there is none.
        request_audio_BxT: bool, the column's segment has audio.
        target_position_BxR: int32, the column whose hidden state predicts the target; 0 where there is none.
        target_id_BxR: int32, the token to predict; 0 where there is none.
        target_weight_BxR: float32, 0 = no target.
        teacher_BxKxPxAxE: float16, precomputed teacher states pooled to audio tokens, zeros where there are none;
            None if not precomputed.
        text_tokens_MxL: int32, rows of plain text; None if the run uses no text pool.
        text_segment_MxL: int32, the document within the row, 1..; 0 = padding; None with `text_tokens_MxL`.
        reading: the rows as text; None if no objective reads it.
    """

    tokens_BxT: Array
    position_BxT: Array
    segment_BxT: Array
    span_start_BxT: Array
    span_end_BxT: Array
    audio_source_BxT: Array
    waveform_BxKxS: Array
    n_samples_BxK: Array
    audio_position_BxKxA: Array
    request_audio_BxT: Array
    target_position_BxR: Array
    target_id_BxR: Array
    target_weight_BxR: Array
    teacher_BxKxPxAxE: Array | None = None
    text_tokens_MxL: Array | None = None
    text_segment_MxL: Array | None = None
    reading: Reading | None = None
