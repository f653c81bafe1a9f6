"""LoRA (arXiv 2106.09685) as a collection of its own beside frozen weights.

A model applied without the `lora` collection *is* the plain model: the text teacher of distillation, the forgetting
test and the merge test need nothing else.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.ad_checkpoint import checkpoint_name

from aura_jax.errors import UserError, nearest

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
LINEAR = "linear"  # names what a policy of rematerialisation may keep: the outputs of linears, LoRA included
SCOPES = ("all", "request", "audio")
_ROWS = 3  # of a product in bfloat16 on a CPU, at least


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Which linears of which blocks get a low-rank delta, and at which tokens it acts.

    Attributes:
      n_blocks: the first blocks of the LLM that are adapted.
      rank, alpha: the delta is scale * x A B with scale = alpha / rank, or alpha / sqrt(rank) if `rslora`.
      targets: names of adapted linears, of `TARGETS`.
      scope: "all" tokens (mergeable); "request": all tokens of a request that has audio, so that text-only requests
        are exact; "audio" tokens only (PLoRA, arXiv 2401.16420), which can be neither merged nor expressed by PEFT.
    """

    n_blocks: int
    rank: int
    alpha: float
    rslora: bool = False
    targets: tuple[str, ...] = TARGETS
    scope: str = "all"

    def __post_init__(self):
        if self.rank < 1:
            raise UserError(f"lora.rank must be at least 1, not {self.rank}")
        if self.scope not in SCOPES:
            raise UserError(f"unknown lora.scope {self.scope!r}: {nearest(self.scope, SCOPES)}")
        if not self.targets:
            raise UserError(f"lora.targets is empty: name at least one of {', '.join(TARGETS)}")
        for target in self.targets:
            if target not in TARGETS:
                raise UserError(f"unknown lora.targets {target!r}: {nearest(target, TARGETS)}")

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


def float_dtype(param_dtype: jnp.dtype, dtype: jnp.dtype) -> jnp.dtype:
    """Returns the dtype of stored norms, biases and embeddings: int8 is for kernels alone, and the rest as computed."""
    return dtype if param_dtype == jnp.int8 else param_dtype


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def matmul(
    x: jax.Array, kernel: jax.Array, dtype: jnp.dtype, axis: int = 0, scale_O: jax.Array | None = None
) -> jax.Array:
    """Returns x [..., I] @ kernel (* scale) in the dtype of x; operands are rounded to `dtype`, sums are float32.

    The gradient's products round their operands likewise: left to itself, jax would multiply a float32 cotangent by a
    bfloat16 kernel, for which no backend has a kernel. An int8 kernel is exact in either dtype, and one scale for each
    output is the same after the product as before it: the kernel is never dequantised but for the product's operand.

    Args:
      kernel: [I, O], or with `axis` 1 [O, I], such as an embedding table.
      scale_O: float32, of an int8 kernel; None: 1. Neither of the two has a gradient.
    """
    y = _product(x, kernel, -1, axis, dtype)
    return (y if scale_O is None else y * scale_O).astype(x.dtype)


def _product(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int, dtype: jnp.dtype) -> jax.Array:
    contract = lambda a, axis_a, b, axis_b: jax.lax.dot_general(
        a, b, (((axis_a % a.ndim,), (axis_b,)), ((), ())), preferred_element_type=jnp.float32
    )
    a, b = a.astype(dtype), b.astype(dtype)
    product = lambda a, b: contract(a, axis_a, b, axis_b)
    if dtype != jnp.bfloat16 or a.size > a.shape[axis_a]:
        return product(a, b)

    def rows(a: jax.Array, b: jax.Array) -> jax.Array:
        """XLA for CPUs has a kernel for a few rows of bfloat16; for a single one it converts all of b to float32.

        What has its outputs first comes first, or XLA turns it around.
        """
        a_RxI = jnp.broadcast_to(a.reshape(1, -1), (_ROWS, a.size))
        y_O = contract(a_RxI, 1, b, 0)[0] if axis_b == 0 else contract(b, 1, a_RxI, 1)[:, 0]
        return y_O.reshape(*[1] * (a.ndim - 1), -1)

    return jax.lax.platform_dependent(a, b, cpu=rows, default=product)


def _matmul_forward(x, kernel, dtype, axis, scale_O):
    return matmul(x, kernel, dtype, axis, scale_O), (x, kernel, scale_O)


def _matmul_backward(dtype, axis, saved, dy):
    x, kernel, scale_O = saved
    if scale_O is not None:
        return _product(dy * scale_O, kernel, -1, 1 - axis, dtype).astype(x.dtype), None, None
    dx = _product(dy, kernel, -1, 1 - axis, dtype).astype(x.dtype)
    rows = lambda z: z.reshape(-1, z.shape[-1])
    operands = (rows(x), rows(dy)) if axis == 0 else (rows(dy), rows(x))
    return dx, _product(*operands, 0, 0, dtype).astype(kernel.dtype), None


