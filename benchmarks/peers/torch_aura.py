"""The AuRA objectives in torch, transformers and PEFT, as their competent user would write them.

It reads the same resolved configuration, batches and Hugging Face directories as aura_jax, and imports nothing of it:
the peer that tests compare with and benchmarks time. Without augmentation, null-space projection and PLoRA.

Dimensions: B rows, T tokens, K clips a row, A audio tokens a clip, Q = K * A, R targets, D width of the LLM, E of the
teacher, P pairs of blocks, M rows of L tokens of plain text.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import torch_audio
import transformers
from torch import nn
from torch.nn import functional as F

Batch = Mapping[str, torch.Tensor]  # by the field names of aura_jax.data.batch.Batch, without those that are None


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a run is, but for its weights.

    Attributes:
      config: a whole configuration of aura_jax, as its `config.json` says it.
      pairs: (student block, teacher block) that distillation compares.
      frames_per_token: 50 Hz frames that one audio token covers.
    """

    config: Mapping[str, Any]
    llm_dir: Path
    teacher_dir: Path
    pairs: Sequence[tuple[int, int]]
    frames_per_token: int

    def __post_init__(self):
        augment = self.config["data"]["augment"]
        if augment["freq_masks"] or augment["time_masks"] or augment["noise_probability"] or any(augment["gain_db"]):
            raise ValueError("the peer does not augment: turn data.augment off")
        if self.config["lora"]["text_energy"] < 1 or self.config["lora"]["scope"] == "audio":
            raise ValueError("the peer has neither null space nor PLoRA: lora.text_energy 1, lora.scope all or request")


class Heads(nn.Module):
    """The distillation heads: a normalisation and a projection for each pair, or one for all."""

    def __init__(self, n: int, width: int, out_width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.ones(n, width))
        self.kernel = nn.Parameter(torch.zeros(n, width, out_width))

    def forward(self, h_BxQxD: torch.Tensor, i: int) -> torch.Tensor:
        normed = F.rms_norm(h_BxQxD.float(), h_BxQxD.shape[-1:], self.scale[i], self.eps)
        return normed @ self.kernel[i]


