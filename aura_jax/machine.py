"""What a run or a measurement ran on, and how much memory it took."""

import contextlib
import os
import platform
import re
import resource
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

_PACKAGES = ("aura-jax", "jax", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")


def n_cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe() -> str:
    """Returns the processor's name, the cores that this process may use, and the host's memory."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{next(names, platform.machine())}, {n_cores()} cores, {memory:.0f} GiB"


def environment() -> dict[str, Any]:
    """Returns the machine, its devices, and the versions of what computes."""
    device = jax.devices()[0]
    return {
        "machine": describe(),
        "devices": f"{jax.device_count()} x {device.device_kind}",
        "hosts": jax.process_count(),
        **versions(),
    }


def versions(packages: Iterable[str] = _PACKAGES) -> dict[str, str]:
    """Returns the versions of Python and of those packages that are installed."""
    out = {"python": platform.python_version()}
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):
            out[name] = version(name)
    return out


def peak_memory_gib() -> float:
    """Returns the most memory in use so far: of the first local device if it counts its own, else of this process."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in statistics:
        return statistics["peak_bytes_in_use"] / 2**30
    return process_peak_gib()


def process_peak_gib() -> float:
    """Returns the most memory that this process had so far."""
    status = Path("/proc/self/status")
    # Where Linux tells it: getrusage gives no less than the peak of the process that started this one.
    if found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text() if status.is_file() else ""):
        return int(found[1]) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
