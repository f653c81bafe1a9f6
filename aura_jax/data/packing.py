"""Several short examples in one row: first-fit."""

from collections.abc import Sequence

import numpy as np

Bins = list[list[int]]  # what each bin holds

_OPEN_BINS = 64  # looked at for each item, so that the time stays linear


def first_fit(sizes_NxC: np.ndarray, limits_C: Sequence[int]) -> Bins:
    """Packs items into bins, each item into the first bin with room in all of C respects (of the last 64 opened).

    Args:
        sizes_NxC: int, what each item takes.
        limits_C: what a bin holds; no item takes more.

    Returns:
        The items of each bin, bins in the order of opening.
    """
    limits = np.asarray(limits_C)
    bins: Bins = []
    room = np.zeros((0, len(limits)), np.int64)
    for item, size in enumerate(sizes_NxC):
        fits = np.flatnonzero((room >= size).all(axis=1))
        if len(fits):
            place = int(fits[0])
        else:
            bins.append([])
            room = np.concatenate([room[-(_OPEN_BINS - 1) :], limits[None]])
            place = len(room) - 1
        bins[len(bins) - len(room) + place].append(item)
        room[place] -= size
    return bins
