"""Verbs of what goes into a run: assets, data."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aura_jax.errors import USER_MISTAKE, UserError
from aura_jax.verbs.verb import CONFIG_HELP, Verb, add_sampling, make_folder, make_parent, sampling_of

_MOST_PROCESSES = 16  # where none are asked for: a disk or a bucket takes no more
_PACK_HELP = """\
Writes ArrayRecord shards: the audio files' bytes as they are, with texts, lengths and checksums. INPUT is
  a manifest (JSON lines);
  a folder of LibriSpeech, or one above it (with *.trans.txt);
  a table of Common Voice (.tsv, with clips/ beside it);
  GigaSpeech.json, or its folder: its recordings are cut into utterances (FLAC), and noise is left out;
  a parquet file as Hugging Face writes it, with the audio's bytes in a column 'audio', or a folder of them.

The same input gives the same shards. A second call writes only what is missing. Clips that cannot be read are named,
and packed as they are: training leaves them out."""
_TRANSCRIBE_HELP = """\
Writes the manifest again, with what a Whisper hears as the 'text' of every speech row that has none: then it can be
distilled on, and `data continue` can read it. The Whisper is --whisper, or the teacher (else the encoder) of --config.
A clip longer than Whisper's 30 s is cut in its pauses, and the transcripts of the pieces are joined. Rows in which
nothing is heard are left out, and so are clips that cannot be read; they are counted, and the latter named.

Whisper writes what it hears, mistakes included: keep what is to be tested on apart, with transcripts by hand.

"""
_PARTS_HELP = """\
{} go to OUT.1-of-1.jsonl first, a batch at a time: the same command goes on after a stop. To share the work,
run it with --shard 1/4, 2/4, ..., each in a process of its own that writes OUT.I-of-4.jsonl, and then without --shard,
which joins them. The parts say what they were made of and by; once OUT is there, they may be removed.

"""
_CONTINUE_HELP = """\
Writes the manifest again, with what the LLM itself says after reading each transcript as the 'response' of every
speech row, and with the 'prompt' that asked for it: `data.train` names it, and training on it is BLSP (arXiv
2309.00916). The LLM is the one of the config, or --llm, without adapters; no audio is read.

"""
_SYNTHESIZE_HELP = """\
Speaks texts in many voices (Kokoro-82M, which `assets fetch` would fetch too): clips in a folder, and their manifest
beside it, OUT.jsonl, which `data.train` names. FILE has one text a line, or is JSON lines with 'text'; other keys are
kept. Texts that cannot be spoken as they are written (digits, symbols, unknown words) are left out, and counted.

Each text gets a voice and a speed that --seed and its place in the file decide alone. Stopped at any moment, the same
command goes on; with more --hours, it adds to what is there.

