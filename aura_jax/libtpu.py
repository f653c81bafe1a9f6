"""libtpu on a machine without TPUs, where its compiler alone is wanted: `aura-jax compile`."""

import importlib.util
import os
from pathlib import Path

_GOOGLE, _NETWORK = "0x1ae0", "0x0042"  # PCI numbers: of the vendor, and of its network card, which is no TPU

# What libtpu would otherwise ask a TPU VM's metadata server: any valid answer will do, no chip is ever opened. Nor need
# processes take turns, as those that open chips must.
_ANSWERS = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def installed() -> bool:
    return importlib.util.find_spec("libtpu") is not None


def on_tpu_machine() -> bool:
    """Whether this machine has TPU chips."""
    devices = Path("/sys/bus/pci/devices").glob("*")
    read = lambda device, name: (device / name).read_text().strip()
    return any(read(device, "vendor") == _GOOGLE and read(device, "device") != _NETWORK for device in devices)


def settle() -> None:
    """Has libtpu ask for no TPU VM where there is none: else it complains on standard error whenever jax starts.

    Variables that are set stay as they are. Call it before jax looks for devices.
    """
    if installed() and not on_tpu_machine():
        for name, value in _ANSWERS.items():
            os.environ.setdefault(name, value)
