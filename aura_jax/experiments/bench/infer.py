"""`aura-jax bench infer`: how soon and how fast a spoken question is answered, beside what a user would run instead.

Every arm is a process of its own; all hear the same clips, and what reads a transcript reads it in the same prompt.
They take turns, clip by clip in an order that is drawn anew each time, and only one computes at a time: what else the
machine does slows all alike, and a ratio to the first arm in the same round is what is to be trusted. Each arm also
writes down the same test clips, so that no time is without its quality.

A first token is the LLM's: a cascade has then heard the whole clip and written its transcript. Answers are of a fixed
number of tokens, whatever the models would say.
"""

import dataclasses
import importlib.util
import json
import random
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from aura_jax import assets, checkpoint, machine, system
from aura_jax import config as config_lib
from aura_jax.config import Config
from aura_jax.convert import hf
from aura_jax.errors import UserError, nearest
from aura_jax.evaluate.score import score
from aura_jax.experiments.bench import infer_case, infer_report
from aura_jax.experiments.bench.infer_case import Case
from aura_jax.experiments.bench.protocol import Worker, WorkerFailed
from aura_jax.experiments.bench.train import spread
from aura_jax.infer.cascade import whisper_of
from aura_jax.infer.stream import check_streams

PEER = Path("benchmarks/peers/infer_worker.py")
PEERS = ("torch", "faster-whisper", "llama.cpp", "hf")
# Peer -> the packages that it needs: what is imported, and the extra that brings it.
_PACKAGES = {
    "torch": (("torch", "torch"),),
    "faster-whisper": (("torch", "torch"), ("faster_whisper", "peers")),
    "llama.cpp": (("torch", "torch"), ("faster_whisper", "peers"), ("llama_cpp", "peers")),
    "hf": (("torch", "torch"), ("peft", "torch")),
}
_OURS = (sys.executable, "-m", "aura_jax.experiments.bench.infer_arm")
_THEIRS = (sys.executable, str(PEER))
_CONTEXT = 1024  # columns of llama.cpp's cache
_REST = 0.2  # seconds between two arms: threads of the one before may wait busily for more work
_GGUF = ("F32", "BF16", "Q8_0", "Q4_1")  # kinds of what llama.cpp reads

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Arm:
    """A way to answer.

    Attributes:
      command: of its process, which `protocol` speaks to.
      options: what its `load` takes beside the case.
    """

    name: str
    command: tuple[str, ...]
    options: Mapping[str, Any]

    @property
    def is_ours(self) -> bool:
        return self.command == _OURS


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
      lengths: of the speech that a first token is waited for, in seconds.
      start: the length that a process just started is timed with.
      whole: the length whose answers are timed to their ends.
      n_tokens: of these answers, and of those to text.
      n_batch, batch_tokens: clips that are answered together, and tokens of each of their answers.
      n_test: clips of each test set.
      n_padding: clips of held-out voices that choose the cascade's silence; 0: there is no cascade with a short window.
      dtypes: of our LLM alone.
      warm: start each of our arms a second time.
    """

    lengths: tuple[float, ...] = (1.0, 2.0, 5.0, 10.0, 30.0)
    start: float = 2.0
    whole: float = 5.0
    n_tokens: int = 33
    rounds: int = 4
    decode_rounds: int = 5
    n_batch: int = 8
    batch_tokens: int = 16
    batch_rounds: int = 3
    n_test: int = 16
    n_padding: int = 64
    transcript_tokens: int = 200
    read_bytes: int = 2**29
    dtypes: tuple[str, ...] = ("float32", "int8")
    warm: bool = True


QUICK = Plan(
    lengths=(1.0,),
    start=1.0,
    whole=1.0,
    n_tokens=5,
    rounds=1,
    decode_rounds=1,
    n_batch=2,
    batch_tokens=3,
    batch_rounds=1,
    n_test=2,
    n_padding=0,
    transcript_tokens=8,
    read_bytes=2**20,
    dtypes=("float32",),
    warm=False,
)


def main(
    workdir: Path,
    output: Path,
    bridge: Path | None = None,
    streaming: Path | None = None,
    peers: Sequence[str] = PEERS,
    quick: bool = False,
    figure: Path | None = None,
) -> int:
    """Measures, writes `output` (JSON) and the figure, prints the table; returns an exit code.

    Args:
      workdir: a trained run whose model needs no encoder.
      bridge: one that keeps its encoder; None: it is left out.
      streaming: one that can hear while there is speech; None: it is left out.
      peers: some of `PEERS`.
      quick: little of everything: shows that it works, measures nothing worth quoting.
      figure: an .svg or .png; None: beside `output`.

    Raises:
      UserError: as `check`.
    """
    figure = figure or output.with_suffix(".svg")
    check(workdir, bridge, streaming, peers, output, figure)
    clock = time.perf_counter()
    plan = QUICK if quick else Plan()
    with tempfile.TemporaryDirectory(prefix="aura-bench-") as folder:
        results = measure(workdir, bridge, streaming, peers, plan, Path(folder))
    results = {
        "what": "A spoken question answered by this package and by what a user would run instead, in turns",
        "command": shlex.join(["aura-jax", *sys.argv[1:]]),
        "machine": machine.describe(),
        "seconds": time.perf_counter() - clock,
        **results,
    }
    partial = output.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1) + "\n")
    partial.replace(output)
    infer_report.draw(results, figure)
    print(infer_report.table(results))
    print(f"wrote {output} and {figure}")
    return 0


def check(
    workdir: Path, bridge: Path | None, streaming: Path | None, peers: Sequence[str], output: Path, figure: Path
) -> None:
    """Raises UserError for whatever would stop the measurement, before it starts."""
    for name in peers:
        if name not in PEERS:
            raise UserError(f"--peers: unknown peer {name!r}: {nearest(name, [*PEERS, 'none'])}")
    if peers and not PEER.is_file():
        raise UserError(f"no {PEER}: run this from the root of the repository, or add --peers none")
    for name in peers:
        for package, extra in _PACKAGES[name]:
            if importlib.util.find_spec(package) is None:
                raise UserError(
                    f'the peer {name} needs {package}: pip install -e ".[{extra}]", or leave it out of --peers'
                )
    if figure.suffix not in (".svg", ".png"):
        raise UserError(f"{figure}: a figure is an .svg or a .png")
    for path in (output, figure):
        if not path.parent.is_dir():
            raise UserError(f"{path}: there is no folder {path.parent}: make it, or name another")
    config = _config(workdir)
    if config.model.encoder:
        raise UserError(
            f"--workdir {workdir}: it keeps an encoder: name it by --bridge, and a run without as --workdir"
        )
    if not config.eval.sets:
        raise UserError(
            f"--workdir {workdir}: its eval.sets is empty, and no time goes without an error rate: name another run"
        )
    whisper_of(config)
    if bridge is not None and not _config(bridge).model.encoder:
        raise UserError(f"--bridge {bridge}: it keeps no encoder, so it is no bridge: name one, or leave --bridge out")
    if streaming is not None:
        check_streams(_config(streaming))
    if "llama.cpp" in peers:
        family = hf.text_config(assets.resolve(config.model.llm)).get("model_type")
        if family != "llama":
            raise UserError(
                f"the peer llama.cpp is given Llamas, and {config.model.llm} is a {family}: leave it out of --peers"
            )


def _config(workdir: Path) -> Config:
    file = workdir / "config.json"
    if not file.is_file():
        raise UserError(f"{workdir}: no run is in it: name a workdir of aura-jax train")
    return config_lib.from_json(file)


def measure(
    workdir: Path, bridge: Path | None, streaming: Path | None, peers: Sequence[str], plan: Plan, folder: Path
) -> dict[str, Any]:
    """Returns everything that is measured, as it is written."""
    config = _config(workdir)
    case = infer_case.write(
        system.build(config),
        plan.lengths,
        plan.n_test,
        plan.n_batch,
        plan.transcript_tokens,
        _CONTEXT,
        folder / "case",
    )
    silence, files = _prepare(workdir, config, peers, plan, folder)
    runs = {"bridge": bridge, "streaming": streaming}
    left_out = [f"{name}: no --{name}" for name, run in runs.items() if run is None]
    if silence is None or silence["seconds"] is None:
        left_out.append("the cascade with a short window: no silence is known to be enough")
    left_out += [f"{peer}: not among --peers" for peer in PEERS if peer not in peers]
    arms = speech_arms(workdir, bridge, streaming, peers, silence, files)
    alone = decode_arms(config, plan.dtypes, peers, files)
    return {
        "plan": dataclasses.asdict(plan),
        "threads": machine.n_cores(),
        "silence": silence,
        "test": {
            "sets": dict(config.eval.sets),
            "clips": {name: len(clips) for name, clips in case.sets.items()},
            "seconds": case.seconds,
        },
        "arms": measure_speech(arms, case, plan, folder, left_out),
        "decode": measure_decode(alone, case, plan, folder, left_out),
        "left_out": left_out,
    }


def _prepare(
    workdir: Path, config: Config, peers: Sequence[str], plan: Plan, folder: Path
) -> tuple[dict[str, Any] | None, dict[str, str]]:
    """Chooses the cascade's silence, and writes the models in the formats of the peers.

    Returns:
      what `Padding.values` says of the run's Whisper, None if there are no held-out voices to ask; and where the model
      of each format is. Processes of their own do it: their memory is free again when the arms start.
    """
    files = {"llm": str(assets.resolve(config.model.llm)), "whisper": str(assets.resolve(whisper_of(config)))}
    ours = {"workdir": str(workdir), "n_padding": plan.n_padding, "n_rows": plan.n_batch}
    if "hf" in peers:
        files["export"] = ours["export"] = str(folder / "export")
    with _worker(_OURS, folder / "prepare-ours.log") as worker:
        silence = worker.ask("prepare", **ours)["silence"]
    if {"faster-whisper", "llama.cpp"} & set(peers):
        with _worker(_THEIRS, folder / "prepare-theirs.log") as worker:
            files["ctranslate2"] = str(folder / "ctranslate2")
            worker.ask("prepare", what="ctranslate2", directory=files["whisper"], output=files["ctranslate2"])
            for kind in _GGUF if "llama.cpp" in peers else ():
                files[kind] = str(folder / f"{kind}.gguf")
                worker.ask("prepare", what="gguf", directory=files["llm"], output=files[kind], kind=kind)
    return silence, files


@contextmanager
def _worker(command: Sequence[str], log: Path) -> Iterator[Worker]:
    worker = Worker(command, {}, log)
    try:
        yield worker
    finally:
        worker.close()


def speech_arms(
    workdir: Path,
    bridge: Path | None,
    streaming: Path | None,
    peers: Sequence[str],
    silence: Mapping[str, Any] | None,
    files: Mapping[str, str],
) -> list[Arm]:
    """Returns the arms that hear, the first of them what the others are compared with; in float32 unless named."""
    config = _config(workdir)
    values = json.loads(config_lib.to_json(config))

    def run(name: str, workdir: Path, merged: bool, kind: str = "run", **options: Any) -> Arm:
        return Arm(name, _OURS, {"kind": kind, "workdir": str(workdir), "merged": merged, **options})

    merged, rounded = _merges(workdir), config.model.matmul_dtype
    name = "AuRA merged" if merged else "AuRA"
    arms = [run(name, workdir, merged)]
    if merged:
        arms.append(run("AuRA", workdir, False))
    if rounded:
        arms.append(run(f"{name}, blocks in {rounded}", workdir, merged, as_trained=True))
    if streaming is not None:
        merged = _merges(streaming)
        arms.append(run(f"AuRA streaming{', merged' if merged else ''}", streaming, merged, "listening"))
    if bridge is not None:
        arms.append(run("bridge", bridge, False))
    cascade = {"kind": "cascade", "config": values, "silence": None}
    arms.append(Arm("cascade, 30 s window", _OURS, cascade))
    if rounded:
        arms.append(Arm(f"cascade, 30 s window, blocks in {rounded}", _OURS, cascade | {"as_trained": True}))
    if silence is not None and silence["seconds"] is not None:
        arms.append(Arm(f"cascade, {silence['seconds']:g} s of silence", _OURS, cascade | {"silence": silence}))

    def peer(name: str, hears: str | None, answers: str, directory: str, **options: Any) -> Arm:
        return Arm(name, _THEIRS, {"hears": hears, "answers": answers, "directory": directory, **options})

    if "torch" in peers:
        whisper = {"whisper": files["whisper"]}
        arms.append(peer("torch Whisper + torch LLM", "torch", "torch", files["llm"], **whisper))
    exact = {"whisper": files.get("ctranslate2"), "compute_type": "float32"}
    if "faster-whisper" in peers:
        arms.append(peer("faster-whisper + torch LLM", "faster-whisper", "torch", files["llm"], **exact))
    if "llama.cpp" in peers:
        arms.append(peer("faster-whisper + llama.cpp", "faster-whisper", "llama.cpp", files["F32"], **exact))
        small = exact | {"compute_type": "int8"}
        arms.append(peer("faster-whisper int8 + llama.cpp Q4_1", "faster-whisper", "llama.cpp", files["Q4_1"], **small))
    if "hf" in peers:
        arms.append(peer("AuRA, our export in torch", None, "export", files["export"]))
    return arms


def _merges(workdir: Path) -> bool:
    """Whether a run has adapters that can be folded into its LLM."""
    own = checkpoint.inference_meta(workdir)[1]["own"]
    return any(path.startswith("lora/") for path in own) and _config(workdir).lora.scope != "audio"


def decode_arms(config: Config, dtypes: Sequence[str], peers: Sequence[str], files: Mapping[str, str]) -> list[Arm]:
    """Returns the arms in which the LLM alone answers text."""
    alone = {"kind": "llm", "config": json.loads(config_lib.to_json(config))}
    arms = [Arm(f"ours, {dtype}", _OURS, alone | {"dtype": dtype}) for dtype in dtypes]
    if rounded := config.model.matmul_dtype:
        arms.append(Arm(f"ours, blocks in {rounded}", _OURS, alone | {"dtype": "float32", "as_trained": True}))
    if "torch" in peers:
        arms.append(Arm("torch, float32", _THEIRS, {"hears": None, "answers": "torch", "directory": files["llm"]}))
    if "llama.cpp" in peers:
        for kind in _GGUF:
            options = {"hears": None, "answers": "llama.cpp", "directory": files[kind]}
            arms.append(Arm(f"llama.cpp, {kind}", _THEIRS, options))
    return arms


# Ours, and what of llama.cpp holds its weights with as many bits.
EQUAL = {
    "ours, float32": "llama.cpp, F32",
    "ours, blocks in bfloat16": "llama.cpp, BF16",
    "ours, int8": "llama.cpp, Q8_0",
}


@dataclasses.dataclass
class Running:
    """An arm's process, with what its `load` returned, and the seconds of its starts: {"cold"}, or {"cold", "warm"}."""

    arm: Arm
    worker: Worker
    about: dict[str, Any]
    seconds: dict[str, float]


