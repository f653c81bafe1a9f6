import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aura_jax.audio import augment
from aura_jax.errors import UserError

ROWS = 64


def keys(seed: int, n: int = ROWS) -> jax.Array:
    return jax.random.split(jax.random.key(seed), n)


@pytest.fixture(scope="module")
def waveform_BxS() -> np.ndarray:
    return (0.1 * np.random.default_rng(9).normal(size=(ROWS, 1600))).astype(np.float32)


def test_gain_is_one_factor_a_row_within_its_bounds(waveform_BxS: np.ndarray):
    ratio = np.asarray(augment.random_gain(keys(0), waveform_BxS, -6.0, 3.0) / waveform_BxS)
    gain_db = 20 * np.log10(ratio[:, 0])
    np.testing.assert_allclose(ratio, ratio[:, :1].repeat(1600, axis=1), rtol=1e-5)
    assert -6.0 <= gain_db.min() < -5.0 and 2.0 < gain_db.max() <= 3.0
    fixed = augment.random_gain(keys(0), waveform_BxS, 20.0, 20.0)
    np.testing.assert_allclose(fixed, 10 * waveform_BxS, rtol=1e-5)


@pytest.mark.parametrize("snr_db", [20.0, 10.0, 0.0])
def test_noise_has_the_snr_asked_for(waveform_BxS: np.ndarray, snr_db: float):
    n_samples_B = np.arange(ROWS, dtype=np.int32) + 1000
    valid = np.arange(1600) < np.asarray(n_samples_B)[:, None]
    noisy = augment.add_noise(keys(1), waveform_BxS, n_samples_B, snr_db, snr_db, 1.0)
    noise = np.asarray(noisy - waveform_BxS)
    assert not noise[~valid].any()
    signal_power = (np.asarray(waveform_BxS) ** 2 * valid).sum(1)
    measured_db = 10 * np.log10(signal_power / (noise**2 * valid).sum(1))
    np.testing.assert_allclose(measured_db, snr_db, atol=0.01)
    assert abs(np.corrcoef(noise[0][:1000], noise[1][:1000])[0, 1]) < 0.15  # each row has its own noise
    spectrum = np.abs(np.fft.rfft(noise[:, :1000])) ** 2
    halves = spectrum[:, :250].mean(), spectrum[:, 250:].mean()
    assert halves[0] == pytest.approx(halves[1], rel=0.1)  # white


def test_noise_range_and_probability(waveform_BxS: np.ndarray):
    lengths_B = np.full(ROWS, 1600, np.int32)
    noise = np.asarray(augment.add_noise(keys(2), waveform_BxS, lengths_B, 5.0, 15.0, 1.0) - waveform_BxS)
    snr_db = 10 * np.log10((np.asarray(waveform_BxS) ** 2).sum(1) / (noise**2).sum(1))
    assert snr_db.min() + 0.01 >= 5.0 and snr_db.max() <= 15.01 and np.ptp(snr_db) > 7
    half = np.asarray(augment.add_noise(keys(2), waveform_BxS, lengths_B, 5.0, 15.0, 0.5) != waveform_BxS).any(1)
    assert 16 < half.sum() < 48
    never = augment.add_noise(keys(2), waveform_BxS, lengths_B, 5.0, 15.0, 0.0)
    np.testing.assert_array_equal(never, waveform_BxS)


def test_silence_and_missing_clips_stay_as_they_are():
    for rows_BxS, n_samples in ((np.zeros((ROWS, 1600), np.float32), 1600), (np.ones((ROWS, 1600), np.float32), 0)):
        result = augment.add_noise(keys(3), rows_BxS, np.full(ROWS, n_samples, np.int32), 0.0, 0.0, 1.0)
        np.testing.assert_array_equal(result, rows_BxS)


def test_noise_does_not_depend_on_bucket_or_neighbours(waveform_BxS: np.ndarray):
    lengths_B = np.full(ROWS, 1500, np.int32)
    settings = (5.0, 15.0, 0.8)
    noisy = augment.add_noise(keys(4), waveform_BxS, lengths_B, *settings)
    padded_BxS = np.pad(waveform_BxS, ((0, 0), (0, 777)))
    longer = augment.add_noise(keys(4), padded_BxS, lengths_B, *settings)
    np.testing.assert_allclose(noisy[:, :1500], longer[:, :1500], atol=1e-6)
    reversed_rows = augment.add_noise(keys(4)[::-1], waveform_BxS[::-1], lengths_B, *settings)
    np.testing.assert_allclose(reversed_rows[::-1], noisy, atol=1e-6)


MASKS = {"n_freq_masks": 2, "freq_width": 10, "n_time_masks": 2, "time_width": 30}


@pytest.fixture(scope="module")
def mel_BxFxM() -> np.ndarray:
    return np.random.default_rng(5).normal(size=(ROWS, 100, 80)).astype(np.float32)


def test_masks_are_rectangles_of_the_mean(mel_BxFxM: np.ndarray):
    n_frames_B = np.clip(np.arange(ROWS, dtype=np.int32) + 61, max=100)
    masked = np.asarray(augment.spec_augment(keys(6), mel_BxFxM, n_frames_B, **MASKS))
    for row, n in enumerate(np.asarray(n_frames_B)):
        before, after = np.asarray(mel_BxFxM[row]), masked[row]
        np.testing.assert_array_equal(after[n:], before[n:])
        changed = (before != after)[:n]
        times, freqs = changed.all(axis=1), changed.all(axis=0)
        np.testing.assert_array_equal(changed, times[:, None] | freqs)
        assert times.sum() <= 60 and freqs.sum() <= 20
        np.testing.assert_allclose(after[:n][changed], before[:n].mean(), atol=1e-5)
    share = (masked != np.asarray(mel_BxFxM)).mean()
    assert 0.1 < share < 0.5


