"""What can be seen to be wrong in a configuration without weights or data; the line names the key."""

import math
import re
from typing import Any

from ml_collections import ConfigDict

from aura_jax.config.keys import OPEN, Config, default, stage
from aura_jax.errors import UserError, nearest

_TEXT_OBJECTIVES = {"text_anchor", "text_kd"}
_READING_OBJECTIVES = {"response_kd", "input_kd", "hidden_l2", "embedding_l2"}
_OF_CFORMER = {"input_kd", "quantity"}
_WITH_HIDDEN = ("stack", "conv")  # embedder.kind
_NOISES = ("babble", "white")

_ONE_OF = {
    "model.dtype": ("float32", "bfloat16"),
    "model.param_dtype": ("float32", "bfloat16", "int8"),
    "model.matmul_dtype": ("", "float32", "bfloat16"),
    "model.remat": ("none", "dots", "full"),
    "model.attention": ("xla", "cudnn", "splash"),
    "model.normalisation": ("whisper", "streaming"),
    "teacher.window": ("unpadded", "30s"),
    "lora.scope": ("all", "request", "audio"),
    "distill.layer_map": ("stride", "identity", "last", "list"),
    "distill.loss": ("cosine", "mse", "nmse", "smooth_l1"),
    "distill.head": ("own", "shared"),
    "distill.target_norm": ("standardise", "layernorm", "none"),
    "data.layout": ("slot", "packed"),
}
_AT_LEAST = {
    "data.batch_size": 1,
    "embedder.hidden": 0,
    "embedder.n_after": 0,
    "embedder.n_before": 0,
    "data.min_seconds": 0,
    "data.workers": 0,
    "lora.n_blocks": -1,
    "optimizer.weight_decay": 0,
    "train.accumulate": 1,
    "train.checkpoint_every": 1,
    "train.eval_every": 0,
    "train.eval_rows": 1,
    "train.keep": 1,
    "train.log_every": 1,
    "train.loss_chunk": 1,
    "train.max_skipped": 1,
    "train.profile_start": 0,
    "train.profile_steps": 0,
    "train.steps": 0,
    "eval.batch_size": 1,
    "eval.max_new_tokens": 1,
    "eval.max_seconds": 0,
}
_OF_A_STAGE_AT_LEAST = {"steps": 1, "warmup_steps": 0, "final_fraction": 0}


def validate(c: Config) -> None:
    """Raises UserError for a key or a value that is wrong whatever the weights and the data are."""
    check_structure(c)
    for key, valid in _ONE_OF.items():
        value = _value(c, key)
        if value not in valid:
            raise UserError(f"unknown {key} {value!r}: {nearest(str(value), valid)}")
    for key, low in _AT_LEAST.items():
        _at_least(c, key, low)
    if not c.model.llm:
        raise UserError("model.llm is empty: name a directory, an asset (aura-jax assets list) or hf://owner/name")
    _validate_lora(c)
    _validate_audio_path(c)
    for pair in c.distill.pairs:
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and all(isinstance(x, int) for x in pair)):
            raise UserError(f"distill.pairs: {pair!r} is no pair of blocks: write ((STUDENT, TEACHER), ...)")
    _validate_data(c.data)
    _multiple_of_accumulate(c, "batch_size")
    _validate_schedule(c)
    _validate_trainable(c)
    validate_eval(c)


