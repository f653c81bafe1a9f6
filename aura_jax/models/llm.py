"""A decoder LLM: Llama 3, Qwen2/2.5, Qwen3, SmolLM2 and their kin, with LoRA on the first blocks.

Two scans: `adapted`, the first N blocks, and `plain`, the rest; each block's weights are stacked on axis 0.
Dimensions: B rows, T tokens, S cached tokens, L blocks, D width, H heads, G key/value heads, K width of a head,
F width of the MLP, V vocabulary, Q audio positions that a tap sees.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec

from aura_jax.errors import UserError, nearest
from aura_jax.models.attention import attention
from aura_jax.models.lora import LINEAR, Dense, LoRAConfig, float_dtype, matmul
from aura_jax.sharding import keep_heads, keep_rows

FAMILIES = ("llama", "qwen2", "qwen3")
REMAT = ("none", "dots", "full")

# tap(h_BxQxD, block index, tap arguments) -> pytree, stacked over blocks by the scan.
Tap = Callable[[jax.Array, jax.Array, Any], Any]


@dataclasses.dataclass(frozen=True)
class LLMConfig:
    """Shape of a decoder LLM; `from_hf` reads a Hugging Face config.json."""

    family: str
    vocab: int
    width: int
    mlp_width: int
    n_blocks: int
    n_heads: int
    n_kv_heads: int
    head_width: int
    rope_theta: float
    rope_scaling: tuple[tuple[str, float], ...] = ()  # llama3's four numbers, as sorted pairs: hashable
    norm_eps: float = 1e-6
    tied: bool = True
    qkv_bias: bool = False
    qk_norm: bool = False

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "LLMConfig":
        """Reads the dictionary of a config.json, in the key names of transformers 4 and 5.

        Raises:
          UserError: for another family, or a variant whose result would differ silently.
        """
        family = hf.get("model_type", "?")
        if family not in FAMILIES:
            raise UserError(f"LLM family {family!r} is not supported: {nearest(family, FAMILIES)}")
        if hf.get("hidden_act", "silu") != "silu":
            raise UserError(f"hidden_act {hf['hidden_act']!r} is not supported: silu only")
        if hf.get("use_sliding_window") or hf.get("mlp_bias"):
            raise UserError("sliding windows and MLP biases are not supported: choose a model without them")
        bias = hf.get("attention_bias", False)
        if bias and family != "qwen2":
            raise UserError(f"attention_bias is not supported for {family}: choose a model without it")
        rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
        kind = rope.pop("rope_type", rope.pop("type", "default"))
        theta = rope.pop("rope_theta", None) or hf.get("rope_theta") or 10000.0
        if kind not in ("default", "llama3"):
            raise UserError(f"rope type {kind!r} is not supported: default or llama3")
        return cls(
            family=family,
            vocab=hf["vocab_size"],
            width=hf["hidden_size"],
            mlp_width=hf["intermediate_size"],
            n_blocks=hf["num_hidden_layers"],
            n_heads=hf["num_attention_heads"],
            n_kv_heads=hf.get("num_key_value_heads") or hf["num_attention_heads"],
            head_width=hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
            rope_theta=float(theta),
            rope_scaling=tuple(sorted((k, float(v)) for k, v in rope.items())) if kind == "llama3" else (),
            norm_eps=hf.get("rms_norm_eps", 1e-6),
            tied=hf.get("tie_word_embeddings", False),
            qkv_bias=family == "qwen2",
            qk_norm=family == "qwen3",
        )


@struct.dataclass
class Context:
    """What every block needs beside its input.

    Attributes:
      position_BxT: index of each token in its request, for RoPE.
      k_end_BxT: exclusive end of the keys each query sees, in columns of the keys (of the cache, if there is one).
      q_segment_BxT, k_segment_BxS: request of each query and key; 0 is padding. Keys are the columns of the cache, if
        there is one, or those of the queries alone, if nothing is in it before them.
      lora_mask_BxT: where the LoRA delta acts; None for everywhere.
      tap_position_BxQ: columns of the audio tokens that a tap sees; None for all columns.
      cache_start: scalar, the column of the cache that the first query is written to.
      ahead: as `attention`.
    """

    position_BxT: jax.Array
    k_end_BxT: jax.Array
    q_segment_BxT: jax.Array
    k_segment_BxS: jax.Array
    lora_mask_BxT: jax.Array | None = None
    tap_position_BxQ: jax.Array | None = None
    cache_start: jax.Array | None = None
    ahead: int | None = struct.field(pytree_node=False, default=None)


@struct.dataclass
class Cache:
    """Keys and values of all blocks: a carry of the scan over blocks and of the decoding loop."""

    k_LxBxSxGxK: jax.Array
    v_LxBxSxGxK: jax.Array

    @classmethod
    def zeros(cls, config: LLMConfig, n_rows: int, length: int, dtype: jnp.dtype) -> "Cache":
        shape = (config.n_blocks, n_rows, length, config.n_kv_heads, config.head_width)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def rope_frequencies(config: LLMConfig) -> np.ndarray:
    """Returns RoPE's angular frequencies [K/2] in radians per token, with Llama 3's scaling where configured."""
    exponent = np.arange(0, config.head_width, 2, dtype=np.float32) / config.head_width
    freq = (1.0 / config.rope_theta**exponent).astype(np.float32)
    if not config.rope_scaling:
        return freq
    scaling = dict(config.rope_scaling)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    old_length = scaling["original_max_position_embeddings"]
    wavelength = 2 * math.pi / freq
    smooth = np.clip((old_length / wavelength - low) / (high - low), 0.0, 1.0)
    return ((1 - smooth) * freq / scaling["factor"] + smooth * freq).astype(np.float32)


def apply_rope(x_BxTxHxK: jax.Array, angle_BxTxJ: jax.Array) -> jax.Array:
    """Rotates the two halves of each head's width by `angle` [B, T, K/2] (the half-split convention)."""
    cos, sin = jnp.cos(angle_BxTxJ)[:, :, None], jnp.sin(angle_BxTxJ)[:, :, None]
    a, b = jnp.split(x_BxTxHxK.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BxTxHxK.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last axis, computed in float32."""

    eps: float
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        x32 = x.astype(jnp.float32)
        y32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return y32.astype(x.dtype) * scale.astype(x.dtype)


def _note_moment(module: nn.Module, name: str, x_BxTxI: jax.Array) -> None:
    """Adds the sum over tokens of x x^T [I, I] to the collection `moments`, if the caller made that mutable.

    Every token counts alike, as a unit vector: the few with massive activations would outweigh all others.
    """
    if module.is_mutable_collection("moments") and not module.is_initializing():
        x_BxTxI = x_BxTxI.astype(jnp.float32)
        x_BxTxI = x_BxTxI * jax.lax.rsqrt(jnp.sum(x_BxTxI**2, -1, keepdims=True) + 1e-12)
        moment_IxI = jnp.einsum("bti,btj->ij", x_BxTxI, x_BxTxI)
        module.sow("moments", f"{name}_input", moment_IxI, init_fn=lambda: 0.0, reduce_fn=jnp.add)


class _Attention(nn.Module):
    config: LLMConfig
    lora: LoRAConfig | None
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    matmul_dtype: jnp.dtype | None
    outputs_first: bool
    impl: str

    @nn.compact
    def __call__(
        self, x_BxTxD: jax.Array, ctx: Context, cache: Cache | None, block: jax.Array
    ) -> tuple[jax.Array, Cache | None]:
        c = self.config
        B, T, _ = x_BxTxD.shape
        _note_moment(self, "qkv", x_BxTxD)

        def project(name: str, n_heads: int) -> jax.Array:
            dense = _dense(self, name, n_heads * c.head_width, use_bias=c.qkv_bias)
            y_BxTxHxK = dense(x_BxTxD, ctx.lora_mask_BxT).reshape(B, T, n_heads, c.head_width)
            y_BxTxHxK = keep_heads(y_BxTxHxK, c.n_kv_heads)
            if c.qk_norm and name != "v":
                norm_dtype = float_dtype(self.param_dtype, self.dtype)
                y_BxTxHxK = RMSNorm(c.norm_eps, norm_dtype, name=f"{name}_norm")(y_BxTxHxK)
            return y_BxTxHxK

        angle_BxTxJ = ctx.position_BxT[:, :, None].astype(jnp.float32) * rope_frequencies(c)
        q_BxTxHxK = apply_rope(project("q", c.n_heads), angle_BxTxJ)
        k_BxSxGxK = apply_rope(project("k", c.n_kv_heads), angle_BxTxJ)
        v_BxSxGxK = project("v", c.n_kv_heads)
        if cache is not None:
            assert ctx.cache_start is not None
            at: Any = (block, 0, ctx.cache_start, 0, 0)
            put = lambda buffer, new: keep_heads(
                jax.lax.dynamic_update_slice(buffer, new[None].astype(buffer.dtype), at), c.n_kv_heads
            )
            cache = Cache(put(cache.k_LxBxSxGxK, k_BxSxGxK), put(cache.v_LxBxSxGxK, v_BxSxGxK))
            if ctx.k_segment_BxS.shape[1] != T:
                take = lambda buffer: jax.lax.dynamic_index_in_dim(buffer, block, keepdims=False).astype(self.dtype)
                k_BxSxGxK, v_BxSxGxK = take(cache.k_LxBxSxGxK), take(cache.v_LxBxSxGxK)
        out_BxTxHxK = attention(
            q_BxTxHxK,
            k_BxSxGxK,
            v_BxSxGxK,
            ctx.k_end_BxT,
            ctx.q_segment_BxT,
            ctx.k_segment_BxS,
            self.impl,
            ahead=ctx.ahead,
        )
        out_BxTxD = out_BxTxHxK.reshape(B, T, c.n_heads * c.head_width)
        _note_moment(self, "o", out_BxTxD)
        return _dense(self, "o", c.width)(out_BxTxD, ctx.lora_mask_BxT), cache


class _MLP(nn.Module):
    config: LLMConfig
    lora: LoRAConfig | None
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    matmul_dtype: jnp.dtype | None
    outputs_first: bool

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array, lora_mask_BxT: jax.Array | None) -> jax.Array:
        _note_moment(self, "gate_up", x_BxTxD)
        gate_BxTxF = _dense(self, "gate", self.config.mlp_width)(x_BxTxD, lora_mask_BxT)
        up_BxTxF = _dense(self, "up", self.config.mlp_width)(x_BxTxD, lora_mask_BxT)
        hidden_BxTxF = nn.silu(gate_BxTxF) * up_BxTxF
        _note_moment(self, "down", hidden_BxTxF)
        return _dense(self, "down", self.config.width)(hidden_BxTxF, lora_mask_BxT)


def _dense(module: "_Attention | _MLP", name: str, features: int, use_bias: bool = False) -> Dense:
    lora = module.lora if module.lora is not None and name in module.lora.targets else None
    kinds = (module.dtype, module.param_dtype, module.matmul_dtype, module.outputs_first)
    return Dense(features, use_bias, lora, *kinds, name=name)


class Block(nn.Module):
    """One decoder block in the form that `nn.scan` takes: carry in, carry and tap output out."""

    config: LLMConfig
    lora: LoRAConfig | None
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    matmul_dtype: jnp.dtype | None
    outputs_first: bool
    impl: str
    tap: Tap | None

    @nn.compact
    def __call__(
        self, carry: tuple[jax.Array, Cache | None, jax.Array], ctx: Context, tap_args: Any
    ) -> tuple[tuple[jax.Array, Cache | None, jax.Array], Any]:
        x_BxTxD, cache, block = carry
        x_BxTxD = keep_rows(x_BxTxD)
        norm_dtype = float_dtype(self.param_dtype, self.dtype)
        norm = lambda name: RMSNorm(self.config.norm_eps, norm_dtype, name=name)
        kinds = (self.config, self.lora, self.dtype, self.param_dtype, self.matmul_dtype, self.outputs_first)
        a_BxTxD, cache = _Attention(*kinds, self.impl, name="attn")(norm("input_norm")(x_BxTxD), ctx, cache, block)
        x_BxTxD = keep_rows(x_BxTxD + a_BxTxD)
        x_BxTxD = keep_rows(x_BxTxD + _MLP(*kinds, name="mlp")(norm("post_norm")(x_BxTxD), ctx.lora_mask_BxT))
        if self.tap is None:
            return (x_BxTxD, cache, block + 1), None
        h_BxQxD = x_BxTxD
        if ctx.tap_position_BxQ is not None:
            h_BxQxD = jnp.take_along_axis(x_BxTxD, ctx.tap_position_BxQ[:, :, None], axis=1)
        return (x_BxTxD, cache, block + 1), self.tap(h_BxQxD, block, tap_args)


class _BlocksApart(nn.Module):
    """Blocks called as the scan over stacked ones is; the variables of block i are below the name "i"."""

    length: int
    block: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, carry: Any, ctx: Context, tap_args: Any) -> tuple[Any, Any]:
        taps = []
        for i in range(self.length):
            carry, tap = self.block(name=str(i))(carry, ctx, tap_args)
            taps.append(tap)
        return carry, jax.tree.map(lambda *one_each: jnp.stack(one_each), *taps)


class LLM(nn.Module):
    """The decoder. `embed`, then `adapted_blocks`, then `plain_blocks`, then `logits` where they are wanted.

    Attributes:
      lora: None for no adapters; its n_blocks says how many blocks are in the first scan.
      dtype, param_dtype: of the computation, and of stored weights. int8 is for the linears alone, an untied head
        included; norms, biases and embeddings are then in `dtype`.
      matmul_dtype: of the operands of products with frozen weights of blocks, summed in float32; None for `dtype`. On
        CPUs with bfloat16 units such products run at twice the speed of float32, while the residual stream stays
        float32. The head is not one of them: its operand would be a copy of the whole embedding table.
      tap: called after each adapted block with the hidden states at the audio positions.
      remat: "none", "dots" (keeps the results of matmuls with weights), or "full" (keeps each block's input only).
      apart: no scans and no remat: every block has arrays of its own, as of `blocks_apart`, its kernels as of
        `as_multiplied`.
    """

    config: LLMConfig
    lora: LoRAConfig | None = None
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    attention_impl: str = "xla"
    remat: str = "none"
    tap: Tap | None = None
    matmul_dtype: jnp.dtype | None = None
    apart: bool = False

    @property
    def n_adapted(self) -> int:
        return self.lora.n_blocks if self.lora is not None else 0

    def setup(self):
        c = self.config
        if not 0 <= self.n_adapted <= c.n_blocks:
            raise UserError(f"lora.n_blocks is {self.n_adapted}, but the LLM has {c.n_blocks} blocks")
        floats = float_dtype(self.param_dtype, self.dtype)
        self.token_embed = nn.Embed(c.vocab, c.width, dtype=self.dtype, param_dtype=floats, name="embed")
        if self.n_adapted:
            self.adapted = self._blocks(self.n_adapted, self.lora, self.tap)
        if self.n_adapted < c.n_blocks:
            self.plain = self._blocks(c.n_blocks - self.n_adapted, None, None)
        self.final_norm = RMSNorm(c.norm_eps, floats)
        if not c.tied:
            self.lm_head = Dense(c.vocab, False, None, self.dtype, self.param_dtype)

    def _blocks(self, length: int, lora: LoRAConfig | None, tap: Tap | None) -> nn.Module:
        outputs_first = self.apart and _is_wider(self.param_dtype, self.matmul_dtype or self.dtype)
        numbers = (self.dtype, self.param_dtype, self.matmul_dtype, outputs_first)
        kinds = (self.config, lora, *numbers, self.attention_impl, tap)
        if self.apart:  # traced once for all blocks
            return _BlocksApart(length, functools.partial(nn.jit(Block), *kinds))
        block, broadcast = Block, (nn.broadcast, nn.broadcast)
        if self.remat != "none":
            policy = jax.checkpoint_policies.save_only_these_names(LINEAR) if self.remat == "dots" else None
            block = nn.remat(Block, prevent_cse=False, policy=policy)
        return nn.scan(
            block,
            variable_axes={"params": 0, "lora": 0, "moments": 0},
            split_rngs={"params": True, "lora": True},
            in_axes=cast(Any, broadcast),
            length=length,
        )(*kinds)

    def embed(self, tokens_BxT: jax.Array) -> jax.Array:
        """Returns the embeddings [B, T, D] of token ids."""
        return keep_rows(self.token_embed(tokens_BxT))

    def adapted_blocks(
        self, x_BxTxD: jax.Array, ctx: Context, cache: Cache | None = None, tap_args: Any = None
    ) -> tuple[jax.Array, Cache | None, Any]:
        """Runs the first N blocks; returns hidden states, cache, and the tap's outputs stacked over N (or None)."""
        if not self.n_adapted:
            return x_BxTxD, cache, None
        carry, taps = self.adapted((x_BxTxD, cache, jnp.int32(0)), ctx, tap_args)
        return carry[0], carry[1], taps

    def plain_blocks(
        self, x_BxTxD: jax.Array, ctx: Context, cache: Cache | None = None
    ) -> tuple[jax.Array, Cache | None]:
        """Runs the remaining blocks and the final norm; returns what `logits` takes, and the cache."""
        if self.n_adapted < self.config.n_blocks:
            carry, _ = self.plain((x_BxTxD, cache, jnp.int32(self.n_adapted)), ctx, None)
            x_BxTxD, cache = carry[0], carry[1]
        return self.final_norm(x_BxTxD), cache

    def logits(self, h: jax.Array) -> jax.Array:
        """Returns logits [..., V] in float32 of normed hidden states [..., D]: call it at targets only."""
        if self.config.tied:
            return matmul(h.astype(jnp.float32), self.token_embed.embedding, self.dtype, 1)
        return self.lm_head(h).astype(jnp.float32)

    def __call__(
        self, x_BxTxD: jax.Array, ctx: Context, cache: Cache | None = None, tap_args: Any = None
    ) -> tuple[jax.Array, Cache | None, Any]:
        """Runs all blocks; returns normed hidden states [B, T, D], the cache and the taps."""
        x_BxTxD, cache, taps = self.adapted_blocks(x_BxTxD, ctx, cache, tap_args)
        h_BxTxD, cache = self.plain_blocks(x_BxTxD, ctx, cache)
        return h_BxTxD, cache, taps


def as_multiplied(llm: Mapping[str, Any], dtype: jnp.dtype) -> dict[str, Any]:
    """Returns an LLM's variables with the kernels of its blocks that are wider than `dtype` as [L, O, I] in `dtype`.

    It is what `Dense` casts them to, so no product changes; and the cast is not paid for by every pass. As a copy is
    made anyway, it has the outputs first, where XLA's products on a CPU take less time.
    """

    def cast(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        is_cast = path[-1].key == "kernel" and _is_wider(x.dtype, dtype)
        return jnp.swapaxes(x.astype(dtype), -1, -2) if is_cast else x

    of_blocks = {name: llm[name] for name in ("adapted", "plain") if name in llm}
    return {**llm, **jax.tree_util.tree_map_with_path(cast, of_blocks)}


def blocks_apart(llm: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a collection's part for the LLM with the stacked blocks as `LLM.apart` takes them.

    Nothing is copied: the arrays must lie in one CPU's memory, and the result's are views of them.
    """

    def views(stacked: Any) -> dict[str, Any]:
        leaves, tree = jax.tree.flatten(stacked)
        of_blocks = [jax.device_put(list(np.asarray(x)), _as_placed(x), may_alias=True) for x in leaves]
        return {str(i): tree.unflatten(block) for i, block in enumerate(zip(*of_blocks, strict=True))}

    return {name: views(tree) if name in ("adapted", "plain") else tree for name, tree in llm.items()}


def _is_wider(held: jnp.dtype, multiplied: jnp.dtype) -> bool:
    return jnp.dtype(held).itemsize > jnp.dtype(multiplied).itemsize


def _as_placed(x: jax.Array) -> jax.sharding.Sharding | None:
    """Returns where to put parts of an array of one device, so that jax takes them for placed alike; None: anywhere."""
    if isinstance(x.sharding, NamedSharding):
        return NamedSharding(x.sharding.mesh, PartitionSpec())
    return x.sharding if x.committed else None
