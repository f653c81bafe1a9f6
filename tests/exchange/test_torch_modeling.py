"""The torch model that exports ship, against the JAX one: masks, scopes of LoRA, embedders, and caches."""

import copy
import dataclasses
import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from aura_jax.convert import audio_embedder, hf, hf_write
from aura_jax.convert.peft import to_tensors
from aura_jax.exchange.torch.audio_embedder import attention_mask_4d
from aura_jax.exchange.torch.configuration_aura import AuraConfig
from aura_jax.exchange.torch.modeling_aura import AuraForCausalLM, LoraLinear
from aura_jax.models.embedder import EmbedderConfig
from aura_jax.models.llm import LLMConfig
from aura_jax.models.lora import LoRAConfig
from aura_jax.models.speech_llm import Columns, SpeechLLM, SpeechLLMConfig
from aura_jax.sharding import flatten

pytestmark = pytest.mark.slow  # three models are compiled in JAX and loaded in torch

PARITY = 1e-4
M, D, V = 8, 24, 40
LLM = {
    "model_type": "llama",
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000.0,
    "tie_word_embeddings": True,
    "attention_bias": False,
}
# What a run of each family, mask, scope of LoRA and kind of embedder is.
CASES = {
    "request": (
        LLM,
        EmbedderConfig("stem", M, 12, D, frames_per_token=4),
        LoRAConfig(n_blocks=2, rank=3, alpha=6.0, scope="request"),
        ("bidirectional", 0),
    ),
    "audio": (
        # Qwen2's heads always have the width's share.
        LLM | {"model_type": "qwen2", "tie_word_embeddings": False, "head_dim": D // 4},
        EmbedderConfig("patch", M, 12, D, frames_per_token=4),
        LoRAConfig(n_blocks=3, rank=2, alpha=3.0, rslora=True, targets=("q", "v", "down"), scope="audio"),
        ("causal", 0),
    ),
    "all": (
        LLM | {"model_type": "qwen3"},
        EmbedderConfig("stem", M, 10, D, frames_per_token=2),
        LoRAConfig(n_blocks=1, rank=4, alpha=8.0, targets=("k", "o", "gate", "up"), scope="all"),
        ("block", 4),
    ),
}


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread():
    """Models this small run faster in one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclasses.dataclass(frozen=True)
class Case:
    """A random model on both sides; `folder` is the torch one's. For reading only."""

    config: SpeechLLMConfig
    variables: dict
    model: AuraForCausalLM
    folder: Path


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> Callable[[str], Case]:
    @functools.cache
    def make(name: str) -> Case:
        text_config, embedder, lora, (mask, chunk) = CASES[name]
        config = SpeechLLMConfig(LLMConfig.from_hf(text_config), embedder, lora, mask, chunk)
        variables, folder = draw(config), tmp_path_factory.mktemp(name)
        about = {
            "embedder": dataclasses.asdict(embedder),
            "mask": mask,
            "chunk": chunk,
            "lora": {**dataclasses.asdict(lora), "targets": list(lora.targets)},
            "stop_ids": [0],
        }
        AuraConfig(text_config=text_config, audio_config=about).save_pretrained(folder)
        others = {
            f"{hf.AURA_EMBEDDER}{key}": value
            for key, value in audio_embedder.to_tensors(flatten(variables["params"]["embedder"])).items()
        }
        others |= to_tensors(flatten(variables["lora"]), hf.AURA_LLM, "", zeros=True)
        llm = variables["params"]["llm"]
        hf_write.write_llm(
            folder, llm, n_adapted=lora.n_blocks, dtype=np.dtype(np.float32), prefix=hf.AURA_LLM, others=others
        )
        model, info = AuraForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values())
        return Case(config, variables, model, folder)

    return make


def draw(config: SpeechLLMConfig) -> dict:
    """Random variables whose B is not zero."""
    keys = {"params": jax.random.key(0), "lora": jax.random.key(1)}
    arguments = in_jax(batch_of(config))
    leaves, tree = jax.tree.flatten(jax.eval_shape(lambda: SpeechLLM(config).init(keys, *arguments, method=touch_all)))
    random = np.random.default_rng(0)
    return jax.tree.unflatten(tree, [(0.3 * random.normal(size=x.shape)).astype(np.float32) for x in leaves])