def validate_eval(c: Config) -> None:
    """Raises UserError for noise that there is not, or a set that eval.sets does not name."""
    noise = c.eval.noise
    for kind in noise.kinds:
        if kind not in _NOISES:
            raise UserError(f"unknown kind {kind!r} in eval.noise.kinds: valid: {', '.join(_NOISES)}")
    if noise.kinds and not (noise.snr_db and all(map(_is_number, noise.snr_db))):
        raise UserError(f"eval.noise.snr_db must be ratios in dB, such as (20.0, 10.0), not {noise.snr_db}")
    if noise.sets and not noise.kinds:
        raise UserError(f"eval.noise.sets names sets, but eval.noise.kinds no noise: name {' or '.join(_NOISES)}")
    if noise.kinds and not c.eval.sets:
        raise UserError("eval.noise.kinds names noise, but eval.sets no set to be heard in it: name one, or no noise")
    for key, names in (("eval.noise.sets", noise.sets), ("eval.likelihood", c.eval.likelihood)):
        for name in names:
            if name not in c.eval.sets:
                raise UserError(f"{key} names {name!r}, which eval.sets does not: {nearest(str(name), c.eval.sets)}")


def check_structure(c: ConfigDict) -> None:
    """Raises UserError for a key that does not exist, or one that is missing."""
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
        if isinstance(expected[key], ConfigDict) and f"{where}{key}" not in OPEN:
            _check_keys(config[key], expected[key], f"{where}{key}.")


def _validate_lora(c: Config) -> None:
    if not c.lora.alpha > 0:
        raise UserError(f"lora.alpha must be above 0, not {c.lora.alpha}")
    if not 0 < c.lora.text_energy <= 1:
        raise UserError(f"lora.text_energy is a share above 0 and up to 1, not {c.lora.text_energy}")
    if c.lora.text_energy < 1 and not c.lora.n_blocks:
        raise UserError("lora.text_energy below 1 confines LoRA, and lora.n_blocks is 0: set text_energy to 1")
    if c.lora.text_energy < 1 and not c.data.text_pool:
        raise UserError("lora.text_energy below 1 needs text to measure: name a JSON lines file in data.text_pool")


def _validate_audio_path(c: Config) -> None:
    if c.model.encoder and c.model.normalisation != "whisper":
        raise UserError(
            f"model.normalisation {c.model.normalisation!r} is for embedders of frames: the encoder in model.encoder "
            "was trained on 'whisper'"
        )
    if c.embedder.hidden and c.embedder.kind not in _WITH_HIDDEN:
        kinds = " and ".join(_WITH_HIDDEN)
        raise UserError(f"embedder.hidden is for {kinds}: embedder.kind {c.embedder.kind!r} has none")
    if not c.kd.temperature > 0:
        raise UserError(f"kd.temperature must be above 0, not {c.kd.temperature}")


def _validate_data(data: Config) -> None:
    write = """write ((MANIFEST, PASSES), ...), such as --config.data.train='(("my.jsonl", 1.0),)'"""
    for row in data.train:
        if not (isinstance(row, (tuple, list)) and len(row) == 2 and isinstance(row[0], str) and _is_number(row[1])):
            raise UserError(f"data.train: {row!r} is no pair of a manifest and its passes per epoch: {write}")
        if row[1] <= 0:
            raise UserError(f"data.train: the passes of {row[0]} must be above 0, not {row[1]}")
    if data.text_pool and data.text_rows < 1:
        raise UserError(f"data.text_rows must be at least 1, not {data.text_rows}")
    if data.text_chat > 1:
        raise UserError(f"data.text_chat is a share of at most 1, not {data.text_chat}")
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


def _validate_schedule(c: Config) -> None:
    if not c.train.schedule:
        raise UserError("train.schedule is empty: name the stages of train.stages in order")
    merged = False
    for name in c.train.schedule:
        if name not in c.train.stages:
            raise UserError(f"train.schedule names stage {name!r}: {nearest(name, c.train.stages.keys())}")
        _validate_stage(c, name)
        if c.train.stages[name].merge_lora:
            if merged:
                raise UserError(f"train.stages.{name}: merge_lora, but an earlier stage merged LoRA: set it to False")
            if not c.lora.n_blocks:
                raise UserError(f"train.stages.{name}: merge_lora, but lora.n_blocks is 0: there is nothing to merge")
            if c.lora.scope == "audio":
                raise UserError(
                    "lora.scope 'audio' (PLoRA) acts at audio tokens only and cannot be merged: drop merge_lora"
                )
            if c.model.param_dtype == "int8":
                raise UserError(
                    f"train.stages.{name}: merge_lora, but int8 weights cannot take what LoRA learned: set "
                    "model.param_dtype to bfloat16"
                )
            merged = True
        if _TEXT_OBJECTIVES & _active(c.train.stages[name]):
            _validate_text_objectives(c, name, merged)
        if merged and (reading := _READING_OBJECTIVES & _active(c.train.stages[name])):
            raise UserError(
                f"train.stages.{name}: {min(reading)} compares with the LLM without adapters, which merge_lora ended: "
                "set it to 0"
            )