@contextmanager
def started(
    arms: Sequence[Arm], case: Case, clip: str, folder: Path, left_out: list[str], warm: bool = False
) -> Iterator[list[Running]]:
    """Starts the arms one after the other; yields their processes. A peer that fails is added to what is left out.

    A start is over with the first token of an answer to `clip`. A cold one finds nothing compiled. With `warm` each of
    ours is started again, and finds what it compiled; the peers compile nothing. Files were read before in both.
    """
    with ExitStack() as stack:
        running = []
        for arm in arms:
            print(f"starting {arm.name}", file=sys.stderr, flush=True)
            try:
                one = _started(arm, case, clip, folder)
                if warm and arm.is_ours:
                    one.worker.close()
                    again = _started(arm, case, clip, folder)
                    one = dataclasses.replace(again, seconds=one.seconds | {"warm": again.seconds["cold"]})
            except WorkerFailed as error:
                if arm.is_ours:
                    raise
                left_out.append(f"{arm.name}: {error}")
                print(f"left out: {left_out[-1]}", file=sys.stderr, flush=True)
                continue
            stack.callback(one.worker.close)
            one.worker.ask("watch")  # gives back what loading and compiling needed
            running.append(one)
        yield running


def _started(arm: Arm, case: Case, clip: str, folder: Path) -> Running:
    name = "".join(letter if letter.isalnum() else "-" for letter in arm.name)
    compiled = {"JAX_COMPILATION_CACHE_DIR": str(folder / f"{name}-compiled")}
    clock = time.perf_counter()
    worker = Worker(arm.command, compiled, folder / f"{name}.log")
    try:
        about = worker.ask("load", case=str(case.directory), **arm.options)
        worker.ask("answer", clip=clip, n_tokens=1)
    except BaseException:
        worker.close()
        raise
    return Running(arm, worker, about, {"cold": time.perf_counter() - clock})


