# Copyright: the authors of aura_jax. SPDX-License-Identifier: Apache-2.0
"""Clips and text to the inputs of a speech LLM trained by aura_jax: log-mel frames, and the prompt around them.

    processor = AutoProcessor.from_pretrained(DIRECTORY, trust_remote_code=True)
    inputs = processor(audio=waveform)                                  # the prompt that the model was trained with
    inputs = processor(audio=[waveform, None], text=["Translate.", "Hello!"])  # a spoken turn and a written one

Shapes: B rows, T columns, N clips, F mel frames (100 Hz), M mel bins.
"""

import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from transformers import BatchFeature, ProcessorMixin
from transformers.audio_utils import mel_filter_bank

SAMPLING_RATE = 16000
HOP = 160  # samples: 100 frames a second
N_FFT = 400  # samples: windows of 25 ms

_MARK = "\ue000audio\ue000"  # private use: in no vocabulary, and no chat template changes it


class AuraProcessor(ProcessorMixin):
    """Turns requests, each a clip, a text or both, into a batch.

    Args:
      tokenizer: its chat template is that of the training run.
      n_mels: mel bins.
      frames_per_token: 50 Hz frames that one audio token covers.
      normalisation: "whisper" or "streaming", as `log_mel`.
      prompt: the user's words beside a clip, if a request has none of its own.
      system: text of the system turn; None: what the template does by itself.
      template_kwargs: further variables of the template.
      stop_ids: ids of the tokens that end an answer.
    """

    # What transformers 4 reads; transformers 5 reads the signature below.
    attributes: ClassVar[Any] = ["tokenizer"]
    tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        tokenizer: Any,
        n_mels: int,
        frames_per_token: int,
        normalisation: str,
        prompt: str,
        system: str | None,
        template_kwargs: dict[str, Any],
        stop_ids: list[int],
        chat_template: str | None = None,
    ):
        super().__init__(tokenizer, chat_template=chat_template)
        self.n_mels, self.frames_per_token, self.normalisation = n_mels, frames_per_token, normalisation
        self.prompt, self.system, self.template_kwargs = prompt, system, template_kwargs
        self.stop_ids = stop_ids

    def __call__(
        self,
        audio: Any = None,
        text: str | Sequence[str | None] | None = None,
        sampling_rate: int = SAMPLING_RATE,
        return_tensors: str | None = "pt",
        padding_side: str = "left",
    ) -> BatchFeature:
        """Returns `input_ids` [B, T] (the pad token in the columns of audio, too), `attention_mask` [B, T] (1 at text
        and audio), `audio_token_mask` [B, T] (True at audio), and if there is a clip `input_features` [N, F, M] and
        `n_frames` [N], the clips of those rows that have one, in order.

        Args:
          audio: one clip, or for each request a clip or None. A clip is a mono waveform, floats in [-1, 1] at 16 kHz.
          text: the user's words, of all requests or of each. None beside a clip: the prompt of the training run.
          sampling_rate: of the clips.
          padding_side: "left" to generate; "right" will do for one forward pass.

        Raises:
          ValueError: a request with neither clip nor text, or what is no such clip.
        """
        if sampling_rate != SAMPLING_RATE:
            raise ValueError(f"the clips have {sampling_rate} Hz, the model hears {SAMPLING_RATE}: resample them")
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side {padding_side!r} is neither 'left' nor 'right'")
        clips, texts = _requests(audio, text)
        mels = [None if clip is None else log_mel(clip, self.n_mels, self.normalisation) for clip in clips]
        rows = [self._row(mel, words) for mel, words in zip(mels, texts, strict=True)]
        batch = self._pad_rows(rows, padding_side)
        heard = [mel for mel in mels if mel is not None]
        if heard:
            batch["input_features"] = np.zeros((len(heard), max(map(len, heard)), self.n_mels), np.float32)
            for features, mel in zip(batch["input_features"], heard, strict=True):
                features[: len(mel)] = mel
            batch["n_frames"] = np.array([len(mel) for mel in heard])
        return BatchFeature(batch, tensor_type=return_tensors)

    def _row(self, mel: np.ndarray | None, text: str | None) -> tuple[list[int], list[bool]]:
        """Returns a request's ids, up to where the answer begins, and which of them are audio."""
        if mel is None:
            if not text:
                raise ValueError("a request needs a clip or text, and one has neither")
            (ids,) = self._render(text)
            return ids, [False] * len(ids)
        text = self.prompt if text is None else text
        before, after = self._render(f"{_MARK}\n{text}" if text else _MARK)
        n_audio = -(-len(mel) // (2 * self.frames_per_token))
        ids = [*before, *[self._pad_id()] * n_audio, *after]
        return ids, [len(before) <= i < len(before) + n_audio for i in range(len(ids))]

    def _render(self, content: str) -> list[list[int]]:
        """Renders the template, and tokenises what is before and after the mark by itself.

        So no token straddles the edge of the audio, and a clip and its transcript have the same tokens around them.
        """
        turns = [{"role": "user", "content": content}]
        if self.system is not None:
            turns.insert(0, {"role": "system", "content": self.system})
        rendered = self.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True, **self.template_kwargs
        )
        parts = rendered.split(_MARK)
        if len(parts) != 1 + content.count(_MARK):
            raise ValueError(f"the chat template shows the user's turn {len(parts) - 1} times instead of once")
        return [self.tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts]

    def _pad_rows(self, rows: list[tuple[list[int], list[bool]]], side: str) -> dict[str, np.ndarray]:
        shape = len(rows), max(len(ids) for ids, _ in rows)
        input_ids = np.full(shape, self._pad_id(), np.int64)
        attention_mask, audio_token_mask = np.zeros(shape, np.int64), np.zeros(shape, bool)
        for row, (ids, is_audio) in enumerate(rows):
            place = slice(shape[1] - len(ids), None) if side == "left" else slice(len(ids))
            input_ids[row, place], attention_mask[row, place], audio_token_mask[row, place] = ids, 1, is_audio
        return {"input_ids": input_ids, "attention_mask": attention_mask, "audio_token_mask": audio_token_mask}

    def _pad_id(self) -> int:
        return self.stop_ids[0] if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id


