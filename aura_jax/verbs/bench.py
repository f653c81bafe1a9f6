"""The verb that measures: bench."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from aura_jax.errors import UserError
from aura_jax.verbs.verb import CONFIG_HELP, Verb, make_parent

_CONFIG = "configs/quickstart.py"
_RESULTS = Path("benchmarks/results")


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("train", "infer", "data"), help="train steps, answers, or the data pipeline")
    parser.add_argument("--output", type=Path, metavar="OUT", help=f"(default {_RESULTS}/WHAT.json)")
    parser.add_argument(
        "--figure", type=Path, metavar="OUT", help="train, infer: .svg or .png (default: beside the results)"
    )
    parser.add_argument("--quick", action="store_true", help="little of everything: to see that it works")
    parser.add_argument(
        "--workdir", type=Path, help="infer: the run that answers; data: also count its steps that waited for data"
    )
    parser.add_argument("--bridge", type=Path, metavar="RUN", help="infer: a run that keeps its encoder")
    parser.add_argument("--streaming", type=Path, metavar="RUN", help="infer: a run that hears while there is speech")
    parser.add_argument(
        "--peers", metavar="A,B,...", help="infer: some of torch,faster-whisper,llama.cpp,hf (default: all), or none"
    )


def _bench(args: argparse.Namespace, config_arguments: Sequence[str]) -> int:
    output = args.output or _RESULTS / f"{args.what}.json"
    for name in ("bridge", "streaming", "peers"):
        if args.what != "infer" and getattr(args, name) is not None:
            raise UserError(f"--{name} is for bench infer: drop it")
    make_parent(output)
    if args.what == "infer":
        return _infer(args, output, config_arguments)
    if args.what == "train":
        if args.workdir is not None or config_arguments:
            raise UserError("bench train measures the quickstart's own step: drop --workdir and --config")
        from aura_jax.experiments.bench import train

        return train.main(output, quick=args.quick, figure=args.figure)
    if args.figure is not None:
        raise UserError("--figure is for bench train and infer: bench data draws none")
    if not any(argument.startswith("--config=") for argument in config_arguments):
        config_arguments = [f"--config={_CONFIG}", *config_arguments]
    from aura_jax import config
    from aura_jax.experiments.bench import data

    return data.main(config.load(config_arguments), output, quick=args.quick, workdir=args.workdir)


def _infer(args: argparse.Namespace, output: Path, config_arguments: Sequence[str]) -> int:
    if config_arguments:
        raise UserError(f"bench infer answers with a run as it is: drop {config_arguments[0]}")
    if args.workdir is None:
        raise UserError("bench infer answers with a trained run: add --workdir RUN")
    from aura_jax.experiments.bench import infer

    peers = infer.PEERS if args.peers is None else [] if args.peers == "none" else args.peers.split(",")
    return infer.main(args.workdir, output, args.bridge, args.streaming, peers, quick=args.quick, figure=args.figure)


VERBS = {
    "bench": Verb(
        "measure: train steps and answers beside their peers, or the data pipeline",
        "`train`: the same AuRA step in torch + transformers + PEFT and here, in turn, once they agree on losses and\n"
        "gradients. `infer`: first tokens, decoding, batches, starts and memory of a run, a bridge, cascades, and of\n"
        "transformers, faster-whisper and llama.cpp, in turn, each with its error rate. `data`: decoding, resampling,\n"
        "log-mel, and the whole pipeline, per core. All write JSON and print a table. Run them from the root of the\n"
        "repository, on a quiet machine.\n\n" + CONFIG_HELP,
        _bench_arguments,
        _bench,
        takes_config=True,
    ),
}
