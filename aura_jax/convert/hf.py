"""Hugging Face directories (config.json and safetensors, one file or an index of shards) into stacked parameter trees.

Each leaf of a tree is filled through `jax.make_array_from_callback` from slices of the files: a host reads the parts
that its devices hold, and nothing else. The correspondence of names is a table: a path of the tree, and for each block
the Hugging Face key and the order of its axes. Whatever has no counterpart, on either side, is an error that lists the
keys.
"""

import contextlib
import dataclasses
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from aura_jax.convert import int8 as quantiser
from aura_jax.errors import UserError
from aura_jax.models.llm import LLM, Context, LLMConfig
from aura_jax.models.lora import LoRAConfig
from aura_jax.models.whisper import WhisperConfig, WhisperDecoder, WhisperEncoder
from aura_jax.sharding import flatten, unflatten

# (path in the tree, shape) -> where its parts live.
Sharding = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOATS = ("F32", "F16", "BF16")
_MAX_LISTED = 8
_MEND_CONFIG = "name a Hugging Face model directory"

AURA = "aura"  # the model type of our own `hf` exports
AURA_LLM, AURA_EMBEDDER = "language_model.", "audio_embedder."  # prefixes of their keys

# Order of the stored axes in our leaf.
_SAME: tuple[int, ...] = ()
_LINEAR = (1, 0)  # torch keeps a linear as [out, in], we as [in, out]
_CONV = (2, 1, 0)  # torch keeps a convolution as [out, in, k], we as [k, in, out]

# Path below the tree's root, or below a stack of blocks -> (Hugging Face name, axes).
_LLM_TOP = {
    "embed/embedding": ("model.embed_tokens.weight", _SAME),
    "final_norm/scale": ("model.norm.weight", _SAME),
    "lm_head/kernel": ("lm_head.weight", _LINEAR),
}
_LLM_BLOCK = {
    "input_norm/scale": ("input_layernorm.weight", _SAME),
    "post_norm/scale": ("post_attention_layernorm.weight", _SAME),
    **{f"attn/{x}/kernel": (f"self_attn.{x}_proj.weight", _LINEAR) for x in "qkvo"},
    **{f"attn/{x}/bias": (f"self_attn.{x}_proj.bias", _SAME) for x in "qkv"},
    **{f"attn/{x}_norm/scale": (f"self_attn.{x}_norm.weight", _SAME) for x in "qk"},
    **{f"mlp/{x}/kernel": (f"mlp.{x}_proj.weight", _LINEAR) for x in ("gate", "up", "down")},
}


def _norm_rows(path: str, name: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {f"{path}/scale": (f"{name}.weight", _SAME), f"{path}/bias": (f"{name}.bias", _SAME)}


def _linear_rows(path: str, name: str, axes: tuple[int, ...] = _LINEAR) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {f"{path}/kernel": (f"{name}.weight", axes), f"{path}/bias": (f"{name}.bias", _SAME)}


def _attention_rows(path: str, name: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    rows = {}
    for ours, theirs in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("o", "out_proj")):
        rows |= _linear_rows(f"{path}/{ours}", f"{name}.{theirs}")
    return rows


_MLP_ROWS = _linear_rows("mlp/fc1", "fc1") | _linear_rows("mlp/fc2", "fc2")
_ENCODER_TOP = {
    **_linear_rows("conv1", "model.encoder.conv1", _CONV),
    **_linear_rows("conv2", "model.encoder.conv2", _CONV),
    "positions": ("model.encoder.embed_positions.weight", _SAME),
    **_norm_rows("final_norm", "model.encoder.layer_norm"),
}
_ENCODER_BLOCK = {
    **_norm_rows("attn_norm", "self_attn_layer_norm"),
    **_attention_rows("attn", "self_attn"),
    **_norm_rows("mlp_norm", "final_layer_norm"),
    **_MLP_ROWS,
}
_DECODER_TOP = {
    "embed/embedding": ("model.decoder.embed_tokens.weight", _SAME),
    "positions": ("model.decoder.embed_positions.weight", _SAME),
    **_norm_rows("final_norm", "model.decoder.layer_norm"),
}
_DECODER_BLOCK = {
    **_norm_rows("self_norm", "self_attn_layer_norm"),
    **_attention_rows("self_attn", "self_attn"),
    **_norm_rows("cross_norm", "encoder_attn_layer_norm"),
    **_attention_rows("cross_attn", "encoder_attn"),
    **_norm_rows("mlp_norm", "final_layer_norm"),
    **_MLP_ROWS,
}

# Keys that may be in a file and carry nothing that the model lacks.
_IGNORED_ALWAYS = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)  # recomputed from the config
_IGNORED_IN_AURA = (r".*\.lora_[AB]", r"audio_embedder\..*")  # not the LLM's
_IGNORED_TIED = (r"(?:.*\.)?lm_head\.weight",)  # the config says that it is the embedding
_IGNORED_BY_ENCODER = (r"model\.decoder\..*", r"proj_out\.weight")  # the other half
_IGNORED_BY_DECODER = (r"model\.encoder\..*", r"proj_out\.weight")  # the other half; the head is always tied


