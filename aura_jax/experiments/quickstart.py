"""The quickstart: train AuRA on speech, evaluate it on held-out voices, sentences and recordings, and on text."""

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from aura_jax import config as config_lib
from aura_jax import system
from aura_jax.config import Config
from aura_jax.data.manifest import load_manifest
from aura_jax.errors import UserError
from aura_jax.evaluate import score, suite, text
from aura_jax.exchange import export
from aura_jax.report.run import report_run
from aura_jax.train import loop

COMMITTED = Path("benchmarks/results/quickstart.json")


def without_distillation(config: Config) -> Config:
    """Returns the same run, step for step, without distillation: a stage that taught no answers does, in its place."""
    out = config.copy_and_resolve_references()
    answers = config_lib.answer_objectives(config)
    for name in out.train.schedule:
        objectives = out.train.stages[name].objectives
        if not any(objectives[key] for key in ("lm", "response_kd")):
            objectives.update(answers)
        objectives.distill = 0.0
        out.train.stages[name].clip_norm = 1.0
    return out


def run(config: Config, workdir: Path) -> dict[str, Any] | None:
    """Trains (or goes on), evaluates, and returns the run's scores; None if a signal cut training short."""
    result = loop.train(config, workdir)
    if result.interrupted:
        return None
    path = workdir / "scores.json"
    if path.is_file():
        scores = json.loads(path.read_text())
        if (scores.get("step"), scores.get("eval")) == (result.step, suite.settings(config)):
            return scores
    return suite.score_run(workdir)[0]


def check(config: Config) -> None:
    """Reads the files that the evaluation will need: a mistake in them must not show after the training.

    Raises:
      UserError: one of them is missing or malformed.
    """
    heldout, questions = config.eval.text_heldout, config.eval.text_questions
    for path in (*config.eval.sets.values(), heldout, questions):
        if path and not Path(path).is_file():
            raise UserError(f"{path} is missing: run the quickstart from the root of the repository")
    for manifest in config.eval.sets.values():
        load_manifest(manifest)
    if questions:
        text.load_questions(questions)
    if heldout:
        text.load_heldout(heldout, system.build(config).chat)


def table(columns: dict[str, dict[str, Any]]) -> str:
    """Returns a plain table of the sets of transcripts: WER with its interval, and exact match, of each system; where
    there are none, whatever scores the first system has."""
    names = [name for name, of_set in next(iter(columns.values()))["sets"].items() if "wer" in of_set]
    if not names:
        return score.table(next(iter(columns.values()))["sets"])
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


def export_model(workdir: Path, config: Config, step: int) -> Path:
    """Returns the folder of the run's adapter for PyTorch, written unless an earlier call wrote that of this step.

    The format is peft; hf where PEFT cannot say what the run computes.
    """
    plora = config.lora.scope == "audio"
    merges = any(config.train.stages[name].merge_lora for name in config.train.schedule)
    folder = workdir / ("hf" if plora or merges else "peft")
    if folder.is_dir():
        if json.loads((folder / export.AUDIO_CONFIG).read_text())["step"] == step:
            return folder
        shutil.rmtree(folder)
    return export.export_run(workdir, folder, folder.name)


def _size(scores: dict[str, Any]) -> tuple[int, dict[str, int]]:
    """Returns the steps trained, and the rows of each test set."""
    return scores["step"], {name: of_set["n"] for name, of_set in scores["sets"].items()}


def main(workdir: Path, config: Config, ablation: bool = False) -> int:
    """Runs the quickstart; returns an exit code. `ablation` also trains the run without distillation."""
    clock = time.perf_counter()
    check(config)
    scores = run(config, workdir)
    if scores is None:
        return loop.RESUME_EXIT_CODE
    columns = {"AuRA": scores}
    if ablation:
        other = run(without_distillation(config), Path(f"{workdir.absolute()}-ablation"))
        if other is None:
            return loop.RESUME_EXIT_CODE
        columns["without distillation"] = other
    if not ablation and COMMITTED.is_file():
        committed = json.loads(COMMITTED.read_text())["systems"].get("without distillation")
        if committed and _size(committed[0]) == _size(scores):  # of the same experiment, as far as can be seen
            columns["no distillation (committed)"] = committed[0]
    page = report_run(workdir)
    exported = export_model(workdir, config, scores["scored_step"])
    print()
    print(table(columns))
    print()
    if "text" in scores:
        print(suite.text_lines(scores))
    print(
        f"{scores['step']} steps; train {scores['seconds']['train'] / 60:.1f} min, evaluate "
        f"{scores['seconds']['evaluate'] / 60:.1f} min, peak memory {scores['peak_memory_gib']:.1f} GiB; "
        f"this command took {(time.perf_counter() - clock) / 60:.1f} min"
    )
    print(f"checkpoints, metrics.jsonl, scores.json and transcripts.json: {workdir}")
    print(f"look at it: {page}")
    print(f"take it to PyTorch: {exported} (its README.md says how; aura-jax export --help for other formats)")
    print(f'try it: {Path(sys.argv[0]).name} generate --workdir {workdir} --audio FILE, or --prompt "What is the sun?"')
    return 0
