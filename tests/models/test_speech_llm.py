"""The whole model: audio in its columns, scopes of LoRA, and results that no layout, bucket or neighbour changes."""

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
from aura_jax.models.embedder import EmbedderConfig
from aura_jax.models.llm import LLM, LLMConfig
from aura_jax.models.lora import LoRAConfig
from aura_jax.models.speech_llm import Columns, SpeechLLM, SpeechLLMConfig, text_context

M, D, V = 8, 24, 40
LLM_CONFIG = LLMConfig("llama", V, D, 32, 3, 4, 2, 8, 1000.0)
EMBEDDER = EmbedderConfig("stem", n_mels=M, width=12, out_width=D, frames_per_token=4)
LORA = LoRAConfig(n_blocks=2, rank=3, alpha=6.0, scope="request")
CONFIG = SpeechLLMConfig(LLM_CONFIG, EMBEDDER, LORA, mask="bidirectional")
VARIANTS = {
    "bidirectional, request": CONFIG,
    "causal, audio": dataclasses.replace(CONFIG, mask="causal", lora=dataclasses.replace(LORA, scope="audio")),
    "block, all, patch": dataclasses.replace(
        CONFIG,
        mask="block",
        chunk=2,
        lora=dataclasses.replace(LORA, scope="all"),
        embedder=dataclasses.replace(EMBEDDER, kind="patch"),
    ),
}


def spoken(prefix, n_frames: int, suffix, response) -> Example:
    return Example(prefix, suffix, response, np.zeros(n_frames * HOP, np.float32))


# 6 and 3 audio tokens, and none.
LONG = spoken([5, 6, 7], 45, [8, 9], [10, 11])
SHORT = spoken([3], 20, [4, 12, 13], [14])
TEXT = Example([20, 21], [], [22, 23, 24])


def mel_of(n_frames: int) -> np.ndarray:
    return np.random.default_rng(n_frames).normal(size=(n_frames, M)).astype(np.float32)


def lay_out(rows, n_tokens: int, n_audio: int, n_clips: int, n_prefix: int = 0):
    """Returns the columns, mel (NaN in the padding) and mel frames of `rows`: slot layout if n_prefix, else packed."""
    shape = Shape(len(rows), n_tokens, n_clips, n_audio, n_audio * 8 * HOP, 6, n_prefix)
    batch = assemble(rows, shape, layout="slot" if n_prefix else "packed", token_rate=12.5)
    n_frames_BxK = batch.n_samples_BxK // HOP
    mel = np.full((len(rows), n_clips, 8 * n_audio, M), np.nan, np.float32)
    for b, k in zip(*np.nonzero(n_frames_BxK), strict=True):
        mel[b, k, : n_frames_BxK[b, k]] = mel_of(n_frames_BxK[b, k])
    columns = Columns(**{field.name: getattr(batch, field.name) for field in dataclasses.fields(Columns)})
    return columns, mel, n_frames_BxK


# Two static shapes only, so that compilations are few: one without a column to spare, and a wide one.
TIGHT = lay_out([[LONG], [SHORT], [TEXT]], n_tokens=13, n_audio=6, n_clips=1, n_prefix=3)
WIDE = dict(n_tokens=32, n_audio=9, n_clips=3)
SPREAD = lay_out([[TEXT], [SHORT], [], [LONG]], **WIDE, n_prefix=7)
PACKED = lay_out([[SHORT, TEXT, LONG], [LONG, SHORT, TEXT], [], []], **WIDE)


@functools.cache
def draw(config: SpeechLLMConfig) -> dict:
    """Random variables whose B is not zero."""
    keys = {"params": jax.random.key(0), "lora": jax.random.key(1)}
    abstract = jax.eval_shape(lambda: SpeechLLM(config).init(keys, *TIGHT))
    leaves, tree = jax.tree.flatten(abstract)
    random = np.random.default_rng(0)
    return jax.tree.unflatten(tree, [(0.3 * random.normal(size=x.shape)).astype(np.float32) for x in leaves])


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def apply(config: SpeechLLMConfig, variables, layout, dtype=jnp.float32):
    return SpeechLLM(config, dtype, dtype).apply(variables, *layout)[0]


def run(config: SpeechLLMConfig, layout, variables: dict | None = None):
    """Returns hidden states [B, T, D], in numpy."""
    return np.asarray(apply(config, draw(config) if variables is None else variables, layout))


