"""The audio embedding layer against torch, its receptive fields, and what must not change its tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers.models.whisper.modeling_whisper import sinusoids as whisper_sinusoids

from aura_jax.audio import features
from aura_jax.errors import UserError
from aura_jax.models.embedder import KINDS, AudioEmbedder, EmbedderConfig, sinusoids

M, W, D = 10, 12, 16
KIND_AND_STACK = [("stem", 4), ("stem", 8), ("patch", 2), ("patch", 6)]  # all four token rates


def config(kind: str, frames_per_token: int = 4) -> EmbedderConfig:
    return EmbedderConfig(kind, n_mels=M, width=W, out_width=D, frames_per_token=frames_per_token)


def draw(*shape, seed: int = 0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@functools.cache
def variables(c: EmbedderConfig) -> dict:
    """Random, biases and gain included."""
    abstract = jax.eval_shape(AudioEmbedder(c).init, jax.random.key(0), jnp.zeros((1, 16, M)), jnp.array([16]))
    leaves, tree = jax.tree.flatten(abstract)
    return jax.tree.unflatten(tree, [0.3 * draw(*x.shape, seed=i) for i, x in enumerate(leaves)])


@functools.partial(jax.jit, static_argnames=("c", "dtype"))
def apply(c: EmbedderConfig, variables, mel_NxFxM, n_frames_N, dtype=jnp.float32):
    return AudioEmbedder(c, dtype).apply(variables, mel_NxFxM, n_frames_N)


def embed(c: EmbedderConfig, mel_NxFxM, n_frames_N, dtype=jnp.float32):
    return np.asarray(apply(c, variables(c), mel_NxFxM, np.asarray(n_frames_N), dtype))


def by_torch(c: EmbedderConfig, mel_FxM: np.ndarray) -> np.ndarray:
    """One clip, no padding: the definition, in torch."""
    p = jax.tree.map(lambda x: torch.tensor(np.asarray(x)), variables(c)["params"])
    x = torch.tensor(mel_FxM)
    if c.kind == "stem":
        conv = lambda x, w, stride: functional.gelu(
            functional.conv1d(x, w["kernel"].permute(2, 1, 0), w["bias"], stride=stride, padding=1)
        )
        x = conv(conv(x.T[None], p["stem"]["conv1"], 1), p["stem"]["conv2"], 2)[0].T
        x = x + whisper_sinusoids(len(x), W)
    stack = c.frames_per_token * (1 if c.kind == "stem" else 2)
    x = functional.pad(x, (0, 0, 0, -len(x) % stack)).reshape(-1, stack * x.shape[1])
    if c.kind == "patch":
        x = x @ p["patch"]["kernel"] + p["patch"]["bias"]
        x = x + whisper_sinusoids(len(x), W)
    x = functional.layer_norm(x, x.shape[-1:], p["norm"]["scale"], p["norm"]["bias"], eps=1e-6)
    x = x @ p["proj"]["kernel"] + p["proj"]["bias"]
    return (x / x.square().mean(-1, keepdim=True).sqrt() * p["text_rms"] * p["gain"]).numpy()


def test_sinusoids_are_whispers():
    np.testing.assert_allclose(sinusoids(1500, 384), whisper_sinusoids(1500, 384), atol=1e-4)


@pytest.mark.parametrize(("kind", "frames_per_token"), KIND_AND_STACK)
def test_equals_the_definition_whatever_the_bucket(kind, frames_per_token):
    """Clips of odd and even lengths in buckets of two sizes, with anything at all in the padding."""
    c, lengths = config(kind, frames_per_token), [1, 16, 23, 40]
    for n_frames in (40, 53):
        mel = np.full((len(lengths), n_frames, M), np.nan, np.float32)
        for n, length in enumerate(lengths):
            mel[n, :length] = draw(length, M, seed=length)
        tokens_NxAxD = embed(c, mel, lengths)
        assert tokens_NxAxD.shape[1] == -(-n_frames // (2 * frames_per_token))
        for n, length in enumerate(lengths):
            expected = by_torch(c, mel[n, :length])
            assert len(expected) == features.n_audio_tokens(length * features.HOP, 50 / frames_per_token)
            assert np.abs(tokens_NxAxD[n, : len(expected)] - expected).max() <= 1e-4 * np.abs(expected).max()
        assert np.isfinite(tokens_NxAxD).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_frame_reaches_the_tokens_that_hear_it(kind):
    """The stem's two convolutions see 2 mel frames beyond a token's own at its start, and 1 at its end."""
    c, mel = config(kind), draw(1, 48, M)
    before = embed(c, mel, [48])
    for frame in (0, 7, 8, 9, 20, 31, 32, 47):
        changed = mel.copy()
        changed[:, frame] += 1
        reached = set(np.flatnonzero((embed(c, changed, [48]) != before).any(-1)[0]))
        before_start, after_end = (2, 1) if kind == "stem" else (0, 0)
        expected = {a for a in range(6) if 8 * a - before_start <= frame < 8 * (a + 1) + after_end}
        assert reached == expected


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_have_the_size_of_text_embeddings(kind):
    """Whatever the mel's size: log-mel ranges over a few units, and loud and silent clips must arrive alike."""
    c = config(kind)
    mel = np.stack([draw(32, M), 100 * draw(32, M), 0.01 * draw(32, M), np.zeros((32, M), np.float32)])
    size = lambda params: np.sqrt((np.asarray(apply(c, {"params": params}, mel, np.full(4, 32))) ** 2).mean(-1))
    params = variables(c)["params"] | {"gain": np.float32(1), "text_rms": np.float32(0.13)}
    np.testing.assert_allclose(size(params), 0.13, rtol=1e-4)
    np.testing.assert_allclose(size(params | {"gain": np.float32(2)}), 0.26, rtol=1e-4)


def test_the_gain_starts_at_one():
    init = AudioEmbedder(config("patch")).init
    params = jax.jit(init)(jax.random.key(0), jnp.zeros((1, 16, M)), jnp.array([16]))["params"]
    assert params["gain"] == 1 and params["text_rms"] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_finite_and_padding_has_none(kind):
    c = config(kind)
    mel = draw(2, 24, M)
    loss = lambda v, mel: (AudioEmbedder(c).apply(v, mel, jnp.array([0, 13]))[1, :2] ** 3).sum()
    grads, mel_grad = jax.device_get(jax.jit(jax.grad(loss, argnums=(0, 1)))(variables(c), mel))
    assert all(np.isfinite(g).all() and np.any(g) for g in jax.tree.leaves(grads))
    assert (mel_grad[0] == 0).all() and (mel_grad[1, 13:] == 0).all() and (mel_grad[1, :13] != 0).any(-1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_close(kind):
    c, mel = config(kind), draw(1, 32, M)
    half, full = embed(c, mel, [32], jnp.bfloat16), embed(c, mel, [32])
    assert half.dtype == jnp.bfloat16
    assert np.abs(half.astype(np.float32) - full).max() < 0.05 * np.abs(full).max()


def test_unknown_kind_suggests_the_nearest():
    with pytest.raises(UserError, match=r"unknown embedder.kind 'stemm': did you mean 'stem'"):
        config("stemm")
