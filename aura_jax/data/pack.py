"""Packs speech into shards: several processes, one shard each at a time, and none of it held in memory but a clip.

What is in which shard depends on the input and the size of a shard alone. A shard is written beside its place and
moved there when it is whole; a note of it follows (`shard-0000000.json`). The index takes the notes in when all are
there. A second call reads them, and writes what is missing.
"""

import errno
import hashlib
import io
import json
import os
import re
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, as_completed, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import chain
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import NamedTuple

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from tqdm import tqdm

from aura_jax.audio import records
from aura_jax.audio.io import AudioError, audio_seconds
from aura_jax.data import layouts, shards
from aura_jax.data.manifest import parse_row
from aura_jax.data.shards import Shard
from aura_jax.errors import UserError
from aura_jax.storage import Folder

# One record a group, so that one can be read alone; compression would gain little on audio. The shard's bytes must not
# depend on the machine, and they hold these options.
_OPTIONS = "group_size:1,uncompressed,max_parallelism:1"
_NOTE = re.compile(r"shard-\d+\.json")
_IN_FLIGHT = 2  # shards a process that are planned ahead


@dataclass
class Report:
    """What was packed.

    Attributes:
        n_shards, n_kept: all, and those of them that an earlier call had written.
        n_rows, seconds: of all shards.
        problems: clips of the newly written shards that cannot be read, a line each; training will leave them out.
    """

    n_shards: int = 0
    n_kept: int = 0
    n_rows: int = 0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)

    @property
    def summary(self) -> str:
        """The report in one line."""
        kept = f" ({self.n_kept} of them were there)" if self.n_kept else ""
        text = f"{self.n_shards} shards{kept}, {self.n_rows} rows, {self.seconds / 3600:.2f} hours"
        return f"{text}, {len(self.problems)} clips cannot be read" if self.problems else text


class _Job(NamedTuple):
    """A shard to be written."""

    name: str
    output: str
    input: str
    parts: Sequence[layouts.Part]


def pack(
    inputs: Iterable[str],
    output: str,
    *,
    subset: str | None = None,
    text_column: str | None = None,
    shard_bytes: int = 256 << 20,
    n_processes: int = 1,
    progress: bool = True,
) -> Report:
    """Writes the shards of the inputs' rows, in order, and their index.

    Args:
        inputs, subset, text_column: as of `layouts.find`; several inputs follow each other.
        output: a folder, or an address that fsspec knows, such as gs://bucket/folder.
        shard_bytes: a shard is closed when its clips have so many.
        n_processes: that write shards; 1: this one.
        progress: show a progress bar on standard error.

    Raises:
        UserError: as `layouts.find`; the folder holds shards of other input, or cannot be written; a process died.
    """
    folder, report = Folder(output), Report()
    source = layouts.chain(layouts.find(path, subset=subset, text_column=text_column) for path in inputs)
    known, sizes = _known(folder)
    finished: dict[str, Shard] = {}

    with tqdm(total=source.n_rows, desc=output, unit="row", disable=not progress) as bar:

        def finish(shard: Shard) -> None:
            finished[shard.name] = shard
            bar.update(shard.records)

        def missing() -> Iterator[_Job]:
            for job in _jobs(source.parts, folder.path, shard_bytes):
                old = known.get(job.name)
                if old is not None and old.input != job.input:
                    raise _other_input(folder, job.name)
                if old is not None and sizes.get(old.file) == old.bytes and old.lines_file in sizes:
                    report.n_kept += 1
                    finish(old)
                else:
                    yield job

        for shard, problems in _written(missing(), n_processes):
            report.problems += problems
            finish(shard)
    if not finished:
        raise UserError(f"{', '.join(inputs)}: no rows: nothing to pack")
    if surplus := sorted(known.keys() - finished.keys()):
        raise _other_input(folder, surplus[0])
    _write_index(folder, [finished[name] for name in sorted(finished)])
    report.n_shards = len(finished)
    report.n_rows = sum(shard.records for shard in finished.values())
    report.seconds = sum(shard.seconds for shard in finished.values())
    return report


def _jobs(parts: Iterator[layouts.Part], output: str, shard_bytes: int) -> Iterator[_Job]:
    number, n_bytes, some = 0, 0, []
    for part in parts:
        if some and n_bytes + part.n_bytes > shard_bytes:
            yield _job(number, output, some)
            number, n_bytes, some = number + 1, 0, []
        some.append(part)
        n_bytes += part.n_bytes
    if some:
        yield _job(number, output, some)


