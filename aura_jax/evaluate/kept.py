"""What an evaluation has finished, kept in its workdir: one that was interrupted goes on where it was."""

import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from aura_jax import __version__, hosts
from aura_jax.audio.io import stamp
from aura_jax.data.manifest import Row

_FOLDER = "evaluation"  # of the workdir: a file for each part


class Kept:
    """The finished parts of one evaluation, each a file in `workdir`/evaluation until all are finished.

    A file is named after all that its part depends on: results of other weights, settings or data are never found.

    Attributes:
      seconds: that the parts took which were not made anew.
    """

    def __init__(self, workdir: Path, what: Any):
        """
        Args:
          what: all that every part depends on (JSON): the weights, the settings.
        """
        self.seconds = 0.0
        self._folder, self._what = workdir / _FOLDER, [__version__, what]
        self._files: list[Path] = []
        self._told = False

    def part(self, name: Sequence[str], of: Any, make: Callable[[], Any]) -> Any:
        """Returns the value (JSON) of a part: the one that was kept, or else what `make` returns, which is kept.

        Args:
          name: of the part.
          of: all that this part depends on besides (JSON): its data.
        """
        text = json.dumps([self._what, list(name), of], sort_keys=True)
        path = self._folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
        self._files.append(path)
        found = hosts.on_first(lambda: _read(path))
        if found is not None:
            self.seconds += found["seconds"]
            return found["value"]
        clock = time.perf_counter()
        value = make()
        if hosts.is_first():
            self._write(path, {"name": list(name), "seconds": time.perf_counter() - clock, "value": value})
        return value

    def _write(self, path: Path, part: dict[str, Any]) -> None:
        partial = path.with_suffix(".partial")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(part))
            partial.replace(path)
        except OSError as error:  # the scores are worth having without it
            if not self._told:
                print(f"{path} cannot be written ({error.strerror}): nothing is kept to go on from", file=sys.stderr)
            self._told = True

    def finish(self) -> None:
        """Deletes the parts: the results are where they belong."""
        if not hosts.is_first() or not self._folder.is_dir():
            return
        for path in self._files:
            path.unlink(missing_ok=True)
        if not any(self._folder.iterdir()):
            self._folder.rmdir()


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def identity(rows: Iterable[Row]) -> str:
    """Returns what differs if a row of a manifest, or the size or time of change of a clip, does."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([dataclasses.asdict(row), _stamp(row)], sort_keys=True).encode())
    return digest.hexdigest()


def identity_of_file(path: str | Path) -> str:
    """Returns what differs if a file's contents do."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _stamp(row: Row) -> list[int]:
    try:
        return [] if row.audio is None else list(stamp(row.audio))
    except OSError:
        return []  # reading it will say what is wrong
