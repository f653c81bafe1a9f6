"""Likelihoods and the divergence against one pass over each row by itself, without padding, batches or chunks."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile

from aura_jax import checkpoint
from aura_jax import system as system_lib
from aura_jax.audio import features
from aura_jax.audio.io import load_audio
from aura_jax.data.manifest import load_manifest
from aura_jax.errors import UserError
from aura_jax.evaluate.likelihood import comparable, likelihood, lines
from aura_jax.models.lora import merge
from aura_jax.models.speech_llm import Columns, text_context

HISTORY = [{"role": "user", "content": "Open the window."}, {"role": "assistant", "content": "Which one?"}]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("likelihood")
    values = [
        {"text": "Turn on the lights."},
        {"text": "What is the time?", "response": "It is four o'clock.", "prompt": "Answer the question."},
        {"text": "The left one.", "response": "Done.", "history": HISTORY},
    ]
    for i, seconds in enumerate((1.2, 0.5, 0.8)):
        clip = 0.1 * np.random.default_rng(i).standard_normal(round(16000 * seconds))
        soundfile.write(folder / f"{i}.wav", clip, 16000)
        values[i]["audio"] = f"{i}.wav"
    path = folder / "set.jsonl"
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return load_manifest(path)


def speech_logits(system, variables, prefix, clip, suffix, answer) -> np.ndarray:
    """Returns the logits [answer, V] of the spoken request by itself."""
    n_audio = int(features.n_audio_tokens(len(clip), system.config.embedder.token_rate))
    tokens = [*prefix, *[0] * n_audio, *suffix, *answer]
    n, first = len(tokens), len(prefix)
    row = lambda x: jnp.asarray(x, jnp.int32)[None]
    source, start, end = np.full(n, -1), np.arange(n), np.arange(n) + 1
    span = slice(first, first + n_audio)
    source[span], start[span], end[span] = np.arange(n_audio), first, first + n_audio
    columns = Columns(
        tokens_BxT=row(tokens),
        position_BxT=row(np.arange(n)),
        segment_BxT=row(np.ones(n)),
        span_start_BxT=row(start),
        span_end_BxT=row(end),
        audio_source_BxT=row(source),
        audio_position_BxKxA=jnp.zeros((1, 1, n_audio), jnp.int32),
        request_audio_BxT=jnp.ones((1, n), bool),
    )

    @jax.jit
    def logits(variables):
        padded = jnp.pad(clip, (0, -len(clip) % features.HOP))[None]
        normalisation = system.config.model.normalisation
        mel = features.log_mel(padded, n_samples_B=jnp.array([len(clip)]), normalisation=normalisation)
        h, _ = system.model.apply(variables, columns, mel[:, None], jnp.array([[mel.shape[1]]]))
        return system.model.apply(variables, h[0], method="logits")

    return np.asarray(logits(variables), np.float64)[n - 1 - len(answer) : n - 1]


def text_logits(system, variables, tokens, answer) -> np.ndarray:
    """Returns the logits [answer, V] of the written request by itself, of the base LLM."""

    @jax.jit
    def logits(params):
        ids = jnp.asarray([*tokens, *answer], jnp.int32)[None]
        x = system.model.apply(params, ids, method="embed_text")
        ctx = text_context(jnp.arange(ids.shape[1])[None], jnp.ones_like(ids))
        x, _, _ = system.model.apply(params, x, ctx, method="adapted_blocks")
        h, _ = system.model.apply(params, x, ctx, method="plain_blocks")
        return system.model.apply(params, h[0], method="logits")

    n = len(tokens) + len(answer)
    found = logits({"params": variables["params"]})
    return np.asarray(found, np.float64)[n - 1 - len(answer) : n - 1]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def expected(system, variables, rows) -> dict:
    """Returns the three means over all tokens, and the number of tokens."""
    totals, count = np.zeros(3), 0
    for row in rows:
        prefix, suffix = system.chat.encode(row.prompt or "", True, row.history)
        answer = system.chat.response(row.target)
        spoken = log_softmax(speech_logits(system, variables, prefix, load_audio(row.audio), suffix, answer))
        tokens = [*prefix, *system.chat.text(row.text), *suffix]
        read = log_softmax(text_logits(system, variables, tokens, answer))
        places = (range(len(answer)), answer)
        totals += [-spoken[places].sum(), -read[places].sum(), (np.exp(read) * (read - spoken)).sum()]
        count += len(answer)
    return dict(zip(("speech", "text", "divergence"), totals / count, strict=True)) | {"tokens": count}


@pytest.mark.parametrize("scope", ["request", "audio"])
def test_equals_a_pass_over_each_row(tiny_config, tiny_loaded, rows, scope):
    c = tiny_config()
    c.lora.scope = scope
    c.eval.batch_size = 2  # the last batch has one row
    c.train.loss_chunk = 6  # several chunks
    system, variables = system_lib.build(c), tiny_loaded[1]
    found = likelihood(system, variables, rows, progress=False)
    wanted = expected(system, variables, rows)
    assert (found["n"], found["tokens"]) == (3, wanted["tokens"])
    for reading in ("speech", "text"):
        nats, perplexity = found[reading]["nats"], found[reading]["perplexity"]
        assert nats["value"] == pytest.approx(wanted[reading], rel=1e-4)
        assert perplexity["value"] == pytest.approx(np.exp(wanted[reading]), rel=1e-3)
        assert nats["low"] <= nats["value"] <= nats["high"] and nats["n"] == perplexity["n"] == 3
        assert perplexity["low"] <= perplexity["value"] <= perplexity["high"]
    divergence = found["divergence"]
    assert divergence["value"] == pytest.approx(wanted["divergence"], rel=1e-4) and divergence["n"] == 3
    assert 0 < divergence["low"] <= divergence["value"] <= divergence["high"]
    assert wanted["divergence"] > 0.01
    assert lines({"x": found}).startswith(f"x (3 rows, {wanted['tokens']} tokens): perplexity")


def test_after_a_merge_the_text_is_read_by_the_llm_as_it_was(tiny_loaded, rows):
    system, variables = tiny_loaded
    llm = merge(variables["params"]["llm"], variables["lora"]["llm"], system.model.config.lora)
    merged = {"params": {**variables["params"], "llm": llm}}
    before = likelihood(system, variables, rows[:1], progress=False)
    after = likelihood(system, merged, rows[:1], progress=False)
    assert after["text"] == before["text"]
    for of in (lambda found: found["speech"]["nats"]["value"], lambda found: found["divergence"]["value"]):
        assert of(after) == pytest.approx(of(before), rel=1e-3)


_ON_TWO_DEVICES = """
import json
import sys
from pathlib import Path

