"""What is known of a program and of a compiled one, as results say it."""

import collections
import re
import sys
from collections.abc import Sequence
from typing import Any

import jax

from aura_jax.experiments.compile import hlo
from aura_jax.experiments.compile.chips import Chip

DOES_NOT_FIT = 1  # the exit code: it does not compile, or not fit; results are written all the same
PACKAGES = ("aura-jax", "jax", "libtpu", "flax", "optax")
_SIZES = {"": 1.0, "K": 2.0**10, "M": 2.0**20, "G": 2.0**30, "T": 2.0**40}


def of_chip(chip: Chip) -> dict[str, Any]:
    """Returns the published figures of a chip."""
    figures = ("name", "peak", "hbm", "hbm_bandwidth", "link_bandwidth", "source")
    return {name: getattr(chip, name) for name in figures}


def memory(analysis: Any, chip: Chip) -> dict[str, float]:
    """Returns bytes of a chip; what is donated is counted once."""
    out = {
        "argument": analysis.argument_size_in_bytes,
        "output": analysis.output_size_in_bytes,
        "temporary": analysis.temp_size_in_bytes,
        "code": analysis.generated_code_size_in_bytes,
        "alias": analysis.alias_size_in_bytes,
    }
    return out | {"total": sum(out.values()) - 2 * out["alias"], "hbm": chip.hbm}


def by_kind(collectives: Sequence[hlo.Collective]) -> dict[str, dict[str, float]]:
    """Returns of each kind how often it runs, bytes of the arrays, and bytes that a chip sends."""
    kinds: dict[str, dict[str, float]] = {}
    for one in collectives:
        kind = kinds.setdefault(one.kind, collections.defaultdict(float))
        kind["count"] += one.times
        kind["bytes"] += one.times * one.n_bytes
        kind["link_bytes"] += one.link_bytes
    return {kind: dict(values) for kind, values in sorted(kinds.items())}


def described(one: hlo.Collective) -> str:
    """Returns a collective in a line: how often it runs, what it leaves, and where in the source it is from."""
    arrays = " ".join(f"{array.dtype}{list(array.dims)}" for array in one.arrays)
    return f"{one.times} x {one.kind} {arrays}: {one.scope}"


def run_nothing() -> None:
    """Has jax only compile, on whatever this machine has."""
    jax.config.update("jax_platforms", "cpu")
    # A program for chips that are not there cannot be read back.
    jax.config.update("jax_enable_compilation_cache", False)


def compile_or_reason(lowered: Any) -> tuple[Any, str]:
    """Returns the compiled program, or None and in one line why there is none."""
    try:
        return lowered.compile(), ""
    except jax.errors.JaxRuntimeError as error:
        return None, " ".join(str(error).split())


def refusal(reason: str, chip: Chip) -> dict[str, Any]:
    """Returns what a refusal says: whether HBM is too small for what does compile, and how much of it is missing."""
    size = r"([\d.]+)([KMGT]?)i?B?"
    patterns = (rf"Used {size} of {size} hbm", rf"\({size}\) exceeds available HBM \({size}\)")
    match = next((m for m in (re.search(p, reason) for p in patterns) if m), None)
    out: dict[str, Any] = {"compiles": match is not None, "reason": reason[:600], "fits": False, "mend": ""}
    if match is not None:
        needs, has = (float(match[i]) * _SIZES[match[i + 1]] for i in (1, 3))
        out["memory"] = {"needs_at_least": needs, "usable": has, "missing": needs - has, "hbm": chip.hbm}
    return out


def say(text: str) -> None:
    """Tells people what is being done."""
    print(text, file=sys.stderr, flush=True)
