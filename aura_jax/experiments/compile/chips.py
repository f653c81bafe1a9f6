"""TPU chips and the slices of them that can be rented: published figures, and devices to compile for."""

import dataclasses
from typing import Any

import jax
from jax.experimental import topologies

from aura_jax import libtpu
from aura_jax.errors import UserError

_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_SOLID = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of TPU.

    Attributes:
      peak: bfloat16 operations a second.
      hbm: bytes; programs may use a little less.
      hbm_bandwidth: bytes a second.
      link_bandwidth: bytes a second that it can send over all its links together, all of them busy.
      shapes: slices, in chips.
      options: of `topologies.get_topology_desc`, so that a device is a chip.
      source: of the figures.
    """

    name: str
    peak: float
    hbm: float
    hbm_bandwidth: float
    link_bandwidth: float
    shapes: tuple[str, ...]
    source: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


_GIB = 2.0**30
# What Google publishes of links is the sum of both directions ("bidirectional"), or in older pages one direction in
# Gbit/s (v5e 1600, v5p 4800). Here: one direction.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", 197e12, 16 * _GIB, 819e9, 200e9, _FLAT, "https://cloud.google.com/tpu/docs/v5e"),
        Chip("v6e", 918e12, 32 * _GIB, 1638e9, 400e9, _FLAT, "https://cloud.google.com/tpu/docs/v6e"),
        Chip("v5p", 459e12, 95 * _GIB, 2765e9, 600e9, _SOLID, "https://cloud.google.com/tpu/docs/v5p"),
        # Links: 6 of 50 GB/s, from table 4 of arXiv 2304.01433.
        Chip(
            "v4",
            275e12,
            32 * _GIB,
            1200e9,
            300e9,
            _SOLID,
            "https://cloud.google.com/tpu/docs/v4",
            {"chip_config_name": "megacore"},
        ),
    )
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice: its name, such as "v5e:16x16", its kind of chip, and a device for each chip."""

    name: str
    chip: Chip
    devices: tuple[Any, ...]


def known() -> str:
    """Returns the names of all slices, for people."""
    return "; ".join(f"{chip.name}: {' '.join(chip.shapes)}" for chip in CHIPS.values())


def topology(name: str) -> Topology:
    """Returns a slice by its name; there need be no TPU.

    Raises:
      UserError: there is no such slice, or no libtpu, which has the compiler.
    """
    kind, _, shape = name.partition(":")
    if kind not in CHIPS or shape not in CHIPS[kind].shapes:
        raise UserError(f"unknown topology {name!r}: write KIND:SHAPE, shape in chips; known are {known()}")
    if not libtpu.installed():
        raise UserError("compiling for TPUs needs libtpu: install the extra `tpu` (pip install 'aura-jax[tpu]')")
    libtpu.settle()
    sizes = [int(n) for n in shape.split("x")]
    host = (min(sizes[0], 2), min(sizes[1], 2), 1)
    chip = CHIPS[kind]
    try:
        found = topologies.get_topology_desc(name, "tpu", chips_per_host_bounds=host, **chip.options)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"{name}: libtpu refuses: {' '.join(str(error).split())}") from error
    return Topology(name, chip, tuple(found.devices))
