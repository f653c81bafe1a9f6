"""Folders that lie on this machine or in a bucket, through fsspec."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from aura_jax.errors import UserError


def is_remote(path: str | Path) -> bool:
    """Whether a path is an address such as gs://bucket/folder."""
    return "://" in str(path)


class Folder:
    """A folder by its path, or by an address that fsspec knows: gs://, s3://, file://, memory://, ...

    Attributes:
        path: what names of files are joined to: an absolute path, or the address.
        is_local: whether it lies on this machine.

    Raises:
        UserError: no such kind of address, or the package that reads it is missing.
    """

    def __init__(self, path: str | Path):
        try:
            self._files, self._root = fsspec.core.url_to_fs(str(path))
        except (ImportError, ValueError) as error:
            raise UserError(f"{path}: {error}: give another path, or install what reads it") from None
        self.is_local = isinstance(self._files, LocalFileSystem)
        self.path = self._root if self.is_local else str(path).rstrip("/")
        self._root = self._root.rstrip("/")

    def join(self, name: str) -> str:
        """The path or address of a file in it."""
        return f"{self.path}/{name}"

    def read(self, name: str) -> bytes:
        """A file's bytes. Raises FileNotFoundError, or UserError where it cannot be read."""
        with self._errors(name):
            return self._files.cat_file(f"{self._root}/{name}")

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[Any]:
        """Opens a file for reading."""
        with self._errors(name), self._files.open(f"{self._root}/{name}", "rb") as file:
            yield file

    def sizes(self) -> dict[str, int]:
        """The bytes of each file in it, by name; empty where there is no such folder."""
        with self._errors():
            try:
                # What a bucket listed before may have changed since.
                self._files.invalidate_cache()
                entries = self._files.ls(self._root, detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return {}
        return {entry["name"].rpartition("/")[2]: entry["size"] for entry in entries if entry["type"] == "file"}

    @contextlib.contextmanager
    def new_file(self, name: str) -> Iterator[Path]:
        """Yields a local path to write; after the `with`, the file is in the folder, whole; after an error, it is not.

        A killed process leaves ".NAME.partial" in a local folder, which the next attempt writes over.
        """
        if self.is_local:
            partial = Path(self._root) / f".{name}.partial"
            with self._errors(name):
                partial.parent.mkdir(parents=True, exist_ok=True)
                partial.unlink(missing_ok=True)
            try:
                yield partial
                os.replace(partial, Path(self._root) / name)
            finally:
                partial.unlink(missing_ok=True)
            return
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch) / name
            with self._errors(name):
                self._files.put_file(str(Path(scratch) / name), f"{self._root}/{name}")

    def fetch(self, name: str, path: Path) -> None:
        """Copies a file to a local path, whole or not at all."""
        with self._errors(name):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.{os.getpid()}")
            self._files.get_file(f"{self._root}/{name}", str(partial))
            partial.replace(path)

    def version(self, name: str) -> str:
        """Changes when the file does."""
        with self._errors(name):
            return self._files.ukey(f"{self._root}/{name}")

    def remove(self, name: str) -> None:
        """Deletes a file."""
        with self._errors(name):
            self._files.rm_file(f"{self._root}/{name}")

    @contextlib.contextmanager
    def _errors(self, name: str = "") -> Iterator[None]:
        """Turns what a file system reports into one line; a missing file stays a FileNotFoundError."""
        try:
            yield
        except (FileNotFoundError, UserError):
            raise
        except Exception as error:
            if self.is_local and not isinstance(error, OSError):
                raise
            # Each bucket's package has errors of its own, for credentials, permissions and the network.
            reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}".splitlines()[0]
            raise UserError(f"{self.join(name) if name else self.path}: {reason}: check the path and access") from None
