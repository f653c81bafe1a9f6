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
CONFIG = SpeechLLMConfig(LLM_CONFIG, EMBEDDER, LORA)
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


def spoken(prefix, n_frames: int, suffix, response, key: int) -> Example:
    return Example(prefix, suffix, response, np.zeros(n_frames * HOP, np.float32), key)


# 6 and 3 audio tokens, and none.
LONG = spoken([5, 6, 7], 45, [8, 9], [10, 11], key=1)
SHORT = spoken([3], 20, [4, 12, 13], [14], key=2)
TEXT = Example([20, 21], [], [22, 23, 24])


def mel_of(key: int, n_frames: int) -> np.ndarray:
    return np.random.default_rng(key).normal(size=(n_frames, M)).astype(np.float32)


def lay_out(rows, n_tokens: int, n_audio: int, n_prefix: int = 0, n_clips: int = 1):
    """Returns the columns, mel (NaN in the padding) and mel frames of `rows`: slot layout if n_prefix, else packed."""
    shape = Shape(len(rows), n_tokens, n_clips, n_audio, n_audio * 8 * HOP, 6, n_prefix)
    batch = assemble(rows, shape, layout="slot" if n_prefix else "packed", token_rate=12.5)
    n_frames_BxK = batch.n_samples_BxK // HOP
    mel = np.full((len(rows), n_clips, 8 * n_audio, M), np.nan, np.float32)
    for b, k in zip(*np.nonzero(n_frames_BxK), strict=True):
        mel[b, k, : n_frames_BxK[b, k]] = mel_of(batch.clip_key_BxK[b, k], n_frames_BxK[b, k])
    columns = Columns(**{field.name: getattr(batch, field.name) for field in dataclasses.fields(Columns)})
    return columns, mel, n_frames_BxK


@functools.cache
def draw(config: SpeechLLMConfig) -> dict:
    """Random variables whose B is not zero."""
    keys = {"params": jax.random.key(0), "lora": jax.random.key(1)}
    abstract = jax.eval_shape(lambda: SpeechLLM(config).init(keys, *lay_out([[TEXT]], 16, 1, 2)))
    leaves, tree = jax.tree.flatten(abstract)
    random = np.random.default_rng(0)
    return jax.tree.unflatten(tree, [jnp.asarray(0.3 * random.normal(size=x.shape), x.dtype) for x in leaves])


@functools.cache
def apply(config: SpeechLLMConfig, **options):
    return jax.jit(SpeechLLM(config, **options).apply)


def run(config: SpeechLLMConfig, layout, lora: bool = True):
    """Returns hidden states [B, T, D], in numpy."""
    variables = draw(config) if lora else {"params": draw(config)["params"]}
    return np.asarray(apply(config)(variables, *layout)[0])


def states(h_BxTxD, layout, row: int, segment: int = 1):
    """The hidden states of one example, in order."""
    return h_BxTxD[row, layout[0].segment_BxT[row] == segment]


@pytest.mark.parametrize("variant", VARIANTS)
def test_hidden_states_depend_on_no_bucket_layout_or_neighbour(variant):
    config = VARIANTS[variant]
    tight = lay_out([[LONG], [SHORT], [TEXT]], n_tokens=13, n_audio=6, n_prefix=3)
    wide = lay_out([[TEXT], [SHORT], [], [LONG]], n_tokens=29, n_audio=9, n_prefix=7)
    packed = lay_out([[SHORT, TEXT, LONG], [LONG, SHORT, TEXT]], n_tokens=32, n_audio=6, n_clips=3)
    h_tight, h_wide, h_packed = (run(config, layout) for layout in (tight, wide, packed))
    assert np.isfinite(h_tight).all() and np.isfinite(h_wide).all() and np.isfinite(h_packed).all()
    places = {"long": (0, 3, (0, 3), (1, 1)), "short": (1, 1, (0, 1), (1, 2)), "text": (2, 0, (0, 2), (1, 3))}
    for row_tight, row_wide, *places_packed in places.values():
        expected = states(h_tight, tight, row_tight)
        others = [states(h_wide, wide, row_wide), *(states(h_packed, packed, *p) for p in places_packed)]
        for other in others:
            assert other.shape == expected.shape
            assert np.abs(other - expected).max() <= 2e-6 * np.abs(expected).max()