@dataclasses.dataclass(frozen=True)
class Source:
    """What one leaf is made of.

    Attributes:
      keys: Hugging Face keys; one per block, in order, if the leaf is a stack.
      stacked: the leaf's axis 0 runs over `keys`; otherwise there is one key.
      axes: our block's axis i is the stored tensor's axis axes[i]; empty for the same order.
    """

    keys: tuple[str, ...]
    stacked: bool
    axes: tuple[int, ...]

    def stored_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of each stored tensor, for a leaf of `shape`."""
        return self.to_stored(tuple(shape)[1:] if self.stacked else tuple(shape))

    def to_stored(self, dims: tuple) -> tuple:
        """Puts values given per axis of our block into the order of the stored axes."""
        return tuple(dims[self.axes.index(i)] for i in range(len(dims))) if self.axes else dims


def load_llm_config(directory: str | Path) -> LLMConfig:
    """Reads the shape of a decoder LLM; in an `hf` export of ours, of the one inside.

    Raises:
      UserError: no readable config.json, or a model that is not supported.
    """
    return _load_config(directory, lambda values: LLMConfig.from_hf(_inside(values)))


def load_whisper_config(directory: str | Path) -> WhisperConfig:
    """Reads the shape of a Whisper.

    Raises:
      UserError: no readable config.json, or another model.
    """
    return _load_config(directory, WhisperConfig.from_hf)


def load_llm(
    directory: str | Path,
    config: LLMConfig,
    *,
    n_adapted: int,
    dtype: Any,
    int8: bool = False,
    sharding: Sharding | None = None,
) -> dict:
    """Reads an LLM's `params`.

    Args:
      directory: a Hugging Face directory.
      n_adapted: blocks that go to `adapted`; the rest goes to `plain`.
      dtype: of the leaves; the files may hold float32, float16 or bfloat16.
      int8: kernels of linears are quantised to int8, with a float32 `kernel_scale` for each output beside them. For
        its scales a host reads the whole of every block that it holds a part of.
      sharding: (path, shape) -> jax Sharding of that leaf; None: everything on the first local device.

    Returns:
      The nested dictionary that `models.llm.LLM` takes.

    Raises:
      UserError: keys, shapes or dtypes that do not fit the config, or a damaged or missing file.
    """
    expected = llm_shapes(config, n_adapted)
    prefix = AURA_LLM if is_aura(Path(directory)) else ""
    ignored = _IGNORED_ALWAYS + (_IGNORED_TIED if config.tied else ()) + (_IGNORED_IN_AURA if prefix else ())
    sources = llm_sources(expected, n_adapted, prefix)
    return _load(Path(directory), expected, sources, ignored, dtype, sharding, int8)


def load_whisper_encoder(
    directory: str | Path, config: WhisperConfig, *, dtype: Any, sharding: Sharding | None = None
) -> dict:
    """Reads the `params` of `models.whisper.WhisperEncoder`; see `load_llm`."""
    expected = _shapes(WhisperEncoder(config), jnp.zeros((1, 2, config.n_mels)))
    sources = _sources(expected, _ENCODER_TOP, _ENCODER_BLOCK, {"blocks": ("model.encoder.layers", 0)})
    return _load(Path(directory), expected, sources, _IGNORED_BY_ENCODER, dtype, sharding)


def load_whisper_decoder(
    directory: str | Path, config: WhisperConfig, *, dtype: Any, sharding: Sharding | None = None
) -> dict:
    """Reads the `params` of `models.whisper.WhisperDecoder`; see `load_llm`."""
    expected = _shapes(WhisperDecoder(config), jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1, config.width)))
    sources = _sources(expected, _DECODER_TOP, _DECODER_BLOCK, {"blocks": ("model.decoder.layers", 0)})
    return _load(Path(directory), expected, sources, _IGNORED_BY_DECODER, dtype, sharding)


def llm_sources(shapes: Mapping[str, tuple[int, ...]], n_adapted: int, prefix: str = "") -> dict[str, Source]:
    """Returns for each path of an LLM's `params` which Hugging Face keys it is made of.

    Args:
      shapes: path -> shape of the leaf.
      n_adapted: blocks in `adapted`.
      prefix: of every key: that of an LLM inside another model.
    """
    stacks = {"adapted": (f"{prefix}model.layers", 0), "plain": (f"{prefix}model.layers", n_adapted)}
    top = {path: (f"{prefix}{name}", axes) for path, (name, axes) in _LLM_TOP.items()}
    return _sources(shapes, top, _LLM_BLOCK, stacks)


def _sources(
    shapes: Mapping[str, tuple[int, ...]],
    top: Mapping[str, tuple[str, tuple[int, ...]]],
    block: Mapping[str, tuple[str, tuple[int, ...]]],
    stacks: Mapping[str, tuple[str, int]],
) -> dict[str, Source]:
    """Looks every path up in its table; `stacks`: root of a stack -> (prefix of its keys, index of its first block)."""
    sources = {}
    for path, shape in shapes.items():
        root, _, rest = path.partition("/")
        if root in stacks:
            (prefix, first), (name, axes) = stacks[root], block[rest]
            keys = tuple(f"{prefix}.{i}.{name}" for i in range(first, first + shape[0]))
            sources[path] = Source(keys, True, axes)
        else:
            name, axes = top[path]
            sources[path] = Source((name,), False, axes)
    return sources


def _shapes(module: Any, *args: Any, method: Any = None) -> dict[str, tuple[int, ...]]:
    """Path -> shape of a module's parameters, without computing any."""
    rngs = {"params": jax.random.key(0), "lora": jax.random.key(0)}
    variables = jax.eval_shape(lambda: module.init(rngs, *args, method=method))
    return {path: leaf.shape for path, leaf in flatten(variables["params"]).items()}


