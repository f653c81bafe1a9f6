"""Whisper (arXiv 2212.04356): encoder, the teacher of distillation, and decoder, the cascade's transcriber.

All blocks' weights are stacked on axis 0 by `nn.scan`.
Dimensions: B rows, F mel frames (100 Hz), M mel bins, P encoder positions (50 Hz, P = ceil(F / 2)), D width, H heads,
K width of a head, L blocks, T tokens, S cached tokens, V vocabulary.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from aura_jax.errors import UserError
from aura_jax.models.attention import attention
from aura_jax.sharding import keep_rows

# tap(h_BxPxD) -> pytree, stacked over blocks by the scan.
Tap = Callable[[jax.Array], Any]

_NORM_EPS = 1e-5
_SAME_FOR_ALL: Any = nn.broadcast  # flax types in_axes as int


@dataclasses.dataclass(frozen=True)
class WhisperConfig:
    """Shape of a Whisper, tiny to large-v3-turbo; `from_hf` reads a Hugging Face config.json.

    Attributes:
      n_mels: mel bins, 80, or 128 for large-v3.
      n_positions: encoder positions of the full window: 1500 for 30 s.
      n_target_positions: the most tokens that the decoder can hold, prompt included.
    """

    n_mels: int
    width: int
    encoder_blocks: int
    encoder_heads: int
    encoder_mlp_width: int
    decoder_blocks: int
    decoder_heads: int
    decoder_mlp_width: int
    vocab: int
    n_positions: int = 1500
    n_target_positions: int = 448

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "WhisperConfig":
        """Reads the dictionary of a config.json.

        Raises:
          UserError: for another model, or a variant whose result would differ silently.
        """
        if hf.get("model_type") != "whisper":
            raise UserError(
                f"model_type {hf.get('model_type')!r} is not a Whisper: name a Whisper model as the teacher"
            )
        for key, expected in (
            ("activation_function", "gelu"),
            ("scale_embedding", False),
            ("tie_word_embeddings", True),
        ):
            if hf.get(key, expected) != expected:
                raise UserError(f"Whisper with {key}={hf[key]!r} is not supported: {expected!r} only")
        return cls(
            n_mels=hf["num_mel_bins"],
            width=hf["d_model"],
            encoder_blocks=hf["encoder_layers"],
            encoder_heads=hf["encoder_attention_heads"],
            encoder_mlp_width=hf["encoder_ffn_dim"],
            decoder_blocks=hf["decoder_layers"],
            decoder_heads=hf["decoder_attention_heads"],
            decoder_mlp_width=hf["decoder_ffn_dim"],
            vocab=hf["vocab_size"],
            n_positions=hf.get("max_source_positions", 1500),
            n_target_positions=hf.get("max_target_positions", 448),
        )


class ConvStem(nn.Module):
    """Whisper's two convolutions with GELU: mel frames at 100 Hz to positions at 50 Hz. Params: `conv1`, `conv2`."""

    width: int
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, mel_BxFxM: jax.Array, n_frames_B: jax.Array | None = None) -> jax.Array:
        """Returns [B, ceil(F / 2), D].

        Args:
          n_frames_B: valid mel frames of each row: the result equals that of the row cut there, and is 0 beyond.
            None: all F frames are valid, padding included.
        """
        conv = lambda stride, name: nn.Conv(
            self.width, (3,), stride, padding=((1, 1),), dtype=self.dtype, param_dtype=self.param_dtype, name=name
        )
        # Zeros beyond the end at every stage are what the convolutions' own padding supplies to a cut clip.
        x_BxFxM = _zero_after(mel_BxFxM.astype(self.dtype), n_frames_B)
        x_BxFxD = keep_rows(_zero_after(nn.gelu(conv(1, "conv1")(x_BxFxM), approximate=False), n_frames_B))
        n_positions_B = None if n_frames_B is None else (n_frames_B + 1) // 2
        return keep_rows(_zero_after(nn.gelu(conv(2, "conv2")(x_BxFxD), approximate=False), n_positions_B))


