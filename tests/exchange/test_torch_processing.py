"""The processor that exports ship: the frames and the tokens that the model was trained on."""

import json

import numpy as np
import pytest
import torch
import transformers

from aura_jax.audio import features
from aura_jax.data.prompts import CHATML, ChatFormat
from aura_jax.exchange.torch.processing_aura import AuraProcessor, log_mel

PARITY = 1e-4
# Brings a system turn of its own, as SmolLM2's and Qwen2's do.
WITH_DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}" + CHATML
)
WITH_VARIABLE = CHATML + "{% if not thinking %}<think>\n\n</think>\n\n{% endif %}"


def clip(n_samples: int) -> np.ndarray:
    """Noise that swells and dies away, then silence: frames that either normalisation raises, each its own."""
    draw = np.random.default_rng(n_samples).normal(size=n_samples).astype(np.float32)
    place = np.linspace(0, 1, n_samples, dtype=np.float32)
    return np.where(place > 0.9, 0, draw * 10 ** (-8 * np.abs(place - 0.5))).astype(np.float32)


@pytest.mark.parametrize("n_mels", [80, 128])
@pytest.mark.parametrize("normalisation", ["whisper", "streaming"])
def test_log_mel_is_that_of_training(n_mels, normalisation):
    lengths = [1, 159, 160, 161, 399, 5000, 16000]
    waveform_BxS = np.zeros((len(lengths), 16000), np.float32)
    for row, n in zip(waveform_BxS, lengths, strict=True):
        row[:n] = clip(n)
    expected = features.log_mel(
        waveform_BxS, n_mels, n_samples_B=np.array(lengths), normalisation=normalisation, reflect_end=False
    )
    for n, expected_FxM in zip(lengths, np.asarray(expected), strict=True):
        ours = log_mel(clip(n), n_mels, normalisation)
        assert ours.shape == (features.n_frames(n), n_mels) and ours.dtype == np.float32
        assert not expected_FxM[len(ours) :].any()
        assert np.abs(ours - expected_FxM[: len(ours)]).max() <= PARITY * np.abs(expected_FxM).max(), n


@pytest.fixture(scope="module")
def tokenizer(tiny_llm_dir):
    return transformers.AutoTokenizer.from_pretrained(tiny_llm_dir)


def make(tokenizer, **changes) -> AuraProcessor:
    values = {
        "n_mels": 80,
        "frames_per_token": 4,
        "normalisation": "whisper",
        "prompt": "Answer the question.",
        "system": None,
        "template_kwargs": {},
        "stop_ids": [2],
    }
    return AuraProcessor(tokenizer, **(values | changes))


@pytest.fixture(scope="module")
def processor(tokenizer) -> AuraProcessor:
    return make(tokenizer)


@pytest.mark.parametrize(
    ("template", "changes"),
    [
        (None, {}),
        (CHATML, {"prompt": "", "system": "You are a voice assistant."}),
        (WITH_DEFAULT_SYSTEM, {"frames_per_token": 2}),
        (WITH_VARIABLE, {"template_kwargs": {"thinking": False}, "system": "Hush."}),
    ],
)
@pytest.mark.parametrize(
    ("has_audio", "text"), [(True, None), (True, ""), (True, "Reply."), (False, "Turn on the lights.")]
)
def test_prompts_have_the_tokens_of_training(tiny_llm_dir, template, changes, text, has_audio):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llm_dir)
    if template is not None:
        tokenizer.chat_template = template
    processor = make(tokenizer, **changes)
    chat = ChatFormat(tokenizer, template, processor.system, processor.template_kwargs)
    prefix, suffix = chat.encode(processor.prompt if text is None else text, has_audio)
    n_audio = int(features.n_audio_tokens(9000, 50 / processor.frames_per_token)) if has_audio else 0

    inputs = processor(audio=clip(9000) if has_audio else None, text=text)
    (ids,), (is_audio,) = inputs["input_ids"].tolist(), inputs["audio_token_mask"].tolist()
    assert ids == [*prefix, *[tokenizer.pad_token_id] * n_audio, *suffix]
    assert is_audio == [False] * len(prefix) + [True] * n_audio + [False] * len(suffix)
    assert inputs["attention_mask"].all() and ("input_features" in inputs) == has_audio