def llm_shapes(config: LLMConfig, n_adapted: int) -> dict[str, tuple[int, ...]]:
    """Returns path -> shape of an LLM's `params`, of which the first `n_adapted` blocks are in `adapted`."""

    def touch_everything(llm: LLM, tokens_BxT: jax.Array) -> jax.Array:
        ctx = Context(tokens_BxT, tokens_BxT + 1, tokens_BxT + 1, tokens_BxT + 1)
        return llm.logits(llm(llm.embed(tokens_BxT), ctx)[0])

    # Only the split into two stacks matters here; the adapters are another collection.
    lora = LoRAConfig(n_blocks=n_adapted, rank=1, alpha=1.0) if n_adapted else None
    return _shapes(LLM(config, lora), jnp.zeros((1, 1), jnp.int32), method=touch_everything)


def is_aura(directory: Path) -> bool:
    """Whether this is an LLM inside one of our own `hf` exports."""
    return read_json(directory / "config.json", _MEND_CONFIG).get("model_type") == AURA


def text_config(directory: Path) -> dict[str, Any]:
    """Returns the config.json of an LLM; in an `hf` export of ours, of the one inside."""
    return _load_config(directory, _inside)


def _inside(values: Mapping[str, Any]) -> Any:
    return values["text_config"] if values.get("model_type") == AURA else values


