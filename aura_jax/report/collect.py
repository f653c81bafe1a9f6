"""All that a run's report says, from the run's workdir: one dictionary, which `page` draws."""

import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from aura_jax import config as config_lib
from aura_jax import sharding, system
from aura_jax.config import Config
from aura_jax.data.manifest import Row, load_manifest
from aura_jax.errors import UserError
from aura_jax.report import examples, similarity
from aura_jax.system import System
from aura_jax.train.inputs import split_held_out

_WARM_UP = 2  # logged steps of a stage that are left out of its rates: they compile

# Paths of parameters, the part they belong to, and whether an answer needs it.
_PARTS = (
    ("params/encoder/", "encoder", True),
    ("params/embedder/", "audio embedder", True),
    ("lora/", "LoRA", True),
    ("params/llm/adapted/", "LLM, adapted blocks", True),
    ("params/llm/plain/", "LLM, upper blocks", True),
    ("params/llm/", "LLM, embeddings and head", True),
    ("heads/", "distillation heads", False),
    ("teacher/", "teacher's encoder", False),
)


def collect(workdir: Path, progress: bool = True) -> dict[str, Any]:
    """Returns all that is known of the run in `workdir`; "missing" says of each absent section why, and the mend.

    Raises:
      UserError: it is no workdir, its files are malformed, or its models cannot be found.
    """
    config = config_lib.from_json(workdir / "config.json")
    built = system.build(config)
    missing: dict[str, str] = {}
    records = _json_lines(workdir / "metrics.jsonl")
    steps = [record for record in records if "loss" in record]
    stages = _stages(config)
    data: dict[str, Any] = {
        "name": workdir.absolute().name,
        "step": steps[-1]["step"] if steps else 0,
        "total_steps": config_lib.total_steps(config),
        "missing": missing,
        "config": json.loads(config_lib.to_json(config)),
        "model": model_of(built),
        "parameters": _parameters(built),
        "stages": stages,
    }
    data["finished"] = data["step"] >= data["total_steps"]
    commands = _json_lines(workdir / "commands.jsonl")
    data["environment"] = commands[-1].pop("environment") if commands else None
    data["commands"] = [{key: line[key] for key in ("time", "command", "first_step")} for line in commands] or None
    if steps:
        names = sorted({name for record in steps for name in record} - {"step", "skipped"})
        data["metrics"] = {name: [record.get(name) for record in steps] for name in ("step", *names)}
        data["alignment"] = _alignment(built, steps)
    else:
        missing["metrics"] = f"no step is logged in {workdir.name}/metrics.jsonl: train first"
    validated = [record for record in records if "validation/wer" in record]
    if validated:
        data["validation"] = {
            "step": [record["step"] for record in validated],
            **{name: [record[f"validation/{name}"] for record in validated] for name in ("wer", "exact_match")},
        }
    scores = _json(workdir / "scores.json")
    transcripts = _json(workdir / "transcripts.json")
    unscored = f"not scored yet: aura-jax eval --workdir {workdir.name} decodes the sets of its eval.sets"
    if scores:
        data["scores"] = scores
    else:
        missing["scores"] = unscored
    if transcripts:
        chosen = examples.choose(transcripts)
        mel = (built.n_mels, config.model.normalisation)
        data["examples"] = examples.with_audio(chosen, config.eval.sets.to_dict(), *mel)
    else:
        missing["examples"] = unscored
    data["speed"] = _speed(workdir, records, stages, scores)
    try:
        name, rows = _held_out(config)
        data["similarity"] = {"set": name, **similarity.compare(workdir, rows, progress)}
    except UserError as error:
        missing["similarity"] = str(error)
    return data


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}): delete it, and score the run again") from error


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the objects of a file that a run appends to; a line that a kill cut short is left out."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    try:
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except ValueError as error:
        raise UserError(f"{path}: not JSON lines ({error}): delete the line") from error


def model_of(built: System) -> dict[str, Any]:
    """Returns a system's parts and dimensions, as `diagram.method` draws them."""
    c, llm, lora, teacher = built.config, built.model.config.llm, built.model.config.lora, built.teacher_config
    encoder = built.model.config.encoder
    return {
        "llm": Path(c.model.llm).name,
        "llm_blocks": llm.n_blocks,
        "llm_width": llm.width,
        "n_adapted": lora.n_blocks if lora else 0,
        "rank": lora.rank if lora else None,
        "alpha": lora.alpha if lora else None,
        "targets": list(lora.targets) if lora else None,
        "scope": lora.scope if lora else None,
        "mask": c.model.mask,
        "teacher": Path(c.model.teacher).name if teacher else None,
        "teacher_blocks": teacher.encoder_blocks if teacher else None,
        "teacher_width": teacher.width if teacher else None,
        "encoder": Path(c.model.encoder).name if encoder else None,
        "encoder_blocks": encoder.encoder_blocks if encoder else None,
        "encoder_width": encoder.width if encoder else None,
        "n_mels": built.n_mels,
        "embedder": c.embedder.kind,
        "frames_per_token": built.frames_per_token,
        "token_rate": built.token_rate,
        "pairs": [list(pair) for pair in built.pairs],
    }