def take_turns(
    running: Sequence[Running], rounds: int, ask: Callable[[Worker], T], draw: random.Random
) -> dict[str, list[T]]:
    """Returns {arm: what `ask` returns of it in each round}; the order is drawn anew each round."""
    found: dict[str, list[T]] = {one.arm.name: [] for one in running}
    for _ in range(rounds):
        for one in draw.sample(running, len(running)):
            time.sleep(_REST)
            found[one.arm.name].append(ask(one.worker))
    return found


def answering(clip: str, n_tokens: int) -> Callable[[Worker], float]:
    """Returns what asks an arm for the seconds that an answer of so many tokens takes."""
    return lambda worker: worker.ask("answer", clip=clip, n_tokens=n_tokens)["seconds"]


@dataclasses.dataclass(frozen=True)
class Whole:
    """Seconds of an answer of `n_tokens`, and of the first of them just before."""

    first: float
    seconds: float
    n_tokens: int

    @property
    def per_token(self) -> float:
        return (self.seconds - self.first) / (self.n_tokens - 1)


def whole_answer(clip: str, n_tokens: int) -> Callable[[Worker], Whole]:
    """Returns what asks an arm for the times of an answer from its first token to its last."""
    first, whole = answering(clip, 1), answering(clip, n_tokens)
    return lambda worker: Whole(first(worker), whole(worker), n_tokens)


