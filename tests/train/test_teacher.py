"""The teacher: precomputed states equal those of the step, and do not depend on the bucket."""

import os
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aura_jax import checkpoint, system
from aura_jax.audio.features import log_mel, n_audio_tokens, n_frames
from aura_jax.audio.io import AudioError
from aura_jax.convert import random_models
from aura_jax.data import pipeline
from aura_jax.data.pack import pack
from aura_jax.errors import UserError
from aura_jax.train import teacher
from aura_jax.train.inputs import Inputs

DISTILL = frozenset({"distill"})


def prepare(make_config, tmp_path, monkeypatch, window="unpadded"):
    monkeypatch.setenv("AURA_JAX_CACHE", str(tmp_path / "cache"))
    c = make_config(distill=1.0)
    c.teacher.update(window=window, precompute=True)
    c.data.speeds = (0.9, 1.0)
    built = system.build(c)
    weights = system.load_teacher(built, checkpoint.system_mesh(c))
    inputs = Inputs(built, tmp_path)
    return built, weights, inputs


def test_precomputed_states_equal_those_of_the_step(make_config, tmp_path, monkeypatch):
    built, weights, inputs = prepare(make_config, tmp_path, monkeypatch)
    inputs.precompute_teacher(weights, "abc")
    batch = next(inputs.batches(DISTILL, 0))
    states = teacher.teacher_states(
        built, weights, jnp.asarray(batch.waveform_BxKxS[:, 0]), jnp.asarray(batch.n_samples_BxK[:, 0])
    )
    stored = batch.teacher_BxKxPxAxE[:, 0].astype(np.float32)
    assert stored.shape == states.shape and np.abs(stored).max() > 0.1
    np.testing.assert_allclose(states, stored, atol=2e-3 * np.abs(stored).max())  # stored as float16
    assert len(list((tmp_path / "cache" / "teacher-states").iterdir())) == 1

    def forbidden(*unused):
        raise AssertionError("the states are in the cache")

    monkeypatch.setattr(teacher, "_run_teacher", forbidden)
    inputs.precompute_teacher(weights, "abc")


def test_states_of_shards_are_those_of_files_and_are_made_again_with_them(make_config, tmp_path, monkeypatch):
    built, weights, inputs = prepare(make_config, tmp_path, monkeypatch)
    inputs.precompute_teacher(weights, "abc")
    wanted = next(inputs.batches(DISTILL, 0))
    shards, made = tmp_path / "shards", tmp_path / "cache" / "teacher-states"
    pack([built.config.data.train[0][0]], str(shards), progress=False)
    built.config.data.train = ((str(shards), 1.0),)
    for n_stores in (2, 2):
        inputs = Inputs(built, tmp_path)
        inputs.precompute_teacher(weights, "abc")
        np.testing.assert_array_equal(next(inputs.batches(DISTILL, 0)).teacher_BxKxPxAxE, wanted.teacher_BxKxPxAxE)
        assert len(list(made.iterdir())) == n_stores
    os.utime(shards / "shard-0000000.array_record", (1, 1))
    Inputs(built, tmp_path).precompute_teacher(weights, "abc")
    assert len(list(made.iterdir())) == 3


def test_an_unpadded_teacher_does_not_hear_the_bucket(make_config, tmp_path, monkeypatch):
    built, weights, inputs = prepare(make_config, tmp_path, monkeypatch)
    batch = next(inputs.batches(DISTILL, 0))
    waveform, n = jnp.asarray(batch.waveform_BxKxS[:, 0]), jnp.asarray(batch.n_samples_BxK[:, 0])
    short = teacher.teacher_states(built, weights, waveform, n)
    longer = teacher.teacher_states(built, weights, jnp.pad(waveform, ((0, 0), (0, 12800))), n)
    np.testing.assert_allclose(short, longer[:, :, : short.shape[2]], atol=1e-4 * float(abs(short).max()))
    for row, count in enumerate(n):
        assert not np.asarray(short[row, :, n_audio_tokens(int(count), 12.5) :]).any()


def test_the_30_s_window_hears_silence_after_the_clip(make_config, tmp_path, monkeypatch):
    built, weights, inputs = prepare(make_config, tmp_path, monkeypatch, window="30s")
    batch = next(inputs.batches(DISTILL, 0))
    waveform, n = jnp.asarray(batch.waveform_BxKxS[:, 0]), jnp.asarray(batch.n_samples_BxK[:, 0])
    padded = teacher.teacher_states(built, weights, waveform, n)
    built.config.teacher.window = "unpadded"
    unpadded = teacher.teacher_states(built, weights, waveform, n)
    assert padded.shape == unpadded.shape
    assert float(abs(padded - unpadded).max()) > 1e-3


