"""The plan: pure, complete, and never over a shape."""

import collections
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aura_jax.audio.augment import speed_samples
from aura_jax.audio.features import n_audio_tokens
from aura_jax.data.batch import Part
from aura_jax.data.plan import BatchPlan, Lengths
from aura_jax.errors import UserError

SPEEDS = (10 / 9, 1.0, 10 / 11)
BUCKETS = (1.0, 2.0, 4.0)


def make_lengths(seed: int, n_rows: int, text_only: bool = True, name: str = "train.jsonl") -> Lengths:
    rng = np.random.default_rng(seed)
    samples = rng.integers(100, 56000, n_rows)
    if text_only:
        samples[rng.random(n_rows) < 0.2] = 0
    names = [f"{name}:{i + 1}" for i in range(n_rows)]
    return Lengths(names, samples, rng.integers(1, 6, n_rows), rng.integers(0, 9, n_rows), rng.integers(1, 12, n_rows))


def make_plan(lengths: list[Lengths], layout: str = "slot", **changes) -> BatchPlan:
    arguments = {"batch_size": 4, "bucket_seconds": BUCKETS, "token_rate": 12.5, "layout": layout, "speeds": SPEEDS}
    if layout == "packed":
        arguments |= {"pack_tokens": 150, "pack_clips": 3}
    return BatchPlan(lengths, **(arguments | changes))


def one_epoch(plan: BatchPlan, epoch: int = 0):
    first = sum(plan.batches_per_epoch(e) for e in range(epoch))
    return [plan.batch(first + i) for i in range(plan.batches_per_epoch(epoch))]


def picks(batches):
    return [pick for batch in batches for row in batch.examples for pick in row]


