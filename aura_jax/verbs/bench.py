"""The verb that measures: bench."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from aura_jax.errors import UserError
from aura_jax.verbs.verb import CONFIG_HELP, Verb, make_parent

_CONFIG = "configs/quickstart.py"
_RESULTS = Path("benchmarks/results")


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("train", "data"), help="the train step beside its peers, or the pipeline")
    parser.add_argument("--output", type=Path, metavar="OUT", help=f"(default {_RESULTS}/WHAT.json)")
    parser.add_argument("--figure", type=Path, metavar="OUT", help="train: .svg or .png (default: beside the results)")
    parser.add_argument("--quick", action="store_true", help="little of everything: to see that it works")
    parser.add_argument("--workdir", type=Path, help="data: also count the steps of this run that waited for data")


def _bench(args: argparse.Namespace, config_arguments: Sequence[str]) -> int:
    output = args.output or _RESULTS / f"{args.what}.json"
    make_parent(output)
    if args.what == "train":
        if args.workdir is not None or config_arguments:
            raise UserError("bench train measures the quickstart's own step: drop --workdir and --config")
        from aura_jax.experiments.bench import train

        return train.main(output, quick=args.quick, figure=args.figure)
    if args.figure is not None:
        raise UserError("--figure is for bench train: bench data draws none")
    if not any(argument.startswith("--config=") for argument in config_arguments):
        config_arguments = [f"--config={_CONFIG}", *config_arguments]
    from aura_jax import config
    from aura_jax.experiments.bench import data

    return data.main(config.load(config_arguments), output, quick=args.quick, workdir=args.workdir)


VERBS = {
    "bench": Verb(
        "measure: the train step beside its peers in torch, or the data pipeline",
        "`train`: the same AuRA step in torch + transformers + PEFT and here, in turn, once they agree on losses and\n"
        "gradients. `data`: decoding, resampling, log-mel, and the whole pipeline, per core. Both write JSON and\n"
        "print a table. Run them from the root of the repository, on a quiet machine.\n\n" + CONFIG_HELP,
        _bench_arguments,
        _bench,
        takes_config=True,
    ),
}
