"""The torch model that exports ship, against the JAX one: logits, greedy tokens, and what transformers does with it."""

import copy
import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import peft
import pytest
import torch
import transformers

from aura_jax.convert import audio_embedder, hf, hf_write
from aura_jax.convert.peft import to_tensors
from aura_jax.exchange.torch.audio_embedder import AudioEmbedder, attention_mask_4d, generate
from aura_jax.exchange.torch.configuration_aura import AuraConfig
from aura_jax.exchange.torch.modeling_aura import AuraForCausalLM, LoraLinear
from aura_jax.infer.generate import Generator, Request
from aura_jax.models.embedder import EmbedderConfig
from aura_jax.models.llm import LLMConfig
from aura_jax.models.lora import LoRAConfig
from aura_jax.models.speech_llm import Columns, SpeechLLM, SpeechLLMConfig
from aura_jax.sharding import flatten

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
        others |= to_tensors(flatten(variables["lora"]), hf.AURA_LLM, "")
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


# What follows is of the exports of a run.


def clip(seconds: float, seed: int) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(round(seconds * 16000)) * 0.1).astype(np.float32)


REQUESTS = [
    (clip(0.61, 1), None),
    (clip(1.37, 2), "Answer the question."),
    (clip(2.45, 3), "Reply."),
    (None, "Turn on the lights."),
    (None, "Why?"),
]


@pytest.fixture(scope="module")
def loaded(exported) -> tuple[Any, Any]:
    """The model and the processor of the format hf, for reading only."""
    model = transformers.AutoModelForCausalLM.from_pretrained(exported["hf"], trust_remote_code=True)
    return model, transformers.AutoProcessor.from_pretrained(exported["hf"], trust_remote_code=True)


@pytest.fixture(scope="module")
def inputs(loaded) -> Any:
    clips, texts = zip(*REQUESTS, strict=True)
    return loaded[1](audio=list(clips), text=list(texts))


@pytest.fixture(scope="module")
def answers(tiny_loaded) -> list[tuple[int, ...]]:
    """JAX's own, without the token that ends a turn."""
    requests = [Request(waveform, prompt) for waveform, prompt in REQUESTS]
    return [reply.tokens for reply in Generator(*tiny_loaded).generate(requests)]


def until_stop(tokens: torch.Tensor, stop_ids: list[int]) -> list[tuple[int, ...]]:
    rows = []
    for row in tokens.tolist():
        ends = [i for i, token in enumerate(row) if token in stop_ids]
        rows.append(tuple(row[: ends[0]] if ends else row))
    return rows


def test_greedy_answers_are_those_of_jax(loaded, inputs, answers):
    model, processor = loaded
    tokens = model.generate(**inputs)  # its generation_config says the rest
    new = tokens[:, inputs["input_ids"].shape[1] :]
    assert until_stop(new, processor.stop_ids) == answers
    assert processor.batch_decode(new, skip_special_tokens=True) == processor.tokenizer.batch_decode(
        answers, skip_special_tokens=True
    )


def test_the_adapter_on_its_base_answers_the_same(exported, tiny_llm_dir, inputs, answers, loaded):
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_llm_dir, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, exported["peft"])
    embedder = AudioEmbedder.from_pretrained(exported["peft"])
    stop_ids = loaded[1].stop_ids
    assert until_stop(generate(model, embedder, inputs, max_new_tokens=8), stop_ids) == answers
    text = loaded[1](text=["Turn on the lights.", "Why?"])
    assert until_stop(generate(model, embedder, text, max_new_tokens=8), stop_ids) == answers[3:]

    merged = transformers.AutoModelForCausalLM.from_pretrained(exported["merged"])
    tokens = generate(merged, AudioEmbedder.from_pretrained(exported["merged"]), inputs, max_new_tokens=8)
    assert until_stop(tokens, stop_ids)[:3] == answers[:3]  # LoRA acts on text, too, once merged