def check_fits(plan: BatchPlan, lengths: list[Lengths], batch) -> None:
    assert batch.shape in plan.shapes
    joined = [np.concatenate([np.asarray(source[field]) for source in lengths]) for field in range(1, 5)]
    for row in batch.examples:
        total = np.zeros(3, int)
        for pick in row:
            n_samples, prefix, suffix, response = (int(values[pick.row]) for values in joined)
            n_samples = speed_samples(n_samples, pick.speed)
            after = suffix + response - 1
            assert n_samples <= batch.shape.n_samples
            total += [prefix + n_audio_tokens(n_samples, 12.5) + after, n_samples > 0, response]
            if plan.layout == "slot":
                columns = batch.shape.n_tokens - batch.shape.n_audio
                assert (prefix <= batch.shape.n_prefix if n_samples else True) and len(row) == 1
                assert prefix + after <= columns if not n_samples else batch.shape.n_prefix + after <= columns
        if plan.layout == "packed":
            assert (total <= [batch.shape.n_tokens, batch.shape.n_clips, batch.shape.n_targets]).all()
        else:
            assert total[2] <= batch.shape.n_targets


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    n_rows=st.integers(8, 80),
    layout=st.sampled_from(["slot", "packed"]),
    weight=st.sampled_from([0.25, 1.0, 1.5, 2.0]),
    edges=st.sampled_from([None, (4, 9), (12,)]),
)
def test_a_training_epoch(seed, n_rows, layout, weight, edges):
    lengths = [make_lengths(seed, n_rows), make_lengths(seed + 1, 24, name="more.jsonl")]
    text_edges = edges if layout == "slot" else None
    plan = make_plan(lengths, layout, seed=seed, weights=(weight, 1.0), batch_size=2, text_edges=text_edges)
    again = pickle.loads(pickle.dumps(plan))
    for epoch in (0, 1):
        batches = one_epoch(plan, epoch)
        wanted = round(weight % 1 * n_rows) + int(weight) * n_rows + 24
        used = collections.Counter(pick.row for pick in picks(batches))
        assert all(count <= (-(-weight // 1) if row < n_rows else 1) for row, count in used.items())
        if layout == "slot":
            assert wanted - 2 < used.total() <= wanted and len(batches) == wanted // 2
        for batch in batches:
            check_fits(plan, lengths, batch)
            assert batch == again.batch(batch.index) and batch.epoch == epoch
            assert all(batch.examples)
            halves = [plan.batch(batch.index, Part((host,), 2)) for host in (0, 1)]
            assert halves[0].examples + halves[1].examples == batch.examples
            assert halves[0].shape == halves[1].shape == batch.shape


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), n_rows=st.integers(1, 60), layout=st.sampled_from(["slot", "packed"]))
def test_sequential_reads_every_row_once_and_ends(seed, n_rows, layout):
    lengths = [make_lengths(seed, n_rows)]
    plan = make_plan(lengths, layout, sequential=True, speeds=(0.9,), text_edges=(8,) if layout == "slot" else None)
    assert plan.n_batches is not None
    batches = [plan.batch(i) for i in range(plan.n_batches)]
    assert sorted(pick.row for pick in picks(batches)) == list(range(n_rows))
    assert {pick.speed for pick in picks(batches)} == {0.9}
    for batch in batches:
        check_fits(plan, lengths, batch)
        assert len(batch.examples) == 4
    assert all(all(batch.examples) for batch in batches[:-1])
    with pytest.raises(IndexError):
        plan.batch(plan.n_batches)


def test_epochs_and_seeds_differ_and_order_is_shuffled():
    lengths = [make_lengths(0, 200, text_only=False)]
    plan = make_plan(lengths)
    orders = [[pick.row for pick in picks(one_epoch(plan, epoch))] for epoch in (0, 1)]
    orders.append([pick.row for pick in picks(one_epoch(make_plan(lengths, seed=1)))])
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert [batch.shape for batch in one_epoch(plan)] != sorted(batch.shape for batch in one_epoch(plan))


def test_any_order_of_asking_gives_the_same_batches():
    lengths = [make_lengths(3, 50)]
    wanted = [make_plan(lengths, "packed").batch(i) for i in range(40)]
    plan = make_plan(lengths, "packed")
    assert [plan.batch(i) for i in reversed(range(40))] == wanted[::-1]


def test_speed_is_a_hash_of_seed_epoch_and_row_alone():
    few, many = (make_plan([make_lengths(0, n, text_only=False)]) for n in (60, 61))
    speeds = [{pick.row: pick.speed for pick in picks(one_epoch(plan))} for plan in (few, many)]
    assert all(speeds[0][row] == speeds[1][row] for row in set(speeds[0]) & set(speeds[1]))
    later = {pick.row: pick.speed for pick in picks(one_epoch(few, 1))}
    assert any(later[row] != speed for row, speed in speeds[0].items() if row in later)
    counts = collections.Counter(pick.speed for pick in picks(one_epoch(make_plan([make_lengths(0, 3000)]))))
    assert set(counts) == set(SPEEDS) and min(counts.values()) > 900


def test_a_row_taken_twice_may_have_two_speeds():
    plan = make_plan([make_lengths(0, 100, text_only=False)], weights=(2.0,))
    speeds = collections.defaultdict(set)
    for pick in picks(one_epoch(plan)):
        speeds[pick.row].add(pick.speed)
    assert sum(len(both) == 2 for both in speeds.values()) > 40


def test_a_remainder_moves_up_and_only_the_last_is_dropped():
    samples = np.array([8000] * 3 + [24000] * 3 + [48000] * 3)
    ones = np.ones(9, int)
    plan = make_plan([Lengths([""] * 9, samples, ones, ones, ones)], speeds=(1.0,), batch_size=2)
    batches = one_epoch(plan)
    seconds = sorted(batch.shape.n_samples for batch in batches)
    assert seconds == [16640, 32000, 32000, 64000]  # 16640: 1 s rounded up to whole tokens of 80 ms
    assert len({pick.row for pick in picks(batches)}) == 8


def test_packing_fills_rows():
    lengths = [make_lengths(5, 400, text_only=False)]
    plan = make_plan(lengths, "packed", bucket_seconds=(4.0,), pack_clips=8)
    used = [
        sum(
            lengths[0].n_prefix_N[pick.row]
            + n_audio_tokens(speed_samples(int(lengths[0].n_samples_N[pick.row]), pick.speed), 12.5)
            + lengths[0].n_suffix_N[pick.row]
            + lengths[0].n_response_N[pick.row]
            - 1
            for pick in row
        )
        for batch in one_epoch(plan)
        for row in batch.examples
    ]
    assert np.mean(used) > 0.85 * 150


def test_shapes_are_few():
    plan = make_plan([make_lengths(0, 100)], text_edges=(5, 8, 10))
    assert len(plan.shapes) == 3 * 4


def test_text_alone():
    lengths = Lengths(["a", "b"], np.zeros(2, int), np.array([3, 5]), np.zeros(2, int), np.array([2, 7]))
    plan = BatchPlan([lengths], batch_size=2, bucket_seconds=(), token_rate=12.5)
    assert plan.shapes == (plan.batch(7).shape,)
    assert plan.shapes[0][1:7] == (11, 1, 0, 0, 7, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bucket_seconds": (1.0, 2.0)}, r"train.jsonl:\d+: 3.* s .* add 4 to data.buckets, or lower data.max_seconds"),
        ({"layout": "packd"}, "unknown data.layout 'packd': did you mean 'packed'"),
        ({"layout": "packed", "pack_tokens": 20}, r"train.jsonl:\d+ has \d+ tokens, and .* set data.row_tokens to \d+"),
        ({"layout": "packed", "pack_clips": 0}, r"has 1 clips, and data.row_clips is 0: set data.row_clips to 1"),
        ({"batch_size": 0}, "data.batch_size"),
        ({"batch_size": 41}, "fills no batch of data.batch_size 41: lower data.batch_size"),
        ({"weights": (0.0,)}, r"data.train: the passes .* choose no row"),
        ({"speeds": (0.0,)}, "data.speeds .* positive"),
        ({"seed": -1}, "seed"),
        ({"token_rate": 13.0}, "token_rate"),
    ],
)
def test_what_is_refused_in_the_words_of_the_configuration(changes, message):
    with pytest.raises(UserError, match=message):
        make_plan([make_lengths(0, 40)], **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pack_clips": 3}, "with layout 'packed'"),
        ({"layout": "packed", "pack_tokens": None}, "with layout 'packed'"),
        ({"layout": "packed", "text_edges": (4,)}, "text_edges"),
        ({"weights": (1.0, 2.0)}, "2 weights for 1 sources"),
        ({"sequential": True}, "one speed"),
    ],
)
def test_arguments_that_contradict_each_other(changes, message):
    with pytest.raises(ValueError, match=message):
        make_plan([make_lengths(0, 40)], **changes)


