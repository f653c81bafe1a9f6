"""`aura-jax compile`: compiles a stage's step for a slice of TPUs, and writes what it needs and how fast it may be."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from aura_jax import machine, sharding
from aura_jax.audio.features import SAMPLE_RATE
from aura_jax.config import Config
from aura_jax.experiments.bench import flops
from aura_jax.experiments.compile import chips, facts, hlo, program, roofline, shapes


def main(config: Config, topology_name: str, output: Path, stage: str = "", program_text: Path | None = None) -> int:
    """Compiles for one slice, writes `output`, prints a table, and returns the exit code.

    Args:
      program_text: where the compiled program's HLO goes.

    Raises:
      UserError: an unknown slice or stage, a mesh or a batch that does not divide over it, or no libtpu.
    """
    topology = chips.topology(topology_name)
    found = measure(config, topology, stage, program_text)
    output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table(found))
    return 0 if found["fits"] else facts.DOES_NOT_FIT


def measure(
    config: Config, topology: chips.Topology, stage: str = "", program_text: Path | None = None
) -> dict[str, Any]:
    """Returns all that is known of a stage's step on a slice."""
    facts.run_nothing()
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices=topology.devices)
    with shapes.build(config) as built:
        made = program.make(built, mesh, stage)
        n_chips = len(topology.devices)
        facts.say(f"tracing stage {made.stage} of {config.model.llm}")
        started = time.perf_counter()
        with jax.set_mesh(mesh):
            lowered = made.step.lower(*made.arguments)
        traced = time.perf_counter()
        facts.say(f"compiling for {n_chips} x {topology.chip.name}: one to five minutes")
        compiled, reason = facts.compile_or_reason(lowered)
        seconds = {"trace": traced - started, "compile": time.perf_counter() - traced}
        found = {
            "topology": topology.name,
            "chips": n_chips,
            "chip": facts.of_chip(topology.chip),
            "llm": config.model.llm,
            "teacher": config.model.teacher,
            "stage": made.stage,
            "mesh": dict(mesh.shape),
            "batch": _batch(config, made, n_chips),
            "seconds": seconds,
            "environment": machine.versions(facts.PACKAGES),
        }
        vocab = built.model.config.llm.vocab
    if compiled is None:
        return found | _refused(config, reason, topology.chip, n_chips)
    text = compiled.as_text()
    if program_text is not None:
        program_text.write_text(text, encoding="utf-8")
    module = hlo.Module(text)
    collectives = module.collectives()
    found |= {"compiles": True, "reason": "", "fits": True, "mend": ""}
    found["memory"] = memory = facts.memory(compiled.memory_analysis(), topology.chip)
    found["donated"] = _donated(made.arguments[0], memory["alias"])
    sizes = _parameter_sizes(made.arguments, mesh.shape["tensor"])
    other = [one for one in collectives if any(math.prod(array.dims) not in sizes for array in one.arrays)]
    # Integers are no parameters, whatever their number: a table of embeddings that lies in pieces is asked for all ids.
    of_integers = [one for one in collectives if all(array.dtype in ("s32", "u32") for array in one.arrays)]
    found["collectives"] = {
        "kinds": facts.by_kind(collectives),
        "all_gathers_of_no_parameter": [
            facts.described(one) for one in other if one.kind == "all-gather" and one not in of_integers
        ],
        "all_gathers_of_integers": [facts.described(one) for one in of_integers if one.kind == "all-gather"],
        "on_logits": [facts.described(one) for one in other if any(vocab in array.dims for array in one.arrays)],
        "loops_of_unknown_length": module.unknown_trips,
    }
    return found | _speed(config, made, topology.chip, n_chips, module.hbm_bytes(), collectives)


def _batch(config: Config, made: program.Program, n_chips: int) -> dict[str, Any]:
    rows, columns = made.batch.tokens_BxT.shape
    _, clips, samples = made.batch.waveform_BxKxS.shape
    return {
        "layout": config.data.layout,
        "rows": rows,
        "columns": columns,
        "clips_of_a_row": clips,
        "seconds_of_a_clip": samples / SAMPLE_RATE,
        "targets_of_a_row": made.batch.target_id_BxR.shape[1],
        "text_rows": 0 if made.batch.text_tokens_MxL is None else made.batch.text_tokens_MxL.shape[0],
        "tokens": rows * columns,
        "tokens_of_a_chip": rows * columns / n_chips,
        "assumed": {
            "prefix_tokens": program.PREFIX_TOKENS,
            "suffix_tokens": program.SUFFIX_TOKENS,
            "response_tokens_a_second": program.TOKENS_PER_SECOND,
        },
    }


def _donated(state: Any, aliased: float) -> dict[str, float]:
    """Bytes of a chip: of the state, without the padding of its tiles, and how many are aliased, with it."""
    sizes = [math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(state)]
    return {"state": sum(sizes), "aliased": aliased}


