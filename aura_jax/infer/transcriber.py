"""Whisper's own decoder, batched and greedy, on the 30 s window that it was trained with or on shorter ones.

On the full window, token for token what transformers' `generate` writes without timestamps. A shorter one is faster,
but with too little silence after the words Whisper repeats itself: on short commands its error rate goes from 2.5% to
over 100%. `evaluate.padding` finds how much it needs; where it was not enough, the clip is heard again in the longest
window.

Dimensions: B rows, N samples of the window, P prompt tokens, S cached tokens, V vocabulary.
"""

import copy
import dataclasses
import functools
import json
import math
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from aura_jax.audio import features
from aura_jax.convert import hf
from aura_jax.errors import UserError, nearest
from aura_jax.infer.generate import Reply
from aura_jax.infer.prompting import Request
from aura_jax.models.whisper import DecoderCache, WhisperDecoder, WhisperEncoder
from aura_jax.system import load_tokenizer

_LEAST_POSITIONS = 2  # 40 ms: the spectrum's frames are 25 ms wide
_REPEATS = 2.4  # times that a text is longer than its compressed bytes (Whisper, arXiv 2212.04356, section 4.5)


@struct.dataclass
class _Tokens:
    """What Whisper's generation settings say; ids, and masks over the vocabulary of what must not be written.

    Attributes:
      prompt_P: the tokens that every answer starts from; -1 for the language, if it is to be detected.
      language_V: the language tokens.
      suppressed_V, suppressed_first_V: never written; not written first.
    """

    prompt_P: jax.Array
    end: jax.Array
    language_V: jax.Array
    suppressed_V: jax.Array
    suppressed_first_V: jax.Array