"""


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
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    validate = actions.add_parser("validate", help="check manifests or shards, and the clips in them")
    validate.add_argument("manifests", nargs="+", metavar="MANIFEST", help="JSON lines, or a folder of shards")
    validate.add_argument("--decode", action="store_true", help="decode every clip, instead of reading its header only")
    pack = actions.add_parser("pack", help="write clips and texts into shards", description=_PACK_HELP)
    pack.add_argument("inputs", nargs="+", metavar="INPUT", help="in the order of their rows")
    pack.add_argument(
        "--output", required=True, metavar="FOLDER", help="a folder, or an address such as gs://bucket/it"
    )
    pack.add_argument("--subset", metavar="NAME", help="of GigaSpeech: XS, S, M, L, XL, DEV, TEST (default all)")
    pack.add_argument("--text-column", metavar="NAME", help="of parquet files, where it has an unusual name")
    pack.add_argument("--shard-size", type=int, default=256, metavar="MIB", help="of a shard (default %(default)s)")
    pack.add_argument("--processes", type=int, metavar="N", help="that write shards (default one a core, at most 16)")
    transcribe = actions.add_parser(
        "transcribe",
        help="let a Whisper write down speech",
        description=_TRANSCRIBE_HELP + _PARTS_HELP.format("Transcripts") + CONFIG_HELP,
    )
    _add_parts(transcribe)
    transcribe.add_argument(
        "--whisper", metavar="NAME", help="in place of --config=FILE: a directory, asset or hf://owner/name"
    )
    transcribe.add_argument("--language", metavar="CODE", help="of the speech, such as en (default: detected by clip)")
    transcribe.add_argument("--all", action="store_true", help="write the texts that there are anew, too")
    transcribe.add_argument(
        "--batch-size", type=int, metavar="N", help="clips heard together (default: eval.batch_size of the config, 16)"
    )
    continue_ = actions.add_parser(
        "continue",
        help="let the LLM write a response to each transcript",
        description=_CONTINUE_HELP + _PARTS_HELP.format("Responses") + CONFIG_HELP,
    )
    _add_parts(continue_)
    continue_.add_argument(
        "--llm", metavar="NAME", help="in place of --config=FILE: a directory, asset or hf://owner/name"
    )
    continue_.add_argument("--prompt", metavar="TEXT", help="after the transcript (default: data.prompt of the config)")
    continue_.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="longest response (default: eval.max_new_tokens)"
    )
    add_sampling(continue_)
    synthesize = actions.add_parser("synthesize", help="speak texts in many voices", description=_SYNTHESIZE_HELP)
    synthesize.add_argument("--text", required=True, metavar="FILE", help="lines of text (.txt), or JSON lines")
    synthesize.add_argument("--output", required=True, metavar="OUT", help="a folder for the clips")
    synthesize.add_argument(
        "--sentences",
        nargs="?",
        const="7,37",
        metavar="FEWEST,MOST",
        help="cut the texts into sentences, and speak those of so many words (%(const)s: about 3 to 15 s)",
    )
    synthesize.add_argument(
        "--voices", metavar="A,B,...", help="names, or all (default: all but those of sample_data's test sets)"
    )
    synthesize.add_argument("--readings", type=int, default=1, metavar="N", help="voices for each text (default 1)")
    synthesize.add_argument(
        "--hours", type=float, metavar="H", help="of speech, of texts in an order that --seed decides (default: all)"
    )
    synthesize.add_argument("--speeds", default="0.85,1.2", metavar="LOW,HIGH", help="(default %(default)s)")
    synthesize.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn (default 0)")
    synthesize.add_argument("--threads", type=int, metavar="N", help="clips spoken at once (default one a core)")


def _add_parts(parser: argparse.ArgumentParser) -> None:
    """Adds what a manifest with a new column is written by, in parts."""
    parser.add_argument("manifest", metavar="MANIFEST", help="JSON lines, or a folder of shards")
    parser.add_argument("--output", required=True, metavar="OUT.jsonl", help="the new manifest")
    parser.add_argument("--shard", metavar="I/N", help="write part I of N only, I from 1 to N")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N rows only, for a try")


def _parts(args: argparse.Namespace) -> dict[str, Any]:
    """Makes the folder of the output; returns `_add_parts`'s arguments as `infer.parts` calls them."""
    from aura_jax.infer.parts import Part
    from aura_jax.storage import is_remote

    if is_remote(args.output):
        raise UserError(f"--output {args.output}: write to a folder of this machine, and copy it from there")
    part = Part.parse(args.shard) if args.shard is not None else None
    make_parent(Path(args.output))
    return {"manifest": args.manifest, "output": Path(args.output), "part": part, "limit": args.limit}


def _data(args: argparse.Namespace, config_arguments: Sequence[str]) -> int:
    if args.action == "continue":
        return _continue(args, config_arguments)
    if args.action == "transcribe":
        return _transcribe(args, config_arguments)
    if config_arguments:
        raise UserError(f"data {args.action} takes no config: drop {config_arguments[0]}")
    return {"pack": _pack, "synthesize": _synthesize, "validate": _validate}[args.action](args)


def _validate(args: argparse.Namespace) -> int:
    from aura_jax.data import validate

    n_bad = 0
    for path in args.manifests:
        report = validate.check(path, decode=args.decode)
        for problem in report.problems:
            print(f"error: {problem}", file=sys.stderr)
        print(f"{path}: {report.summary}")
        n_bad += len(report.problems)
    return USER_MISTAKE if n_bad else 0


def _pack(args: argparse.Namespace) -> int:
    from aura_jax.data import pack

    for name, value in (("--shard-size", args.shard_size), ("--processes", args.processes)):
        if value is not None and value < 1:
            raise UserError(f"{name} must be at least 1, not {value}")
    report = pack.pack(
        args.inputs,
        args.output,
        subset=args.subset,
        text_column=args.text_column,
        shard_bytes=args.shard_size << 20,
        n_processes=args.processes or min(os.cpu_count() or 1, _MOST_PROCESSES),
    )
    for problem in report.problems:
        print(f"cannot be read: {problem}", file=sys.stderr)
    print(f"{args.output}: {report.summary}")
    return 0


