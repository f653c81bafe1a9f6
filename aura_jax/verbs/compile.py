"""The verb that asks a TPU's compiler: compile."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from aura_jax.errors import UserError
from aura_jax.verbs.verb import CONFIG_HELP, Verb, make_parent


def _compile_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--topology", required=True, metavar="KIND:SHAPE", help="a slice, in chips: v5e:16x16")
    parser.add_argument("--json", type=Path, required=True, metavar="OUT", help="where the results go")
    parser.add_argument("--hlo", type=Path, metavar="OUT", help="where the compiled program's text goes")
    parser.add_argument("--program", choices=("step", "answer"), default="step", help="training, or answering")
    parser.add_argument("--stage", default="", metavar="NAME", help="of train.schedule (default: what computes most)")
    parser.add_argument("--merged", action="store_true", help="answer with the adapters folded into the LLM")


def _compile(args: argparse.Namespace, config_arguments: Sequence[str]) -> int:
    from aura_jax import config
    from aura_jax.experiments.compile import answer, run

    if args.program == "answer" and args.stage:
        raise UserError("--stage is of training: leave it out, or ask for --program step")
    if args.program == "step" and args.merged:
        raise UserError("--merged is of answering: leave it out, or ask for --program answer")
    loaded = config.load(config_arguments)
    for path in filter(None, (args.json, args.hlo)):
        make_parent(path)
    if args.program == "answer":
        return answer.main(loaded, args.topology, args.json, args.merged, args.hlo)
    return run.main(loaded, args.topology, args.json, args.stage, args.hlo)


VERBS = {
    "compile": Verb(
        "compile a step for a TPU slice, without one",
        "Compiles the whole train step of a config ahead of time, with no TPU, no weights and no data, and says\n"
        "whether it fits, what it sends between chips, and how fast it may be at best. Needs libtpu (the extra\n"
        "`tpu`). Exit code 1 if it does not compile or not fit: the results say why.\n\n" + CONFIG_HELP,
        _compile_arguments,
        _compile,
        takes_config=True,
    ),
}
