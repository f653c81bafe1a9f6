"""CTranslate2's Whisper back to transformers' names: bit by bit, and strictly."""

import json
import struct
from collections.abc import Mapping

import numpy as np
import pytest
import torch
import transformers

from aura_jax.convert import ctranslate2
from aura_jax.errors import UserError

CODES = {np.dtype(np.float32): 0, np.dtype(np.int8): 1, np.dtype(np.int16): 2, np.dtype(np.float16): 4}
ALIASES = {"decoder/projection/weight": "decoder/embeddings/weight"}
CT2_CONFIG = {"suppress_ids": [1, 2], "suppress_ids_begin": [3], "alignment_heads": [[0, 1]]}


def dump(tensors: Mapping[str, np.ndarray], aliases=ALIASES, spec="WhisperSpec", version=6) -> bytes:
    """Writes the format that the module's text describes."""
    string = lambda text: struct.pack("<H", len(text) + 1) + text.encode() + b"\0"
    out = struct.pack("<I", version) + string(spec) + struct.pack("<II", 3, len(tensors))
    for name, value in tensors.items():
        out += string(name) + struct.pack(f"<B{value.ndim}I", value.ndim, *value.shape)
        out += struct.pack("<BI", CODES[value.dtype], value.nbytes) + np.ascontiguousarray(value).tobytes()
    out += struct.pack("<I", len(aliases))
    return out + b"".join(string(text) for pair in aliases.items() for text in pair)


def fuse(state: Mapping[str, np.ndarray], n_blocks: Mapping[str, int]) -> dict[str, np.ndarray]:
    """A transformers state dict as CTranslate2 lays it out."""
    out: dict[str, np.ndarray] = {"encoder/num_heads": np.int16(2), "decoder/num_heads": np.int16(2)}
    out |= {"decoder/activation": np.int8(3), "decoder/pre_norm": np.int8(1), "decoder/scale_embeddings": np.int8(0)}
    out = {name: np.array(value) for name, value in out.items()}

    def norm(name: str, key: str) -> None:
        out[f"{name}/gamma"], out[f"{name}/beta"] = state[f"{key}.weight"], state[f"{key}.bias"]

    def linear(name: str, *keys: str) -> None:
        biases = [state.get(f"{k}.bias", np.zeros(len(state[f"{k}.weight"]), np.float16)) for k in keys]
        out[f"{name}/weight"] = np.concatenate([state[f"{k}.weight"] for k in keys])
        out[f"{name}/bias"] = np.concatenate(biases)

    for conv in ("conv1", "conv2"):
        linear(f"encoder/{conv}", f"model.encoder.{conv}")
    out["decoder/embeddings/weight"] = state["model.decoder.embed_tokens.weight"]
    for side in ("encoder", "decoder"):
        out[f"{side}/position_encodings/encodings"] = state[f"model.{side}.embed_positions.weight"]
        norm(f"{side}/layer_norm", f"model.{side}.layer_norm")
        for i in range(n_blocks[side]):
            name, key = f"{side}/layer_{i}", f"model.{side}.layers.{i}"
            norm(f"{name}/self_attention/layer_norm", f"{key}.self_attn_layer_norm")
            linear(f"{name}/self_attention/linear_0", *(f"{key}.self_attn.{x}_proj" for x in "qkv"))
            linear(f"{name}/self_attention/linear_1", f"{key}.self_attn.out_proj")
            if side == "decoder":
                norm(f"{name}/attention/layer_norm", f"{key}.encoder_attn_layer_norm")
                linear(f"{name}/attention/linear_0", f"{key}.encoder_attn.q_proj")
                linear(f"{name}/attention/linear_1", *(f"{key}.encoder_attn.{x}_proj" for x in "kv"))
                linear(f"{name}/attention/linear_2", f"{key}.encoder_attn.out_proj")
            norm(f"{name}/ffn/layer_norm", f"{key}.final_layer_norm")
            linear(f"{name}/ffn/linear_0", f"{key}.fc1")
            linear(f"{name}/ffn/linear_1", f"{key}.fc2")
    return out


