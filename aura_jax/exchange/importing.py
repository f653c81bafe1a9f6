"""From PyTorch: a PEFT adapter, an `hf` export of ours, or a plain LLM, to a workdir at step 0, or into memory.

What belongs to the weights (`_of_weights`) comes from the directory, all else of the configuration from the run that
the directory was exported from, or from a config file. Training, evaluation, answers and exports go on from there.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from aura_jax import checkpoint, sharding, system
from aura_jax import config as config_lib
from aura_jax.audio.features import ENCODER_RATE
from aura_jax.config import Config
from aura_jax.convert import audio_embedder, gguf, hf, peft
from aura_jax.errors import UserError
from aura_jax.exchange.export import AUDIO_CONFIG
from aura_jax.exchange.folder import new_folder
from aura_jax.models.lora import LoRAConfig
from aura_jax.system import System
from aura_jax.train import loop

_LORA_KEYS = ("n_blocks", "rank", "alpha", "rslora", "targets", "scope")


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a directory holds.

    Attributes:
      leaves: path -> array, of variables that are not the LLM's own.
      llm_fingerprint: of the LLM that they belong to; None: of the one in the directory, or unknown.
      remarks: lines that say what was taken from where.
    """

    config: Config
    leaves: dict[str, np.ndarray]
    llm_fingerprint: str | None
    remarks: list[str]

    def to_workdir(self, workdir: Path) -> list[str]:
        """Makes a workdir at step 0; returns the remarks.

        Raises:
          UserError: as `loop.begin`.
        """
        loop.begin(self.config, workdir, self.leaves, llm_fingerprint=self.llm_fingerprint)
        return self.remarks


def is_export(directory: Path) -> bool:
    """Whether this is a folder that `exchange.export` wrote, in any of its formats."""
    return (directory / AUDIO_CONFIG).is_file()


def load_for_inference(directory: Path, overrides: Sequence[str] = ()) -> tuple[System, dict[str, Any]]:
    """Returns the system of an export and its variables `params` and `lora`, as `checkpoint.load_for_inference`.

    Args:
      directory: of the format `peft`, `hf` or `merged`; the last has no `lora`.
      overrides: `--config.KEY=VALUE` for what another machine may need; of `peft` also model.llm, the base.

    Raises:
      UserError: as `import_peft` and `import_hf`, or a key that may not change.
    """
    is_adapter = (directory / peft.CONFIG).is_file()
    config_lib.override(config_lib.default(), overrides, (*checkpoint.INFERENCE_KEYS, *["model.llm"] * is_adapter))
    contents = (read_peft if is_adapter else read_hf)(directory, overrides, only_answers=True)
    built = system.build(contents.config)
    mesh = checkpoint.system_mesh(contents.config)
    base = system.load_base(built, mesh)
    if contents.llm_fingerprint is not None:
        checkpoint.check_llm(contents.config, checkpoint.fingerprint(base["llm"]), contents.llm_fingerprint)
    shardings = sharding.tree_shardings(contents.leaves, mesh)
    leaves = {path: jax.device_put(leaf, shardings[path]) for path, leaf in contents.leaves.items()}
    return built, sharding.join(leaves, {"params": base})


def import_peft(directory: Path, workdir: Path, config_arguments: Sequence[str] = ()) -> list[str]:
    """Makes a workdir at step 0 of what `read_peft` reads; returns lines that say what was taken from where.

    Raises:
      UserError: as `read_peft` and `loop.begin`.
    """
    return read_peft(directory, config_arguments).to_workdir(workdir)


def import_hf(directory: Path, workdir: Path, config_arguments: Sequence[str] = ()) -> list[str]:
    """Makes a workdir at step 0 of what `read_hf` reads; returns lines that say what was taken from where.

    Raises:
      UserError: as `read_hf` and `loop.begin`.
    """
    return read_hf(directory, config_arguments).to_workdir(workdir)