def _transcribe(args: argparse.Namespace, config_arguments: Sequence[str]) -> int:
    has_config = any(argument.startswith("--config=") for argument in config_arguments)
    if has_config == (args.whisper is not None):
        raise UserError("data transcribe: name the Whisper by --config=FILE or by --whisper NAME, one of them")
    if config_arguments and not has_config:
        raise UserError(f"data transcribe: with --whisper there is no config: drop {config_arguments[0]}")
    from aura_jax import config
    from aura_jax.infer import cascade, transcripts

    loaded = config.load(config_arguments) if has_config else config.default()
    report = transcripts.write(
        whisper=cascade.whisper_of(loaded) if has_config else args.whisper,
        language=args.language,
        batch_size=loaded.eval.batch_size if args.batch_size is None else args.batch_size,
        anew=args.all,
        **_parts(args),
    )
    for problem in report.problems:
        print(f"cannot be read: {problem}", file=sys.stderr)
    print(report.summary)
    return 0


def _continue(args: argparse.Namespace, config_arguments: Sequence[str]) -> int:
    has_config = any(argument.startswith("--config=") for argument in config_arguments)
    if has_config == (args.llm is not None):
        raise UserError("data continue: name the LLM by --config=FILE or by --llm NAME, one of them")
    from aura_jax import config
    from aura_jax.infer import continuations

    report = continuations.write(
        config=config.load(config_arguments) if has_config else continuations.config_of(args.llm, config_arguments),
        prompt=args.prompt,
        sampling=sampling_of(args),
        max_new_tokens=args.max_new_tokens,
        **_parts(args),
    )
    print(report.summary)
    return 0


def _synthesize(args: argparse.Namespace) -> int:
    from aura_jax.storage import is_remote
    from aura_jax.synthesis import clips, kokoro, sentences

    if is_remote(args.output):
        raise UserError(f"--output {args.output}: write to a folder of this machine, and pack it from there")
    if args.threads is not None and args.threads < 1:
        raise UserError(f"--threads must be at least 1, not {args.threads}")
    try:
        low, high = map(float, args.speeds.split(","))
    except ValueError:
        raise UserError(f"--speeds {args.speeds!r}: write two numbers, such as 0.85,1.2") from None
    words = None
    if args.sentences is not None:
        try:
            fewest, most = map(int, args.sentences.split(","))
        except ValueError:
            raise UserError(f"--sentences {args.sentences!r}: write two numbers of words, such as 7,37") from None
        words = fewest, most
    utterances = sentences.read(args.text, words)
    output = Path(args.output)
    make_folder(output, "--output")
    synthesizer = kokoro.Kokoro()
    report = clips.write(
        utterances,
        output,
        synthesizer,
        voices=clips.choose_voices(args.voices, synthesizer.voices, kokoro.TEST_VOICES),
        speeds=(low, high),
        readings=args.readings,
        hours=args.hours,
        seed=args.seed,
        n_threads=args.threads or os.cpu_count() or 1,
    )
    print(report.summary)
    return 0


VERBS = {
    "assets": Verb(
        "list or fetch the models that configs name",
        "`list` shows every named model, where it is from and what it must be; `fetch NAME ...` downloads,\n"
        "verifies and converts, and prints where the Hugging Face directory lies. $AURA_JAX_CACHE moves the cache.",
        _assets_arguments,
        _assets,
    ),
    "data": Verb(
        "check manifests, pack shards, write transcripts and responses, speak texts",
        "`validate MANIFEST ...` reports the first malformed line, or every clip that cannot be read, with line\n"
        "numbers, and the hours there are; of shards, every one that differs from its checksum. Exit code 2 if\n"
        "anything is wrong.\n"
        "`pack INPUT ... --output FOLDER` writes shards, which `data.train` names like a manifest.\n"
        "`transcribe MANIFEST --output OUT.jsonl` adds what a Whisper hears where there is no transcript.\n"
        "`continue MANIFEST --output OUT.jsonl` adds what the LLM itself says after each transcript, to train on.\n"
        "`synthesize --text FILE --output FOLDER` makes speech of texts.\n"
        "`aura-jax data ACTION --help` says more.",
        _data_arguments,
        _data,
        takes_config=True,
    ),
}
