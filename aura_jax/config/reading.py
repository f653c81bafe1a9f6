"""A configuration from a Python file, the command line, or a workdir."""

import inspect
import json
import re
import runpy
import sys
import traceback
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict, config_flags

from aura_jax.config.keys import OPEN, Config, default, stage
from aura_jax.config.rules import check_structure, validate
from aura_jax.errors import UserError, nearest


def load(argv: Sequence[str]) -> Config:
    """Reads `--config=FILE` and `--config.a.b=value` arguments; FILE:BASE gives get_config an argument.

    Raises:
      UserError: for a missing or broken file, an unknown key (the nearest is suggested), or a value of another type.
    """
    path, overrides = _config_file(argv)
    config = _apply(read(path), overrides)
    validate(config)
    return config


def override(config: Config, arguments: Sequence[str], allowed: Sequence[str] | None = None) -> Config:
    """Returns the configuration of a run with `--config.a.b=value` arguments; without any, `config` itself.

    The values are checked where they are used: a run from before a rule of `validate` can still be read.

    Args:
      allowed: keys that may change; one that ends in "." stands for all below it; None: any key.

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
        if allowed is not None and not any(_covers(name, key) for name in allowed):
            names = ", ".join(f"{name}*" if name.endswith(".") else name for name in allowed)
            raise UserError(f"{key} is part of what the run was trained with: only {names} can be overridden here")
    return changed


def _covers(name: str, key: str) -> bool:
    """Whether `key` is the key `name`, or below it if that ends in "."."""
    return key.startswith(name) if name.endswith(".") else key == name


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


def read(path: str) -> Config:
    """Runs a config file, which may import its neighbours, and returns what its get_config() returns.

    Args:
      path: FILE, or FILE:BASE, whose get_config(BASE) is asked: such as a system's, for other data than its own.

    Raises:
      UserError: as `load`.
    """
    path, colon, base = path.partition(":")
    if not Path(path).is_file():
        raise UserError(f"no config file {path}: configs/ holds the shipped ones")
    with _neighbours(path):
        return _run(path, base if colon else None)


def _run(path: str, base: str | None) -> Config:
    try:
        get_config = runpy.run_path(path).get("get_config")
        if get_config is None:
            raise UserError("has no get_config(): start from a file in configs/")
        if base is not None and not inspect.signature(get_config).parameters:
            raise UserError("its get_config() takes no base: write get_config(base), as configs/systems/bridge.py does")
        config = get_config() if base is None else get_config(base)
        if not isinstance(config, ConfigDict):
            raise UserError("get_config() must change what aura_jax.config.default() returns, and return it")
        check_structure(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        where = f"{path}:{lines[-1]}" if lines else path
        raise UserError(f"{where}: {_one_line(error)}") from error
    return config


class _Reading(NamedTuple):
    """A file that is being read: the folders that its imports may be from, and what was imported before."""

    folders: frozenset[Path]
    known: frozenset[str]


_reading: list[_Reading] = []  # a file, the base that it reads, ...


@contextmanager
def _neighbours(path: str) -> Iterator[None]:
    """Lets a config file import its neighbours, `from configs import quickstart`, also from a folder of configs/.

    They are those of its own checkout, even if another one is installed, or has a file that reads this one.
    """
    folders, before = Path(path).resolve().parents[1:3], list(sys.path)
    own, outer = frozenset(folders), _reading[-1] if _reading else _Reading(frozenset(), frozenset())
    _forget(outer.folders - own, outer.known)
    _reading.append(_Reading(own, frozenset(sys.modules)))
    sys.path[:0] = map(str, folders)
    try:
        yield
    finally:
        sys.path[:] = before
        _forget(own - outer.folders, _reading.pop().known)


def _forget(folders: Set[Path], known: Set[str]) -> None:
    """Drops the modules of these folders that were not known: the next import of their names looks for them again."""
    mine = lambda name: _places(name) & {folder / end for folder in folders for end in _ends(Path(*name.split(".")))}
    # This package's folder lies beside configs/ in a checkout. Which are to go is known before any goes: a folder of
    # modules looks its place up in that above it.
    for name in [n for n in sys.modules.keys() - known if n.split(".")[0] != __name__.split(".")[0] and mine(n)]:
        del sys.modules[name]


def _places(name: str) -> set[Path]:
    file = getattr(sys.modules[name], "__file__", None)
    return {Path(place) for place in ([file] if file else getattr(sys.modules[name], "__path__", ()))}


def _ends(inside: Path) -> tuple[Path, ...]:
    return inside, inside.with_name(f"{inside.name}.py"), inside / "__init__.py"


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
    return from_values(values, path)


def from_values(values: Any, path: Path) -> Config:
    """As `from_json`, of the values themselves; `path` is where they are from, for errors."""
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
        elif key not in config and where.removesuffix(".") not in OPEN:
            raise UserError(f"unknown key {where}{key}: {nearest(key, config.keys())}")
        if isinstance(config.get(key), ConfigDict):
            _overlay(config[key], value, f"{where}{key}.")
        else:
            config[key] = value