def test_what_a_neighbour_says_changes_no_bit():
    layout = lay_out([[SHORT, LONG]], n_tokens=24, n_audio=6, n_clips=2)
    columns, mel, n_frames = layout
    before = run(CONFIG, layout)
    mel[0, 0] += 1
    tokens = np.where(columns.segment_BxT == 1, columns.tokens_BxT + 1, columns.tokens_BxT)
    after = run(CONFIG, (columns.replace(tokens_BxT=tokens), mel, n_frames))
    np.testing.assert_array_equal(states(after, layout, 0, 2), states(before, layout, 0, 2))
    assert (states(after, layout, 0, 1) != states(before, layout, 0, 1)).any(-1).all()


def test_audio_tokens_land_in_their_columns_and_text_is_untouched():
    layout = lay_out([[SHORT, TEXT, LONG], [LONG]], n_tokens=32, n_audio=6, n_clips=2)
    _, mel, n_frames = layout
    model, variables = SpeechLLM(CONFIG), draw(CONFIG)
    x_BxTxD = np.asarray(model.apply(variables, *layout, method="embed"))
    audio_BxKxAxD = np.asarray(model.apply(variables, mel, n_frames, method="embed_audio"))
    table = np.asarray(variables["params"]["llm"]["embed"]["embedding"])
    # prefix, span, suffix and all but the last of the response, one example after the other
    expected = [
        *table[[3]], *audio_BxKxAxD[0, 0, :3], *table[[4, 12, 13]],
        *table[[20, 21, 22, 23]],
        *table[[5, 6, 7]], *audio_BxKxAxD[0, 1, :6], *table[[8, 9, 10]],
    ]  # fmt: skip
    np.testing.assert_array_equal(x_BxTxD[0, : len(expected)], expected)
    np.testing.assert_array_equal(x_BxTxD[1, 3:9], audio_BxKxAxD[1, 0])
    assert len(np.unique(audio_BxKxAxD[0, :, :3].reshape(-1, D), axis=0)) == 6


def test_tap_sees_the_audio_columns_of_every_clip():
    layout = lay_out([[SHORT, LONG], [LONG]], n_tokens=24, n_audio=6, n_clips=2)
    _, states_NxBxQxD = apply(CONFIG, tap=lambda h_BxQxD, block, args: h_BxQxD)(draw(CONFIG), *layout)
    _, everywhere_NxBxTxD = apply(CONFIG, tap=lambda h_BxQxD, block, args: h_BxQxD)(
        draw(CONFIG), layout[0].replace(audio_position_BxKxA=np.tile(np.arange(24), (2, 1))[:, None]), *layout[1:]
    )
    np.testing.assert_array_equal(states_NxBxQxD[:, 0, :3], everywhere_NxBxTxD[:, 0, 1:4])
    np.testing.assert_array_equal(states_NxBxQxD[:, 0, 6:12], everywhere_NxBxTxD[:, 0, 10:16])
    np.testing.assert_array_equal(states_NxBxQxD[:, 1, :6], everywhere_NxBxTxD[:, 1, 3:9])


SPEECH_AND_TEXT = lay_out([[SHORT, TEXT], [LONG]], n_tokens=16, n_audio=6)


def with_scope(scope: str) -> SpeechLLMConfig:
    return dataclasses.replace(CONFIG, mask="causal", lora=dataclasses.replace(LORA, scope=scope))


