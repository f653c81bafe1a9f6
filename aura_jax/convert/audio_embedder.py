"""The audio embedder's weights under the names and in the layouts that torch gives them, and back."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from aura_jax.convert import hf
from aura_jax.errors import UserError

WEIGHTS = "audio_embedder.safetensors"

# Path below `params/embedder` -> (torch's name, our axis i is torch's axis axes[i]).
_ROWS = {
    "stem/conv1/kernel": ("conv1.weight", (2, 1, 0)),
    "stem/conv1/bias": ("conv1.bias", ()),
    "stem/conv2/kernel": ("conv2.weight", (2, 1, 0)),
    "stem/conv2/bias": ("conv2.bias", ()),
    "patch/kernel": ("patch.weight", (1, 0)),
    "patch/bias": ("patch.bias", ()),
    "norm/scale": ("norm.weight", ()),
    "norm/bias": ("norm.bias", ()),
    "proj/kernel": ("proj.weight", (1, 0)),
    "proj/bias": ("proj.bias", ()),
    "gain": ("gain", ()),
    "text_rms": ("text_rms", ()),
}


def to_tensors(embedder: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns torch's name -> float32 array, of path below `params/embedder` -> array."""
    tensors = {}
    for path, leaf in embedder.items():
        name, axes = _ROWS[path]
        value = np.asarray(leaf, np.float32)
        # np.ascontiguousarray would make a scalar one-dimensional.
        tensors[name] = np.ascontiguousarray(value.transpose(np.argsort(axes))) if axes else value
    return tensors


def from_tensors(
    tensors: Mapping[str, np.ndarray], expected: Mapping[str, tuple[int, ...]], where: Path
) -> dict[str, np.ndarray]:
    """Returns path below `params/embedder` -> float32 array: the inverse of `to_tensors`.

    Args:
      expected: path -> shape.
      where: named in errors.

    Raises:
      UserError: keys or shapes that are not those of an embedder of this shape.
    """
    names = {_ROWS[path][0] for path in expected}
    missing, unknown = sorted(names - tensors.keys()), sorted(tensors.keys() - names)
    if missing or unknown:
        parts = [f"lacks {hf.listed(missing)}"] if missing else []
        parts += [f"has unknown {hf.listed(unknown)}"] if unknown else []
        raise UserError(f"{where}: not the audio embedder that its config describes: it {' and '.join(parts)}")
    leaves, wrong = {}, []
    for path, shape in expected.items():
        name, axes = _ROWS[path]
        value = np.asarray(tensors[name], np.float32)
        value = value.transpose(axes) if axes and value.ndim == len(axes) else value
        if value.shape != shape:
            wrong.append(f"{name} is {list(tensors[name].shape)}")
        leaves[path] = np.array(value, order="C")
    if wrong:
        raise UserError(f"{where}: not the audio embedder that its config describes: {hf.listed(wrong, '; ')}")
    return leaves
