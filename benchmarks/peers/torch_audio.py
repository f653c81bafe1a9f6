"""Audio in torch, as aura_jax computes it: log-mel, the audio embedder, and the teacher's pooled states.

Dimensions: N clips, S samples at 16 kHz, F mel frames (100 Hz), M mel bins, C frequency bins, P encoder positions
(50 Hz), A audio tokens, W width of the teacher, D width of the LLM, L taught blocks.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers.audio_utils import mel_filter_bank

HOP, N_FFT, SAMPLE_RATE = 160, 400, 16000


def n_frames(n_samples):
    return -(-n_samples // HOP)


def n_positions(n_samples):
    return -(-n_frames(n_samples) // 2)


def log_mel(
    waveform_NxS: torch.Tensor,
    n_mels: int,
    n_samples_N: torch.Tensor | None,
    normalisation: str = "whisper",
    reflect_end: bool = False,
) -> torch.Tensor:
    """Returns [N, F, M], as `aura_jax.audio.features.log_mel`."""
    frames, half = waveform_NxS.shape[1] // HOP, N_FFT // 2
    if n_samples_N is not None:
        sample_S = torch.arange(waveform_NxS.shape[1])
        waveform_NxS = torch.where(sample_S < n_samples_N[:, None], waveform_NxS, 0.0)
    padded = F.pad(waveform_NxS, (0, half), mode="reflect" if reflect_end else "constant")
    padded = F.pad(padded, (half, 0), mode="reflect")
    window = torch.hann_window(N_FFT)
    with torch.autocast("cpu", enabled=False):  # 16 bits would lose the quiet bins
        spectrum_NxCxF = torch.stft(padded, N_FFT, HOP, window=window, center=False, return_complex=True)
        power_NxFxC = spectrum_NxCxF[..., :frames].abs().square().transpose(1, 2)
        log_NxFxM = (power_NxFxC @ mel_filters(n_mels)).clamp(min=1e-10).log10()
    loudest_NxF = log_NxFxM.amax(-1)
    valid_NxF = None
    if n_samples_N is not None:
        valid_NxF = torch.arange(frames) < n_frames(n_samples_N)[:, None]
        loudest_NxF = torch.where(valid_NxF, loudest_NxF, -torch.inf)
    looks_ahead = normalisation == "whisper"
    maximum_NxF = loudest_NxF.amax(1, keepdim=True) if looks_ahead else loudest_NxF.cummax(1).values
    mel_NxFxM = (torch.maximum(log_NxFxM, maximum_NxF[..., None] - 8.0) + 4.0) / 4.0
    return mel_NxFxM if valid_NxF is None else torch.where(valid_NxF[..., None], mel_NxFxM, 0.0)


_filters: dict[int, torch.Tensor] = {}


def mel_filters(n_mels: int) -> torch.Tensor:
    """Returns Whisper's filters [201, M]."""
    if n_mels not in _filters:
        bank = mel_filter_bank(1 + N_FFT // 2, n_mels, 0.0, 8000.0, SAMPLE_RATE, norm="slaney", mel_scale="slaney")
        _filters[n_mels] = torch.tensor(bank, dtype=torch.float32)
    return _filters[n_mels]


def sinusoids(length: int, width: int) -> torch.Tensor:
    """Returns Whisper's sinusoidal positions [length, width]."""
    rate = np.exp(-np.log(10000.0) / (width // 2 - 1) * np.arange(width // 2))
    angle = np.arange(length)[:, None] * rate
    return torch.tensor(np.concatenate([np.sin(angle), np.cos(angle)], axis=1), dtype=torch.float32)


def stem(conv1: nn.Conv1d, conv2: nn.Conv1d, mel_NxFxM: torch.Tensor, n_frames_N: torch.Tensor | None) -> torch.Tensor:
    """Returns Whisper's convolutions with GELU, [N, P, W]; each clip as if it were cut at its end."""

    def cut(x_NxCxF: torch.Tensor, n_N: torch.Tensor | None) -> torch.Tensor:
        if n_N is None:
            return x_NxCxF
        return torch.where((torch.arange(x_NxCxF.shape[2]) < n_N[:, None])[:, None], x_NxCxF, 0.0)

    n_positions_N = None if n_frames_N is None else (n_frames_N + 1) // 2
    x_NxWxF = cut(F.gelu(conv1(cut(mel_NxFxM.transpose(1, 2), n_frames_N))), n_frames_N)
    return cut(F.gelu(conv2(x_NxWxF)), n_positions_N).transpose(1, 2)


class AudioEmbedder(nn.Module):
    """Log-mel frames to audio tokens of the size of the LLM's own embeddings, as `aura_jax.models.embedder`."""

    def __init__(self, kind: str, n_mels: int, width: int, out_width: int, frames_per_token: int):
        super().__init__()
        self.kind, self.frames_per_token, self.width = kind, frames_per_token, width
        if kind == "stem":
            self.conv1 = nn.Conv1d(n_mels, width, 3, padding=1)
            self.conv2 = nn.Conv1d(width, width, 3, stride=2, padding=1)
            stacked = width * frames_per_token
        else:
            self.patch = nn.Linear(2 * frames_per_token * n_mels, width)
            stacked = width
        self.norm = nn.LayerNorm(stacked, eps=1e-6)
        self.proj = nn.Linear(stacked, out_width)
        self.gain = nn.Parameter(torch.ones(()))
        self.text_rms = nn.Parameter(torch.tensor(0.02), requires_grad=False)

    def forward(self, mel_NxFxM: torch.Tensor, n_frames_N: torch.Tensor) -> torch.Tensor:
        """Returns [N, A, D], float32."""
        if self.kind == "stem":
            x, n_valid_N = stem(self.conv1, self.conv2, mel_NxFxM, n_frames_N), (n_frames_N + 1) // 2
            x = x + sinusoids(x.shape[1], self.width)
            x = torch.where((torch.arange(x.shape[1]) < n_valid_N[:, None])[..., None], x, 0.0)
            x_NxAxW = self._stack(x, self.frames_per_token)
        else:
            x_NxAxW = self.patch(self._stack(mel_NxFxM, 2 * self.frames_per_token))
            x_NxAxW = x_NxAxW + sinusoids(x_NxAxW.shape[1], self.width)
        x_NxAxD = self.proj(self.norm(x_NxAxW)).float()
        return x_NxAxD * (x_NxAxD.square().mean(-1, keepdim=True) + 1e-12).rsqrt() * (self.text_rms * self.gain)

    @staticmethod
    def _stack(x: torch.Tensor, n: int) -> torch.Tensor:
        n_tokens = -(-x.shape[1] // n)
        x = F.pad(x, (0, 0, 0, n_tokens * n - x.shape[1]))
        return x.reshape(x.shape[0], n_tokens, -1)


@torch.no_grad()
def teacher_states(
    encoder: Any,
    waveform_NxS: torch.Tensor,
    n_samples_N: torch.Tensor,
    blocks: Sequence[int],
    frames_per_token: int,
    window: str,
) -> torch.Tensor:
    """Returns the outputs of `blocks` of a transformers.WhisperEncoder, pooled to audio tokens, float32 [N, L, A, W].

    The encoder's own `forward` takes windows of 30 s only, and runs blocks that nobody compares.
    """
    n_mels, whole = encoder.config.num_mel_bins, 2 * HOP * encoder.config.max_source_positions
    waveform_NxS, n_samples_N = waveform_NxS[:, :whole], n_samples_N.clamp(max=whole)
    n_kept, mask = n_positions(waveform_NxS.shape[1]), None
    if window == "30s":
        waveform_NxS = F.pad(waveform_NxS, (0, whole - waveform_NxS.shape[1]))
        mel_NxFxM, n_frames_N = log_mel(waveform_NxS, n_mels, None, reflect_end=True), None
    else:
        mel_NxFxM, n_frames_N = log_mel(waveform_NxS, n_mels, n_samples_N), n_frames(n_samples_N)
    dtype = encoder.conv1.weight.dtype
    x_NxPxW = stem(encoder.conv1, encoder.conv2, mel_NxFxM.to(dtype), n_frames_N)
    x_NxPxW = x_NxPxW + encoder.embed_positions.weight[: x_NxPxW.shape[1]]
    if n_frames_N is not None:
        seen_NxP = torch.arange(x_NxPxW.shape[1]) < n_positions(n_samples_N)[:, None]
        mask = torch.zeros(seen_NxP.shape, dtype=dtype).masked_fill_(~seen_NxP, torch.finfo(dtype).min)
        mask = mask[:, None, None].expand(-1, 1, x_NxPxW.shape[1], -1)
    states = {}
    for i, layer in enumerate(encoder.layers[: max(blocks) + 1]):
        x_NxPxW = layer(x_NxPxW, mask)
        if i in blocks:
            states[i] = pool_frames(x_NxPxW[:, :n_kept].float(), n_positions(n_samples_N), frames_per_token)
    return torch.stack([states[i] for i in blocks], dim=1)


def pool_frames(h_NxPxW: torch.Tensor, n_positions_N: torch.Tensor, frames_per_token: int) -> torch.Tensor:
    """Returns [N, A, W]: the mean of the valid frames that each token covers; 0 without any."""
    n, length, width = h_NxPxW.shape
    n_tokens = -(-length // frames_per_token)
    h_NxPxW = torch.where((torch.arange(length) < n_positions_N[:, None])[..., None], h_NxPxW, 0.0)
    h_NxPxW = F.pad(h_NxPxW, (0, 0, 0, n_tokens * frames_per_token - length))
    sum_NxAxW = h_NxPxW.reshape(n, n_tokens, frames_per_token, width).sum(2)
    count_NxA = (n_positions_N[:, None] - torch.arange(n_tokens) * frames_per_token).clamp(1, frames_per_token)
    return sum_NxAxW / count_NxA[..., None]
