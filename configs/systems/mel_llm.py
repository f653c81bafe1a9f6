"""Encoder-free without distillation: AuRA, step for step, with the loss of its answers in place of the teacher's."""

from aura_jax.config import read
from aura_jax.experiments.quickstart import without_distillation
from configs import quickstart


def get_config(base: str = quickstart.__file__):
    """`base`: as of `aura`."""
    return without_distillation(read(base))
