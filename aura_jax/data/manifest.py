"""Manifests: JSON lines that say which clips there are, and what belongs to each."""

import difflib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from aura_jax.audio.features import SAMPLE_RATE
from aura_jax.audio.io import AudioError, audio_seconds, stamp
from aura_jax.data import shards
from aura_jax.errors import UserError
from aura_jax.storage import is_remote

LET_TRANSCRIBE = "let `aura-jax data transcribe` write it down"  # how an error mends a missing transcript
ROUNDING = 8  # samples that `clip_samples` adds to what a manifest says: half a millisecond

_STRINGS = ("audio", "text", "prompt", "response", "id")
_MANY = 2000  # headers: beyond it reading takes seconds, and a progress bar says so
_NEEDED = "a speech row needs 'audio', and 'text' or 'response'; a text row 'prompt' and 'response', or 'text' alone"


@dataclass(frozen=True)
class Row:
    """One line of a manifest.

    Speech has `audio`; its target is `response`, or `text` (the transcript) where there is none. A row without `audio`
    is text-only: a chat turn (`prompt` and `response`), or plain text (`text` alone).

    Attributes:
        where: "manifest:line", for error messages.
        id: the manifest's, or else the audio's path as the manifest has it, or "row-LINE".
        audio: absolute path of the clip, or address of its record in a shard; None = text-only.
        ended: whether `response` is whole; of one that stops in the middle, the end is not to be learnt.
        seconds: length of the clip, if the manifest says; it may be rounded to milliseconds.
        header_seconds: what the clip's header said when it was packed; 0 = it could not be read.
        history: earlier turns of the conversation, each {"role": ..., "content": ...}.
        extra: the line's other keys, untouched.
    """

    where: str
    id: str
    audio: str | None = None
    text: str | None = None
    prompt: str | None = None
    response: str | None = None
    ended: bool = True
    seconds: float | None = None
    header_seconds: float | None = None
    history: tuple[Mapping[str, str], ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def target(self) -> str:
        """What the model shall say: the response, or the transcript."""
        target = self.text if self.response is None else self.response
        assert target is not None  # load_manifest saw to it
        return target

    @property
    def is_plain_text(self) -> bool:
        """Text alone, outside any conversation."""
        return self.audio is None and self.response is None


def load_manifest(path: str | Path) -> list[Row]:
    """Reads a manifest (JSON lines, UTF-8; empty lines are skipped), or the rows of a folder of shards.

    No audio file is opened, but the folders that hold them must exist.

    Args:
        path: of the manifest, of the folder of shards, or of its index.

    Raises:
        UserError: as `manifest_lines`; the manifest has no rows; a line lacks a key, or has one of the wrong type; a
            folder of clips does not exist. Names the file, line and key, and the mend.
    """
    home = Path(path).parent.absolute()
    rows = [parse_row(values, where, home) for where, values in manifest_lines(path)]
    if not rows:
        raise UserError(f"{path}: an empty manifest: give one JSON object a line")
    check_folders(rows)
    return rows


def check_folders(rows: Iterable[Row]) -> None:
    """Raises UserError for the first row whose clip is in a folder that does not exist; no file is looked for."""
    folders = set()
    for row in rows:
        folder = os.path.dirname(row.audio) if row.audio else None
        if folder and folder not in folders and not is_remote(folder) and not os.path.isdir(folder):
            raise UserError(
                f"{row.where}: the folder {folder} of 'audio' does not exist: mend the path, "
                "which is absolute or relative to the manifest"
            )
        folders.add(folder)


def manifest_lines(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields ("file:line", object) for each line of a manifest, or of a folder of shards.

    Raises:
        UserError: as `json_lines`, or as `shards.open_shards`.
    """
    return shards.lines(path) if shards.is_shards(path) else json_lines(path)


def json_lines(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields ("file:line", object) for each line of a file of JSON lines, UTF-8; empty lines are skipped.

    Raises:
        UserError: the file cannot be read, or a line is not a JSON object: names file and line.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}): give a file of JSON lines") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            values = json.loads(line)
        except UnicodeDecodeError:
            raise UserError(f"{where}: not UTF-8: save the file as UTF-8") from None
        except json.JSONDecodeError as error:
            raise UserError(
                f"{where}: not JSON ({error.msg}, column {error.colno}): give one JSON object a line"
            ) from None
        if not isinstance(values, dict):
            raise UserError(f"{where}: not an object, but {type(values).__name__}: give one JSON object a line")
        yield where, values


def parse_row(values: dict[str, Any], where: str, folder: Path, *, untranscribed: bool = False) -> Row:
    """Returns the row that a line says. Takes what it knows out of `values`, and keeps the rest.

    Args:
        where: "manifest:line", for error messages.
        folder: that the path of the clip is relative to.
        untranscribed: speech may have neither text nor response: the row has no target yet.

    Raises:
        UserError: a key is missing, or of the wrong type.
    """
    known = {key: values.pop(key, None) for key in (*_STRINGS, "seconds", "header_seconds", "history")}
    for key in _STRINGS:
        if key == "id" and isinstance(known[key], int):
            known[key] = str(known[key])
        if known[key] is not None and not isinstance(known[key], str):
            raise UserError(f"{where}: {key!r} is {json.dumps(known[key])[:40]}: give a string")
    for key, least in (("seconds", "a positive number"), ("header_seconds", "0 or more")):
        seconds = known[key]
        if seconds is not None:
            number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool) and 0 <= seconds < float("inf")
            if not number or (key == "seconds" and not seconds):
                raise UserError(f"{where}: {key!r} is {json.dumps(seconds)}: give {least}, or leave it out")
            known[key] = float(seconds)
    known["history"] = _history(known["history"], where)
    ended = values.pop("ended", None)
    known["ended"] = ended is None or ended
    if not isinstance(known["ended"], bool):
        shown = json.dumps(known["ended"])[:40]
        raise UserError(f"{where}: 'ended' is {shown}: give false if 'response' stops in the middle, or leave it out")

    if known["audio"] is None:
        # Without this a mistyped 'audio' would make the row a plain text.
        strings = [key for key, value in values.items() if isinstance(value, str)]
        similar = difflib.get_close_matches("audio", strings, cutoff=0.7) + [k for k in strings if "audio" in k.lower()]
        if similar:
            raise UserError(f"{where}: no 'audio', but {similar[0]!r}: rename the key; {_NEEDED}")
        chat = known["prompt"] is not None and known["response"] is not None
        plain = bool(known["text"]) and known["response"] is None and known["prompt"] is None
        if not chat and not plain:
            raise UserError(f"{where}: neither speech nor text: {_NEEDED}")
        if plain and known["history"]:
            raise UserError(f"{where}: 'history' before a plain text: give 'prompt' and 'response'")
    elif not known["audio"]:
        raise UserError(f"{where}: 'audio' is empty: give the path of a clip")
    elif known["text"] is None and known["response"] is None and not untranscribed:
        raise UserError(f"{where}: 'audio' without 'text' or 'response': add what is said, or {LET_TRANSCRIBE}")
    known["id"] = known["id"] or known["audio"] or f"row-{where.rpartition(':')[2]}"
    if known["audio"] is not None and not is_remote(known["audio"]):
        known["audio"] = os.path.normpath(folder / known["audio"])
    return Row(where=where, extra=values, **known)


def _history(turns: Any, where: str) -> tuple[Mapping[str, str], ...]:
    mend = "give a list of {'role': 'user' or 'assistant', 'content': text}, each 'user' answered"
    if turns is None:
        return ()
    if not isinstance(turns, list) or len(turns) % 2:
        raise UserError(f"{where}: 'history' is not a list of whole exchanges: {mend}")
    for place, turn in enumerate(turns):
        role = ("user", "assistant")[place % 2]
        if not isinstance(turn, dict) or turn.get("role") != role or not isinstance(turn.get("content"), str):
            raise UserError(f"{where}: 'history' turn {place + 1} is not one of {role!r}: {mend}")
    return tuple(turns)


def clip_samples(rows: Sequence[Row], *, cache: Path | None = None, keep: bool = True, n_threads: int = 8) -> list[int]:
    """Samples at 16 kHz that each row's clip has at most: by the manifest's `seconds`, else by the clip's header.

    That is up to `ROUNDING` more than was said, since seconds may be rounded to milliseconds. A clip whose header
    cannot be read counts 1 sample: it stays in the plan, and decoding it says what is wrong.

    Args:
        rows: of a manifest; text-only ones have 0.
        cache: a file (JSON lines) that keeps what the headers said, by path, size and time of change. None: no file.
        keep: write what is new to the cache.
        n_threads: that read headers.
    """
    known = _read_cache(cache)
    unknown = sorted({row.audio for row in rows if row.audio and row.seconds is None and row.header_seconds is None})
    headers: dict[str, float | None] = {}

    def measure(path: str) -> tuple[str, str, float | None]:
        try:
            of_file = "{}-{}".format(*stamp(path))
            return path, of_file, known[path, of_file] if (path, of_file) in known else audio_seconds(path)
        except (AudioError, OSError):
            return path, "", None

    if unknown:
        with ThreadPoolExecutor(n_threads) as pool:
            measured = pool.map(measure, unknown)
            for path, of_file, seconds in tqdm(
                measured, "clip lengths", len(unknown), disable=len(unknown) < _MANY, unit="clip"
            ):
                headers[path] = seconds
                if seconds is not None:
                    known[path, of_file] = seconds
        if keep:
            _write_cache(cache, known)

    def samples(row: Row) -> int:
        if row.audio is None:
            return 0
        if row.seconds is not None:
            return round(row.seconds * SAMPLE_RATE) + ROUNDING
        header = headers[row.audio] if row.header_seconds is None else row.header_seconds
        # The resampler may round up.
        return round((header or 0) * SAMPLE_RATE) + 1

    return [samples(row) for row in rows]


def _read_cache(cache: Path | None) -> dict[tuple[str, str], float]:
    if cache is None or not cache.exists():
        return {}
    try:
        lines = [json.loads(line) for line in cache.read_text().splitlines()]
        return {(line["audio"], line["stamp"]): float(line["seconds"]) for line in lines}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{cache}: a damaged cache of clip lengths: delete it") from None


def _write_cache(cache: Path | None, known: dict[tuple[str, str], float]) -> None:
    if cache is not None:
        lines = [json.dumps({"audio": a, "stamp": s, "seconds": seconds}) for (a, s), seconds in known.items()]
        cache.parent.mkdir(parents=True, exist_ok=True)
        # Always the same name: what a killed run left of it, the next one overwrites.
        partial = cache.with_suffix(".partial")
        partial.write_text("\n".join(lines) + "\n")
        partial.replace(cache)
