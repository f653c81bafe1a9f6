"""`aura-jax VERB`: parse and call, nothing else.

Nothing heavy is imported before a verb runs: help is immediate.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from aura_jax import __version__, cache
from aura_jax.errors import UserError, nearest

_USER_MISTAKE, _INTERRUPTED, _BROKEN_PIPE = 2, 130, 141
_QUICKSTART_CONFIG = "configs/quickstart.py"


class _Parser(argparse.ArgumentParser):
    """An argparse parser that reports a mistake as everything else here does: in one line."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


@dataclasses.dataclass(frozen=True)
class _Verb:
    """A verb: its line in the overview, its text and arguments in its own help, and what it runs.

    Attributes:
      run: (parsed arguments, arguments that the parser does not know) -> exit code.
      takes_config: arguments that begin with --config are passed on unparsed.
    """

    summary: str
    details: str
    arguments: Callable[[argparse.ArgumentParser], object]
    run: Callable[[argparse.Namespace, Sequence[str]], int]
    takes_config: bool = False


_CONFIG_HELP = """\
config:
  --config=FILE           a Python file with get_config(), such as configs/quickstart.py
  --config.KEY=VALUE      overrides one key, e.g. --config.lora.rank=32 --config.train.steps=200;
                          aura_jax/config/keys.py lists all keys with their defaults"""
_OVERRIDE_HELP = """\
config:
  --config.KEY=VALUE      overrides what another machine may need other than the run had it: mesh.*,
                          model.attention, eval.*; e.g. --config.mesh.data=1 --config.model.attention=xla"""


