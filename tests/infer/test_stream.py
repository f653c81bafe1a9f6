"""Speech heard in portions, against the same samples heard whole."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aura_jax import system as system_lib
from aura_jax.audio.io import from_samples
from aura_jax.errors import UserError
from aura_jax.infer import stream
from aura_jax.infer.generate import Generator
from aura_jax.infer.prompting import Request
from aura_jax.infer.sampling import Sampling
from aura_jax.infer.stream import Session

SPEECH = (np.random.default_rng(0).standard_normal(48000) * np.linspace(0.01, 0.3, 48000)).astype(np.float32)
HISTORY = ({"role": "user", "content": "Open the window."}, {"role": "assistant", "content": "Which one?"})
TOKEN = 1280  # samples, at 12.5 Hz


def make(tiny_config, random_variables, mask="causal", scope="request", kind="stem", rate=12.5) -> Generator:
    c = tiny_config()
    c.model.mask, c.model.chunk = mask, 3 if mask == "block" else 0
    c.model.normalisation = "streaming"
    c.lora.scope, c.embedder.kind, c.embedder.token_rate = scope, kind, rate
    c.data.max_seconds, c.data.buckets = 3.0, (3.0,)
    system = system_lib.build(c)
    return Generator(system, random_variables(system))


@pytest.fixture(scope="module")
def generator(tiny_config, random_variables) -> Generator:
    return make(tiny_config, random_variables)


def heard(generator: Generator, waveform: np.ndarray, portions, **arguments) -> Session:
    """Returns a session that was given the waveform in portions: sizes, the last of which repeats."""
    session, start, sizes = Session(generator, **arguments), 0, list(portions)
    while start < len(waveform):
        size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
        session.push(waveform[start : start + size])
        start += size
    return session


def assert_equals_the_whole(generator: Generator, waveform: np.ndarray, portions, **arguments) -> None:
    """`waveform` is at the session's rate."""
    session = heard(generator, waveform, portions, **arguments)
    reply = session.reply()
    waveform = from_samples(waveform, arguments.get("rate", 16000))
    assert session.n_samples == len(waveform)
    request = Request(waveform, arguments.get("prompt"), arguments.get("history", ()))
    expected = generator.prompt_logits(request)[-1]
    np.testing.assert_allclose(session.logits_V, expected, atol=2e-5 * np.abs(expected).max())
    (whole,) = generator.generate([request])
    assert (reply.tokens, reply.text, reply.ended) == (whole.tokens, whole.text, whole.ended)


# Around the ends of tokens, of pieces (four tokens), and of what the embedder looks ahead to (200 samples).
LENGTHS = [1, 199, TOKEN, TOKEN + 1, 4 * TOKEN, 4 * TOKEN + 199, 4 * TOKEN + 200, 4 * TOKEN + 201, 5 * TOKEN, 48000]


@pytest.mark.parametrize("n_samples", LENGTHS)
def test_equals_the_whole_at_every_edge(generator, n_samples):
    assert_equals_the_whole(generator, SPEECH[:n_samples], [777])


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 48000), st.lists(st.integers(1, 9000), min_size=1, max_size=8))
def test_equals_the_whole_in_any_portions(generator, n_samples, portions):
    assert_equals_the_whole(generator, SPEECH[-n_samples:], portions)


def test_sample_by_sample_with_a_prompt_and_a_history(generator):
    assert_equals_the_whole(generator, SPEECH[:9000], [1], prompt="Answer the question.", history=HISTORY)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mask", "scope", "kind", "rate"),
    [("block", "request", "stem", 8.33), ("causal", "audio", "patch", 25.0), ("block", "all", "patch", 6.25)],
)
def test_every_mask_scope_and_embedder(tiny_config, random_variables, mask, scope, kind, rate):
    generator = make(tiny_config, random_variables, mask, scope, kind, rate)
    token = round(16000 / (50 / round(50 / rate)))
    for n_samples in (1, 3 * token + 40, 6 * token + 1, 30001):
        assert_equals_the_whole(generator, SPEECH[:n_samples], [1000, 5, 12000])


@pytest.mark.parametrize(
    ("rate", "lengths"),
    [(1000, (500, 1111, 2345)), (8000, (8356, 8300, 20000)), (44100, (300, 30000)), (96000, (46357,))],
)
def test_other_sample_rates(generator, rate, lengths):
    """A resampler holds samples back, at low rates those of several pieces."""
    for n_samples in lengths:
        assert_equals_the_whole(generator, SPEECH[-n_samples:].astype(np.float64), [441], rate=rate)


