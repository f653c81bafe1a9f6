"""Utterances cut out of long recordings, as files of their own."""

import io
from collections.abc import Iterator, Sequence

import numpy as np
import soundfile

from aura_jax.audio.io import AudioError

_BLOCK = 1 << 18  # samples skipped at a time


def cut(path: str, spans: Sequence[tuple[float, float]]) -> Iterator[bytes]:
    """Yields the FLAC file of each span: 16 bits, the rate and the channels of the recording.

    The recording is read once, forward, and no more of it is held than a span.

    Args:
        path: of the recording.
        spans: (begin, end) in seconds, in the order of their beginnings.

    Raises:
        AudioError: the recording is missing or cannot be decoded, or ends before a span begins.
        ValueError: the spans are not in order.
    """
    try:
        with soundfile.SoundFile(path) as file:
            rate = file.samplerate
            held = np.zeros((0, file.channels), np.float32)
            start, position = 0, 0  # of what is held, in samples
            for begin, end in spans:
                first, last = round(begin * rate), round(end * rate)
                if first < start:
                    raise ValueError(f"{path}: spans are not in order")
                held, start = held[first - start :], first
                while position < first and (n := len(file.read(min(_BLOCK, first - position)))):
                    position += n
                if last > position >= first:
                    more = file.read(last - position, dtype="float32", always_2d=True)
                    held, position = np.concatenate([held, more]), position + len(more)
                if not len(held):
                    raise AudioError(
                        f"{path}: {position / rate:.4g} s, but a span is {begin:g} to {end:g} s: mend the span"
                    )
                flac = io.BytesIO()
                soundfile.write(flac, held[: last - first], rate, format="FLAC", subtype="PCM_16")
                yield flac.getvalue()
    except soundfile.LibsndfileError as error:
        raise AudioError(f"{path}: cannot be decoded ({error.error_string.strip().rstrip('.')})") from None