def measure_speech(arms: Sequence[Arm], case: Case, plan: Plan, folder: Path, left_out: list[str]) -> dict[str, Any]:
    """Returns what every arm does with speech.

    Returns:
      {name: {"ours", "versions", "batch": clips that it answers together, "weight_bytes": of the LLM,
      "start_seconds": {"cold", "warm"}, "first_token": {length: seconds}, "tokens_per_second" after the first,
      "real_time_factor": of an answer of `plan.n_tokens`, "clips_per_second", "peak_memory_bytes": while it answers,
      "wer": {test set: rate}}}. What varies from round to round is a median with its range; "times" is the ratio of the
      seconds to those of the first arm in the same round.
    """
    draw = random.Random(0)
    clips = {length: f"{length:g}" for length in plan.lengths}
    whole = whole_answer(clips[plan.whole], plan.n_tokens)
    together = lambda worker: worker.ask("batch", n_tokens=plan.batch_tokens)["seconds"]
    with started(arms, case, clips[plan.start], folder, left_out, plan.warm) as running:
        heard = {}
        for one in running:
            print(f"{one.arm.name} writes down the test clips", file=sys.stderr, flush=True)
            texts = one.worker.ask("hear", clips=case.tests)["texts"]
            heard[one.arm.name] = dict(zip(case.tests, texts, strict=True))
            # Every shape once: compiling is no part of an answer, nor of the memory that it takes.
            for clip in clips.values():
                answering(clip, 1)(one.worker)
            whole(one.worker)
            together(one.worker)
            one.worker.ask("watch")
        print("the arms take turns", file=sys.stderr, flush=True)
        first = {length: take_turns(running, plan.rounds, answering(clip, 1), draw) for length, clip in clips.items()}
        wholes = take_turns(running, plan.rounds, whole, draw)
        batches = take_turns(running, plan.batch_rounds, together, draw)
        peaks = {one.arm.name: one.worker.ask("peak")["since_watch"] for one in running}
    reference = running[0].arm.name
    out = {}
    for one in running:
        name = one.arm.name
        out[name] = {
            "ours": one.arm.is_ours,
            **one.about,
            "start_seconds": one.seconds,
            "first_token": {
                clips[length]: spread(of[name]) | {"times": spread(_ratios(of[name], of[reference]))}
                for length, of in first.items()
            },
            "tokens_per_second": spread([1 / of.per_token for of in wholes[name]]),
            "real_time_factor": spread([of.seconds / plan.whole for of in wholes[name]]),
            "clips_per_second": spread([len(case.batch) / seconds for seconds in batches[name]])
            | {"times": spread(_ratios(batches[name], batches[reference]))},
            "peak_memory_bytes": peaks[name],
            "wer": {
                of: score(list(clips.values()), [heard[name][clip] for clip in clips])["wer"]
                for of, clips in case.sets.items()
            },
        }
    return out


