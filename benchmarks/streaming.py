"""Speech heard while it is spoken, beside the same heard whole: `python benchmarks/streaming.py --runs runs/streaming`.

Trains configs/quickstart_streaming.py with each seed (finished runs are not repeated, interrupted ones resume). With
the first it then checks that both ways give the same answers, and measures, in turn, the time from the end of speech to
the first token, and a clip in real time. Writes results/streaming.json and docs/streaming.svg.
"""

import argparse
import dataclasses
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import arms
import matplotlib.pyplot as plt
import numpy as np

from aura_jax import checkpoint
from aura_jax.audio.features import SAMPLE_RATE
from aura_jax.audio.io import load_audio
from aura_jax.data.manifest import load_manifest
from aura_jax.experiments.compare.arm import speech
from aura_jax.infer.generate import Generator
from aura_jax.infer.prompting import Request
from aura_jax.infer.stream import Session
from aura_jax.models.lora import merge
from aura_jax.system import System

CONFIG = "configs/quickstart_streaming.py"
FIGURE = Path(__file__).parents[1] / "docs" / "streaming.svg"
LENGTHS = (1.0, 2.0, 5.0, 10.0, 20.0, 30.0)  # seconds of speech
PORTION = 0.02  # seconds, as a microphone gives them
ROUNDS, ANSWERS, REAL_TIME = 9, 24, 5.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, required=True, help="where the workdirs go")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    args = parser.parse_args()
    runs = []
    for seed in args.seeds:
        scores = arms.run(args.runs / f"seed-{seed}", [f"--config={CONFIG}", f"--config.seed={seed}"])
        runs.append({"seed": seed, **scores})
    built, variables = checkpoint.load_for_inference(args.runs / f"seed-{args.seeds[0]}")
    lora = built.model.config.lora
    assert lora is not None
    variables = {
        "params": {**variables["params"], "llm": merge(variables["params"]["llm"], variables["lora"]["llm"], lora)}
    }
    results = {
        "command": shlex.join(["python", "benchmarks/streaming.py", *sys.argv[1:]]),
        "runs": runs,
        "same_answers": same_answers(built, variables),
        **times(built, variables),
        "real_time": real_time(built, variables),
    }
    arms.write("streaming", "Speech heard while it is spoken: errors, same answers, times in seconds", results)
    draw(results)


def portions(waveform_S: np.ndarray) -> list[np.ndarray]:
    size = round(PORTION * SAMPLE_RATE)
    return [waveform_S[start : start + size] for start in range(0, len(waveform_S), size)]


def same_answers(built: System, variables: Any) -> dict[str, int]:
    """Returns how many clips of the test sets have the same answer heard whole and in portions."""
    generator = Generator(built, variables)
    clips = [load_audio(row.audio) for path in built.config.eval.sets.values() for row in load_manifest(path)[:ANSWERS]]
    longest = max(map(len, clips)) / SAMPLE_RATE
    whole, same = generator.generate([Request(clip) for clip in clips]), 0
    for clip, reply in zip(clips, whole, strict=True):
        session = Session(generator, max_seconds=longest)
        for portion in portions(clip):
            session.push(portion)
        same += session.reply().tokens == reply.tokens
    return {"n": len(clips), "same": same}


def times(built: System, variables: Any) -> dict[str, Any]:
    """Returns the seconds from the end of speech to the first token, by length, and what listening takes before it."""
    config = built.config.copy_and_resolve_references()
    with config.ignore_type():
        config.data.buckets = LENGTHS
    generator = Generator(dataclasses.replace(built, config=config), variables, batch_size=1, max_new_tokens=1)
    clips = speech(built.config, LENGTHS)

    seconds: dict[str, dict[float, list[float]]] = {
        name: {length: [] for length in LENGTHS}
        for name in ("whole", "streamed", "streamed, no more room than needed", "listening")
    }

    def measure(name: str, length: float) -> dict[str, float]:
        if name == "whole":
            start = time.perf_counter()
            generator.generate([Request(clips[length])])
            return {name: time.perf_counter() - start}
        session = Session(generator, max_seconds=max(LENGTHS) if name == "streamed" else length)
        session.wait()
        start = time.perf_counter()
        for portion in portions(clips[length]):
            session.push(portion)
        session.wait()
        listened = {"listening": (time.perf_counter() - start) / length} if name == "streamed" else {}
        return {name: session.reply().seconds} | listened

    names = [name for name in seconds if name != "listening"]
    for turn in range(1 + ROUNDS):  # the first compiles
        for length in LENGTHS:
            for name in names[turn % 3 :] + names[: turn % 3]:
                for what, took in measure(name, length).items():
                    if turn:
                        seconds[what][length].append(took)
    # The room for 30 s of speech instead of 2, of the same speech: what attention over the longer cache costs.
    long, short = seconds["streamed"][2.0], seconds["streamed, no more room than needed"][2.0]
    growth = [late - early for late, early in zip(seconds["streamed"][30.0], long, strict=True)]
    return {
        "first_token": {
            name: {f"{n:g}": _spread(of[n]) for n in LENGTHS} for name, of in seconds.items() if name in names
        },
        "whole_over_streamed": {
            f"{n:g}": _spread([a / b for a, b in zip(seconds["whole"][n], seconds["streamed"][n], strict=True)])
            for n in LENGTHS
        },
        "growth_from_2_to_30_s": _spread(growth),
        "attention_over_room_for_30_instead_of_2_s": _spread([a - b for a, b in zip(long, short, strict=True)]),
        "listening_a_second_of_speech": {f"{n:g}": _spread(seconds["listening"][n]) for n in LENGTHS},
    }


