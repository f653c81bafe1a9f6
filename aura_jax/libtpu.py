"""libtpu on a machine without TPUs, where its compiler alone is wanted: `aura-jax compile`."""

import importlib.util
import os
from pathlib import Path

_GOOGLE = "0x1ae0"  # its PCI vendor number

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
    vendors = Path("/sys/bus/pci/devices").glob("*/vendor")
    return any(vendor.read_text().strip() == _GOOGLE for vendor in vendors)


def settle() -> None:
    """Has libtpu ask for no TPU VM where there is none: else it complains on standard error whenever jax starts.

    Variables that are set stay as they are. Call it before jax looks for devices.
    """
    if installed() and not on_tpu_machine():
        for name, value in _ANSWERS.items():
            os.environ.setdefault(name, value)
