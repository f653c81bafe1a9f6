"""Verbs between here and PyTorch: export, import."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from aura_jax.errors import UserError
from aura_jax.verbs.verb import CONFIG_HELP, OVERRIDE_HELP, Verb, add_which, add_workdir, make_folder


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    add_workdir(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new or empty folder")
    parser.add_argument("--format", required=True, metavar="peft|hf|merged", help="what it is for: see above")
    parser.add_argument("--dtype", metavar="TYPE", help="of the LLM's weights in hf and merged (default: the run's)")
    parser.add_argument("--force", action="store_true", help="merged: also where a plain runtime's mask is another")
    add_which(parser)


def _export(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    from aura_jax.exchange.export import export_run

    how = {"which": args.which, "dtype": args.dtype, "force": args.force, "overrides": overrides}
    export_run(args.workdir, args.output, args.format, **how)
    print(f"{args.format}: {args.output} (its README.md says how to use it)")
    return 0


def _import_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--peft", type=Path, metavar="DIR", help="a PEFT adapter: exported here, or trained by PEFT")
    source.add_argument("--hf", type=Path, metavar="DIR", help="an hf or merged export, or a plain LLM")
    source.add_argument("--gguf", type=Path, metavar="FILE", help="a GGUF Llama: becomes a Hugging Face directory")
    parser.add_argument("--workdir", type=Path, metavar="DIR", help="with --peft, --hf: a new workdir, at step 0")
    parser.add_argument("--output", type=Path, metavar="DIR", help="with --gguf: a new or empty folder")


def _import(args: argparse.Namespace, config_arguments: Sequence[str]) -> int:
    from aura_jax.exchange import importing

    wanted, other = ("output", "workdir") if args.gguf else ("workdir", "output")
    source = "gguf" if args.gguf else "peft" if args.peft else "hf"
    if getattr(args, wanted) is None or getattr(args, other) is not None:
        raise UserError(f"--{source} goes with --{wanted}, and not with --{other}")
    if args.gguf:
        if config_arguments:
            raise UserError(f"--gguf takes no config: drop {config_arguments[0]}")
        importing.import_gguf(args.gguf, args.output)
        print(f"{args.output}: a Hugging Face directory; name it as model.llm")
        return 0
    make_folder(args.workdir)
    if any(args.workdir.iterdir()):
        raise UserError(f"{args.workdir} is not empty: name another --workdir")
    read = importing.import_peft if args.peft else importing.import_hf
    for line in read(args.peft or args.hf, args.workdir, config_arguments):
        print(line)
    print(
        f"{args.workdir} is at step 0: eval, generate and export use it, and `aura-jax train --workdir` goes on from it"
    )
    return 0


VERBS = {
    "export": Verb(
        "to PyTorch: a PEFT adapter, a Hugging Face model, or a merged LLM",
        "Writes a folder, whole or not at all, with a model card.\n\n"
        "  peft    the adapter for peft.PeftModel.from_pretrained on the untouched base, and the audio embedder\n"
        "  hf      everything, for AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)\n"
        "  merged  a plain Llama or Qwen directory with LoRA folded in, and the audio embedder\n\n"
        "docs/pytorch.md says who should use which.\n\n" + OVERRIDE_HELP,
        _export_arguments,
        _export,
        takes_config=True,
    ),
    "import": Verb(
        "from PyTorch: a PEFT adapter, an hf export, or an LLM, to a new workdir",
        "Makes a workdir at step 0. Without --config, the run's own config goes on; an adapter or an LLM that was\n"
        "not exported here needs one. What belongs to the weights (rank, mask, ...) comes from the folder.\n\n"
        + CONFIG_HELP,
        _import_arguments,
        _import,
        takes_config=True,
    ),
}
