"""Tiny models with random weights, as Hugging Face directories: everything runs on them without any download.

Built from a seed: the same bytes on every machine. They say nothing sensible, but have every part of the real ones: a
byte-level BPE tokenizer with special tokens, a chat template, generation settings, safetensors.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# What the tokenizer's merges are learnt from.
_TEXT = (
    "Turn on the kitchen lights. Turn off the hallway heater. Set a timer for forty minutes. What is six plus two? "
    "Remind me to water the plants on Monday. What is the capital of Italy? Open the bedroom window, please. "
    "Thank you. Please hold while I connect you with the person you asked for. The number that you have dialed is not "
    "in service. You are a helpful assistant. Write down what was said: user, system, assistant. One, two, three, four."
)
_N_MERGES = 96
_DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
# Family -> its class in transformers, and the options that only its config has.
_FAMILIES = {
    "llama": ("LlamaForCausalLM", {"attention_bias": False, "mlp_bias": False}),
    "qwen2": ("Qwen2ForCausalLM", {"use_sliding_window": False}),
    "qwen3": ("Qwen3ForCausalLM", {"attention_bias": False, "use_sliding_window": False}),
}
_LLM_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_WHISPER_SPECIAL = ("<|endoftext|>", "<|startoftranscript|>")
_WHISPER_LANGUAGES = ("<|en|>", "<|de|>", "<|fr|>")
_WHISPER_TASKS = (
    "<|translate|>",
    "<|transcribe|>",
    "<|startoflm|>",
    "<|startofprev|>",
    "<|nospeech|>",
    "<|notimestamps|>",
)


def build_llm(
    output: Path,
    *,
    family: str = "llama",
    seed: int = 0,
    n_blocks: int = 4,
    width: int = 64,
    mlp_width: int = 128,
    tied: bool = True,
    dtype: str = "float32",
    shards: int = 1,
) -> None:
    """Writes a random LLM with 4 heads, 2 key/value heads and a ChatML template.

    Args:
      output: an existing directory.
      family: "llama"; "qwen2", with biases of q, k and v; or "qwen3", with norms of q and k, and with heads of twice
        width / 4.
      seed: of the weights.
      tied: the head is the embedding; otherwise it is drawn too.
      dtype: that the weights are rounded to and stored in: "float32", "bfloat16" or "float16".
      shards: files of weights; several come with an index.
    """
    tokenizer = _tokenizer(_LLM_SPECIAL, first=True)
    n_heads, n_kv_heads = 4, 2
    head_width = width // n_heads * (2 if family == "qwen3" else 1)
    vocab = tokenizer.get_vocab_size()
    draw = _Draw(seed)
    tensors = {"model.embed_tokens.weight": draw.embedding(vocab, width), "model.norm.weight": draw.scale(width)}
    for i in range(n_blocks):
        block = f"model.layers.{i}"
        tensors[f"{block}.input_layernorm.weight"] = draw.scale(width)
        for name, n in (("q", n_heads), ("k", n_kv_heads), ("v", n_kv_heads)):
            tensors |= draw.affine(f"{block}.self_attn.{name}_proj", n * head_width, width, bias=family == "qwen2")
        if family == "qwen3":
            tensors |= {f"{block}.self_attn.{name}_norm.weight": draw.scale(head_width) for name in "qk"}
        tensors |= {
            f"{block}.self_attn.o_proj.weight": draw.matrix(width, n_heads * head_width),
            f"{block}.post_attention_layernorm.weight": draw.scale(width),
            f"{block}.mlp.gate_proj.weight": draw.matrix(mlp_width, width),
            f"{block}.mlp.up_proj.weight": draw.matrix(mlp_width, width),
            f"{block}.mlp.down_proj.weight": draw.matrix(width, mlp_width),
        }
    if not tied:
        tensors["lm_head.weight"] = draw.matrix(vocab, width)
    architecture, options = _FAMILIES[family]
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    config = {
        "architectures": [architecture],
        "model_type": family,
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": mlp_width,
        "num_hidden_layers": n_blocks,
        "num_attention_heads": n_heads,
        "num_key_value_heads": n_kv_heads,
        "head_dim": head_width,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        **options,
        "tie_word_embeddings": tied,
        "dtype": dtype,
        **tokens,
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "model_max_length": 2048,
        "clean_up_tokenization_spaces": False,
        "chat_template": _CHAT_TEMPLATE,
    }
    stored = {key: tensor.astype(_DTYPES[dtype]) for key, tensor in tensors.items()}
    _write(output, stored, tokenizer, config, tokenizer_config, tokens, shards)


def build_whisper(
    output: Path,
    *,
    seed: int = 0,
    n_blocks: int = 2,
    width: int = 32,
    mlp_width: int = 64,
    window_seconds: int = 30,
    multilingual: bool = False,
) -> None:
    """Writes a random Whisper with 80 mel bins, 2 heads, and as many decoder blocks as encoder blocks.

    Args:
      output: an existing directory.
      seed: of the weights.
      window_seconds: what the encoder's positions cover.
      multilingual: with language tokens and the task token, as Whisper's models without ".en" have.
    """
    special = (*_WHISPER_SPECIAL, *(_WHISPER_LANGUAGES if multilingual else ()), *_WHISPER_TASKS)
    tokenizer = _tokenizer(special, first=False)
    ids = tokenizer.get_vocab()
    vocab, n_mels, n_positions, n_target_positions = tokenizer.get_vocab_size(), 80, 50 * window_seconds, 448
    draw = _Draw(seed)
    tensors = {
        **draw.affine("model.encoder.conv1", width, n_mels, 3),
        **draw.affine("model.encoder.conv2", width, width, 3),
        "model.encoder.embed_positions.weight": draw.embedding(n_positions, width),
        "model.decoder.embed_tokens.weight": draw.embedding(vocab, width),
        "model.decoder.embed_positions.weight": draw.embedding(n_target_positions, width),
        **draw.norm("model.encoder.layer_norm", width),
        **draw.norm("model.decoder.layer_norm", width),
    }
    for side in ("encoder", "decoder"):
        for i in range(n_blocks):
            block = f"model.{side}.layers.{i}"
            for attention in ("self_attn", "encoder_attn") if side == "decoder" else ("self_attn",):
                for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
                    tensors |= draw.affine(f"{block}.{attention}.{name}", width, width, bias=name != "k_proj")
                tensors |= draw.norm(f"{block}.{attention}_layer_norm", width)
            tensors |= draw.affine(f"{block}.fc1", mlp_width, width)
            tensors |= draw.affine(f"{block}.fc2", width, mlp_width)
            tensors |= draw.norm(f"{block}.final_layer_norm", width)
    end = ids["<|endoftext|>"]
    tokens = {
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
        "decoder_start_token_id": ids["<|startoftranscript|>"],
    }
    config = {
        "architectures": ["WhisperForConditionalGeneration"],
        "model_type": "whisper",
        "activation_function": "gelu",
        "d_model": width,
        "num_mel_bins": n_mels,
        "encoder_layers": n_blocks,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": mlp_width,
        "max_source_positions": n_positions,
        "decoder_layers": n_blocks,
        "decoder_attention_heads": 2,
        "decoder_ffn_dim": mlp_width,
        "max_target_positions": n_target_positions,
        "vocab_size": vocab,
        "scale_embedding": False,
        "tie_word_embeddings": True,
        "is_encoder_decoder": True,
        "dtype": "float32",
        **tokens,
    }
    generation_config = {
        **tokens,
        "is_multilingual": multilingual,
        "max_length": n_target_positions,
        "no_timestamps_token_id": ids["<|notimestamps|>"],
        "prev_sot_token_id": ids["<|startofprev|>"],
        "return_timestamps": False,
        "suppress_tokens": sorted({1, 2, *(ids[token] for token in (_WHISPER_SPECIAL[1], *_WHISPER_TASKS[:5]))}),
        "begin_suppress_tokens": [ids["Ġ"], end],
    }
    if multilingual:
        generation_config["lang_to_id"] = {token: ids[token] for token in _WHISPER_LANGUAGES}
        generation_config["task_to_id"] = {task: ids[f"<|{task}|>"] for task in ("transcribe", "translate")}
    preprocessor_config = {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "processor_class": "WhisperProcessor",
        "feature_size": n_mels,
        "sampling_rate": 16000,
        "n_fft": 400,
        "hop_length": 160,
        "chunk_length": window_seconds,
        "n_samples": 16000 * window_seconds,
        "nb_max_frames": 100 * window_seconds,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": False,
    }
    tokenizer_config = {
        "tokenizer_class": "WhisperTokenizer",
        "processor_class": "WhisperProcessor",
        **{f"{name}_token": "<|endoftext|>" for name in ("bos", "eos", "unk", "pad")},
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "model_max_length": n_target_positions,
    }
    _write(output, tensors, tokenizer, config, tokenizer_config, generation_config)
    (output / "preprocessor_config.json").write_text(json.dumps(preprocessor_config, indent=2) + "\n")


class _Draw:
    """Random tensors in PyTorch's layout, float32, sized so that no part of the model drowns another."""

    def __init__(self, seed: int):
        self._random = np.random.default_rng(seed)

    def _normal(self, shape: Sequence[int], std: float) -> np.ndarray:
        return (self._random.standard_normal(shape) * std).astype(np.float32)

    def matrix(self, n_out: int, n_in: int, *kernel: int) -> np.ndarray:
        return self._normal((n_out, n_in, *kernel), (n_in * int(np.prod(kernel))) ** -0.5)

    def embedding(self, n: int, width: int) -> np.ndarray:
        return self._normal((n, width), 0.1)

    def scale(self, width: int) -> np.ndarray:
        return 1 + self._normal((width,), 0.1)

    def affine(self, name: str, n_out: int, n_in: int, *kernel: int, bias: bool = True) -> dict[str, np.ndarray]:
        tensors = {f"{name}.weight": self.matrix(n_out, n_in, *kernel)}
        return tensors | {f"{name}.bias": self._normal((n_out,), 0.1)} if bias else tensors

    def norm(self, name: str, width: int) -> dict[str, np.ndarray]:
        return {f"{name}.weight": self.scale(width), f"{name}.bias": self._normal((width,), 0.1)}


