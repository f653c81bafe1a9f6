"""What is said of the machine."""

import os
import subprocess
import sys

import jax
import numpy as np

from aura_jax import machine


def test_the_environment_names_machine_devices_and_versions():
    found = machine.environment()
    assert f"{len(os.sched_getaffinity(0))} cores" in found["machine"]
    assert found["devices"] == f"{jax.device_count()} x cpu" and found["hosts"] == 1
    assert found["jax"] == jax.__version__ and found["numpy"] == np.__version__


def test_versions_leave_out_what_is_not_installed():
    assert set(machine.versions(["numpy", "no-such-package"])) == {"python", "numpy"}


_HOLD_HALF_A_GIB = """
from aura_jax import machine
import numpy as np

before = machine.peak_memory_gib()
held = np.ones(2**29, np.uint8)
print(before, machine.peak_memory_gib(), held[0])
"""


def test_peak_memory_grows_with_what_is_held_by_this_process_alone():
    """In a process of its own, started by one whose peak was higher: what this one held may not be held again."""
    held = np.ones(2**30, np.uint8)
    done = subprocess.run([sys.executable, "-c", _HOLD_HALF_A_GIB], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    before, after, _ = map(float, done.stdout.split())
    assert before < held.size / 2**30 and 0.3 < after - before < 0.7