class Transcriber:
    """Transcribes speech with a Whisper.

    Attributes:
      batch_size: most clips decoded together.
      window_seconds: of the longest window: the longest clip.
      params: of encoder and decoder.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        batch_size: int = 16,
        max_new_tokens: int | None = None,
        language: str | None = None,
        dtype: Any = jnp.float32,
        window_seconds: float | Sequence[float] | None = None,
        padding_seconds: float = 0.0,
    ):
        """
        Args:
          directory: a Hugging Face directory of a Whisper, with its generation settings.
          batch_size: most clips decoded together.
          max_new_tokens: of a transcript; None: all that the decoder can hold.
          language: of the speech, such as "en", for a multilingual model; None: detected for each clip.
          dtype: of weights and computation.
          window_seconds, padding_seconds: as of `with_windows`.

        Raises:
          UserError: if the directory holds no complete Whisper, the language is not one of the model's, or a window is
            none of its.
        """
        directory = Path(directory)
        config = hf.load_whisper_config(directory)
        self._encoder = WhisperEncoder(config, dtype, dtype)
        self._decoder = WhisperDecoder(config, dtype, dtype)
        self.params = {
            "encoder": hf.load_whisper_encoder(directory, config, dtype=dtype),
            "decoder": hf.load_whisper_decoder(directory, config, dtype=dtype),
        }
        self._tokens = _read_tokens(directory, config.vocab, language)
        self._tokenizer = load_tokenizer(directory)
        n_prompt = len(self._tokens.prompt_P)
        most = config.n_target_positions - n_prompt
        if batch_size < 1 or not 1 <= (max_new_tokens or most) <= most:
            raise UserError(
                f"batch size {batch_size}, {max_new_tokens} new tokens: at least 1, and at most {most} tokens"
            )
        self._n_new = max_new_tokens or most
        self.batch_size = batch_size
        self._set_windows(window_seconds, padding_seconds)
        self._hears_again = True

    def with_windows(
        self, window_seconds: float | Sequence[float] | None, padding_seconds: float = 0.0, hears_again: bool = True
    ) -> "Transcriber":
        """Returns a transcriber of the same weights that hears clips in other windows.

        Args:
          window_seconds: what clips are padded to with silence, and the encoder's positions cut to, rounded up to
            20 ms; each is a compilation. Of several, a clip is heard in the shortest that holds it and its padding, or
            in the longest if none does. None: the window of the model, 30 s.
          padding_seconds: the least silence after a clip.
          hears_again: of several windows, a clip whose transcript repeats itself is heard in the longest.

        Raises:
          UserError: for no window, one that is longer than the model's or too short for a spectrum, or padding below 0.
        """
        other = copy.copy(self)
        other._set_windows(window_seconds, padding_seconds)
        other._hears_again = hears_again
        return other

    def _set_windows(self, window_seconds: float | Sequence[float] | None, padding_seconds: float) -> None:
        n_most = self._encoder.config.n_positions
        least, most = _LEAST_POSITIONS / features.ENCODER_RATE, n_most / features.ENCODER_RATE
        if window_seconds is None:
            seconds = [most]
        else:
            seconds = [window_seconds] if isinstance(window_seconds, (int, float)) else list(window_seconds)
        if not seconds or not all(least <= s <= most for s in seconds):
            raise UserError(f"window_seconds {window_seconds}: give one or more, each from {least:g} to {most:g}")
        if not 0 <= padding_seconds < math.inf:
            raise UserError(f"padding_seconds {padding_seconds}: give 0 or more")
        n_positions = sorted({features.n_encoder_frames(round(s * features.SAMPLE_RATE)) for s in seconds})
        self._windows = [features.encoder_samples(n) for n in n_positions]
        self._n_padding = round(padding_seconds * features.SAMPLE_RATE)
        self.window_seconds = self._windows[-1] / features.SAMPLE_RATE

    def generate(self, requests: Sequence[Request], progress: Callable[[int], Any] | None = None) -> list[Reply]:
        """Returns the transcript of each clip, in order.

        Args:
          requests: audio alone.
          progress: called after each batch with the number of requests in it.

        Raises:
          UserError: for a request with text, without audio, or with a clip longer than the window.
        """
        clips = [self._clip(request) for request in requests]
        # A window belongs to its clip, not to the batch: a transcript does not depend on the other clips.
        windows = [self._window(clip) for clip in clips]
        order = sorted(range(len(clips)), key=lambda i: windows[i])
        replies: list[Reply | None] = [None] * len(clips)
        start = 0
        while start < len(order):
            n_samples = windows[order[start]]
            batch = [i for i in order[start : start + self.batch_size] if windows[i] == n_samples]
            heard = self._run([clips[i] for i in batch], n_samples)
            if self._hears_again and n_samples < self._windows[-1]:
                heard = self._again([clips[i] for i in batch], heard)
            for i, reply in zip(batch, heard, strict=True):
                replies[i] = reply
            start += len(batch)
            if progress is not None:
                progress(len(batch))
        return [reply for reply in replies if reply is not None]

    def _clip(self, request: Request) -> np.ndarray:
        waveform = request.waveform
        if waveform is None or request.prompt or request.history or request.transcript is not None:
            raise UserError("Whisper transcribes: give it audio, and neither prompt, history nor transcript")
        if len(waveform) > self._windows[-1]:
            seconds = len(waveform) / features.SAMPLE_RATE
            raise UserError(f"a clip of {seconds:.1f} s is longer than Whisper's {self.window_seconds:g} s: split it")
        return waveform

    def _window(self, clip: np.ndarray) -> int:
        """Returns the samples of the window that a clip is heard in."""
        return next((n for n in self._windows if n >= len(clip) + self._n_padding), self._windows[-1])

    def _again(self, clips: Sequence[np.ndarray], heard: Sequence[Reply]) -> list[Reply]:
        """Returns what was heard, in the longest window where it repeats itself."""
        out, which = list(heard), [i for i, reply in enumerate(heard) if _repeats(reply.text)]
        if which:
            for i, reply in zip(which, self._run([clips[i] for i in which], self._windows[-1]), strict=True):
                out[i] = dataclasses.replace(reply, seconds=heard[i].seconds + reply.seconds)
        return out

    def _run(self, clips: Sequence[np.ndarray], n_samples: int) -> list[Reply]:
        start = time.perf_counter()
        n_rows = min(1 << (len(clips) - 1).bit_length(), self.batch_size)
        waveform_BxN = np.zeros((n_rows, n_samples), np.float32)
        for row_N, clip in zip(waveform_BxN, clips, strict=False):
            row_N[: len(clip)] = clip
        answer_BxS = _transcribe(
            self.params,
            self._tokens,
            waveform_BxN,
            np.int32(len(clips)),
            encoder=self._encoder,
            decoder=self._decoder,
            n_new=self._n_new,
        )
        answer_BxS = np.asarray(answer_BxS)
        seconds = time.perf_counter() - start
        return [self._reply(answer_S, seconds) for answer_S in answer_BxS[: len(clips)]]

    def _reply(self, answer_S: np.ndarray, seconds: float) -> Reply:
        ends = np.flatnonzero(answer_S == int(self._tokens.end))
        tokens = answer_S[: ends[0]] if len(ends) else answer_S
        text = self._tokenizer.decode(tokens.tolist(), skip_special_tokens=True).strip()
        return Reply(text, tuple(tokens.tolist()), bool(len(ends)), seconds)


def _repeats(text: str) -> bool:
    data = text.encode()
    return len(data) > _REPEATS * len(zlib.compress(data))


def _read_tokens(directory: Path, vocab: int, language: str | None) -> _Tokens:
    file = directory / "generation_config.json"
    try:
        settings: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        prompt = [settings["decoder_start_token_id"]]
        languages = settings.get("lang_to_id", {}) if settings.get("is_multilingual") else {}
        if languages:
            token = f"<|{language}|>"
            if language is not None and token not in languages:
                valid = [name.strip("<|>") for name in languages]
                raise UserError(f"{directory} knows no language {language!r}: {nearest(language, valid)}")
            prompt += [-1 if language is None else languages[token], settings["task_to_id"]["transcribe"]]
        elif language not in (None, "en"):
            raise UserError(f"{directory} is an English-only Whisper: language {language!r} needs a multilingual one")
        prompt.append(settings["no_timestamps_token_id"])
        end = settings["eos_token_id"]
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}): copy it from the model's repository") from error
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error}): copy or fetch it again") from error
    except KeyError as error:
        raise UserError(f"{file}: has no {error.args[0]!r}: copy it from the model's repository") from error

    def mask(ids: Sequence[int]) -> jax.Array:
        return jnp.zeros(vocab, bool).at[jnp.asarray(ids, jnp.int32)].set(True)

    never = settings.get("suppress_tokens") or ()
    return _Tokens(
        prompt_P=jnp.asarray(prompt, jnp.int32),
        end=jnp.asarray(end, jnp.int32),
        language_V=mask(list(languages.values())),
        suppressed_V=mask(never),
        suppressed_first_V=mask([*never, *(settings.get("begin_suppress_tokens") or ())]),
    )


@functools.partial(jax.jit, static_argnames=("encoder", "decoder", "n_new"))
def _transcribe(
    params: Mapping[str, Any],
    tokens: _Tokens,
    waveform_BxN: jax.Array,
    n_clips: jax.Array,
    *,
    encoder: WhisperEncoder,
    decoder: WhisperDecoder,
    n_new: int,
) -> jax.Array:
    """Returns the transcripts' tokens [B, n_new], filled up with the end token; rows from `n_clips` on are empty."""
    n_rows = waveform_BxN.shape[0]
    mel_BxFxM = features.log_mel(waveform_BxN, encoder.config.n_mels, reflect_end=True)
    states_BxPxD, _ = encoder.apply({"params": params["encoder"]}, mel_BxFxM)
    decode = functools.partial(decoder.apply, {"params": params["decoder"]})
    cross = decode(states_BxPxD, method="cross_kv")
    choose = lambda logits_BxV, allowed_V: jnp.argmax(
        jnp.where(allowed_V, logits_BxV, -jnp.inf), axis=-1, keepdims=True
    ).astype(jnp.int32)

    prompt_BxP = jnp.broadcast_to(tokens.prompt_P, (n_rows, len(tokens.prompt_P)))
    if prompt_BxP.shape[1] > 2:  # a multilingual model: the second token is the language
        logits_Bx1xV, _ = decode(prompt_BxP[:, :1], cross)
        detected_Bx1 = choose(logits_Bx1xV[:, 0], tokens.language_V)
        language_Bx1 = jnp.where(prompt_BxP[:, 1:2] < 0, detected_Bx1, prompt_BxP[:, 1:2])
        prompt_BxP = prompt_BxP.at[:, 1:2].set(language_Bx1)

    n_prompt = prompt_BxP.shape[1]
    cache = DecoderCache.zeros(decoder.config, n_rows, n_prompt + n_new, decoder.dtype)
    logits_BxPxV, cache = decode(prompt_BxP, cross, cache, 0)
    token_Bx1 = choose(logits_BxPxV[:, -1], ~tokens.suppressed_first_V)

    def unfinished(state: tuple) -> jax.Array:
        n_done, _, finished_Bx1, *_ = state
        return (n_done < n_new) & ~finished_Bx1.all()

    def one_token(state: tuple) -> tuple:
        n_done, token_Bx1, finished_Bx1, answer_BxS, cache = state
        logits_Bx1xV, cache = decode(token_Bx1, cross, cache, n_prompt + n_done - 1)
        token_Bx1 = jnp.where(finished_Bx1, tokens.end, choose(logits_Bx1xV[:, 0], ~tokens.suppressed_V))
        answer_BxS = jax.lax.dynamic_update_slice(answer_BxS, token_Bx1, (0, n_done))
        return n_done + 1, token_Bx1, finished_Bx1 | (token_Bx1 == tokens.end), answer_BxS, cache

    finished_Bx1 = (token_Bx1 == tokens.end) | (jnp.arange(n_rows)[:, None] >= n_clips)
    answer_BxS = jnp.full((n_rows, n_new), tokens.end).at[:, :1].set(token_Bx1)
    state = (jnp.int32(1), token_Bx1, finished_Bx1, answer_BxS, cache)
    return jax.lax.while_loop(unfinished, one_token, state)[3]