def _tokenizer(special: Sequence[str], first: bool) -> Tokenizer:
    """Byte-level BPE: all bytes and a few merges; the special tokens take the first ids, or else the last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [AddedToken(token, special=True, normalized=False) for token in special]
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + _N_MERGES + (len(special) if first else 0),
        initial_alphabet=alphabet,
        special_tokens=tokens if first else [],
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    tokenizer.add_special_tokens(tokens)
    return tokenizer


def _write(
    output: Path,
    tensors: dict[str, np.ndarray],
    tokenizer: Tokenizer,
    config: dict,
    tokenizer_config: dict,
    generation_config: dict,
    shards: int = 1,
) -> None:
    _write_weights(output, tensors, shards)
    tokenizer.save(str(output / "tokenizer.json"))
    for name, content in (
        ("config.json", config),
        ("tokenizer_config.json", tokenizer_config),
        ("generation_config.json", generation_config),
    ):
        (output / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_weights(output: Path, tensors: dict[str, np.ndarray], shards: int) -> None:
    if shards == 1:
        save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for i, keys in enumerate(np.array_split(list(tensors), shards), 1):
        name = f"model-{i:05d}-of-{shards:05d}.safetensors"
        save_file({key: tensors[key] for key in keys.tolist()}, output / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(keys.tolist(), name)
    index = {"metadata": {"total_size": sum(x.nbytes for x in tensors.values())}, "weight_map": weight_map}
    (output / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
