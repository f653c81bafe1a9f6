"""SIGINT and SIGTERM, noted rather than obeyed: the loop saves before it ends.

Among several hosts each notes its own; all of them stop at the same step, because each asks all at every step.
"""

import signal
import threading
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from aura_jax import sharding


class Signals:
    """While entered, a signal makes `stop` true, from then on; a second SIGINT interrupts at once."""

    def __init__(self, mesh: Mesh):
        self.received = ""
        self._rows = sharding.batch_sharding(mesh)
        self._n_blocks = len(sharding.part_of_host(mesh, jax.process_index()).blocks)
        self._any = jax.jit(lambda flag_N: flag_N.max(), out_shardings=sharding.replicated(mesh))
        self._asked: jax.Array | None = None

    def __enter__(self) -> "Signals":
        # Only the main thread may set handlers; elsewhere (in a notebook's worker, say) signals stay as they are. Among
        # several hosts jax catches SIGTERM, too, from the moment they join: this handler takes its place.
        if threading.current_thread() is threading.main_thread():
            self._old = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        else:
            self._old = {}
        return self

    def _note(self, number: int, frame: Any) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name

    def stop(self) -> bool:
        """Whether the run is to stop; to be asked after every step, on every host.

        Among several hosts the answer is that to the question of the step before: nobody waits for another.
        """
        if jax.process_count() == 1:
            return bool(self.received)
        flag_N = np.full(self._n_blocks, bool(self.received), np.int32)
        asked, self._asked = self._asked, self._any(jax.make_array_from_process_local_data(self._rows, flag_N))
        if asked is None or not int(asked):
            return False
        self.received = self.received or "a signal at another host was"
        return True

    def __exit__(self, *unused: Any) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