@pytest.mark.parametrize("window", ["unpadded", "30s"])
def test_a_batch_may_end_a_little_after_the_window(tiny_config, tmp_path, window):
    random_models.build_whisper(tmp_path, window_seconds=1)  # 50 positions: 6 tokens of 6.25 Hz and a quarter
    c = tiny_config()
    c.model.teacher, c.embedder.token_rate, c.teacher.window = str(tmp_path), 6.25, window
    built = system.build(c)
    weights = system.load_teacher(built, checkpoint.system_mesh(c))
    waveform, n = np.zeros((2, 7 * 2560), np.float32), np.array([16000, 6000])
    for row, count in zip(waveform, n, strict=True):
        row[:count] = 0.1 * np.random.default_rng(count).normal(size=count)
    states = np.asarray(jax.jit(lambda w, x, n: teacher.teacher_states(built, w, x, n))(weights, waveform, n))

    mel_options = {"reflect_end": True} if window == "30s" else {"n_samples_B": jnp.asarray(n)}
    mel = log_mel(jnp.asarray(waveform[:, :16000]), built.n_mels, **mel_options)
    valid = () if window == "30s" else (n_frames(jnp.asarray(n)),)
    _, taps = jax.jit(built.teacher.clone(tap=lambda h: h).apply)({"params": weights}, mel, *valid)
    assert states.shape == (2, len(built.pairs), 7, taps.shape[-1])
    for pair, (_, block) in enumerate(built.pairs):
        np.testing.assert_allclose(states[0, pair, 6], taps[block, 0, 48:50].mean(0), atol=1e-5)
        np.testing.assert_allclose(states[1, pair, 2], taps[block, 1, 16:19].mean(0), atol=1e-5)
    assert not states[1, :, 3:].any()
    with pytest.raises(UserError, match=r"longer than the teacher's window of 1 s: lower data\.max_seconds"):
        teacher.teacher_states(built, weights, jnp.zeros((1, 16000 + 2560)), jnp.array([1]))


def test_blocks_after_the_last_paired_one_are_not_run(make_config, tmp_path, monkeypatch):
    built, weights, inputs = prepare(make_config, tmp_path, monkeypatch)
    batch = next(inputs.batches(DISTILL, 0))
    waveform, n = jnp.asarray(batch.waveform_BxKxS[:, 0]), jnp.asarray(batch.n_samples_BxK[:, 0])
    both = teacher.teacher_states(built, weights, waveform, n)
    assert [block for _, block in built.pairs] == [0, 1]
    c = built.config
    c.distill.update(layer_map="list", pairs=((1, 0),))
    first = weights | {"blocks": jax.tree.map(lambda x: x[:1], weights["blocks"])}  # too few for two blocks
    alone = teacher.teacher_states(system.build(c), first, waveform, n)
    np.testing.assert_array_equal(alone, both[:, :1])


def test_the_cache_tells_dtypes_and_formats_apart(make_config, tmp_path, monkeypatch):
    built, weights, inputs = prepare(make_config, tmp_path, monkeypatch)
    made = []
    monkeypatch.setattr(teacher, "_run_teacher", lambda *arguments: made.append(arguments[-1]))
    monkeypatch.setattr(teacher, "TeacherStore", lambda directory: None)
    inputs.precompute_teacher(weights, "abc")
    built.config.model.dtype = "bfloat16"
    inputs.precompute_teacher(weights, "abc")
    monkeypatch.setattr(teacher, "_FORMAT", -1)
    inputs.precompute_teacher(weights, "abc")
    assert len(set(made)) == 3


def test_without_a_readable_clip_there_is_one_line(make_config, tmp_path, monkeypatch):
    _, weights, inputs = prepare(make_config, tmp_path, monkeypatch)

    def broken(path):
        raise AudioError(f"{path}: broken: record it again")

    monkeypatch.setattr(teacher, "load_audio", broken)
    monkeypatch.setattr(pipeline, "load_audio", broken)
    with pytest.raises(UserError, match=r"none of 24 clips can be read; the first: .*broken"):
        inputs.precompute_teacher(weights, "abc")
    with pytest.raises(UserError, match=r"no clip of the first 2 batches .*quarantine\.jsonl says why"):
        inputs.teacher_samples(weights, n_batches=2)


def test_few_groups_are_decoded_ahead_of_the_teacher():
    begun = []
    with ThreadPoolExecutor(2) as pool:
        read = teacher._read_ahead(pool, lambda group: begun.append(group) or group, range(20))
        for taken, group in enumerate(read):
            assert group == taken and len(begun) <= taken + 4
    assert len(begun) == 20


def test_statistics_appear_whole_or_not_at_all(tmp_path, monkeypatch):
    def killed(file, **_):
        with file if hasattr(file, "write") else open(file, "wb") as out:
            out.write(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", killed)
    with pytest.raises(KeyboardInterrupt):
        teacher.statistics(np.ones((3, 1, 2), np.float32), tmp_path / "s.npz")
    assert not (tmp_path / "s.npz").exists()


def test_statistics_standardise_and_survive_a_resume(tmp_path):
    rng = np.random.default_rng(0)
    states = rng.normal(3.0, [0.5, 2.0], (500, 1, 2)).astype(np.float32)
    statistics, baseline = teacher.statistics(states, tmp_path / "s.npz")
    normed = (states - statistics["mean"]) / statistics["std"]
    np.testing.assert_allclose(normed.mean(0), 0, atol=1e-3)
    np.testing.assert_allclose(normed.std(0), 1, atol=1e-2)
    assert 0.7 < baseline[0] < 1
    again, _ = teacher.statistics(None, tmp_path / "s.npz")
    np.testing.assert_array_equal(again["mean"], statistics["mean"])
