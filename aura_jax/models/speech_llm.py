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
from aura_jax.models.adapters import ADAPTERS
from aura_jax.models.attention import MASKS, columns_ahead, key_end
from aura_jax.models.cformer import CFormer
from aura_jax.models.embedder import OF_STATES, AudioEmbedder, EmbedderConfig
from aura_jax.models.llm import LLM, Cache, Context, LLMConfig, Tap
from aura_jax.models.lora import LoRAConfig, float_dtype
from aura_jax.models.whisper import WhisperConfig, WhisperEncoder
from aura_jax.sharding import keep_rows


@dataclasses.dataclass(frozen=True)
class SpeechLLMConfig:
    """The architecture.

    Attributes:
      lora: None for no adapters.
      mask, chunk: as `attention.key_end`, with `chunk` in tokens for "block".
      encoder: of an embedder that reads states; None for one that reads log-mel frames.
    """

    llm: LLMConfig
    embedder: EmbedderConfig
    lora: LoRAConfig | None
    mask: str = "causal"
    chunk: int = 0
    encoder: WhisperConfig | None = None

    def __post_init__(self):
        kind = self.embedder.kind
        if (self.encoder is None) == (kind in OF_STATES):
            needs = "needs a Whisper in model.encoder" if kind in OF_STATES else "keeps no encoder: empty model.encoder"
            raise UserError(f"embedder.kind {kind!r} {needs}")
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


@struct.dataclass
class Heard:
    """What a model makes of a batch.

    Attributes:
      x_BxTxD: the LLM's input: embeddings of the text tokens, audio tokens at the audio columns.
      columns: as given, but for audio columns that the embedder found it does not need.
      n_tokens_BxK: float32, the tokens that an embedder would have given each clip; None if their rate is fixed.
    """

    x_BxTxD: jax.Array
    columns: Columns
    n_tokens_BxK: jax.Array | None


