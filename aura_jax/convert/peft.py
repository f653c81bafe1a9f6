"""PEFT's LoRA adapters, read and written without PEFT: adapter_config.json and adapter_model.safetensors.

PEFT keeps a pair of matrices for each adapted linear, A [r, in] and B [out, r]; here they are stacked over the first N
blocks, A [N, in, r] and B [N, r, out]. Where PEFT adapts only some of these blocks, or only some of a block's linears,
both matrices of the others are zeros here; a pair of zeros is therefore left out again on the way back.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from aura_jax.convert import hf
from aura_jax.errors import UserError
from aura_jax.models.llm import LLMConfig
from aura_jax.models.lora import TARGETS, LoRAConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every key of an adapter on a causal LLM

_STACK = "llm/adapted"  # path of the adapted blocks in the collection `lora`
_KEY = re.compile(r"model\.layers\.(\d+)\.(self_attn|mlp)\.(\w+)_proj\.lora_([AB])(?:\.weight)?")

# Fields of PEFT's config that change what an adapter computes, and the values under which they do not.
_PLAIN = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),  # others change the base's weights as well
    **dict.fromkeys(
        (
            "fan_in_fan_out",
            "use_dora",
            "use_qalora",
            "use_bdlora",
            "lora_bias",
            "modules_to_save",
            "rank_pattern",
            "alpha_pattern",
            "layer_replication",
            "trainable_token_indices",
            "target_parameters",
            "alora_invocation_tokens",
            "arrow_config",
            "velora_config",
            "monteclora_config",
        ),
        (None, False, {}, []),
    ),
}


def module(target: str) -> str:
    """Returns the Hugging Face name of an adapted linear inside its block, such as self_attn.q_proj."""
    return f"{'self_attn' if target in 'qkvo' else 'mlp'}.{target}_proj"


def _path(target: str) -> str:
    return f"{_STACK}/{'attn' if target in 'qkvo' else 'mlp'}/{target}"


def to_tensors(lora: Mapping[str, Any], prefix: str, suffix: str, *, zeros: bool) -> dict[str, np.ndarray]:
    """Returns pairs of matrices of the collection `lora` by key: prefix, name of the linear, lora_A or lora_B, suffix.

    Args:
      lora: path below `lora` -> [N, in, r] or [N, r, out], float32.
      zeros: False leaves out blocks, and targets, whose A are all zeros: those that PEFT leaves alone.
    """
    targets = [target for target in TARGETS if f"{_path(target)}/a" in lora]
    pairs = {t: (np.asarray(lora[f"{_path(t)}/a"]), np.asarray(lora[f"{_path(t)}/b"])) for t in targets}
    present = lambda matrix: zeros or matrix.any()
    blocks = [i for i in range(len(next(iter(pairs.values()))[0])) if any(present(a[i]) for a, _ in pairs.values())]
    targets = [t for t in targets if present(pairs[t][0])]
    tensors = {}
    for i in blocks:
        for target in targets:
            a, b = pairs[target]
            key = f"{prefix}model.layers.{i}.{module(target)}"
            tensors[f"{key}.lora_A{suffix}"] = np.ascontiguousarray(a[i].T)
            tensors[f"{key}.lora_B{suffix}"] = np.ascontiguousarray(b[i].T)
    return tensors


def adapter_config(tensors: Mapping[str, np.ndarray], config: LoRAConfig, base: str) -> dict[str, Any]:
    """Returns the adapter_config.json that goes with `to_tensors`.

    Args:
      base: name of the LLM that the adapter is for.
    """
    found = [match for key in tensors if (match := _KEY.search(key))]
    alpha = int(config.alpha) if config.alpha == int(config.alpha) else config.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": alpha,
        "use_rslora": config.rslora,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": sorted({f"{match[3]}_proj" for match in found}),
        "layers_to_transform": sorted({int(match[1]) for match in found}),
        "layers_pattern": "layers",
    }


def from_tensors(tensors: Mapping[str, np.ndarray], llm: LLMConfig, where: Path) -> tuple[int, dict[str, np.ndarray]]:
    """Returns (rank, path below `lora` -> stacked float32 matrices) of `to_tensors`, whatever its prefix and suffix.

    Args:
      where: named in errors.

    Raises:
      UserError: keys that are no LoRA of a linear of the LLM, half pairs, shapes that do not fit it, or several ranks.
    """
    pairs: dict[tuple[int, str], dict[str, np.ndarray]] = {}
    unknown = []
    for key, tensor in tensors.items():
        match = _KEY.search(key)
        if match is None or match[3] not in TARGETS or f"{match[2]}.{match[3]}_proj" != module(match[3]):
            unknown.append(key)
        else:
            pairs.setdefault((int(match[1]), match[3]), {})[match[4]] = tensor
    if unknown:
        raise UserError(f"{where}: holds keys that are no LoRA of a linear of the LLM's blocks: {hf.listed(unknown)}")
    if not pairs:
        raise UserError(f"{where}: holds no adapter")
    half = [f"{module(t)} of block {i}" for (i, t), pair in pairs.items() if len(pair) < 2]
    if half:
        raise UserError(f"{where}: only one of lora_A and lora_B is there for {hf.listed(half)}")
    n_blocks, rank = 1 + max(i for i, _ in pairs), len(next(iter(pairs.values()))["A"])
    if n_blocks > llm.n_blocks:
        raise UserError(f"{where}: adapts block {n_blocks - 1}, but the LLM has {llm.n_blocks}: it is for another base")
    shapes = hf.llm_shapes(llm, n_blocks)
    wrong = []
    for (i, target), pair in sorted(pairs.items()):
        n_in, n_out = shapes[f"{_path(target).removeprefix('llm/')}/kernel"][1:]
        for half_name, expected in (("A", (rank, n_in)), ("B", (n_out, rank))):
            if pair[half_name].shape != expected:
                found = list(pair[half_name].shape)
                wrong.append(f"lora_{half_name} of {module(target)} in block {i} is {found}, expected {list(expected)}")
    if wrong:
        raise UserError(f"{where}: does not fit the LLM: {hf.listed(wrong, '; ')}")
    leaves = {}
    for target in sorted({target for _, target in pairs}, key=TARGETS.index):
        n_in, n_out = shapes[f"{_path(target).removeprefix('llm/')}/kernel"][1:]
        a, b = np.zeros((n_blocks, n_in, rank), np.float32), np.zeros((n_blocks, rank, n_out), np.float32)
        for i in range(n_blocks):
            if (i, target) in pairs:
                a[i], b[i] = pairs[i, target]["A"].T, pairs[i, target]["B"].T
        leaves |= {f"{_path(target)}/a": a, f"{_path(target)}/b": b}
    return rank, leaves


def load_adapter(directory: Path, llm: LLMConfig, scope: str) -> tuple[LoRAConfig, dict[str, np.ndarray]]:
    """Reads a PEFT adapter's directory: ours, or one that PEFT trained.

    Args:
      llm: the LLM that it is meant for.
      scope: of the result: PEFT's file does not say where an adapter acts.

    Returns:
      The LoRA configuration, and path below `lora` -> stacked float32 matrices.

    Raises:
      UserError: a missing or damaged file, a kind of adapter that LoRA here does not express, or one that does not fit
        the LLM.
    """
    config = load_config(directory)
    for name, values in _PLAIN.items():
        if name in config and config[name] not in values:
            raise UserError(f"{directory / CONFIG}: {name} {json.dumps(config[name])} is not supported here")
    tensors = hf.read_tensors(directory / WEIGHTS)
    rank, leaves = from_tensors(tensors, llm, directory / WEIGHTS)
    if rank != config.get("r"):
        raise UserError(f"{directory}: {CONFIG} says r = {config.get('r')}, but the tensors have rank {rank}")
    n_blocks = len(next(iter(leaves.values())))
    targets = tuple(target for target in TARGETS if f"{_path(target)}/a" in leaves)
    lora = LoRAConfig(n_blocks, rank, float(config["lora_alpha"]), bool(config.get("use_rslora")), targets, scope)
    return lora, leaves


def load_config(directory: Path) -> dict[str, Any]:
    """Reads adapter_config.json.

    Raises:
      UserError: it is not there, or not an adapter's.
    """
    config = hf.read_json(directory / CONFIG, "name a PEFT adapter's directory")
    missing = [name for name in ("r", "lora_alpha", "base_model_name_or_path") if name not in config]
    if missing:
        raise UserError(f"{directory / CONFIG}: has no {missing[0]!r}: it is not the config of a LoRA adapter")
    return config
