"""Clips inside ArrayRecord shards: an address "SHARD#NUMBER" stands where the path of an audio file does.

A record is one line of JSON, which says what belongs to the clip, then the bytes of the audio file as they were found.
A shard finds records by their number, and nothing else of it is read. ArrayRecord does so in Google's buckets too
(gs://); shards in other buckets are fetched whole, once, to the cache.
"""

import functools
import hashlib
import os
import re
import threading

from array_record.python.array_record_module import ArrayRecordReader

from aura_jax import cache
from aura_jax.errors import UserError
from aura_jax.storage import Folder, is_remote

SUFFIX = ".array_record"

_ADDRESS = re.compile(rf"(.+{re.escape(SUFFIX)})#(\d+)")
_RANDOM_ACCESS = "readahead_buffer_size:0,max_parallelism:0"
_BUFFER = 32 << 10  # bytes; the default of 1 MiB would read 20 clips for one
_OPEN_SHARDS = 512  # at once, each a file descriptor

_fetching = threading.Lock()


class RecordError(Exception):
    """A record is damaged, and others of its shard may be sound."""


def address(shard: str, number: int) -> str:
    """What stands for record `number` of a shard in a manifest."""
    return f"{shard}#{number}"


def split(source: str) -> tuple[str, int] | None:
    """The shard and the number of an address; None for the path of a file."""
    match = _ADDRESS.fullmatch(source)
    return (match[1], int(match[2])) if match else None


def record(line: bytes, audio: bytes) -> bytes:
    """The record of a clip: `line` is JSON without a newline."""
    return b"%b\n%b" % (line, audio)


def read(source: str) -> tuple[bytes, bytes]:
    """Returns the line and the audio of the record at an address.

    Raises:
        RecordError: its checksum differs.
        UserError: the shard is missing or damaged, or has no such record.
    """
    found = split(source)
    assert found is not None
    shard, number = found
    reader = _open(shard)
    if number >= reader.num_records():
        raise UserError(
            f"{shard}: {reader.num_records()} records, and number {number} is not among them: mend the number"
        )
    try:
        data = reader.read([number])[0]
    except RuntimeError as error:
        raise RecordError(str(error).splitlines()[0]) from None
    end = data.find(b"\n")
    return data[:end], data[end + 1 :]


def n_records(shard: str) -> int:
    """The records of a shard. Raises UserError: there is no such shard, or its end is missing."""
    return _open(shard).num_records()


def local_file(shard: str) -> str:
    """What a reader opens: the path of the shard, or of its copy in the cache, which is fetched where it is missing."""
    if not is_remote(shard) or shard.startswith("gs://"):
        return shard
    parent, _, name = shard.rpartition("/")
    folder = Folder(parent)
    try:
        version = hashlib.sha256(f"{shard} {folder.version(name)}".encode()).hexdigest()[:16]
        copy = cache.directory() / "shards" / version / name
        with _fetching:
            if not copy.exists():
                folder.fetch(name, copy)
    except FileNotFoundError:
        raise _missing(shard) from None
    return str(copy)


def _open(shard: str) -> ArrayRecordReader:
    if is_remote(shard):
        return _reader(shard, None)
    try:
        status = os.stat(shard)
    except OSError:
        raise _missing(shard) from None
    return _reader(shard, (status.st_size, status.st_mtime_ns))  # a shard that was written anew has another reader


@functools.lru_cache(_OPEN_SHARDS)
def _reader(shard: str, stamp: tuple[int, int] | None) -> ArrayRecordReader:
    reader = ArrayRecordReader(local_file(shard), _RANDOM_ACCESS, file_reader_buffer_size=_BUFFER)
    # A missing or truncated file is no error to the reader: it has no records.
    if not reader.num_records():
        raise UserError(f"{shard}: not a whole shard: delete it, and run `aura-jax data pack` again")
    return reader


def _missing(shard: str) -> UserError:
    return UserError(f"{shard}: no such shard: run `aura-jax data pack` again, or copy it there")
