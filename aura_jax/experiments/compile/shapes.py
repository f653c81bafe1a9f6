"""The shapes of a configuration's models without their weights, and a system of that shape.

A model at hand (a directory, or an asset that needs no download of weights) is read as for training. Of a repository on
the Hugging Face Hub the shape is in shapes.json, which holds what of its config.json a shape depends on; of one that is
not there, config.json alone is downloaded.
"""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from aura_jax import assets, system
from aura_jax.config import Config
from aura_jax.data.prompts import CHATML
from aura_jax.errors import UserError

_STAND_IN = "random-llama-tiny"  # has a tokenizer, and needs no download


def shipped() -> dict[str, dict[str, Any]]:
    """Returns {repository of the Hub: {"source": address, "config": the keys of config.json that say the shape}}."""
    text = resources.files("aura_jax.experiments.compile").joinpath("shapes.json").read_text(encoding="utf-8")
    return json.loads(text)


@contextlib.contextmanager
def build(config: Config) -> Iterator[system.System]:
    """Puts the modules of a configuration together, without weights; a model that is not at hand gets no tokenizer.

    Raises:
      UserError: as `system.build`, and for a model whose shape is nowhere to be had.
    """
    config = config.copy_and_resolve_references()
    with tempfile.TemporaryDirectory(prefix="aura-jax-shapes-") as scratch:
        for key in ("llm", "teacher"):
            if repository := _repository(config.model[key]):
                config.model[key] = str(_directory(repository, Path(scratch) / key))
                if key == "llm":
                    # Nothing here depends on tokens, only on how many there are: any template that works will do.
                    config.data.update(chat_template=CHATML, system="")
        yield system.build(config)


def _repository(reference: str) -> str:
    """Returns what a configuration names on the Hub, `owner/name` or `owner/name@revision`; "" for anything else."""
    if reference.startswith("hf://"):
        return reference.removeprefix("hf://")
    asset = next((asset for asset in assets.list_assets() if asset.name == reference), None)
    return f"{asset.source}@{asset.revision}" if asset is not None and asset.kind == "hub" else ""


def _directory(reference: str, directory: Path) -> Path:
    """Writes a Hugging Face directory with the repository's shape, a stand-in for its tokenizer, and no weights."""
    directory.mkdir()
    repository, _, revision = reference.partition("@")
    known = shipped().get(repository)
    if known is not None:
        (directory / "config.json").write_text(json.dumps(known["config"]), encoding="utf-8")
    else:
        try:
            shutil.copy(hf_hub_download(repository, "config.json", revision=revision or None), directory)
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise UserError(
                f"the shape of hf://{reference} is not shipped, and its config.json cannot be fetched "
                f"({type(error).__name__}): name a directory that holds its config.json and tokenizer, or one of "
                f"{', '.join(f'hf://{name}' for name in shipped())}"
            ) from error
    for file in assets.resolve(_STAND_IN).glob("tokenizer*"):
        shutil.copy(file, directory)
    return directory