def read_json(file: Path, mend: str) -> dict[str, Any]:
    """Reads an object of a Hugging Face directory.

    Args:
      mend: what to do if it is not there.

    Raises:
      UserError: it is not there, or no JSON object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}): {mend}") from error
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error}): copy or fetch it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{file}: not a JSON object: copy or fetch it again")
    return value


def read_tensors(file: Path, wanted: Callable[[str], bool] = lambda key: True) -> dict[str, np.ndarray]:
    """Reads the tensors of a safetensors file whose keys are wanted.

    Raises:
      UserError: it is not there, or damaged.
    """
    with _opened(file) as handle:
        return {key: handle.get_tensor(key) for key in handle.keys() if wanted(key)}  # noqa: SIM118


def _load_config(directory: str | Path, read: Callable[[Mapping[str, Any]], Any]) -> Any:
    file = Path(directory) / "config.json"
    content = read_json(file, _MEND_CONFIG)
    try:
        return read(content)
    except KeyError as error:
        raise UserError(f"{file}: has no {error.args[0]!r}: it is not the config of a model of this kind") from error
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


def _load(
    directory: Path,
    expected: Mapping[str, tuple[int, ...]],
    sources: Mapping[str, Source],
    ignored: Sequence[str],
    dtype: Any,
    sharding: Sharding | None,
    int8: bool = False,
) -> dict:
    if sharding is None:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        sharding = lambda path, shape: device
    leaves: dict[str, jax.Array] = {}
    with contextlib.ExitStack() as stack:
        stored = _open(directory, stack)
        _check_keys(directory, stored, sources, ignored)
        _check_tensors(directory, stored, expected, sources)
        for path, shape in expected.items():
            source = sources[path]
            parts = {path: (shape, np.dtype(dtype), functools.partial(_read, stored, source))}
            if int8 and path.endswith("/kernel"):
                parts = _int8_parts(stored, source, path, shape)
            for name, (dims, kind, read) in parts.items():
                reader = _reader(read, source, dims, kind)
                leaves[name] = jax.make_array_from_callback(dims, sharding(name, dims), reader)
    return unflatten(leaves)


def weight_files(directory: Path) -> list[Path]:
    """Returns the safetensors files of a directory: one, or those that its index names.

    Raises:
      UserError: there are none, the index is damaged, or a file that it names is missing.
    """
    index = directory / INDEX
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    if not index.is_file():
        hint = " (pytorch_model.bin is not read: save it again with safetensors)"
        other = hint if any(directory.glob("pytorch_model*.bin")) else ""
        raise UserError(f"{directory}: no {SINGLE} and no {INDEX}: name a directory with weights{other}")
    content = read_json(index, "copy or fetch it again")
    try:
        names = sorted(set(content["weight_map"].values()))
    except (KeyError, AttributeError) as error:
        raise UserError(f"{index}: not a safetensors index ({error}): copy or fetch it again") from error
    for name in names:
        if not (directory / name).is_file():
            raise UserError(f"{directory / name}: named in {INDEX}, but missing: copy or fetch it again")
    return [directory / name for name in names]


def _open(directory: Path, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Returns key -> safetensors slice, of all the directory's files."""
    stored = {}
    for file in weight_files(directory):
        handle = stack.enter_context(_opened(file))
        stored |= {key: handle.get_slice(key) for key in handle.keys()}  # noqa: SIM118 (the handle is no mapping)
    return stored


