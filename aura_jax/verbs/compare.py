"""The verb that compares systems."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from aura_jax.errors import UserError
from aura_jax.verbs.verb import CONFIG_HELP, Verb, add_workdir, make_folder

_CONFIG = "configs/quickstart.py"
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
    return run.main(args.systems.split(","), seeds, args.workdir, results, base, overrides)


VERBS = {
    "compare": Verb(
        "systems side by side: trained, scored and timed on the same data",
        "Trains every system with every seed, evaluates it and times its first token, each in a process of its\n"
        "own, and prints one table. What has a result is not done again, and what was stopped goes on: the same\n"
        "command finishes. --config is the base whose models, data and number of steps the systems take over\n"
        f"(default {_CONFIG}); run it from the root of the repository. docs/systems.md describes the systems.\n\n"
        + CONFIG_HELP,
        _compare_arguments,
        _compare,
        takes_config=True,
    ),
}
