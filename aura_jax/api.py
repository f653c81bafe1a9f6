"""Answers from Python: `aura_jax.load` and what it returns.

Dimensions: S samples of a waveform at 16 kHz.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, TypedDict, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np

from aura_jax import cache, checkpoint
from aura_jax import system as system_lib
from aura_jax.audio import features
from aura_jax.audio.io import AudioError, from_samples, load_audio
from aura_jax.audio.pauses import cut_in_pauses
from aura_jax.convert import hf
from aura_jax.errors import UserError, nearest
from aura_jax.exchange import importing
from aura_jax.infer import generate as generate_lib
from aura_jax.infer.answer_text import checked_stop
from aura_jax.infer.generate import Generator
from aura_jax.infer.prompting import Request, tokenise
from aura_jax.infer.reading import Weights
from aura_jax.infer.sampling import MAX_SEED, Sampling
from aura_jax.infer.stream import Session
from aura_jax.models.lora import float_dtype, merge
from aura_jax.system import System

# A path, the bytes of a file, a binary stream, or (samples, their rate in Hz).
Clip: TypeAlias = str | Path | bytes | BinaryIO | tuple[np.ndarray, float]

WHICH = ("best", "latest")
DTYPES = ("bfloat16", "float32", "int8")
ADAPTERS = ("separate", "merged")


class Options(TypedDict, total=False):
    """How an answer is picked and where it ends.

    Attributes:
      stop: an answer ends where its text first holds this, or one of these, and does not include it.
      temperature, top_p, repetition_penalty, seed: as of `infer.sampling.Sampling`; without any, greedy.
    """

    stop: str | Sequence[str] | None
    temperature: float
    top_p: float
    repetition_penalty: float
    seed: int


@dataclasses.dataclass(frozen=True)
class Reply(generate_lib.Reply):
    """An answer; `str(reply)` is its text.

    Attributes:
      text, tokens, ended, seconds: as of `infer.generate.Reply`. Of a recording in pieces: their texts joined by
        spaces, all their tokens, whether all ended, and the longest time.
      pieces: (start, end, text), in seconds, of a recording that was longer than the model takes; else none.
    """

    pieces: tuple[tuple[float, float, str], ...] = ()

    def __str__(self) -> str:
        return self.text


def load(
    path: str | Path,
    *,
    which: str = "best",
    dtype: str | None = None,
    adapters: str = "separate",
    batch_size: int | None = None,
    max_new_tokens: int | None = None,
    overrides: Sequence[str] = (),
) -> "Model":
    """Returns the model of a run or of an export, ready to answer.

    Compiled programs are kept in `$AURA_JAX_CACHE/compiled`, unless jax already has a compilation cache.

    Args:
      path: a workdir, or a folder of `aura-jax export` in any format.
      which: of a workdir, the "best" checkpoint by validation or the "latest".
      dtype: how the LLM is held: "bfloat16" or "float32", which is computed in as well, or "int8", its linears with one
        scale for each output, as they are read from its files. None: as the run was trained.
      adapters: "separate", beside the LLM; "merged", folded into it. A merged model answers text as the merged LLM.
      batch_size: most clips answered together; None: `eval.batch_size`.
      max_new_tokens: longest answer; None: `eval.max_new_tokens`.
      overrides: `--config.KEY=VALUE`, as on the command line: mesh.*, model.attention, eval.*; for an export of the
        format peft also model.llm, where its base is now.

    Raises:
      UserError: no run or export, another base, a damaged file, or an argument that the weights do not allow.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(cache.directory() / "compiled"))
    return Model(
        path,
        which=which,
        dtype=dtype,
        adapters=adapters,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        overrides=overrides,
    )


