"""Audio paths that keep an encoder: adapters, CFormer, integrate-and-fire, and what must not change a token."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aura_jax.audio.features import HOP
from aura_jax.data.assemble import Example, assemble
from aura_jax.data.plan import Shape
from aura_jax.errors import UserError
from aura_jax.models.cformer import integrate_and_fire
from aura_jax.models.embedder import EmbedderConfig
from aura_jax.models.llm import LLMConfig
from aura_jax.models.speech_llm import Columns, SpeechLLM, SpeechLLMConfig
from aura_jax.models.whisper import WhisperConfig

M, W, D = 8, 12, 24
LLM_CONFIG = LLMConfig("llama", 40, D, 32, 2, 4, 2, 8, 1000.0)
WHISPER = WhisperConfig(M, W, 2, 2, 16, 1, 2, 16, 10, n_positions=64)
KINDS = {"stack": (4, 20, 0, 0), "conv": (8, 20, 0, 0), "cformer": (4, 0, 1, 2)}


def config(kind: str) -> SpeechLLMConfig:
    per_token, hidden, *blocks = KINDS[kind]
    embedder = EmbedderConfig(kind, M, W, D, per_token, hidden, *blocks)
    return SpeechLLMConfig(LLM_CONFIG, embedder, None, encoder=WHISPER)


@functools.cache
def variables(kind: str) -> dict:
    """Random, all of them."""
    model = SpeechLLM(config(kind))
    mel, n_frames = jnp.zeros((1, 1, 16, M)), jnp.full((1, 1), 16)
    init = functools.partial(model.init, method=lambda m: m.embed_audio(mel, n_frames, 4))
    leaves, tree = jax.tree.flatten(jax.eval_shape(init, jax.random.key(0)))
    random = np.random.default_rng(0)
    out = jax.tree.unflatten(tree, [0.4 * random.normal(size=x.shape).astype(np.float32) for x in leaves])
    out["params"]["embedder"] |= {"text_rms": np.float32(0.3), "gain": np.float32(1.2)}
    return out


@functools.partial(jax.jit, static_argnames=("kind", "n_slots"))
def heard(kind, mel_KxFxM, n_frames_K, n_slots=8, n_tokens_K=None):
    n_tokens = None if n_tokens_K is None else n_tokens_K[None]
    out = SpeechLLM(config(kind)).apply(
        variables(kind), mel_KxFxM[None], n_frames_K[None], n_slots, n_tokens, method="embed_audio"
    )
    return jax.tree.map(lambda x: x[0], out)


def mel(n_frames: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n_frames, M)).astype(np.float32)


# --- integrate and fire


def slow(weight_P: np.ndarray, n_tokens: int) -> np.ndarray:
    """Frame by frame: a frame's weight goes to the token that is open, and what passes 1 to the next."""
    share, token, filled = np.zeros((n_tokens, len(weight_P))), 0, 0.0
    for frame, left in enumerate(weight_P):
        while left > 0 and token < n_tokens:
            part = min(left, 1 - filled)
            share[token, frame] += part
            left, filled = left - part, filled + part
            if filled >= 1 - 1e-12:
                token, filled = token + 1, 0.0
    return share


@pytest.mark.parametrize(
    "weight_P",
    [[0.5, 0.5, 0.25, 0.75, 1.0], [0.3] * 9, [2.6, 0.1, 3.3], [0.0, 0.0, 1.0, 0.0], [0.0] * 4, [0.0, 0.4], [1.0]],
    ids=["whole", "split", "several at once", "one", "none", "less than one", "a single frame"],
)
def test_integrate_and_fire_is_what_a_loop_says(weight_P):
    found = integrate_and_fire(jnp.asarray([weight_P], jnp.float32), 5)[0]
    np.testing.assert_allclose(found, slow(np.asarray(weight_P), 5), atol=1e-6)


def test_integrate_and_fire_on_random_weights():
    weight_NxP = np.random.default_rng(1).gamma(1.0, 0.4, (8, 40))
    found = integrate_and_fire(jnp.asarray(weight_NxP, jnp.float32), 12)
    for share, weight_P in zip(found, weight_NxP, strict=True):
        np.testing.assert_allclose(share, slow(weight_P, 12), atol=2e-5)
    whole = np.minimum(weight_NxP.sum(1), 12)
    np.testing.assert_allclose(np.asarray(found).sum((1, 2)), whole, rtol=1e-5)


# --- all audio paths


