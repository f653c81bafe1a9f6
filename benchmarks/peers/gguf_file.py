"""A Llama of a Hugging Face directory as a GGUF file, the way back of `aura_jax.convert.gguf`.

Without a vocabulary: whoever reads it is given token ids, so that all arms read the very same tokens.
"""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors import safe_open

KINDS = ("F32", "BF16", "Q8_0", "Q4_1")

_TOP = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write(directory: Path, output: Path, kind: str) -> None:
    """Writes a Llama's weights to a GGUF file.

    Args:
      directory: of a Llama without biases, whose widths are multiples of 32.
      kind: of the matrices, one of `KINDS`; in a Q4_1 file those of the vocabulary are Q8_0. Norms are F32.
    """
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    writer = gguf.GGUFWriter(output, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads["attn_q"])
    writer.add_head_count_kv(heads["attn_k"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config.get("head_dim") or config["hidden_size"] // heads["attn_q"])
    writer.add_rope_freq_base(_rope_theta(config))
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (it is no dictionary)
                name = _name(key.removesuffix(".weight"))
                value = tensors.get_tensor(key).float().numpy()
                leaf = name.rpartition(".")[2]
                _add(writer, name, _permuted(value, heads[leaf]) if leaf in heads else value, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _rope_theta(config: dict[str, Any]) -> float:
    # transformers 5 keeps it among the parameters of the rotation, 4 beside them.
    return float((config.get("rope_parameters") or config).get("rope_theta", 10000.0))


def _name(key: str) -> str:
    if key in _TOP:
        return _TOP[key]
    _, _, layer, leaf = key.split(".", 3)
    return f"blk.{layer}.{_BLOCK[leaf]}"


def _permuted(weight_OxI: np.ndarray, n_heads: int) -> np.ndarray:
    """Puts the rows of a query or key matrix into llama.cpp's order: a rotary pair is adjacent."""
    rows, columns = weight_OxI.shape
    return weight_OxI.reshape(n_heads, 2, rows // n_heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _add(writer: gguf.GGUFWriter, name: str, value: np.ndarray, kind: str) -> None:
    types = gguf.GGMLQuantizationType
    if value.ndim == 1 or kind == "F32":
        chosen = types.F32
    elif kind == "Q4_1" and name in ("token_embd", "output"):
        chosen = types.Q8_0
    else:
        chosen = types[kind]
    data = np.ascontiguousarray(value, np.float32)
    writer.add_tensor(f"{name}.weight", data if chosen == types.F32 else gguf.quantize(data, chosen), raw_dtype=chosen)
