"""How far a run's exports in torch are from the run: benchmarks/results/interop.json.

    python benchmarks/interop.py --workdir runs/quickstart

Random tiny models of each family, and a trained run on the real small weights: logits at every token of a spoken
prompt, in each format and dtype, as max|a - b| / max|b|; and the greedy text of 20 recordings, token by token.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent / "peers"))
from torch_exports import Exported

from aura_jax import checkpoint, config, machine, sharding, system
from aura_jax.audio.io import load_audio
from aura_jax.convert import random_models
from aura_jax.data.manifest import load_manifest
from aura_jax.exchange import importing
from aura_jax.exchange.export import DTYPES, FORMATS, export_run
from aura_jax.infer.generate import Generator
from aura_jax.infer.prompting import Request
from aura_jax.train import loop

OUT = Path(__file__).parent / "results" / "interop.json"
CLIPS = Path("sample_data/recordings/test.jsonl")
N_CLIPS = 20
FAMILIES = (("llama", True), ("llama", False), ("qwen2", False), ("qwen3", True))


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


def random_run(folder: Path, family: str, tied: bool) -> Path:
    """Writes the workdir of a random tiny model with adapters that do something."""
    for name in ("llm", "whisper"):
        (folder / name).mkdir()
    random_models.build_llm(folder / "llm", family=family, tied=tied)
    random_models.build_whisper(folder / "whisper")
    c = config.default()
    c.model.update(llm=str(folder / "llm"), teacher=str(folder / "whisper"))
    c.lora.update(n_blocks=2, rank=8, alpha=8.0)
    c.data.train, c.data.buckets = ((str(CLIPS), 1.0),), (4.0,)
    c.train.schedule, c.train.stages.joint = ("joint",), config.stage(1, 1e-3, {"lm": 1.0})
    workdir = folder / "run"
    built = system.build(c)
    shapes = sharding.flatten(system.abstract_variables(built))
    lora = {path: x.shape for path, x in shapes.items() if path.startswith("lora/")}
    keys = jax.random.split(jax.random.key(0), len(lora))
    noise = {p: 0.3 * np.asarray(jax.random.normal(k, s)) for k, (p, s) in zip(keys, lora.items(), strict=True)}
    loop.begin(c, workdir, noise)
    return workdir


def differences(workdir: Path, scratch: Path, waveform: np.ndarray, dtypes: tuple[str, ...]) -> dict[str, Any]:
    """Returns format -> dtype -> the difference of the logits, and what a round trip changed."""
    built, variables = checkpoint.load_for_inference(workdir)
    wanted = Generator(built, variables).prompt_logits(Request(waveform))
    out: dict[str, Any] = {}
    for name in FORMATS:
        folder = export_run(workdir, scratch / name, name, force=name == "merged")
        out[name] = {
            dtype: relative(Exported(name, folder, built.llm_dir, getattr(torch, dtype)).logits(waveform), wanted)
            for dtype in dtypes
        }
    for name, read in (("peft", importing.import_peft), ("hf", importing.import_hf)):
        read(scratch / name, scratch / f"{name} again")
        again = checkpoint.load_for_inference(scratch / f"{name} again")[1]
        before, after = sharding.flatten(variables), sharding.flatten(again)
        assert before.keys() == after.keys()
        out[name]["variables that a round trip changed"] = sum(
            not np.array_equal(before[path], after[path]) for path in before
        )
    return out


def greedy(workdir: Path, scratch: Path) -> dict[str, Any]:
    """Returns for how many recordings torch says token by token what the run says."""
    c = config.from_json(workdir / "config.json")
    clips = [load_audio(row.audio) for row in load_manifest(CLIPS)[:N_CLIPS]]
    built, variables = checkpoint.load_for_inference(workdir)
    replies = Generator(built, variables).generate([Request(clip) for clip in clips])
    wanted = [list(reply.tokens) for reply in replies]
    out: dict[str, Any] = {"clips": len(clips), "tokens": sum(map(len, wanted))}
    for name in ("hf", "peft"):
        found = Exported(name, scratch / name, built.llm_dir).tokens(clips, c.eval.max_new_tokens)
        out[name] = sum(a == b for a, b in zip(found, wanted, strict=True))
    return out


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="a trained run")
    parser.add_argument("--output", type=Path, default=OUT)
    args = parser.parse_args(argv)
    waveform = load_audio(load_manifest(CLIPS)[0].audio)
    results: dict[str, Any] = {}
    for name, about in cases(args.workdir):
        print(name, flush=True)
        with tempfile.TemporaryDirectory() as scratch:
            results[name] = about(Path(scratch), waveform)
            print(json.dumps(results[name], indent=1), flush=True)
    out = {
        "command": f"python benchmarks/interop.py --workdir {args.workdir}",
        "machine": machine.describe(),
        "measure": "max|a - b| / max|b| of the logits at every token of a spoken prompt; b: aura_jax",
        "results": results,
    }
    args.output.write_text(json.dumps(out, indent=1) + "\n")


def cases(workdir: Path) -> Iterator[tuple[str, Any]]:
    """Yields the name of each comparison, and what makes it."""
    for family, tied in FAMILIES:

        def of_family(scratch: Path, waveform: np.ndarray, family: str = family, tied: bool = tied) -> Mapping:
            return differences(random_run(scratch, family, tied), scratch, waveform, DTYPES)

        yield f"random {family}, {'tied' if tied else 'untied'}", of_family

    def of_run(scratch: Path, waveform: np.ndarray) -> Mapping:
        run = in_float32(workdir, scratch)
        return {**differences(run, scratch, waveform, DTYPES), "greedy": greedy(run, scratch)}

    yield "the trained run", of_run


def in_float32(workdir: Path, scratch: Path) -> Path:
    """Returns a view of a run whose products have float32 operands, as torch's have, though it trained with others."""
    view = scratch / "run"
    view.mkdir()
    for name in ("best", "checkpoints"):
        if (workdir / name).is_dir():
            (view / name).symlink_to((workdir / name).absolute())
    c = config.from_json(workdir / "config.json")
    c.model.matmul_dtype = ""
    (view / "config.json").write_text(config.to_json(c))
    return view


if __name__ == "__main__":
    main()