def test_generate_stops_and_refuses(exported, inputs, tiny_llm_dir, loaded):
    model = transformers.AutoModelForCausalLM.from_pretrained(exported["merged"])
    embedder = AudioEmbedder.from_pretrained(exported["merged"])
    free = generate(model, embedder, inputs, max_new_tokens=8)
    embedder.audio_config = embedder.audio_config | {"stop_ids": [int(free[0, 2]), 2]}
    stopped = generate(model, embedder, inputs, max_new_tokens=8)
    first = free[0].tolist().index(int(free[0, 2]))
    assert stopped[0].tolist() == free[0, : first + 1].tolist() + [int(free[0, 2])] * (stopped.shape[1] - first - 1)
    alone = {key: x[:1] for key, x in inputs.items()}
    assert generate(model, embedder, alone, max_new_tokens=8).shape[1] == first + 1

    right = loaded[1](audio=[clip(1.0, 1), None], text="Hi.", padding_side="right")
    with pytest.raises(ValueError, match="pad on the left"):
        generate(model, embedder, right)
    with pytest.raises(ValueError, match="max_new_tokens is 0: at least 1 is needed"):
        generate(model, embedder, alone, max_new_tokens=0)
    integrated = transformers.AutoModelForCausalLM.from_pretrained(tiny_llm_dir, dtype=torch.float32)
    integrated.load_adapter(exported["peft"])
    with pytest.raises(ValueError, match="rows without audio need the adapter off"):
        generate(integrated, embedder, inputs)


def test_saved_and_loaded_again(loaded, inputs, tmp_path):
    model, processor = loaded
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, trust_remote_code=True, output_loading_info=True
    )
    assert not any(info.values())
    assert torch.equal(logits(again, inputs), logits(model, inputs))
    assert torch.equal(again.generate(**inputs), model.generate(**inputs))
    assert transformers.AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True).stop_ids == processor.stop_ids


@pytest.mark.parametrize("device_map", ["auto", "cpu", "disk"])
def test_device_maps(exported, loaded, inputs, tmp_path, device_map):
    """On disk lie the audio embedder and a block with LoRA, and travel when they are called."""
    if device_map == "disk":
        names = [name for name, _ in loaded[0].language_model.model.named_children() if name != "layers"]
        device_map = {f"language_model.model.{name}": "cpu" for name in names}
        device_map |= {f"language_model.model.layers.{i}": "disk" if i == 1 else "cpu" for i in range(4)}
        device_map |= {"language_model.lm_head": "cpu", "audio_embedder": "disk"}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        exported["hf"], trust_remote_code=True, device_map=device_map, offload_folder=tmp_path
    )
    assert torch.equal(model.generate(**inputs), loaded[0].generate(**inputs))


def test_bfloat16_is_close(exported, loaded, inputs):
    half = transformers.AutoModelForCausalLM.from_pretrained(
        exported["hf"], trust_remote_code=True, dtype=torch.bfloat16
    )
    assert {x.dtype for x in half.state_dict().values()} == {torch.bfloat16}
    real = inputs["attention_mask"].bool()
    ours, theirs = logits(half, inputs)[real].float(), logits(loaded[0], inputs)[real]
    assert 1e-4 < (ours - theirs).norm() / theirs.norm() < 0.1
    assert half.generate(**inputs).shape[0] == len(REQUESTS)


def test_the_model_says_where_it_can_be_split(loaded):
    assert {"AudioEmbedder", "LlamaDecoderLayer"} <= set(loaded[0]._no_split_modules)


def test_config_round_trip(exported, tmp_path):
    config = transformers.AutoConfig.from_pretrained(exported["hf"], trust_remote_code=True)
    about = json.loads((exported["hf"] / "audio_config.json").read_text())
    assert config.audio_config == {name: value for name, value in about.items() if name != "run"}
    assert config.get_text_config().model_type == "llama"
    config.save_pretrained(tmp_path)
    assert AuraConfig.from_pretrained(tmp_path).to_dict() == AuraConfig.from_pretrained(exported["hf"]).to_dict()
