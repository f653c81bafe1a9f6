"""The configuration: every key with its default, read from a Python file and overridden on the command line.

A file in configs/ starts from `default()` and changes what it needs. A key that does not exist is an error.
"""

import json
import math
import re
import runpy
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from absl import flags
from ml_collections import ConfigDict, config_flags

from aura_jax.errors import UserError, nearest

# A ConfigDict, whose attributes no type checker knows.
Config: TypeAlias = Any

OBJECTIVES = ("lm", "distill", "text_anchor", "text_kd")
_TEXT_OBJECTIVES = {"text_anchor", "text_kd"}

# Nodes whose keys the user names.
_OPEN = ("train.stages", "eval.sets", "data.template_kwargs")


def stage(steps: int, learning_rate: float, objectives: dict[str, float], **changes) -> Config:
    """Returns one stage of training; `changes` override its other keys."""
    out: Config = ConfigDict(
        dict(
            steps=steps,
            learning_rate=learning_rate,  # peak; the schedule warms up linearly and falls along a cosine
            warmup_steps=20,
            final_fraction=0.1,  # of the peak, at the end of the stage
            clip_norm=1.0,
            objectives=dict.fromkeys(OBJECTIVES, 0.0),  # weights; 0 leaves an objective out
            merge_lora=False,  # fold LoRA into the LLM before the stage starts
            trainable=(),  # as the top-level `trainable`, for this stage alone; empty: the top-level table
        )
    )
    with out.objectives.ignore_type():
        for name, weight in objectives.items():
            if name not in OBJECTIVES:
                raise UserError(f"unknown objective {name!r}: {nearest(name, OBJECTIVES)}")
            out.objectives[name] = float(weight)
    for key, value in changes.items():
        if key not in out:
            raise UserError(f"unknown key {key} of a stage: {nearest(key, out.keys())}")
        out[key] = value
    return out