def _job(number: int, output: str, parts: Sequence[layouts.Part]) -> _Job:
    # In the order of their numbers by name too, up to ten million shards.
    identity = json.dumps([shards.VERSION, [part.identity for part in parts]])
    return _Job(f"shard-{number:07d}", output, hashlib.sha256(identity.encode()).hexdigest(), parts)


def _known(folder: Folder) -> tuple[dict[str, Shard], dict[str, int]]:
    """The shards that earlier calls wrote, by name, and the sizes of the folder's files."""
    sizes, known = folder.sizes(), {}
    if shards.INDEX in sizes:
        known = {shard.name: shard for shard in shards.read_index(folder)}
    for name in sizes:
        if _NOTE.fullmatch(name):
            try:
                shard = Shard(**json.loads(folder.read(name)))
            except (ValueError, TypeError):
                raise UserError(f"{folder.join(name)}: damaged: delete it, and its shard will be packed anew") from None
            known[shard.name] = shard
    return known, sizes


def _other_input(folder: Folder, name: str) -> UserError:
    return UserError(
        f"{folder.join(name)}: packed from other input, or with another --shard-size: "
        "name a new folder, or empty this one"
    )


def _written(jobs: Iterator[_Job], n_processes: int) -> Iterator[tuple[Shard, list[str]]]:
    """Yields each shard when it is written, in any order."""
    if n_processes == 1:
        yield from map(_write_shard, jobs)
        return
    with ProcessPoolExecutor(n_processes, get_context("spawn"), _start_process) as pool:
        waiting: set[Future[tuple[Shard, list[str]]]] = set()
        try:
            for job in jobs:
                waiting.add(pool.submit(_write_shard, job))
                if len(waiting) == n_processes * _IN_FLIGHT:
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            for future in as_completed(waiting):
                yield future.result()
        except BrokenProcessPool:
            raise UserError(
                "a process that packed was killed, perhaps for want of memory: run the same command again, "
                "which goes on, with fewer --processes"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _start_process() -> None:
    # Ctrl-C is for the process that waits: the shards at work are finished.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Nothing else ends a process whose parent was killed, and the next call would meet it in the same files.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _write_shard(job: _Job) -> tuple[Shard, list[str]]:
    """Writes a shard, its lines and the note of it, in this order; returns the note, and what cannot be read."""
    folder, problems = Folder(job.output), []
    shard = Shard(job.name, 0, 0, "", "", 0.0, job.input)
    lines_digest, n_rows, total = hashlib.sha256(), 0, 0.0
    try:
        with folder.new_file(shard.lines_file) as lines_path, folder.new_file(shard.file) as path:
            writer = ArrayRecordWriter(str(path), _OPTIONS)
            with open(lines_path, "wb") as lines:
                for item in chain.from_iterable(part.items() for part in job.parts):
                    values = item.values
                    if item.audio is not None:
                        seconds, problem = _measure(item)
                        address = records.address(shard.file, n_rows)
                        values = {"audio": address, **values, "header_seconds": seconds}
                        total += seconds
                        if problem:
                            problems.append(problem)
                    parse_row(dict(values), item.where, Path())  # what training would stumble over
                    line = json.dumps(values, ensure_ascii=False).encode()
                    lines.write(line + b"\n")
                    lines_digest.update(line + b"\n")
                    writer.write(records.record(line, item.audio or b""))
                    n_rows += 1
            writer.close()
            if ArrayRecordReader(str(path)).num_records() != n_rows:  # not every writer says when the disk is full
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            n_bytes = path.stat().st_size
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{folder.join(shard.file)}: cannot be written ({reason}): make room, or name another"
        ) from None
    shard = Shard(job.name, n_rows, n_bytes, digest, lines_digest.hexdigest(), round(total, 3), job.input)
    with folder.new_file(f"{job.name}.json") as path:
        path.write_text(json.dumps(shard._asdict()) + "\n")
    return shard, problems


class _Named(io.BytesIO):
    """A clip's bytes, with the name that errors shall use."""

    def __init__(self, data: bytes, name: str):
        super().__init__(data)
        self.name = name


def _measure(item: layouts.Item) -> tuple[float, str | None]:
    """Seconds by the clip's header, and what is wrong with it; 0 where it cannot be read."""
    if item.problem is not None:
        return 0.0, item.problem
    try:
        return audio_seconds(_Named(item.audio or b"", item.where)), None
    except AudioError as error:
        return 0.0, str(error)


def _write_index(folder: Folder, finished: Sequence[Shard]) -> None:
    """Writes the index, which ends the packing, and then removes the notes."""
    with folder.new_file(shards.INDEX) as path:
        path.write_text(shards.write_index(finished))
    for name in folder.sizes():
        if _NOTE.fullmatch(name):
            folder.remove(name)
