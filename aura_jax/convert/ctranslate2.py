"""CTranslate2 Whisper models to a Hugging Face directory, with numpy alone.

The binary layout of `model.bin` (version 6): u32 version, string spec, u32 revision, u32 count; per tensor: string
name, u8 rank, u32 dimensions, u8 dtype, u32 bytes, data; then u32 count of aliases and pairs of strings. A string is a
u16 length (which counts the final NUL) and bytes. CTranslate2 fuses query, key and value of self-attention into one
matrix, and key and value of cross-attention into another.
"""

import json
import shutil
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from aura_jax.errors import UserError

_VERSION = 6
_DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}

# CTranslate2's module name -> Hugging Face's, within one block.
_BLOCK_NORMS = {
    "self_attention/layer_norm": "self_attn_layer_norm",
    "attention/layer_norm": "encoder_attn_layer_norm",
    "ffn/layer_norm": "final_layer_norm",
}
_BLOCK_LINEARS = {
    "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention/linear_1": ("self_attn.out_proj",),
    "attention/linear_0": ("encoder_attn.q_proj",),
    "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    "attention/linear_2": ("encoder_attn.out_proj",),
    "ffn/linear_0": ("fc1",),
    "ffn/linear_1": ("fc2",),
}
_TOP = {
    "encoder/conv1": "model.encoder.conv1",
    "encoder/conv2": "model.encoder.conv2",
    "encoder/layer_norm": "model.encoder.layer_norm",
    "encoder/position_encodings/encodings": "model.encoder.embed_positions.weight",
    "decoder/embeddings/weight": "model.decoder.embed_tokens.weight",
    "decoder/position_encodings/encodings": "model.decoder.embed_positions.weight",
    "decoder/layer_norm": "model.decoder.layer_norm",
}
_NORM_LEAVES = {"gamma": "weight", "beta": "bias"}

# Scalars that describe the architecture: the value that the Hugging Face model assumes (None: any).
_SCALARS: Mapping[str, int | None] = {
    "encoder/num_heads": None,
    "decoder/num_heads": None,
    "decoder/activation": 3,  # exact GELU
    "decoder/alibi": 0,
    "decoder/alibi_use_positive_positions": None,  # means nothing without alibi
    "decoder/scale_alibi": None,
    "decoder/pre_norm": 1,
    "decoder/scale_embeddings": 0,
    "decoder/start_from_zero_embedding": 0,
    "decoder/alignment_heads": None,
    "decoder/alignment_layer": None,
}
_ALIASES = {"decoder/projection/weight": "decoder/embeddings/weight"}


@dataclass(frozen=True)
class CTranslate2Model:
    """A parsed `model.bin`: the spec, its revision, tensors by name (views of the bytes), aliases (name -> tensor)."""

    spec: str
    revision: int
    tensors: dict[str, np.ndarray]
    aliases: dict[str, str]


def read_model(data: bytes, name: str = "model.bin") -> CTranslate2Model:
    """Parses the bytes of a CTranslate2 `model.bin`.

    Args:
      data: the whole file; the arrays returned are read-only views of it.
      name: what to call the file in errors.

    Raises:
      UserError: the file is truncated, or of another version than 6, or holds an unknown dtype.
    """
    offset = 0

    def take(fmt: str) -> int:
        nonlocal offset
        (value,) = struct.unpack_from("<" + fmt, data, offset)
        offset += struct.calcsize("<" + fmt)
        return value

    def string() -> str:
        nonlocal offset
        length = take("H")
        if offset + length > len(data):
            raise struct.error("string past the end")
        text = data[offset : offset + length - 1].decode()
        offset += length
        return text

    try:
        version = take("I")
        if version != _VERSION:
            raise UserError(f"{name}: CTranslate2 format {version}, known is {_VERSION}: convert the model again")
        spec, revision = string(), take("I")
        tensors = {}
        for _ in range(take("I")):
            key = string()
            shape = tuple(take("I") for _ in range(take("B")))
            code, n_bytes = take("B"), take("I")
            if code not in _DTYPES:
                raise UserError(
                    f"{name}: tensor {key} has the unknown dtype code {code} (known: f32, i8, i16, i32, f16)"
                )
            dtype = np.dtype(_DTYPES[code])
            if offset + n_bytes > len(data) or n_bytes != dtype.itemsize * int(np.prod(shape, dtype=np.int64)):
                raise struct.error(key)
            tensors[key] = np.frombuffer(data, dtype.newbyteorder("<"), n_bytes // dtype.itemsize, offset).reshape(
                shape
            )
            offset += n_bytes
        aliases = {}
        for _ in range(take("I")):
            key = string()
            aliases[key] = string()
    except (struct.error, UnicodeDecodeError) as error:
        raise UserError(
            f"{name}: not a complete CTranslate2 model ({len(data)} bytes): fetch or convert it again"
        ) from error
    return CTranslate2Model(spec, revision, tensors, aliases)


