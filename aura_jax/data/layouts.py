"""What can be packed: manifests, and the layouts that speech corpora come in.

Each is a sequence of parts: a few rows that a process can read by itself, known before any audio is read.
"""

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from aura_jax.audio.cut import cut
from aura_jax.audio.io import AudioError
from aura_jax.data import shards
from aura_jax.data.manifest import Row, load_manifest
from aura_jax.errors import UserError, nearest

KINDS = (
    "a manifest (JSON lines), a LibriSpeech folder (with *.trans.txt), a .tsv of Common Voice, GigaSpeech.json, "
    "or parquet files with an audio column"
)

_STAT_AT_ONCE = 4096  # files whose sizes are asked for together
_STAT_THREADS = 16
_CUT_BYTES = 16_000  # about what a second of speech takes as FLAC at 16 kHz
_CHUNK = 1 << 22  # characters of GigaSpeech.json read at a time
_PUNCTUATION = {"<COMMA>": ",", "<PERIOD>": ".", "<QUESTIONMARK>": "?", "<EXCLAMATIONPOINT>": "!"}
_NO_SPEECH = re.compile(r"\s*(<(SIL|MUSIC|NOISE|OTHER)>\s*)+")


class Item(NamedTuple):
    """A row, read.

    Attributes:
        where: what messages call it.
        values: its line, without what says where the audio is.
        audio: the bytes of its audio file, none of them where it could not be read; None = text-only.
        problem: why it could not be read.
    """

    where: str
    values: dict[str, Any]
    audio: bytes | None
    problem: str | None = None


class Part(Protocol):
    """Rows that one process reads.

    Attributes:
        n_rows: how many there are.
        n_bytes: about how many they take in a shard.
        identity: what they are made of, as JSON: other input has another.
    """

    @property
    def n_rows(self) -> int: ...
    @property
    def n_bytes(self) -> int: ...
    @property
    def identity(self) -> list[Any]: ...
    def items(self) -> Iterator[Item]: ...


class Input(NamedTuple):
    """Parts in order; `n_rows` of all of them, or None where only reading on can tell."""

    parts: Iterator[Part]
    n_rows: int | None


@dataclass(frozen=True)
class Clip:
    """A row whose clip is a file of its own, or a text-only one (`path` None)."""

    where: str
    values: Mapping[str, Any]
    path: str | None
    file_bytes: int = 0
    n_rows: int = 1

    @property
    def n_bytes(self) -> int:
        return self.file_bytes + 200  # the line

    @property
    def identity(self) -> list[Any]:
        return [dict(self.values), self.file_bytes]

    def items(self) -> Iterator[Item]:
        if self.path is None:
            yield Item(self.where, dict(self.values), None)
            return
        try:
            yield Item(self.where, dict(self.values), Path(self.path).read_bytes())
        except OSError as error:
            reason = f"{self.path}: cannot be read ({error.strerror or error})"
            yield Item(self.where, dict(self.values), b"", reason)


@dataclass(frozen=True)
class Recording:
    """A long recording, and the utterances that are cut out of it."""

    path: str
    segments: tuple[tuple[float, float, Mapping[str, Any]], ...]  # begin and end in seconds, and the line

    @property
    def n_rows(self) -> int:
        return len(self.segments)

    @property
    def n_bytes(self) -> int:
        return round(_CUT_BYTES * sum(end - begin for begin, end, _ in self.segments))

    @property
    def identity(self) -> list[Any]:
        return [[begin, end, dict(values)] for begin, end, values in self.segments]

    def items(self) -> Iterator[Item]:
        clips, problem = cut(self.path, [(begin, end) for begin, end, _ in self.segments]), None
        for _, _, values in self.segments:
            audio = b""
            if problem is None:
                try:
                    audio = next(clips)
                except AudioError as error:
                    problem = str(error)
            yield Item(f"{self.path}: {values['id']}", dict(values), audio, problem)