class _Attention(nn.Module):
    """Multi-head attention with Whisper's biases (none for keys); `heads` projects, `__call__` attends."""

    width: int
    n_heads: int
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    impl: str

    def setup(self):
        dense = lambda use_bias: _dense(self, self.width, use_bias)
        self.q, self.k, self.v, self.o = dense(True), dense(False), dense(True), dense(True)

    def keys_values(self, x_BxSxD: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self._split(self.k(x_BxSxD)), self._split(self.v(x_BxSxD))

    def __call__(
        self,
        x_BxTxD: jax.Array,
        k_BxSxHxK: jax.Array,
        v_BxSxHxK: jax.Array,
        k_end_BxT: jax.Array,
        q_segment_BxT: jax.Array,
    ) -> jax.Array:
        k_segment_BxS = jnp.ones(k_BxSxHxK.shape[:2], jnp.int32)  # k_end alone hides what must not be seen
        out_BxTxHxK = attention(
            self._split(self.q(x_BxTxD)), k_BxSxHxK, v_BxSxHxK, k_end_BxT, q_segment_BxT, k_segment_BxS, self.impl
        )
        return self.o(out_BxTxHxK.reshape(x_BxTxD.shape))

    def _split(self, x_BxTxD: jax.Array) -> jax.Array:
        return x_BxTxD.reshape(*x_BxTxD.shape[:2], self.n_heads, self.width // self.n_heads)


class _MLP(nn.Module):
    width: int
    mlp_width: int
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    def setup(self):
        self.fc1, self.fc2 = _dense(self, self.mlp_width), _dense(self, self.width)

    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        return self.fc2(nn.gelu(self.fc1(x_BxTxD), approximate=False))


class EncoderBlock(nn.Module):
    """One encoder block in the form that `nn.scan` takes; its second output is the tap's."""

    config: WhisperConfig
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    impl: str
    tap: Tap | None

    def setup(self):
        c, kinds = self.config, (self.dtype, self.param_dtype)
        self.attn_norm, self.mlp_norm = _norm(self), _norm(self)
        self.attn = _Attention(c.width, c.encoder_heads, *kinds, self.impl)
        self.mlp = _MLP(c.width, c.encoder_mlp_width, *kinds)

    def __call__(self, x_BxPxD: jax.Array, k_end_BxP: jax.Array, q_segment_BxP: jax.Array) -> tuple[jax.Array, Any]:
        x_BxPxD = keep_rows(x_BxPxD)
        y_BxPxD = self.attn_norm(x_BxPxD)
        x_BxPxD = x_BxPxD + self.attn(y_BxPxD, *self.attn.keys_values(y_BxPxD), k_end_BxP, q_segment_BxP)
        x_BxPxD = keep_rows(x_BxPxD + self.mlp(self.mlp_norm(x_BxPxD)))
        return x_BxPxD, None if self.tap is None else self.tap(x_BxPxD)


class WhisperEncoder(nn.Module):
    """The encoder: log-mel frames to states at 50 Hz.

    Attributes:
      tap: called with each block's output [B, P, D] (before the final norm); what it returns is stacked over blocks.
        The identity captures the states; a pooling function keeps only what a loss compares.
      dtype, param_dtype: of the computation, and of the stored weights.
      attention_impl: see `models.attention.attention`.
    """

    config: WhisperConfig
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    attention_impl: str = "xla"
    tap: Tap | None = None

    @nn.compact
    def __call__(self, mel_BxFxM: jax.Array, n_frames_B: jax.Array | None = None) -> tuple[jax.Array, Any]:
        """Returns the states after the final norm [B, P, D] with P = ceil(F / 2), and the tap's outputs or None.

        Args:
          mel_BxFxM: log-mel frames, F at most 2 * n_positions.
          n_frames_B: valid mel frames of each row. The states then equal those of the row cut there, whatever F is,
            and are 0 beyond (a tap sees values without meaning there). None: the whole window counts, padding
            included, which is how Whisper was trained (30 s).

        Raises:
          UserError: if there are more frames than positions.
        """
        c = self.config
        B, F, _ = mel_BxFxM.shape
        P = (F + 1) // 2
        if c.n_positions < P:
            raise UserError(f"{F} mel frames are more than this Whisper's window of {2 * c.n_positions}: cut the clip")
        stem = ConvStem(c.width, self.dtype, self.param_dtype)
        nn.share_scope(self, stem)  # conv1 and conv2 lie beside the blocks in the parameter tree
        positions = self.param("positions", nn.initializers.normal(0.02), (c.n_positions, c.width), self.param_dtype)
        x_BxPxD = stem(mel_BxFxM, n_frames_B) + positions[:P].astype(self.dtype)

        n_positions_B = jnp.full((B,), P, jnp.int32) if n_frames_B is None else (n_frames_B + 1) // 2
        k_end_BxP = jnp.broadcast_to(n_positions_B[:, None], (B, P))
        q_segment_BxP = (jnp.arange(P) < n_positions_B[:, None]).astype(jnp.int32)
        blocks = nn.scan(
            EncoderBlock,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=_SAME_FOR_ALL,
            length=c.encoder_blocks,
        )(c, self.dtype, self.param_dtype, self.attention_impl, self.tap, name="blocks")
        x_BxPxD, taps = blocks(x_BxPxD, k_end_BxP, q_segment_BxP)
        x_BxPxD = _norm(self, name="final_norm")(x_BxPxD)
        return _zero_after(x_BxPxD, None if n_frames_B is None else n_positions_B), taps


@struct.dataclass
class CrossKV:
    """Keys and values of the encoder's states for all decoder blocks, computed once per clip, and valid states."""

    k_LxBxPxHxK: jax.Array
    v_LxBxPxHxK: jax.Array
    n_states_B: jax.Array


@struct.dataclass
class DecoderCache:
    """Keys and values of the tokens so far, of all blocks: a carry of the scan over blocks and of the decoding loop."""

    k_LxBxSxHxK: jax.Array
    v_LxBxSxHxK: jax.Array

    @classmethod
    def zeros(cls, config: WhisperConfig, n_rows: int, length: int, dtype: jnp.dtype = jnp.float32) -> "DecoderCache":
        """Returns an empty cache for `length` tokens, prompt included.

        Raises:
          UserError: if the decoder has fewer positions.
        """
        if length > config.n_target_positions:
            raise UserError(f"{length} tokens are more than this Whisper decodes ({config.n_target_positions})")
        head_width = config.width // config.decoder_heads
        shape = (config.decoder_blocks, n_rows, length, config.decoder_heads, head_width)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


class DecoderBlock(nn.Module):
    """One decoder block in the form that `nn.scan` takes, with two entrances: the cross keys, and the block."""

    config: WhisperConfig
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    impl: str

    def setup(self):
        c, kinds = self.config, (self.dtype, self.param_dtype)
        self.self_norm, self.cross_norm, self.mlp_norm = _norm(self), _norm(self), _norm(self)
        self.self_attn = _Attention(c.width, c.decoder_heads, *kinds, self.impl)
        self.cross_attn = _Attention(c.width, c.decoder_heads, *kinds, self.impl)
        self.mlp = _MLP(c.width, c.decoder_mlp_width, *kinds)

    def cross_kv(self, states_BxPxD: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        return states_BxPxD, self.cross_attn.keys_values(states_BxPxD)

    def __call__(
        self, carry: tuple[jax.Array, DecoderCache | None, jax.Array], cross: CrossKV, index: jax.Array
    ) -> tuple[tuple[jax.Array, DecoderCache | None, jax.Array], None]:
        x_BxTxD, cache, block = carry
        B, T, _ = x_BxTxD.shape
        segment_BxT = jnp.ones((B, T), jnp.int32)
        take = lambda buffer: jax.lax.dynamic_index_in_dim(buffer, block, keepdims=False).astype(self.dtype)

        y_BxTxD = self.self_norm(x_BxTxD)
        k_BxSxHxK, v_BxSxHxK = self.self_attn.keys_values(y_BxTxD)
        if cache is not None:
            at = (block, 0, index, 0, 0)
            put = lambda buffer, new: jax.lax.dynamic_update_slice(buffer, new[None].astype(buffer.dtype), at)
            cache = DecoderCache(put(cache.k_LxBxSxHxK, k_BxSxHxK), put(cache.v_LxBxSxHxK, v_BxSxHxK))
            k_BxSxHxK, v_BxSxHxK = take(cache.k_LxBxSxHxK), take(cache.v_LxBxSxHxK)
        k_end_BxT = jnp.broadcast_to(index + jnp.arange(T) + 1, (B, T))
        x_BxTxD = x_BxTxD + self.self_attn(y_BxTxD, k_BxSxHxK, v_BxSxHxK, k_end_BxT, segment_BxT)

        k_end_BxT = jnp.broadcast_to(cross.n_states_B[:, None], (B, T))
        k_BxPxHxK, v_BxPxHxK = take(cross.k_LxBxPxHxK), take(cross.v_LxBxPxHxK)
        y_BxTxD = self.cross_norm(x_BxTxD)
        x_BxTxD = x_BxTxD + self.cross_attn(y_BxTxD, k_BxPxHxK, v_BxPxHxK, k_end_BxT, segment_BxT)
        x_BxTxD = x_BxTxD + self.mlp(self.mlp_norm(x_BxTxD))
        return (x_BxTxD, cache, block + 1), None


class WhisperDecoder(nn.Module):
    """The decoder: tokens so far and the encoder's states to logits of the next token.

    Decoding, all rows in step (their prompts have one length):

        cross = decoder.apply({"params": p}, states, method="cross_kv")               # once per clip
        cache = DecoderCache.zeros(config, n_rows, length)
        logits, cache = decoder.apply({"params": p}, prompt_BxT, cross, cache, 0)     # the prompt
        logits, cache = decoder.apply({"params": p}, token_Bx1, cross, cache, index)  # index = T, T + 1, ...
    """

    config: WhisperConfig
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    attention_impl: str = "xla"

    def setup(self):
        c = self.config
        self.embed = nn.Embed(c.vocab, c.width, dtype=self.dtype, param_dtype=self.param_dtype)
        self.positions = self.param(
            "positions", nn.initializers.normal(0.02), (c.n_target_positions, c.width), self.param_dtype
        )
        self.blocks = nn.scan(
            DecoderBlock,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=_SAME_FOR_ALL,
            length=c.decoder_blocks,
            methods=["__call__", "cross_kv"],
        )(c, self.dtype, self.param_dtype, self.attention_impl)
        self.final_norm = _norm(self)

    def cross_kv(self, states_BxPxD: jax.Array, n_states_B: jax.Array | None = None) -> CrossKV:
        """Returns the keys and values of the encoder's states, for all blocks.

        Args:
          n_states_B: valid states of each row: ceil(n_frames / 2). None: all.
        """
        if n_states_B is None:
            n_states_B = jnp.full(states_BxPxD.shape[:1], states_BxPxD.shape[1], jnp.int32)
        _, (k_LxBxPxHxK, v_LxBxPxHxK) = self.blocks.cross_kv(states_BxPxD.astype(self.dtype))
        return CrossKV(k_LxBxPxHxK, v_LxBxPxHxK, n_states_B)

    def __call__(
        self,
        tokens_BxT: jax.Array,
        cross: CrossKV | jax.Array,
        cache: DecoderCache | None = None,
        index: jax.Array | int = 0,
    ) -> tuple[jax.Array, DecoderCache | None]:
        """Returns logits [B, T, V] in float32, position t predicting the token after tokens[:, t], and the new cache.

        Args:
          tokens_BxT: int32. With a cache these are the tokens at positions index .. index + T - 1 only.
          cross: from `cross_kv`; or the encoder's states [B, P, D], all valid.
          cache: earlier tokens; index + T must not pass its length. None: `tokens_BxT` is everything.
          index: scalar: how many tokens the cache holds already. 0 without a cache.
        """
        if not isinstance(cross, CrossKV):
            cross = self.cross_kv(cross)
        index = jnp.asarray(index, jnp.int32)
        positions_TxD = jax.lax.dynamic_slice_in_dim(self.positions, index, tokens_BxT.shape[1])
        x_BxTxD = self.embed(tokens_BxT) + positions_TxD.astype(self.dtype)
        (x_BxTxD, cache, _), _ = self.blocks((x_BxTxD, cache, jnp.int32(0)), cross, index)
        return self.embed.attend(self.final_norm(x_BxTxD)).astype(jnp.float32), cache


def _zero_after(x_BxTxD: jax.Array, n_B: jax.Array | None) -> jax.Array:
    """Zeroes positions n and later of each row (a select: what stood there may be NaN)."""
    if n_B is None:
        return x_BxTxD
    return jnp.where((jnp.arange(x_BxTxD.shape[1]) < n_B[:, None])[:, :, None], x_BxTxD, 0)


def _dense(module: Any, features: int, use_bias: bool = True) -> nn.Dense:
    return nn.Dense(features, use_bias, dtype=module.dtype, param_dtype=module.param_dtype)


def _norm(module: Any, name: str | None = None) -> nn.LayerNorm:
    # The two-pass variance: E[x^2] - E[x]^2 loses digits where Whisper's states have outliers.
    return nn.LayerNorm(
        _NORM_EPS, dtype=module.dtype, param_dtype=module.param_dtype, use_fast_variance=False, name=name
    )
