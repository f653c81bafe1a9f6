"""GGUF Llama models to a Hugging Face directory, with the `gguf` package and numpy alone.

Two things differ from the Hugging Face layout. llama.cpp stores the rows of the query and key matrices so that a rotary
pair is adjacent (2i, 2i + 1), Hugging Face so that it is half a head apart (i, i + d/2): the rows are put back. And the
tokenizer is stored as tables plus the name of a pre-tokenizer; transformers' own reader of these tables needs torch and
ignores that name, which changes how spaces before digits are split, so the tokenizer is built here.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm

from aura_jax.errors import UserError

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}

# llama.cpp's name of a pre-tokenizer -> the same in Hugging Face's tokenizers.
_PRE_TOKENIZERS = {
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
}
_CONTROL = 3  # the token type of special tokens


def convert_llm(path: Path, output: Path) -> None:
    """Writes a GGUF Llama (any quantisation that `gguf` reads) as a Hugging Face directory.

    The weights are dequantised, and saved in the first of float16, bfloat16 and float32 that holds every value exactly:
    a 4-bit value times its float16 scale plus its float16 offset has more bits than a float16 or a bfloat16, so a Q4_1
    file becomes float32.

    Args:
      path: the `.gguf` file.
      output: an existing directory.

    Raises:
      UserError: not a GGUF file, not a llama, an unknown tensor or pre-tokenizer, or a missing tensor.
    """
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, OSError, IndexError) as error:
        raise UserError(f"{path.name}: not a complete GGUF file ({error}): fetch it again") from error
    meta = {key: field.contents() for key, field in reader.fields.items()}
    if meta.get("general.architecture") != "llama":
        found = meta.get("general.architecture")
        raise UserError(f"{path.name}: architecture {found!r}, known is 'llama': fetch the Hugging Face model")
    config = _config(meta)
    tensors = _tensors(reader, config, path.name)
    dtype = _exact_dtype(tensors)
    config["dtype"] = np.dtype(dtype).name
    config["tie_word_embeddings"] = "lm_head.weight" not in tensors
    save_file({k: v.astype(dtype) for k, v in tensors.items()}, output / "model.safetensors", metadata={"format": "pt"})
    _tokenizer(meta, path.name).save(str(output / "tokenizer.json"))
    # safetensors writes for the owner only; a shared cache wants the usual rights.
    shutil.copymode(output / "tokenizer.json", output / "model.safetensors")
    tokens = meta["tokenizer.ggml.tokens"]
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{name}_token": tokens[config[f"{name}_token_id"]] for name in ("bos", "eos", "pad")},
        "unk_token": tokens[meta["tokenizer.ggml.unknown_token_id"]],
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "chat_template": meta["tokenizer.chat_template"],
    }
    generation_config = {f"{name}_token_id": config[f"{name}_token_id"] for name in ("bos", "eos", "pad")}
    for name, content in (
        ("config.json", config),
        ("tokenizer_config.json", tokenizer_config),
        ("generation_config.json", generation_config),
    ):
        (output / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def unpermute_rope(weight_OxI: np.ndarray, n_heads: int) -> np.ndarray:
    """Puts the rows of a query or key matrix from llama.cpp's order into Hugging Face's (see the module's text).

    Args:
      weight_OxI: [n_heads * head_dim, in].
      n_heads: heads of this matrix (for keys: the key heads).
    """
    rows, columns = weight_OxI.shape
    return weight_OxI.reshape(n_heads, rows // n_heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _config(meta: Mapping) -> dict:
    def get(key: str, default=None):
        value = meta.get(f"llama.{key}", default)
        if value is None:
            raise UserError(f"the GGUF file lacks the key llama.{key}: fetch the Hugging Face model")
        return value

    if meta.get("llama.rope.scaling.type", "none") != "none" or "llama.expert_count" in meta:
        raise UserError("the GGUF file has rope scaling or experts, which are not read: fetch the Hugging Face model")
    heads, width = get("attention.head_count"), get("embedding_length")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(meta["tokenizer.ggml.tokens"]),
        "hidden_size": width,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": get("rope.dimension_count", width // heads),
        "hidden_act": "silu",
        "max_position_embeddings": get("context_length"),
        # Stored as a float32: 1e-5 reads back as 9.999999747378752e-06.
        "rms_norm_eps": float(str(np.float32(get("attention.layer_norm_rms_epsilon")))),
        "rope_theta": float(get("rope.freq_base", 10000.0)),
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta.get("tokenizer.ggml.padding_token_id", meta["tokenizer.ggml.eos_token_id"]),
    }


def _tensors(reader: gguf.GGUFReader, config: Mapping, name: str) -> dict[str, np.ndarray]:
    """Dequantises every tensor to float32 under its Hugging Face name; strict in both directions."""
    heads = {"attn_q.weight": config["num_attention_heads"], "attn_k.weight": config["num_key_value_heads"]}
    tensors, unknown = {}, []
    for tensor in tqdm(reader.tensors, desc=f"dequantising {name}", unit="tensor"):
        prefix, _, rest = tensor.name.partition(".")
        layer, _, leaf = rest.partition(".")
        if tensor.name in _TOP:
            key = _TOP[tensor.name]
        elif prefix == "blk" and leaf in _BLOCK:
            key = f"model.layers.{int(layer)}.{_BLOCK[leaf]}"
        else:
            unknown.append(tensor.name)
            continue
        value = np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32)
        tensors[key] = unpermute_rope(value, heads[leaf]) if leaf in heads else value
    if unknown:
        raise UserError(f"{name}: {len(unknown)} tensors have no counterpart in a Llama: {', '.join(unknown[:8])}")
    expected = {f"model.layers.{i}.{leaf}" for i in range(config["num_hidden_layers"]) for leaf in _BLOCK.values()}
    expected |= {_TOP["token_embd.weight"], _TOP["output_norm.weight"]}
    if missing := sorted(expected - tensors.keys()):
        raise UserError(f"{name}: {len(missing)} tensors of the model are missing: {', '.join(missing[:8])}")
    return tensors


def _exact_dtype(tensors: Mapping[str, np.ndarray]) -> type:
    """The smallest of float16, bfloat16 and float32 that reproduces every value bit by bit."""
    for dtype in (np.float16, ml_dtypes.bfloat16):
        with np.errstate(over="ignore"):
            if all(np.array_equal(value.astype(dtype).astype(np.float32), value) for value in tensors.values()):
                return dtype
    return np.float32


def _tokenizer(meta: Mapping, name: str) -> Tokenizer:
    """Builds the byte-level BPE tokenizer from GGUF's tables."""
    kind, pre = meta.get("tokenizer.ggml.model"), meta.get("tokenizer.ggml.pre")
    if kind != "gpt2" or pre not in _PRE_TOKENIZERS:
        raise UserError(
            f"{name}: tokenizer {kind!r} with pre-tokenizer {pre!r} is unknown here: fetch the Hugging Face model"
        )
    tokens = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[pre]()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    types = meta["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t, k in zip(tokens, types, strict=True) if k == _CONTROL]
    )
    return tokenizer
