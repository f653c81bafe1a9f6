"""A manifest with a column that a model wrote: the work in parts, each of which goes on where it was stopped.

The rows that get an entry are dealt out to parts, each written by a process of its own:

    OUT.1-of-2.jsonl  what it is made of and by, then {"row", ...} for each entry; grows by a batch at a time
    OUT.2-of-2.jsonl
    OUT.jsonl         the manifest with the entries of all parts; written last, whole or not at all

An entry depends on its row alone, so that any number of parts gives the same manifest. What an entry is, and what
writes it, says a `Column`.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from tqdm import tqdm

from aura_jax.data.manifest import Row, manifest_lines, parse_row
from aura_jax.errors import UserError
from aura_jax.storage import Folder, is_remote


class Part(NamedTuple):
    """One of several parts, counted from 1."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Part":
        """Reads "I/N". Raises UserError if it is none."""
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise UserError(f"--shard {text!r}: write --shard I/N, with I from 1 to N, such as 1/4")
        return cls(int(match[1]), int(match[2]))

    def path(self, output: Path) -> Path:
        """Where the part lies, of a manifest that will be at `output`."""
        return output.with_name(f"{output.stem}.{self.index}-of-{self.count}{output.suffix}")


class Line(NamedTuple):
    """A line of the input: as it is, and as it was understood."""

    values: dict[str, Any]
    row: Row


class Entry(Protocol):
    """What is written for a row: a NamedTuple of what JSON can hold."""

    def _asdict(self) -> dict[str, Any]: ...


E = TypeVar("E", bound=Entry)


class Writer(NamedTuple, Generic[E]):
    """A model, loaded.

    Attributes:
      write: returns the entries of rows, by their places in the input.
      batch_size: rows that it takes at a time.
      weights: the fingerprint of its weights.
    """

    write: Callable[[Sequence[int]], Sequence[E]]
    batch_size: int
    weights: str


@dataclass(frozen=True)
class Column(Generic[E]):
    """What is to be written.

    Attributes:
      format: by which its parts are known.
      entry: the class of its entries.
      places: of the rows that get an entry, in the order of the input.
      making: what entries depend on, other than the input and the weights, and is known before anything is loaded.
      names: how an error calls the keys of `making`, and "weights".
      load: called once, if there is something to write.
      values: the keys that an entry adds to its row's line; None: the row is left out.
      order: sorts the places that one process writes.
    """

    format: str
    entry: Callable[..., E]
    places: Sequence[int]
    making: Mapping[str, Any]
    names: Mapping[str, str]
    load: Callable[[], Writer[E]]
    values: Callable[[E], Mapping[str, Any] | None]
    order: Callable[[int], Any] = lambda place: place

    def of(self, part: Part) -> Sequence[int]:
        """The places of a part."""
        return self.places[part.index - 1 :: part.count]


class Written(NamedTuple, Generic[E]):
    """What was written.

    Attributes:
      path: of the manifest, or of the part.
      entries: by the places of their rows.
      n_kept: of them, those that an earlier call had written.
      is_whole: whether it is the manifest.
    """

    path: Path
    entries: Mapping[int, E]
    n_kept: int
    is_whole: bool


class _There(NamedTuple, Generic[E]):
    """What a part's file holds: its first line, if it has one; its entries by row; the bytes of its whole lines."""

    head: dict[str, Any] | None
    entries: dict[int, E]
    n_bytes: int


def read(manifest: str, limit: int | None, *, untranscribed: bool = False) -> list[Line]:
    """Returns the lines of a manifest, or of a folder of shards; the first `limit`, unless that is None.

    Args:
      untranscribed: as of `parse_row`.

    Raises:
      UserError: as `manifest_lines` and `parse_row`; there are no lines; the limit is below 1.
    """
    if limit is not None and limit < 1:
        raise UserError(f"--limit must be at least 1, not {limit}")
    home, lines = Path(manifest).parent.absolute(), []
    for where, values in manifest_lines(manifest):
        lines.append(Line(values, parse_row(dict(values), where, home, untranscribed=untranscribed)))
        if len(lines) == limit:
            break
    if not lines:
        raise UserError(f"{manifest}: an empty manifest: give one JSON object a line")
    return lines


def write(
    manifest: str, output: Path, lines: Sequence[Line], column: Column[E], part: Part | None, progress: bool
) -> Written[E]:
    """Writes the manifest with a new column; paths of clips are made relative to the new manifest.

    Args:
      manifest: that `lines` are of.
      output: of the new manifest.
      part: write this part only. None: join the parts there are; if there are none, write all rows.
      progress: show a progress bar on standard error.

    Raises:
      UserError: a part was made of something else, or is not finished; `output` is there already without its parts, or
        is the manifest itself; whatever loading and writing raise.
    """
    if output.absolute() == Path(manifest).absolute():
        raise UserError(f"{output}: the manifest itself: name another --output")
    head, names = _head(lines, column), {"format": "format", "input": "input (MANIFEST or --limit)", **column.names}
    there = _counts(output)
    if output.exists() and not there:
        raise UserError(f"{output}: there already, and no part of it: name another --output, or remove it")
    count = part.count if part else max(there, default=1)
    if there - {count}:
        numbers = " and of ".join(map(str, sorted(there | {count})))
        raise UserError(f"{output}: parts of {numbers}: remove those that are not wanted, or name another --output")
    n_kept = 0
    if part is not None or count == 1:
        part = part or Part(1, 1)
        path = part.path(output)
        entries, n_kept = _write_part(path, column, column.of(part), head, names, progress)
        if count > 1:
            return Written(path, entries, n_kept, is_whole=False)
    entries = _entries(output, count, column, head, names)
    _join(manifest, output, lines, column, entries)
    return Written(output, entries, n_kept, is_whole=True)


