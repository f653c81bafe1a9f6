"""The quickstart: train AuRA on real speech, evaluate it on held-out voices, sentences and recordings, and on text."""

import dataclasses
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import jax

from aura_jax import checkpoint
from aura_jax.config import Config
from aura_jax.data.manifest import load_manifest
from aura_jax.errors import UserError
from aura_jax.evaluate import text
from aura_jax.evaluate.run import evaluate_set, intent_classifier
from aura_jax.infer.generate import Generator
from aura_jax.train import loop

ANSWER_TOKENS = 96  # a small LLM often reasons aloud before it answers
COMMITTED = Path("benchmarks/results/quickstart.json")


def without_distillation(config: Config) -> Config:
    """Returns the same run, step for step, with the language-model loss in place of distillation."""
    out = config.copy_and_resolve_references()
    for name in out.train.schedule:
        objectives = out.train.stages[name].objectives
        objectives.lm, objectives.distill = 1.0, 0.0
        out.train.stages[name].clip_norm = 1.0
    return out


def run(config: Config, workdir: Path) -> dict[str, Any] | None:
    """Trains (or goes on), evaluates, writes `scores.json`, and returns it; None if a signal cut training short."""
    clock = time.perf_counter()
    result = loop.train(config, workdir)
    if result.interrupted:
        return None
    trained = time.perf_counter()
    path = workdir / "scores.json"
    if path.is_file() and (scores := json.loads(path.read_text()))["step"] == result.step:
        return scores
    scores = {"step": result.step, **evaluate(config, workdir)}
    scores["seconds"] = {"train": trained - clock, "evaluate": time.perf_counter() - trained}
    scores["cores"] = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    scores["peak_memory_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(scores, indent=2) + "\n")
    partial.replace(path)
    return scores


def evaluate(config: Config, workdir: Path) -> dict[str, Any]:
    """Returns {"sets": scores of each test set, "text": loss and answers with the adapters off and on}."""
    built, variables = checkpoint.load_for_inference(workdir)
    generator = Generator(built, variables)
    classifier = intent_classifier(manifest for manifest, _ in config.data.train)
    sets, transcripts = {}, {}
    with jax.set_mesh(checkpoint.system_mesh(config)):
        for name, manifest in config.eval.sets.items():
            result = evaluate_set(generator, load_manifest(manifest), name=name, classifier=classifier)
            sets[name] = result.scores
            transcripts[name] = [dataclasses.asdict(output) for output in result.outputs]
        (workdir / "transcripts.json").write_text(json.dumps(transcripts, indent=1) + "\n")
        out: dict[str, Any] = {"sets": sets}
        if config.eval.text_heldout:
            rows = text.load_heldout(config.eval.text_heldout, built.chat)
            out["text"] = {"loss": text.compare_text(built, variables, rows)}
            questions = text.load_questions(config.eval.text_questions)
            out["text"]["questions"] = text.ask(built, variables, questions, max_new_tokens=ANSWER_TOKENS)
    return out


def table(columns: dict[str, dict[str, Any]]) -> str:
    """Returns a plain table of the test sets: WER with its interval, and exact match, of each named system."""
    names = list(next(iter(columns.values()))["sets"])
    head = f"{'test set':26}{'n':>5}" + "".join(f"{name:>34}" for name in columns)
    lines = [head, f"{'':31}" + "".join(f"{'WER % (95% interval)   exact %':>34}" for _ in columns)]
    for name in names:
        n = next(iter(columns.values()))["sets"][name]["n"]
        cells = []
        for scores in columns.values():
            wer, exact = scores["sets"][name]["wer"], scores["sets"][name]["exact_match"]
            rate = f"{100 * wer['value']:.1f} ({100 * wer['low']:.1f} to {100 * wer['high']:.1f})"
            cells.append(f"{rate}   {100 * exact['value']:5.1f}")
        lines.append(f"{name:26}{n:5}" + "".join(f"{cell:>34}" for cell in cells))
    return "\n".join(lines)


def text_lines(scores: dict[str, Any]) -> str:
    """Returns what became of the LLM's text, in two lines."""
    loss, questions = scores["text"]["loss"]["all"], scores["text"]["questions"]
    return (
        f"text, adapters on: {loss['adapted']:.2f} nats a token, {loss['base']:.2f} without them "
        f"({loss['rise']:+.3f}); text-only requests run without them: not a bit changes\n"
        f"plain questions: {questions['adapted']} of {questions['n']} right with adapters on, "
        f"{questions['base']} without"
    )


def main(workdir: Path, config: Config, ablation: bool = False) -> int:
    """Runs the quickstart; returns an exit code. `ablation` also trains the run without distillation."""
    clock = time.perf_counter()
    for manifest in config.eval.sets.values():
        if not Path(manifest).is_file():
            raise UserError(f"{manifest} is missing: run the quickstart from the root of the repository")
    scores = run(config, workdir)
    if scores is None:
        return loop.RESUME_EXIT_CODE
    columns = {"AuRA": scores}
    if ablation:
        other = run(without_distillation(config), workdir.with_name(f"{workdir.name}-ablation"))
        if other is None:
            return loop.RESUME_EXIT_CODE
        columns["without distillation"] = other
    if not ablation and COMMITTED.is_file():
        committed = json.loads(COMMITTED.read_text())["systems"].get("without distillation")
        if committed and set(committed[0]["sets"]) == set(config.eval.sets):
            columns["no distillation (committed)"] = committed[0]
    print()
    print(table(columns))
    print()
    if "text" in scores:
        print(text_lines(scores))
    print(
        f"{scores['step']} steps; train {scores['seconds']['train'] / 60:.1f} min, evaluate "
        f"{scores['seconds']['evaluate'] / 60:.1f} min, peak memory {scores['peak_memory_gib']:.1f} GiB; "
        f"this command took {(time.perf_counter() - clock) / 60:.1f} min"
    )
    print(f"checkpoints, metrics.jsonl, scores.json and transcripts.json: {workdir}")
    print(f'try it: {Path(sys.argv[0]).name} generate --workdir {workdir} --audio FILE, or --prompt "What is the sun?"')
    return 0
