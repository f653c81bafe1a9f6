"""What an answer costs on a CPU by how the LLM is held: `python benchmarks/decode.py --workdir runs/quickstart`.

Writes results/decode.json: milliseconds to the first token of an answer to speech and of each token after it, one row
at a time, of each way to hold the LLM; the latter beside transformers and the time it takes to read the weights once.
Rounds are interleaved, and what is given is each one's median, and the median over rounds of its ratio to the first.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import arms
import jax
import numpy as np
import torch
import transformers

import aura_jax
from aura_jax.infer import generate
from aura_jax.infer.prompting import Request, lay_out, tokenise
from aura_jax.infer.sampling import Choice
from aura_jax.sharding import flatten

SECONDS = 4  # of speech
TOKENS = 16  # a round's
PROMPT = 64  # tokens that transformers read, about as many as ours
NO_STOP = np.array([-1], np.int32)
# Name -> dtype and adapters of `aura_jax.load`. As trained: what is multiplied is bfloat16, and all else float32.
OURS: dict[str, tuple[str | None, str]] = {
    "float32": ("float32", "separate"),
    "float32, merged": ("float32", "merged"),
    "as trained, merged": (None, "merged"),
    "bfloat16, merged": ("bfloat16", "merged"),
    "int8": ("int8", "separate"),
}


class Decoding:
    """An answer that goes on: every call decodes `TOKENS` more tokens."""

    def __init__(self, workdir: Path, dtype: str | None, adapters: str, n_new: int):
        model = aura_jax.load(workdir, dtype=dtype, adapters=adapters, batch_size=1, max_new_tokens=n_new)
        generator = generate.Generator(model.system, model.variables, batch_size=1, max_new_tokens=n_new)
        prompt = tokenise(model.system, 0, Request(np.zeros(SECONDS * 16000, np.float32)))
        inputs = lay_out(model.system, [prompt], 1)
        self.variables, self.program = generator.held(generator.program(True, n_new), 1)
        self._prefill = lambda: generate._prefill(self.variables, inputs, NO_STOP, self.program, Choice())
        self.cache, self.state, self.prompted = self._prefill()
        self.n_bytes = bytes_of_a_token(self.program.visible(self.variables))

    def compiled(self) -> Any:
        return generate._decode.lower(*self._arguments(np.int32(2))).compile()

    def first_token(self) -> float:
        started = time.perf_counter()
        jax.block_until_ready(self._prefill())
        return time.perf_counter() - started

    def token(self) -> float:
        started = time.perf_counter()
        n_until = np.int32(int(self.state.n_done) + TOKENS)
        self.cache, self.state = generate._decode(*self._arguments(n_until))
        jax.block_until_ready(self.state)
        return (time.perf_counter() - started) / TOKENS

    def _arguments(self, n_until: np.int32) -> tuple[Any, ...]:
        nobody = np.zeros(1, bool)
        return self.variables, self.cache, self.state, self.prompted, NO_STOP, nobody, n_until, self.program


def bytes_of_a_token(variables: Mapping[str, Any]) -> int:
    """Returns the bytes of what every token is multiplied by; the table of embeddings is the head as well."""
    return sum(x.nbytes for path, x in flatten(variables).items() if "/llm/" in f"/{path}")


def theirs(llm_dir: Path, dtype: torch.dtype) -> Callable[[], float]:
    """Returns what generates `TOKENS` tokens with transformers and says how long one took, the prompt left out."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(llm_dir, dtype=dtype).eval()
    ids = torch.randint(100, 40000, (1, PROMPT), generator=torch.Generator().manual_seed(0))

    def once() -> float:
        seconds = {}
        for n in (1, 1 + TOKENS):
            started = time.perf_counter()
            with torch.inference_mode():
                model.generate(ids, max_new_tokens=n, min_new_tokens=n, do_sample=False)
            seconds[n] = time.perf_counter() - started
        return (seconds[1 + TOKENS] - seconds[1]) / TOKENS

    return once


def read_bandwidth() -> Callable[[], float]:
    """Returns what says how long 1 GB takes to be read from memory, by all cores."""
    x = torch.ones(250_000_000)

    def once() -> float:
        started = time.perf_counter()
        x.sum()
        return time.perf_counter() - started

    return once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="a finished run on a small LLM")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    n_new = TOKENS * (args.rounds + 2)
    ours = {name: Decoding(args.workdir, *how, n_new) for name, how in OURS.items()}
    temporary = {name: one.compiled().memory_analysis().temp_size_in_bytes for name, one in ours.items()}
    llm_dir = aura_jax.load(args.workdir).system.llm_dir
    all_of_them: dict[str, Callable[[], float]] = {"read 1 GB": read_bandwidth()}
    all_of_them |= {name: one.token for name, one in ours.items()}
    all_of_them |= {f"{name}: first token": one.first_token for name, one in ours.items()}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        all_of_them[f"transformers, {name}"] = theirs(llm_dir, dtype)
    rounds = [{name: one() for name, one in all_of_them.items()} for _ in range(args.rounds + 1)][1:]
    first = "float32"
    results: dict[str, Any] = {"command": f"python benchmarks/decode.py --workdir {args.workdir}"}
    results["seconds of speech"] = SECONDS
    results["bytes a second"] = 1e9 / statistics.median(one["read 1 GB"] for one in rounds)
    for name in [name for name in all_of_them if name != "read 1 GB" and not name.endswith(": first token")]:
        found = {
            "ms a token": 1e3 * statistics.median(one[name] for one in rounds),
            f"of {first}": statistics.median(one[name] / one[first] for one in rounds),
        }
        if name in ours:
            found |= {"bytes a token": ours[name].n_bytes, "temporary bytes": temporary[name]}
            at_best = [one["read 1 GB"] * ours[name].n_bytes / 1e9 / one[name] for one in rounds]
            found["of the bandwidth"] = statistics.median(at_best)
            of_speech = [(one[f"{name}: first token"], one[f"{first}: first token"]) for one in rounds]
            found["ms to a first token"] = 1e3 * statistics.median(mine for mine, _ in of_speech)
            found[f"first token of {first}"] = statistics.median(mine / its for mine, its in of_speech)
        results[name] = found
    arms.write("decode", "What an answer costs on a CPU by how the LLM is held, one row at a time", results)


if __name__ == "__main__":
    main()
