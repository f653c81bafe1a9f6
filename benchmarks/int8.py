"""What holding the frozen LLM in int8 costs and saves: `python benchmarks/int8.py --workdir runs/quickstart`.

Writes results/int8.json. Of the real small weights: the loss on held-out text and the likeliest next token beside those
of float32, with bfloat16 as a yardstick; what a trained run hears with its adapters on an int8 base,
which it was not trained on; the first steps of a training on either base; and bytes, also of the 7B.
"""

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import arms
import jax
import jax.numpy as jnp
import numpy as np

from aura_jax import checkpoint, config, system
from aura_jax.data.manifest import load_manifest
from aura_jax.evaluate import text
from aura_jax.evaluate.run import Result, evaluate_set
from aura_jax.experiments.compile import shapes
from aura_jax.infer.generate import Generator
from aura_jax.models.speech_llm import text_context
from aura_jax.sharding import flatten
from aura_jax.train import loop

# How the LLM is held -> model.param_dtype, and the model.dtype that goes with it where bytes count.
HELD = {"float32": ("float32", "float32"), "bfloat16": ("bfloat16", "bfloat16"), "int8": ("int8", "bfloat16")}
COMPARED = ("float32", "int8")
STEPS = 30
CLIPS = 40  # of each set
LARGE = "whisper_small_qwen2_5_7b_int8"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="a finished quickstart")
    workdir = parser.parse_args().workdir
    c = config.from_json(workdir / "config.json")
    large = config.load([f"--config=configs/{LARGE}.py"])
    results: dict[str, Any] = {"command": f"python benchmarks/int8.py --workdir {workdir.name}"}
    about = "An LLM with int8 linears beside the same in float32; SmolLM2's weights come from a 4-bit file"
    for name, part in (
        ("bytes", lambda: {one.model.llm: stored_bytes(one) for one in (c, large)}),
        ("text", lambda: on_text(c)),
        ("sets", lambda: heard(workdir)),
        ("training", trained),
    ):
        results[name] = part()
        arms.write("int8", about, results)


def held(c: config.Config, param_dtype: str) -> config.Config:
    """Returns the configuration with the LLM held otherwise, and computed with as before."""
    c = c.copy_and_resolve_references()
    c.model.param_dtype = param_dtype
    return c


def stored_bytes(c: config.Config) -> dict[str, dict[str, int]]:
    """Returns of each way to hold the LLM the bytes of its linears with their scales, of its embeddings, and of all."""
    out = {}
    for name, (param_dtype, dtype) in HELD.items():
        one = held(c, param_dtype)
        one.model.dtype = dtype
        with shapes.build(one) as built:
            llm = flatten(system.abstract_variables(built)["params"]["llm"])
        of = lambda what, llm=llm: sum(x.size * x.dtype.itemsize for path, x in llm.items() if what in path)
        out[name] = {"linears": of("/kernel"), "embeddings": of("embed/"), "all": of("")}
    return out


def on_text(c: config.Config) -> dict[str, Any]:
    """Returns of each way to hold the base LLM its loss on each kind of held-out text, and how often its likeliest next
    token is that of float32. All is computed in float32."""
    out: dict[str, Any] = {}
    wanted: list[np.ndarray] = []
    for name, (param_dtype, _) in HELD.items():
        one = held(c, param_dtype)
        one.model.matmul_dtype = ""
        built = system.build(one)
        variables = {"params": {"llm": system.load_llm(built, checkpoint.system_mesh(one))}}
        rows = text.load_heldout(one.eval.text_heldout, built.chat)
        nats, likeliest = read(built, variables, rows)
        wanted = wanted or likeliest
        mean = lambda kind, nats=nats, rows=rows: float(
            np.concatenate([x for x, row in zip(nats, rows, strict=True) if row.kind.startswith(kind)]).mean()
        )
        out[name] = {
            "tokens": sum(map(len, nats)),
            "nats a token": {kind or "all": mean(kind) for kind in ("", *sorted({row.kind for row in rows}))},
            "same next token": float((np.concatenate(likeliest) == np.concatenate(wanted)).mean()),
        }
    return out


def read(
    built: system.System, variables: Mapping[str, Any], rows: Sequence[text.TextRow]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Returns the cross-entropy of every token of every row that counts, and the likeliest token in its place."""
    apply: Any = built.model.apply

    @jax.jit
    def predict(variables: Mapping[str, Any], tokens_1xT: jax.Array) -> tuple[jax.Array, jax.Array]:
        ctx = text_context(jnp.arange(tokens_1xT.shape[1])[None], jnp.ones_like(tokens_1xT))
        x_1xTxD = apply(variables, tokens_1xT, method="embed_text")
        x_1xTxD, _, _ = apply(variables, x_1xTxD, ctx, method="adapted_blocks")
        h_1xTxD, _ = apply(variables, x_1xTxD, ctx, method="plain_blocks")
        log_probs_TxV = jax.nn.log_softmax(apply(variables, h_1xTxD[:, :-1], method="logits")[0])
        nats_T = -jnp.take_along_axis(log_probs_TxV, tokens_1xT[0, 1:, None], axis=-1)[:, 0]
        return nats_T, jnp.argmax(log_probs_TxV, -1)

    found = []
    for row in rows:
        padding = -len(row.tokens) % 64  # comes last, where nothing that counts sees it
        both = predict(variables, np.asarray([[*row.tokens, *[0] * padding]], np.int32))
        found.append([np.asarray(x)[row.first_target - 1 : len(row.tokens) - 1] for x in both])
    return [nats for nats, _ in found], [likeliest for _, likeliest in found]


def heard(workdir: Path) -> dict[str, Any]:
    """Returns the word error rates of a run's sets on either base, and for how many clips both say the same."""
    built, variables = checkpoint.load_for_inference(workdir)
    results: dict[str, dict[str, Result]] = {}
    for name in COMPARED:
        one = held(built.config, name)
        other, mesh = system.build(one), checkpoint.system_mesh(one)
        with jax.set_mesh(mesh):
            params = {**variables["params"], "llm": system.load_llm(other, mesh)}
            answers = Generator(other, {**variables, "params": params})
            sets = {of_set: load_manifest(path)[:CLIPS] for of_set, path in one.eval.sets.items()}
            results[name] = {of_set: evaluate_set(answers, rows, name=of_set) for of_set, rows in sets.items()}
    said = lambda name, of_set: [output.hypothesis for output in results[name][of_set].outputs]
    return {
        of_set: {
            "clips": len(result.outputs),
            "wer": {name: results[name][of_set].scores["wer"] for name in COMPARED},
            "same words": sum(a == b for a, b in zip(*(said(name, of_set) for name in COMPARED), strict=True)),
        }
        for of_set, result in results["float32"].items()
    }


def trained() -> dict[str, Any]:
    """Returns the losses of the first steps of the quickstart's second stage, taken at once, on either base."""
    out: dict[str, Any] = {"steps": STEPS}
    for name in COMPARED:
        c = config.load(["--config=configs/quickstart.py", f"--config.train.steps={STEPS}"])
        c.model.param_dtype = name
        c.train.schedule, c.train.log_every, c.train.profile_steps = ("joint",), 1, 0
        with tempfile.TemporaryDirectory() as folder:
            workdir = Path(folder) / "run"
            loop.train(c, workdir)
            lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        steps = [line for line in lines if "loss" in line]
        out[name] = {
            key: [line[key] for line in steps] for key in steps[0] if key.startswith("loss") and "block" not in key
        }
    return out


if __name__ == "__main__":
    main()
