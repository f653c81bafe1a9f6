"""A run's own evaluation: the test sets, the noise and the texts that its config names, kept in its workdir."""

import functools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from aura_jax import checkpoint, machine
from aura_jax.config import Config, to_json, validate_eval
from aura_jax.data.manifest import load_manifest
from aura_jax.evaluate import text
from aura_jax.evaluate.kept import Kept, identity, identity_of_file
from aura_jax.evaluate.likelihood import comparable, likelihood
from aura_jax.evaluate.likelihood import lines as likelihood_lines
from aura_jax.evaluate.noise import Noise, noise_table, noises
from aura_jax.evaluate.run import Answers, evaluate_kept, evaluate_rows, training_classifier
from aura_jax.evaluate.score import IntentClassifier, table
from aura_jax.infer.generate import Generator

ANSWER_TOKENS = 96  # a small LLM often reasons aloud before it answers


def settings(config: Config) -> dict[str, Any]:
    """Returns the part of a config that says what is evaluated, and how."""
    return json.loads(to_json(config))["eval"]


def kept_of(workdir: Path, config: Config, answers: str, weights: Any) -> Kept:
    """Returns where an evaluation keeps what it has finished, so that the same one goes on after an interruption.

    Args:
      config: of the run, overrides included.
      answers: what is evaluated, such as "student".
      weights: what differs if its weights do (JSON).
    """
    return Kept(workdir, [answers, weights, settings(config), config.model.attention])


def score_run(
    workdir: Path, which: str = "best", overrides: Sequence[str] = ()
) -> tuple[dict[str, Any], dict[str, list[dict[str, str]]]]:
    """Evaluates a run; returns its scores and what was heard, and writes them to scores.json and transcripts.json.

    Whatever is finished is kept in the workdir until all of it is: the same call goes on after an interruption.

    Args:
      which, overrides: as `checkpoint.load_for_inference`.

    Returns:
      {"step": of the newest checkpoint, "scored_step": of the weights, "eval": `settings`, "sets": scores of each set,
      "noise", "likelihood", "text", "seconds": {"train", "evaluate"}, "cores", "peak_memory_gib"}, and the transcripts
      of `run.evaluate_sets`. Three are there if the config names noise, sets or texts for them: "noise" is {set: {kind:
      {dB, such as "20": scores}}}, of the rows with audio; "likelihood" {set: of `likelihood.likelihood`}; "text"
      {"adapters": their scope, or "merged", "loss": of `text.compare_text`, "questions": of `text.ask`}.

    Raises:
      UserError: there is no checkpoint, `eval` of the config is wrong, or a set or a text cannot be read.
    """
    clock = time.perf_counter()
    built, variables = checkpoint.load_for_inference(workdir, which, overrides)
    c = built.config
    validate_eval(c)
    step, train_seconds = checkpoint.newest_step(workdir)
    scored_step, meta = checkpoint.inference_meta(workdir, which)
    scores: dict[str, Any] = {"step": step, "scored_step": scored_step}
    kept = kept_of(workdir, c, "student", [scored_step, meta])
    # Mistakes in the data show before an hour of decoding.
    rows = {name: load_manifest(path) for name, path in c.eval.sets.items()}
    noise = noises(c, rows)
    compared = {name: comparable(rows[name], name) for name in c.eval.likelihood}
    classifier = training_classifier(rows, c)
    with jax.set_mesh(checkpoint.system_mesh(c)):
        generator = Generator(built, variables)
        of_sets, transcripts = evaluate_rows(generator, rows, classifier, kept)
        at = functools.partial(sweep, generator, classifier, c.eval.noise.snr_db, kept)
        in_noise = {name: {kind: at(one, [name, kind]) for kind, one in of.items()} for name, of in noise.items()}
        likelihoods = {
            name: kept.part(
                ["likelihood", name],
                identity(of_set),
                lambda name=name, of_set=of_set: likelihood(built, variables, of_set, f"{name}, likelihood"),
            )
            for name, of_set in compared.items()
        }
        of_text: dict[str, Any] = {}
        if path := c.eval.text_heldout:
            heldout = text.load_heldout(path, built.chat)
            compare = lambda: text.compare_text(built, variables, heldout)
            of_text["loss"] = kept.part(["text", "loss"], identity_of_file(path), compare)
        if path := c.eval.text_questions:
            questions = text.load_questions(path)
            ask = lambda: text.ask(built, variables, questions, max_new_tokens=ANSWER_TOKENS)
            of_text["questions"] = kept.part(["text", "questions"], identity_of_file(path), ask)
    scores |= {"eval": settings(c), "sets": of_sets}
    scores |= {"noise": in_noise} if in_noise else {}
    scores |= {"likelihood": likelihoods} if likelihoods else {}
    if of_text:
        adapters = c.lora.scope if "lora" in variables else "merged" if c.lora.n_blocks else "none"
        scores["text"] = {"adapters": adapters, **of_text}
    scores["seconds"] = {"train": train_seconds, "evaluate": kept.seconds + time.perf_counter() - clock}
    scores |= {"cores": machine.n_cores(), "peak_memory_gib": machine.peak_memory_gib()}
    _write(workdir / "transcripts.json", transcripts)
    _write(workdir / "scores.json", scores)
    kept.finish()
    return scores, transcripts


def sweep(
    answers: Answers,
    classifier: IntentClassifier | None,
    ratios_db: Sequence[float],
    kept: Kept,
    noise: Noise,
    name: Sequence[str],
) -> dict[str, Any]:
    """Returns {dB, such as "20": scores} of a set in one kind of noise.

    Args:
      name: of the set, and of the kind of noise.
    """
    scores = {}
    for snr_db in ratios_db:
        of = [*name, f"{snr_db:g} dB"]
        found = evaluate_kept(answers, noise.rows, of, kept, classifier=classifier, change=noise.at(snr_db))
        scores[f"{snr_db:g}"] = found["scores"]
    return scores


def _write(path: Path, value: Any) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    partial.replace(path)


def tables(scores: dict[str, Any]) -> str:
    """Returns what `score_run` found as plain text: of the sets, the sets in noise, likelihoods, and the LLM's text."""
    parts = [table(scores["sets"])]
    if "noise" in scores:
        parts.append(noise_table(scores["sets"], scores["noise"]))
    if "likelihood" in scores:
        parts.append(likelihood_lines(scores["likelihood"]))
    if "text" in scores:
        parts.append(text_lines(scores))
    return "\n\n".join(parts)


def text_lines(scores: dict[str, Any]) -> str:
    """Returns what became of the LLM's text: a line on its loss, and one on its answers."""
    of_text, lines = scores["text"], []
    adapters = of_text["adapters"] if of_text["adapters"] in ("merged", "none") else "on"
    if "loss" in of_text:
        loss = of_text["loss"]["all"]
        line = f"text, adapters {adapters}: {loss['adapted']:.2f} nats a token, the base LLM {loss['base']:.2f}"
        exact = "; text-only requests run without them: not a bit changes"
        # A run that was scored before there were intervals has none.
        edges = f" [{loss['low']:+.3f}, {loss['high']:+.3f}]" if "low" in loss else ""
        rise = f"{loss['rise']:+.3f}{edges}"
        lines.append(f"{line} ({rise}){exact if of_text['adapters'] in ('request', 'audio') else ''}")
    if "questions" in of_text:
        asked = of_text["questions"]
        right = f"{asked['adapted']} of {asked['n']} right, the base LLM {asked['base']}"
        lines.append(f"plain questions, adapters {adapters}: {right}")
    return "\n".join(lines)