@pytest.mark.parametrize("kind", KINDS)
def test_neither_padding_nor_neighbours_change_a_clips_tokens(kind):
    clips, counts = [mel(37, 1), mel(64, 2)], np.array([3, 5])
    alone = [
        heard(kind, clip[None], np.array([len(clip)]), n_tokens_K=counts[i : i + 1]) for i, clip in enumerate(clips)
    ]
    padded = np.full((2, 100, M), np.nan, np.float32)
    for row, clip in zip(padded, clips, strict=True):
        row[: len(clip)] = clip
    tokens_KxAxD, *rest = heard(kind, padded, np.array([37, 64]), n_tokens_K=counts)
    for i, (clip, (expected, *one)) in enumerate(zip(clips, alone, strict=True)):
        n = counts[i] if kind == "cformer" else -(-((len(clip) + 1) // 2) // KINDS[kind][0])
        np.testing.assert_allclose(tokens_KxAxD[i, :n], expected[0, :n], atol=2e-6)
        assert tokens_KxAxD.shape[1] >= n and np.isfinite(np.asarray(tokens_KxAxD)).all()
        if kind == "cformer":
            assert int(rest[0][i]) == int(one[0][0]) == n
            np.testing.assert_allclose(rest[1][i], one[1][0], rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_have_the_size_of_text_and_hear_the_clip(kind):
    clip, counts = mel(40), np.array([4])
    tokens_AxD = np.asarray(heard(kind, clip[None], np.array([40]), n_tokens_K=counts)[0][0])
    n = 4 if kind == "cformer" else -(-20 // KINDS[kind][0])
    np.testing.assert_allclose(np.sqrt((tokens_AxD[:n] ** 2).mean(-1)), 0.36, rtol=1e-4)
    changed = clip.copy()
    changed[-1] += 3
    other_AxD = np.asarray(heard(kind, changed[None], np.array([40]), n_tokens_K=counts)[0][0])
    assert (np.abs(other_AxD[:n] - tokens_AxD[:n]).max(-1) > 1e-4).all()  # the encoder sees all of it


# --- the CFormer's number of tokens


def test_left_alone_it_rounds_its_weights_and_makes_one_token_at_least():
    clips, n_frames = np.stack([mel(80, 3), mel(80, 4)]), np.array([80, 2])
    with jax.disable_jit():  # one operation after the other: two programs may fuse, and so round, differently
        tokens, n_K, total_K = heard("cformer", clips, n_frames, n_slots=60)
        assert n_K.tolist() == [max(1, round(float(total))) for total in total_K] and n_K[1] >= 1
        told = heard("cformer", clips, n_frames, n_slots=60, n_tokens_K=n_K)
    np.testing.assert_array_equal(tokens[0, : n_K[0]], told[0][0, : n_K[0]])
    assert int(heard("cformer", mel(80, 3)[None], np.array([80]), n_slots=2)[1][0]) == 2  # as many as there are slots


def test_gradients_are_finite_whatever_number_of_tokens_a_clip_has():
    model, counts = SpeechLLM(config("cformer")), jnp.array([[0, 1, 7]])
    clips, n_frames = (
        jnp.stack([jnp.zeros((48, M)), jnp.asarray(mel(48)), jnp.asarray(mel(48, 1))]),
        jnp.array([0, 2, 48]),
    )

    def loss(params):
        tokens, _, total = model.apply({"params": params}, clips[None], n_frames[None], 7, counts, method="embed_audio")
        return (tokens[0, 1, :1] ** 3).sum() + (tokens[0, 2] ** 3).sum() + total.sum()

    gradients = jax.jit(jax.grad(loss))(variables("cformer")["params"])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))
    assert np.abs(gradients["embedder"]["before"]["mlp"]["fc2"]["bias"][..., -1]).max() > 0  # the weights learn


def test_an_answer_sees_no_column_that_the_cformer_left_unused():
    """Columns for as many tokens as there may be give what columns for as many as there are give."""
    model, clip = SpeechLLM(config("cformer")), mel(40, 5)
    example = Example([5, 6], [7, 8, 9], waveform_S=np.zeros(40 * HOP, np.float32))

    def laid_out(n_audio: int):
        shape = Shape(1, 2 + n_audio + 3, 1, n_audio, 40 * HOP, 0, 2)
        batch = assemble([[example._replace(transcript_ids=[0] * n_audio)]], shape, layout="slot", token_rate=None)
        return Columns.of(batch), clip[None, None], np.array([[40]])

    whole = jax.jit(functools.partial(model.init, method=lambda m: m(*laid_out(4))))(jax.random.key(1))
    whole["params"] |= {name: variables("cformer")["params"][name] for name in ("encoder", "embedder")}

    def states(n_audio: int, known: bool):
        def run(m):
            out = m.hear(*laid_out(n_audio), known)
            h, _, _ = m.llm(out.x_BxTxD, m.context(out.columns).replace(tap_position_BxQ=None))
            return h, out.columns.segment_BxT, out.columns.position_BxT, out.n_tokens_BxK

        return jax.jit(lambda: model.apply(whole, method=run))()

    h, segment, position, total = states(30, False)
    n = max(1, round(float(total[0, 0])))
    assert 1 < n < 20  # it leaves some unused
    exact, *_ = states(n, True)
    real = np.flatnonzero(segment[0])
    assert len(real) == 2 + n + 3 and position[0, real].tolist() == list(range(2 + n + 3))
    np.testing.assert_allclose(h[0, real], exact[0], atol=2e-5)


# --- mistakes


def test_kinds_and_encoders_must_go_together():
    c = config("stack")
    with pytest.raises(UserError, match=r"embedder.kind 'stack' needs a Whisper in model.encoder"):
        dataclasses.replace(c, encoder=None)
    with pytest.raises(UserError, match=r"embedder.kind 'patch' keeps no encoder: empty model.encoder"):
        dataclasses.replace(c, embedder=dataclasses.replace(c.embedder, kind="patch"))
    with pytest.raises(UserError, match=r"'conv' halves the rate: use embedder.token_rate 25, 12.5 or 6.25"):
        EmbedderConfig("conv", M, W, D, 6)
