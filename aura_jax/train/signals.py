"""SIGINT and SIGTERM, noted rather than obeyed: the loop saves before it ends.

Among several hosts jax itself listens for SIGTERM, tells the others, and says after which step all of them stop.
"""

import os
import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils


class Signals:
    """While entered, a signal makes `stop` true; a second SIGINT interrupts at once."""

    def __init__(self):
        self.received = ""

    def __enter__(self) -> "Signals":
        # Only the main thread may set handlers; elsewhere (in a notebook's worker, say) signals stay as they are.
        if threading.current_thread() is threading.main_thread():
            heard = (signal.SIGINT,) if jax.process_count() > 1 else (signal.SIGINT, signal.SIGTERM)
            self._old = {s: signal.signal(s, self._note) for s in heard}
        else:
            self._old = {}
        return self

    def _note(self, number: int, frame: Any) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def stop(self, step: int) -> bool:
        """Whether the run stops after this step; to be asked at every step, on every host."""
        if jax.process_count() == 1:
            return bool(self.received)
        stops = multihost_utils.reached_preemption_sync_point(step)
        if stops and not self.received:
            self.received = "SIGTERM, here or on another host,"
        return stops

    def __exit__(self, *unused: Any) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
