"""What must not change the LLM's result (cache, remat, stacks, neighbours), its tree, its taps and its errors."""

import dataclasses
import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aura_jax.errors import UserError
from aura_jax.models.llm import LLM, Cache, Context, LLMConfig, blocks_apart
from aura_jax.models.lora import LoRAConfig
from aura_jax.models.speech_llm import text_context

CONFIG = LLMConfig(
    family="llama",
    vocab=50,
    width=24,
    mlp_width=40,
    n_blocks=4,
    n_heads=4,
    n_kv_heads=2,
    head_width=8,
    rope_theta=1000.0,
)
LORA = LoRAConfig(n_blocks=2, rank=3, alpha=6.0)
B, T = 2, 10
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab, (B, T))
CAUSAL = jax.device_get(text_context(jnp.tile(jnp.arange(T), (B, 1)), jnp.ones((B, T), jnp.int32)))


def touch_everything(llm: LLM, tokens_BxT: jax.Array, ctx: Context):
    h_BxTxD, _, taps = llm(llm.embed(tokens_BxT), ctx)
    return llm.logits(h_BxTxD), taps


@functools.partial(jax.jit, static_argnames="llm")
def forward(llm: LLM, variables, tokens_BxT=TOKENS, ctx=CAUSAL):
    """Returns logits [B, T, V] and the taps."""
    return llm.apply(variables, tokens_BxT, ctx, method=touch_everything)


@functools.cache
def draw(config: LLMConfig = CONFIG, lora: LoRAConfig | None = LORA) -> dict:
    """Random variables whose norms, biases and B are not what they start as."""
    keys = {"params": jax.random.key(0), "lora": jax.random.key(1)}
    abstract = jax.eval_shape(lambda: LLM(config, lora).init(keys, TOKENS, CAUSAL, method=touch_everything))
    leaves, tree = jax.tree.flatten(abstract)
    random = np.random.default_rng(0)
    return jax.tree.unflatten(tree, [(0.3 * random.normal(size=x.shape)).astype(np.float32) for x in leaves])


def restack(variables: dict, n_adapted: int) -> dict:
    """Moves blocks between the two stacks: without adapters."""
    params = dict(variables["params"])
    stacks = [params.pop(name) for name in ("adapted", "plain") if name in params]
    blocks = jax.tree.map(lambda *x: np.concatenate(x), *stacks)
    params |= {"adapted": jax.tree.map(lambda x: x[:n_adapted], blocks)} if n_adapted else {}
    params |= {"plain": jax.tree.map(lambda x: x[n_adapted:], blocks)} if n_adapted < CONFIG.n_blocks else {}
    return {"params": params}


def test_the_tree_has_the_documented_paths_and_shapes():
    config = dataclasses.replace(CONFIG, tied=False, qkv_bias=True, qk_norm=True)
    flat = flax.traverse_util.flatten_dict(draw(config, LORA), sep="/")
    widths = {"q": (24, 32), "k": (24, 16), "v": (24, 16), "o": (32, 24)}
    widths_mlp = {"gate": (24, 40), "up": (24, 40), "down": (40, 24)}
    block = {"input_norm/scale": (24,), "post_norm/scale": (24,)}
    block |= {f"attn/{x}/kernel": shape for x, shape in widths.items()}
    block |= {f"attn/{x}/bias": widths[x][1:] for x in "qkv"}
    block |= {f"attn/{x}_norm/scale": (8,) for x in "qk"}
    block |= {f"mlp/{x}/kernel": shape for x, shape in widths_mlp.items()}
    expected = {"params/embed/embedding": (50, 24), "params/final_norm/scale": (24,), "params/lm_head/kernel": (24, 50)}
    expected |= {
        f"params/{stack}/{path}": (2, *shape) for stack in ("adapted", "plain") for path, shape in block.items()
    }
    for room, linears in (("attn", widths), ("mlp", widths_mlp)):
        for name, (n_in, n_out) in linears.items():
            expected |= {f"lora/adapted/{room}/{name}/a": (2, n_in, 3), f"lora/adapted/{room}/{name}/b": (2, 3, n_out)}
    assert {path: x.shape for path, x in flat.items()} == expected


def test_stored_dtypes_are_param_dtype_but_float32_for_adapters():
    init = lambda: LLM(CONFIG, LORA, jnp.bfloat16, jnp.bfloat16).init(
        {"params": jax.random.key(0), "lora": jax.random.key(0)}, TOKENS, CAUSAL, method=touch_everything
    )
    abstract = jax.eval_shape(init)
    assert {x.dtype for x in jax.tree.leaves(abstract["params"])} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves(abstract["lora"])} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("n_adapted", [0, 1, 4])
