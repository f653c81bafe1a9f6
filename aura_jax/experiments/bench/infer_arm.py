"""Our arms of `aura-jax bench infer`: `python -m aura_jax.experiments.bench.infer_arm`, spoken to by `protocol`."""

import copy
import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aura_jax import assets, checkpoint, machine, sharding
from aura_jax import config as config_lib
from aura_jax.audio.features import SAMPLE_RATE
from aura_jax.evaluate.run import Answers
from aura_jax.experiments.bench import protocol
from aura_jax.experiments.bench.infer_case import TEXT
from aura_jax.infer.cascade import Cascade, whisper_of
from aura_jax.infer.generate import Generator, Reply, plain_generator
from aura_jax.infer.prompting import Request
from aura_jax.infer.reading import Weights
from aura_jax.infer.stream import Session
from aura_jax.infer.transcriber import Transcriber
from aura_jax.models.lora import merge
from aura_jax.system import System

# A system, the number of tokens of its longest answer -> what answers so.
_Make = Callable[[System, int], Answers]

_PORTION = SAMPLE_RATE // 50  # samples that a microphone gives at a time


class Listener:
    """Hears each clip while it is spoken, one clip after another, in sessions of equal room."""

    def __init__(self, generator: Generator, room: float):
        """`room`: seconds of speech."""
        self.batch_size = 1
        self._generator, self._room = generator, room

    def heard(self, waveform_S: np.ndarray) -> Session:
        """Returns the session of a clip whose last sample has just come."""
        session = Session(self._generator, max_seconds=self._room)
        for start in range(0, len(waveform_S), _PORTION):
            session.push(waveform_S[start : start + _PORTION])
        session.wait()
        return session

    def generate(self, requests: Sequence[Request], progress: Callable[[int], Any] | None = None) -> list[Reply]:
        """Returns the answers; their `seconds` begin at the end of speech."""
        replies = []
        for request in requests:
            assert request.waveform is not None
            replies.append(self.heard(request.waveform).reply())
            if progress is not None:
                progress(1)
        return replies