class AuRA(nn.Module):
    """A decoder with LoRA on its first blocks, the audio embedder, the heads, and the teacher if a step runs it.

    Args:
      dtype: of the frozen weights; what is trained is float32.
    """

    def __init__(self, setting: Setting, dtype: torch.dtype = torch.float32):
        super().__init__()
        c = setting.config
        self.setting, self.n_adapted = setting, c["lora"]["n_blocks"]
        llm = transformers.AutoModelForCausalLM.from_pretrained(
            setting.llm_dir, dtype=dtype, attn_implementation="sdpa"
        )
        lora = peft.LoraConfig(
            r=c["lora"]["rank"],
            lora_alpha=c["lora"]["alpha"],
            use_rslora=c["lora"]["rslora"],
            target_modules=[f"{name}_proj" for name in c["lora"]["targets"]],
            layers_to_transform=list(range(self.n_adapted)),
            layers_pattern="layers",
        )
        self.llm = peft.get_peft_model(llm, lora)
        causal: Any = self.llm.get_base_model()
        self.decoder, self.lm_head = causal.model, causal.lm_head
        whisper = transformers.WhisperConfig.from_pretrained(setting.teacher_dir)
        width = self.decoder.config.hidden_size
        self.embedder = torch_audio.AudioEmbedder(
            c["embedder"]["kind"], whisper.num_mel_bins, whisper.d_model, width, setting.frames_per_token
        )
        n_heads = len(setting.pairs) if c["distill"]["head"] == "own" else 1
        self.heads = Heads(n_heads, width, whisper.d_model, self.decoder.config.rms_norm_eps)
        self.n_mels, self.teacher = whisper.num_mel_bins, None
        if not c["teacher"]["precompute"]:
            encoder = transformers.WhisperModel.from_pretrained(setting.teacher_dir, dtype=dtype).encoder
            self.teacher = encoder.eval().requires_grad_(False)

    def forward(
        self, batch: Batch, active: Collection[str], statistics: Mapping[str, torch.Tensor] | None
    ) -> tuple[dict[str, torch.Tensor], dict[int, torch.Tensor]]:
        """Returns the mean of each active objective, and of distillation by student block.

        Without an objective that reads the LLM's output, only the adapted blocks run.
        """
        losses, by_block = {}, {}
        if "lm" in active or "distill" in active:
            losses, by_block = self._speech(batch, active, statistics)
        if "text_anchor" in active or "text_kd" in active:
            losses |= self._text(batch, active)
        return losses, by_block

    def _speech(self, batch, active, statistics):
        heard_BxT = batch["request_audio_BxT"] | (batch["segment_BxT"] == 0)
        if self.setting.config["lora"]["scope"] == "request" and not heard_BxT.all():
            raise ValueError("a text-only request among speech: PEFT cannot leave LoRA out of it (lora.scope request)")
        x_BxTxD = self._embed(batch)
        q_end_BxT = key_end(batch, self.setting.config["model"]["mask"], self.setting.config["model"]["chunk"])
        mask = additive_mask(q_end_BxT, batch["segment_BxT"], x_BxTxD.dtype)
        taught = [student for student, _ in self.setting.pairs] if "distill" in active else []
        h_BxTxD, states = self._blocks(x_BxTxD, mask, batch["position_BxT"], 0, self.n_adapted, taught)
        losses, by_block = {}, {}
        if "distill" in active:
            losses["distill"], by_block = self._distill(batch, states, statistics)
        if "lm" in active:
            h_BxTxD, _ = self._blocks(h_BxTxD, mask, batch["position_BxT"], self.n_adapted, None)
            h_BxRxD = gather(h_BxTxD, batch["target_position_BxR"])
            logits_BxRxV = self._logits(h_BxRxD)
            nll_BR = F.cross_entropy(logits_BxRxV.flatten(0, 1), batch["target_id_BxR"].flatten(), reduction="none")
            weight_BR = batch["target_weight_BxR"].flatten()
            losses["lm"] = (nll_BR * weight_BR).sum() / weight_BR.sum().clamp(min=1)
        return losses, by_block

    def _embed(self, batch: Batch) -> torch.Tensor:
        """Returns `inputs_embeds`: text, with audio tokens at the audio columns."""
        B, K, S = batch["waveform_BxKxS"].shape
        n_samples_N = batch["n_samples_BxK"].reshape(B * K)
        mel_NxFxM = torch_audio.log_mel(
            batch["waveform_BxKxS"].reshape(B * K, S),
            self.n_mels,
            n_samples_N,
            self.setting.config["model"]["normalisation"],
        )
        text_BxTxD = self.decoder.embed_tokens(batch["tokens_BxT"])
        audio_NxAxD = self.embedder(mel_NxFxM, torch_audio.n_frames(n_samples_N)).to(text_BxTxD.dtype)
        source_BxT = batch["audio_source_BxT"]
        audio_BxTxD = gather(audio_NxAxD.reshape(B, -1, audio_NxAxD.shape[-1]), source_BxT.clamp(min=0))
        return torch.where((source_BxT >= 0)[..., None], audio_BxTxD, text_BxTxD)

    def _blocks(self, h, mask, position, first: int, end: int | None, keep: Collection[int] = ()):
        """Runs blocks `first` to `end`; returns the last output, and those of the blocks in `keep`.

        The decoder's own `forward` would run all of them, and normalise.
        """
        rotary, states = self.decoder.rotary_emb(h, position_ids=position), {}
        for i, layer in list(enumerate(self.decoder.layers))[first:end]:
            h = layer(h, attention_mask=mask, position_ids=position, position_embeddings=rotary, use_cache=False)
            if i in keep:
                states[i] = h
        return h, states

    def _logits(self, h: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.decoder.norm(h)).float()

    def _distill(self, batch, states, statistics):
        c = self.setting.config["distill"]
        target_PxBxQxE = self._targets(batch, statistics)
        n_tokens_BxK = -(-torch_audio.n_positions(batch["n_samples_BxK"]) // self.setting.frames_per_token)
        A = batch["audio_position_BxKxA"].shape[2]
        mask_BxQ = (torch.arange(A) < n_tokens_BxK[..., None]).flatten(1)
        position_BxQ = batch["audio_position_BxKxA"].flatten(1)
        by_block = {}
        for pair, (student, _) in enumerate(self.setting.pairs):
            head = pair if c["head"] == "own" else 0
            predicted_BxQxE = self.heads(gather(states[student], position_BxQ), head).float()
            value_BxQ = distance(predicted_BxQxE, target_PxBxQxE[pair], c["loss"])
            by_block[student] = torch.where(mask_BxQ, value_BxQ, 0.0).sum() / mask_BxQ.sum().clamp(min=1)
        return torch.stack(list(by_block.values())).mean(), by_block

    def _targets(self, batch: Batch, statistics: Mapping[str, torch.Tensor] | None) -> torch.Tensor:
        """Returns the teacher's states [P, B, Q, E], normalised."""
        c = self.setting.config
        B, K, S = batch["waveform_BxKxS"].shape
        if "teacher_BxKxPxAxE" in batch:
            states_NxPxAxE = batch["teacher_BxKxPxAxE"].float().flatten(0, 1)
        else:
            states_NxPxAxE = torch_audio.teacher_states(
                self.teacher,
                batch["waveform_BxKxS"].reshape(B * K, S),
                batch["n_samples_BxK"].reshape(B * K),
                [block for _, block in self.setting.pairs],
                self.setting.frames_per_token,
                c["teacher"]["window"],
            )
        if c["distill"]["target_norm"] == "standardise":
            assert statistics is not None
            states_NxPxAxE = (states_NxPxAxE - statistics["mean"][:, None]) / statistics["std"][:, None]
        elif c["distill"]["target_norm"] == "layernorm":
            states_NxPxAxE = F.layer_norm(states_NxPxAxE, states_NxPxAxE.shape[-1:], eps=1e-6)
        _, P, A, E = states_NxPxAxE.shape
        return states_NxPxAxE.reshape(B, K, P, A, E).permute(2, 0, 1, 3, 4).reshape(P, B, K * A, E)

    def _text(self, batch: Batch, active: Collection[str]) -> dict[str, torch.Tensor]:
        segment_MxL = batch["text_segment_MxL"]
        real_MxL = segment_MxL != 0
        column_L = torch.arange(segment_MxL.shape[1])
        first_MxL = torch.ones_like(real_MxL)
        first_MxL[:, 1:] = segment_MxL[:, 1:] != segment_MxL[:, :-1]
        position_MxL = column_L - torch.where(first_MxL, column_L, 0).cummax(1).values
        x_MxLxD = self.decoder.embed_tokens(batch["text_tokens_MxL"])
        mask = additive_mask((column_L + 1).expand_as(segment_MxL), segment_MxL, x_MxLxD.dtype)
        h_MxLxD, _ = self._blocks(x_MxLxD, mask, position_MxL, 0, self.n_adapted)
        with torch.no_grad(), self.llm.disable_adapter():
            base_MxLxD, _ = self._blocks(x_MxLxD, mask, position_MxL, 0, self.n_adapted)
        losses = {}
        if "text_anchor" in active:
            error_ML = (h_MxLxD - base_MxLxD).float()[real_MxL].square().sum(-1)
            losses["text_anchor"] = (error_ML / (base_MxLxD.float()[real_MxL].square().sum(-1) + 1e-6)).mean()
        if "text_kd" in active:
            h_MxLxD, _ = self._blocks(h_MxLxD, mask, position_MxL, self.n_adapted, None)
            with torch.no_grad():
                base_MxLxD, _ = self._blocks(base_MxLxD, mask, position_MxL, self.n_adapted, None)
                base = self._logits(base_MxLxD[real_MxL]).log_softmax(-1)
            student = self._logits(h_MxLxD[real_MxL]).log_softmax(-1)
            losses["text_kd"] = F.kl_div(student, base, reduction="batchmean", log_target=True)
        return losses


def gather(h_BxTxD: torch.Tensor, position_BxQ: torch.Tensor) -> torch.Tensor:
    """Returns [B, Q, D]: the columns at `position`."""
    return h_BxTxD.gather(1, position_BxQ[..., None].expand(-1, -1, h_BxTxD.shape[-1]))


def key_end(batch: Batch, mask: str, chunk: int) -> torch.Tensor:
    """Returns the exclusive end of the columns that each query sees [B, T], as `aura_jax.models.attention.key_end`."""
    start_BxT, end_BxT = batch["span_start_BxT"], batch["span_end_BxT"]
    column_T = torch.arange(start_BxT.shape[1])
    if mask == "causal":
        return (column_T + 1).expand_as(end_BxT)
    if mask == "bidirectional":
        return end_BxT
    return torch.minimum(start_BxT + ((column_T - start_BxT) // chunk + 1) * chunk, end_BxT)


def additive_mask(key_end_BxT: torch.Tensor, segment_BxT: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns the 4-D mask [B, 1, T, T] for sdpa: 0 where a query sees a key, otherwise the lowest number."""
    in_reach = torch.arange(segment_BxT.shape[1]) < key_end_BxT[..., None]
    same = (segment_BxT[:, :, None] == segment_BxT[:, None]) & (segment_BxT != 0)[:, :, None]
    mask = torch.zeros(in_reach.shape, dtype=dtype)
    return mask.masked_fill_(~(in_reach & same), torch.finfo(dtype).min)[:, None]


def distance(student: torch.Tensor, target: torch.Tensor, kind: str) -> torch.Tensor:
    """Returns the distillation loss of each token, [..., E] to [...]."""
    if kind == "cosine":
        norms = student.square().sum(-1) * target.square().sum(-1)
        return 1 - (student * target).sum(-1) * (norms + 1e-12).rsqrt()
    if kind == "mse":
        return (student - target).square().mean(-1)
    if kind == "nmse":
        return (student - target).square().sum(-1) / (target.square().sum(-1) + 1e-6)
    return F.smooth_l1_loss(student, target, reduction="none").mean(-1)
