"""Columns: a golden row, and the same content in every layout and bucket."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aura_jax.audio.features import n_audio_tokens
from aura_jax.data.assemble import Example, assemble
from aura_jax.data.plan import Shape


def shape(n_tokens=20, n_clips=1, n_audio=4, n_targets=6, n_prefix=2) -> Shape:
    return Shape(1, n_tokens, n_clips, n_audio, n_audio * 1280, n_targets, n_prefix)


def clip(n_samples: int, value: float = 0.5) -> np.ndarray:
    return np.full(n_samples, value, np.float32)


def test_a_row_of_the_slot_layout():
    example = Example((11,), (12, 13), (14, 15, 16), clip(2 * 1280 + 1), teacher_PxAxE=np.ones((2, 3, 5)))
    b = assemble([[example], []], shape(12), layout="slot", token_rate=12.5, teacher_shape=(2, 5))
    assert b.tokens_BxT[0].tolist() == [11, 0, 0, 0, 0, 0, 12, 13, 14, 15, 0, 0]
    assert b.segment_BxT[0].tolist() == [1, 0, 1, 1, 1, 0, 1, 1, 1, 1, 0, 0]
    assert b.position_BxT[0].tolist() == [0, 0, 1, 2, 3, 0, 4, 5, 6, 7, 0, 0]
    assert b.span_start_BxT[0].tolist() == [0, 1, 2, 2, 2, 5, 6, 7, 8, 9, 10, 11]
    assert b.span_end_BxT[0].tolist() == [1, 2, 5, 5, 5, 6, 7, 8, 9, 10, 11, 12]
    assert b.audio_source_BxT[0].tolist() == [-1, -1, 0, 1, 2] + [-1] * 7
    assert b.audio_position_BxKxA[0].tolist() == [[2, 3, 4, 0]]
    assert b.request_audio_BxT[0].tolist() == (b.segment_BxT[0] > 0).tolist()
    assert b.target_position_BxR[0].tolist() == [7, 8, 9, 0, 0, 0]
    assert b.target_id_BxR[0].tolist() == [14, 15, 16, 0, 0, 0]
    assert b.target_weight_BxR.tolist() == [[1, 1, 1, 0, 0, 0], [0] * 6]
    assert b.n_samples_BxK.tolist() == [[2561], [0]]
    assert b.teacher_BxKxPxAxE is not None
    assert b.teacher_BxKxPxAxE.dtype == np.float16 and b.teacher_BxKxPxAxE[0, 0].sum(axis=(0, 2)).tolist() == [
        10
    ] * 3 + [0]
    assert not b.segment_BxT[1].any() and (b.span_end_BxT[1] == np.arange(1, 13)).all()


def test_text_runs_around_the_slot():
    b = assemble([[Example((1, 2, 3), (), (4, 5))]], shape(9), layout="slot", token_rate=12.5)
    assert b.tokens_BxT[0].tolist() == [1, 2, 0, 0, 0, 0, 3, 4, 0]
    assert b.position_BxT[0].tolist() == [0, 1, 0, 0, 0, 0, 2, 3, 0]
    assert b.target_position_BxR[0, :2].tolist() == [6, 7] and not b.request_audio_BxT.any()


def test_a_row_of_the_packed_layout():
    rows = [[Example((1,), (2,), (3,), clip(1280)), Example((4,), (), (5, 6)), Example((), (), (7,), clip(1281))]]
    b = assemble(rows, shape(9, n_clips=2, n_audio=2), layout="packed", token_rate=12.5)
    assert b.segment_BxT[0].tolist() == [1, 1, 1, 2, 2, 3, 3, 0, 0]
    assert b.position_BxT[0].tolist() == [0, 1, 2, 0, 1, 0, 1, 0, 0]
    assert b.audio_source_BxT[0].tolist() == [-1, 0, -1, -1, -1, 2, 3, -1, -1]
    assert b.span_end_BxT[0, 5:7].tolist() == [7, 7]
    assert b.target_position_BxR[0].tolist() == [2, 3, 4, 6, 0, 0]
    assert b.target_id_BxR[0].tolist() == [3, 5, 6, 7, 0, 0]
    assert b.request_audio_BxT[0].tolist() == [True] * 3 + [False] * 2 + [True] * 2 + [False] * 2
    assert b.n_samples_BxK.tolist() == [[1280, 1281]]


def read_back(batch) -> list:
    """Each example as a reader of the batch sees it, whatever the layout."""
    seen = []
    for row in range(len(batch.tokens_BxT)):
        for segment in range(1, batch.segment_BxT[row].max() + 1):
            (columns,) = np.nonzero(batch.segment_BxT[row] == segment)
            place = {column: i for i, column in enumerate(columns)}
            assert batch.position_BxT[row, columns].tolist() == list(range(len(columns)))
            sources = batch.audio_source_BxT[row, columns]
            audio = columns[sources >= 0]
            waveform = None
            if len(audio):
                k, a = np.divmod(sources[sources >= 0], batch.audio_position_BxKxA.shape[2])
                assert len(set(k)) == 1 and a.tolist() == list(range(len(audio)))
                assert batch.audio_position_BxKxA[row, k[0], : len(a)].tolist() == audio.tolist()
                assert set(batch.span_start_BxT[row, audio]) == {audio[0]}
                assert set(batch.span_end_BxT[row, audio]) == {audio[-1] + 1}
                n_samples = batch.n_samples_BxK[row, k[0]]
                assert len(a) == n_audio_tokens(n_samples, 12.5)
                waveform = batch.waveform_BxKxS[row, k[0], :n_samples].tobytes()
                assert not batch.waveform_BxKxS[row, k[0], n_samples:].any()
            targets = [
                (place[position], int(token))
                for position, token, weight in zip(
                    batch.target_position_BxR[row],
                    batch.target_id_BxR[row],
                    batch.target_weight_BxR[row],
                    strict=True,
                )
                if weight and position in place
            ]
            assert (batch.request_audio_BxT[row, columns] == (waveform is not None)).all()
            seen.append((batch.tokens_BxT[row, columns].tolist(), [sources >= 0], targets, waveform))
    return [repr(example) for example in seen]


ids = lambda low, high: st.lists(st.integers(1, 99), min_size=low, max_size=high)


@st.composite
def examples(draw):
    made = []
    for number in range(draw(st.integers(1, 8))):
        n_samples = draw(st.integers(0, 3 * 1280))
        waveform = clip(n_samples, number + 1) if n_samples else None
        made.append(Example(draw(ids(1, 4)), draw(ids(0, 3)) if n_samples else (), draw(ids(0, 5)), waveform))
    return made


@settings(max_examples=60, deadline=None)
@given(made=examples(), extra=st.integers(0, 3))
def test_layout_and_bucket_change_nothing_that_is_read(made, extra):
    slot = assemble([[e] for e in made], shape(40, 1, 3 + extra, 5 + extra, 4 + extra), layout="slot", token_rate=12.5)
    packed = assemble([made[:3], made[3:]], shape(120, 8, 3, 40, 0), layout="packed", token_rate=12.5)
    assert read_back(slot) == read_back(packed)
    assert len(read_back(slot)) == len(made)


@pytest.mark.parametrize(
    ("layout", "row", "message"),
    [
        ("slot", [Example((1,)), Example((2,))], "2 examples"),
        ("slot", [Example((1, 2, 3), (), (), clip(9))], "a prefix of 3"),
        ("slot", [Example((1,), (2,) * 20, (), clip(9))], "does not fit"),
        ("slot", [Example((1,), (), (), clip(9999))], "does not fit"),
        ("slot", [Example((1,), (), (2,) * 7)], "does not fit"),
        ("packed", [Example((1,), (), (), clip(9))] * 2, "does not fit"),
        ("packed", [Example((1,) * 21)], "does not fit"),
        ("packed", [Example((), (), (5,))], "no column predicts"),
    ],
)
def test_what_does_not_fit(layout, row, message):
    with pytest.raises(ValueError, match=message):
        assemble([row], shape(), layout=layout, token_rate=12.5)


def test_teacher_states_must_cover_the_clip():
    row = [Example((1,), (), (2,), clip(2560), np.zeros((1, 3, 4)))]
    with pytest.raises(ValueError, match="the 2 audio tokens"):
        assemble([row], shape(), layout="slot", token_rate=12.5, teacher_shape=(1, 4))


@pytest.mark.parametrize("layout", ["slot", "packed"])
def test_a_text_reading_has_the_transcript_in_place_of_the_audio(layout):
    spoken = Example((1,), (2,), (3, 4), clip(1280), transcript_ids=(8, 9))
    written = Example((5,), (), (6, 7))
    rows = [[spoken, written]] if layout == "packed" else [[spoken], [written]]
    shapes = shape(12, n_clips=2 if layout == "packed" else 1)._replace(n_reading=10, n_transcript=3)
    batch = assemble(rows, shapes, layout=layout, token_rate=12.5)
    r = batch.reading
    assert r is not None
    join = lambda x: [value for row in x.tolist() for value in row if value]
    assert join(r.tokens_BxU) == [1, 8, 9, 2, 3, 5, 6]
    assert join(r.position_BxU) == [1, 2, 3, 4, 1]
    at = 5 if layout == "packed" else 0
    assert join(r.target_position_BxR) == ([3, 4, 5, 6] if layout == "packed" else [3, 4, 1])
    assert r.target_position_BxR[-1].max() == at + 1
    assert r.transcript_position_BxKxI[0, 0].tolist() == [1, 2, 0] and r.n_transcript_BxK.sum() == 2
    # The same targets in both, each predicted by the token before it, the first by the last of the prompt.
    for b in range(len(rows)):
        n = int(batch.target_weight_BxR[b].sum())
        for position_BxT, tokens_BxT in (
            (batch.target_position_BxR, batch.tokens_BxT),
            (r.target_position_BxR, r.tokens_BxU),
        ):
            before = tokens_BxT[b, position_BxT[b, :n]].tolist()
            assert before in ([2, 3, 5, 6], [2, 3], [5, 6])
    with pytest.raises(ValueError, match="5 tokens with its transcript does not fit"):
        assemble([[spoken]], shapes._replace(n_reading=4), layout="packed", token_rate=12.5)


def test_without_a_reading_there_is_none():
    assert assemble([[]], shape(12), layout="slot", token_rate=12.5).reading is None
