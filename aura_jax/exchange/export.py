"""A run's model to PyTorch, in three formats.

`peft`: the adapter as PEFT loads it onto the untouched base. `hf`: a directory that transformers' Auto classes load,
adapters kept apart, with its own torch sources. `merged`: a plain Llama or Qwen directory with LoRA folded in. Each
holds the audio embedder, what a reader of audio needs to know (`audio_config.json`), the tokenizer with the run's chat
template, readable torch sources that need nothing of this package, and a model card.
"""

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from safetensors.numpy import save_file

from aura_jax import assets, checkpoint, config, system
from aura_jax.convert import audio_embedder, hf, hf_write, peft
from aura_jax.errors import UserError, nearest
from aura_jax.exchange import card
from aura_jax.exchange.folder import check_free, new_folder
from aura_jax.models.lora import float_dtype, merge
from aura_jax.sharding import flatten
from aura_jax.system import System

FORMATS = ("peft", "hf", "merged")
DTYPES = ("float32", "bfloat16", "float16")
AUDIO_CONFIG = "audio_config.json"
_FORMAT_VERSION = 1

_SOURCES = Path(__file__).parent / "torch"
_EVERYWHERE = ("audio_embedder.py", "processing_aura.py")
_OF_THE_LOADING = ("is_local", "local_files_only")  # transformers keeps them among a tokenizer's settings
_IN_HF = ("configuration_aura.py", "modeling_aura.py")


def export_run(
    workdir: Path,
    output: Path,
    format: str,
    *,
    which: str = "best",
    dtype: str | None = None,
    force: bool = False,
    overrides: Sequence[str] = (),
) -> Path:
    """Writes a run's model to the folder `output`, whole or not at all, and returns that folder.

    Args:
      format: one of `FORMATS`.
      which: "best" or "latest" checkpoint.
      dtype: of the LLM's weights in `hf` and `merged`, one of `DTYPES`; None: as the run held them, or computed with
        them if it held them in int8. What is written is then not int8, but the weights that it was made of.
      force: write `merged` for a run whose mask over audio a plain LLM runtime does not apply.
      overrides: `--config.KEY=VALUE` for what this machine needs other than the run did, such as mesh.*; what is
        written does not know of them.

    Raises:
      UserError: a format that cannot express the run, an output that is not empty, a disk that refuses, or as
        `checkpoint.load_for_inference`.
    """
    if format not in FORMATS:
        raise UserError(f"unknown --format {format!r}: {nearest(format, FORMATS)}")
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"unknown --dtype {dtype!r}: {nearest(dtype, DTYPES)}")
    if format == "peft" and dtype is not None:
        raise UserError("--dtype is for the LLM's weights, which the format peft has none of: drop it")
    if format != "merged" and force:
        raise UserError(f"--force is for the format merged, not {format}: drop it")
    check_free(output)
    step, meta = checkpoint.inference_meta(workdir, which)
    of_run = config.from_json(workdir / "config.json")
    _check(of_run, meta, format, force)

    built, variables = checkpoint.load_for_inference(workdir, which, overrides)
    about = describe(dataclasses.replace(built, config=of_run), "lora" in variables, meta, step)
    kind = dtype or str(float_dtype(built.model.param_dtype, built.model.dtype))
    if built.model.param_dtype == jnp.int8 and format != "peft":
        variables["params"]["llm"] = _original_llm(built, kind)
    with new_folder(output) as folder:
        _write_reader(built, about, folder)
        if format == "hf":
            _write_hf(built, variables, about, folder, kind)
        else:
            tensors = audio_embedder.to_tensors(flatten(variables["params"]["embedder"]))
            save_file(tensors, folder / audio_embedder.WEIGHTS, metadata={"format": "pt"})
        if format == "peft":
            _write_peft(built, variables, folder)
        else:
            _write_json(folder / "generation_config.json", _generation_config(built))
        if format == "merged":
            _write_merged(built, variables, folder, kind)
        text = card.model_card(format, about, card.scores_of(workdir, step), kind)
        (folder / "README.md").write_text(text, encoding="utf-8")
        for file in folder.glob("*.safetensors"):  # safetensors writes for the owner only
            shutil.copymode(folder / "README.md", file)
    return output


def _check(c: config.Config, meta: Mapping[str, Any], format: str, force: bool) -> None:
    """Raises UserError if the format cannot say what the run computes."""
    if c.model.encoder:
        raise UserError(
            f"embedder.kind {c.embedder.kind!r} keeps the encoder in model.encoder, and exports are of models that "
            "need none: answer with aura-jax generate --workdir"
        )
    trained = set(meta["own"])
    has_lora = any(path.startswith("lora/") for path in trained)
    if format == "peft" and not has_lora:
        raise UserError("the run folded LoRA into the LLM, so there is no adapter: export it as hf or merged")
    if format == "peft" and any(path.startswith("params/llm/") for path in trained):
        raise UserError("the run trained weights of the LLM itself, which an adapter does not hold: export it as hf")
    if format in ("peft", "merged") and has_lora and c.lora.scope == "audio":
        why = "PEFT would apply it to every token" if format == "peft" else "merged weights apply to every token"
        raise UserError(f"lora.scope 'audio' (PLoRA) acts at audio tokens only, and {why}: export it as hf")
    if format == "merged" and c.model.mask != "causal" and not force:
        raise UserError(
            f"model.mask is {c.model.mask!r}, but a plain LLM runtime masks audio causally, and the model would hear "
            "badly there: export it as hf, or add --force to pass your own mask"
        )


