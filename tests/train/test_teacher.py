"""The teacher: precomputed states equal those of the step, and do not depend on the bucket."""

import jax.numpy as jnp
import numpy as np

from aura_jax import checkpoint, system
from aura_jax.audio.features import n_audio_tokens
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