def _validate_stage(c: Config, name: str) -> None:
    where, stage_ = f"train.stages.{name}", c.train.stages[name]
    for key, low in _OF_A_STAGE_AT_LEAST.items():
        _at_least(c, f"{where}.{key}", low)
    for key in ("learning_rate", "clip_norm"):
        if not stage_[key] > 0:  # nor NaN
            raise UserError(f"{where}.{key} must be above 0, not {stage_[key]}")
    for objective in stage_.objectives:
        _at_least(c, f"{where}.objectives.{objective}", 0)
    if not _active(stage_):
        raise UserError(f"{where}.objectives: every weight is 0")
    if "distill" in _active(stage_) and not c.model.teacher:
        raise UserError(f"{where} distils, but model.teacher is empty: name a Whisper")
    if c.embedder.kind != "cformer" and (only := _OF_CFORMER & _active(stage_)):
        raise UserError(
            f"{where}: {min(only)} needs an audio token for each token of the transcript: set embedder.kind to "
            "'cformer'"
        )
    if "distill" in _active(stage_) and c.embedder.kind == "cformer":
        raise UserError(f"{where} distils frame by frame, and embedder.kind 'cformer' has no frames: set distill to 0")
    if "distill" in _active(stage_) and not c.lora.n_blocks:
        raise UserError(f"{where} distils into the blocks that LoRA adapts, and lora.n_blocks is 0: raise it")


def _validate_text_objectives(c: Config, name: str, merged: bool) -> None:
    if merged:
        raise UserError(
            f"train.stages.{name} anchors text to the LLM without adapters, which merge_lora ended: "
            "set text_anchor and text_kd to 0"
        )
    if not c.lora.n_blocks:
        raise UserError(f"train.stages.{name} anchors text, which nothing changes, because lora.n_blocks is 0")
    if not c.data.text_pool:
        raise UserError(f"train.stages.{name} uses text, but data.text_pool is empty: name a JSON lines file")
    _multiple_of_accumulate(c, "text_rows")
    if c.lora.scope == "audio":
        raise UserError(
            f"train.stages.{name} anchors text, but lora.scope 'audio' never touches text: drop one of them"
        )


def _validate_trainable(c: Config) -> None:
    for pattern, rate in (*c.trainable, *(row for name in c.train.schedule for row in c.train.stages[name].trainable)):
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"trainable: {pattern!r} is not a regular expression: {error}") from error
        if rate <= 0:
            raise UserError(f"trainable: the rate of {pattern!r} must be above 0, not {rate}")


def _active(stage_: Config) -> set[str]:
    return {name for name in stage_.objectives if stage_.objectives[name]}


def _value(c: Config, key: str) -> Any:
    for part in key.split("."):
        c = c[part]
    return c


def _at_least(c: Config, key: str, low: float) -> None:
    if not _value(c, key) >= low:  # nor NaN
        raise UserError(f"{key} must be at least {low}, not {_value(c, key)}")


def _multiple_of_accumulate(c: Config, key: str) -> None:
    if c.data[key] % c.train.accumulate:
        raise UserError(f"data.{key} {c.data[key]} is not a multiple of train.accumulate {c.train.accumulate}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