def default() -> Config:
    """Returns the configuration with every key at its default."""
    c: Config = ConfigDict()
    c.seed = 0
    c.model = ConfigDict(
        dict(
            llm="",  # a directory, an asset's name, or hf://owner/name[@revision]
            teacher="",  # likewise, a Whisper
            dtype="float32",  # of the computation: float32 or bfloat16
            param_dtype="float32",  # frozen weights are stored in this
            matmul_dtype="",  # of the operands of products with the frozen weights of the LLM's blocks; "": as dtype
            attention="xla",  # of LLM and teacher: xla or cudnn
            remat="none",  # none, dots, or full
            mask="bidirectional",  # inside an audio span: causal, bidirectional, or block
            chunk=0,  # tokens, for mask = block
            normalisation="whisper",  # of the student's log-mel: whisper (looks ahead) or streaming (does not)
        )
    )
    c.lora = ConfigDict(
        dict(
            n_blocks=12,  # the first N blocks of the LLM
            rank=64,
            alpha=64.0,
            rslora=False,
            targets=("q", "k", "v", "o", "gate", "up", "down"),
            scope="request",  # all, request, or audio
            # Below 1, A reads only directions of its input that hold this share of the energy of data.text_pool.
            text_energy=1.0,
        )
    )
    c.embedder = ConfigDict(
        dict(
            kind="stem",  # stem or patch
            token_rate=12.5,  # Hz: 25, 12.5, 8.33 or 6.25
            from_teacher=True,  # stem: start from the teacher's convolutions; patch has none, and starts at random
        )
    )
    c.teacher = ConfigDict(
        dict(
            window="unpadded",  # unpadded, or 30s
            precompute=False,  # write the pooled states to disk once, instead of running the teacher in every step
        )
    )
    c.distill = ConfigDict(
        dict(
            loss="cosine",  # cosine, mse, nmse, or smooth_l1
            head="own",  # own: one a pair of blocks; shared: one for all
            layer_map="stride",  # stride, identity, last, or list
            pairs=(),  # for list: (student block, teacher block), counted from 0
            target_norm="standardise",  # standardise (per channel), layernorm, or none
        )
    )
    c.data = ConfigDict(
        dict(
            train=(),  # (manifest, passes per epoch) pairs
            validation_key="voice",  # rows of the training manifests whose key ...
            validation_values=(),  # ... has one of these values are held out
            min_seconds=0.0,
            max_seconds=30.0,  # longer clips are left out, and counted
            buckets=(),  # seconds, ascending: a batch is padded to the smallest that holds its clips
            batch_size=16,  # rows, over all hosts
            layout="slot",  # slot: one example a row; packed: several
            row_tokens=512,  # packed: length of a row
            row_clips=8,  # packed: most clips a row
            speeds=(1.0,),  # factors, drawn anew each epoch
            prompt="",  # after the audio, where the manifest has none
            chat_template="",  # Jinja; empty: the tokenizer's own
            template_kwargs={},  # further variables of the template, such as {"enable_thinking": False}
            system="",  # system turn; empty: what the template does by itself
            workers=0,  # processes; 0: threads of this one
            threads=2,
            augment=dict(
                gain_db=(0.0, 0.0),
                noise_probability=0.0,
                noise_snr_db=(5.0, 20.0),
                freq_masks=0,
                freq_width=10,  # mel bins, at most
                time_masks=0,
                time_width=10,  # frames, at most
            ),
            text_pool="",  # JSON lines of plain text and chats, for text_anchor, text_kd and lora.text_energy
            text_rows=6,
            text_length=64,  # tokens
            text_chat=-1.0,  # share of the rows from conversations; below 0: as the pool has them, but at least a row
        )
    )
    c.trainable = (  # (regular expression of parameter paths, multiplier of the learning rate)
        ("params/embedder/(?!text_rms)", 1.0),
        ("lora/", 1.0),
        ("heads/", 1.0),
    )
    c.optimizer = ConfigDict(dict(b1=0.9, b2=0.98, eps=1e-8, weight_decay=0.01))
    c.train = ConfigDict(
        dict(
            schedule=(),  # names of stages, in order
            stages={},
            steps=0,  # stop after so many steps over all stages; 0: all of them
            accumulate=1,  # micro-batches a step
            loss_chunk=128,  # targets whose logits are held at a time
            log_every=10,
            eval_every=0,  # steps; 0: only at the end of the run
            eval_rows=32,
            checkpoint_every=100,
            keep=2,  # newest checkpoints
            keep_every=0,  # and each one at a multiple of this
            max_skipped=5,  # steps in a row with non-finite gradients before the run stops
            profile_start=0,
            profile_steps=0,
        )
    )
    c.mesh = ConfigDict(dict(data=1, fsdp=-1, tensor=1))
    c.eval = ConfigDict(dict(sets={}, batch_size=16, max_new_tokens=48, text_questions="", text_heldout=""))
    return c


def load(argv: Sequence[str]) -> Config:
    """Reads `--config=FILE` and `--config.a.b=value` arguments.

    Raises:
      UserError: for a missing or broken file, an unknown key (the nearest is suggested), or a value of another type.
    """
    path, overrides = _config_file(argv)
    config = _apply(_read(path), overrides)
    validate(config)
    return config


def override(config: Config, arguments: Sequence[str], allowed: Sequence[str]) -> Config:
    """Returns the configuration of a run with `--config.a.b=value` arguments; without any, `config` itself.

    The values are checked where they are used: a run from before a rule of `validate` can still be read.

    Args:
      allowed: keys that may change; one that ends in "." stands for all below it.

    Raises:
      UserError: as `load`, and for a key that is not allowed.
    """
    if not arguments:
        return config
    keys = [_key(argument) for argument in arguments]
    if "" in keys:
        argument = arguments[keys.index("")]
        raise UserError(f"unexpected argument {argument!r}: the run has its config; override --config.KEY=VALUE")
    changed = _apply(config.copy_and_resolve_references(), arguments)
    for key in keys:
        if not any(key.startswith(name) if name.endswith(".") else key == name for name in allowed):
            names = ", ".join(f"{name}*" if name.endswith(".") else name for name in allowed)
            raise UserError(f"{key} is part of what the run was trained with: only {names} can be overridden here")
    return changed


def _key(argument: str) -> str:
    """Returns the key that `--config.KEY=VALUE` or `--noconfig.KEY` overrides; "" for another argument."""
    match = re.match(r"--?(?:no)?config\.([^=]+)", argument)
    return match[1] if match else ""


