"""SIGINT and SIGTERM, noted rather than obeyed: the loop saves before it ends."""

import signal
import threading
from typing import Any


class Signals:
    """While entered, `received` names the first signal; a second SIGINT interrupts at once."""

    def __init__(self):
        self.received = ""

    def __enter__(self) -> "Signals":
        # Only the main thread may set handlers; elsewhere (in a notebook's worker, say) signals stay as they are.
        if threading.current_thread() is threading.main_thread():
            self._old = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        else:
            self._old = {}
        return self

    def _note(self, number: int, frame: Any) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name

    def __exit__(self, *unused: Any) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