def whisper_tensors(model: CTranslate2Model) -> dict[str, np.ndarray]:
    """Renames the tensors of a CTranslate2 Whisper to `transformers.WhisperForConditionalGeneration`'s (tied head).

    Raises:
      UserError: not a float Whisper with the structure of Hugging Face's class, or a key without counterpart.
    """
    if model.spec != "WhisperSpec":
        raise UserError(f"model.bin: it is a {model.spec}, not a Whisper model (WhisperSpec)")
    if model.aliases != _ALIASES:
        raise UserError(f"model.bin: aliases {model.aliases}, expected {_ALIASES}")
    unknown, result = [], {}
    for key, value in model.tensors.items():
        if key in _SCALARS:
            expected = _SCALARS[key]
            if expected is not None and value.item() != expected:
                raise UserError(
                    f"model.bin: {key} is {value.item()}, Whisper has {expected}: this is another architecture"
                )
            continue
        if value.dtype.kind != "f":
            raise UserError(f"model.bin: {key} is quantised ({value.dtype}): convert the model to float16 or float32")
        names = _hf_names(key)
        if not names:
            unknown.append(key)
            continue
        for name, part in zip(names, np.split(value, len(names)) if len(names) > 1 else [value], strict=True):
            if name.endswith("k_proj.bias"):
                if np.any(part):
                    raise UserError(
                        f"model.bin: {key} holds a key bias, Whisper has none: this is another architecture"
                    )
                continue
            result[name] = part
    if unknown:
        raise UserError(f"model.bin: {len(unknown)} tensors have no counterpart in Whisper: {', '.join(unknown[:8])}")
    expected = _expected_names(_n_blocks(result, "encoder"), _n_blocks(result, "decoder"))
    if missing := sorted(expected - result.keys()):
        raise UserError(f"model.bin: {len(missing)} tensors of Whisper are missing: {', '.join(missing[:8])}")
    return result


