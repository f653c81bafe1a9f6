"""Verbs of what goes into a run: assets, data."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from aura_jax.errors import UserError
from aura_jax.verbs.verb import USER_MISTAKE, Verb


def _assets_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("list", "fetch"), help="list them all, or fetch some")
    parser.add_argument("names", nargs="*", metavar="NAME", help="with fetch: what `list` shows, or hf://owner/name")


def _assets(args: argparse.Namespace, _: Sequence[str]) -> int:
    from aura_jax import assets

    if args.action == "fetch":
        if not args.names:
            raise UserError("assets fetch: name at least one asset (aura-jax assets list)")
        for name in args.names:
            print(assets.resolve(name))
        return 0
    if args.names:
        raise UserError(f"assets list takes no names: did you mean `aura-jax assets fetch {args.names[0]}`?")
    rows = [("name", "kind", "MB", "licence", "what, and from where")]
    for asset in assets.list_assets():
        rows.append((asset.name, asset.kind, f"{asset.size / 1e6:.0f}", asset.licence, asset.what))
        rows += [("", "", "", "", f"  {line}") for line in asset.origin]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    for name, kind, size, licence, what in rows:
        line = (name.ljust(widths[0]), kind.ljust(widths[1]), size.rjust(widths[2]), licence.ljust(widths[3]), what)
        print("  ".join(line))
    return 0


def _data_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("validate",), help="check manifests and the clips they name")
    parser.add_argument("manifests", nargs="+", type=Path, metavar="MANIFEST", help="JSON lines")
    parser.add_argument("--decode", action="store_true", help="decode every clip, instead of reading its header only")


def _data(args: argparse.Namespace, _: Sequence[str]) -> int:
    from aura_jax.data import validate

    n_bad = 0
    for path in args.manifests:
        report = validate.check(path, decode=args.decode)
        for problem in report.problems:
            print(f"error: {problem}", file=sys.stderr)
        print(f"{path}: {report.summary}")
        n_bad += len(report.problems)
    return USER_MISTAKE if n_bad else 0


VERBS = {
    "assets": Verb(
        "list or fetch the models that configs name",
        "`list` shows every named model, where it is from and what it must be; `fetch NAME ...` downloads,\n"
        "verifies and converts, and prints where the Hugging Face directory lies. $AURA_JAX_CACHE moves the cache.",
        _assets_arguments,
        _assets,
    ),
    "data": Verb(
        "check manifests",
        "`validate MANIFEST ...` reports the first malformed line, or every clip that cannot be read, with line\n"
        "numbers, and the hours there are. Exit code 2 if anything is wrong.",
        _data_arguments,
        _data,
    ),
}
