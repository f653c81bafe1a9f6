"""What is said of the machine."""

import os

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


def test_peak_memory_grows_with_what_is_held():
    before = machine.peak_memory_gib()
    held = np.ones(int((before + 0.25) * 2**30), np.uint8)
    assert machine.peak_memory_gib() >= before + 0.2 and held[-1] == 1
