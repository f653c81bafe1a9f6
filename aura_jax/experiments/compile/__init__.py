"""Ahead-of-time compilation of the train step for a TPU topology: does it compile, does it fit, how fast may it be."""