class Model:
    """A speech LLM that answers clips and text.

    Attributes:
      system: its configuration, modules and tokenizer.
      variables: `params` and, unless merged, `lora`.
      longest_seconds: of a clip that is answered whole: `data.max_seconds`, and no more than an encoder's window.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        which: str = "best",
        dtype: str | None = None,
        adapters: str = "separate",
        batch_size: int | None = None,
        max_new_tokens: int | None = None,
        overrides: Sequence[str] = (),
    ):
        """As `load`, but for the compilation cache, which it leaves as it is."""
        for name, value, valid in (("which", which, WHICH), ("dtype", dtype, DTYPES), ("adapters", adapters, ADAPTERS)):
            if value is not None and value not in valid:
                raise UserError(f"{name}={value!r}: {nearest(str(value), valid)}")
        self.system, self.variables = _read(Path(path), which, dtype, overrides)
        lora = self.system.model.config.lora
        if adapters == "merged" and lora is None:
            raise UserError("adapters='merged': this model has none: leave it out")
        if adapters == "merged" and lora is not None and "lora" in self.variables:
            if self.system.model.param_dtype == jnp.int8:
                raise UserError("adapters='merged': int8 weights cannot take what LoRA learned: add dtype='bfloat16'")
            params = self.variables["params"]
            self.variables = {"params": params | {"llm": merge(params["llm"], self.variables["lora"]["llm"], lora)}}
        c = self.system.config
        encoder = self.system.model.config.encoder
        self.longest_seconds: float = c.data.max_seconds
        if encoder is not None:
            self.longest_seconds = min(self.longest_seconds, encoder.n_positions / features.ENCODER_RATE)
        self._n_positions = hf.text_config(self.system.llm_dir).get("max_position_embeddings")
        self._weights = Weights(self.system.model, self.variables)
        self._batch_size, self._max_new_tokens = batch_size, max_new_tokens
        self._generators: dict[tuple[int | None, bool | None], Generator] = {}
        self._generator(None, None)  # refuses what cannot be answered with

    @overload
    def generate(
        self,
        audio: list[Any],
        prompt: str | None = None,
        *,
        split: bool = True,
        adapters: bool | None = None,
        max_new_tokens: int | None = None,
        **options: Unpack[Options],
    ) -> list[Reply]: ...

    @overload
    def generate(
        self,
        audio: Clip | None = None,
        prompt: str | None = None,
        *,
        split: bool = True,
        adapters: bool | None = None,
        max_new_tokens: int | None = None,
        **options: Unpack[Options],
    ) -> Reply: ...

    def generate(
        self,
        audio: Clip | list[Any] | None = None,
        prompt: str | None = None,
        *,
        split: bool = True,
        adapters: bool | None = None,
        max_new_tokens: int | None = None,
        **options: Unpack[Options],
    ) -> Reply | list[Reply]:
        """Returns the answer to a clip, to each of a list of clips, or to text.

        Args:
          audio: a clip (WAV, FLAC, Ogg Vorbis, Opus or MP3, or one channel of floats with its rate), or a list of them,
            which are answered in batches. None: `prompt` is a turn of text.
          prompt: what to do with the audio; None: what the run was trained to do.
          split: a clip longer than `longest_seconds` is cut in its pauses, and each piece is answered by itself, under
            any prompt: what spans two pieces is lost. False: it is an error.
          adapters: of text, whether LoRA acts on it: False is the plain LLM, True as in a turn after a spoken one.
            None: as `lora.scope` says.
          max_new_tokens: longest answer, or answer to a piece; each number is compiled once. None: as loaded.
          options: of how tokens are picked, and where an answer ends.

        Raises:
          UserError: audio that cannot be read, nothing to answer, values out of range, or more tokens than the LLM has
            positions.
        """
        how = _how(**options)
        generator = self._generator(max_new_tokens, adapters)
        clips = audio if isinstance(audio, list) else [audio]
        cut = [self._pieces(clip, split, i if isinstance(audio, list) else None) for i, clip in enumerate(clips)]
        requests = [
            Request(piece, prompt, number=_number(i, j))
            for i, of in enumerate(cut)
            for j, (piece, _, _) in enumerate(of)
        ]
        self._check(generator, requests, adapters)
        found = iter(generator.generate(requests, **how))
        replies = [_joined(pieces, [next(found) for _ in pieces]) for pieces in cut]
        return replies if isinstance(audio, list) else replies[0]

    def stream(
        self,
        audio: Clip | None = None,
        prompt: str | None = None,
        *,
        every: int = 1,
        split: bool = True,
        adapters: bool | None = None,
        max_new_tokens: int | None = None,
        **options: Unpack[Options],
    ) -> Iterator[str]:
        """Returns an iterator over parts of one answer, each there as soon as it is certain.

        Together they are the text of `generate`'s reply.

        Args:
          every: tokens decoded at a time: at 1 each is shown at once, above it the host waits less often.
          audio, prompt, ...: as of `generate`, with one clip.

        Raises:
          UserError: as `generate`, for a list of clips, or for `every` below 1; before anything is decoded.
        """
        if isinstance(audio, list):
            raise UserError("a stream is of one answer: give one clip, or ask generate for a list of them")
        how = _how(**options)
        generator = self._generator(max_new_tokens, adapters)
        pieces = self._pieces(audio, split)
        requests = [Request(piece, prompt, number=_number(0, i)) for i, (piece, _, _) in enumerate(pieces)]
        self._check(generator, requests, adapters)
        return _in_turn([generator.stream(r, **how, every=every) for r in requests])

    def listen(
        self,
        prompt: str | None = None,
        *,
        history: Sequence[Mapping[str, str]] = (),
        rate: float = features.SAMPLE_RATE,
        max_seconds: float | None = None,
        max_new_tokens: int | None = None,
        **options: Unpack[Options],
    ) -> Session:
        """Returns a session that hears one turn while it is spoken: `push` samples, then `finish`, or `reply`.

        Only a model that does not look ahead can, such as one of configs/quickstart_streaming.py.

        Args:
          history: earlier turns of text, {"role", "content"}, oldest first.
          rate: of the samples that will be pushed, in Hz.
          max_seconds: of speech, for which there is room; None: `longest_seconds`.
          prompt, max_new_tokens, options: as of `generate`.

        Raises:
          UserError: the model does not stream (the line says what would), values out of range, or more tokens than the
            LLM has positions.
        """
        how = _how(**options)
        session = Session(
            self._generator(max_new_tokens, None), prompt, history=history, rate=rate, max_seconds=max_seconds, **how
        )
        self._check_positions(session.n_most, session.n_new)
        return session

    def chat(self) -> "Chat":
        """Returns a conversation that has not begun."""
        return Chat(self)

    def _generator(self, max_new_tokens: int | None, adapters: bool | None) -> Generator:
        """Returns the generator of answers that long; all share weights and compiled programs."""
        key = (self._max_new_tokens if max_new_tokens is None else max_new_tokens, adapters)
        if key not in self._generators:
            lora = self.system.model.config.lora
            if adapters is not None and lora is not None and "lora" not in self.variables:
                raise UserError(
                    f"adapters={adapters}: they are merged into this LLM, which has no text without them: leave it out"
                )
            if adapters and lora is None:
                raise UserError("adapters=True: this model has none: leave it out")
            self._generators[key] = Generator(
                self.system,
                self._weights,
                batch_size=self._batch_size,
                max_new_tokens=key[0],
                adapters_on_text=adapters,
            )
        return self._generators[key]

    def _pieces(
        self, clip: Clip | None, split: bool, index: int | None = None
    ) -> list[tuple[np.ndarray | None, float, float]]:
        """Returns (waveform, start, end) of what is answered by itself, in seconds; of text, one without a waveform."""
        if clip is None:
            return [(None, 0.0, 0.0)]
        name = "audio" if index is None else f"audio[{index}]"
        waveform_S = _waveform(clip, name)
        longest = round(self.longest_seconds * features.SAMPLE_RATE)
        if len(waveform_S) > longest and not split:
            seconds = len(waveform_S) / features.SAMPLE_RATE
            raise AudioError(
                f"{name}: {seconds:.1f} s, and this model takes at most {self.longest_seconds:g} s at once: cut it, or "
                "let generate split it"
            )
        cuts = cut_in_pauses(waveform_S, longest) if len(waveform_S) > longest else [(0, len(waveform_S))]
        return [(waveform_S[a:b], a / features.SAMPLE_RATE, b / features.SAMPLE_RATE) for a, b in cuts]

    def _check(self, generator: Generator, requests: Sequence[Request], adapters: bool | None) -> None:
        """Raises UserError for requests that the model cannot answer so."""
        for i, request in enumerate(requests):
            prompt = tokenise(self.system, i, request)
            if prompt.clips and adapters is not None:
                raise UserError(f"adapters={adapters} is for text: without them nothing is heard; leave it out")
            self._check_positions(prompt.n_tokens(self.system.config.embedder.token_rate), generator.max_new_tokens)

    def _check_positions(self, n_read: int, n_new: int) -> None:
        if self._n_positions is not None and n_read + n_new > self._n_positions:
            raise UserError(
                f"{n_read} tokens to read and max_new_tokens {n_new} are more than the {self._n_positions} positions "
                f"of {self.system.llm_dir}: shorten one of them"
            )


class Chat:
    """A conversation with a model: each turn is answered with all earlier ones, and their clips, as history.

    Every turn reads the whole conversation anew.

    Attributes:
      turns: {"role", "content"} so far, oldest first; a user's turn with a clip has its waveform as "audio", and
        "content" of None where the run's own prompt stood beside it.
    """

    def __init__(self, model: Model):
        self._model = model
        self.turns: list[dict[str, Any]] = []

    def say(
        self,
        prompt: str | None = None,
        *,
        audio: Clip | None = None,
        max_new_tokens: int | None = None,
        **options: Unpack[Options],
    ) -> Reply:
        """Returns the answer to the next turn, and adds both to `turns`.

        Args:
          prompt: the turn's text, after its clip if there is one.
          audio: a clip of at most the model's `longest_seconds`: a turn is never split.
          max_new_tokens, ...: as of `Model.generate`.

        Raises:
          UserError: as `Model.generate`; the conversation is then as it was.
        """
        generator, request = self._next(prompt, audio, max_new_tokens)
        (found,) = generator.generate([request], **_how(**options))
        self._add(request, found.text)
        return Reply(found.text, found.tokens, found.ended, found.seconds)

    def stream(
        self,
        prompt: str | None = None,
        *,
        audio: Clip | None = None,
        every: int = 1,
        max_new_tokens: int | None = None,
        **options: Unpack[Options],
    ) -> Iterator[str]:
        """Returns an iterator over parts of the answer to the next turn; `turns` has both when it is at its end.

        Args:
          every: as of `Model.stream`.
          prompt, audio, ...: as of `say`.

        Raises:
          UserError: as `say`, or for `every` below 1; before anything is decoded.
        """
        generator, request = self._next(prompt, audio, max_new_tokens)
        return self._told(request, generator.stream(request, **_how(**options), every=every))

    def _next(self, prompt: str | None, audio: Clip | None, max_new_tokens: int | None) -> tuple[Generator, Request]:
        """Returns the next turn as a request, and what answers it."""
        generator = self._model._generator(max_new_tokens, None)
        ((waveform_S, _, _),) = self._model._pieces(audio, split=False)
        request = Request(waveform_S, prompt, history=tuple(self.turns))
        self._model._check(generator, [request], None)
        return generator, request

    def _told(self, request: Request, parts: Iterator[str]) -> Iterator[str]:
        told = []
        for part in parts:
            told.append(part)
            yield part
        self._add(request, "".join(told))

    def _add(self, request: Request, answer: str) -> None:
        turn = {"role": "user", "content": request.prompt}
        turn |= {} if request.waveform is None else {"audio": request.waveform}
        self.turns += [turn, {"role": "assistant", "content": answer}]


def _read(path: Path, which: str, dtype: str | None, overrides: Sequence[str]) -> tuple[System, dict[str, Any]]:
    """Returns the system in `path` and its variables, with the LLM held as `dtype` says."""
    if importing.is_export(path):
        if which != "best":
            raise UserError(f"which={which!r} names a checkpoint, and {path} is an export: leave it out")
        built, variables = importing.load_for_inference(path, overrides)
        trained_llm = False
    else:
        _check_workdir(path)
        built, variables = checkpoint.load_for_inference(path, which, overrides)
        trained_llm = any(name.startswith("params/llm/") for name in checkpoint.inference_meta(path, which)[1]["own"])
    return _held_as(built, variables, dtype, trained_llm) if dtype else (built, variables)


def _check_workdir(path: Path) -> None:
    """Raises UserError for what is known to be no workdir, and may be mistaken for an export."""
    if not path.is_dir():
        raise UserError(f"{path}: no such folder: name a workdir, or a folder of aura-jax export")
    if (path / "adapter_config.json").is_file():
        raise UserError(f"{path}: an adapter without audio_config.json hears nothing: name a folder of aura-jax export")
    config = path / "config.json"
    if not config.is_file():
        raise UserError(f"{path}: neither a run nor an export is in it: name a workdir, or a folder of aura-jax export")
    if "model_type" in hf.read_json(config, "copy it again"):
        raise UserError(
            f"{path}: a model without audio_config.json hears nothing: name a folder of aura-jax export, or a workdir"
        )


def _held_as(built: System, variables: dict[str, Any], dtype: str, trained_llm: bool) -> tuple[System, dict[str, Any]]:
    """Returns a system and its variables with the LLM held in another dtype.

    Args:
      trained_llm: the variables have weights of the LLM that are in none of its files.
    """
    config = built.config.copy_and_resolve_references()
    config.model.param_dtype = dtype
    if dtype != "int8":
        config.model.update(dtype=dtype, matmul_dtype="")
    kind, computed = jnp.dtype(dtype), jnp.dtype(config.model.dtype)
    multiplied = jnp.dtype(config.model.matmul_dtype) if config.model.matmul_dtype else None
    model = built.model.clone(dtype=computed, param_dtype=kind, matmul_dtype=multiplied)
    changed = dataclasses.replace(built, config=config, model=model)
    cast = lambda tree: jax.tree.map(lambda x: x.astype(float_dtype(kind, computed)), tree)
    params = variables["params"]
    if "encoder" in params:
        params = params | {"encoder": cast(params["encoder"])}
    if (kind == jnp.int8) != (built.model.param_dtype == jnp.int8):
        if trained_llm:
            raise UserError(
                f"dtype={dtype!r}: the run trained weights of the LLM itself, and int8 ones are made of its files: "
                "export it as hf, and load that"
            )
        params = params | {"llm": system_lib.load_llm(changed, checkpoint.system_mesh(config))}
    elif kind != jnp.int8:
        params = params | {"llm": cast(params["llm"])}
    return changed, variables | {"params": params}


def _waveform(clip: Any, name: str) -> np.ndarray:
    """Returns a clip as a waveform; `name` is what an error calls samples."""
    if isinstance(clip, (str, Path, bytes)) or hasattr(clip, "read"):
        return load_audio(clip)
    if isinstance(clip, tuple) and len(clip) == 2 and not isinstance(clip[1], (str, Path, bytes)):
        samples, rate = clip
        return from_samples(np.asarray(samples), rate, name=name)
    what = type(clip).__name__
    raise AudioError(f"{name}: {what}: give a path, bytes, a binary stream, or (samples, rate); of several, a list")


def _number(clip: int, piece: int) -> int:
    """Returns what a piece is drawn by: the place of its clip, whatever the clips before it were cut into."""
    return (clip + 65536 * piece) % (MAX_SEED + 1)


def _how(stop: str | Sequence[str] | None = None, **sampling: Any) -> dict[str, Any]:
    """Returns what `Generator.generate` takes beside requests."""
    strings = [stop] if isinstance(stop, str) else stop or ()
    return {"sampling": Sampling(**sampling), "stop": checked_stop(strings)}


def _joined(pieces: Sequence[tuple[np.ndarray | None, float, float]], found: Sequence[generate_lib.Reply]) -> Reply:
    """Returns the reply to a clip from those to its pieces."""
    told = [(start, end, reply.text) for (_, start, end), reply in zip(pieces, found, strict=True)]
    return Reply(
        text=" ".join(reply.text for reply in found if reply.text),
        tokens=tuple(token for reply in found for token in reply.tokens),
        ended=all(reply.ended for reply in found),
        seconds=max(reply.seconds for reply in found),
        pieces=tuple(told) if len(told) > 1 else (),
    )


def _in_turn(answers: Sequence[Iterator[str]]) -> Iterator[str]:
    """Yields what the iterators do, with a space between two that say something."""
    told = False
    for answer in answers:
        between = " " if told else ""
        for part in answer:
            yield between + part
            between, told = "", True
