"""A run's own evaluation: the test sets and the texts that its config names, kept in its workdir."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from aura_jax import checkpoint, machine
from aura_jax.config import Config, to_json
from aura_jax.evaluate import text
from aura_jax.evaluate.run import evaluate_sets
from aura_jax.infer.generate import Generator

ANSWER_TOKENS = 96  # a small LLM often reasons aloud before it answers


def settings(config: Config) -> dict[str, Any]:
    """Returns the part of a config that says what is evaluated, and how."""
    return json.loads(to_json(config))["eval"]


def score_run(
    workdir: Path, which: str = "best", overrides: Sequence[str] = ()
) -> tuple[dict[str, Any], dict[str, list[dict[str, str]]]]:
    """Evaluates a run; returns its scores and what was heard, and writes them to scores.json and transcripts.json.

    Args:
      which, overrides: as `checkpoint.load_for_inference`.

    Returns:
      {"step": of the newest checkpoint, "scored_step": of the weights, "eval": `settings`, "sets": scores of each set,
      "text", "seconds": {"train", "evaluate"}, "cores", "peak_memory_gib"}, and the transcripts of
      `run.evaluate_sets`. "text" is there if the config names texts: {"adapters": their scope, or "merged", "loss": of
      `text.compare_text`, "questions": of `text.ask`}.

    Raises:
      UserError: there is no checkpoint, or a set or a text cannot be read.
    """
    clock = time.perf_counter()
    built, variables = checkpoint.load_for_inference(workdir, which, overrides)
    c = built.config
    step, train_seconds = checkpoint.newest_step(workdir)
    scores: dict[str, Any] = {"step": step, "scored_step": checkpoint.inference_step(workdir, which)}
    with jax.set_mesh(checkpoint.system_mesh(c)):
        of_sets, transcripts = evaluate_sets(Generator(built, variables), c.eval.sets, c)
        of_text: dict[str, Any] = {}
        if c.eval.text_heldout:
            heldout = text.load_heldout(c.eval.text_heldout, built.chat)
            of_text["loss"] = text.compare_text(built, variables, heldout)
        if c.eval.text_questions:
            questions = text.load_questions(c.eval.text_questions)
            of_text["questions"] = text.ask(built, variables, questions, max_new_tokens=ANSWER_TOKENS)
    scores |= {"eval": settings(c), "sets": of_sets}
    if of_text:
        scores["text"] = {"adapters": c.lora.scope if "lora" in variables else "merged", **of_text}
    scores["seconds"] = {"train": train_seconds, "evaluate": time.perf_counter() - clock}
    scores |= {"cores": machine.n_cores(), "peak_memory_gib": machine.peak_memory_gib()}
    _write(workdir / "transcripts.json", transcripts)
    _write(workdir / "scores.json", scores)
    return scores, transcripts


def _write(path: Path, value: Any) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    partial.replace(path)


def text_lines(scores: dict[str, Any]) -> str:
    """Returns what became of the LLM's text: a line on its loss, and one on its answers."""
    of_text, lines = scores["text"], []
    adapters = "merged" if of_text["adapters"] == "merged" else "on"
    if "loss" in of_text:
        loss = of_text["loss"]["all"]
        line = f"text, adapters {adapters}: {loss['adapted']:.2f} nats a token, the base LLM {loss['base']:.2f}"
        exact = "; text-only requests run without them: not a bit changes"
        lines.append(f"{line} ({loss['rise']:+.3f}){exact if of_text['adapters'] in ('request', 'audio') else ''}")
    if "questions" in of_text:
        asked = of_text["questions"]
        right = f"{asked['adapted']} of {asked['n']} right, the base LLM {asked['base']}"
        lines.append(f"plain questions, adapters {adapters}: {right}")
    return "\n".join(lines)
