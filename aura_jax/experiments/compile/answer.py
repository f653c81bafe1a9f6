"""`aura-jax compile --program answer`: the programs that answer, compiled for a slice of TPUs.

There are two, as in `infer.generate`: prefill, from waveforms to first tokens, and the decode loop. Their arguments are
abstract: shapes and shardings as a run has them, no weights.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from aura_jax import machine, sharding, system
from aura_jax.audio.features import SAMPLE_RATE
from aura_jax.config import Config
from aura_jax.experiments.compile import chips, facts, hlo, program, roofline, shapes
from aura_jax.infer import generate
from aura_jax.infer.prompting import Inputs, Request, lay_out, tokenise
from aura_jax.infer.reading import Program
from aura_jax.infer.sampling import Choice
from aura_jax.models.lora import as_computed

_PREFILL, _DECODE = "prefill", "decode"


@dataclasses.dataclass(frozen=True)
class Answering:
    """A batch to answer: `eval.batch_size` clips of `data.max_seconds`, each by up to `eval.max_new_tokens`.

    Attributes:
      variables: `params` and, unless merged, `lora`, as ShapeDtypeStructs with shardings.
      program: what is static.
    """

    variables: dict[str, Any]
    inputs: Inputs
    program: Program
    stop_ids: np.ndarray

    @classmethod
    def of(cls, built: system.System, mesh: Mesh, merged: bool) -> "Answering":
        """
        Raises:
          UserError: parameters do not divide over the mesh.
        """
        variables = system.abstract_variables(built)
        variables = {name: variables[name] for name in ("params", "lora") if name in variables}
        if merged:
            del variables["lora"]
        if "lora" in variables:
            variables["lora"] = jax.eval_shape(lambda x: as_computed(x, built.model.dtype), variables["lora"])
        placed = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
        variables = jax.tree.map(placed, variables, sharding.tree_shardings(variables, mesh))
        generator = generate.Generator(built, variables)
        multiple = math.prod(mesh.shape[axis] for axis in sharding.BATCH_AXES)
        n_rows = -(-generator.batch_size // multiple) * multiple
        clip = np.zeros(round(built.config.data.max_seconds * SAMPLE_RATE), np.float32)
        texts = [[0] * program.PREFIX_TOKENS, [0] * program.SUFFIX_TOKENS]
        prompt = dataclasses.replace(tokenise(built, 0, Request(clip)), texts=texts)
        return cls(
            variables,
            lay_out(built, [prompt] * n_rows, n_rows),
            dataclasses.replace(generator.program(is_spoken=True, n_new=generator.max_new_tokens), mesh=mesh),
            np.asarray(built.chat.stop_ids, np.int32),
        )

    def lower_prefill(self) -> Any:
        """Returns the prefill, ready to be compiled."""
        return generate._prefill.lower(self.variables, self.inputs, self.stop_ids, self.program, Choice())

    def lower_decode(self, prefill: Any, outputs: Any) -> tuple[Any, Any]:
        """Returns the decode loop, ready to be compiled, and the cache that it goes on from.

        Args:
          prefill: compiled; it decides how the cache lies on the chips.
          outputs: shapes of what it returns.
        """
        placed = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
        cache, state, prompted = jax.tree.map(placed, outputs, prefill.output_shardings)
        finished_B, n_until = np.zeros(state.finished_B.shape, bool), np.int32(1)
        lowered = generate._decode.lower(
            self.variables, cache, state, prompted, self.stop_ids, finished_B, n_until, self.program
        )
        return lowered, cache


def main(
    config: Config, topology_name: str, output: Path, merged: bool = False, program_text: Path | None = None
) -> int:
    """Compiles both programs for one slice, writes `output`, prints a table, and returns the exit code.

    Args:
      merged: the adapters are folded into the LLM.
      program_text: where the compiled programs' HLO goes; each has its name before the suffix.

    Raises:
      UserError: an unknown slice, a mesh that does not divide it or the parameters, or no libtpu.
    """
    topology = chips.topology(topology_name)
    found = measure(config, topology, merged, program_text)
    output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table(found))
    return 0 if found["fits"] else facts.DOES_NOT_FIT


def measure(
    config: Config, topology: chips.Topology, merged: bool = False, program_text: Path | None = None
) -> dict[str, Any]:
    """Returns all that is known of the answering programs on a slice."""
    facts.run_nothing()
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices=topology.devices)
    with shapes.build(config) as built:
        made = Answering.of(built, mesh, merged)
    llm = built.model.config.llm
    n_rows, n_columns = made.inputs.columns.tokens_BxT.shape
    found: dict[str, Any] = {
        "topology": topology.name,
        "chips": len(topology.devices),
        "chip": facts.of_chip(topology.chip),
        "llm": config.model.llm,
        "held_in": config.model.param_dtype,
        "adapters": "merged" if merged else "separate",
        "mesh": dict(mesh.shape),
        "batch": {
            "rows": n_rows,
            "prompt_columns": n_columns,
            "seconds_of_a_clip": config.data.max_seconds,
            "new_tokens": made.program.n_new,
        },
        "kv_heads": {"of_the_llm": llm.n_kv_heads, "split": llm.n_kv_heads % mesh.shape["tensor"] == 0},
        "environment": machine.versions(facts.PACKAGES),
        "fits": False,
    }
    facts.say(
        f"compiling {_PREFILL} of {config.model.llm} for {found['chips']} x {topology.chip.name}: a minute or two"
    )
    lowered = made.lower_prefill()
    prefill, reason = facts.compile_or_reason(lowered)
    if prefill is None:
        return found | {_PREFILL: _refused(reason, topology.chip)}
    found[_PREFILL] = _prefilling(made, prefill, topology, _text(prefill, program_text, _PREFILL))
    facts.say(f"compiling {_DECODE}")
    lowered, cache = made.lower_decode(prefill, lowered.out_info)
    decode, reason = facts.compile_or_reason(lowered)
    if decode is None:
        return found | {_DECODE: _refused(reason, topology.chip)}
    found[_DECODE] = _decoding(made, decode, cache, topology, _text(decode, program_text, _DECODE))
    return found | {"fits": True}


def _text(compiled: Any, program_text: Path | None, name: str) -> str:
    text = compiled.as_text()
    if program_text is not None:
        program_text.with_suffix(f".{name}{program_text.suffix}").write_text(text, encoding="utf-8")
    return text


def _refused(reason: str, chip: chips.Chip) -> dict[str, Any]:
    out = facts.refusal(reason, chip)
    if out["compiles"]:
        out["mend"] = "try a larger mesh.tensor, a smaller eval.batch_size, or more or larger chips"
    return out


def _prefilling(made: Answering, compiled: Any, topology: chips.Topology, text: str) -> dict[str, Any]:
    module = hlo.Module(text)
    collectives = module.collectives()
    n_rows, n_columns = made.inputs.columns.tokens_BxT.shape
    # What audio takes before the LLM is little beside it.
    operations = 2.0 * sum(x.size for x in _kernels(made.variables)) * n_rows * n_columns
    return {
        "memory": facts.memory(compiled.memory_analysis(), topology.chip),
        "collectives": facts.by_kind(collectives),
        "roofline": _roofline(topology, operations, module.hbm_bytes(), collectives),
    }


def _decoding(made: Answering, compiled: Any, cache: Any, topology: chips.Topology, text: str) -> dict[str, Any]:
    whole, once = hlo.Module(text), hlo.Module(text, passes=0)
    before = once.collectives()
    token = whole.collectives()
    for one in before:
        token.remove(one)
    memory = facts.memory(compiled.memory_analysis(), topology.chip)
    cache_bytes = sum(map(_bytes_of_a_chip, jax.tree.leaves(cache)))
    weights = sum(map(_bytes_of_a_chip, _kernels(made.variables)))
    hbm_bytes = whole.hbm_bytes() - once.hbm_bytes()
    operations = 2.0 * sum(x.size for x in _kernels(made.variables)) * made.inputs.columns.tokens_BxT.shape[0]
    line = _roofline(topology, operations, hbm_bytes, token)
    # To read all of both once. What is small the compiler may keep on the chip while the loop runs.
    least = (weights + cache_bytes) / topology.chip.hbm_bandwidth
    return {
        "memory": memory,
        "cache": {"bytes": cache_bytes, "aliased": memory["alias"], "sharding": str(cache.k_LxBxSxGxK.sharding.spec)},
        "before_the_loop": {"hbm_bytes": once.hbm_bytes(), "collectives": facts.by_kind(before)},
        "token": {
            "collectives": facts.by_kind(token),
            "gathers": [facts.described(one) for one in token if one.kind != "all-reduce"],
            "weights": weights,
            "weights_and_cache_seconds": least,
            "roofline": line,
        },
        "loops_of_unknown_length": whole.unknown_trips,
    }


def _roofline(
    topology: chips.Topology, operations: float, hbm_bytes: float, collectives: Sequence[hlo.Collective]
) -> dict[str, Any]:
    link_bytes = sum(one.link_bytes for one in collectives)
    line = roofline.roofline(topology.chip, len(topology.devices), operations, operations, hbm_bytes, link_bytes)
    return {
        "seconds": line.seconds,
        "at_best": line.step,
        "bound": line.bound,
        "hbm_bytes": hbm_bytes,
        "link_bytes": link_bytes,
    }


def _kernels(variables: Mapping[str, Any]) -> list[Any]:
    """Returns the matrices that every token is multiplied by: those of blocks and head, and the adapters."""
    flat = sharding.flatten(variables)
    is_tied = not any(path.startswith("params/llm/lm_head/") for path in flat)
    head = "params/llm/embed/embedding" if is_tied else "params/llm/lm_head/kernel"
    of_blocks = ("params/llm/adapted/", "params/llm/plain/", "lora/")
    return [x for path, x in flat.items() if path == head or (path.startswith(of_blocks) and x.ndim == 3)]


def _bytes_of_a_chip(x: Any) -> float:
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


def table(found: Mapping[str, Any]) -> str:
    """Returns what `measure` found, for people."""
    gib = lambda n: f"{n / 2**30:.2f} GiB"
    batch = found["batch"]
    mesh = " x ".join(f"{axis} {n}" for axis, n in found["mesh"].items())
    lines = [
        f"{found['llm']} in {found['held_in']}, adapters {found['adapters']}, answers on {found['topology']} "
        f"({found['chips']} chips: {mesh})",
        f"  batch        {batch['rows']} rows of {batch['prompt_columns']} tokens, {batch['seconds_of_a_clip']:g} s of "
        f"them speech, and up to {batch['new_tokens']} new ones",
    ]
    for name in (_PREFILL, _DECODE):
        one = found.get(name, {})
        if "reason" in one:
            lines.append(f"  {name} does not compile or fit: {one['reason']} {one['mend']}")
        elif one:
            memory = one["memory"]
            parts = ", ".join(f"{part} {gib(memory[part])}" for part in ("argument", "temporary", "code"))
            lines.append(f"  {name:<12} {gib(memory['total'])} of {gib(memory['hbm'])} a chip: fits ({parts})")
    if not found["fits"]:
        return "\n".join(lines)
    prefill, decode = found[_PREFILL]["roofline"], found[_DECODE]
    token, line = decode["token"], decode["token"]["roofline"]
    before = decode["before_the_loop"]["hbm_bytes"] / found["chip"]["hbm_bandwidth"]
    heads = "its heads are split" if found["kv_heads"]["split"] else "every chip has all heads: mesh.tensor cuts none"
    lines += [
        f"  cache        {gib(decode['cache']['bytes'])} a chip, {gib(decode['cache']['aliased'])} aliased; {heads}",
        f"  first token  {1e3 * prefill['at_best']:.2f} ms at best, bound by {prefill['bound']}",
        f"  a token      {1e3 * line['at_best']:.2f} ms at best, bound by {line['bound']}: {gib(line['hbm_bytes'])} of "
        f"HBM; to read weights and cache once takes {1e3 * token['weights_and_cache_seconds']:.2f} ms",
        f"  before it    {1e3 * before:.2f} ms a call, to lay weights out as the loop reads them",
    ]
    for kind, values in token["collectives"].items():
        lines.append(f"  {kind:<20} {values['count']:>6.0f} a token, {values['bytes'] / 1e3:>8.1f} kB")
    return "\n".join([*lines, *(f"  gathered: {one}" for one in token["gathers"])])