def read_peft(directory: Path, config_arguments: Sequence[str] = (), *, only_answers: bool = False) -> Contents:
    """Reads a PEFT adapter: ours, with its audio embedder, or any that PEFT trained.

    Args:
      config_arguments: `--config=FILE` (needed for an adapter that was not exported here) and `--config.KEY=VALUE`.
      only_answers: nothing will train: the configuration is then without the teacher, which need not be there.

    Raises:
      UserError: a directory, configuration or base that do not fit each other; the line names what differs.
    """
    peft.load_config(directory)  # a mistaken directory, before all else
    about = _about(directory)
    config = _config(directory, about, config_arguments)
    if only_answers:
        _drop_teacher(config, about)
    if about:
        _check_dtypes(directory, config, about["run"]["model"])
    llm = system.build_llm_config(config)
    scope = about["lora"]["scope"] if about else "all"  # PEFT applies an adapter to every token
    lora, leaves = peft.load_adapter(directory, llm, scope)
    if about and _lora_keys(lora) != {f"lora.{name}": _tupled(about["lora"][name]) for name in _LORA_KEYS}:
        raise UserError(f"{directory}: {peft.CONFIG} and {AUDIO_CONFIG} describe different adapters: export it again")
    taken = _set(config, _lora_keys(lora) | (_of_weights(about) if about else {}))
    leaves = {f"lora/{path}": leaf for path, leaf in leaves.items()}
    if about:
        leaves |= _embedder(config, hf.read_tensors(directory / audio_embedder.WEIGHTS), directory)
    remarks = [*taken, f"{len(leaves)} variables from {directory}", *_fresh(about is None, "the audio embedder")]
    return Contents(config, leaves, about["base"]["fingerprint"] if about else None, remarks)


def read_hf(directory: Path, config_arguments: Sequence[str] = (), *, only_answers: bool = False) -> Contents:
    """Reads an `hf` or `merged` export of ours, or a plain LLM.

    The directory becomes the base. Arguments and errors as `read_peft`; a plain LLM needs `--config=FILE`.
    """
    is_aura = hf.is_aura(directory)
    about = _about(directory)
    if is_aura and about is None:
        raise UserError(f"{directory}: an export of aura-jax without its {AUDIO_CONFIG}: export it again")
    config = _config(directory, about, config_arguments)
    if only_answers:
        _drop_teacher(config, about)
    config.model.llm = str(directory)
    leaves: dict[str, np.ndarray] = {}
    taken = _set(config, _of_weights(about) if about else {})
    if is_aura and about:
        tensors = _read_aura(directory)
        if about["lora"]:
            llm = system.build_llm_config(config)
            adapters = {key: x for key, x in tensors.items() if not key.startswith(hf.AURA_EMBEDDER)}
            rank, found = peft.from_tensors(adapters, llm, directory)
            if rank != about["lora"]["rank"]:
                raise UserError(
                    f"{directory}: {AUDIO_CONFIG} says rank {about['lora']['rank']}, the tensors have {rank}"
                )
            leaves = {f"lora/{path}": leaf for path, leaf in found.items()}
        embedder = {
            key.removeprefix(hf.AURA_EMBEDDER): x for key, x in tensors.items() if key.startswith(hf.AURA_EMBEDDER)
        }
        leaves |= _embedder(config, embedder, directory)
    elif about:
        leaves = _embedder(config, hf.read_tensors(directory / audio_embedder.WEIGHTS), directory)
    lacks_lora = not any(path.startswith("lora/") for path in leaves)
    remarks = [
        *taken,
        f"the LLM and {len(leaves)} variables from {directory}",
        *_fresh(lacks_lora, "LoRA"),
        *_fresh(about is None, "the audio embedder"),
    ]
    return Contents(config, leaves, None, remarks)


def import_gguf(file: Path, output: Path) -> None:
    """Writes a GGUF Llama as a Hugging Face directory, dequantised, whole or not at all.

    Raises:
      UserError: not a GGUF file of a Llama, or an output that is not empty.
    """
    if not file.is_file():
        raise UserError(f"--gguf {file}: there is no such file")
    with new_folder(output) as folder:
        gguf.convert_llm(file, folder)


def _about(directory: Path) -> dict[str, Any] | None:
    """Returns audio_config.json; None where there is none."""
    path = directory / AUDIO_CONFIG
    if not path.is_file():
        return None
    about = hf.read_json(path, "export it again")
    missing = {"format", "embedder", "lora", "mask", "base", "run"} - about.keys()
    if missing:
        raise UserError(f"{path}: lacks {', '.join(sorted(missing))}: export it again")
    if about["format"] != 1:
        raise UserError(f"{path}: format {about['format']} is of another version of aura-jax: update it")
    return about


