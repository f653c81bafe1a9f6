"""Flax modules, pure functions of their variables: they know nothing of losses, training, data or files."""