def test_no_rows_and_odd_hosts_are_refused():
    with pytest.raises(UserError, match="no rows"):
        make_plan([])
    with pytest.raises(UserError, match="3 parts"):
        make_plan([make_lengths(0, 40)]).batch(0, Part((0,), 3))


def test_a_bucket_may_end_within_a_token():
    lengths = Lengths(["a"], np.array([480_000]), *np.ones((3, 1), int))
    plan = BatchPlan([lengths], batch_size=1, bucket_seconds=(30.0,), token_rate=6.25)
    assert plan.shapes[0].n_samples == 188 * 2560 and plan.shapes[0].n_audio == 188


@pytest.mark.parametrize("layout", ["slot", "packed"])
def test_every_text_reading_fits(layout):
    rng = np.random.default_rng(3)
    lengths = [make_lengths(3, 60)._replace(n_transcript_N=rng.integers(0, 70, 60))]
    plan = make_plan(lengths, layout, text_edges=(6, 12) if layout == "slot" else None)
    for batch in one_epoch(plan):
        assert batch.shape.n_reading % 8 == 0 or layout == "packed"
        for row in batch.examples:
            of = [lengths[0][field][[pick.row for pick in row]] for field in range(2, 6)]
            prefix, suffix, response, transcript = of
            assert (prefix + suffix + response - 1 + transcript).sum() <= batch.shape.n_reading
            assert transcript.max(initial=0) <= batch.shape.n_transcript
    with pytest.raises(UserError, match=r"tokens with its transcript, and data\.row_tokens is 150"):
        make_plan([lengths[0]._replace(n_transcript_N=np.full(60, 200))], "packed")