def test_the_answer_is_streamed(generator):
    drawn = {"sampling": Sampling(temperature=1.0, seed=3), "stop": ("\n",)}
    whole = heard(generator, SPEECH, [3000], **drawn).reply()
    parts = list(heard(generator, SPEECH, [5000], **drawn).finish())
    assert "".join(parts) == whole.text and len(parts) > 1
    assert "".join(heard(generator, SPEECH, [48000], **drawn).finish(every=5)) == whole.text


def test_four_programs_whatever_is_said(generator):
    programs = (stream._read_text, stream._read_speech, stream._read_end)
    heard(generator, SPEECH, [4000]).reply()
    compiled = [program._cache_size() for program in programs]
    for n_samples, portion in ((3, 1), (20000, 20000), (47999, 160)):
        heard(generator, SPEECH[:n_samples], [portion]).reply()
    assert [program._cache_size() for program in programs] == compiled


def test_little_is_left_to_the_end(generator):
    session = heard(generator, SPEECH, [480])
    assert session._n_read >= 48000 // TOKEN - 5  # a piece of four, and one that waited for samples ahead
    cache = session._cache
    session.reply()
    assert cache is not None and cache.k_LxBxSxGxK.is_deleted()  # donated


def test_too_much_is_refused_and_nothing_lost(generator):
    session = Session(generator, max_seconds=1.0)
    session.push(SPEECH[:15000])
    with pytest.raises(UserError, match=r"1\.00 s of speech, and this session has room for 1 s: finish it"):
        session.push(SPEECH[:1001])
    with pytest.raises(UserError, match=r"NaN or infinite samples, the first at 0\.938 s"):
        session.push(np.full(3, np.nan, np.float32))
    with pytest.raises(UserError, match=r"samples int16\[2\]: give one channel of floats"):
        session.push(np.zeros(2, np.int16))
    session.push(SPEECH[15000:16000])
    assert session.reply().tokens == generator.generate([Request(SPEECH[:16000])])[0].tokens


def test_mistakes_in_one_line(generator):
    session = Session(generator)
    with pytest.raises(UserError, match="every 0: at least 1 token"):
        session.finish(every=0)
    for other in (Session(generator, rate=8000), session):
        with pytest.raises(UserError, match="nothing was said"):
            other.finish()
        other.push([0.5])  # which it can still be told after
        other.reply()
    with pytest.raises(UserError, match="too short for a sample at 16 kHz"):
        brief = Session(generator, rate=48000)
        brief.push(SPEECH[:1])
        brief.reply()
    for use in (session.finish, session.reply, lambda: session.push(SPEECH)):
        with pytest.raises(UserError, match="this turn has ended: open a session for the next"):
            use()
    with pytest.raises(UserError, match="the history of a session is text"):
        Session(generator, history=[{"role": "user", "content": "", "audio": SPEECH}])  # pyright: ignore
    for max_seconds in (0, -1, float("nan"), 1e9):
        with pytest.raises(UserError, match=r"max_seconds .*: give more than 0, and 600 at most"):
            Session(generator, max_seconds=max_seconds)
    with pytest.raises(UserError, match="sample rate 10 Hz"):
        Session(generator, rate=10)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"model.mask": "bidirectional"},
            "model.mask 'bidirectional' hears whole clips only: train configs/quickstart_streaming.py",
        ),
        ({}, "model.normalisation 'whisper' hears whole clips only"),
        ({"embedder.kind": "stack"}, "embedder.kind 'stack' keeps an encoder, which hears whole clips only"),
    ],
)
def test_what_cannot_stream_says_what_can(tiny_config, changes, match):
    c = tiny_config()
    with c.ignore_type():
        c.update_from_flattened_dict(changes)
    if c.embedder.kind == "stack":
        c.model.encoder, c.model.teacher = c.model.teacher, ""
    with pytest.raises(UserError, match=match):
        Session(Generator(system_lib.build(c), {}))


_ON_TWO_DEVICES = """
import json, sys
from pathlib import Path
import jax, numpy as np
from aura_jax import checkpoint
from aura_jax.infer.generate import Generator
from aura_jax.infer.stream import Session

assert len(jax.devices()) == 2
generator = Generator(*checkpoint.load_for_inference(Path(sys.argv[1])))
session = Session(generator)
for portion in np.split(np.load(sys.argv[2]), 10):
    session.push(portion)
print(json.dumps(session.reply().tokens))
"""


@pytest.mark.slow
def test_a_mesh_of_two_devices_changes_nothing(generator, write_workdir, tmp_path):
    workdir = write_workdir(generator.system, dict(generator.variables), tmp_path / "run")
    np.save(tmp_path / "speech.npy", SPEECH[:20000])
    done = subprocess.run(
        [sys.executable, "-c", _ON_TWO_DEVICES, workdir, tmp_path / "speech.npy"],
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert tuple(json.loads(done.stdout)) == heard(generator, SPEECH[:20000], [20000]).reply().tokens
