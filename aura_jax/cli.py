"""`aura-jax VERB`: parse and call, nothing else."""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from aura_jax import __version__, cache, libtpu
from aura_jax.errors import INTERRUPTED, USER_MISTAKE, UserError, nearest
from aura_jax.verbs import answers, bench, compare, compile, exchange, materials, runs
from aura_jax.verbs.verb import Verb

_BROKEN_PIPE = 141


class _Parser(argparse.ArgumentParser):
    """An argparse parser that reports a mistake as everything else here does: in one line."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def _version(_: argparse.Namespace, __: Sequence[str]) -> int:
    from importlib.metadata import version

    packages = ", ".join(f"{name} {version(name)}" for name in ("jax", "flax", "optax", "transformers"))
    print(f"aura-jax {__version__} (Python {sys.version.split()[0]}, {packages})")
    return 0


_VERBS: dict[str, Verb] = {
    **runs.VERBS,
    **answers.VERBS,
    **exchange.VERBS,
    **materials.VERBS,
    **bench.VERBS,
    **compare.VERBS,
    **compile.VERBS,
    "version": Verb("show versions", "Shows the versions of aura-jax and what it runs on.", lambda _: None, _version),
}


def _overview() -> str:
    lines = ["usage: aura-jax VERB ...", "", "Teach a text LLM to hear.", ""]
    lines += [f"  {name:<12}{verb.summary}" for name, verb in _VERBS.items()]
    lines += ["", "aura-jax VERB --help says more. Exit codes: 0 done, 2 a mistake of yours, 75 stopped and saved."]
    return "\n".join(lines)


def _run(argv: Sequence[str]) -> int:
    name = argv[0] if argv else "--help"
    if name in ("--help", "-h", "help"):
        print(_overview())
        return 0
    if name == "--version":
        name = "version"
    if name not in _VERBS:
        raise UserError(f"unknown verb {name!r}: {nearest(name, _VERBS)}")
    verb = _VERBS[name]
    parser = _Parser(prog=f"aura-jax {name}", description=verb.details)
    verb.arguments(parser)
    if not verb.takes_config:
        return verb.run(parser.parse_args(argv[1:]), ())
    own, config_arguments = _split_config(argv[1:])
    return verb.run(parser.parse_args(own), config_arguments)


def _split_config(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits off --config FILE, --config=FILE, --config.key=value and --noconfig.key, in their order."""
    own, config_arguments, rest = [], [], iter(argv)
    for argument in rest:
        if argument == "--config":
            config_arguments.append(f"--config={next(rest, '')}")
        elif argument.startswith(("--config=", "--config.", "--noconfig.")):
            config_arguments.append(argument)
        else:
            own.append(argument)
    return own, config_arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit code."""
    cache.keep_compiled_programs()
    libtpu.settle()
    try:
        code = _run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_MISTAKE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output went away, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE


if __name__ == "__main__":
    sys.exit(main())
