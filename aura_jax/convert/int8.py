"""Kernels of linears as int8: symmetric, with one float32 scale for each output channel.

A scale is taken over the whole input of its channel, so it depends on the weights alone and not on how a mesh splits
them. Dimensions: I inputs, O outputs.
"""

from collections.abc import Callable

import numpy as np

_MOST = 127  # symmetric: -128 stands for nothing
_COLUMNS = 4096  # outputs whose weights are float32 at a time


def scales(columns: Callable[[slice], np.ndarray], n_out: int) -> np.ndarray:
    """Returns the scales [O] of a kernel, float32: the largest magnitude of each output's weights over 127.

    Args:
      columns: reads a range of the kernel's outputs, [I, some of O], in any floating-point dtype.
      n_out: O.
    """
    parts = [slice(start, min(start + _COLUMNS, n_out)) for start in range(0, n_out, _COLUMNS)]
    largest_O = np.concatenate([np.abs(columns(part).astype(np.float32)).max(0) for part in parts])
    # Of a channel that is all zeros, any scale will do but 0.
    return np.maximum(largest_O / np.float32(_MOST), np.finfo(np.float32).tiny)


def quantise(kernel_IxO: np.ndarray, scale_O: np.ndarray) -> np.ndarray:
    """Returns the kernel, or a part of its inputs, in int8: each weight is within half a scale of int8 * scale."""
    out_IxO = kernel_IxO.astype(np.float32)
    out_IxO /= scale_O
    return np.rint(out_IxO, out=out_IxO).astype(np.int8)
