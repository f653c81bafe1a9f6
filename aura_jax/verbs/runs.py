"""Verbs of runs: quickstart, train, eval, report."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aura_jax.errors import UserError
from aura_jax.verbs.verb import (
    CONFIG_HELP,
    OVERRIDE_HELP,
    Verb,
    add_which,
    add_workdir,
    make_folder,
    make_parent,
    write_text,
)

_QUICKSTART_CONFIG = "configs/quickstart.py"


def _quickstart_arguments(parser: argparse.ArgumentParser) -> None:
    add_workdir(parser, "runs/quickstart")
    parser.add_argument("--ablation", action="store_true", help="also train the same run without distillation")


def _quickstart(args: argparse.Namespace, config_arguments: Sequence[str]) -> int:
    from aura_jax import config

    if not any(argument.startswith("--config=") for argument in config_arguments):
        config_arguments = [f"--config={_QUICKSTART_CONFIG}", *config_arguments]
    loaded = config.load(config_arguments)
    make_folder(args.workdir)
    from aura_jax.experiments import quickstart

    return quickstart.main(args.workdir, loaded, ablation=args.ablation)


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    add_workdir(parser)
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="of several hosts: the address of host 0")
    parser.add_argument("--hosts", metavar="N", help="how many there are")
    parser.add_argument("--host", metavar="I", help="the number of this one, from 0")


def _train(args: argparse.Namespace, config_arguments: Sequence[str]) -> int:
    from aura_jax import hosts

    hosts.join(args.coordinator, args.hosts, args.host)
    with hosts.ending_at_once():
        return _train_here(args, config_arguments)


def _train_here(args: argparse.Namespace, config_arguments: Sequence[str]) -> int:
    from aura_jax import config, hosts

    of_run = args.workdir / "config.json"

    def load() -> Any:
        if of_run.is_file() and not any(argument.startswith("--config=") for argument in config_arguments):
            return config.override(config.from_json(of_run), config_arguments)
        return config.load(config_arguments)

    loaded = hosts.together(load)
    make_folder(args.workdir)
    from aura_jax.train import loop

    return loop.RESUME_EXIT_CODE if loop.train(loaded, args.workdir).interrupted else 0


def _eval_arguments(parser: argparse.ArgumentParser) -> None:
    add_workdir(parser)
    parser.add_argument("--data", metavar="MANIFEST", help="the set, or a folder of shards; named after it")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=MANIFEST", help="a named set; repeatable")
    parser.add_argument(
        "--system",
        choices=("student", "whisper", "cascade", "oracle"),
        default="student",
        help="the run's model; its Whisper's own transcripts; these answered by the plain LLM; or the true ones",
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the scores of the sets there")
    parser.add_argument(
        "--outputs", type=Path, metavar="OUT", help="write references and hypotheses there (JSON lines)"
    )
    add_which(parser)


def _eval(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    from aura_jax import checkpoint, config
    from aura_jax.evaluate import run, score, suite

    sets = _sets(args)
    for path in (args.json, args.outputs):  # before an hour of decoding, not after it
        if path is not None:
            make_parent(path)
    config_of_run = config.from_json(args.workdir / "config.json")
    config_of_run = config.override(config_of_run, overrides, checkpoint.INFERENCE_KEYS)
    own = not sets and args.system == "student"
    if not own and any(f"config.eval.{key}" in override for key in ("noise", "likelihood") for override in overrides):
        raise UserError(
            "eval.noise and eval.likelihood belong to the run's own evaluation: drop --data, --set, --system"
        )
    kept = None
    if not sets and not config_of_run.eval.sets:
        raise UserError(f"nothing to evaluate: add --data MANIFEST, or eval.sets to the config of {args.workdir}")
    if own:
        of_run, transcripts = suite.score_run(args.workdir, args.which, overrides)
        scores = of_run["sets"]
        print(suite.tables(of_run))
    else:
        if args.system != "student":
            answers, weights = _untrained(args.system, config_of_run)
        else:
            from aura_jax.infer.generate import Generator

            answers = Generator(*checkpoint.load_for_inference(args.workdir, args.which, overrides))
            weights = checkpoint.inference_meta(args.workdir, args.which)
        kept = suite.kept_of(args.workdir, config_of_run, args.system, weights)
        sets = sets or dict(config_of_run.eval.sets)
        scores, transcripts = run.evaluate_sets(answers, sets, config_of_run, kept)
        print(score.table(scores))
    if args.json is not None:
        write_text(args.json, json.dumps(scores, indent=2) + "\n")
    if args.outputs is not None:
        lines = [{"set": name, **output} for name, outputs in transcripts.items() for output in outputs]
        write_text(args.outputs, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    if kept is not None:
        kept.finish()
    return 0


def _sets(args: argparse.Namespace) -> dict[str, str]:
    # As text: a folder of shards may be in a bucket.
    sets = {Path(args.data).stem: args.data} if args.data is not None else {}
    for text in args.set:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise UserError(f"--set {text!r}: write --set NAME=MANIFEST")
        if name in sets:
            raise UserError(f"--set {text!r}: there is another set {name!r}: give it another name")
        sets[name] = path
    return sets


def _untrained(name: str, config: Any) -> tuple[Any, Any]:
    """Returns a system of the run's base models, and what differs if their files do."""
    from aura_jax import assets
    from aura_jax.audio.io import stamp
    from aura_jax.infer import cascade
    from aura_jax.infer.generate import plain_generator
    from aura_jax.infer.transcriber import Transcriber

    named = [] if name == "oracle" else [cascade.whisper_of(config)]
    named += [] if name == "whisper" else [config.model.llm]
    folders = [assets.resolve(model) for model in named]
    files = [
        [str(folder), *sorted((path.name, *stamp(str(path))) for path in folder.iterdir() if path.is_file())]
        for folder in folders
    ]
    if name == "oracle":
        return cascade.Oracle(plain_generator(config)), files
    transcriber = Transcriber(folders[0], batch_size=config.eval.batch_size)
    return (transcriber if name == "whisper" else cascade.Cascade(transcriber, plain_generator(config))), files


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    add_workdir(parser)
    parser.add_argument("--output", type=Path, metavar="DIR", help="write it there (default: into the workdir)")


