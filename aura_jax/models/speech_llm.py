"""A speech LLM: an audio path whose tokens take their places among the text tokens of a LLM with LoRA.

Dimensions: B rows, T tokens, K clips a row, A audio tokens a clip, F mel frames, M mel bins, D width of the LLM.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from aura_jax.errors import UserError, nearest
from aura_jax.models.attention import MASKS, columns_ahead, key_end
from aura_jax.models.embedder import AudioEmbedder, EmbedderConfig
from aura_jax.models.llm import LLM, Cache, Context, LLMConfig, Tap
from aura_jax.models.lora import LoRAConfig
from aura_jax.sharding import keep_rows


@dataclasses.dataclass(frozen=True)
class SpeechLLMConfig:
    """The architecture. `lora` None: no adapters; `mask` as `attention.key_end`, with `chunk` in tokens for "block"."""

    llm: LLMConfig
    embedder: EmbedderConfig
    lora: LoRAConfig | None
    mask: str = "bidirectional"
    chunk: int = 0

    def __post_init__(self):
        if self.mask not in MASKS:
            raise UserError(f"unknown model.mask {self.mask!r}: {nearest(self.mask, MASKS)}")
        if self.mask == "block" and self.chunk < 1:
            raise UserError(f"model.mask 'block' needs model.chunk of at least 1 audio token, not {self.chunk}")
        if self.mask != "block" and self.chunk:
            raise UserError(f"model.chunk {self.chunk} is for model.mask 'block', not {self.mask!r}: drop one of them")
        if self.lora is not None and not 1 <= self.lora.n_blocks <= self.llm.n_blocks:
            raise UserError(
                f"lora.n_blocks must be 1 to {self.llm.n_blocks}, the LLM's depth, not {self.lora.n_blocks}"
            )


@struct.dataclass
class Columns:
    """Where every token of a batch stands; `data.batch.Batch` explains the fields of the same names."""

    tokens_BxT: jax.Array
    position_BxT: jax.Array
    segment_BxT: jax.Array
    span_start_BxT: jax.Array
    span_end_BxT: jax.Array
    audio_source_BxT: jax.Array
    audio_position_BxKxA: jax.Array
    request_audio_BxT: jax.Array

    @classmethod
    def of(cls, batch: Any) -> "Columns":
        """Returns the part of a batch that a model reads."""
        return cls(**{field.name: getattr(batch, field.name) for field in dataclasses.fields(cls)})


class SpeechLLM(nn.Module):
    """The audio embedder and the LLM. `tap`, `remat` and `matmul_dtype` as `LLM`."""

    config: SpeechLLMConfig
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    attention_impl: str = "xla"
    remat: str = "none"
    tap: Tap | None = None
    matmul_dtype: jnp.dtype | None = None

    def setup(self):
        self.embedder = AudioEmbedder(self.config.embedder, self.dtype)
        self.llm = LLM(
            self.config.llm,
            self.config.lora,
            self.dtype,
            self.param_dtype,
            self.attention_impl,
            self.remat,
            self.tap,
            self.matmul_dtype,
        )

    def embed_audio(self, mel_BxKxFxM: jax.Array, n_frames_BxK: jax.Array) -> jax.Array:
        """Returns the audio tokens [B, K, A, D] of the clips of each row."""
        B, K = n_frames_BxK.shape
        audio_NxAxD = self.embedder(mel_BxKxFxM.reshape(B * K, *mel_BxKxFxM.shape[2:]), n_frames_BxK.reshape(-1))
        return audio_NxAxD.reshape(B, K, *audio_NxAxD.shape[1:])

    def embed(self, columns: Columns, mel_BxKxFxM: jax.Array, n_frames_BxK: jax.Array) -> jax.Array:
        """Returns the LLM's input [B, T, D]: embeddings of the text tokens, audio tokens at the audio columns."""
        audio_BxKxAxD = self.embed_audio(mel_BxKxFxM, n_frames_BxK)
        audio_BxQxD = audio_BxKxAxD.reshape(audio_BxKxAxD.shape[0], -1, audio_BxKxAxD.shape[-1])
        source_BxTx1 = columns.audio_source_BxT[:, :, None]
        audio_BxTxD = jnp.take_along_axis(audio_BxQxD, jnp.maximum(source_BxTx1, 0), axis=1)
        return keep_rows(jnp.where(source_BxTx1 >= 0, audio_BxTxD, self.llm.embed(columns.tokens_BxT)))

    def embed_text(self, tokens_BxT: jax.Array) -> jax.Array:
        """Returns the embeddings [B, T, D] of plain text."""
        return self.llm.embed(tokens_BxT)

    def context(self, columns: Columns) -> Context:
        """Returns what the blocks need to know of the columns: the mask, and where LoRA acts."""
        lora, mask, chunk = self.config.lora, self.config.mask, self.config.chunk
        lora_mask_BxT = None
        if lora is not None and lora.scope == "request":
            lora_mask_BxT = columns.request_audio_BxT
        elif lora is not None and lora.scope == "audio":
            lora_mask_BxT = columns.audio_source_BxT >= 0
        return Context(
            position_BxT=columns.position_BxT,
            k_end_BxT=key_end(columns.span_start_BxT, columns.span_end_BxT, mask, chunk),
            q_segment_BxT=columns.segment_BxT,
            k_segment_BxS=columns.segment_BxT,
            lora_mask_BxT=lora_mask_BxT,
            tap_position_BxQ=columns.audio_position_BxKxA.reshape(columns.tokens_BxT.shape[0], -1),
            ahead=columns_ahead(mask, chunk, columns.audio_position_BxKxA.shape[2]),
        )

    def adapted_blocks(
        self, x_BxTxD: jax.Array, ctx: Context, cache: Cache | None = None, tap_args: Any = None
    ) -> tuple[jax.Array, Cache | None, Any]:
        """As `LLM.adapted_blocks`."""
        return self.llm.adapted_blocks(x_BxTxD, ctx, cache, tap_args)

    def plain_blocks(
        self, x_BxTxD: jax.Array, ctx: Context, cache: Cache | None = None
    ) -> tuple[jax.Array, Cache | None]:
        """As `LLM.plain_blocks`."""
        return self.llm.plain_blocks(x_BxTxD, ctx, cache)

    def logits(self, h: jax.Array) -> jax.Array:
        """As `LLM.logits`."""
        return self.llm.logits(h)

    def __call__(
        self, columns: Columns, mel_BxKxFxM: jax.Array, n_frames_BxK: jax.Array, tap_args: Any = None
    ) -> tuple[jax.Array, Any]:
        """Returns normed hidden states [B, T, D] of a whole batch and the tap's outputs; `logits` takes the former."""
        x_BxTxD = self.embed(columns, mel_BxKxFxM, n_frames_BxK)
        h_BxTxD, _, taps = self.llm(x_BxTxD, self.context(columns), None, tap_args)
        return h_BxTxD, taps


def text_context(position_BxT: jax.Array, segment_BxT: jax.Array) -> Context:
    """Returns the context of plain text: causal within each segment, the LoRA delta (if there is one) everywhere."""
    k_end_BxT = jnp.broadcast_to(jnp.arange(1, segment_BxT.shape[1] + 1), segment_BxT.shape)
    return Context(position_BxT, k_end_BxT, segment_BxT, segment_BxT, ahead=0)