def _parameters(built: System) -> list[dict[str, Any]]:
    """Returns [{"part", "trained", "frozen", "kept"}], numbers of parameters; kept: it is needed for an answer."""
    shapes: dict[str, Any] = system.abstract_variables(built)
    if built.teacher is not None and built.teacher_config is not None:
        mel_1xFxM = jnp.zeros((1, 2, built.teacher_config.n_mels))
        shapes["teacher"] = jax.eval_shape(built.teacher.init, jax.random.key(0), mel_1xFxM)["params"]
    sizes = {path: leaf.size for path, leaf in sharding.flatten(shapes).items()}
    trained: set[str] = set()
    for _, stage in config_lib.stages(built.config):
        if not stage.merge_lora:  # its table is of other paths: LoRA's are folded into the kernels
            trained |= set(sharding.learning_rates(sizes, stage.trainable or built.config.trainable))
    totals: dict[str, Counter[str]] = {}
    for path, size in sizes.items():
        part = next(part for prefix, part, _ in _PARTS if path.startswith(prefix))
        totals.setdefault(part, Counter())["trained" if path in trained else "frozen"] += size
    return [
        {"part": part, "trained": totals[part]["trained"], "frozen": totals[part]["frozen"], "kept": kept}
        for _, part, kept in _PARTS
        if part in totals
    ]


def _stages(config: Config) -> list[dict[str, Any]]:
    out, first = [], 0
    for name, stage in config_lib.stages(config):
        end = min(first + stage.steps, config_lib.total_steps(config))
        objectives = {name: weight for name, weight in stage.objectives.to_dict().items() if weight}
        out.append(
            {"name": name, "first": first, "end": end, "objectives": objectives, "learning_rate": stage.learning_rate}
        )
        first = end
    return out


def _alignment(built: System, steps: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Returns the distillation loss of every paired block over the steps; of the cosine loss, the cosine itself."""
    blocks = [student for student, _ in built.pairs]
    logged = [record for record in steps if "loss/distill" in record]
    if not logged:
        return None
    kind = built.config.distill.loss
    of = lambda loss: 1 - loss if kind == "cosine" else loss
    value = [[of(record[f"loss/distill/block_{block:02d}"]) for record in logged] for block in blocks]
    return {"step": [record["step"] for record in logged], "blocks": blocks, "loss_kind": kind, "value": value}


def _speed(
    workdir: Path, records: Sequence[Mapping[str, Any]], stages: Sequence[Mapping[str, Any]], scores: Mapping | None
) -> dict[str, Any] | None:
    rates, peaks = [], [record["peak_memory_gib"] for record in records if "peak_memory_gib" in record]
    for stage in stages:
        of_stage = [r for r in records if "loss" in r and stage["first"] < r["step"] <= stage["end"]]
        warm = of_stage[_WARM_UP:]
        if not warm:
            continue
        median = lambda name, warm=warm: statistics.median(record[name] for record in warm)
        rate = {"name": stage["name"], "median_step_seconds": median("step_seconds")}
        rate |= {name: median(name) for name in ("tokens_per_second", "audio_seconds_per_second")}
        first = of_stage[0]
        rate["first_step_seconds"] = first["step_seconds"] if first["step"] == stage["first"] + 1 else None
        counted = [record for record in of_stage if "steps_that_waited" in record]
        steps, waited = (sum(r[key] for r in counted) for key in ("steps_since_record", "steps_that_waited"))
        rate["wait_share"] = waited / steps if counted else None
        rates.append(rate)
    if not rates:
        return None
    wall: Counter[str] = Counter()
    for record in records:
        wall.update({k.removeprefix("seconds/"): v for k, v in record.items() if k.startswith("seconds/")})
    if scores and "seconds" in scores:
        wall["evaluation"] = scores["seconds"]["evaluate"]
    profile = _json(workdir / "profile.json")
    breakdown = None
    if profile and profile["steps"]:
        breakdown = [{"part": part, "seconds": sum(ways.values())} for part, ways in profile["seconds"].items()]
    return {
        "stages": rates,
        "breakdown": breakdown,
        "wall": [{"part": part, "seconds": seconds} for part, seconds in wall.items()] or None,
        "peak_memory_gib": max(peaks) if peaks else (scores or {}).get("peak_memory_gib"),
    }


def _held_out(config: Config) -> tuple[str, list[Row]]:
    """Returns what the run held out of its training data, or else its first test set, and that set's name.

    Raises:
      UserError: there is neither, or no teacher to compare with.
    """
    if not config.model.teacher:
        raise UserError("no teacher to compare with: the run's model.teacher is empty")
    rows = [row for manifest, _ in config.data.train for row in split_held_out(load_manifest(manifest), config.data)[1]]
    rows = [row for row in rows if row.audio is not None]
    if rows:
        return f"training data held out by {config.data.validation_key}", rows
    for name, manifest in config.eval.sets.items():
        return name, [row for row in load_manifest(manifest) if row.audio is not None]
    raise UserError("no speech was held out: the run's data.validation_values and eval.sets are empty")
