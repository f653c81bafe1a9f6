"""How a benchmark speaks with its workers: one process an arm, a JSON object a line in each direction.

Imports nothing heavy: the worker in torch is timed from its start, and without jax.
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class WorkerFailed(Exception):
    """What a worker says went wrong; or the end of its log, if it died."""


class Worker:
    """One arm's process. `ask` waits for the answer, so that only one arm computes at a time.

    Args:
      environment: added to that of this process.
      log: where its standard error goes.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path):
        self._log = log
        with log.open("w") as file:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                # Several hold models at once: jax would take three quarters of a GPU for the first.
                env={"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ, **environment},
                text=True,
            )

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Sends a request and returns the answer.

        Raises:
          WorkerFailed: it failed, or is dead.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # what it said before it died is worth more
        line = self._process.stdout.readline()
        if not line:
            raise WorkerFailed("died: " + " ".join(self._log.read_text(errors="replace").split())[-2000:])
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerFailed(answer["error"])
        return answer

    def close(self) -> None:
        """Ends the process: at the end of its input, or else by force."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def serve(arm: Any) -> None:
    """Answers requests {"do": NAME, ...} with what the method NAME of `arm` returns, until the input ends.

    Three requests are answered here: `ready` with nothing, once the imports are done; `watch` starts a new measurement
    of the peak of resident memory, and `peak` returns {"since_watch": bytes, "of_life": bytes}, None where the system
    does not tell.
    """
    memory = _Memory()
    own = {"ready": dict, "watch": memory.watch, "peak": memory.peak}
    # Libraries write to standard output as they like: only answers may go there.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        do = request.pop("do")
        try:
            answer = own[do]() if do in own else getattr(arm, do)(**request)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:2000]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


class _Memory:
    """Peaks of this process's resident memory, as Linux counts them."""

    def __init__(self):
        self._before = 0

    def watch(self) -> dict[str, Any]:
        if (peak := _high_water()) is not None:
            self._before = max(self._before, peak)
            # What compiling and loading freed, and the allocator kept, is no part of the steps.
            gc.collect()
            trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
            if trim is not None:
                trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        return {}

    def peak(self) -> dict[str, Any]:
        peak = _high_water()
        return {"since_watch": peak, "of_life": None if peak is None else max(peak, self._before)}


def _high_water() -> int | None:
    """Returns VmHWM in bytes."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)
