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
    parser.add_argument("--quick", action="store_true", help="little of everything: to see that it works")
    parser.add_argument("--workdir", type=Path, help="data: also count the steps of this run that waited for data")


def _bench(args: argparse.Namespace, config_arguments: Sequence[str]) -> int:
    from aura_jax import config

    output = args.output or _RESULTS / f"{args.what}.json"
    make_parent(output)
    if not any(argument.startswith("--config=") for argument in config_arguments):
        config_arguments = [f"--config={_CONFIG}", *config_arguments]
    loaded = config.load(config_arguments)
    if args.what == "data":
        from aura_jax.experiments.bench import data

        return data.main(loaded, output, quick=args.quick, workdir=args.workdir)
    if args.workdir is not None:
        raise UserError("--workdir is for bench data: bench train measures steps of its own")
    from aura_jax.experiments.bench import train

    return train.main(loaded, output, quick=args.quick)


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
