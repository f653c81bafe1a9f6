"""How fast a step may be at best: the slowest of computing, of HBM, and of links, each at its published peak."""

import dataclasses
from collections.abc import Mapping

from aura_jax.experiments.bench.flops import Cost, total
from aura_jax.experiments.compile.chips import Chip


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of a step if all else were free, for each of "compute", "hbm" and "links".

    Attributes:
      mfu: the share of the peak that the operations that must be computed, none of them twice, would reach.
    """

    seconds: dict[str, float]
    mfu: float

    @property
    def bound(self) -> str:
        return max(self.seconds, key=lambda what: self.seconds[what])

    @property
    def step(self) -> float:
        """Seconds: no step of this program is faster. They are reached if all three overlap wholly."""
        return self.seconds[self.bound]


def executed(parts: Mapping[str, Cost], remat: str) -> float:
    """Returns the operations of a step with those that rematerialisation computes again.

    Args:
      remat: as `model.remat`: "full" runs the forward pass of every block twice, "dots" that of attention.
    """
    again = {"none": (), "dots": (", attention",), "full": (", frozen", ", LoRA", ", attention")}[remat]
    twice = (cost.forward for part, cost in parts.items() if " blocks" in part and part.endswith(again))
    return total(dict(parts)).total + sum(cost.recompute for cost in parts.values()) + sum(twice)


def roofline(chip: Chip, n_chips: int, must: float, does: float, hbm_bytes: float, link_bytes: float) -> Roofline:
    """Returns the roofline of a step.

    Args:
      must, does: operations of the whole step: that must be computed, and that are.
      hbm_bytes: that a chip reads and writes.
      link_bytes: that a chip sends.
    """
    seconds = {
        "compute": does / n_chips / chip.peak,
        "hbm": hbm_bytes / chip.hbm_bandwidth,
        "links": link_bytes / chip.link_bandwidth,
    }
    return Roofline(seconds, must / n_chips / chip.peak / max(seconds.values()))