def _report(args: argparse.Namespace, _: Sequence[str]) -> int:
    if args.output is not None:
        make_folder(args.output, "--output")
    from aura_jax.report.run import report_run

    print(report_run(args.workdir, args.output))
    return 0


VERBS = {
    "quickstart": Verb(
        "the main result: fetch, train, evaluate, report",
        "Fetches the models, trains, evaluates on the sample data and prints one table. Run it from the root of\n"
        "the repository. --config replaces configs/quickstart.py: configs/smoke.py does everything on random\n"
        "tiny models. The same command resumes.\n\n" + CONFIG_HELP,
        _quickstart_arguments,
        _quickstart,
        takes_config=True,
    ),
    "train": Verb(
        "train, or go on training, in a workdir",
        "Trains. The same command resumes a run that was stopped: SIGINT and SIGTERM save first, and the exit\n"
        "code is then 75. Without --config=FILE, a run that was begun goes on with its own.\n\n"
        "Several hosts train together when each runs this command in a workdir that all of them see. They find\n"
        "each other under Slurm and on TPU slices; elsewhere by --coordinator, --hosts and --host, or by the\n"
        "variables AURA_JAX_COORDINATOR, AURA_JAX_HOSTS and AURA_JAX_HOST.\n\n" + CONFIG_HELP,
        _train_arguments,
        _train,
        takes_config=True,
    ),
    "eval": Verb(
        "WER, CER, exact match, intents, BLEU, multiple choice and questions answered on manifests",
        "Decodes whole sets and prints a table with 95% intervals. Without --data and --set: the run's own\n"
        "evaluation, which is eval.sets of its config and its texts, kept in the workdir as scores.json and\n"
        "transcripts.json. It can also hear its sets in noise (eval.noise.kinds, snr_db, sets), and measure the\n"
        "perplexity of the answers and how far hearing is from reading (eval.likelihood). An evaluation that was\n"
        "interrupted goes on when the same command is given again. Rows say by their keys how they are scored:\n"
        "'intent', 'choices' with 'answer', 'answers', or 'metric': \"bleu\".\n\n" + OVERRIDE_HELP,
        _eval_arguments,
        _eval,
        takes_config=True,
    ),
    "report": Verb(
        "one page to look at: curves, similarity, scores, examples, times",
        "Writes report.html, which needs nothing else and asks nobody, its figures as PNG, and its numbers as\n"
        "report.json. A run that goes on or was cut short is reported as far as it got.",
        _report_arguments,
        _report,
    ),
}