def describe(built: System, has_lora: bool, meta: Mapping[str, Any], step: int) -> dict[str, Any]:
    """Returns `audio_config.json`: all that a reader of audio needs, and all that an import needs."""
    c, model = built.config, built.model.config
    lora = model.lora if has_lora else None
    return {
        "format": _FORMAT_VERSION,
        "embedder": {
            name: getattr(model.embedder, name) for name in ("kind", "n_mels", "width", "out_width", "frames_per_token")
        },
        "normalisation": c.model.normalisation,
        "mask": model.mask,
        "chunk": model.chunk,
        "lora": None
        if lora is None
        else {
            name: list(value) if isinstance(value, tuple) else value
            for name in ("n_blocks", "rank", "alpha", "rslora", "targets", "scope")
            for value in [getattr(lora, name)]
        },
        "prompt": c.data.prompt,
        "system": c.data.system or None,
        "template_kwargs": c.data.template_kwargs.to_dict(),
        "stop_ids": list(built.chat.stop_ids),
        "base": {"name": assets.published_name(c.model.llm), "fingerprint": meta["llm_fingerprint"]},
        "teacher": {"name": assets.published_name(c.model.teacher)} if c.model.teacher else None,
        "step": step,
        "run": json.loads(config.to_json(c)),
    }


def _write_reader(built: System, about: dict[str, Any], folder: Path) -> None:
    """Writes what every format has to turn waveforms and prompts into the model's input."""
    _write_json(folder / AUDIO_CONFIG, about)
    values: dict[str, Any] = {
        "auto_map": {"AutoProcessor": "processing_aura.AuraProcessor"},
        "processor_class": "AuraProcessor",
    }
    values |= {name: about["embedder"][name] for name in ("n_mels", "frames_per_token")}
    values |= {name: about[name] for name in ("normalisation", "prompt", "system", "template_kwargs", "stop_ids")}
    _write_json(folder / "processor_config.json", values)
    tokenizer = system.load_tokenizer(built.llm_dir)
    if built.config.data.chat_template:
        tokenizer.chat_template = built.config.data.chat_template
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    values = {name: value for name, value in json.loads(path.read_text()).items() if name not in _OF_THE_LOADING}
    if values["tokenizer_class"] == "TokenizersBackend":  # what transformers 5 calls it, and 4 does not know
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
    _write_json(path, values)
    for name in _EVERYWHERE:
        shutil.copyfile(_SOURCES / name, folder / name)


def _generation_config(built: System) -> dict[str, Any]:
    """Returns what torch's `generate` does by default: greedy, as the run was scored, until the turn ends.

    Not the base's own: Qwen's samples, and may not know the token that ends a turn.
    """
    pad = built.tokenizer.pad_token_id
    return {
        "do_sample": False,
        "eos_token_id": list(built.chat.stop_ids),
        "pad_token_id": built.chat.stop_ids[0] if pad is None else pad,
        "max_new_tokens": built.config.eval.max_new_tokens,
    }


def _write_peft(built: System, variables: Mapping[str, Any], folder: Path) -> None:
    lora = built.model.config.lora
    assert lora is not None
    tensors = peft.to_tensors(flatten(variables["lora"]), peft.PREFIX, ".weight", zeros=False)
    _write_json(folder / peft.CONFIG, peft.adapter_config(tensors, lora, assets.published_name(built.config.model.llm)))
    save_file(tensors, folder / peft.WEIGHTS, metadata={"format": "pt"})


def _original_llm(built: System, dtype: str) -> dict:
    """Returns the LLM as its own files have it: a run on int8 weights never changes them."""
    as_stored = dataclasses.replace(built, model=built.model.clone(param_dtype=jnp.dtype(dtype)))
    return system.load_llm(as_stored, checkpoint.system_mesh(built.config))


def _write_hf(built: System, variables: Mapping[str, Any], about: dict[str, Any], folder: Path, dtype: str) -> None:
    others = audio_embedder.to_tensors(flatten(variables["params"]["embedder"]))
    others = {f"{hf.AURA_EMBEDDER}{name}": value for name, value in others.items()}
    if "lora" in variables:
        others |= peft.to_tensors(flatten(variables["lora"]), hf.AURA_LLM, "", zeros=True)
    llm, kind = variables["params"]["llm"], jnp.dtype(dtype)
    hf_write.write_llm(folder, llm, n_adapted=_n_adapted(built), dtype=kind, prefix=hf.AURA_LLM, others=others)
    values = {
        "architectures": ["AuraForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_aura.AuraConfig",
            "AutoModelForCausalLM": "modeling_aura.AuraForCausalLM",
        },
        "model_type": hf.AURA,
        "dtype": dtype,
        "text_config": _base_config(built, dtype),
        "audio_config": {name: value for name, value in about.items() if name != "run"},
    }
    _write_json(folder / "config.json", values)
    for name in _IN_HF:
        shutil.copyfile(_SOURCES / name, folder / name)


def _write_merged(built: System, variables: Mapping[str, Any], folder: Path, dtype: str) -> None:
    llm = variables["params"]["llm"]
    if "lora" in variables:
        assert built.model.config.lora is not None
        llm = merge(llm, variables["lora"]["llm"], built.model.config.lora)
    hf_write.write_llm(folder, llm, n_adapted=_n_adapted(built), dtype=jnp.dtype(dtype))
    _write_json(folder / "config.json", _base_config(built, dtype))


def _n_adapted(built: System) -> int:
    lora = built.model.config.lora
    return lora.n_blocks if lora else 0


def _base_config(built: System, dtype: str) -> dict[str, Any]:
    """Returns the config.json of the LLM alone."""
    dropped = ("_name_or_path", "torch_dtype", "auto_map", "transformers_version")
    return {name: value for name, value in hf.text_config(built.llm_dir).items() if name not in dropped} | {
        "dtype": dtype
    }


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
