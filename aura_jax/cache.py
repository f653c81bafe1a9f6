"""Where everything lies that can be made again: converted models, teacher states, compiled programs."""

import os
import sys
from pathlib import Path


def directory() -> Path:
    """Returns `$AURA_JAX_CACHE`, or `~/.cache/aura_jax`."""
    return Path(os.environ.get("AURA_JAX_CACHE") or Path.home() / ".cache" / "aura_jax").expanduser()


def keep_compiled_programs() -> None:
    """Has jax keep compiled programs: what resumes, evaluates or runs again need not compile for a minute.

    jax reads the variable when it is imported: too late, this does nothing. `$JAX_COMPILATION_CACHE_DIR` goes first.
    """
    if "jax" not in sys.modules:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(directory() / "compiled"))
