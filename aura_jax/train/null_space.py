"""LoRA confined to the null space of text: it learns from directions of its inputs that ordinary text hardly uses.

After Adam-NSCL (arXiv 2103.07113), which protects earlier tasks by projecting updates on the null space of their
features' covariance. Here the earlier task is text, and what is confined is A alone: the delta x A B of a text token is
then small whatever B learns, and the adapter remains an ordinary one that can be merged.

Dimensions: N adapted blocks, I width of a linear's input, C directions that are left, r rank, M rows of L tokens.
"""

import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from aura_jax import hosts, sharding
from aura_jax.models.speech_llm import SpeechLLMConfig, text_context
from aura_jax.system import System

# Linears that read the same input share its moments and its basis.
_INPUT = {"q": "qkv", "k": "qkv", "v": "qkv", "o": "o", "gate": "gate_up", "up": "gate_up", "down": "down"}


def bases(system: System, params: dict, rows: Iterable[np.ndarray], energy: float, mesh: Mesh) -> dict[str, np.ndarray]:
    """Returns an orthonormal basis [N, I, C] for every input that LoRA reads: {"qkv": ..., "down": ...}.

    While it measures, it holds N I^2 floats for each of the four inputs of a block.

    Args:
      params: the base LLM; text is read without adapters.
      rows: tokens [M, L] of ordinary text, all of one shape.
      energy: the share of the text inputs' energy that may lie in the basis, as far as that leaves as many directions
        as A has columns. In a block that needs fewer directions than C, the basis is filled up with zeros.
    """
    moments = jax.jit(functools.partial(_moments, system), out_shardings=sharding.replicated(mesh))
    total: Any = None
    for tokens_MxL in rows:
        found = moments(params, tokens_MxL)
        total = found if total is None else jax.tree.map(jnp.add, total, found)
    lora = system.model.config.lora
    assert total is not None and lora is not None
    found = {path.split("/")[-1]: np.asarray(x) for path, x in sharding.flatten(total).items()}
    read = input_widths(system.model.config)
    # Of one host: a decomposition need not be the same to the bit everywhere.
    trailing = lambda: {name: _trailing(found[f"{name}_input"], energy, lora.rank) for name in read}
    return hosts.arrays_of_first(trailing)


def input_widths(config: SpeechLLMConfig) -> dict[str, int]:
    """Returns the width I of every input that LoRA reads."""
    assert config.lora is not None
    llm = config.llm
    widths = {"qkv": llm.width, "o": llm.n_heads * llm.head_width, "gate_up": llm.width, "down": llm.mlp_width}
    return {name: widths[name] for name in sorted({_INPUT[target] for target in config.lora.targets})}


def _moments(system: System, params: dict, tokens_MxL: jax.Array) -> Any:
    model: Any = system.model
    position_MxL = jnp.broadcast_to(jnp.arange(tokens_MxL.shape[1]), tokens_MxL.shape)
    ctx = text_context(position_MxL, jnp.ones_like(tokens_MxL))
    x_MxLxD = model.apply({"params": params}, tokens_MxL, method="embed_text")
    _, out = model.apply({"params": params}, x_MxLxD, ctx, method="adapted_blocks", mutable=["moments"])
    return out["moments"]


def _trailing(moment_NxIxI: np.ndarray, energy: float, at_least: int) -> np.ndarray:
    """Returns the eigenvectors [N, I, C] of the smallest eigenvalues that together hold `energy` of each trace."""
    value_NxI, vector_NxIxI = np.linalg.eigh(moment_NxIxI)  # ascending
    share_NxI = np.cumsum(np.maximum(value_NxI, 0), -1)
    n_N = np.maximum((share_NxI <= energy * share_NxI[:, -1:]).sum(-1), min(at_least, value_NxI.shape[1]))
    kept_NxI = np.arange(value_NxI.shape[1]) < n_N[:, None]
    return (vector_NxIxI * kept_NxI[:, None])[:, :, : n_N.max()]


def confine(leaves: Mapping[str, jax.Array], bases: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Projects every A [N, I, r], by its path, on the basis of its input; other leaves stay as they are."""

    def project(path: str, leaf: jax.Array) -> jax.Array:
        adapter = re.fullmatch(r"lora/.*/(\w+)/a", path)
        if adapter is None or not bases:
            return leaf
        basis_NxIxC = bases[_INPUT[adapter[1]]]
        return jnp.einsum("nic,ncr->nir", basis_NxIxC, jnp.einsum("nic,nir->ncr", basis_NxIxC, leaf))

    return {path: project(path, leaf) for path, leaf in leaves.items()}