def _head(lines: Sequence[Line], column: Column) -> dict[str, Any]:
    """Returns what entries depend on, as the first line of a part has it, but for the weights."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(json.dumps(line.values, sort_keys=True).encode() + b"\n")
    head = {"format": column.format, "input": f"{len(lines)} rows, {digest.hexdigest()[:16]}", **column.making}
    return json.loads(json.dumps(head))  # as it is read again: without tuples


def _counts(output: Path) -> set[int]:
    """Returns of how many parts those beside `output` are."""
    name = re.compile(rf"{re.escape(output.stem)}\.\d+-of-(\d+){re.escape(output.suffix)}")
    there = output.parent.iterdir() if output.parent.is_dir() else ()
    return {int(match[1]) for path in there if (match := name.fullmatch(path.name))}


def _read_part(path: Path, column: Column[E]) -> _There[E]:
    """Reads the whole lines of a part; what a killed process left of a line is not one of them."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return _There(None, {}, 0)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): mend that") from None
    whole = data[: data.rfind(b"\n") + 1]
    head, entries = None, {}
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            values = json.loads(line)
            if head is None:
                values["format"]  # of another format is no damage
                head = values
            else:
                place = values.pop("row")
                entries[place] = column.entry(**values)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{path}:{number}: damaged, or no part: remove the file to write the part anew") from None
    return _There(head, entries, len(whole))


def _check_same(path: Path, old: Mapping[str, Any], new: Mapping[str, Any], names: Mapping[str, str]) -> None:
    for name, value in new.items():
        if old.get(name) != value:
            raise UserError(
                f"{path}: written with another {names[name]} ({_shown(old.get(name))}, now {_shown(value)}): "
                "name another --output, or remove the parts"
            )


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 160 else f"{text[:160]}..."


def _write_part(
    path: Path,
    column: Column[E],
    places: Sequence[int],
    head: Mapping[str, Any],
    names: Mapping[str, str],
    progress: bool,
) -> tuple[Mapping[int, E], int]:
    """Writes what a part lacks; returns all its entries, and how many it had."""
    there = _read_part(path, column)
    if there.head is not None:
        _check_same(path, there.head, head, names)
    entries, n_kept = there.entries, len(there.entries)
    missing = sorted((place for place in places if place not in entries), key=column.order)
    if there.head is not None and not missing:
        return entries, n_kept
    writer = column.load()
    head = {**head, "weights": writer.weights}
    if there.head is not None:
        _check_same(path, there.head, head, names)
    bar = tqdm(total=len(places), initial=n_kept, desc=path.name, unit="row", disable=not progress)
    try:
        with bar, open(path, "ab") as file:
            file.truncate(there.n_bytes)
            if there.head is None:
                _append(file, [head])
            for start in range(0, len(missing), writer.batch_size):
                batch = missing[start : start + writer.batch_size]
                new = dict(zip(batch, writer.write(batch), strict=True))
                _append(file, [{"row": place, **entry._asdict()} for place, entry in new.items()])
                entries |= new
                bar.update(len(new))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}): mend that, and call again to go on") from error
    return entries, n_kept


def _append(file: Any, lines: Sequence[Mapping[str, Any]]) -> None:
    file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
    file.flush()
    os.fsync(file.fileno())


def _entries(
    output: Path, count: int, column: Column[E], head: Mapping[str, Any], names: Mapping[str, str]
) -> dict[int, E]:
    """Returns the entries of all parts.

    Raises:
      UserError: a part is missing, not finished, or made of something else.
    """
    entries: dict[int, E] = {}
    for part in (Part(index, count) for index in range(1, count + 1)):
        path, places = part.path(output), column.of(part)
        there = _read_part(path, column)
        if there.head is not None:
            _check_same(path, there.head, head, names)
            head = there.head  # with the weights, which all parts must share
        n_there = sum(place in there.entries for place in places)
        if there.head is None or n_there < len(places):
            raise UserError(
                f"{path}: {n_there} of {len(places)} rows: first finish it with --shard {part.index}/{count}"
            )
        entries |= {place: there.entries[place] for place in places}
    return entries


def _join(manifest: str, output: Path, lines: Sequence[Line], column: Column[E], entries: Mapping[int, E]) -> None:
    """Writes the new manifest."""
    home, there = Path(manifest).parent.absolute(), output.parent.absolute()
    with Folder(there).new_file(output.name) as path, open(path, "w", encoding="utf-8") as file:
        for place, (values, row) in enumerate(lines):
            new = column.values(entries[place]) if place in entries else {}
            if new is None:
                continue
            if row.audio is not None:
                values = {**values, "audio": _moved(values["audio"], home, there)}
            file.write(json.dumps({**values, **new}, ensure_ascii=False) + "\n")


def _moved(audio: str, home: Path, there: Path) -> str:
    """Returns a path relative to `home` as one relative to `there`; other paths and addresses as they are."""
    if home == there or is_remote(audio) or os.path.isabs(audio):
        return audio
    return os.path.relpath(home / audio, there)
