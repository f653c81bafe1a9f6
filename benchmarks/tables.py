"""Writes the tables of README, benchmarks/README.md and docs from results/: `python benchmarks/tables.py`."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from arms import RESULTS, spread
from pods import PLAN

from aura_jax.experiments.bench import infer_report
from aura_jax.experiments.compare import table

ROOT = Path(__file__).parents[1]
PAGES = tuple(
    ROOT / page
    for page in (
        "README.md",
        "benchmarks/README.md",
        "docs/inference.md",
        "docs/performance.md",
        "docs/pods.md",
        "docs/pytorch.md",
        "docs/systems.md",
    )
)
_PLACE = re.compile(r"(<!-- table (\w+): python benchmarks/tables.py -->\n).*?(<!-- end of table -->)", re.DOTALL)


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _head(cells: list[str]) -> list[str]:
    return [_row(cells), "|---" * len(cells) + "|"]


def quickstart(results: dict[str, Any]) -> str:
    """Returns the table of results/quickstart.json: a column a system; means over seeds, with the range."""
    systems: dict[str, list[dict[str, Any]]] = results["systems"]
    count = lambda runs: f"{len(runs)} seeds" if len(runs) > 1 else "1 seed"
    lines = _head(["", *(f"{name} ({count(runs)})" for name, runs in systems.items())])

    def add(name: str, value: Callable[[dict], float | None], scale: float = 1.0, digits: int = 1) -> None:
        """A value is None where it was not measured."""
        values = [[x for run in runs if (x := value(run)) is not None] for runs in systems.values()]
        lines.append(_row([name, *(spread(of_system, scale, digits) if of_system else "" for of_system in values)]))

    sets = next(iter(systems.values()))[0]["sets"]
    for name, scores in sets.items():
        add(f"WER %, {name} ({scores['n']} clips)", lambda run, name=name: run["sets"][name]["wer"]["value"], 100)
    add("rise of the loss on held-out text, adapters on, nats", lambda run: run["text"]["loss"]["all"]["rise"], 1, 3)
    n = next(iter(systems.values()))[0]["text"]["questions"]["n"]
    add(f"plain text questions right, adapters on (of {n})", lambda run: run["text"]["questions"]["adapted"], 1, 0)
    # The others shared the machine.
    alone = lambda value: lambda run: value(run) if run["cores"] == 2 else None
    for part in ("train", "evaluate"):
        add(f"minutes to {part} on two cores", alone(lambda run, part=part: run["seconds"][part] / 60))
    add("peak memory on two cores, GiB", alone(lambda run: run["peak_memory_gib"]))
    return "\n".join(lines) + "\n"


def forgetting(results: dict[str, Any]) -> str:
    """Returns the table of results/forgetting.json: a row a protection."""
    sections = {"": results["arms"], "whole schedule: ": results["whole_schedule"]}
    runs = {f"{prefix}{name}": run for prefix, arms in sections.items() for name, run in arms.items()}
    n = next(iter(runs.values()))["text"]["questions"]["n"]
    lines = _head(
        ["protection", "WER %, new voices (95% interval)", "rise of the loss on text, nats", f"questions of {n}"]
    )
    for name, run in runs.items():
        wer, text = run["sets"]["new voices"]["wer"], run["text"]
        cells = [name, f"{100 * wer['value']:.1f} ({100 * wer['low']:.1f} to {100 * wer['high']:.1f})"]
        lines.append(_row([*cells, f"{text['loss']['all']['rise']:.3f}", str(text["questions"]["adapted"])]))
    return "\n".join(lines) + "\n"


def _times(value: dict[str, float]) -> str:
    return f"{value['median']:.2f} ({value['low']:.2f} to {value['high']:.2f})"


def train(results: dict[str, Any]) -> str:
    """Returns the table of results/train.json: a row an arm, on the quickstart's batches."""
    arms = results["base"]["arms"]
    stages = list(next(iter(arms.values()))["stages"])
    head = ["arm"]
    for stage in stages:
        head += [f"{stage}: s a step", "tokens/s", "share of the matmul peak"]
    lines = _head([*head, "seconds to the first step", "peak GiB in steps", "quickstart's schedule, min"])
    for name, arm in arms.items():
        cells = [name]
        for stage in stages:
            of = arm["stages"][stage]
            cells += [f"{of['seconds_per_step']:.3f}", f"{of['tokens_per_second']:.0f}"]
            cells.append(f"{100 * of['share_of_matmul_peak']:.0f} %")
        cells += [f"{arm['start_seconds']['total']:.1f}", f"{arm['peak_memory_bytes']['since_watch'] / 2**30:.2f}"]
        lines.append(_row([*cells, f"{arm['schedule']['total'] / 60:.1f}"]))
    return "\n".join(lines) + "\n"


