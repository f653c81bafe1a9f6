"""From a configuration to batches: which rows are taken, and what a mistake is told."""

import itertools
import json

import numpy as np
import pytest
import soundfile

from aura_jax import system
from aura_jax.data import sources
from aura_jax.data.pack import pack
from aura_jax.errors import UserError
from aura_jax.train.inputs import Inputs


@pytest.fixture
def config(make_config, tmp_path):
    """Clips of 1 s, named with their samples; `seconds` where a manifest says so."""
    c = make_config()
    lines = []
    for n_samples, seconds in ((16000, 1.0), (16000, None), (16008, 1.0), (15000, None), (16020, None)):
        path = tmp_path / f"{n_samples}-{seconds}.wav"
        soundfile.write(path, 0.1 * np.sin(np.arange(n_samples) / 9), 16000)
        lines.append({"audio": path.name, "text": "a", "voice": "x"} | ({"seconds": seconds} if seconds else {}))
    (tmp_path / "exact.jsonl").write_text("\n".join(map(json.dumps, lines)))
    c.data.train = ((str(tmp_path / "exact.jsonl"), 1.0),)
    c.data.update(max_seconds=1.0, buckets=(), batch_size=4)
    return c


def test_a_clip_of_exactly_max_seconds_is_taken(config, tmp_path, monkeypatch):
    def forbidden(*unused, **also_unused):
        raise AssertionError("the clips were measured already")

    monkeypatch.setattr(sources, "clip_samples", forbidden)
    inputs = Inputs(system.build(config), tmp_path / "run")
    batch = next(inputs.batches(frozenset({"lm"}), 0))
    assert sorted(batch.n_samples_BxK[:, 0]) == [15000, 16000, 16000, 16000]
    (remark,) = inputs.remarks
    assert "exact.jsonl: 1 of 5 clips are outside" in remark


def test_data_train_names_a_folder_of_shards_or_its_index(config, tmp_path):
    (manifest, _), n_batches, active = config.data.train[0], 5, frozenset({"lm"})
    config.data.text_pool = ""
    pack([manifest], str(tmp_path / "shards"), shard_bytes=40_000, progress=False)
    read = {}
    for path in (manifest, str(tmp_path / "shards"), str(tmp_path / "shards" / "index.json")):
        config.data.train = ((path, 1.0),)
        inputs = Inputs(system.build(config), tmp_path / "run")
        read[path] = list(itertools.islice(inputs.batches(active, 0), n_batches))
        assert len(inputs.remarks) == 1
    wanted, *others = read.values()
    for other in others:
        for one, two in zip(wanted, other, strict=True):
            for a, b in zip(one, two, strict=True):
                np.testing.assert_array_equal(a, b)


def test_no_row_left(config, tmp_path):
    config.data.max_seconds = 0.5
    with pytest.raises(UserError, match=r"exact\.jsonl: no row is left .*data\.min_seconds and data\.max_seconds"):
        Inputs(system.build(config), tmp_path)


def test_nothing_to_hold_out_names_the_mend(config, tmp_path):
    config.data.validation_values = ("y",)
    with pytest.raises(UserError, match=r"no training row has voice .* --config\.data\.validation_values='\(\)'"):
        Inputs(system.build(config), tmp_path)


def test_plain_text_ends_with_the_pool(config, tmp_path):
    inputs = Inputs(system.build(config), tmp_path)
    (chunk,) = inputs.plain_text(1)
    assert chunk.shape == (32, 32) and chunk.dtype == np.int32
    chunks = list(itertools.islice(inputs.plain_text(10**9), 100))
    n_rows = sum(map(len, chunks))
    pool = inputs._text_pool
    assert n_rows - len(chunk) < 2 * pool.batches_per_pass <= n_rows


def test_distilling_leaves_out_sources_that_are_text_only(config, tmp_path):
    rows = [{"prompt": "what is this", "response": f"it is {n}"} for n in range(8)]
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, rows)))
    speech = config.data.train
    config.data.train = ((str(tmp_path / "text.jsonl"), 1.0), *speech)
    inputs = Inputs(system.build(config), tmp_path / "run")
    distilled = next(inputs.batches(frozenset({"distill"}), 0))
    assert (distilled.n_samples_BxK > 0).all()
    both = [batch.n_samples_BxK for batch in itertools.islice(inputs.batches(frozenset({"lm"}), 0), 3)]
    assert {(n > 0).any() for samples in both for n in samples} == {True, False}
    config.data.train = config.data.train[:1]
    with pytest.raises(UserError, match=r"data\.train is text only"):
        next(Inputs(system.build(config), tmp_path / "run").batches(frozenset({"distill"}), 0))


def test_default_buckets_hold_the_longest_clip_at_the_slowest_speed(config, tmp_path):
    config.data.speeds = (0.5,)
    batch = next(Inputs(system.build(config), tmp_path / "run").batches(frozenset({"lm"}), 0))
    assert batch.n_samples_BxK.max() == 32000 <= batch.waveform_BxKxS.shape[2]


def test_lengths_suit_the_attention_kernel(config, tmp_path):
    built = system.build(config)
    lengths = {}
    for attention in ("xla", "cudnn"):
        built.config.model.attention = attention
        lengths[attention] = next(Inputs(built, tmp_path / "run").batches(frozenset({"lm"}), 0)).tokens_BxT.shape[1]
    assert lengths["xla"] % 8 and lengths["cudnn"] == -(-lengths["xla"] // 8) * 8
