"""Exports of a run in PyTorch: JAX's own greedy tokens, and what transformers and PEFT do with the directories."""

import json
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

from aura_jax.exchange.torch.audio_embedder import AudioEmbedder, generate
from aura_jax.exchange.torch.configuration_aura import AuraConfig
from aura_jax.infer.generate import Generator
from aura_jax.infer.prompting import Request

pytestmark = pytest.mark.slow  # every format is exported and loaded in torch


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread():
    """Models this small run faster in one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def logits(model: Any, inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


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