def measure_decode(arms: Sequence[Arm], case: Case, plan: Plan, folder: Path, left_out: list[str]) -> dict[str, Any]:
    """Returns how fast the LLM alone goes on, and how many bytes of weights each token of an answer reads.

    Returns:
      {"read_bytes_per_second": of a sum over float32 here, "arms": {name: {"ours", "versions", "weight_bytes",
      "seconds_per_token", "weight_bytes_per_second"}}, "ratios": {"ours / llama.cpp's": of seconds in the same round,
      at equal precision}}.
    """
    whole = whole_answer("text", plan.n_tokens)
    with started(arms, case, "text", folder, left_out) as running:
        for one in running:
            whole(one.worker)
        read = running[0].worker.ask("bandwidth", n_bytes=plan.read_bytes, n_times=5)["bytes_per_second"]
        found = take_turns(running, plan.decode_rounds, whole, random.Random(1))
    tokens = {name: [of.per_token for of in rounds] for name, rounds in found.items()}
    out = {
        one.arm.name: {
            "ours": one.arm.is_ours,
            **one.about,
            "seconds_per_token": spread(tokens[one.arm.name]),
            "weight_bytes_per_second": one.about["weight_bytes"] / statistics.median(tokens[one.arm.name]),
        }
        for one in running
    }
    pairs = {f"{ours} / {theirs}": (ours, theirs) for ours, theirs in EQUAL.items() if theirs in tokens}
    ratios = {name: spread(_ratios(tokens[ours], tokens[theirs])) for name, (ours, theirs) in pairs.items()}
    return {"read_bytes_per_second": read, "arms": out, "ratios": ratios}


def _ratios(seconds: Sequence[float], of_reference: Sequence[float]) -> list[float]:
    return [own / other for own, other in zip(seconds, of_reference, strict=True)]
