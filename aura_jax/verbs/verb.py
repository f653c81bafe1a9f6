"""A verb of the command line, and what several of them share."""

import argparse
import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from aura_jax.errors import UserError

CONFIG_HELP = """\
config:
  --config=FILE           a Python file with get_config(), such as configs/quickstart.py; FILE:BASE of one of
                          configs/systems takes over the models and data of another, e.g.
                          --config=configs/systems/bridge.py:configs/own_speech.py
  --config.KEY=VALUE      overrides one key, e.g. --config.lora.rank=32 --config.train.steps=200;
                          aura_jax/config/keys.py lists all keys with their defaults"""
OVERRIDE_HELP = """\
config:
  --config.KEY=VALUE      overrides what another machine may need other than the run had it: mesh.*,
                          model.attention, eval.*; e.g. --config.mesh.data=1 --config.model.attention=xla"""


@dataclasses.dataclass(frozen=True)
class Verb:
    """A verb: its line in the overview, its text and arguments in its own help, and what it runs.

    Attributes:
      run: (parsed arguments, arguments that the parser does not know) -> exit code.
      takes_config: arguments that begin with --config are passed on unparsed.
    """

    summary: str
    details: str
    arguments: Callable[[argparse.ArgumentParser], object]
    run: Callable[[argparse.Namespace, Sequence[str]], int]
    takes_config: bool = False


def add_workdir(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Adds --workdir, required unless there is a default."""
    shown = f" (default {default})" if default else ""
    parser.add_argument(
        "--workdir", type=Path, required=default is None, default=default, help=f"the run's directory{shown}"
    )


def add_which(parser: argparse.ArgumentParser) -> None:
    """Adds --which: the weights to take."""
    parser.add_argument(
        "--which", choices=("best", "latest"), default="best", help="checkpoint: best by validation, or latest"
    )


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Adds what `sampling_of` reads."""
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="draw tokens (default 0: always the likeliest)"
    )
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="draw among the likeliest, with P of the probability"
    )
    parser.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="R", help="above 1: say less of what was said before"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn (default 0)")


def sampling_of(args: argparse.Namespace) -> Any:
    """Returns the `infer.sampling.Sampling` that the arguments of `add_sampling` say.

    Raises:
      UserError: a value is out of range.
    """
    from aura_jax.infer.sampling import Sampling

    return Sampling(args.temperature, args.top_p, args.repetition_penalty, args.seed)


def make_folder(path: Path, name: str = "--workdir") -> None:
    """Makes a folder that the argument `name` asks for, before anything is fetched or loaded.

    Raises:
      UserError: it cannot be made, or not written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise UserError(f"{name} {path}: no folder to write to ({error.strerror}): name another") from error


def make_parent(path: Path) -> None:
    """Makes the folder of a file that will be written.

    Raises:
      UserError: it cannot be made, or the file's name is that of a folder.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(21, "a folder")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}): give another path") from error


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
