"""AuRA (arXiv 2606.11033), as the base trains it."""

from aura_jax.config import read
from configs import quickstart


def get_config(base: str = quickstart.__file__):
    """`base`: a config of AuRA, such as the quickstart's."""
    return read(base)