def find(path: str, *, subset: str | None = None, text_column: str | None = None) -> Input:
    """The rows of one input, whichever kind it is.

    Args:
        path: of a manifest, a LibriSpeech folder, a table of Common Voice, GigaSpeech.json, a parquet file, or a folder
            of parquet files.
        subset: of GigaSpeech, such as XS, S, M, L, XL, DEV or TEST. None: all.
        text_column: of parquet files. None: the first that has a usual name.

    Raises:
        UserError: there is no such input, or it is of no known kind; it is malformed; an argument is not for its kind.
    """
    given = Path(path)
    if not given.exists():
        raise UserError(f"{path}: no such file or folder: give {KINDS}")
    kind = _kind(given)
    if subset is not None and kind != "gigaspeech":
        raise UserError(f"{path}: --subset {subset} is for GigaSpeech only: leave it out")
    if text_column is not None and kind != "parquet":
        raise UserError(f"{path}: --text-column {text_column} is for parquet files only: leave it out")
    if kind == "librispeech":
        return _files(list(_librispeech(given)))
    if kind == "common_voice":
        return _files(list(_common_voice(given)))
    if kind == "gigaspeech":
        return Input(_gigaspeech(given / "GigaSpeech.json" if given.is_dir() else given, subset), None)
    if kind == "parquet":
        from aura_jax.data import parquet

        parts = [part for file in _parquet_files(given) for part in parquet.parts(file, text_column)]
        return Input(iter(parts), sum(part.n_rows for part in parts))
    return _files([Clip(row.where, _values(row), row.audio) for row in load_manifest(given)])


def _kind(path: Path) -> str:
    if path.is_file():
        kinds = {".tsv": "common_voice", ".json": "gigaspeech", ".parquet": "parquet"}
        return kinds.get(path.suffix.lower(), "manifest")
    if (path / shards.INDEX).exists():
        raise UserError(f"{path}: shards already: give what they were packed from, or copy the folder")
    if (path / "GigaSpeech.json").exists():
        return "gigaspeech"
    if next(path.rglob("*.trans.txt"), None):
        return "librispeech"
    if next(iter(_parquet_files(path)), None):
        return "parquet"
    if tables := sorted(table.name for table in path.glob("*.tsv")):
        raise UserError(f"{path}: a folder with {', '.join(tables)}: name one of these tables")
    raise UserError(f"{path}: nothing in it that can be packed: give {KINDS}")


def _parquet_files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(path.rglob("*.parquet"))


def _files(clips: list[Clip]) -> Input:
    """The clips, with the sizes of their files."""

    def size(clip: Clip) -> Clip:
        try:
            n_bytes = Path(clip.path).stat().st_size if clip.path is not None else 0
        except OSError:
            n_bytes = 0  # reading it says what is wrong
        return Clip(clip.where, clip.values, clip.path, n_bytes)

    def sized() -> Iterator[Clip]:
        with ThreadPoolExecutor(_STAT_THREADS) as pool:
            waiting = iter(clips)
            while some := list(islice(waiting, _STAT_AT_ONCE)):
                yield from pool.map(size, some)

    return Input(sized(), len(clips))


def _values(row: Row) -> dict[str, Any]:
    known = {key: getattr(row, key) for key in ("id", "text", "prompt", "response", "seconds")}
    known |= {"history": list(row.history) or None, "ended": None if row.ended else False}
    return {key: value for key, value in known.items() if value is not None} | dict(row.extra)


def _librispeech(folder: Path) -> Iterator[Clip]:
    for transcripts in sorted(folder.rglob("*.trans.txt")):
        for number, line in enumerate(_lines(transcripts), 1):
            name, _, text = line.strip().partition(" ")
            if not name:
                continue
            where = f"{transcripts}:{number}"
            if not text:
                raise UserError(f"{where}: {name!r} and no text: give 'ID TEXT' a line")
            values = {"id": name, "text": text.strip(), "speaker": name.partition("-")[0]}
            yield Clip(where, values, str(transcripts.parent / f"{name}.flac"))


