"""LLM weights to Hugging Face files: the inverse of `hf.load_llm`, one tensor in memory at a time and shard."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.numpy import save_file
from tqdm import tqdm

from aura_jax.convert import hf
from aura_jax.sharding import flatten

_MAX_SHARD = 5 * 10**9  # bytes, as transformers


def write_llm(
    folder: Path,
    llm: Mapping[str, Any],
    *,
    n_adapted: int,
    dtype: Any,
    prefix: str = "",
    others: Mapping[str, np.ndarray] | None = None,
    max_shard: int = _MAX_SHARD,
) -> None:
    """Writes an LLM's `params` as model.safetensors, or as several files and their index.

    Args:
      folder: an existing directory.
      llm: as `hf.load_llm` returns it.
      n_adapted: blocks in `adapted`.
      dtype: of the LLM's tensors in the files.
      prefix: of every key of the LLM's.
      others: further tensors by their whole key, written in their own dtype.
      max_shard: bytes of a file.
    """
    leaves, dtype = flatten(llm), np.dtype(dtype)
    sources = hf.llm_sources({path: leaf.shape for path, leaf in leaves.items()}, n_adapted, prefix)
    tensors: dict[str, _Tensor] = {}
    for path, source in sources.items():
        for row, key in enumerate(source.keys):
            tensors[key] = _Tensor(leaves[path], row if source.stacked else None, source.axes, dtype)
    for key, value in (others or {}).items():
        tensors[key] = _Tensor(value, None, (), value.dtype)
    split = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor.n_bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard,
    )
    with tqdm(total=len(tensors), desc="writing weights", unit="tensor", disable=None) as bar:
        for name, keys in split.filename_to_tensors.items():
            shard = {}
            for key in keys:
                shard[key] = tensors[key].read()
                bar.update()
            save_file(shard, folder / name, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / hf.INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


class _Tensor:
    """A tensor to be written: a leaf, or one block of a stack, in the order that torch stores its axes."""

    def __init__(self, leaf: Any, row: int | None, axes: tuple[int, ...], dtype: np.dtype):
        self._leaf, self._row, self._axes, self._dtype = leaf, row, axes, dtype

    @property
    def n_bytes(self) -> int:
        shape = self._leaf.shape if self._row is None else self._leaf.shape[1:]
        return int(np.prod(shape)) * self._dtype.itemsize

    def read(self) -> np.ndarray:
        value = np.asarray(jax.device_get(self._leaf if self._row is None else self._leaf[self._row]))
        value = value.astype(self._dtype, copy=False)
        return np.ascontiguousarray(value.transpose(np.argsort(self._axes))) if self._axes else value