def test_how_blocks_are_stacked_changes_nothing(n_adapted):
    expected, _ = forward(LLM(CONFIG, LORA), {"params": draw()["params"]})
    lora = dataclasses.replace(LORA, n_blocks=n_adapted) if n_adapted else None
    llm = LLM(CONFIG, lora, tap=lambda h_BxTxD, block, args: block)
    logits, taps = forward(llm, restack(draw(), n_adapted))
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    # Only adapted blocks are tapped, and they know which they are.
    assert taps is None if n_adapted == 0 else taps.tolist() == list(range(n_adapted))


N_PADDING = np.array([[0], [3]])  # row 1 is left-padded
PADDED = Context(
    position_BxT=np.maximum(np.arange(T) - N_PADDING, 0),
    k_end_BxT=CAUSAL.k_end_BxT,
    q_segment_BxT=(np.arange(T) >= N_PADDING).astype(np.int32),
    k_segment_BxS=(np.arange(T) >= N_PADDING).astype(np.int32),
)


def test_blocks_apart_are_views_and_give_what_stacks_give():
    stacked = jax.tree.map(jnp.asarray, draw())
    apart = {name: blocks_apart(tree) for name, tree in stacked.items()}
    whole, part = (tree["params"]["plain"] for tree in (stacked, apart))
    kernel, third = whole["mlp"]["up"]["kernel"], part["1"]["mlp"]["up"]["kernel"]
    assert third.unsafe_buffer_pointer() == kernel.unsafe_buffer_pointer() + kernel[0].nbytes
    tap = lambda h_BxQxD, block, _: h_BxQxD.sum() + block
    scanned, taps = forward(LLM(CONFIG, LORA, tap=tap), stacked)
    one_by_one, other_taps = forward(LLM(CONFIG, LORA, tap=tap, apart=True), apart)
    np.testing.assert_allclose(one_by_one, scanned, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(other_taps, taps, rtol=1e-5, atol=1e-5)


@jax.jit
def read_with_cache(tokens_Bxt, ctx: Context, cache: Cache):
    """Reads a few tokens into the cache; returns their logits."""

    def run(llm: LLM):
        h_BxtxD, cache_after, _ = llm(llm.embed(tokens_Bxt), ctx, cache)
        return llm.logits(h_BxtxD), cache_after

    return LLM(CONFIG, LORA).apply(draw(), method=run)


@pytest.mark.parametrize("pieces", [(6, 1, 1, 1, 1), (1, 1, 1, 1, 6)])
def test_decoding_with_a_cache_equals_the_full_forward(pieces):
    """The cache has 5 columns more than are ever used."""
    expected = np.asarray(forward(LLM(CONFIG, LORA), draw(), TOKENS, PADDED)[0])
    cache, logits, start = Cache.zeros(CONFIG, B, T + 5, jnp.float32), [], 0
    for n in pieces:
        here = slice(start, start + n)
        ctx = Context(
            position_BxT=PADDED.position_BxT[:, here],
            k_end_BxT=PADDED.k_end_BxT[:, here],
            q_segment_BxT=PADDED.q_segment_BxT[:, here],
            k_segment_BxS=np.pad(PADDED.k_segment_BxS, ((0, 0), (0, 5)), constant_values=1),
            cache_start=np.int32(start),
        )
        out, cache = read_with_cache(TOKENS[:, here], ctx, cache)
        logits.append(out)
        start += n
    valid = PADDED.q_segment_BxT > 0
    np.testing.assert_allclose(np.concatenate(logits, 1)[valid], expected[valid], rtol=1e-5, atol=2e-5)
    keys = np.asarray(cache.k_LxBxSxGxK)
    assert not keys[:, :, T:].any() and keys[:, :, :T].any(axis=(3, 4)).all()


@pytest.mark.optimised
@pytest.mark.slow
def test_remat_changes_memory_and_not_the_gradients():
    config = dataclasses.replace(CONFIG, n_blocks=6, vocab=16)
    lora = LoRAConfig(n_blocks=6, rank=2, alpha=2.0, targets=("q", "down"))
    variables = draw(config, lora)
    tokens = np.random.default_rng(1).integers(0, 16, (4, 64))
    ctx = text_context(jnp.tile(jnp.arange(64), (4, 1)), jnp.ones((4, 64), jnp.int32))
    values, grads, temp = {}, {}, {}
    for remat in ("none", "dots", "full"):
        llm = LLM(config, lora, remat=remat)

        def loss(lora_tree, llm=llm):
            logits, _ = llm.apply(variables | {"lora": lora_tree}, tokens, ctx, method=touch_everything)
            return jnp.mean(jax.nn.log_softmax(logits)[..., 0] ** 2)

        compiled = jax.jit(jax.value_and_grad(loss)).lower(variables["lora"]).compile()
        values[remat], grads[remat] = jax.device_get(compiled(variables["lora"]))
        temp[remat] = compiled.memory_analysis().temp_size_in_bytes
    for remat in ("dots", "full"):
        np.testing.assert_allclose(values[remat], values["none"], rtol=1e-6)
        for a, b in zip(jax.tree.leaves(grads[remat]), jax.tree.leaves(grads["none"]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())
    assert temp["none"] > temp["dots"] > temp["full"]


def test_neighbours_in_a_row_change_no_bit():
    segment = np.array([[1] * 4 + [2] * 5 + [0]] * B)
    ctx = PADDED.replace(
        position_BxT=np.array([[0, 1, 2, 3, 0, 1, 2, 3, 4, 0]] * B), q_segment_BxT=segment, k_segment_BxS=segment
    )
    before = np.asarray(forward(LLM(CONFIG, LORA), draw(), TOKENS, ctx)[0])
    changed = TOKENS.copy()
    changed[:, [0, 1, 2, 3, 9]] = (changed[:, [0, 1, 2, 3, 9]] + 1) % CONFIG.vocab
    after = np.asarray(forward(LLM(CONFIG, LORA), draw(), changed, ctx)[0])
    np.testing.assert_array_equal(after[:, 4:9], before[:, 4:9])
    assert (after[:, :4] != before[:, :4]).any(-1).all()


def test_parts_give_what_the_whole_gives():
    """Adapted and plain blocks, logits at some columns, and a tap that sees some columns and its arguments."""
    columns, bias = np.array([[3, 1, 0], [9, 9, 2]]), jnp.array([5.0, 7.0])
    llm = LLM(CONFIG, LORA, tap=lambda h_BxQxD, block, args: (h_BxQxD, args["bias"][block]))

    def run(llm: LLM):
        some = CAUSAL.replace(tap_position_BxQ=columns)
        x_BxTxD, _, taps = llm.adapted_blocks(llm.embed(TOKENS), CAUSAL, tap_args={"bias": bias})
        h_BxTxD, _ = llm.plain_blocks(x_BxTxD, CAUSAL)
        whole_BxTxD, _, taps_at_some = llm(llm.embed(TOKENS), some, None, {"bias": bias})
        at_targets = llm.logits(jnp.take_along_axis(h_BxTxD, columns[:, :, None], axis=1))
        return x_BxTxD, h_BxTxD, whole_BxTxD, taps, taps_at_some, at_targets, llm.logits(h_BxTxD)

    out = jax.device_get(jax.jit(lambda: llm.apply(draw(), method=run))())
    x_BxTxD, h_BxTxD, whole_BxTxD, (states, seen), (some_states, _), at_targets, everywhere = out
    np.testing.assert_allclose(whole_BxTxD, h_BxTxD, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(seen, bias)
    np.testing.assert_array_equal(states[1], x_BxTxD)
    np.testing.assert_allclose(
        some_states, np.take_along_axis(states, columns[None, :, :, None], 2), rtol=1e-5, atol=1e-6
    )
    assert at_targets.dtype == np.float32
    np.testing.assert_allclose(at_targets, np.take_along_axis(everywhere, columns[:, :, None], 1), rtol=1e-5, atol=1e-5)


HF = dict(
    model_type="llama",
    vocab_size=10,
    hidden_size=12,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=3,
)


def test_from_hf_fills_what_old_configs_leave_out():
    config = LLMConfig.from_hf(HF)
    assert (config.n_kv_heads, config.head_width, config.rope_theta, config.tied) == (3, 4, 10000.0, False)
    llama3 = {"factor": 8, "low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 64}
    old = LLMConfig.from_hf(HF | {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **llama3}})
    new = LLMConfig.from_hf(HF | {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **llama3}})
    assert old == new and old.rope_theta == 5e5 and dict(old.rope_scaling) == llama3
    hash(old)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llamma"}, "LLM family 'llamma' is not supported: did you mean 'llama'?"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"use_sliding_window": True}, "sliding windows"),
        ({"mlp_bias": True}, "MLP biases"),
        ({"attention_bias": True}, "attention_bias is not supported for llama"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type 'linear' is not supported"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "rope type 'yarn' is not supported"),
    ],
)
def test_variants_that_would_differ_silently_are_refused(changes, message):
    with pytest.raises(UserError, match=message) as caught:
        LLMConfig.from_hf(HF | changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("n_blocks", [5, -1])
def test_adapting_more_blocks_than_there_are_is_an_error(n_blocks):
    llm = LLM(CONFIG, dataclasses.replace(LORA, n_blocks=n_blocks))
    with pytest.raises(UserError, match=f"lora.n_blocks is {n_blocks}, but the LLM has 4 blocks"):
        jax.eval_shape(lambda: llm.init(jax.random.key(0), TOKENS, CAUSAL, method=touch_everything))
