"""The verb that answers: generate."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from aura_jax.errors import UserError
from aura_jax.verbs.verb import OVERRIDE_HELP, Verb, add_sampling, add_which, sampling_of


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--workdir", type=Path, help="the run's directory")
    source.add_argument("--model", type=Path, metavar="DIR", help="a folder of aura-jax export, or a run's directory")
    parser.add_argument("--merged", action="store_true", help="fold LoRA into the LLM, also for text")
    parser.add_argument("--audio", nargs="+", default=[], metavar="FILE", help="clips, each answered by itself")
    parser.add_argument("--prompt", metavar="TEXT", help="what to do with the audio, or a turn of text")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="longest answer (default: eval.max_new_tokens)")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end the answer before TEXT (may be repeated)"
    )
    add_sampling(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of bare text")
    add_which(parser)


def _generate(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    if not args.audio and not args.prompt:
        raise UserError("nothing to answer: add --audio FILE, or --prompt TEXT, or both")
    from aura_jax.api import Model
    from aura_jax.audio.features import SAMPLE_RATE
    from aura_jax.audio.io import load_audio
    from aura_jax.infer.answer_text import checked_stop

    # Mistakes are told before anything is loaded.
    how = {**dataclasses.asdict(sampling_of(args)), "stop": checked_stop(args.stop)}
    clips = [(load_audio(file), SAMPLE_RATE) for file in args.audio]
    model = Model(
        args.model or args.workdir,
        which=args.which,
        adapters="merged" if args.merged else "separate",
        max_new_tokens=args.max_new_tokens,
        overrides=overrides,
    )
    for file, (waveform_S, _) in zip(args.audio, clips, strict=True):
        if (seconds := len(waveform_S) / SAMPLE_RATE) > model.longest_seconds:
            most = f"more than the {model.longest_seconds:g} s that the model hears at once"
            print(f"{file}: {seconds:.1f} s, {most}: it is cut in its pauses, and answered in pieces", file=sys.stderr)
    if len(clips) <= 1 and not args.json and sys.stdout.isatty():
        for part in model.stream(clips[0] if clips else None, args.prompt, **how):
            print(part, end="", flush=True)
        print()
        return 0
    files = args.audio or [None]
    replies = model.generate(clips, args.prompt, **how) if clips else [model.generate(prompt=args.prompt, **how)]
    for file, reply in zip(files, replies, strict=True):
        if args.json:
            values = {"audio": file, "prompt": args.prompt, "text": reply.text, "ended": reply.ended}
            values |= {"n_tokens": len(reply.tokens), "seconds": reply.seconds}
            print(json.dumps(values | ({"pieces": reply.pieces} if reply.pieces else {}), ensure_ascii=False))
        else:
            print(f"{file}: {reply.text}" if len(files) > 1 else reply.text)
    return 0


VERBS = {
    "generate": Verb(
        "answer speech or text",
        "With --audio and no --prompt, does what the run was trained to do (transcribe); with --prompt alone, a\n"
        "turn of text. Audio: WAV, FLAC, Ogg Vorbis, Opus or MP3, up to an hour. On a terminal, a single answer is\n"
        "shown while it is decoded; those to several clips are decoded together, and shown when they are whole. A\n"
        "clip longer than data.max_seconds is cut in its pauses, and the answers to its pieces are joined.\n\n"
        + OVERRIDE_HELP,
        _generate_arguments,
        _generate,
        takes_config=True,
    ),
}