class Arm:
    """One way to answer, from a case folder (see `infer_case`)."""

    def prepare(self, workdir: str, n_padding: int, n_rows: int, export: str | None = None) -> dict[str, Any]:
        """Chooses the silence of a cascade, and exports a run to torch.

        Args:
          n_padding: clips of held-out voices that choose it; 0: it is not chosen.
          n_rows: of them that are heard together.
          export: the folder to write.

        Returns:
          {"silence": of `Padding.values`, None if it is not chosen or no voices are held out}.
        """
        # Here, because no start of an arm should wait for these imports.
        from aura_jax.exchange.export import export_run
        from aura_jax.experiments.compare.job import needed_padding

        if export is not None:
            export_run(Path(workdir), Path(export), "hf", dtype="float32")
        config = config_lib.from_json(Path(workdir) / "config.json")
        found = None
        if n_padding:
            # As many tokens as the run's own answers may have: where it repeats itself, it would go on for long.
            most = config.eval.max_new_tokens
            whisper = Transcriber(assets.resolve(whisper_of(config)), batch_size=n_rows, max_new_tokens=most)
            found = needed_padding(whisper, config, n_padding)
        return {"silence": found.values() if found else None}

    def load(self, case: str, kind: str, **options: Any) -> dict[str, Any]:
        """Loads the models.

        Args:
          kind: "run", "listening", "cascade" or "llm".
          options: as of the function of that kind.
        """
        folder = Path(case)
        with np.load(folder / "clips.npz") as file:
            self._clips = dict(file)
        about = json.loads((folder / "case.json").read_text())
        self._batch, self._most = about["batch"], about["max_new_tokens"]
        kinds = {"run": _run, "listening": _listening, "cascade": _cascade, "llm": _llm}
        self._listens = kind == "listening"
        self._system, self._make, weights = kinds[kind](about, **options)
        self._made: dict[tuple[Any, ...], Answers] = {}
        return {
            "versions": machine.versions(("jax", "jaxlib", "flax")),
            "batch": 1 if self._listens else len(self._batch),
            "weight_bytes": weights,
        }

    def answer(self, clip: str, n_tokens: int) -> dict[str, Any]:
        """Returns the wall time from the end of a clip (or the text) to the last of so many tokens of its answer."""
        # Each length is padded to itself, as it would be where such clips are what is answered.
        lengths = tuple(len(waveform) / SAMPLE_RATE for name, waveform in self._clips.items() if name[0] != "t")
        timed = self._timed([clip], n_tokens, lengths)
        return {"seconds": timed["answers"] if self._listens else timed["seconds"]}

    def batch(self, n_tokens: int) -> dict[str, Any]:
        """Returns the wall time until each clip of the batch has so many tokens of its answer."""
        return {"seconds": self._timed(self._batch, n_tokens, self._longest(self._batch))["seconds"]}

    def _timed(self, clips: Sequence[str], n_tokens: int, buckets: tuple[float, ...]) -> dict[str, float]:
        """Returns the "seconds" of it all, and the longest that a reply says of its "answers"."""
        answers = self._of(n_tokens, buckets, ends=False)
        requests = [Request(self._clips[clip]) if clip in self._clips else Request(prompt=TEXT) for clip in clips]
        start = time.perf_counter()
        replies = answers.generate(requests)
        seconds = time.perf_counter() - start
        if {len(reply.tokens) for reply in replies} != {n_tokens}:
            raise ValueError(f"answers of {[len(reply.tokens) for reply in replies]} tokens, not of {n_tokens}")
        return {"seconds": seconds, "answers": max(reply.seconds for reply in replies)}

    def hear(self, clips: Sequence[str]) -> dict[str, Any]:
        """Returns what it writes down of each clip."""
        answers = self._of(self._most, self._longest(clips), ends=True)
        requests = [Request(self._clips[clip], wants_transcript=True) for clip in clips]
        return {"texts": [reply.text for reply in answers.generate(requests)]}

    def bandwidth(self, n_bytes: int, n_times: int) -> dict[str, Any]:
        """Returns the most bytes a second that a sum over so many bytes of float32 reads."""
        x = jnp.ones(n_bytes // 4)
        total = jax.jit(jnp.sum)
        total(x).block_until_ready()
        seconds = []
        for _ in range(n_times):
            start = time.perf_counter()
            total(x).block_until_ready()
            seconds.append(time.perf_counter() - start)
        return {"bytes_per_second": n_bytes / min(seconds)}

    def _longest(self, clips: Sequence[str]) -> tuple[float, ...]:
        """Returns one bucket for all of some clips: one compilation."""
        return (max(len(self._clips[clip]) for clip in clips) / SAMPLE_RATE,)

    def _of(self, n_tokens: int, buckets: tuple[float, ...], *, ends: bool) -> Answers:
        """Returns what answers with that many tokens at most, or with `ends` False exactly."""
        key = (n_tokens, buckets, ends)
        if key not in self._made:
            config = self._system.config.copy_and_resolve_references()
            with config.ignore_type():
                config.data.buckets = buckets
            chat = self._system.chat
            if not ends:
                chat = copy.copy(chat)
                chat.stop_ids = (-1,) * len(chat.stop_ids)  # which no model writes
            self._made[key] = self._make(dataclasses.replace(self._system, config=config, chat=chat), n_tokens)
        return self._made[key]


def _run(about: Mapping[str, Any], workdir: str, merged: bool, as_trained: bool = False) -> tuple[System, _Make, int]:
    """A trained run.

    Args:
      merged: with its adapters folded into the LLM.
      as_trained: with the run's `model.matmul_dtype`; else the operands of products have the dtype of its weights, as
        those of what it is compared with.
    """
    built, variables = checkpoint.load_for_inference(Path(workdir))
    model: Any = built.model
    if not as_trained:
        built = dataclasses.replace(built, model=model.clone(matmul_dtype=None))
    if merged:
        assert built.model.config.lora is not None
        llm = merge(variables["params"]["llm"], variables["lora"]["llm"], built.model.config.lora)
        variables = {"params": variables["params"] | {"llm": llm}}
    weights = Weights(built.model, variables)
    make = lambda system, n: Generator(system, weights, batch_size=len(about["batch"]), max_new_tokens=n)
    return built, make, _weight_bytes(make(built, 1), is_spoken=True)


def _listening(about: Mapping[str, Any], workdir: str, merged: bool) -> tuple[System, _Make, int]:
    """A trained run that hears clips while they are spoken; arguments as of `_run`. There is room for the longest."""
    built, make, size = _run(about, workdir, merged)

    def make_listener(system: System, n_tokens: int) -> Answers:
        generator = make(system, n_tokens)
        assert isinstance(generator, Generator)
        return Listener(generator, max(system.config.data.buckets))

    return built, make_listener, size


def _cascade(
    about: Mapping[str, Any], config: Mapping[str, Any], silence: Mapping[str, Any] | None, as_trained: bool = False
) -> tuple[System, _Make, int]:
    """Whisper and the plain LLM.

    Args:
      config: of a run.
      silence: the "seconds" of it after a clip, and the "windows" to choose from; None: 30 s.
      as_trained: the LLM multiplies as in `_run`; Whisper computes in float32.
    """
    system, make, size = _llm(about, config, "float32", as_trained)
    n_rows = len(about["batch"])
    directory = assets.resolve(whisper_of(config_lib.from_values(config, Path("case"))))
    whisper = Transcriber(directory, batch_size=n_rows, max_new_tokens=about["transcript_tokens"])
    if silence is not None:
        whisper = whisper.with_windows(silence["windows"], silence["seconds"])

    def make_cascade(system: System, n_tokens: int) -> Answers:
        generator = make(system, n_tokens)
        assert isinstance(generator, Generator)
        return Cascade(whisper, generator)

    return system, make_cascade, size


def _llm(
    about: Mapping[str, Any], config: Mapping[str, Any], dtype: str, as_trained: bool = False
) -> tuple[System, _Make, int]:
    """The plain LLM.

    Args:
      config: of a run.
      dtype: that it is held in, and computed in unless that is int8.
      as_trained: as of `_run`.
    """
    values = config_lib.from_values(config, Path("case"))
    values.model.update(param_dtype=dtype, dtype="float32" if dtype == "int8" else dtype)
    if not as_trained:
        values.model.matmul_dtype = ""
    plain = plain_generator(values)
    n_rows, weights = len(about["batch"]), Weights(plain.system.model, plain.variables)
    make = lambda system, n: Generator(system, weights, batch_size=n_rows, max_new_tokens=n, adapters_on_text=False)
    return plain.system, make, _weight_bytes(make(plain.system, 1), is_spoken=False)


def _weight_bytes(generator: Generator, is_spoken: bool) -> int:
    """Returns the bytes of the weights that a token's step reads: all but an embedding that is not also the head."""
    variables, program = generator.held(generator.program(is_spoken, n_new=1), n_rows=1)
    flat = sharding.flatten({name: tree["llm"] for name, tree in program.visible(variables).items() if "llm" in tree})
    untied = any(path.startswith("params/lm_head/") for path in flat)
    return sum(x.nbytes for path, x in flat.items() if not (untied and path.startswith("params/embed/")))


if __name__ == "__main__":
    protocol.serve(Arm())
