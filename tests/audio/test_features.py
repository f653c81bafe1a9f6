import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import WhisperFeatureExtractor

from aura_jax.audio import features
from aura_jax.audio.io import load_audio
from aura_jax.errors import UserError

SAMPLES = Path(__file__).parents[2] / "sample_data"
WINDOW = 30 * features.SAMPLE_RATE


@functools.cache
def real_clips(per_set: int = 4) -> list[np.ndarray]:
    """Every manifest's clips, evenly chosen: synthetic commands and real recordings."""
    clips = []
    for manifest in sorted(
        path for folder in ("commands", "recordings") for path in (SAMPLES / folder).glob("*.jsonl")
    ):
        rows = [json.loads(line) for line in manifest.read_text().splitlines()]
        clips += [load_audio(manifest.parent / row["audio"]) for row in rows[:: len(rows) // per_set]]
    assert len(clips) >= 6 * per_set
    return clips


@pytest.fixture(scope="module")
def clip_S() -> np.ndarray:
    return real_clips()[0][:16000]


def mel_of(*rows_S: np.ndarray, **options) -> np.ndarray:
    """Log-mel of one or two rows, always compiled for two."""
    rows_BxS = np.stack([*rows_S, *rows_S][:2]).astype(np.float32)
    if "n_samples_B" in options:
        options["n_samples_B"] = np.resize(options["n_samples_B"], 2).astype(np.int32)
    return np.asarray(features.log_mel(rows_BxS, **options))[: len(rows_S)]


def padded(waveform_S: np.ndarray, n_samples: int) -> np.ndarray:
    return np.pad(waveform_S, (0, n_samples - len(waveform_S))).astype(np.float32)[None]


@pytest.mark.parametrize("n_mels", [80, 128])
def test_equals_the_whisper_extractor(n_mels: int):
    rng = np.random.default_rng(0)
    time = np.arange(WINDOW) / features.SAMPLE_RATE
    waveforms = [
        *real_clips()[::4],
        np.concatenate(real_clips())[:WINDOW],  # a full window: the end is reflected
        0.1 * rng.normal(size=WINDOW),
        1e-4 * rng.normal(size=5 * features.SAMPLE_RATE),
        0.9 * np.sin(2 * np.pi * 1000 * time),
        np.zeros(WINDOW),
    ]
    extractor = WhisperFeatureExtractor(feature_size=n_mels)
    for waveform_S in waveforms:
        waveform_S = waveform_S.astype(np.float32)
        expected_MxF = extractor(waveform_S, sampling_rate=16000, return_tensors="np")["input_features"][0]
        mel_FxM = features.log_mel(jnp.asarray(padded(waveform_S, WINDOW)), n_mels, reflect_end=True)[0]
        assert mel_FxM.shape == (3000, n_mels) and mel_FxM.dtype == jnp.float32
        np.testing.assert_allclose(mel_FxM, expected_MxF.T, rtol=0, atol=1e-4)


@pytest.mark.parametrize("normalisation", ["whisper", "streaming"])
def test_result_does_not_depend_on_the_bucket(clip_S: np.ndarray, normalisation: str):
    n_samples = 15_000 + 7
    frames = features.n_frames(n_samples)
    results = []
    for bucket in (15_040, 16_000):
        row_S = padded(clip_S[:n_samples], bucket)[0]
        row_S[n_samples:] = np.nan  # whatever lies in the padding must not be read
        neighbour_S = np.random.default_rng(1).normal(size=bucket)
        mel = mel_of(row_S, neighbour_S, n_samples_B=[n_samples, bucket], normalisation=normalisation)
        assert mel.shape == (2, bucket // 160, 80)
        np.testing.assert_array_equal(mel[0, frames:], 0.0)
        results.append(mel[0, :frames])
    np.testing.assert_allclose(*results, rtol=0, atol=1e-6)


def test_valid_samples_with_and_without_padding_agree(clip_S: np.ndarray):
    np.testing.assert_allclose(mel_of(clip_S, n_samples_B=[16000]), mel_of(clip_S), atol=1e-6)


def test_streaming_normalisation_is_causal(clip_S: np.ndarray):
    changed_at = 8_000
    future_S = np.concatenate([clip_S[:changed_at], 5 * np.random.default_rng(2).normal(size=8_000)])
    unaffected = (changed_at - features.N_FFT // 2) // features.HOP + 1  # later windows hold changed samples
    past, past_of_changed = mel_of(clip_S, future_S, normalisation="streaming")[:, :unaffected]
    np.testing.assert_array_equal(past, past_of_changed)
    past, past_of_changed = mel_of(clip_S, future_S)[:, :unaffected]
    assert np.abs(past - past_of_changed).max() > 0.1  # the test can tell: the global maximum does look ahead


def test_streaming_floor_is_the_running_maximum():
    noise_S = np.random.default_rng(3).normal(size=3200)
    row_S = np.concatenate([np.zeros(3200), noise_S, np.zeros(9600)])
    mel_FxM = mel_of(row_S, normalisation="streaming")[0]
    np.testing.assert_allclose(mel_FxM[:15], (-10 + 4) / 4)  # silence before anything louder: the power floor itself
    np.testing.assert_allclose(mel_FxM[-10:], mel_FxM[20:40].max() - 2.0, atol=1e-5)  # 80 dB below the past's maximum
    np.testing.assert_allclose(mel_of(row_S)[0, -1], mel_FxM[-1], atol=1e-6)  # at the end the two maxima are one


def test_impulse_lands_in_its_frames():
    impulse_S = np.zeros(16_000)
    impulse_S[40 * features.HOP] = 1.0
    energy_F = mel_of(impulse_S)[0].max(axis=-1)
    assert energy_F.argmax() == 40
    np.testing.assert_array_equal(np.flatnonzero(energy_F > energy_F.min() + 1e-3), [39, 40, 41])
    assert energy_F[39] == pytest.approx(energy_F[41], abs=1e-5)


def test_clips_shorter_than_a_window_and_rows_without_a_clip():
    short = mel_of(np.full(160, 0.5), n_samples_B=[100])
    long = mel_of(np.full(16_000, 0.5), n_samples_B=[100])
    np.testing.assert_allclose(short[0, 0], long[0, 0], atol=1e-6)
    for normalisation in ("whisper", "streaming"):
        none = mel_of(np.ones(16_000), n_samples_B=[0], normalisation=normalisation)
        np.testing.assert_array_equal(none, 0.0)


def test_works_inside_jit_on_traced_lengths(clip_S: np.ndarray):
    lengths_B = jnp.array([900, 1600])
    batch_BxS = jnp.stack([clip_S, clip_S[::-1]])
    inside = jax.jit(lambda x_BxS, n_B: features.log_mel(x_BxS, n_samples_B=n_B))(batch_BxS, lengths_B)
    np.testing.assert_allclose(inside, mel_of(clip_S, clip_S[::-1], n_samples_B=lengths_B), atol=1e-6)


@pytest.mark.parametrize(
    ("n_samples", "frames", "encoder_frames", "tokens"),
    [
        (0, 0, 0, 0),
        (1, 1, 1, 1),
        (160, 1, 1, 1),
        (161, 2, 1, 1),
        (1280, 8, 4, 1),
        (1281, 9, 5, 2),
        (480_000, 3000, 1500, 375),
    ],
)
def test_counts(n_samples: int, frames: int, encoder_frames: int, tokens: int):
    expected = (frames, encoder_frames, tokens)
    counts = (features.n_frames, features.n_encoder_frames, lambda n: features.n_audio_tokens(n, 12.5))
    assert tuple(count(n_samples) for count in counts) == expected
    for array in (np.array([n_samples], np.int32), jnp.array([n_samples])):
        results = [count(array) for count in counts]
        assert all(result.dtype == array.dtype for result in results)
        assert tuple(int(result[0]) for result in results) == expected


@pytest.mark.parametrize("n", [0, 1, 4, 1500])
def test_encoder_samples_are_the_most_that_so_many_frames_cover(n: int):
    assert features.n_encoder_frames(features.encoder_samples(n)) == n
    assert features.n_encoder_frames(features.encoder_samples(n) + 1) == n + 1


@pytest.mark.parametrize(("rate", "frames"), [(50, 1), (25, 2), (12.5, 4), (8.33, 6), (50 / 6, 6), (6.25, 8)])
def test_frames_per_token(rate: float, frames: int):
    assert features.frames_per_token(rate) == frames


@pytest.mark.parametrize(
    ("rate", "message"),
    [
        (12, "token_rate 12 Hz does not divide the encoder's 50 Hz: the nearest that does is 12.5"),
        (8.3, "the nearest that does is 8.33333"),
        (0, "not in (0, 50]: use 25, 12.5, 8.33 or 6.25"),
        (-5, "not in (0, 50]"),
        (100, "not in (0, 50]"),
        (float("nan"), "not in (0, 50]"),
    ],
)
def test_unusable_token_rates(rate: float, message: str):
    with pytest.raises(UserError) as error:
        features.frames_per_token(rate)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("n_samples", "options", "message"),
    [
        (1601, {}, "multiple of 160 samples, got 1601"),
        (1600, {"normalisation": "global"}, "'global' is unknown: use 'whisper' or 'streaming'"),
        (1600, {"reflect_end": True, "n_samples_B": np.array([800])}, "leave n_samples_B out"),
        (320, {"reflect_end": True}, "more than 400 samples"),
    ],
)
def test_misuse(n_samples: int, options: dict, message: str):
    with pytest.raises(ValueError) as error:
        features.log_mel(np.zeros((1, n_samples), np.float32), **options)
    assert message in str(error.value)


def test_a_piece_is_the_whole_s_streaming_log_mel():
    waveform_S = np.random.default_rng(4).normal(size=16000).astype(np.float32) * np.linspace(
        0, 1, 16000, dtype=np.float32
    )
    whole = features.log_mel(waveform_S[None], normalisation="streaming")
    padded_S = np.concatenate([waveform_S[200:0:-1], waveform_S, np.zeros(120, np.float32)])
    maximum_1 = np.array([-np.inf], np.float32)
    for first, n in ((0, 7), (7, 33), (40, 60)):
        piece_S = padded_S[first * 160 : (first + n + 2) * 160]
        mel, maximum_1xG = features.log_mel_of_piece(piece_S[None], maximum_1)
        np.testing.assert_allclose(mel[0], whole[0, first : first + n], atol=1e-5)
        maximum_1 = maximum_1xG[:, -1]