def _common_voice(table: Path) -> Iterator[Clip]:
    reader = csv.DictReader(_lines(table), delimiter="\t", quoting=csv.QUOTE_NONE)
    for key in ("path", "sentence"):
        if key not in (reader.fieldnames or ()):
            raise UserError(f"{table}: no column {key!r}: give a table of Common Voice, such as train.tsv")
    for number, row in enumerate(reader, 2):
        where = f"{table}:{number}"
        if not row["path"] or row["sentence"] is None:
            raise UserError(f"{where}: fewer columns than the first line names: give a whole table")
        clip = table.parent / "clips" / row["path"]
        rest = {k: v for k, v in row.items() if k and v and k not in ("path", "sentence", "client_id")}
        values = {"id": row["path"], "text": row["sentence"], "speaker": row.get("client_id") or "", **rest}
        yield Clip(where, values, str(clip if clip.suffix else clip.with_suffix(".mp3")))


def _gigaspeech(path: Path, subset: str | None) -> Iterator[Recording]:
    """The recordings that have segments in the subset; punctuation tags become marks, and noise is left out."""
    seen: set[str] = set()
    found = False
    for recording in _json_objects(path, "audios"):
        try:
            segments = []
            for segment in recording["segments"]:
                subsets = {name.strip("{}") for name in segment["subsets"]}
                seen |= subsets
                if (subset is None or subset in subsets) and not _NO_SPEECH.fullmatch(segment["text_tn"]):
                    values = {
                        "id": segment["sid"],
                        "text": _punctuated(segment["text_tn"]),
                        "recording": recording["aid"],
                    }
                    segments.append((float(segment["begin_time"]), float(segment["end_time"]), values))
            segments.sort(key=lambda segment: segment[:2])
            if segments:
                found = True
                yield Recording(str(path.parent / recording["path"]), tuple(segments))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{path}: recording {recording.get('aid')}: no GigaSpeech metadata ({type(error).__name__}: {error}): "
                f"give {KINDS}"
            ) from None
    if not found:
        reason = f"no subset {subset}: {nearest(subset, seen)}" if subset and seen else f"no recordings: give {KINDS}"
        raise UserError(f"{path}: {reason}")


def _punctuated(text: str) -> str:
    for tag, mark in _PUNCTUATION.items():
        text = text.replace(f" {tag}", mark).replace(tag, mark)
    return text.strip()


def _json_objects(path: Path, key: str) -> Iterator[dict[str, Any]]:
    """Yields the objects of the list at `key` of a JSON file, one at a time: GigaSpeech's has gigabytes."""
    decoder, held = json.JSONDecoder(), ""
    try:
        with open(path, encoding="utf-8") as file:
            start = re.compile(rf'"{key}"\s*:\s*\[')
            while not (match := start.search(held)):
                if not (more := file.read(_CHUNK)):
                    raise UserError(f"{path}: no list {key!r}: give {KINDS}")
                held = held[-100:] + more
            held = held[match.end() :]
            while True:
                held = held.lstrip(", \t\r\n")
                if held.startswith("]"):
                    return
                try:
                    value, end = decoder.raw_decode(held)
                except json.JSONDecodeError as error:
                    if not (more := file.read(max(_CHUNK, len(held)))):
                        raise UserError(
                            f"{path}: ends within {key!r}, or not JSON ({error.msg}): download it again"
                        ) from None
                    held += more
                    continue
                yield value
                held = held[end:]
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8: download it again") from None


def _lines(path: Path) -> list[str]:
    try:
        # By newlines only: other ends of a line may stand inside of a text.
        return [line.removesuffix("\r") for line in path.read_text(encoding="utf-8").removesuffix("\n").split("\n")]
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8: save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): check its permissions") from None


def chain(inputs: Iterable[Input]) -> Input:
    """Several inputs, one after the other."""
    inputs = list(inputs)
    counts = [one.n_rows for one in inputs]
    return Input((part for one in inputs for part in one.parts), None if None in counts else sum(filter(None, counts)))