def _opened(file: Path) -> safe_open:
    try:
        return safe_open(file, "np")
    except FileNotFoundError as error:
        raise UserError(f"{file}: not there: copy or fetch it again") from error
    except (SafetensorError, OSError) as error:
        size = file.stat().st_size
        raise UserError(f"{file}: truncated or damaged ({size} bytes; {error}): copy or fetch it again") from error


def _check_keys(
    directory: Path, stored: Mapping[str, Any], sources: Mapping[str, Source], ignored: Sequence[str]
) -> None:
    wanted = {key for source in sources.values() for key in source.keys}
    missing = sorted(wanted - stored.keys())
    unknown = sorted(k for k in stored.keys() - wanted if not any(re.fullmatch(p, k) for p in ignored))
    parts = [f"lacks {listed(missing)}"] if missing else []
    parts += [f"has keys that the model lacks: {listed(unknown)}"] if unknown else []
    if parts:
        raise UserError(f"{directory}: the weights do not fit config.json: it {' and '.join(parts)}")


def _check_tensors(
    directory: Path, stored: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]], sources: Mapping[str, Source]
) -> None:
    wrong = []
    for path, source in sources.items():
        shape = source.stored_shape(expected[path])
        for key in source.keys:
            found = tuple(stored[key].get_shape())
            if found != shape:
                wrong.append(f"{key} is {list(found)}, expected {list(shape)}")
            elif stored[key].get_dtype() not in _FLOATS:
                wrong.append(f"{key} is {stored[key].get_dtype()}, expected one of {', '.join(_FLOATS)}")
    if wrong:
        raise UserError(f"{directory}: the weights do not fit config.json: {listed(wrong, '; ')}")


def _read(stored: Mapping[str, Any], source: Source, key: str, slices: tuple[slice, ...]) -> np.ndarray:
    """Returns a part of one block, in the order of our axes."""
    value = stored[key][source.to_stored(slices)]
    return value.transpose(source.axes) if source.axes else value


def _int8_parts(stored: Mapping[str, Any], source: Source, path: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """Returns of a kernel's leaf and that of its scales: path -> (shape, dtype, reader of a part of a block)."""

    @functools.cache
    def scale(key: str) -> np.ndarray:
        return quantiser.scales(lambda columns: _read(stored, source, key, (slice(None), columns)), shape[-1])

    def kernel(key: str, slices: tuple[slice, ...]) -> np.ndarray:
        return quantiser.quantise(_read(stored, source, key, slices), scale(key)[slices[-1]])

    scales = (*shape[:-2], shape[-1])
    return {
        path: (shape, np.dtype(np.int8), kernel),
        f"{path}_scale": (scales, np.dtype(np.float32), lambda key, slices: scale(key)[slices[-1]]),
    }


def _reader(
    read_block: Callable[[str, tuple[slice, ...]], np.ndarray],
    source: Source,
    shape: tuple[int, ...],
    dtype: np.dtype,
) -> Callable[[Any], np.ndarray]:
    """Returns the callback that reads one device's part of a leaf."""
    parts: dict[tuple, np.ndarray] = {}  # devices that hold the same part share one reading of it

    def read(index: Any) -> np.ndarray:
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
        if bounds not in parts:
            slices = tuple(slice(*b) for b in bounds)
            part = np.empty([stop - start for start, stop in bounds], dtype)
            if source.stacked:
                for row, key in enumerate(source.keys[slices[0]]):
                    part[row] = read_block(key, slices[1:])
            else:
                part[...] = read_block(source.keys[0], slices)
            parts[bounds] = part
        return parts[bounds]

    return read


def listed(items: Sequence[str], separator: str = ", ") -> str:
    """Returns the items in one line, the first few of many."""
    more = f"{separator}and {len(items) - _MAX_LISTED} more" if len(items) > _MAX_LISTED else ""
    return separator.join(items[:_MAX_LISTED]) + more
