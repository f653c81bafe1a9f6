"""What VoiceBench's main.py calls (commit 5338154), and that a run answers it."""

import inspect

import numpy as np
import pytest

from aura_jax.errors import UserError
from aura_jax.harness import voicebench
from aura_jax.harness.voicebench import AuraAssistant
from aura_jax.infer.generate import Generator
from aura_jax.infer.prompting import Request

# Of `VoiceAssistant` in src/models/base.py: what follows `self`, with its default.
PUBLISHED = {
    "generate_audio": {"audio": inspect.Parameter.empty, "max_new_tokens": 2048},
    "generate_text": {"text": inspect.Parameter.empty},
    "generate_ttft": {"audio": inspect.Parameter.empty},
}


@pytest.fixture(scope="module")
def audio() -> dict:
    samples = np.random.default_rng(0).standard_normal(9000) * 0.1
    return {"path": None, "array": samples, "sampling_rate": 16000}


@pytest.fixture(scope="module")
def assistant(tiny_workdir) -> AuraAssistant:
    return AuraAssistant(tiny_workdir, prompt="Answer.")


def test_the_interface_is_the_published_one():
    for name, expected in PUBLISHED.items():
        _, *found = inspect.signature(getattr(AuraAssistant, name)).parameters.values()
        assert {parameter.name: parameter.default for parameter in found} == expected


def test_it_answers_as_the_run_does(assistant, audio, tiny_loaded, monkeypatch):
    monkeypatch.setattr(voicebench, "_MAX_NEW_TOKENS", 4)
    waveform = audio["array"].astype(np.float32)
    requests = [Request(waveform, "Answer."), Request(prompt="Why?")]
    generator = Generator(*tiny_loaded, max_new_tokens=4)
    spoken, written = (generator.generate([request])[0].text for request in requests)
    assert assistant.generate_audio(audio, max_new_tokens=4) == spoken
    assert assistant.generate_text("Why?") == written


def test_the_time_to_the_first_token_is_of_one_token_and_without_compilation(assistant, audio, monkeypatch):
    asked = []
    answer = assistant.generate_audio
    monkeypatch.setattr(assistant, "generate_audio", lambda audio, **kw: (asked.append(kw), answer(audio, **kw)))
    assert assistant.generate_ttft(audio) > 0
    assert asked == [{"max_new_tokens": 1}] * 2
    assert assistant.generate_ttft(audio) > 0
    assert len(asked) == 3


def test_mistakes(assistant):
    with pytest.raises(UserError, match=r"no config at nowhere/config\.json"):
        AuraAssistant("nowhere")
    with pytest.raises(UserError, match="the question: dict, not audio"):
        assistant.generate_audio({"array": np.zeros(9)})
