"""The verb that answers: generate."""

import argparse
import json
import sys
from collections.abc import Sequence

from aura_jax.errors import UserError
from aura_jax.verbs.verb import OVERRIDE_HELP, Verb, add_sampling, add_which, add_workdir, sampling_of


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    add_workdir(parser)
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
    from aura_jax import checkpoint
    from aura_jax.audio.io import load_audio
    from aura_jax.infer.answer_text import checked_stop
    from aura_jax.infer.generate import Generator
    from aura_jax.infer.prompting import Request

    sampling, stop = sampling_of(args), checked_stop(args.stop)
    waveforms = [load_audio(file) for file in args.audio]
    system, variables = checkpoint.load_for_inference(args.workdir, args.which, overrides=overrides)
    generator = Generator(system, variables, max_new_tokens=args.max_new_tokens)
    requests = [Request(waveform, args.prompt) for waveform in waveforms] or [Request(prompt=args.prompt)]
    if len(requests) == 1 and not args.json and sys.stdout.isatty():
        for piece in generator.stream(requests[0], sampling=sampling, stop=stop):
            print(piece, end="", flush=True)
        print()
        return 0
    files = args.audio or [None]
    for file, reply in zip(files, generator.generate(requests, sampling=sampling, stop=stop), strict=True):
        if args.json:
            values = {"audio": file, "prompt": args.prompt, "text": reply.text, "ended": reply.ended}
            print(json.dumps(values | {"n_tokens": len(reply.tokens), "seconds": reply.seconds}, ensure_ascii=False))
        else:
            print(f"{file}: {reply.text}" if len(files) > 1 else reply.text)
    return 0


VERBS = {
    "generate": Verb(
        "answer speech or text",
        "With --audio and no --prompt, does what the run was trained to do (transcribe); with --prompt alone, a\n"
        "turn of text. Audio: WAV, FLAC, Ogg Vorbis, Opus or MP3, up to eval.max_seconds of it. On a terminal, a\n"
        "single answer is shown while it is decoded; those to several clips are decoded together, and shown when they\n"
        "are whole.\n\n" + OVERRIDE_HELP,
        _generate_arguments,
        _generate,
        takes_config=True,
    ),
}
