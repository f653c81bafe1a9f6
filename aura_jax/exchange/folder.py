"""A folder that appears whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from aura_jax.errors import UserError


def check_free(output: Path) -> None:
    """Raises UserError if there is something at `output` already."""
    if output.is_dir():
        if any(output.iterdir()):
            raise UserError(f"{output} exists and is not empty: name another --output")
    elif output.exists() or output.is_symlink():
        raise UserError(f"{output} is there, and not a folder: name another --output")


@contextlib.contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Yields a folder beside `output` that takes its name at the end; if anything fails, nothing of it stays.

    Raises:
      UserError: there is something at `output` already, or the disk refuses (it is full, for instance).
    """
    check_free(output)
    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        yield partial
        if output.is_dir():
            output.rmdir()
        partial.replace(output)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"{output}: cannot be written ({reason}): nothing was; make room or name another") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
