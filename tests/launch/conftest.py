"""Launchers without training: commands of a few lines of bash stand in for aura-jax, srun, gcloud and docker."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
_PATIENCE = 60.0  # seconds, of a test that waits for what takes a fraction of one


def until(happened: Callable[[], object]) -> None:
    """Waits until `happened` returns something true."""
    deadline = time.monotonic() + _PATIENCE
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    """Whether a process is there that has not ended; a zombie has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


class Stage:
    """A folder with stand-ins for commands, first on PATH; they run there and write what happened to files."""

    def __init__(self, folder: Path):
        self.folder, self._bin, self._started = folder, folder / "bin", []
        self._bin.mkdir()
        self.environment = {"PATH": f"{self._bin}:{os.environ['PATH']}", "TMPDIR": str(folder), "STAGE": str(folder)}

    def command(self, name: str, body: str) -> None:
        """Puts a command on PATH. `next FILE` in its body takes the first line off a file."""
        path = self._bin / name
        helper = 'next() { head -n 1 "$STAGE/$1"; sed -i 1d "$STAGE/$1"; }\n'
        path.write_text(f"#!/usr/bin/env bash\ncd $STAGE || exit\n{helper}{body}\n")
        path.chmod(0o755)

    def lines(self, name: str) -> list[str]:
        """Returns the lines of a file that stand-ins wrote, none if there is none."""
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []

    def write(self, name: str, *lines: str) -> None:
        """Writes a file for stand-ins to read."""
        (self.folder / name).write_text("".join(f"{line}\n" for line in lines))

    def start(self, script: str, *arguments: str, **variables: str) -> subprocess.Popen:
        """Starts one of launch/ in a process group of its own."""
        environment = self.environment | variables
        # What starts the tests may have them ignore it; a child would inherit that, and no shell can undo it.
        if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        process = subprocess.Popen(
            ["bash", str(LAUNCH / script), *arguments],
            cwd=LAUNCH.parent,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._started.append(process)
        return process

    def run(self, script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
        """Runs one of launch/ to its end."""
        process = self.start(script, *arguments, **variables)
        out, err = process.communicate(timeout=_PATIENCE)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def end(self) -> None:
        """Kills what a failed test left."""
        for process in self._started:
            if process.poll() is None:
                process.kill()
                process.wait()


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    stage = Stage(tmp_path)
    yield stage
    stage.end()
