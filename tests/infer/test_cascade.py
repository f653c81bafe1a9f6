"""The systems that nothing trains: what they ask the LLM, and that it is the plain one."""

import json

import numpy as np
import pytest

from aura_jax.convert import random_models
from aura_jax.data.manifest import load_manifest
from aura_jax.errors import UserError
from aura_jax.evaluate.run import evaluate_set
from aura_jax.infer.cascade import Cascade, Oracle
from aura_jax.infer.generate import Generator, plain_generator
from aura_jax.infer.prompting import Request
from aura_jax.infer.transcriber import Transcriber


@pytest.fixture(scope="module")
def transcriber(tmp_path_factory):
    path = tmp_path_factory.mktemp("whisper")
    random_models.build_whisper(path, window_seconds=2)
    return Transcriber(path, batch_size=2, max_new_tokens=6)


@pytest.fixture(scope="module")
def llm(tiny_loaded):
    return plain_generator(tiny_loaded[0].config, max_new_tokens=5)


def clip(seed: int) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(8000) * 0.1).astype(np.float32)


def test_a_cascade_answers_what_whisper_heard_and_writes_down_what_is_wanted(transcriber, llm):
    prompts = ["Answer.", None, "Answer."]
    requests = [Request(clip(i), prompt, wants_transcript=i == 1) for i, prompt in enumerate(prompts)]
    told = []
    replies = Cascade(transcriber, llm).generate(requests, told.append)
    heard = [reply.text for reply in transcriber.generate([Request(request.waveform) for request in requests])]
    answers = llm.generate([Request(transcript=heard[i], prompt="Answer.") for i in (0, 2)])
    assert [reply.text for reply in replies] == [answers[0].text, heard[1], answers[1].text]
    assert sum(told) == 3
    assert replies[0].seconds > answers[0].seconds > 0  # hearing and answering


def test_the_llm_is_the_plain_one(tiny_loaded, llm):
    """With random adapters that change every answer of theirs."""
    system, variables = tiny_loaded
    asked = [Request(transcript="open the door", prompt="Answer.")]
    assert llm.generate(asked)[0].tokens == Generator(system, variables, max_new_tokens=5).generate(asked)[0].tokens
    adapted = Generator(system, variables, max_new_tokens=5, adapters_on_text=True)
    assert llm.generate(asked)[0].tokens != adapted.generate(asked)[0].tokens


def test_an_oracle_reads_the_rows_texts(llm, tmp_path):
    rows = [
        {"id": "a", "audio": "none.wav", "seconds": 1.0, "text": "open the door", "response": "no"},
        {"id": "b", "prompt": "hello", "response": "hi"},
    ]
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = evaluate_set(Oracle(llm), load_manifest(tmp_path / "set.jsonl"), progress=False)
    expected = llm.generate([Request(transcript="open the door"), Request(prompt="hello")])
    assert [output.hypothesis for output in result.outputs] == [reply.text for reply in expected]


def test_what_an_oracle_cannot_read(llm, tmp_path):
    with pytest.raises(UserError, match="the oracle reads: give it the transcript in the place of the audio"):
        Oracle(llm).generate([Request(clip(0))])
    row = {"id": "a", "audio": "none.wav", "seconds": 1.0, "response": "no"}
    (tmp_path / "set.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=r"set.jsonl:1.*no 'text' for the oracle to read: add the transcript"):
        evaluate_set(Oracle(llm), load_manifest(tmp_path / "set.jsonl"), progress=False)