def real_time(built: System, variables: Any) -> dict[str, Any]:
    """Returns when a clip that arrives as it is spoken kept the device busy, and when its answer's tokens came.

    Times are seconds from the start of speech; those of the whole clip begin at its end.
    """
    generator = Generator(built, variables, batch_size=1, max_new_tokens=12)
    clip = speech(built.config, [REAL_TIME])[REAL_TIME]
    result: dict[str, Any] = {}
    for _ in range(2):  # the first compiles
        session, busy = Session(generator, max_seconds=REAL_TIME), []
        session.wait()
        begin = time.perf_counter()
        for i, portion in enumerate(portions(clip), 1):
            time.sleep(max(0.0, begin + i * PORTION - time.perf_counter()))
            start = time.perf_counter()
            session.push(portion)
            session.wait()
            if (end := time.perf_counter()) - start > PORTION / 10:
                busy.append([start - begin, end - begin])
        end = time.perf_counter()
        streamed = [time.perf_counter() - begin for _ in session.finish()]
        start = time.perf_counter()
        whole = [time.perf_counter() - start + end - begin for _ in generator.stream(Request(clip))]
        result = {"seconds": REAL_TIME, "reading": busy, "end": end - begin, "streamed": streamed, "whole": whole}
    return result


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def draw(results: dict[str, Any]) -> None:
    """Draws a clip in real time, and the time to the first token by the length of speech."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4), width_ratios=(5, 3))
    clip = results["real_time"]
    left.broken_barh([(0, clip["seconds"])], (2.7, 0.6), color="tab:gray", alpha=0.5)
    left.broken_barh([(a, b - a) for a, b in clip["reading"]], (1.7, 0.6), color="tab:blue")
    for y, name, colour in ((1.0, "streamed", "tab:blue"), (0.0, "whole", "tab:orange")):
        left.broken_barh([(clip["end"], clip[name][0] - clip["end"])], (y - 0.3, 0.6), color=colour, alpha=0.4)
        left.plot(clip[name], [y] * len(clip[name]), "|", ms=16, mew=1.5, color=colour)
        first = 1000 * (clip[name][0] - clip["end"])
        left.annotate(
            f"first text after {first:.0f} ms",
            (clip[name][-1], y),
            (8, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    left.set_yticks([3, 2, 1, 0], ["speech", "reading it", "answer", "answer, clip\nheard whole"], fontsize=9)
    left.axvline(clip["end"], color="grey", lw=0.8, ls="--")
    left.margins(x=0.02)
    left.set_xlim(right=max(clip["streamed"][-1], clip["whole"][-1]) + 1.2)
    left.set_xlabel("seconds from the start of speech")
    left.set_title("A question of 5 s as it is spoken", fontsize=10)
    for name, colour in (("whole", "tab:orange"), ("streamed", "tab:blue")):
        of = results["first_token"][name]
        lengths = [float(n) for n in of]
        median = [1000 * value["median"] for value in of.values()]
        reach = [
            [1000 * (v["median"] - v["low"]) for v in of.values()],
            [1000 * (v["high"] - v["median"]) for v in of.values()],
        ]
        right.errorbar(
            lengths,
            median,
            yerr=reach,
            fmt="o-",
            color=colour,
            elinewidth=0.8,
            label=f"heard {name}" if name == "whole" else name,
        )
    right.set_ylim(bottom=0)
    right.set_xlabel("seconds of speech")
    right.set_title("From the end of speech to the first token, ms", fontsize=10)
    right.legend(fontsize=9, frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(FIGURE, metadata={"Date": None})
    print(f"wrote {FIGURE}")


if __name__ == "__main__":
    main()