def states(h_BxTxD, layout, row: int, segment: int = 1):
    """The hidden states of one example, in order."""
    return h_BxTxD[row, layout[0].segment_BxT[row] == segment]


@pytest.mark.parametrize("variant", VARIANTS)
def test_hidden_states_depend_on_no_bucket_layout_or_neighbour(variant):
    h_tight, h_spread, h_packed = (run(VARIANTS[variant], layout) for layout in (TIGHT, SPREAD, PACKED))
    assert np.isfinite(h_tight).all() and np.isfinite(h_spread).all() and np.isfinite(h_packed).all()
    places = {"long": (0, 3, (0, 3), (1, 1)), "short": (1, 1, (0, 1), (1, 2)), "text": (2, 0, (0, 2), (1, 3))}
    for row_tight, row_spread, *places_packed in places.values():
        expected = states(h_tight, TIGHT, row_tight)
        others = [states(h_spread, SPREAD, row_spread), *(states(h_packed, PACKED, *p) for p in places_packed)]
        for other in others:
            assert other.shape == expected.shape
            assert np.abs(other - expected).max() <= 2e-6 * np.abs(expected).max()


def test_what_a_neighbour_says_changes_no_bit():
    columns, mel, n_frames = PACKED
    tokens = np.where(columns.segment_BxT == 1, columns.tokens_BxT + 1, columns.tokens_BxT)
    louder = mel.copy()
    louder[0, 0] += 1
    before, after = run(CONFIG, PACKED), run(CONFIG, (columns.replace(tokens_BxT=tokens), louder, n_frames))
    assert (states(after, PACKED, 0, 1) != states(before, PACKED, 0, 1)).any(-1).all()
    for segment in (2, 3):
        np.testing.assert_array_equal(states(after, PACKED, 0, segment), states(before, PACKED, 0, segment))


def test_audio_tokens_land_in_their_columns_and_text_is_untouched():
    model, variables = SpeechLLM(CONFIG), draw(CONFIG)
    heard = jax.jit(lambda: model.apply(variables, *PACKED, method="hear"))()
    x_BxTxD = np.asarray(heard.x_BxTxD)
    n_slots = PACKED[0].audio_position_BxKxA.shape[2]
    embedded = jax.jit(lambda: model.apply(variables, *PACKED[1:], n_slots, method="embed_audio"))()
    audio_BxKxAxD = np.asarray(embedded[0])
    table = variables["params"]["llm"]["embed"]["embedding"]
    # prefix, span, suffix and all but the last of the response, one example after the other
    expected = [
        *table[[3]], *audio_BxKxAxD[0, 0, :3], *table[[4, 12, 13]],
        *table[[20, 21, 22, 23]],
        *table[[5, 6, 7]], *audio_BxKxAxD[0, 1, :6], *table[[8, 9, 10]],
    ]  # fmt: skip
    np.testing.assert_array_equal(x_BxTxD[0, : len(expected)], expected)
    np.testing.assert_array_equal(x_BxTxD[1, 3:9], audio_BxKxAxD[1, 0, :6])
    assert len(np.unique(audio_BxKxAxD[0, :2, :3].reshape(-1, D), axis=0)) == 6


def test_the_tap_is_shown_the_audio_columns_of_every_clip():
    position_BxQ = np.asarray(SpeechLLM(CONFIG).context(PACKED[0]).tap_position_BxQ)
    assert position_BxQ.shape == (4, 3 * 9)
    np.testing.assert_array_equal(position_BxQ[0, :3], [1, 2, 3])  # the short clip
    np.testing.assert_array_equal(position_BxQ[0, 9:15], np.arange(14, 20))  # the long one, after the text
    np.testing.assert_array_equal(position_BxQ[1, :6], np.arange(3, 9))


def with_scope(scope: str) -> SpeechLLMConfig:
    return dataclasses.replace(CONFIG, mask="causal", lora=dataclasses.replace(LORA, scope=scope))


@functools.cache
def causal(scope: str):
    """Hidden states of PACKED with LoRA in that scope; "none": without the collection."""
    if scope == "none":
        return run(with_scope("audio"), PACKED, {"params": draw(CONFIG)["params"]})
    return run(with_scope(scope), PACKED)


@pytest.mark.parametrize("scope", ["request", "audio"])
def test_text_beside_speech_is_the_plain_llm_to_the_bit(scope):
    """In the same row even."""
    np.testing.assert_array_equal(states(causal(scope), PACKED, 0, 2), states(causal("none"), PACKED, 0, 2))