class SpeechLLM(nn.Module):
    """The encoder, if one is kept, the audio embedder and the LLM. `tap`, `remat`, `matmul_dtype`, `apart` as `LLM`."""

    config: SpeechLLMConfig
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    attention_impl: str = "xla"
    remat: str = "none"
    tap: Tap | None = None
    matmul_dtype: jnp.dtype | None = None
    apart: bool = False

    def setup(self):
        c = self.config
        if c.encoder is not None:
            floats = float_dtype(self.param_dtype, self.dtype)
            self.encoder = WhisperEncoder(c.encoder, self.dtype, floats, self.attention_impl)
        if c.embedder.kind == "cformer":
            assert c.encoder is not None
            self.embedder = CFormer(c.embedder, c.encoder, self.dtype)
        else:
            self.embedder = ADAPTERS.get(c.embedder.kind, AudioEmbedder)(c.embedder, self.dtype)
        self.llm = LLM(
            self.config.llm,
            self.config.lora,
            self.dtype,
            self.param_dtype,
            self.attention_impl,
            self.remat,
            self.tap,
            self.matmul_dtype,
            self.apart,
        )

    def embed_audio(
        self, mel_BxKxFxM: jax.Array, n_frames_BxK: jax.Array, n_slots: int, n_tokens_BxK: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
        """Returns the audio tokens [B, K, A, D] of the clips of each row.

        Args:
          n_slots, n_tokens_BxK: as `CFormer`, and read by it alone; its other results follow, else None.
        """
        B, K = n_frames_BxK.shape
        x_NxFxM, n_valid_N = mel_BxKxFxM.reshape(B * K, *mel_BxKxFxM.shape[2:]), n_frames_BxK.reshape(-1)
        if self.config.encoder is not None:
            x_NxFxM, _ = self.encoder(x_NxFxM, n_valid_N)
            n_valid_N = (n_valid_N + 1) // 2
        if isinstance(self.embedder, CFormer):
            n_tokens_N = None if n_tokens_BxK is None else n_tokens_BxK.reshape(-1)
            audio_NxAxD, n_N, total_N = self.embedder(x_NxFxM, n_valid_N, n_slots, n_tokens_N)
            return audio_NxAxD.reshape(B, K, *audio_NxAxD.shape[1:]), n_N.reshape(B, K), total_N.reshape(B, K)
        audio_NxAxD = self.embedder(x_NxFxM, n_valid_N)
        return audio_NxAxD.reshape(B, K, *audio_NxAxD.shape[1:]), None, None

    def embed_piece(self, mel_NxFxM: jax.Array, n_frames_N: jax.Array, first: jax.Array, n_most: int) -> jax.Array:
        """Returns the audio tokens [N, A, D] of pieces of clips; arguments as of `AudioEmbedder`."""
        assert isinstance(self.embedder, AudioEmbedder)
        return self.embedder(mel_NxFxM, n_frames_N, first, n_most)

    def hear(
        self, columns: Columns, mel_BxKxFxM: jax.Array, n_frames_BxK: jax.Array, spans_are_known: bool = True
    ) -> Heard:
        """Returns the LLM's input.

        Args:
          spans_are_known: the columns have as many audio tokens as they should. False, for answering: as many as there
            may be; an embedder that decides how many there are then leaves the others out. A row has one segment.
        """
        n_slots = columns.audio_position_BxKxA.shape[2]
        n_spans_BxK = audio_tokens(columns) if spans_are_known else None
        audio_BxKxAxD, n_BxK, total_BxK = self.embed_audio(mel_BxKxFxM, n_frames_BxK, n_slots, n_spans_BxK)
        if n_BxK is not None and not spans_are_known:
            columns = _without_unused(columns, n_BxK)
        audio_BxQxD = audio_BxKxAxD.reshape(audio_BxKxAxD.shape[0], -1, audio_BxKxAxD.shape[-1])
        source_BxTx1 = columns.audio_source_BxT[:, :, None]
        audio_BxTxD = jnp.take_along_axis(audio_BxQxD, jnp.maximum(source_BxTx1, 0), axis=1)
        x_BxTxD = keep_rows(jnp.where(source_BxTx1 >= 0, audio_BxTxD, self.llm.embed(columns.tokens_BxT)))
        return Heard(x_BxTxD, columns, total_BxK)

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
        x_BxTxD = self.hear(columns, mel_BxKxFxM, n_frames_BxK).x_BxTxD
        h_BxTxD, _, taps = self.llm(x_BxTxD, self.context(columns), None, tap_args)
        return h_BxTxD, taps


def audio_tokens(columns: Columns) -> jax.Array:
    """Returns how many columns the audio of each clip has, int32 [B, K]."""
    _, K, A = columns.audio_position_BxKxA.shape
    clip_BxT = jnp.where(columns.audio_source_BxT >= 0, columns.audio_source_BxT // max(A, 1), -1)
    return (clip_BxT[:, None] == jnp.arange(K)[:, None]).sum(-1)


def _without_unused(columns: Columns, n_BxK: jax.Array) -> Columns:
    """Returns columns in which each clip's audio columns from its n-th on are padding."""
    source_BxT, A = columns.audio_source_BxT, columns.audio_position_BxKxA.shape[2]
    n_BxT = jnp.take_along_axis(n_BxK, jnp.maximum(source_BxT, 0) // A, axis=1)
    unused_BxT = (source_BxT >= 0) & (source_BxT % A >= n_BxT)
    return dataclasses.replace(
        columns,
        position_BxT=columns.position_BxT - jnp.cumsum(unused_BxT, axis=1),
        segment_BxT=jnp.where(unused_BxT, 0, columns.segment_BxT),
    )


def text_context(position_BxT: jax.Array, segment_BxT: jax.Array) -> Context:
    """Returns the context of plain text: causal within each segment, the LoRA delta (if there is one) everywhere."""
    k_end_BxT = jnp.broadcast_to(jnp.arange(1, segment_BxT.shape[1] + 1), segment_BxT.shape)
    return Context(position_BxT, k_end_BxT, segment_BxT, segment_BxT, ahead=0)
