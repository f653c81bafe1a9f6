# Copyright: the authors of aura_jax. SPDX-License-Identifier: Apache-2.0
"""How a speech LLM trained by aura_jax takes audio, in plain PyTorch.

A clip's log-mel frames become one audio token for every 80 ms or so (`AudioEmbedder`). They take their places among
the embeddings of the text tokens (`insert_audio`), and the LLM reads them under the mask that it was trained with
(`attention_mask_4d`). There is no speech encoder.

`generate` does all of it for a plain LLM of transformers, or one with the run's PEFT adapter:

    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), DIRECTORY)
    embedder = AudioEmbedder.from_pretrained(DIRECTORY)
    tokens = generate(model, embedder, processor(audio=waveform))

Shapes: B rows, T columns of the input, S columns in all (the cached ones come before those T), N clips in the order of
their rows, F mel frames (100 Hz), M mel bins, P positions (50 Hz), A audio tokens, W width inside, D width of the LLM.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F


class AudioEmbedder(nn.Module):
    """Log-mel frames to audio tokens of the size of the LLM's own embeddings.

    "stem" is Whisper's two convolutions, then `frames_per_token` positions stacked into a token; "patch" is one linear
    map of the mel frames that a token covers.

    Args:
      audio_config: the contents of `audio_config.json`.
    """

    text_rms: torch.Tensor

    def __init__(self, audio_config: Mapping[str, Any]):
        super().__init__()
        self.audio_config = audio_config
        c = audio_config["embedder"]
        self.kind, self.width, self.frames_per_token = c["kind"], c["width"], c["frames_per_token"]
        if self.kind == "stem":
            self.conv1 = nn.Conv1d(c["n_mels"], self.width, kernel_size=3, padding=1)
            self.conv2 = nn.Conv1d(self.width, self.width, kernel_size=3, stride=2, padding=1)
            token_width = self.frames_per_token * self.width
        else:
            self.patch = nn.Linear(2 * self.frames_per_token * c["n_mels"], self.width)
            token_width = self.width
        self.norm = nn.LayerNorm(token_width, eps=1e-6)
        self.proj = nn.Linear(token_width, c["out_width"])
        self.gain = nn.Parameter(torch.ones(()))
        self.register_buffer("text_rms", torch.tensor(0.02))  # root mean square of the LLM's embedding table

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "AudioEmbedder":
        """Reads `audio_config.json` and `audio_embedder.safetensors`."""
        directory = Path(directory)
        embedder = cls(json.loads((directory / "audio_config.json").read_text(encoding="utf-8")))
        embedder.load_state_dict(load_file(directory / "audio_embedder.safetensors"))
        return embedder.eval()

    def n_tokens(self, n_frames: torch.Tensor) -> torch.Tensor:
        """How many audio tokens cover so many mel frames."""
        return -(-n_frames // (2 * self.frames_per_token))

    def forward(self, input_features: torch.Tensor, n_frames: torch.Tensor) -> torch.Tensor:
        """Returns audio tokens [N, A, D]; those past a clip's `n_tokens` hold no meaning.

        Args:
          input_features: log-mel frames [N, F, M].
          n_frames: how many of them are real [N]; the others change nothing.
        """
        x = _zero_after(input_features.to(self.proj.weight.dtype), n_frames)  # [N, F, M]
        x = self._stem(x, n_frames) if self.kind == "stem" else self._patch(x)  # [N, A, token_width]
        x = self.proj(self.norm(x)).float()  # [N, A, D]
        rms = (x.square().mean(-1, keepdim=True) + 1e-12).sqrt()
        return (x / rms * (self.text_rms.float() * self.gain.float())).to(self.proj.weight.dtype)

    def _stem(self, x: torch.Tensor, n_frames: torch.Tensor) -> torch.Tensor:
        # Zeros beyond a clip's end at every stage are what the convolutions' padding gives a clip by itself.
        x = _zero_after(F.gelu(self.conv1(x.mT)).mT, n_frames)  # [N, F, W]
        x = F.gelu(self.conv2(x.mT)).mT  # [N, P, W]
        x = x + _sinusoids(x.shape[1], self.width).to(x)
        return _stack(_zero_after(x, (n_frames + 1) // 2), self.frames_per_token)

    def _patch(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(_stack(x, 2 * self.frames_per_token))  # [N, A, W]
        return x + _sinusoids(x.shape[1], self.width).to(x)


def _zero_after(x: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
    """Zeros the frames of x [N, F, W] from n [N] on."""
    beyond = torch.arange(x.shape[1], device=x.device) >= n.to(x.device)[:, None]  # [N, F]
    return x.masked_fill(beyond[..., None], 0)


def _stack(x: torch.Tensor, n: int) -> torch.Tensor:
    """Puts n frames side by side: [N, F, W] to [N, ceil(F / n), n * W]."""
    x = F.pad(x, (0, 0, 0, -x.shape[1] % n))
    return x.reshape(x.shape[0], x.shape[1] // n, n * x.shape[2])


def _sinusoids(length: int, width: int) -> torch.Tensor:
    """Whisper's positions [length, width]: sines, then cosines."""
    rate = np.exp(-np.log(10000.0) / (width // 2 - 1) * np.arange(width // 2))
    angle = np.arange(length)[:, None] * rate
    return torch.from_numpy(np.concatenate([np.sin(angle), np.cos(angle)], axis=1))


def insert_audio(
    inputs_embeds: torch.Tensor, audio_token_mask: torch.Tensor, audio: torch.Tensor, n_tokens: torch.Tensor
) -> torch.Tensor:
    """Returns the embeddings [B, T, D] with the audio tokens in their columns.

    Args:
      audio_token_mask: bool [B, T], True in the columns of a row's clip; a row has one clip at most.
      audio: [N, A, D], the clips of the rows that have one, in order.
      n_tokens: how many tokens of each clip are real [N].
    """
    n_columns = audio_token_mask.sum(1)
    if n_columns[n_columns > 0].tolist() != n_tokens.tolist():
        raise ValueError(
            f"rows have {n_columns.tolist()} audio columns, but the clips of input_features make {n_tokens.tolist()} "
            "audio tokens: give the clips of these rows, in order"
        )
    real = torch.arange(audio.shape[1], device=audio.device) < n_tokens.to(audio.device)[:, None]  # [N, A]
    return inputs_embeds.masked_scatter(audio_token_mask[..., None], audio[real].to(inputs_embeds))


def key_end(audio_token_mask: torch.Tensor, mask: str, chunk: int = 0) -> torch.Tensor:
    """Returns for each column the exclusive end of the columns that it sees [B, T].

    Text is causal under every mask. Inside a clip "causal" keeps that, "bidirectional" opens the whole clip, and
    "block" opens it up to the end of the column's chunk of `chunk` tokens, which is what can be streamed.
    """
    column = torch.arange(audio_token_mask.shape[1], device=audio_token_mask.device).expand(audio_token_mask.shape)
    if mask == "causal":
        return column + 1
    if mask not in ("bidirectional", "block"):
        raise ValueError(f"mask {mask!r} is unknown: causal, bidirectional or block")
    is_first = audio_token_mask & ~F.pad(audio_token_mask, (1, -1))
    is_last = audio_token_mask & ~F.pad(audio_token_mask, (-1, 1))
    end = torch.where(is_last, column + 1, audio_token_mask.shape[1]).flip(1).cummin(1).values.flip(1)
    if mask == "block":
        start = torch.where(is_first, column, 0).cummax(1).values
        end = torch.minimum(end, start + ((column - start) // chunk + 1) * chunk)
    return torch.where(audio_token_mask, end, column + 1)


def attention_mask_4d(
    attention_mask: torch.Tensor, audio_token_mask: torch.Tensor, mask: str, chunk: int, dtype: torch.dtype
) -> torch.Tensor:
    """Returns what is added to the attention scores [B, 1, T, S]: 0 where a column is seen, else the lowest number.

    Args:
      attention_mask: [B, S], 1 at real tokens.
      audio_token_mask: bool [B, T], of the last T of those columns.
      mask, chunk: as `audio_config.json` has them.
    """
    n_cached = attention_mask.shape[1] - audio_token_mask.shape[1]
    end = n_cached + key_end(audio_token_mask, mask, chunk)  # [B, T]
    in_reach = torch.arange(attention_mask.shape[1], device=end.device) < end[..., None]  # [B, T, S]
    seen = in_reach & attention_mask.bool()[:, None]
    scores = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return scores.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


def count_positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Returns position ids [B, S]: real tokens are counted, padding is not."""
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)


@torch.no_grad()
def prompt_embeddings(table: nn.Module, embedder: AudioEmbedder, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Returns what an LLM reads of its prompts [B, T, D]: what a runtime that takes prompt embeddings is given.

    Args:
      table: the LLM's embeddings of text tokens.
      inputs: what the processor returns.
    """
    embeds = table(inputs["input_ids"])  # [B, T, D]
    if "input_features" not in inputs:
        return embeds
    n_frames = inputs["n_frames"]
    audio = embedder(inputs["input_features"].to(embedder.gain.device), n_frames)
    return insert_audio(embeds, inputs["audio_token_mask"], audio, embedder.n_tokens(n_frames))


@torch.no_grad()
def generate(
    model: Any, embedder: AudioEmbedder, inputs: Mapping[str, torch.Tensor], max_new_tokens: int = 64
) -> torch.Tensor:
    """Returns the greedy answers [B, G]: new tokens only, filled up with a stop token.

    Args:
      model: the base LLM with the run's adapter (`peft.PeftModel`), or the merged one; attention "sdpa" or "eager".
      inputs: what the processor returns, padded on the left.
    """
    config = embedder.audio_config
    inputs = {name: x.to(model.device) for name, x in inputs.items()}
    attention_mask, audio_token_mask = inputs["attention_mask"], inputs["audio_token_mask"]
    if not attention_mask[:, -1].all():
        raise ValueError("generate needs rows that end in the last column: pad on the left")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}: at least 1 is needed")
    embeds = prompt_embeddings(model.get_input_embeddings(), embedder, inputs)
    seen = attention_mask
    if "input_features" in inputs:
        seen = attention_mask_4d(attention_mask, audio_token_mask, config["mask"], config["chunk"], embeds.dtype)

    positions = count_positions(attention_mask)
    step = {"inputs_embeds": embeds, "attention_mask": seen, "position_ids": positions}
    adapters = _adapter_of_each_row(model, audio_token_mask.any(1).tolist(), config["lora"])
    stop_ids = torch.tensor(config["stop_ids"], device=embeds.device)
    ended = torch.zeros(len(embeds), dtype=torch.bool, device=embeds.device)
    answer: list[torch.Tensor] = []
    while len(answer) < max_new_tokens and not ended.all():
        output = model(**step, **adapters, use_cache=True, logits_to_keep=1)
        token = output.logits[:, -1].argmax(-1).to(embeds.device)  # [B]
        answer.append(torch.where(ended, stop_ids[0], token))
        ended |= torch.isin(token, stop_ids)
        attention_mask = F.pad(attention_mask, (0, 1), value=1)
        positions = positions[:, -1:] + 1
        step = {"input_ids": answer[-1][:, None], "attention_mask": attention_mask, "position_ids": positions}
        step |= {"past_key_values": output.past_key_values}
    return torch.stack(answer, dim=1)


def _adapter_of_each_row(model: Any, has_audio: list[bool], lora: Mapping[str, Any] | None) -> dict[str, list[str]]:
    """Returns what tells PEFT to leave rows without audio to the base LLM, as the scope "request" has it."""
    if lora is None or lora["scope"] != "request" or all(has_audio):
        return {}
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError("rows without audio need the adapter off: load it with peft.PeftModel, which can do that")
    if not hasattr(model, "disable_adapter"):
        return {}  # a merged model, or the base by itself
    return {"adapter_names": [model.active_adapter if row else "__base__" for row in has_audio]}
