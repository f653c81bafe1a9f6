"""Folders of shards: what lies in them, and the checks that opening one makes.

    index.json                  what shards there are: counts, sizes and checksums; written last
    shard-0000000.array_record  one record a row: the row's line and the audio file's bytes (`audio.records`)
    shard-0000000.jsonl         the lines alone, a manifest whose 'audio' are addresses of records

Planning needs the lines, reading a clip its record: no shard is read from beginning to end.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from aura_jax.audio import records
from aura_jax.errors import UserError
from aura_jax.storage import Folder, is_remote

INDEX = "index.json"
VERSION = 1

_FORMAT = "aura-jax shards"
_THREADS = 16  # that open shards: in a bucket each is a few requests


class Shard(NamedTuple):
    """What the index says of a shard.

    Attributes:
        name: of its files, without what follows the dot.
        records, bytes, sha256: of the ArrayRecord file.
        lines_sha256: of the lines.
        seconds: of its clips, by their headers.
        input: digest of what it was packed from.
    """

    name: str
    records: int
    bytes: int
    sha256: str
    lines_sha256: str
    seconds: float
    input: str

    @property
    def file(self) -> str:
        return f"{self.name}{records.SUFFIX}"

    @property
    def lines_file(self) -> str:
        return f"{self.name}.jsonl"


def is_shards(path: str | Path) -> bool:
    """Whether a path is that of a folder of shards or of its index; anything else is a manifest's."""
    return is_remote(path) or Path(path).name == INDEX or Path(path).is_dir()


def write_index(shards: Sequence[Shard]) -> str:
    """The index of these shards."""
    head = {"format": _FORMAT, "version": VERSION, "rows": sum(s.records for s in shards)}
    return json.dumps({**head, "shards": [shard._asdict() for shard in shards]}, indent=1) + "\n"


def read_index(folder: Folder) -> list[Shard]:
    """The shards that the index of a folder names, in order.

    Raises:
        FileNotFoundError: there is no index.
        UserError: it is of another version, or damaged.
    """
    where = folder.join(INDEX)
    again = "pack again, into a new folder"
    try:
        index = json.loads(folder.read(INDEX))
    except ValueError:
        raise UserError(f"{where}: not JSON: {again}") from None
    if not isinstance(index, dict) or index.get("format") != _FORMAT:
        raise UserError(f"{where}: not an index of shards: name a folder that `aura-jax data pack` wrote")
    if index.get("version") != VERSION:
        raise UserError(f"{where}: version {index.get('version')}, and this aura-jax reads version {VERSION}: {again}")
    try:
        return [Shard(**shard) for shard in index["shards"]]
    except (KeyError, TypeError):
        raise UserError(f"{where}: damaged: {again}") from None


def open_shards(path: str | Path) -> tuple[Folder, list[Shard]]:
    """The folder and its shards, after the checks that cost little: each shard is there, with the size of the index.

    Args:
        path: of the folder, or of its index.

    Raises:
        UserError: there is no index, or one of another version; a shard is missing, or has another size.
    """
    text = str(path)
    folder = Folder(
        text.removesuffix(INDEX).rstrip("/") or "." if text.endswith(f"/{INDEX}") or text == INDEX else text
    )
    try:
        shards = read_index(folder)
    except FileNotFoundError:
        raise UserError(
            f"{path}: no {INDEX} in it: name a manifest, or a folder of shards that `aura-jax data pack` has finished"
        ) from None
    sizes = folder.sizes()
    for shard in shards:
        for name in (shard.file, shard.lines_file):
            if name not in sizes:
                raise UserError(
                    f"{folder.join(name)}: no such file, but {INDEX} names it: run the same `aura-jax data pack` again"
                )
        if sizes[shard.file] != shard.bytes:
            raise _truncated(folder, shard.file, f"{sizes[shard.file]} bytes, not the {shard.bytes} of {INDEX}")
    return folder, shards


def lines(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields ("folder/shard-0000000.jsonl:line", object) for each row of a folder of shards, in order.

    Raises:
        UserError: as `open_shards`; the lines of a shard are not those of the index, or as many as its records.
    """
    folder, shards = open_shards(path)

    def read(shard: Shard) -> bytes:
        data = folder.read(shard.lines_file)
        if hashlib.sha256(data).hexdigest() != shard.lines_sha256:
            raise _truncated(folder, shard.lines_file, f"not the lines that {INDEX} has the checksum of")
        # In a bucket this waits for the shard's end: there the first record that is read shows whether it is whole.
        if folder.is_local and (n := records.n_records(folder.join(shard.file))) != shard.records:
            raise _truncated(folder, shard.file, f"{n} records, not the {shard.records} of {INDEX}")
        return data

    with ThreadPoolExecutor(_THREADS) as pool:
        for shard, data in zip(shards, pool.map(read, shards), strict=True):
            # By newlines only: other ends of a line may stand inside of one.
            for number, line in enumerate(data.removesuffix(b"\n").split(b"\n"), 1):
                values = json.loads(line)
                if "audio" in values:
                    values["audio"] = folder.join(values["audio"])
                yield f"{folder.join(shard.lines_file)}:{number}", values


def damage(path: str | Path, *, progress: bool = True) -> list[str]:
    """Reads every shard of a folder whole, and says in a line each which differ from the checksum in the index.

    Raises:
        UserError: as `open_shards`.
    """
    folder, shards = open_shards(path)

    def check(shard: Shard) -> str | None:
        with folder.open(shard.file) as file:
            if hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256:
                return None
        return str(_truncated(folder, shard.file, f"not the checksum of {INDEX}"))

    with ThreadPoolExecutor(_THREADS) as pool:
        bar = tqdm(pool.map(check, shards), f"checksums of {path}", len(shards), unit="shard", disable=not progress)
        return [problem for problem in bar if problem]


def _truncated(folder: Folder, name: str, what: str) -> UserError:
    return UserError(f"{folder.join(name)}: {what}: copy it again, or delete it and run `aura-jax data pack` again")
