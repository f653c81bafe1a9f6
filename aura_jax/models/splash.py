"""Attention by the `splash` kernel that JAX ships for TPUs: it holds the scores of a block at a time, never of a row.

Dimensions as in models/attention.py; H, G and B are what one device holds, wherever rows or heads are split.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    CausalMask,
    MultiHeadMask,
    SegmentIds,
    make_splash_mha_single_device,
    splash_attention_kernel,
)
from jax.sharding import PartitionSpec

from aura_jax.errors import UserError
from aura_jax.sharding import BATCH_AXES

_LANES = 128  # of a vector register: blocks are multiples of it
_BLOCK = 512  # queries or keys, at most
_HEADS_AXIS = "tensor"


def splash_attention(
    q_BxTxHxK: jax.Array,
    k_BxSxGxK: jax.Array,
    v_BxSxGxK: jax.Array,
    k_end_BxT: jax.Array,
    q_segment_BxT: jax.Array,
    k_segment_BxS: jax.Array,
    factor: float,
    ahead: int | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Returns what `attention.attention` does, [B, T, H, K]; on a mesh, rows and heads stay where they are.

    Args:
      factor: of the scores.
      ahead: how many columns behind its own a query may see, at most: `k_end[t] <= t + 1 + ahead`. Blocks of keys
        behind that are never read. None: there is no such bound.
      interpret: runs the kernel's body as ordinary operations, on any backend: for tests.

    Raises:
      UserError: the devices are no TPUs, or the mesh splits the heads unevenly.
    """
    if not interpret and _platform() != "tpu":
        raise UserError("attention 'splash' needs a TPU: set model.attention='xla'")
    function = functools.partial(_on_a_device, factor=factor, ahead=ahead, interpret=interpret)
    arguments = (q_BxTxHxK, k_BxSxGxK, v_BxSxGxK, k_end_BxT, q_segment_BxT, k_segment_BxS)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size == 1 or not {*BATCH_AXES, _HEADS_AXIS} <= set(mesh.axis_names):
        return function(*arguments)
    n_heads = k_BxSxGxK.shape[2]
    if n_heads % mesh.shape[_HEADS_AXIS]:
        raise UserError(
            f"attention 'splash': mesh.tensor={mesh.shape[_HEADS_AXIS]} does not divide {n_heads} heads of keys: "
            "change mesh.tensor, or set model.attention='xla'"
        )
    # The partitioner cannot look into a kernel, so it is told. Rows that do not divide are whole on every device, as
    # they are for `sharding.keep_rows`.
    divides = not q_BxTxHxK.shape[0] % math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    rows = PartitionSpec(BATCH_AXES if divides else None)
    heads = PartitionSpec(*rows, None, _HEADS_AXIS)
    specs = (heads, heads, heads, rows, rows, rows)
    return jax.shard_map(function, in_specs=specs, out_specs=heads, check_vma=False)(*arguments)


def _platform() -> str:
    """Returns the platform of the devices that a program is for: not always those of this machine."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def _on_a_device(
    q_BxTxHxK: jax.Array,
    k_BxSxGxK: jax.Array,
    v_BxSxGxK: jax.Array,
    k_end_BxT: jax.Array,
    q_segment_BxT: jax.Array,
    k_segment_BxS: jax.Array,
    *,
    factor: float,
    ahead: int | None,
    interpret: bool,
) -> jax.Array:
    _, T, H, _ = q_BxTxHxK.shape
    S = k_BxSxGxK.shape[1]
    (q_block, q_left), (k_block, k_left) = _blocks(T), _blocks(S)
    # The mask says which blocks of keys are read at all, the kernel's own rule which keys of a block count.
    offset = S + k_left if ahead is None else min(ahead, S + k_left)
    envelope = CausalMask((T + q_left, S + k_left), offset)
    sizes = BlockSizes(
        block_q=q_block,
        block_kv=k_block,
        block_q_dkv=q_block,
        block_kv_dkv=k_block,
        block_q_dq=q_block,
        block_kv_dq=k_block,
    )
    kernel = make_splash_mha_single_device(MultiHeadMask([envelope] * H), block_sizes=sizes, interpret=interpret)

    def of_row(q_HxTxK, k_GxSxK, v_GxSxK, k_end_T, segments) -> Any:
        # The rule gets a number for each query. With masks of JAX's own that is its column; here it is `k_end`, which
        # differs from row to row.
        infos = (kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info)
        infos = (info._replace(q_sequence=k_end_T) for info in infos if info is not None)
        rule = {**kernel.kwargs, "mask_function": _in_reach}
        return splash_attention_kernel.SplashAttentionKernel(*infos, **rule)(q_HxTxK, k_GxSxK, v_GxSxK, segments)

    put = lambda x, n: jnp.moveaxis(jnp.pad(x, ((0, 0), (0, n), (0, 0), (0, 0))), 1, 2)
    pad = lambda x, n: jnp.pad(x.astype(jnp.int32), ((0, 0), (0, n)))
    scaled_BxTxHxK = (q_BxTxHxK.astype(jnp.float32) * factor).astype(q_BxTxHxK.dtype)
    out_BxHxTxK = jax.vmap(of_row)(
        put(scaled_BxTxHxK, q_left),
        put(k_BxSxGxK, k_left),
        put(v_BxSxGxK, k_left),
        pad(k_end_BxT, q_left),
        SegmentIds(pad(q_segment_BxT, q_left), pad(k_segment_BxS, k_left)),
    )
    out_BxTxHxK = jnp.moveaxis(out_BxHxTxK, 2, 1)[:, :T].astype(v_BxSxGxK.dtype)
    # Where a query sees no key, the kernel averages over keys.
    same_BxTxS = (q_segment_BxT[:, :, None] == k_segment_BxS[:, None, :]) & (q_segment_BxT[:, :, None] != 0)
    sees_BxT = (same_BxTxS & (jnp.arange(S) < k_end_BxT[:, :, None])).any(-1)
    return jnp.where(sees_BxT[:, :, None, None], out_BxTxHxK, 0)


def _in_reach(k_end: jax.Array, k: jax.Array) -> jax.Array:
    return k < k_end


def _blocks(n: int) -> tuple[int, int]:
    """Returns the size of the fewest equal blocks that `n` columns fit in, and how many columns they have left over."""
    count = -(-n // _BLOCK)
    size = -(-n // (count * _LANES)) * _LANES
    return size, count * size - n
