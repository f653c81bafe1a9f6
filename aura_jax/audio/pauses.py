"""Long recordings cut in their pauses.

Letters in array names: S samples, F frames of 10 ms.
"""

import numpy as np

from aura_jax.audio.features import HOP

_SHORTEST = 12 * HOP  # samples of a piece: its last third has frames to choose from
_NEAR = 5  # frames to either side of a cut that must be quiet too: 110 ms, more than the closure of a stop


def cut_in_pauses(waveform_S: np.ndarray, longest: int) -> list[tuple[int, int]]:
    """Returns (start, end) in samples of pieces of at most `longest` samples, which together are the waveform.

    Each but the last ends in the last third of what it might hold, in the middle of that frame of 10 ms whose loudest
    neighbour within 50 ms is the quietest; of equals, the last. So no cut is in speech where that third has a pause of
    110 ms.

    Args:
      waveform_S: [S], S >= 1.
      longest: samples.

    Raises:
      ValueError: `longest` is below 0.12 s.
    """
    if longest < _SHORTEST:
        raise ValueError(f"pieces of {longest} samples: at least {_SHORTEST}")
    if len(waveform_S) <= longest:
        return [(0, len(waveform_S))]
    n_frames = len(waveform_S) // HOP
    power_F = np.square(waveform_S[: n_frames * HOP].reshape(n_frames, HOP)).sum(1, dtype=np.float64)
    around_FxN = np.lib.stride_tricks.sliding_window_view(np.pad(power_F, _NEAR), 2 * _NEAR + 1)
    pieces, start = [], 0
    while len(waveform_S) - start > longest:
        # Frames whose middle is in the last third.
        first = -(-(3 * start + 2 * longest) // (3 * HOP))
        last = min((start + longest - HOP // 2) // HOP, n_frames - 1)
        loudest_F = around_FxN[first : last + 1].max(1)
        end = (last - int(np.argmin(loudest_F[::-1]))) * HOP + HOP // 2
        pieces.append((start, end))
        start = end
    return [*pieces, (start, len(waveform_S))]