def _apply(config: Config, overrides: Sequence[str]) -> Config:
    """Overrides keys of `config` in place, and returns it."""
    for argument in overrides:
        if key := _key(argument):
            _check_key(config, key)
    registry = flags.FlagValues()
    try:
        holder = config_flags.DEFINE_config_dict("config", config, flag_values=registry, sys_argv=["", *overrides])
        rest = registry(["", *overrides])[1:]
    except flags.Error as error:
        raise UserError(" ".join(str(error).split())) from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(_one_line(error)) from error
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}: overrides look like --config.train.steps=10")
    return holder.value


def _config_file(argv: Sequence[str]) -> tuple[str, list[str]]:
    """Returns the value of `--config`, and the other arguments."""
    path, others, arguments = "", [], iter(argv)
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name in ("--config", "-config"):
            path = value if equals else next(arguments, "")
        else:
            others.append(argument)
    if not path:
        raise UserError("no config: add --config=configs/quickstart.py")
    return path, others


def _read(path: str) -> Config:
    """Runs a config file, which may import its neighbours, and returns what its get_config() returns."""
    if not Path(path).is_file():
        raise UserError(f"no config file {path}: configs/ holds the shipped ones")
    neighbours = str(Path(path).resolve().parent.parent)  # `from configs import quickstart`
    sys.path.append(neighbours)
    try:
        get_config = runpy.run_path(path).get("get_config")
        if get_config is None:
            raise UserError("has no get_config(): start from a file in configs/")
        config = get_config()
        if not isinstance(config, ConfigDict):
            raise UserError("get_config() must change what aura_jax.config.default() returns, and return it")
        _check_structure(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        where = f"{path}:{lines[-1]}" if lines else path
        raise UserError(f"{where}: {_one_line(error)}") from error
    finally:
        sys.path.remove(neighbours)
    return config


def _check_key(config: Config, key: str) -> None:
    node: Any = config
    for i, part in enumerate(key.split(".")):
        if not isinstance(node, ConfigDict):
            raise UserError(f"unknown key {key}: {'.'.join(key.split('.')[:i])} has no keys below it")
        if part not in node:
            raise UserError(f"unknown key {key}: {nearest(part, node.keys())}")
        node = node[part]


def _one_line(error: BaseException) -> str:
    """Returns what went wrong in one line; ConfigDict wraps a KeyError into an AttributeError."""
    if error.args and isinstance(error.args[0], BaseException):
        error = error.args[0]
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return f"{type(error).__name__}: {' '.join(text.split())}"


def to_json(config: Config) -> str:
    return json.dumps(json.loads(config.to_json_best_effort()), indent=2) + "\n"


def from_json(path: Path) -> Config:
    """Reads what `to_json` wrote in a workdir; keys that there were not yet when it was written get their defaults.

    Raises:
      UserError: there is no such file, or it holds no config of this version: the line names the key.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"no config at {path}: is this a workdir of aura-jax train?") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    as_tuples: Any = lambda v: (
        tuple(map(as_tuples, v))
        if isinstance(v, list)
        else ({k: as_tuples(x) for k, x in v.items()} if isinstance(v, dict) else v)
    )
    config = default()
    try:
        _overlay(config, as_tuples(values), "")
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: {_one_line(error)}") from error
    return config


def _overlay(config: Config, values: Any, where: str) -> None:
    """Sets every key of `config` that is in `values`."""
    if not isinstance(values, dict):
        raise UserError(
            f"{where.removesuffix('.') or 'the file'} is not an object: was this written by aura-jax train?"
        )
    for key, value in values.items():
        if where == "train.stages.":
            config[key] = stage(1, 1.0, {})
        elif key not in config and where.removesuffix(".") not in _OPEN:
            raise UserError(f"unknown key {where}{key}: {nearest(key, config.keys())}")
        if isinstance(config.get(key), ConfigDict):
            _overlay(config[key], value, f"{where}{key}.")
        else:
            config[key] = value


def stages(config: Config) -> list[tuple[str, ConfigDict]]:
    """Returns the stages in order, cut off at `train.steps`."""
    left = config.train.steps or 1 << 62
    out = []
    for name in config.train.schedule:
        if left > 0:
            one = config.train.stages[name].copy_and_resolve_references()
            out.append((name, one))
            left -= one.steps
    return out


def total_steps(config: Config) -> int:
    steps = sum(config.train.stages[name].steps for name in config.train.schedule)
    return min(steps, config.train.steps) if config.train.steps else steps


def _check_structure(c: ConfigDict) -> None:
    _check_keys(c, default(), "")
    for name in c.train.stages:
        if not isinstance(c.train.stages[name], ConfigDict):
            raise UserError(f"train.stages.{name} is not a stage: make it with aura_jax.config.stage(...)")
        _check_keys(c.train.stages[name], stage(1, 1.0, {}), f"train.stages.{name}.")


def _check_keys(config: Config, expected: Config, where: str) -> None:
    for key in config:
        if key not in expected:
            raise UserError(f"unknown key {where}{key}: {nearest(key, expected.keys())}")
    for key in expected:
        if key not in config:
            raise UserError(f"there is no {where}{key}: change what aura_jax.config.default() returns, and return it")
        if isinstance(expected[key], ConfigDict) and f"{where}{key}" not in _OPEN:
            _check_keys(config[key], expected[key], f"{where}{key}.")


def validate(c: Config) -> None:
    """Raises UserError for keys and values that need no weights or data to be seen as wrong; the line names the key."""
    _check_structure(c)

    def one_of(key: str, valid: Sequence[str]) -> None:
        value = c
        for part in key.split("."):
            value = value[part]
        if value not in valid:
            raise UserError(f"unknown {key} {value!r}: {nearest(str(value), valid)}")

    def at_least(key: str, low: float) -> None:
        value = c
        for part in key.split("."):
            value = value[part]
        if value < low:
            raise UserError(f"{key} must be at least {low}, not {value}")

    def multiple_of_accumulate(key: str) -> None:
        if c.data[key] % c.train.accumulate:
            raise UserError(f"data.{key} {c.data[key]} is not a multiple of train.accumulate {c.train.accumulate}")

    one_of("model.dtype", ("float32", "bfloat16"))
    one_of("model.param_dtype", ("float32", "bfloat16"))
    one_of("model.matmul_dtype", ("", "float32", "bfloat16"))
    one_of("model.remat", ("none", "dots", "full"))
    one_of("model.attention", ("xla", "cudnn"))
    one_of("model.normalisation", ("whisper", "streaming"))
    one_of("teacher.window", ("unpadded", "30s"))
    one_of("distill.loss", ("cosine", "mse", "nmse", "smooth_l1"))
    one_of("distill.head", ("own", "shared"))
    one_of("distill.target_norm", ("standardise", "layernorm", "none"))
    one_of("data.layout", ("slot", "packed"))
    for key in (
        "data.batch_size",
        "train.accumulate",
        "train.loss_chunk",
        "train.log_every",
        "train.keep",
        "train.checkpoint_every",
        "train.eval_rows",
        "eval.batch_size",
        "eval.max_new_tokens",
        "train.max_skipped",
    ):
        at_least(key, 1)
    for key in (
        "train.steps",
        "train.eval_every",
        "train.profile_start",
        "train.profile_steps",
        "data.min_seconds",
        "data.workers",
        "optimizer.weight_decay",
    ):
        at_least(key, 0)
    multiple_of_accumulate("batch_size")
    _validate_data(c.data)
    for pair in c.distill.pairs:
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and all(isinstance(x, int) for x in pair)):
            raise UserError(f"distill.pairs: {pair!r} is no pair of blocks: write ((STUDENT, TEACHER), ...)")
    if c.lora.alpha <= 0:
        raise UserError(f"lora.alpha must be above 0, not {c.lora.alpha}")
    if c.data.text_chat > 1:
        raise UserError(f"data.text_chat is a share of at most 1, not {c.data.text_chat}")
    if not 0 < c.lora.text_energy <= 1:
        raise UserError(f"lora.text_energy is a share above 0 and up to 1, not {c.lora.text_energy}")
    if c.lora.text_energy < 1 and not c.data.text_pool:
        raise UserError("lora.text_energy below 1 needs text to measure: name a JSON lines file in data.text_pool")
    if not c.model.llm:
        raise UserError("model.llm is empty: name a directory, an asset (aura-jax assets list) or hf://owner/name")
    if not c.train.schedule:
        raise UserError("train.schedule is empty: name the stages of train.stages in order")
    merged = False
    for name in c.train.schedule:
        if name not in c.train.stages:
            raise UserError(f"train.schedule names stage {name!r}: {nearest(name, c.train.stages.keys())}")
        for key, low in (("steps", 1), ("warmup_steps", 0), ("final_fraction", 0)):
            at_least(f"train.stages.{name}.{key}", low)
        for key in ("learning_rate", "clip_norm"):
            if c.train.stages[name][key] <= 0:
                raise UserError(f"train.stages.{name}.{key} must be above 0, not {c.train.stages[name][key]}")
        objectives = c.train.stages[name].objectives
        for objective in objectives:
            at_least(f"train.stages.{name}.objectives.{objective}", 0)
        active = [o for o in objectives if objectives[o]]
        if not active:
            raise UserError(f"train.stages.{name}.objectives: every weight is 0")
        if "distill" in active and not c.model.teacher:
            raise UserError(f"train.stages.{name} distils, but model.teacher is empty: name a Whisper")
        if merged and c.train.stages[name].merge_lora:
            raise UserError(f"train.stages.{name}: merge_lora, but an earlier stage merged LoRA: set it to False")
        merged = merged or c.train.stages[name].merge_lora
        if set(active) & _TEXT_OBJECTIVES:
            if merged:
                raise UserError(
                    f"train.stages.{name} anchors text to the LLM without adapters, which merge_lora ended: "
                    "set text_anchor and text_kd to 0"
                )
            if not c.data.text_pool:
                raise UserError(f"train.stages.{name} uses text, but data.text_pool is empty: name a JSON lines file")
            multiple_of_accumulate("text_rows")
            if c.lora.scope == "audio":
                raise UserError(
                    f"train.stages.{name} anchors text, but lora.scope 'audio' never touches text: drop one of them"
                )
        if c.train.stages[name].merge_lora and c.lora.scope == "audio":
            raise UserError(
                "lora.scope 'audio' (PLoRA) acts at audio tokens only and cannot be merged: drop merge_lora"
            )
    for pattern, rate in (*c.trainable, *(row for name in c.train.schedule for row in c.train.stages[name].trainable)):
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"trainable: {pattern!r} is not a regular expression: {error}") from error
        if rate <= 0:
            raise UserError(f"trainable: the rate of {pattern!r} must be above 0, not {rate}")


def _validate_data(data: Config) -> None:
    """The part of `validate` about `data`."""
    write = """write ((MANIFEST, PASSES), ...), such as --config.data.train='(("my.jsonl", 1.0),)'"""
    for row in data.train:
        if not (isinstance(row, (tuple, list)) and len(row) == 2 and isinstance(row[0], str) and _is_number(row[1])):
            raise UserError(f"data.train: {row!r} is no pair of a manifest and its passes per epoch: {write}")
        if row[1] <= 0:
            raise UserError(f"data.train: the passes of {row[0]} must be above 0, not {row[1]}")
    if data.text_pool and data.text_rows < 1:
        raise UserError(f"data.text_rows must be at least 1, not {data.text_rows}")
    if not data.speeds or not all(_is_number(speed) and speed > 0 for speed in data.speeds):
        raise UserError(f"data.speeds must be factors above 0, such as (0.9, 1.0, 1.1), not {data.speeds}")
    augment = data.augment
    for key in ("gain_db", "noise_snr_db"):
        bounds = augment[key]
        if len(bounds) != 2 or not all(map(_is_number, bounds)) or bounds[0] > bounds[1]:
            raise UserError(f"data.augment.{key} must be two numbers, the lower first, not {bounds}")
    if not 0 <= augment.noise_probability <= 1:
        raise UserError(f"data.augment.noise_probability must be from 0 to 1, not {augment.noise_probability}")
    for key in ("freq_masks", "freq_width", "time_masks", "time_width"):
        if augment[key] < 0:
            raise UserError(f"data.augment.{key} must be at least 0, not {augment[key]}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