def _requests(audio: Any, text: Any) -> tuple[Sequence[np.ndarray | None], Sequence[str | None]]:
    """Returns the clip and the text of each request."""
    if audio is None and text is None:
        raise ValueError("nothing to answer: give audio, text or both")
    if audio is None:
        texts = [text] if isinstance(text, str) else list(text)
        return [None] * len(texts), texts
    clips = list(audio) if isinstance(audio, (list, tuple)) else [audio]
    texts = [text] * len(clips) if text is None or isinstance(text, str) else list(text)
    if len(clips) != len(texts):
        raise ValueError(f"{len(clips)} clips and {len(texts)} texts: give one of each for every request, or None")
    return [None if clip is None else _waveform(clip) for clip in clips], texts


def _waveform(clip: Any) -> np.ndarray:
    """Returns a clip as float32 [samples]."""
    clip = np.asarray(clip)
    if clip.ndim != 1 or not len(clip):
        raise ValueError(f"audio of shape {clip.shape}: a clip is one mono waveform [samples]")
    if not np.issubdtype(clip.dtype, np.floating):
        raise ValueError(f"audio of dtype {clip.dtype}: a clip is floats in [-1, 1]")
    return clip.astype(np.float32)


def log_mel(waveform: np.ndarray, n_mels: int, normalisation: str = "whisper") -> np.ndarray:
    """Returns the log-mel spectrogram that Whisper reads [F, M], one frame for every 10 ms begun.

    Frame f is centred on sample 160 f. The start is reflected, the end followed by zeros.

    Args:
      waveform: float32 [samples], 16 kHz.
      normalisation: values more than 8 (80 dB) below a maximum are raised to it. "whisper": the clip's maximum;
        "streaming": the maximum up to and including each frame, which does not look ahead.
    """
    if normalisation not in ("whisper", "streaming"):
        raise ValueError(f"normalisation {normalisation!r} is neither 'whisper' nor 'streaming'")
    n_frames = -(-len(waveform) // HOP)
    padded = np.pad(waveform, (0, n_frames * HOP + N_FFT // 2 - len(waveform)))
    padded = np.pad(padded, (N_FFT // 2, 0), mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, N_FFT)[: n_frames * HOP : HOP]  # [F, N_FFT]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(N_FFT) / N_FFT)
    power = np.abs(np.fft.rfft(windows * hann)) ** 2  # [F, 1 + N_FFT / 2]
    log = np.log10(np.maximum(power @ _mel_filters(n_mels), 1e-10))  # [F, M]
    loudest = log.max(axis=1, keepdims=True)  # [F, 1]
    maximum = loudest.max() if normalisation == "whisper" else np.maximum.accumulate(loudest)
    return ((np.maximum(log, maximum - 8) + 4) / 4).astype(np.float32)


@functools.lru_cache(maxsize=4)
def _mel_filters(n_mels: int) -> np.ndarray:
    """Slaney's triangles from 0 to 8 kHz [1 + N_FFT / 2, M], which are Whisper's."""
    return mel_filter_bank(1 + N_FFT // 2, n_mels, 0.0, 8000.0, SAMPLING_RATE, norm="slaney", mel_scale="slaney")
