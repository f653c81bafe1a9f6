"""The verb that compares systems."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from aura_jax.errors import UserError
from aura_jax.verbs.verb import CONFIG_HELP, Verb, add_workdir, make_folder

_CONFIG = "configs/compare.py"
_SYSTEMS = "aura,mel_llm,bridge,blsp,blsp_kd,diva,cascade,oracle"


def _compare_arguments(parser: argparse.ArgumentParser) -> None:
    add_workdir(parser)
    parser.add_argument(
        "--systems",
        default=_SYSTEMS,
        metavar="A,B",
        help=f"files of configs/systems, cascade, oracle, or paths of configs (default {_SYSTEMS})",
    )
    parser.add_argument("--seeds", default="0", metavar="I,J", help="of training and data (default %(default)s)")
    parser.add_argument(
        "--results", type=Path, metavar="DIR", help="a JSON a system and seed (default WORKDIR/results)"
    )
    parser.add_argument(
        "--equal-time",
        action="store_true",
        help="train each system a second time, for as long as the first one's schedule takes",
    )
    parser.add_argument(
        "--finished", action="store_true", help="train and score nothing: the page is of what has a result already"
    )


def _compare(args: argparse.Namespace, config_arguments: Sequence[str]) -> int:
    bases = [argument for argument in config_arguments if argument.startswith("--config=")]
    overrides = [argument for argument in config_arguments if argument not in bases]
    try:
        seeds = [int(seed) for seed in args.seeds.split(",")]
    except ValueError:
        seeds = []
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise UserError(f"--seeds {args.seeds!r}: write whole numbers, each once, such as --seeds 0,1,2")
    results = args.results or args.workdir / "results"
    make_folder(args.workdir)
    make_folder(results, "--results")
    from aura_jax.experiments.compare import run

    base = bases[-1].partition("=")[2] if bases else _CONFIG
    systems = args.systems.split(",")
    return run.main(systems, seeds, args.workdir, results, base, overrides, args.equal_time, args.finished)


VERBS = {
    "compare": Verb(
        "systems side by side: trained, scored and timed on the same data",
        "Trains every system with every seed and scores it, each in a process of its own; then all of them are timed\n"
        "side by side. Writes a JSON for each, one page (compare.html) with its figures, and prints one table. What\n"
        "has a result is not done again, and what was stopped goes on: the same command finishes. --config is the\n"
        f"base whose models, data and number of steps the systems take over (default {_CONFIG}); run it from\n"
        "the root of the repository. docs/systems.md describes the systems.\n\n" + CONFIG_HELP,
        _compare_arguments,
        _compare,
        takes_config=True,
    ),
}