def convert_whisper(model_bin: bytes, ct2_config: Mapping[str, list], tokenizer_json: bytes, output: Path) -> None:
    """Writes a CTranslate2 Whisper as a Hugging Face directory: weights (dtype kept), tokenizer, and all settings.

    Args:
      model_bin: the bytes of `model.bin`.
      ct2_config: the parsed `config.json` next to it (`suppress_ids`, `suppress_ids_begin`, `alignment_heads`).
      tokenizer_json: the bytes of `tokenizer.json`.
      output: an existing directory.

    Raises:
      UserError: see `read_model` and `whisper_tensors`.
    """
    model = read_model(model_bin)
    tensors = whisper_tensors(model)
    token_ids = {token["content"]: token["id"] for token in json.loads(tokenizer_json)["added_tokens"]}
    config = _config(model, tensors, token_ids)
    files: dict[str, dict] = {
        "config.json": config,
        "generation_config.json": _generation_config(config, ct2_config, token_ids),
        "preprocessor_config.json": _preprocessor_config(config["num_mel_bins"]),
        "tokenizer_config.json": _TOKENIZER_CONFIG,
    }
    save_file(
        {k: np.ascontiguousarray(v) for k, v in tensors.items()},
        output / "model.safetensors",
        metadata={"format": "pt"},
    )
    (output / "tokenizer.json").write_bytes(tokenizer_json)
    # safetensors writes for the owner only; a shared cache wants the usual rights.
    shutil.copymode(output / "tokenizer.json", output / "model.safetensors")
    for name, content in files.items():
        (output / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _hf_names(key: str) -> tuple[str, ...]:
    """Returns the Hugging Face names that the rows of a CTranslate2 tensor become, in order; () for an unknown key."""
    if key in _TOP:
        return (_TOP[key],)
    stem, _, leaf = key.rpartition("/")
    if stem in _TOP:
        leaf = _NORM_LEAVES.get(leaf, leaf) if stem.endswith("norm") else leaf
        return (f"{_TOP[stem]}.{leaf}",) if leaf in ("weight", "bias") else ()
    side, _, rest = stem.partition("/")
    layer, _, module = rest.partition("/")
    if side not in ("encoder", "decoder") or not layer.startswith("layer_") or not layer[6:].isdigit():
        return ()
    prefix = f"model.{side}.layers.{int(layer[6:])}"
    if module in _BLOCK_NORMS and leaf in _NORM_LEAVES:
        return (f"{prefix}.{_BLOCK_NORMS[module]}.{_NORM_LEAVES[leaf]}",)
    if module in _BLOCK_LINEARS and leaf in ("weight", "bias"):
        return tuple(f"{prefix}.{name}.{leaf}" for name in _BLOCK_LINEARS[module])
    return ()


def _n_blocks(tensors: Mapping[str, np.ndarray], side: str) -> int:
    prefix = f"model.{side}.layers."
    return 1 + max((int(name[len(prefix) :].split(".")[0]) for name in tensors if name.startswith(prefix)), default=-1)


def _expected_names(encoder_blocks: int, decoder_blocks: int) -> set[str]:
    """Every tensor name of a Whisper with a tied head."""
    names = {
        "model.encoder.embed_positions.weight",
        "model.decoder.embed_positions.weight",
        "model.decoder.embed_tokens.weight",
    }
    modules = ["model.encoder.conv1", "model.encoder.conv2", "model.encoder.layer_norm", "model.decoder.layer_norm"]
    for side, depth in (("encoder", encoder_blocks), ("decoder", decoder_blocks)):
        for i in range(depth):
            for module in [*_BLOCK_NORMS.values(), *(name for names_ in _BLOCK_LINEARS.values() for name in names_)]:
                if side == "decoder" or not module.startswith("encoder_attn"):
                    modules.append(f"model.{side}.layers.{i}.{module}")
    names |= {f"{module}.{leaf}" for module in modules for leaf in ("weight", "bias")}
    return {name for name in names if not name.endswith("k_proj.bias")}


def _config(model: CTranslate2Model, tensors: Mapping[str, np.ndarray], token_ids: Mapping[str, int]) -> dict:
    """The `config.json` of `WhisperForConditionalGeneration`, read off the tensors' shapes."""
    vocab_size, width = tensors["model.decoder.embed_tokens.weight"].shape
    end = token_ids["<|endoftext|>"]
    return {
        "architectures": ["WhisperForConditionalGeneration"],
        "model_type": "whisper",
        "activation_function": "gelu",
        "d_model": width,
        "num_mel_bins": tensors["model.encoder.conv1.weight"].shape[1],
        "encoder_layers": _n_blocks(tensors, "encoder"),
        "encoder_attention_heads": int(model.tensors["encoder/num_heads"]),
        "encoder_ffn_dim": tensors["model.encoder.layers.0.fc1.weight"].shape[0],
        "max_source_positions": tensors["model.encoder.embed_positions.weight"].shape[0],
        "decoder_layers": _n_blocks(tensors, "decoder"),
        "decoder_attention_heads": int(model.tensors["decoder/num_heads"]),
        "decoder_ffn_dim": tensors["model.decoder.layers.0.fc1.weight"].shape[0],
        "max_target_positions": tensors["model.decoder.embed_positions.weight"].shape[0],
        "vocab_size": vocab_size,
        "scale_embedding": False,
        "tie_word_embeddings": True,
        "is_encoder_decoder": True,
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
        "decoder_start_token_id": token_ids["<|startoftranscript|>"],
        "dtype": tensors["model.decoder.embed_tokens.weight"].dtype.name,
    }


def _generation_config(config: Mapping[str, int], ct2_config: Mapping[str, list], token_ids: Mapping[str, int]) -> dict:
    """The `generation_config.json`: suppressed tokens from CTranslate2's config, special ones from the tokenizer."""
    # An English-only model has one token fewer (51864) than a multilingual one; its language tokens are never used.
    multilingual = config["vocab_size"] >= 51865
    result = {
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": config["eos_token_id"],
        "pad_token_id": config["pad_token_id"],
        "decoder_start_token_id": config["decoder_start_token_id"],
        "is_multilingual": multilingual,
        "max_length": config["max_target_positions"],
        "no_timestamps_token_id": token_ids["<|notimestamps|>"],
        "prev_sot_token_id": token_ids["<|startofprev|>"],
        "return_timestamps": False,
        "suppress_tokens": list(ct2_config["suppress_ids"]),
        "begin_suppress_tokens": list(ct2_config["suppress_ids_begin"]),
        "alignment_heads": ct2_config["alignment_heads"],
    }
    if multilingual:
        tasks = ("transcribe", "translate")
        languages = {
            k: v for k, v in token_ids.items() if token_ids["<|startoftranscript|>"] < v < token_ids["<|translate|>"]
        }
        result |= {"lang_to_id": languages, "task_to_id": {task: token_ids[f"<|{task}|>"] for task in tasks}}
    return result


def _preprocessor_config(n_mels: int) -> dict:
    return {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "processor_class": "WhisperProcessor",
        "feature_size": n_mels,
        "sampling_rate": 16000,
        "n_fft": 400,
        "hop_length": 160,
        "chunk_length": 30,
        "n_samples": 480000,
        "nb_max_frames": 3000,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": False,
    }


_TOKENIZER_CONFIG = {
    "tokenizer_class": "WhisperTokenizer",
    "processor_class": "WhisperProcessor",
    "bos_token": "<|endoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
    "add_prefix_space": False,
    "clean_up_tokenization_spaces": True,
    "errors": "replace",
    "model_max_length": 1024,
}
