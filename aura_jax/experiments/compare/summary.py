"""What the page and the tables of a comparison say: means over seeds, with the range, of everything measured."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from aura_jax.evaluate.score import COLUMNS
from aura_jax.experiments.compare.plan import SAME, time_factors

Result = Mapping[str, Any]


def summarise(results: Sequence[Result], timing: Mapping[str, Any]) -> dict[str, Any]:
    """Returns {"sets": {name: clips}, "first", "systems": {name: of `_system`}, "commands", "machine", "in_turns"}.

    Args:
      results: of the jobs, of equal steps and of equal time; systems keep the order in which they come first.
      timing: of `timing.measure`.
    """
    names = dict.fromkeys(result["system"] for result in results)
    factors = time_factors(timing)
    systems = {}
    for name in names:
        of_system = [result for result in results if result["system"] == name]
        steps = [result for result in of_system if result.get("budget") != "time"]
        time = [result for result in of_system if result.get("budget") == "time"]
        systems[name] = _system(steps) | {"timing": timing["systems"].get(name)}
        factor = factors.get(name)
        # A schedule that takes as long as the first one's is its own counterpart.
        same = steps if factor is not None and abs(factor - 1) < SAME else []
        if time or (same and any(result.get("budget") == "time" for result in results)):
            runs = time or same
            seeds = [result["seed"] for result in runs]
            systems[name]["equal_time"] = _scores(runs) | {"seeds": seeds, "steps": _n_steps(runs[0])}
    return {
        "sets": {name: scores["n"] for name, scores in results[0]["scores"]["sets"].items()},
        "first": next(iter(names)),
        "systems": systems,
        "commands": list(dict.fromkeys([*(result["command"] for result in results), timing["command"]])),
        "machine": timing["machine"],
        "in_turns": timing["in_turns"],
    }


def metric_of(summary: Mapping[str, Any], of_set: str) -> str:
    """Returns the first of the scores that a set has: of transcripts the word error rate."""
    return next(key for key in COLUMNS if any(key in system["sets"][of_set] for system in summary["systems"].values()))


def _system(results: Sequence[Result]) -> dict[str, Any]:
    """Returns what is known of one system at equal steps.

    Returns:
      {"seeds", "steps", and whatever was measured of "sets", "noise", "likelihood", "text" (each number as `_over`),
      "parameters": {"trained", "kept"}, "curves": [{"seed", "step", "wer"}], "similarity": of the first seed that
      has one, "padding": of a cascade, the silence that its Whisper needs}.
    """
    first = results[0]
    out: dict[str, Any] = {"seeds": [result["seed"] for result in results], "steps": _n_steps(first)}
    out |= _scores(results)
    if "curves" in first:
        curves = [(result["seed"], result["curves"].get("validation")) for result in results]
        out["curves"] = [{"seed": seed, "step": c["step"], "wer": c["wer"]} for seed, c in curves if c]
    if parts := first.get("parameters"):
        kept = sum(part["trained"] + part["frozen"] for part in parts if part["kept"])
        out["parameters"] = {"trained": sum(part["trained"] for part in parts), "kept": kept}
    if "padding" in first:
        out["padding"] = first["padding"]
    out["similarity"] = next((result["similarity"] for result in results if result.get("similarity")), None)
    return out


def _n_steps(result: Result) -> int | None:
    return result["scores"].get("step")


def _scores(results: Sequence[Result]) -> dict[str, Any]:
    scores = [result["scores"] for result in results]
    out: dict[str, Any] = {"sets": _metrics([of["sets"] for of in scores])}
    if "noise" in scores[0]:
        out["noise"] = {
            name: {kind: _metrics([of["noise"][name][kind] for of in scores]) for kind in kinds}
            for name, kinds in scores[0]["noise"].items()
        }
    if "likelihood" in scores[0]:
        out["likelihood"] = {
            name: {
                "perplexity": _over(scores, lambda of, n=name: of["likelihood"][n]["speech"]["perplexity"]),
                "divergence": _over(scores, lambda of, n=name: of["likelihood"][n]["divergence"]),
            }
            for name in scores[0]["likelihood"]
        }
    if text := scores[0].get("text"):
        out["text"] = {"adapters": text["adapters"]}
        if "loss" in text:
            out["text"]["rise"] = _over(scores, lambda of: _with_edges(of["text"]["loss"]["all"], "rise"))
        if "questions" in text:
            asked = _over(scores, lambda of: _with_edges(of["text"]["questions"], "adapted"))
            out["text"]["questions"] = asked | {"n": text["questions"]["n"], "base": text["questions"]["base"]}
    return out


def _metrics(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns of every set (or level of noise) its scores over the runs."""
    out = {}
    for name, scores in runs[0].items():
        out[name] = {"n": scores["n"]}
        for metric in COLUMNS:
            if metric in scores:
                out[name][metric] = _over(runs, lambda run, n=name, m=metric: run[n][m])
    return out


def _with_edges(values: Mapping[str, Any], key: str) -> Any:
    """Returns one of a score's numbers with the edges of its interval; alone where it was scored without."""
    return {"value": values[key], "low": values["low"], "high": values["high"]} if "low" in values else values[key]


def _over(runs: Sequence[Any], of_run: Callable[[Any], Any]) -> dict[str, float]:
    """Returns the mean of a number over runs, its least and its greatest value; of one run, the edges of its interval.

    Args:
      of_run: returns a run's number, or {"value", "low", "high"}; a number alone of one run is its own edge.
    """
    found = [of_run(run) for run in runs]
    values = [one["value"] if isinstance(one, Mapping) else one for one in found]
    low, high = min(values), max(values)
    if len(found) == 1 and isinstance(found[0], Mapping):
        low, high = found[0]["low"], found[0]["high"]
    return {"mean": statistics.mean(values), "low": low, "high": high, "runs": len(values)}