def test_a_batch_is_its_requests_padded(processor):
    clips, texts = [clip(16000), None, clip(5000)], [None, "Turn on the lights.", "Reply."]
    batch = processor(audio=clips, text=texts)
    assert {name: x.dtype for name, x in batch.items()} == {
        "input_ids": torch.int64,
        "attention_mask": torch.int64,
        "audio_token_mask": torch.bool,
        "input_features": torch.float32,
        "n_frames": torch.int64,
    }
    assert batch["n_frames"].tolist() == [100, 32] and batch["input_features"].shape == (2, 100, 80)
    assert not batch["input_features"][1, 32:].any()
    right = processor(audio=clips, text=texts, padding_side="right")
    heard = 0
    for row, (one, text) in enumerate(zip(clips, texts, strict=True)):
        alone = processor(audio=one, text=text)
        for side, padded in (("left", batch), ("right", right)):
            real = padded["attention_mask"][row].bool()
            assert real.sum() == alone["input_ids"].shape[1] and real[-1 if side == "left" else 0]
            assert (padded["input_ids"][row, ~real] == processor.tokenizer.pad_token_id).all()
            assert not padded["audio_token_mask"][row, ~real].any()
            for name in ("input_ids", "audio_token_mask"):
                torch.testing.assert_close(padded[name][row, real], alone[name][0], rtol=0, atol=0)
        if one is not None:
            n_frames = int(batch["n_frames"][heard])
            torch.testing.assert_close(batch["input_features"][heard, :n_frames], alone["input_features"][0])
            heard += 1


def test_one_text_for_all_clips_and_other_kinds_of_clips(processor):
    together = processor(audio=[clip(3200), clip(4800)], text="Reply.", return_tensors="np")
    apart = processor(audio=(torch.tensor(clip(3200)), clip(4800).astype(np.float64)), text=["Reply."] * 2)
    assert isinstance(together["input_ids"], np.ndarray)
    for name, value in together.items():
        np.testing.assert_array_equal(value, apart[name].numpy())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "nothing to answer: give audio, text or both"),
        ({"text": ""}, "a request needs a clip or text, and one has neither"),
        ({"audio": [None, clip(800)], "text": [None, "Hi."]}, "one has neither"),
        ({"audio": clip(800), "sampling_rate": 44100}, "the clips have 44100 Hz, the model hears 16000: resample them"),
        ({"audio": np.zeros((2, 800), np.float32)}, r"audio of shape \(2, 800\): a clip is one mono waveform"),
        ({"audio": [0.0, 0.1]}, r"audio of shape \(\): a clip is one mono waveform"),
        ({"audio": np.zeros(0, np.float32)}, r"audio of shape \(0,\): a clip is one mono waveform"),
        ({"audio": np.zeros(800, np.int16)}, r"audio of dtype int16: a clip is floats in \[-1, 1\]"),
        ({"audio": [clip(800)], "text": ["Hi.", "Ho."]}, "1 clips and 2 texts: give one of each"),
        ({"text": "Hi.", "padding_side": "middle"}, "padding_side 'middle' is neither 'left' nor 'right'"),
    ],
)
def test_what_is_no_request_is_refused(processor, arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        processor(**arguments)
    assert "\n" not in str(caught.value)


def test_a_template_that_drops_the_turn_and_an_unknown_normalisation_are_refused(tiny_llm_dir):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llm_dir)
    tokenizer.chat_template = "<|im_start|>assistant\n"
    with pytest.raises(ValueError, match="the chat template shows the user's turn 0 times instead of once"):
        make(tokenizer)(audio=clip(800))
    with pytest.raises(ValueError, match="normalisation 'none' is neither 'whisper' nor 'streaming'"):
        log_mel(clip(800), 80, "none")


def test_auto_processor_of_every_export(exported, tiny_loaded, tmp_path):
    built, _ = tiny_loaded
    expected = make(built.tokenizer, prompt="")(audio=clip(4000))
    for folder in exported.values():
        loaded = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        assert tuple(loaded.stop_ids) == built.chat.stop_ids
        for name, value in loaded(audio=clip(4000)).items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=0)
    loaded.save_pretrained(tmp_path)
    again = transformers.AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    values = json.loads((tmp_path / "processor_config.json").read_text())
    assert values == json.loads((folder / "processor_config.json").read_text())
    torch.testing.assert_close(again(audio=clip(4000))["input_ids"], expected["input_ids"], rtol=0, atol=0)
    assert again.batch_decode(torch.tensor([[1, 2]])) == ["<|im_start|><|im_end|>"]
    assert again.decode([1, 2], skip_special_tokens=True) == ""