def test_without_the_collection_it_is_the_llm_by_itself():
    """An LLM that knows no LoRA and no audio, reading the text alone."""
    params = dict(draw(CONFIG)["params"]["llm"])
    params["plain"] = jax.tree.map(lambda *x: np.concatenate(x), params.pop("adapted"), params["plain"])
    tokens, position = jnp.array([[20, 21, 22, 23]]), jnp.arange(4)[None]
    forward = lambda llm: llm(llm.embed(tokens), text_context(position, jnp.ones_like(tokens)))[0]
    alone = jax.jit(lambda: LLM(LLM_CONFIG).apply({"params": params}, method=forward))()
    np.testing.assert_allclose(states(causal("none"), PACKED, 0, 2), alone[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("scope", "text_before_the_audio", "text_only"),
    [("all", True, True), ("request", True, False), ("audio", False, False)],
)
def test_where_lora_acts(scope, text_before_the_audio, text_only):
    """Under the causal mask text before the audio sees none, so that only a delta of its own can change it."""
    changed = (causal(scope) != causal("none")).any(-1)
    long = states(changed, PACKED, 0, 3)
    assert long[:3].all() == long[:3].any() == text_before_the_audio
    assert long[3:].all()  # the audio, and what follows it
    only = states(changed, PACKED, 0, 2)
    assert only.all() == only.any() == text_only

    mask = SpeechLLM(with_scope(scope)).context(PACKED[0]).lora_mask_BxT
    if scope == "all":
        assert mask is None
    elif scope == "request":
        np.testing.assert_array_equal(mask[0], np.isin(PACKED[0].segment_BxT[0], (1, 3)))
    else:
        np.testing.assert_array_equal(np.flatnonzero(mask[0]), [1, 2, 3, *range(14, 20)])


def test_a_nan_of_the_adapters_stays_in_the_requests_that_use_them():
    variables = draw(CONFIG)
    broken = variables | {"lora": jax.tree.map(lambda x: np.full_like(x, np.nan), variables["lora"])}
    h = run(CONFIG, SPREAD, broken)
    assert np.isnan(states(h, SPREAD, 3)).all()
    np.testing.assert_array_equal(states(h, SPREAD, 0), states(run(CONFIG, SPREAD), SPREAD, 0))


@pytest.mark.parametrize(
    ("variant", "first_changed"), [("causal, audio", 5), ("block, all, patch", 4), ("bidirectional, request", 0)]
)
def test_what_early_audio_tokens_know_of_the_end_of_the_clip(variant, first_changed):
    """The last mel frame is heard by audio token 5 of 6: what is before its chunk of 2 could have been streamed."""
    columns, mel, n_frames = TIGHT
    louder = mel.copy()
    louder[0, 0, 44] += 1
    changed = run(VARIANTS[variant], TIGHT) != run(VARIANTS[variant], (columns, louder, n_frames))
    expected = [False] * (3 + first_changed) + [True] * (9 - first_changed)
    np.testing.assert_array_equal(states(changed, TIGHT, 0).any(-1), expected)


def test_bfloat16_is_close():
    h = run(CONFIG, TIGHT)
    half = apply(CONFIG, draw(CONFIG), TIGHT, jnp.bfloat16)
    assert half.dtype == jnp.bfloat16
    assert 1e-4 < np.abs(np.asarray(half, np.float32) - h).max() / np.abs(h).max() < 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask": "bidirectionel"}, "unknown model.mask 'bidirectionel': did you mean 'bidirectional'?"),
        ({"mask": "block"}, "model.mask 'block' needs model.chunk of at least 1 audio token, not 0"),
        ({"chunk": 4}, "model.chunk 4 is for model.mask 'block', not 'bidirectional'"),
        ({"lora": dataclasses.replace(LORA, n_blocks=4)}, "lora.n_blocks must be 1 to 3, the LLM's depth, not 4"),
        ({"lora": dataclasses.replace(LORA, n_blocks=0)}, "lora.n_blocks must be 1 to 3, the LLM's depth, not 0"),
    ],
)
def test_impossible_values_are_named(changes, message):
    with pytest.raises(UserError, match=message) as caught:
        dataclasses.replace(CONFIG, **changes)
    assert "\n" not in str(caught.value)