def _config(directory: Path, about: Mapping[str, Any] | None, arguments: Sequence[str]) -> Config:
    """Returns the run's configuration before the keys that belong to the weights are set."""
    own = tuple(_of_weights(about)) if about else tuple(f"lora.{name}" for name in _LORA_KEYS)
    for argument in arguments:
        key = argument.lstrip("-").removeprefix("config.").partition("=")[0]
        if key in own:
            raise UserError(f"{key} belongs to the weights and comes from {directory}: drop --config.{key}")
    if any(argument.startswith("--config=") for argument in arguments):
        return config_lib.load(arguments)
    if about is None:
        raise UserError(
            f"{directory} was not exported by aura-jax, so it does not say how to go on: add --config=FILE, such as "
            "configs/own_speech.py"
        )
    return config_lib.override(config_lib.from_values(about["run"], directory / AUDIO_CONFIG), arguments)


def _drop_teacher(config: Config, about: Mapping[str, Any] | None) -> None:
    """Leaves out what only training needs, and has the shape of the embedder from the export."""
    config.model.teacher, config.train.schedule = "", ()
    if about and not config.model.encoder:
        config.embedder.update(from_teacher=False, width=about["embedder"]["width"], n_mels=about["embedder"]["n_mels"])


def _check_dtypes(directory: Path, config: Config, of_run: Mapping[str, Any]) -> None:
    """Raises UserError if the LLM would be held in other dtypes than the run held it: its fingerprint would differ."""
    for key in ("param_dtype", "dtype") if of_run["param_dtype"] == "int8" else ("param_dtype",):
        if config.model[key] != of_run[key]:
            raise UserError(
                f"{directory} was trained on an LLM held with model.{key} {of_run[key]}, not {config.model[key]}: add "
                f"--config.model.{key}={of_run[key]}"
            )


def _of_weights(about: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keys of a configuration that belong to the weights of an export, with their values."""
    keys = {
        "model.mask": about["mask"],
        "model.chunk": about["chunk"],
        "model.normalisation": about["normalisation"],
        "embedder.kind": about["embedder"]["kind"],
        "embedder.token_rate": ENCODER_RATE / about["embedder"]["frames_per_token"],
        "data.prompt": about["prompt"],
        "data.system": about["system"] or "",
        "data.chat_template": about["run"]["data"]["chat_template"],
    }
    if about["lora"]:
        keys |= {f"lora.{name}": _tupled(about["lora"][name]) for name in _LORA_KEYS}
    return keys


def _lora_keys(lora: LoRAConfig) -> dict[str, Any]:
    return {f"lora.{name}": getattr(lora, name) for name in _LORA_KEYS}


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _set(config: Config, values: Mapping[str, Any]) -> list[str]:
    """Sets keys, and returns a line for each that changes."""
    lines = []
    for key, value in values.items():
        node, _, name = key.rpartition(".")
        old = config[node][name]
        if old != value:
            config[node][name] = value
            lines.append(f"{key} is {value!r}, as the weights are (the config: {old!r})")
    return lines


def _embedder(config: Config, tensors: Mapping[str, np.ndarray], where: Path) -> dict[str, np.ndarray]:
    """Returns path -> array of an export's audio embedder."""
    root = "params/embedder/"
    shapes = sharding.flatten(system.abstract_variables(system.build(config)))
    expected = {path.removeprefix(root): leaf.shape for path, leaf in shapes.items() if path.startswith(root)}
    leaves = audio_embedder.from_tensors(tensors, expected, where)
    return {f"{root}{path}": leaf for path, leaf in leaves.items()}


def _read_aura(directory: Path) -> dict[str, np.ndarray]:
    """Returns the adapters and the embedder of an `hf` export."""
    wanted = lambda key: key.startswith(hf.AURA_EMBEDDER) or key.rpartition(".")[2] in ("lora_A", "lora_B")
    tensors: dict[str, np.ndarray] = {}
    for file in hf.weight_files(directory):
        tensors |= hf.read_tensors(file, wanted)
    return tensors


def _fresh(yes: bool, what: str) -> list[str]:
    return [f"{what} is fresh: there is none in the directory"] if yes else []