@pytest.fixture(scope="module")
def whisper():
    """(transformers' state dict in float16, the same as CTranslate2's tensors); 2 + 1 blocks."""
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        vocab_size=120,
        d_model=16,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=20,
        max_source_positions=30,
        max_target_positions=12,
        pad_token_id=0,
        init_std=0.5,
    )
    model = transformers.WhisperForConditionalGeneration(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    state = {k: v.numpy().astype(np.float16) for k, v in model.state_dict().items() if k != "proj_out.weight"}
    return state, fuse(state, {"encoder": 2, "decoder": 1})


def tokenizer_json() -> bytes:
    special = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|de|>", "<|translate|>", "<|transcribe|>"]
    special += ["<|startofprev|>", "<|notimestamps|>"]
    tokens = [{"id": 100 + i, "content": token, "special": True} for i, token in enumerate(special)]
    for token in tokens:
        token |= {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    model = {"type": "BPE", "vocab": {chr(65 + i): i for i in range(26)}, "merges": []}
    return json.dumps({"version": "1.0", "added_tokens": tokens, "model": model}).encode()


def test_tensors_come_back_bit_by_bit(whisper):
    state, fused = whisper
    tensors = ctranslate2.whisper_tensors(ctranslate2.read_model(dump(fused)))
    assert tensors.keys() == state.keys()
    for key, value in tensors.items():
        assert value.dtype == np.float16
        np.testing.assert_array_equal(value, state[key], err_msg=key)


def test_the_directory_is_one_that_transformers_loads(whisper, tmp_path):
    state, fused = whisper
    ctranslate2.convert_whisper(dump(fused), CT2_CONFIG, tokenizer_json(), tmp_path)
    model, info = transformers.WhisperForConditionalGeneration.from_pretrained(
        tmp_path, dtype=torch.float16, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    for key, value in model.state_dict().items():
        source = "model.decoder.embed_tokens.weight" if key == "proj_out.weight" else key
        np.testing.assert_array_equal(value.numpy(), state[source], err_msg=key)
    assert (model.config.encoder_layers, model.config.decoder_layers, model.config.encoder_attention_heads) == (2, 1, 2)
    generation = model.generation_config
    assert generation.suppress_tokens == [1, 2] and generation.begin_suppress_tokens == [3]
    assert (generation.decoder_start_token_id, generation.eos_token_id) == (101, 100)
    assert generation.no_timestamps_token_id == 107
    assert transformers.WhisperFeatureExtractor.from_pretrained(tmp_path).feature_size == 80


def test_unknown_and_missing_tensors_are_listed(whisper):
    _, fused = whisper
    with pytest.raises(UserError, match=r"2 tensors have no counterpart in Whisper: encoder/layer_0/x/weight, y"):
        read(fused | {"encoder/layer_0/x/weight": np.ones(2, np.float16), "y": np.ones(2, np.float16)})
    without = {k: v for k, v in fused.items() if k != "encoder/layer_0/ffn/linear_1/bias"}
    with pytest.raises(UserError, match=r"1 tensors of Whisper are missing: model\.encoder\.layers\.0\.fc2\.bias"):
        read(without)


def read(tensors, **options):
    return ctranslate2.whisper_tensors(ctranslate2.read_model(dump(tensors, **options)))


def test_other_architectures_are_refused(whisper):
    _, fused = whisper
    with pytest.raises(UserError, match="it is a TransformerSpec, not a Whisper"):
        read(fused, spec="TransformerSpec")
    with pytest.raises(UserError, match="aliases"):
        read(fused, aliases={})
    with pytest.raises(UserError, match="decoder/activation is 0, Whisper has 3"):
        read(fused | {"decoder/activation": np.array(0, np.int8)})
    with pytest.raises(UserError, match=r"encoder/conv1/weight is quantised \(int8\)"):
        read(fused | {"encoder/conv1/weight": fused["encoder/conv1/weight"].astype(np.int8)})
    with pytest.raises(UserError, match="holds a key bias"):
        read(fused | {"encoder/layer_0/self_attention/linear_0/bias": np.ones(48, np.float16)})


@pytest.mark.parametrize("keep", [3, 20, 60, 5000, -1])
def test_a_truncated_file_is_one_clear_line(whisper, keep):
    _, fused = whisper
    with pytest.raises(UserError, match="not a complete CTranslate2 model"):
        ctranslate2.read_model(dump(fused)[:keep])


def test_another_version_is_named(whisper):
    with pytest.raises(UserError, match="CTranslate2 format 5, known is 6"):
        ctranslate2.read_model(dump(whisper[1], version=5))
