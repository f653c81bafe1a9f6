"""Runs of several processes, each a host with CPU devices of its own."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from aura_jax.hosts import VARIABLES

ROOT = Path(__file__).parents[2]
_SECONDS = 400  # a run that takes longer hangs


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    errors: str


def _environment(devices: int) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    variables = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "NO_COLOR": "1", "PATH": path}
    return os.environ | variables


@pytest.fixture
def run() -> Callable[..., Ended]:
    """Returns run(command, devices of a process, when): `when()` true, it gets SIGTERM."""

    def run(command: Sequence[str], devices: int, when: Callable[[], bool] | None = None) -> Ended:
        process = subprocess.Popen(
            command, cwd=ROOT, env=_environment(devices), stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        try:
            deadline = time.monotonic() + _SECONDS
            while when is not None and process.poll() is None and not when() and time.monotonic() < deadline:
                time.sleep(0.05)
            if when is not None:
                process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=_SECONDS)
        finally:
            process.kill()
        return Ended(process.returncode, errors)

    return run


@pytest.fixture
def hosts_of() -> Callable[[int], list[str]]:
    """Returns the start of the command that trains on so many hosts."""
    one = [sys.executable, "-m", "aura_jax.cli", "train"]
    return lambda n: one if n == 1 else [str(ROOT / "launch" / "local.sh"), str(n)]


def records(workdir: Path) -> dict[int, dict]:
    """Returns {step: what metrics.jsonl says of it} of the steps that were taken."""
    path = workdir / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return {line["step"]: line for line in lines if "loss" in line}


@pytest.fixture
def hosts_run() -> Callable[..., list[tuple[int, str, str]]]:
    """Returns run(program, *arguments) on two hosts: the exit code, output and errors of each."""

    def run(program: str, *arguments: str) -> list[tuple[int, str, str]]:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        processes = []
        for host in ("0", "1"):
            place = dict(zip(VARIABLES, (f"localhost:{port}", "2", host), strict=True))
            command = [sys.executable, "-c", program, *arguments]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            processes.append(subprocess.Popen(command, cwd=ROOT, env=_environment(1) | place, text=True, **pipes))
        # Host 0 last: it serves the others, and must stay until they are gone.
        ended = []
        for process in reversed(processes):
            out, errors = process.communicate(timeout=_SECONDS)
            ended.append((process.returncode, out, errors))
        return ended[::-1]

    return run