def _workdir(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    shown = f" (default {default})" if default else ""
    parser.add_argument(
        "--workdir", type=Path, required=default is None, default=default, help=f"the run's directory{shown}"
    )


def _which(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--which", choices=("best", "latest"), default="best", help="checkpoint: best by validation, or latest"
    )


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    _workdir(parser)


def _train(args: argparse.Namespace, config_arguments: Sequence[str]) -> int:
    from aura_jax import config

    loaded = config.load(config_arguments)
    _make_workdir(args.workdir)
    from aura_jax.train import loop

    return loop.RESUME_EXIT_CODE if loop.train(loaded, args.workdir).interrupted else 0


def _quickstart_arguments(parser: argparse.ArgumentParser) -> None:
    _workdir(parser, "runs/quickstart")
    parser.add_argument("--ablation", action="store_true", help="also train the same run without distillation")


def _quickstart(args: argparse.Namespace, config_arguments: Sequence[str]) -> int:
    from aura_jax import config

    if not any(argument.startswith("--config=") for argument in config_arguments):
        config_arguments = [f"--config={_QUICKSTART_CONFIG}", *config_arguments]
    loaded = config.load(config_arguments)
    _make_workdir(args.workdir)
    from aura_jax.experiments import quickstart

    return quickstart.main(args.workdir, loaded, ablation=args.ablation)


def _eval_arguments(parser: argparse.ArgumentParser) -> None:
    _workdir(parser)
    parser.add_argument("--data", type=Path, metavar="MANIFEST", help="the set; named after the file")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=MANIFEST", help="a named set; repeatable")
    parser.add_argument(
        "--system",
        choices=("student", "cascade"),
        default="student",
        help="the run's model, or its teacher's own decoder",
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the scores there")
    parser.add_argument(
        "--outputs", type=Path, metavar="OUT", help="write references and hypotheses there (JSON lines)"
    )
    _which(parser)


def _eval(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    from aura_jax import checkpoint, config
    from aura_jax.data.manifest import load_manifest
    from aura_jax.evaluate import run, score

    sets = _sets(args)
    for path in (args.json, args.outputs):  # before an hour of decoding, not after it
        if path is not None:
            _make_parent(path)
    config_of_run = config.from_json(args.workdir / "config.json")
    config_of_run = config.override(config_of_run, overrides, checkpoint.INFERENCE_KEYS)
    sets = sets or dict(config_of_run.eval.sets)
    if not sets:
        raise UserError(f"nothing to evaluate: add --data MANIFEST, or eval.sets to the config of {args.workdir}")
    rows = {name: load_manifest(path) for name, path in sets.items()}
    classifier = None
    if any("intent" in row.extra for of_set in rows.values() for row in of_set):
        try:
            classifier = run.intent_classifier(path for path, _ in config_of_run.data.train)
        except UserError as error:  # the training data may have moved, and the rest is worth having
            print(f"intent accuracy is left out: {error}", file=sys.stderr)
    if args.system == "cascade":
        answers = _cascade(config_of_run)
    else:
        from aura_jax.infer.generate import Generator

        answers = Generator(*checkpoint.load_for_inference(args.workdir, args.which, overrides=overrides))

    results = {name: run.evaluate_set(answers, rows[name], name=name, classifier=classifier) for name in rows}
    scores = {name: result.scores for name, result in results.items()}
    print(score.table(scores))
    if args.json is not None:
        _write(args.json, json.dumps(scores, indent=2) + "\n")
    if args.outputs is not None:
        lines = [{"set": name, **dataclasses.asdict(o)} for name, result in results.items() for o in result.outputs]
        _write(args.outputs, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return 0


def _sets(args: argparse.Namespace) -> dict[str, Path]:
    sets = {args.data.stem: args.data} if args.data is not None else {}
    for text in args.set:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise UserError(f"--set {text!r}: write --set NAME=MANIFEST")
        if name in sets:
            raise UserError(f"--set {text!r}: there is another set {name!r}: give it another name")
        sets[name] = Path(path)
    return sets


def _cascade(config: Any) -> Any:
    from aura_jax import assets
    from aura_jax.infer.cascade import Cascade

    if not config.model.teacher:
        raise UserError("--system cascade needs model.teacher in the run's config: it names no Whisper")
    return Cascade(assets.resolve(config.model.teacher), batch_size=config.eval.batch_size)


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    _workdir(parser)
    parser.add_argument("--audio", nargs="+", default=[], metavar="FILE", help="clips, each answered by itself")
    parser.add_argument("--prompt", metavar="TEXT", help="what to do with the audio, or a turn of text")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="longest answer (default: eval.max_new_tokens)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of bare text")
    _which(parser)


def _generate(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    if not args.audio and not args.prompt:
        raise UserError("nothing to answer: add --audio FILE, or --prompt TEXT, or both")
    from aura_jax import checkpoint
    from aura_jax.audio.io import load_audio
    from aura_jax.infer.generate import Generator, Request

    waveforms = [load_audio(file) for file in args.audio]
    system, variables = checkpoint.load_for_inference(args.workdir, args.which, overrides=overrides)
    generator = Generator(system, variables, max_new_tokens=args.max_new_tokens)
    requests = [Request(waveform, args.prompt) for waveform in waveforms] or [Request(prompt=args.prompt)]
    files = args.audio or [None]
    for file, reply in zip(files, generator.generate(requests), strict=True):
        if args.json:
            values = {"audio": file, "prompt": args.prompt, "text": reply.text, "ended": reply.ended}
            print(json.dumps(values | {"n_tokens": len(reply.tokens), "seconds": reply.seconds}, ensure_ascii=False))
        else:
            print(f"{file}: {reply.text}" if len(files) > 1 else reply.text)
    return 0


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
    return _USER_MISTAKE if n_bad else 0


def _version(_: argparse.Namespace, __: Sequence[str]) -> int:
    from importlib.metadata import version

    packages = ", ".join(f"{name} {version(name)}" for name in ("jax", "flax", "optax", "transformers"))
    print(f"aura-jax {__version__} (Python {sys.version.split()[0]}, {packages})")
    return 0


def _verbs() -> Mapping[str, _Verb]:
    verbs = {
        "quickstart": _Verb(
            "the main result on real speech: fetch, train, evaluate, report",
            "Fetches the models, trains, evaluates on the sample data and prints one table. Run it from the root of\n"
            "the repository. --config replaces configs/quickstart.py: configs/smoke.py does everything on random\n"
            "tiny models. The same command resumes.\n\n" + _CONFIG_HELP,
            _quickstart_arguments,
            _quickstart,
            takes_config=True,
        ),
        "train": _Verb(
            "train, or go on training, in a workdir",
            "Trains. The same command resumes a run that was stopped: SIGINT and SIGTERM save first, and the exit\n"
            "code is then 75.\n\n" + _CONFIG_HELP,
            _train_arguments,
            _train,
            takes_config=True,
        ),
        "eval": _Verb(
            "word error rate, exact match and intent accuracy on manifests",
            "Decodes whole sets and prints a table with 95% intervals. Without --data and --set: eval.sets of the\n"
            "run's config. Intent accuracy appears where rows have an 'intent'.\n\n" + _OVERRIDE_HELP,
            _eval_arguments,
            _eval,
            takes_config=True,
        ),
        "generate": _Verb(
            "answer speech or text",
            "With --audio and no --prompt, does what the run was trained to do (transcribe); with --prompt alone, a\n"
            "turn of text. Audio: WAV, FLAC, Ogg Vorbis, Opus or MP3.\n\n" + _OVERRIDE_HELP,
            _generate_arguments,
            _generate,
            takes_config=True,
        ),
        "assets": _Verb(
            "list or fetch the models that configs name",
            "`list` shows every named model, where it is from and what it must be; `fetch NAME ...` downloads,\n"
            "verifies and converts, and prints where the Hugging Face directory lies. $AURA_JAX_CACHE moves the cache.",
            _assets_arguments,
            _assets,
        ),
        "data": _Verb(
            "check manifests",
            "`validate MANIFEST ...` reports the first malformed line, or every clip that cannot be read, with line\n"
            "numbers, and the hours there are. Exit code 2 if anything is wrong.",
            _data_arguments,
            _data,
        ),
        "version": _Verb(
            "show versions", "Shows the versions of aura-jax and what it runs on.", lambda _: None, _version
        ),
    }
    return verbs


def _overview(verbs: Mapping[str, _Verb]) -> str:
    lines = ["usage: aura-jax VERB ...", "", "Teach a text LLM to hear.", ""]
    lines += [f"  {name:<12}{verb.summary}" for name, verb in verbs.items()]
    lines += ["", "aura-jax VERB --help says more. Exit codes: 0 done, 2 a mistake of yours, 75 stopped and saved."]
    return "\n".join(lines)


def _run(argv: Sequence[str]) -> int:
    verbs = _verbs()
    name = argv[0] if argv else "--help"
    if name in ("--help", "-h", "help"):
        print(_overview(verbs))
        return 0
    if name == "--version":
        name = "version"
    if name not in verbs:
        raise UserError(f"unknown verb {name!r}: {nearest(name, verbs)}")
    verb = verbs[name]
    parser = _Parser(prog=f"aura-jax {name}", description=f"{verb.details}")
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


def _make_workdir(path: Path) -> None:
    """Before anything is fetched or loaded."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise UserError(f"--workdir {path}: no folder to write to ({error.strerror}): name another") from error


def _make_parent(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(21, "a folder")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}): give another path") from error


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit code."""
    cache.keep_compiled_programs()
    try:
        code = _run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return _USER_MISTAKE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:  # the reader of our output went away, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE


if __name__ == "__main__":
    sys.exit(main())