import jax

from aura_jax import checkpoint
from aura_jax.data.manifest import load_manifest
from aura_jax.evaluate.likelihood import likelihood

assert len(jax.devices()) == 2
system, variables = checkpoint.load_for_inference(Path(sys.argv[1]))
with jax.set_mesh(checkpoint.system_mesh(system.config)):
    print(json.dumps(likelihood(system, variables, load_manifest(sys.argv[2]), progress=False)))
"""


@pytest.mark.slow
def test_a_mesh_of_two_devices_changes_nothing(tiny_workdir, rows):
    system, variables = checkpoint.load_for_inference(tiny_workdir)
    expected = likelihood(system, variables, rows, progress=False)
    found = subprocess.run(
        [sys.executable, "-c", _ON_TWO_DEVICES, str(tiny_workdir), rows[0].where.rpartition(":")[0]],
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    on_two = json.loads(found.stdout)
    assert on_two["tokens"] == expected["tokens"]
    for of in (lambda x: x["speech"]["nats"], lambda x: x["text"]["nats"], lambda x: x["divergence"]):
        assert of(on_two) == pytest.approx(of(expected), rel=1e-4)


def test_rows_without_a_transcript_or_one_answer_are_left_out(tmp_path, rows):
    path = tmp_path / "set.jsonl"
    audio = f'{{"audio": "{rows[0].audio}", '
    question = audio + '"text": "Why?", "answers": ["yes"]}\n'
    choice = audio + '"text": "Rome or Paris?", "choices": ["Rome", "Paris"], "answer": 0}\n'
    path.write_text(audio + '"response": "Done."}\n{"prompt": "x", "response": "y"}\n' + question + choice)
    others = load_manifest(path)
    assert comparable([*others, *rows], "s") == rows
    with pytest.raises(UserError, match=r"eval\.likelihood: no row of the set 's' has both") as caught:
        comparable(others, "s")
    assert "\n" not in str(caught.value)


def test_a_clip_that_cannot_be_read_is_named(tmp_path, tiny_loaded):
    (tmp_path / "bad.wav").write_bytes(b"no audio")
    (tmp_path / "set.jsonl").write_text('{"audio": "bad.wav", "text": "hello", "seconds": 1}\n')
    with pytest.raises(UserError, match=r"bad\.wav"):
        likelihood(*tiny_loaded, load_manifest(tmp_path / "set.jsonl"), progress=False)