def touch_all(model: SpeechLLM, *arguments) -> jax.Array:
    return model.logits(model(*arguments)[0])


def batch_of(config: SpeechLLMConfig, side: str = "left") -> dict[str, torch.Tensor]:
    """A long clip, text alone and a short clip, each with words around, as the processor lays them out."""
    random, frames_per_token = np.random.default_rng(0), 2 * config.embedder.frames_per_token
    rows = [(3, 45, 2), (5, 0, 0), (1, 20, 4)]  # tokens before, mel frames, tokens after
    lengths = [before + -(-n // frames_per_token) + after for before, n, after in rows]
    ids, mask = np.zeros((3, max(lengths)), np.int64), np.zeros((3, max(lengths)), np.int64)
    is_audio = np.zeros(ids.shape, bool)
    for row, ((before, n, _), length) in enumerate(zip(rows, lengths, strict=True)):
        first = max(lengths) - length if side == "left" else 0
        ids[row, first : first + length] = random.integers(1, V, length)
        mask[row, first : first + length] = 1
        is_audio[row, first + before : first + before - (-n // frames_per_token)] = True
    features = np.full((2, 45, M), np.nan, np.float32)  # what is beyond a clip's end must not matter
    features[0], features[1, :20] = random.normal(size=(45, M)), random.normal(size=(20, M))
    arrays = [ids, mask, is_audio, features, np.array([45, 20])]
    names = ["input_ids", "attention_mask", "audio_token_mask", "input_features", "n_frames"]
    return {name: torch.from_numpy(x) for name, x in zip(names, arrays, strict=True)}


def in_jax(inputs: dict[str, torch.Tensor]) -> tuple[Columns, np.ndarray, np.ndarray]:
    """What `SpeechLLM` takes for the same columns."""
    arrays = {name: x.numpy() for name, x in inputs.items()}
    is_audio, real = arrays["audio_token_mask"], arrays["attention_mask"]
    column = np.tile(np.arange(is_audio.shape[1]), (len(is_audio), 1))
    start, end, source = column.copy(), column + 1, np.full(column.shape, -1)
    mel = np.zeros((len(is_audio), 1, *arrays["input_features"].shape[1:]), np.float32)
    n_frames = np.zeros((len(is_audio), 1), np.int32)
    spoken = np.flatnonzero(is_audio.any(1))
    mel[spoken, 0], n_frames[spoken, 0] = arrays["input_features"], arrays["n_frames"]
    for row in spoken:
        span = np.flatnonzero(is_audio[row])
        start[row, span], end[row, span], source[row, span] = span[0], span[-1] + 1, np.arange(len(span))
    columns = Columns(
        tokens_BxT=arrays["input_ids"],
        position_BxT=np.maximum(real.cumsum(1) - 1, 0),
        segment_BxT=real,
        span_start_BxT=start,
        span_end_BxT=end,
        audio_source_BxT=source,
        audio_position_BxKxA=np.zeros((len(is_audio), 1, 1), np.int32),
        request_audio_BxT=np.tile(is_audio.any(1, keepdims=True), is_audio.shape[1]),
    )
    return jax.tree.map(lambda x: x if x.dtype in (bool, np.float32) else x.astype(np.int32), (columns, mel, n_frames))


def logits(model: Any, inputs: dict[str, torch.Tensor], **more) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs, **more).logits


def close(ours, theirs, tolerance: float = PARITY) -> None:
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_jax(case, name):
    c = case(name)
    inputs = batch_of(c.config)
    apply = jax.jit(lambda variables, arguments: SpeechLLM(c.config).apply(variables, *arguments, method=touch_all))
    expected, real = apply(c.variables, in_jax(inputs)), inputs["attention_mask"].bool()
    ours = logits(c.model, inputs)
    close(ours[real], np.asarray(expected)[real])
    right = batch_of(c.config, side="right")
    close(logits(c.model, right)[right["attention_mask"].bool()], ours[real])
    eager = AuraForCausalLM.from_pretrained(c.folder, attn_implementation="eager")
    close(logits(eager, inputs)[real], ours[real])


def plain_llm(c: Case) -> Any:
    """The base LLM of a case, by transformers alone."""
    base = transformers.AutoModelForCausalLM.from_config(c.model.config.text_config)
    weights = c.model.language_model.state_dict()
    base.load_state_dict({key: value for key, value in weights.items() if "lora" not in key})
    return base.eval()


@pytest.mark.parametrize("name", ["request", "audio"])
def test_text_is_the_plain_llm_to_the_bit(case, name):
    """In a batch with speech, in the tokens generated after it, and by the LLM inside on its own."""
    c = case(name)
    base, inputs = plain_llm(c), batch_of(c.config)
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    spoken, written, _ = inputs["attention_mask"].bool()  # padding holds no meaning
    expected = logits(base, text, position_ids=(inputs["attention_mask"].cumsum(1) - 1).clamp(min=0))
    ours = logits(c.model, inputs)
    assert torch.equal(ours[1, written], expected[1, written]) and (ours[0, spoken] != expected[0, spoken]).any()
    tokens = {"input_ids": inputs["input_ids"]}  # right after speech, which must have left nothing behind
    assert torch.equal(logits(c.model.language_model, tokens), logits(base, tokens))
    assert torch.equal(logits(c.model, text), expected)

    broken = copy.deepcopy(c.model)
    for module in broken.modules():
        if isinstance(module, LoraLinear):
            torch.nn.init.constant_(module.lora_B, torch.nan)
    assert torch.equal(logits(broken, inputs)[1, written], expected[1, written])
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(broken.generate(**inputs, **settings)[1], base.generate(**text, **settings)[1])


@pytest.mark.parametrize("name", CASES)
def test_generation_with_and_without_cache_beams_and_samples(case, name):
    c = case(name)
    inputs = batch_of(c.config)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    greedy = c.model.generate(**inputs, **settings)
    assert torch.equal(c.model.generate(**inputs, **settings, use_cache=False), greedy)
    assert torch.equal(greedy[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    # Beams of a row hear the row's own clip: as if the row were alone.
    beams = c.model.generate(**inputs, **settings, num_beams=3, num_return_sequences=2)
    row = {key: inputs[key][2:] for key in ("input_ids", "attention_mask", "audio_token_mask")}
    row |= {key: inputs[key][1:] for key in ("input_features", "n_frames")}
    assert torch.equal(c.model.generate(**row, **settings, num_beams=3, num_return_sequences=2), beams[4:])
    assert c.model.generate(**inputs, max_new_tokens=2, do_sample=True, num_return_sequences=2).shape[0] == 6
    assert torch.equal(c.model.generate(**row, **settings, prompt_lookup_num_tokens=2), greedy[2:])


def test_speech_after_text_that_is_in_the_cache(case):
    c = case("all")
    inputs = batch_of(c.config)
    first = {key: inputs[key][:, :8] for key in ("input_ids", "attention_mask")}
    assert not inputs["audio_token_mask"][2, :8].any()
    with torch.no_grad():
        cache = c.model(**{key: x[2:] for key, x in first.items()}, use_cache=True).past_key_values
    rest = {"input_ids": inputs["input_ids"][2:, 8:]}
    rest |= {key: inputs[key][2:] for key in ("attention_mask", "audio_token_mask")}  # of all columns
    rest |= {key: inputs[key][1:] for key in ("input_features", "n_frames")}
    ours = logits(c.model, rest, past_key_values=cache)
    close(ours, logits(c.model, inputs)[2:, 8:])


def test_training_recomputes_blocks_as_they_were(case):
    """Gradient checkpointing runs the blocks again after `forward` is done: LoRA must act where it did."""
    inputs = batch_of(case("request").config)
    labels = inputs["input_ids"].masked_fill(inputs["audio_token_mask"] | (inputs["attention_mask"] == 0), -100)
    gradients = []
    for checkpointed in (False, True):
        model = copy.deepcopy(case("request").model).train()
        if checkpointed:
            model.activation_checkpointing_enable()
        loss = model(**inputs, labels=labels, use_cache=False).loss
        loss.backward()
        gradients.append({key: x.grad for key, x in model.named_parameters() if "lora" in key or "conv1" in key})
    assert all(x.abs().max() > 0 for x in gradients[0].values())
    for key, value in gradients[0].items():
        assert torch.equal(gradients[1][key], value), key


@pytest.mark.parametrize("name", ["request", "all"])
def test_merged_weights_compute_the_same(case, name, tmp_path):
    c = case(name)
    inputs = batch_of(c.config)
    merged = copy.deepcopy(c.model).merge_and_unload()
    spoken = inputs["attention_mask"].bool() & inputs["audio_token_mask"].any(1, keepdim=True)
    close(logits(merged, inputs)[spoken], logits(c.model, inputs)[spoken])
    assert not any("lora" in key for key in merged.state_dict())
    merged.save_pretrained(tmp_path)
    again = AuraForCausalLM.from_pretrained(tmp_path)
    assert again.config.audio_config["lora"] is None
    assert torch.equal(logits(again, inputs), logits(merged, inputs))
    assert c.model.config.audio_config["lora"]["scope"] == name


def test_plora_cannot_be_merged(case):
    with pytest.raises(ValueError, match=r"acts at the audio tokens only .* cannot be folded into the weights"):
        copy.deepcopy(case("audio").model).merge_and_unload()


def test_a_new_model_starts_as_the_base(case):
    """As `from_config` makes it: B is zero, so that training starts from the LLM."""
    model = AuraForCausalLM(case("all").model.config)
    adapted = model.language_model.model.layers[0].self_attn.k_proj
    assert isinstance(adapted, LoraLinear) and adapted.lora_A.std() > 0 and not adapted.lora_B.any()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.audio_embedder.gain == 1
    assert type(model.language_model.model.layers[1].self_attn.k_proj) is torch.nn.Linear


def test_adapters_that_the_weights_lack_do_nothing(case, tmp_path):
    """As of a linear that PEFT did not adapt: not whatever was in memory."""
    c, lacking = case("all"), "language_model.model.layers.0.mlp.up_proj.lora_"
    stored = load_file(c.folder / "model.safetensors")
    save_file({k: x for k, x in stored.items() if lacking not in k}, tmp_path / "model.safetensors", {"format": "pt"})
    shutil.copy(c.folder / "config.json", tmp_path)
    model, info = AuraForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {f"{lacking}A", f"{lacking}B"}
    expected = copy.deepcopy(c.model)
    torch.nn.init.zeros_(expected.get_parameter(f"{lacking}B"))
    inputs = batch_of(c.config)
    assert torch.equal(logits(model, inputs), logits(expected, inputs))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"n_frames": torch.tensor([20, 45])},
            r"rows have \[6, 0, 3\] audio columns, but .* make \[3, 6\] audio tokens",
        ),
        ({"input_features": torch.zeros(1, 45, M), "n_frames": torch.tensor([45])}, r"make \[6\] audio tokens"),
        ({"audio_token_mask": None}, "input_features need audio_token_mask and n_frames"),
        ({"n_frames": None}, "input_features need audio_token_mask and n_frames"),
        ({"input_features": None}, "marks columns of audio, but there are no input_features for them"),
        ({"inputs_embeds": torch.zeros(3, 2, D)}, "give either input_ids or inputs_embeds"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(case, change, message):
    c = case("request")
    with pytest.raises(ValueError, match=message) as caught:
        logits(c.model, batch_of(c.config) | change)
    assert "\n" not in str(caught.value)


def test_what_attention_over_audio_cannot_use_is_refused(case):
    c = case("request")
    with pytest.raises(ValueError, match="a dynamic cache, not a static one"):
        c.model.generate(**batch_of(c.config), max_new_tokens=2, cache_implementation="static")
    with pytest.raises(ValueError, match="does not support Flash Attention"):
        AuraForCausalLM.from_pretrained(c.folder, attn_implementation="flash_attention_2")
    with pytest.raises(ValueError, match="mask 'casual' is unknown: causal, bidirectional or block"):
        attention_mask_4d(torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool), "casual", 0, torch.float32)