@pytest.mark.parametrize("scope", ["request", "audio"])
def test_text_beside_speech_is_the_plain_llm_to_the_bit(scope):
    """In the same row even; and it equals the LLM by itself, which knows no LoRA and no audio."""
    config = with_scope(scope)
    with_lora, without = run(config, SPEECH_AND_TEXT), run(config, SPEECH_AND_TEXT, lora=False)
    text = states(with_lora, SPEECH_AND_TEXT, 0, 2)
    np.testing.assert_array_equal(text, states(without, SPEECH_AND_TEXT, 0, 2))

    params = dict(draw(config)["params"]["llm"])
    params["plain"] = jax.tree.map(lambda *x: jnp.concatenate(x), params.pop("adapted"), params["plain"])
    tokens, position = jnp.array([[20, 21, 22, 23]]), jnp.arange(4)[None]
    forward = lambda llm: llm(llm.embed(tokens), text_context(position, jnp.ones_like(tokens)))[0]
    alone = LLM(LLM_CONFIG).apply({"params": params}, method=forward)
    np.testing.assert_allclose(text, alone[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("scope", "text_before_the_audio", "text_only"),
    [("all", True, True), ("request", True, False), ("audio", False, False)],
)
def test_where_lora_acts(scope, text_before_the_audio, text_only):
    """Under the causal mask text before the audio sees none, so that only a delta of its own can change it."""
    config = with_scope(scope)
    changed = (run(config, SPEECH_AND_TEXT) != run(config, SPEECH_AND_TEXT, lora=False)).any(-1)
    long = states(changed, SPEECH_AND_TEXT, 1)
    assert long[:3].all() == long[:3].any() == text_before_the_audio
    assert long[3:].all()  # the audio, and what follows it
    only = states(changed, SPEECH_AND_TEXT, 0, 2)
    assert only.all() == only.any() == text_only

    mask = SpeechLLM(config).context(SPEECH_AND_TEXT[0]).lora_mask_BxT
    segment = SPEECH_AND_TEXT[0].segment_BxT
    if scope == "all":
        assert mask is None
    elif scope == "request":
        np.testing.assert_array_equal(mask[0], segment[0] == 1)
    else:
        np.testing.assert_array_equal(mask[1], (np.arange(16) >= 3) & (np.arange(16) < 9))


def test_a_nan_of_the_adapters_stays_in_the_requests_that_use_them():
    variables = draw(CONFIG)
    broken = variables | {"lora": jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), variables["lora"])}
    rows = lay_out([[LONG], [TEXT]], n_tokens=13, n_audio=6, n_prefix=3)
    h = np.asarray(apply(CONFIG)(broken, *rows)[0])
    assert np.isnan(states(h, rows, 0)).all()
    np.testing.assert_array_equal(states(h, rows, 1), states(run(CONFIG, rows, lora=False), rows, 1))


@pytest.mark.parametrize(
    ("mask", "chunk", "first_changed"), [("causal", 0, 5), ("block", 4, 4), ("bidirectional", 0, 0)]
)
def test_what_early_audio_tokens_know_of_the_end_of_the_clip(mask, chunk, first_changed):
    """The last mel frame is heard by audio token 5 of 6: what is before its chunk could have been streamed."""
    config = dataclasses.replace(CONFIG, mask=mask, chunk=chunk)
    columns, mel, n_frames = lay_out([[LONG]], n_tokens=13, n_audio=6, n_prefix=3)
    before = states(run(config, (columns, mel, n_frames)), (columns,), 0)
    mel[0, 0, 44] += 1
    after = states(run(config, (columns, mel, n_frames)), (columns,), 0)
    changed = (after != before).any(-1)
    np.testing.assert_array_equal(changed, [False] * (3 + first_changed) + [True] * (9 - first_changed))


def test_bfloat16_is_close():
    layout = lay_out([[LONG], [SHORT]], n_tokens=13, n_audio=6, n_prefix=3)
    h, _ = apply(CONFIG, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)(draw(CONFIG), *layout)
    assert h.dtype == jnp.bfloat16
    expected = run(CONFIG, layout)
    assert np.abs(np.asarray(h, np.float32) - expected).max() < 0.1 * np.abs(expected).max()


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