matmul.defvjp(_matmul_forward, _matmul_backward)


class Dense(nn.Module):
    """x @ kernel (+ bias), plus the LoRA delta where the `lora` collection is present.

    Attributes:
      features: width of the output.
      lora: None for a linear that is never adapted.
      dtype, param_dtype: of the computation, and of the stored kernel and bias. A and B are stored in float32. An int8
        kernel has a float32 `kernel_scale` for each output beside it, and a bias in `dtype`.
      matmul_dtype: of the operands of the product with the kernel; None for `dtype`.
      outputs_first: the kernel is stored as [O, I].
    """

    features: int
    use_bias: bool = False
    lora: LoRAConfig | None = None
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    matmul_dtype: jnp.dtype | None = None
    outputs_first: bool = False

    @nn.compact
    def __call__(self, x_BxTxI: jax.Array, lora_mask_BxT: jax.Array | None = None) -> jax.Array:
        """Returns [B, T, features]; where `lora_mask_BxT` is given and False, the delta is absent."""
        n_in = x_BxTxI.shape[-1]
        int8 = self.param_dtype == jnp.int8
        # Nobody draws int8 weights: they are quantised as they are read.
        init = nn.initializers.zeros if int8 else nn.initializers.lecun_normal()
        shape = (self.features, n_in) if self.outputs_first else (n_in, self.features)
        kernel = self.param("kernel", init, shape, self.param_dtype)
        scale_O = self.param("kernel_scale", nn.initializers.ones, (self.features,), jnp.float32) if int8 else None
        x_BxTxI = x_BxTxI.astype(self.dtype)
        y_BxTxO: Any = matmul(x_BxTxI, kernel, self.matmul_dtype or self.dtype, int(self.outputs_first), scale_O)
        if self.use_bias:
            bias_dtype = float_dtype(self.param_dtype, self.dtype)
            bias = self.param("bias", nn.initializers.zeros, (self.features,), bias_dtype)
            y_BxTxO = y_BxTxO + bias.astype(self.dtype)
        if self.lora is None or not (self.has_variable("lora", "a") or self.is_mutable_collection("lora")):
            return checkpoint_name(y_BxTxO, LINEAR)
        rank = self.lora.rank
        # Kaiming-uniform with gain 1/sqrt(3), as PEFT: the variance of x A is that of x over 3.
        init_a = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        a = self.variable("lora", "a", lambda: init_a(self.make_rng("lora"), (n_in, rank), jnp.float32)).value
        b = self.variable("lora", "b", lambda: jnp.zeros((rank, self.features), jnp.float32)).value
        with jax.named_scope("delta"):
            low_BxTxR = checkpoint_name(x_BxTxI @ a.astype(self.dtype), LINEAR)
            delta_BxTxO = low_BxTxR @ b.astype(self.dtype) * self.lora.scale
        if lora_mask_BxT is None:
            return checkpoint_name(y_BxTxO + delta_BxTxO, LINEAR)
        # Select rather than multiply by 0: a NaN of the delta must not leak into tokens outside its scope.
        return checkpoint_name(jnp.where(lora_mask_BxT[..., None], y_BxTxO + delta_BxTxO, y_BxTxO), LINEAR)


def as_computed(lora: Mapping[str, Any], dtype: jnp.dtype) -> Any:
    """Returns A and B in the dtype that `Dense` casts them to, for programs that only read them."""
    return jax.tree.map(lambda x: x if x.dtype == dtype else x.astype(dtype), lora)


def merge(llm: Mapping[str, Any], lora: Mapping[str, Any], config: LoRAConfig) -> dict[str, Any]:
    """Returns the LLM's variables with W + scale A B in place of every adapted W, in the dtype of W.

    Raises:
      UserError: for PLoRA, whose delta is absent from text.
    """
    if config.scope == "audio":
        raise UserError("lora.scope 'audio' (PLoRA) acts at audio tokens only and cannot be merged into the LLM")
    flat: Any = flatten_dict(llm, sep="/")
    deltas: Any = flatten_dict(lora, sep="/")
    for path in [p.removesuffix("/a") for p in deltas if p.endswith("/a")]:
        kernel = flat[f"{path}/kernel"]
        delta = jnp.einsum("lir,lro->lio", deltas[f"{path}/a"], deltas[f"{path}/b"]) * config.scale
        flat[f"{path}/kernel"] = (kernel.astype(jnp.float32) + delta).astype(kernel.dtype)
    return unflatten_dict(flat, sep="/")