def _parameter_sizes(arguments: Sequence[Any], tensor: int) -> set[int]:
    """Entries of every parameter, and of one block's part of it: whole, and split over the tensor axis."""
    leaves = jax.tree.leaves((arguments[0].trained, arguments[1]))
    sizes = {math.prod(dims) for x in leaves for dims in (x.shape, x.shape[1:])}
    return sizes | {size // tensor for size in sizes}


def _speed(
    config: Config,
    made: program.Program,
    chip: chips.Chip,
    n_chips: int,
    hbm_bytes: float,
    collectives: Sequence[hlo.Collective],
) -> dict[str, Any]:
    must, does = flops.total(made.parts).total, roofline.executed(made.parts, config.model.remat)
    link_bytes = sum(one.link_bytes for one in collectives)
    line = roofline.roofline(chip, n_chips, must, does, hbm_bytes, link_bytes)
    rows, columns = made.batch.tokens_BxT.shape
    return {
        "flops": {
            "must": must,
            "does": does,
            "parts": {part: cost.total for part, cost in made.parts.items()},
        },
        "roofline": {
            "seconds": line.seconds,
            "step_seconds": line.step,
            "bound": line.bound,
            "mfu": line.mfu,
            "hbm_bytes": hbm_bytes,
            "link_bytes": link_bytes,
            "tokens_a_second": rows * columns / line.step,
        },
    }


def _refused(config: Config, reason: str, chip: chips.Chip, n_chips: int) -> dict[str, Any]:
    """What the compiler's refusal says, and what to change if HBM is too small."""
    out = facts.refusal(reason, chip)
    if not out["compiles"]:
        return out
    mends = [] if config.model.remat == "full" else ["model.remat='full'"]
    if config.mesh.fsdp not in (-1, n_chips):
        mends.append("a larger mesh.fsdp")
    if config.data.batch_size // config.train.accumulate > n_chips:
        mends.append(f"train.accumulate={2 * config.train.accumulate}")
    mends.append("a smaller data.batch_size" if config.data.batch_size > n_chips else "fewer tokens or clips a row")
    out["mend"] = f"try {', '.join(mends)}, or more or larger chips"
    return out


def table(found: Mapping[str, Any]) -> str:
    """Returns what `measure` found, for people."""
    gib = lambda n: f"{n / 2**30:.2f} GiB"
    batch, chip = found["batch"], found["chip"]
    clips = f"{batch['clips_of_a_row']} clips of {batch['seconds_of_a_clip']:.4g} s"
    mesh = " x ".join(f"{axis} {n}" for axis, n in found["mesh"].items())
    lines = [
        f"{found['llm']}, stage {found['stage']}, on {found['topology']} ({found['chips']} chips: {mesh})",
        f"  batch        {batch['rows']} rows of {batch['columns']} tokens and {clips} ({batch['layout']}): "
        f"{batch['tokens_of_a_chip']:.0f} tokens a chip",
    ]
    if not found["compiles"]:
        return "\n".join([*lines, f"  does not compile: {found['reason']}"])
    memory = found["memory"]
    if not found["fits"]:
        short = f"{gib(memory['missing'])} too little: it needs {gib(memory['needs_at_least'])} or more"
        lines.append(f"  does not fit {short}, programs may use {gib(memory['usable'])} of a chip; {found['mend']}")
        return "\n".join(lines)
    parts = ", ".join(f"{name} {gib(memory[name])}" for name in ("argument", "temporary", "code"))
    donated = found["donated"]
    lines += [
        f"  HBM          {gib(memory['total'])} of {gib(memory['hbm'])} a chip: fits ({parts})",
        f"  donated      {gib(donated['aliased'])} aliased; the trained state has {gib(donated['state'])} a chip",
    ]
    for kind, values in found["collectives"]["kinds"].items():
        lines.append(f"  {kind:<20} {values['count']:>6.0f} a step, {values['bytes'] / 1e9:>8.2f} GB")
    names = {"all_gathers_of_no_parameter": "gathered", "all_gathers_of_integers": "gathered", "on_logits": "on logits"}
    for what, name in names.items():
        lines += [f"  {name}: {one}" for one in found["collectives"][what]]
    line, work = found["roofline"], found["flops"]
    at_best = ", ".join(f"{what} {seconds:.3f} s" for what, seconds in line["seconds"].items())
    lines += [
        f"  operations   {work['must']:.3g} a step, {work['does']:.3g} with what is computed again",
        f"  at best      {line['step_seconds']:.3f} s a step, bound by {line['bound']} ({at_best})",
        f"               {line['tokens_a_second']:.4g} tokens a second, {100 * line['mfu']:.0f}% of the peak of "
        f"{found['chips']} x {chip['peak'] / 1e12:.0f} TFLOP/s",
    ]
    return "\n".join(lines)