def test_mask_places_and_widths_cover_their_ranges():
    mel = np.random.default_rng(7).normal(size=(512, 20, 16)).astype(np.float32)
    n_frames_B = np.full(512, 12, np.int32)
    one = {"n_freq_masks": 1, "freq_width": 4, "n_time_masks": 1, "time_width": 50}
    changed = np.asarray(augment.spec_augment(keys(8, 512), mel, n_frames_B, **one) != mel)
    assert not changed[:, 12:].any()
    times, freqs = changed[:, :12].all(axis=2), changed[:, :12].all(axis=1)
    assert set(times.sum(axis=1)) == set(range(13))  # uniform over 0 to the width, here the clip's length
    assert times.any(axis=0).all()  # the first and the last frame too
    partly = ~times.all(axis=1)
    assert set(freqs[partly].sum(axis=1)) == {0, 1, 2, 3, 4} and freqs[partly].any(axis=0).all()


def test_spec_augment_does_not_depend_on_bucket(mel_BxFxM: np.ndarray):
    n_frames_B = np.arange(ROWS, dtype=np.int32) + 30
    padding = np.full((ROWS, 60, 80), np.nan, np.float32)  # whatever lies in the padding must not be read
    short = augment.spec_augment(keys(6), mel_BxFxM, n_frames_B, **MASKS)
    long = augment.spec_augment(keys(6), np.concatenate([mel_BxFxM, padding], axis=1), n_frames_B, **MASKS)
    np.testing.assert_allclose(short, long[:, :100], atol=1e-6)


def test_no_masks_and_no_frames_change_nothing(mel_BxFxM: np.ndarray):
    none = {"n_freq_masks": 0, "freq_width": 0, "n_time_masks": 0, "time_width": 0}
    for n_frames, masks in ((100, none), (0, MASKS)):
        masked = augment.spec_augment(keys(6), mel_BxFxM, np.full(ROWS, n_frames, np.int32), **masks)
        np.testing.assert_array_equal(masked, mel_BxFxM)


def test_inside_jit_with_traced_settings(waveform_BxS: np.ndarray):
    lengths_B = np.full(ROWS, 1600, np.int32)
    plain = augment.add_noise(keys(1), waveform_BxS, lengths_B, 0.0, 9.0, 0.5)
    traced = jax.jit(lambda *arguments: augment.add_noise(*arguments))
    inside = traced(keys(1), waveform_BxS, lengths_B, 0.0, 9.0, 0.5)
    np.testing.assert_allclose(plain, inside, atol=1e-6)


def test_narrow_types_stay():
    lengths_B = jax.ShapeDtypeStruct((ROWS,), jnp.int32)
    wave_BxS = jax.ShapeDtypeStruct((ROWS, 1600), jnp.bfloat16)
    mel_BxFxM = jax.ShapeDtypeStruct((ROWS, 100, 80), jnp.bfloat16)
    for result in (
        jax.eval_shape(augment.random_gain, keys(0), wave_BxS, 0.0, 1.0),
        jax.eval_shape(augment.add_noise, keys(0), wave_BxS, lengths_B, 0.0, 1.0, 1.0),
        jax.eval_shape(functools.partial(augment.spec_augment, **MASKS), keys(0), mel_BxFxM, lengths_B),
    ):
        assert result.dtype == jnp.bfloat16


def test_freq_mask_wider_than_the_spectrum(mel_BxFxM: np.ndarray):
    with pytest.raises(UserError, match="freq_width 81 exceeds the 80 mel bins: choose a smaller one"):
        augment.spec_augment(keys(6), mel_BxFxM, np.full(ROWS, 100, np.int32), **{**MASKS, "freq_width": 81})


@pytest.mark.parametrize("factor", [0.9, 1.0, 1.1, 1.37, 2.0])
@pytest.mark.parametrize("n_samples", [1, 159, 16_001])
def test_speed_keeps_the_length_rule(n_samples: int, factor: float):
    changed = augment.change_speed(np.ones(n_samples, np.float32), factor)
    assert len(changed) == augment.speed_samples(n_samples, factor) == round(n_samples / factor)
    assert changed.dtype == np.float32


def test_speed_moves_the_pitch():
    time = np.arange(16_000) / 16_000
    faster = augment.change_speed(np.sin(2 * np.pi * 500 * time).astype(np.float32), 1.25)
    peak_hz = np.abs(np.fft.rfft(faster)).argmax() * 16_000 / len(faster)
    assert peak_hz == pytest.approx(625, abs=2)
    expected = np.sin(2 * np.pi * 625 * np.arange(len(faster)) / 16_000)
    assert np.abs(faster - expected)[500:-500].max() < 1e-3


@pytest.mark.parametrize("factor", [0, -1.0, float("nan"), float("inf")])
def test_unusable_speed(factor: float):
    with pytest.raises(UserError, match=r"speed factor .* is not a positive number: use, for example, 0.9 or 1.1"):
        augment.change_speed(np.ones(10, np.float32), factor)
