"""What must be set before anything is imported."""

import os
import tempfile

# transformers copies the code of an export to a cache before it imports it, and two processes may not share one.
_modules = tempfile.TemporaryDirectory()
os.environ["HF_MODULES_CACHE"] = _modules.name

# Many tests compile the same programs. The workers of pytest-xdist inherit the variable, and so do the processes that
# tests start; a fresh directory, so that no test passes by what an earlier version compiled.
_compiled = tempfile.TemporaryDirectory()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _compiled.name)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

# Tests compile more than they run: programs that are compiled in half the time, and are slower, end sooner.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_EXEC_TIME_OPTIMIZATION_EFFORT", "-1.0")
os.environ.setdefault("JAX_MEMORY_FITTING_EFFORT", "-1.0")