def ratios(results: dict[str, Any]) -> str:
    """Returns how many times as fast ours is as each peer, and its share of each peer's memory."""
    pairs = [(ours, peer, of) for ours, peers in results["base"]["ratios"].items() for peer, of in peers.items()]
    stages = list(pairs[0][2]["speed"])
    lines = _head(["", *(f"{stage}: times as fast (range)" for stage in stages), "peak memory"])
    for ours, peer, of in pairs:
        cells = [f"{ours} / {peer}", *(_times(of["speed"][stage]) for stage in stages), f"{of['memory']:.2f}"]
        lines.append(_row(cells))
    return "\n".join(lines) + "\n"


def sweep(results: dict[str, Any]) -> str:
    """Returns the sweep of results/train.json: a row a value of a factor."""
    lines = _head(["factor", "value", "torch eager, s a step", "ours, s a step", "times as fast (range)", "memory"])
    for factor, points in results["sweep"].items():
        for point in points:
            theirs, ours = (sorted(seconds)[len(seconds) // 2] for seconds in point["seconds"].values())
            memory = list(point["peak_memory_bytes"].values())
            cells = [factor, f"{point['value']:g}", f"{theirs:.2f}", f"{ours:.2f}", _times(point["speed"])]
            lines.append(_row([*cells, f"{memory[1] / memory[0]:.2f}"]))
    return "\n".join(lines) + "\n"


def parts(results: dict[str, Any]) -> str:
    """Returns where a step's time goes, of results/step_cost.json: milliseconds that a part keeps the cores busy."""
    columns = [(dtype, name) for dtype, of in results["matmul_dtype"].items() for name in of["steps"]]
    of = {key: results["matmul_dtype"][key[0]]["steps"][key[1]] for key in columns}
    lines = _head(["part", *(f"{name}, {dtype}" for dtype, name in columns)])
    names = list(dict.fromkeys(part for key in columns for part in of[key]["busy_seconds"]))

    def cell(busy: dict[str, float] | None) -> str:
        return "" if busy is None else f"{1000 * busy['forward']:.0f} + {1000 * busy['backward']:.0f}"

    lines += [_row([part, *(cell(of[key]["busy_seconds"].get(part)) for key in columns)]) for part in names]
    lines.append(_row(["**wall time of a step, ms**", *(f"{1000 * of[key]['median_seconds']:.0f}" for key in columns)]))
    lines.append(_row(["**GFLOP a step**", *(f"{of[key]['operations_total'] / 1e9:.0f}" for key in columns)]))
    memory = lambda name: [f"{of[key][name] / 2**20:.0f}" for key in columns]
    lines.append(_row(["**arguments, MiB**", *memory("argument_bytes")]))
    lines.append(_row(["**temporaries, MiB**", *memory("temporary_bytes")]))
    return "\n".join(lines) + "\n"


def remat(results: dict[str, Any]) -> str:
    """Returns what `model.remat` costs and saves, of results/step_cost.json."""
    lines = _head(["`model.remat`", "s a full step, float32", 'time over "none" (range)', "temporaries, MiB"])
    for name, of in results["remat"].items():
        cells = [f"`{name}`", f"{of['median_seconds']:.2f}", _times(of["over_none"])]
        lines.append(_row([*cells, f"{of['temporary_bytes'] / 2**20:.0f}"]))
    return "\n".join(lines) + "\n"


def trials(results: dict[str, Any]) -> str:
    """Returns the table of results/step_trials.json: what was tried on the float32 step, predicted and measured."""
    lines = _head(["tried", "predicted", "measured, s a step", "kept"])
    lines += [_row([t["what"], t["predicted"], t["measured"], t["kept"]]) for t in results["trials"]]
    return "\n".join(lines) + "\n"


def _cells(rows: Callable[[dict[str, Any]], list[list[str]]]) -> Callable[[dict[str, Any]], str]:
    """Returns the table of cells, the head first."""

    def of(results: dict[str, Any]) -> str:
        head, *body = rows(results)
        return "\n".join([*_head(head), *map(_row, body)]) + "\n"

    return of


def data(results: dict[str, Any]) -> str:
    """Returns the table of results/data.json: a row a part, then the whole pipeline."""
    lines = _head(["", "times real time a core (range)", "hours of audio a second and core"])

    def add(name: str, rates: dict[str, Any]) -> None:
        times, hours = rates["times_real_time_per_core"], rates["audio_hours_per_second_per_core"]
        spread = f"{times['median']:.0f} ({times['low']:.0f} to {times['high']:.0f})"
        lines.append(_row([name, spread, f"{hours['median']:.3f}"]))

    for part in results["parts"]:
        add(f"{part['part']}: {part['detail']}", part)
    for whole in results["pipeline"]:
        for name, rates in whole["passes"].items():
            add(f"whole pipeline, {whole['cores']} cores, {whole['workers']} workers: {name}", rates)
    return "\n".join(lines) + "\n"


def interop(results: dict[str, Any]) -> str:
    """Returns the table of results/interop.json: a row a model and format."""
    cases = results["results"]
    dtypes = [name for name in next(iter(cases.values()))["hf"] if "float" in name]
    lines = _head(["run", "format", *(f"torch in {dtype}" for dtype in dtypes), "variables a round trip changed"])
    for name, case in cases.items():
        for form in ("peft", "hf", "merged"):
            changed = case[form].get("variables that a round trip changed")
            cells = [f"{case[form][dtype]:.1e}" for dtype in dtypes]
            lines.append(_row([name, form, *cells, "" if changed is None else str(changed)]))
    greedy = next(case["greedy"] for case in cases.values() if "greedy" in case)
    n = greedy["clips"]
    lines += ["", f"Recordings whose greedy text is the same token by token ({greedy['tokens']} tokens in all): "]
    lines[-1] += f"{greedy['hf']} of {n} in `hf`, {greedy['peft']} of {n} in base + PEFT + embedder."
    return "\n".join(lines) + "\n"


def int8(results: dict[str, Any]) -> str:
    """Returns the table of results/int8.json: a column a way to hold the base."""
    ways = list(results["text"])
    lines = _head(["", *(f"`{way}`" for way in ways)])
    for model, of in results["bytes"].items():
        name = model.rpartition("/")[2]
        lines.append(_row([f"{name}, GB of weights", *(f"{of[way]['all'] / 1e9:.2f}" for way in ways)]))
    text = results["text"]
    lines.append(_row(["held-out text, nats a token", *(f"{text[way]['nats a token']['all']:.4f}" for way in ways)]))
    same = [f"{100 * text[way]['same next token']:.1f}" for way in ways]
    lines.append(_row(["likeliest next token as in float32, %", *same]))
    for name, of in results["sets"].items():
        cells = [f"{100 * of['wer'][way]['value']:.1f}" if way in of["wer"] else "" for way in ways]
        lines.append(_row([f"WER %, {name} ({of['clips']} clips)", *cells]))
    return "\n".join(lines) + "\n"


def ablations(results: dict[str, Any]) -> str:
    """Returns the table of results/ablations.json: a row an arm, group by group."""
    percent = lambda of: "{:.1f} ({:.1f} to {:.1f})".format(*(100 * of["wer"][k] for k in ("value", "low", "high")))
    lines = _head(["", "WER %", "white noise, 10 dB", "babble, 10 dB", "rise of the loss on text, nats"])
    for group in results["groups"].values():
        for name, arm in group.items():
            scores = arm["scores"]
            cells = [name, percent(scores["sets"]["held out"])]
            # The masks were compared before there was noise.
            in_noise = scores.get("noise", {}).get("held out", {})
            cells += [percent(in_noise[kind]["10"]) if kind in in_noise else "-" for kind in ("white", "babble")]
            lines.append(_row([*cells, f"{scores['text']['loss']['all']['rise']:+.3f}" if "text" in scores else "-"]))
    return "\n".join(lines) + "\n"


def decode(results: dict[str, Any]) -> str:
    """Returns the table of results/decode.json: a row a way to hold the LLM."""
    first = f"ms to a first token of {results['seconds of speech']} s (times float32's)"
    lines = _head(["the LLM", first, "ms a token after it (times float32's)", "MB that a token reads"])
    for name, found in results.items():
        if isinstance(found, dict):
            cells = [name, "-", f"{found['ms a token']:.1f} ({found['of float32']:.2f})", "-"]
            if "bytes a token" in found:
                cells[1] = f"{found['ms to a first token']:.0f} ({found['first token of float32']:.2f})"
                cells[3] = f"{found['bytes a token'] / 1e6:.0f}"
            lines.append(_row(cells))
    return "\n".join(lines) + "\n"


def streaming(results: dict[str, Any]) -> str:
    """Returns the error rates of results/streaming.json: a column a test set, means over seeds with the range."""
    runs = results["runs"]
    sets = runs[0]["sets"]
    lines = _head([f"WER %, {len(runs)} seeds", *(f"{name} ({of['n']} clips)" for name, of in sets.items())])
    cells = [spread([run["sets"][name]["wer"]["value"] for run in runs], 100) for name in sets]
    return "\n".join([*lines, _row(["trained to stream", *cells])]) + "\n"


def pods(results: dict[str, Any]) -> str:
    """Returns the table of results/pods.json: a row a config and slice; empty where it was not compiled yet."""
    found = results["results"]
    planned = [f"{name} on {topology}" for name, (slices, _) in PLAN.items() for topology in slices]
    head = ["config", "slice", "chips", "tokens a chip and step", "fits", "HBM of a chip, GiB"]
    head += ["at best: s a step", "tokens a second", "share of the matmul peak", "bound by"]
    lines = _head(head)
    for key in dict.fromkeys([*planned, *found]):
        name, _, topology = key.partition(" on ")
        cells = [f"`{name}`", topology] + [""] * (len(head) - 2)
        if key in found:
            of = found[key]
            cells[2:6] = [str(of["chips"]), f"{of['batch']['tokens_of_a_chip']:.0f}", *_fits(of)]
        if key in found and found[key]["fits"]:
            line = found[key]["roofline"]
            cells[6:] = [f"{line['step_seconds']:.2f}", f"{line['tokens_a_second']:,.0f}"]
            cells += [f"{100 * line['mfu']:.0f} %", line["bound"]]
        lines.append(_row(cells))
    return "\n".join(lines) + "\n"


def _fits(of: dict[str, Any]) -> tuple[str, str]:
    """Whether a step fits, with what is missing and what to try, and the bytes of a chip."""
    if not of["compiles"]:
        return f"does not compile: {of['reason'][:100].replace('|', '/')}", ""
    memory, gib = of["memory"], 2**30
    if not of["fits"]:
        needs = f"{memory['needs_at_least'] / gib:.1f} or more, of {memory['hbm'] / gib:.0f}"
        return f"no, {memory['missing'] / gib:.1f} GiB too little: {of['mend']}", needs
    return "yes", f"{memory['total'] / gib:.1f} of {memory['hbm'] / gib:.0f}"


_WIDE = ("steps", "trained, M", "peak memory, GiB")  # more than the README has room for


def compare(summary: dict[str, Any]) -> str:
    """Returns the table of results/compare/summary.json: a row a system."""
    head, *rows = table.rows(summary)
    kept = [i for i, name in enumerate(head) if name not in _WIDE]
    lines = _head([head[i] for i in kept])
    return "\n".join([*lines, *(_row([row[i] for i in kept]) for row in rows)]) + "\n"


def compare_all(summary: dict[str, Any]) -> str:
    """Returns all columns of it, and those of equal time, if there are any."""
    budgets = {"In equally many steps:": "steps", "In equal time:": "time"}
    found = {what: table.markdown(summary, budget) for what, budget in budgets.items()}
    return "\n\n".join(f"{what}\n\n{of}" for what, of in found.items() if of.count("\n") > 1) + "\n"


TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "quickstart": ("quickstart", quickstart),
    "forgetting": ("forgetting", forgetting),
    "train": ("train", train),
    "ratios": ("train", ratios),
    "sweep": ("train", sweep),
    "parts": ("step_cost", parts),
    "remat": ("step_cost", remat),
    "trials": ("step_trials", trials),
    "infer": ("infer", _cells(infer_report.speech_rows)),
    "infer_errors": ("infer", _cells(infer_report.error_rows)),
    "infer_times": ("infer", _cells(infer_report.times_rows)),
    "infer_decode": ("infer", _cells(infer_report.decode_rows)),
    "decode": ("decode", decode),
    "streaming": ("streaming", streaming),
    "ablations": ("ablations", ablations),
    "data": ("data", data),
    "interop": ("interop", interop),
    "pods": ("pods", pods),
    "int8": ("int8", int8),
    "compare": ("compare/summary", compare),
    "compare_all": ("compare/summary", compare_all),
}


def with_tables(page: Path) -> str:
    """Returns the page with the tables of the committed results between their markers."""

    def filled(match: re.Match) -> str:
        name, of = TABLES[match[2]]
        return match[1] + "\n" + of(json.loads((RESULTS / f"{name}.json").read_text())) + "\n" + match[3]

    return _PLACE.sub(filled, page.read_text())


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(with_tables(path))
