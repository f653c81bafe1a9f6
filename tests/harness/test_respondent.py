"""A cascade hears and reads, answers lose what the logits say, and audio comes as harnesses have it."""

import jax
import numpy as np
import pytest
import soxr

from aura_jax.audio.io import load_audio
from aura_jax.data.manifest import load_manifest
from aura_jax.errors import UserError
from aura_jax.harness import respondent
from aura_jax.harness.respondent import Respondent, clip
from aura_jax.infer.generate import Generator, Reply, plain_generator
from aura_jax.infer.prompting import Request
from aura_jax.infer.sampling import Sampling


def spoken(seed: int, prompt: str = "Answer.") -> Request:
    waveform = np.random.default_rng(seed).standard_normal(9000) * 0.1
    return Request(waveform.astype(np.float32), prompt)


class Ears:
    """In the place of a Whisper."""

    def __init__(self, directory, batch_size):
        self.batch_size = batch_size

    def generate(self, requests, progress=None):
        progress(len(requests))
        return [Reply("so it is said", (), True, 0.0) for _ in requests]


def test_a_cascade_hears_and_reads(tiny_workdir, tiny_loaded, monkeypatch):
    monkeypatch.setattr(respondent, "Transcriber", Ears)
    cascade, told = Respondent(tiny_workdir, system="cascade", batch_size=2), []
    sampling = Sampling(temperature=1.0, seed=3)
    found = cascade.generate([Request(prompt="Why is it?"), spoken(0)], 8, sampling=sampling, progress=told.append)

    plain = plain_generator(tiny_loaded[0].config)
    written = [Request(prompt="Why is it?", number=0), Request(transcript="so it is said", prompt="Answer.", number=1)]
    expected = [plain.generate([request], sampling=sampling)[0] for request in written]
    assert [reply.tokens for reply in found] == [reply.tokens for reply in expected]
    assert sum(told) == 2
    with pytest.raises(UserError, match="a cascade writes answers and rates none"):
        cascade.losses([spoken(0)], ["yes"])


def test_losses_are_those_of_the_logits(tiny_workdir, tiny_loaded, monkeypatch):
    """Of answers of one token, beside a longer one."""
    student = Respondent(tiny_workdir)
    assert (student.batch_size, student.max_new_tokens) == (4, 8)
    log_p_V = np.asarray(jax.nn.log_softmax(Generator(*tiny_loaded).prompt_logits(spoken(0))[-1]))
    best = int(log_p_V.argmax())
    ids = {"the likeliest": (best,), "another": ((best + 1) % len(log_p_V),), "longer": (5, 6, 7), "": ()}
    chat = student._system.chat
    text = chat.text
    monkeypatch.setattr(chat, "text", lambda words: ids[words] if words in ids else text(words))
    for words in ("the likeliest", "another"):
        (nats, greedy), (_, other) = student.losses([spoken(0), spoken(1)], [words, "longer"])
        np.testing.assert_allclose(nats, -log_p_V[ids[words][0]], rtol=1e-4)
        assert (greedy, other) == (words == "the likeliest", False)
    with pytest.raises(UserError, match="an empty answer has no likelihood"):
        student.losses([spoken(0)], [""])


def test_clips(sample_data):
    tone = np.sin(np.arange(8000) / 8000 * 2 * np.pi * 440)  # float64, 8 kHz
    found = clip({"array": tone, "sampling_rate": 8000}, "a")
    assert found.dtype == np.float32 and len(found) == 16000
    np.testing.assert_allclose(found, soxr.resample(tone, 8000, 16000, quality="HQ"), atol=1e-6)
    file = load_manifest(sample_data / "recordings" / "test.jsonl")[0].audio
    np.testing.assert_array_equal(clip(str(file), "a"), load_audio(file))


@pytest.mark.parametrize(
    ("audio", "match"),
    [
        (object(), "q: object, not audio"),
        ({"bytes": b""}, "q: dict, not audio"),
        ({"array": np.zeros((2, 9)), "sampling_rate": 16000}, r"q: samples float64\[2, 9\]: give one channel"),
        (
            {"array": np.zeros(9, np.int16), "sampling_rate": 16000},
            r"q: samples int16\[9\]: give one channel of floats",
        ),
        ({"array": [], "sampling_rate": 16000}, "q: no samples"),
        ({"array": [0.0, np.nan], "sampling_rate": 16000}, "q: NaN or infinite"),
        ({"array": [0.0], "sampling_rate": 0}, "q: sample rate 0 Hz"),
        ("none.wav", "none.wav: no such audio file"),
    ],
)
def test_what_is_no_clip(audio, match):
    with pytest.raises(UserError, match=match) as caught:
        clip(audio, "q")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"system": "oracle"}, "system=oracle: valid: cascade, student"),
        ({"which": "lates"}, "which=lates: did you mean 'latest'"),
        ({"system": "cascade", "which": "latest"}, "a cascade has none"),
        ({"batch_size": 0}, "batch"),
        ({"workdir": "nowhere"}, "no config at nowhere/config.json"),
    ],
)
def test_mistakes(tiny_workdir, arguments, match):
    with pytest.raises(UserError, match=match):
        Respondent(**{"workdir": tiny_workdir, **arguments})
