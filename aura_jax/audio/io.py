"""Audio files, records, bytes and streams to mono float32 waveforms at 16 kHz."""

import contextlib
import io
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile
import soxr

from aura_jax.audio import records
from aura_jax.audio.features import SAMPLE_RATE
from aura_jax.errors import UserError

_FORMATS = "WAV, FLAC, Ogg Vorbis, Opus or MP3"
_BLOCK_VALUES = 1 << 20  # samples times channels decoded at a time: 4 MiB, however many channels a header claims
_LOWEST_RATE = 1000  # Hz: below it a header is damaged, and resampling a few bytes would fill the memory
_UNKNOWN_LENGTH = 1 << 62  # libsndfile reports about 2^63 frames when a header does not say: FLAC from a pipe
_LARGEST_STREAM = 1 << 30  # bytes


class AudioError(UserError):
    """Audio that cannot be used: its text names the file and the mend."""


def load_audio(source: str | Path | bytes | BinaryIO, *, max_seconds: float | None = None) -> np.ndarray:
    """Decodes a clip to a mono waveform at 16 kHz.

    Channels are averaged while decoding, block by block, and the result is resampled with soxr's "HQ" filter.

    Args:
      source: a path, the address of a record (`audio.records`), an audio file's bytes, or a binary stream, which is
        read to its end. WAV, FLAC, Ogg Vorbis, Opus or MP3.
      max_seconds: longer clips are refused: by their header before anything is decoded, and, where a header is wrong,
        as soon as the limit is passed. None: no limit.

    Returns:
      waveform_S: float32 [S], S >= 1, nominally in [-1, 1]. Silence is valid.

    Raises:
      AudioError: the file is missing, empty, not audio, damaged, too long, has no samples or has NaN or infinite ones.
      UserError: the shard of a record is missing or damaged as a whole.
    """
    name = _name(source)
    with _open(source, name) as file:
        rate = file.samplerate
        if max_seconds is not None and _known_length(file) and file.frames > max_seconds * rate:
            raise _too_long(name, file.frames / rate, max_seconds, at_least="")
        block = max(1, _BLOCK_VALUES // file.channels)
        parts, n_samples = [], 0
        while len(values_SxC := file.read(block, dtype="float32", always_2d=True)):
            n_samples += len(values_SxC)
            if max_seconds is not None and n_samples > max_seconds * rate:
                raise _too_long(name, n_samples / rate, max_seconds, at_least="at least ")
            parts.append(values_SxC[:, 0] if file.channels == 1 else values_SxC.mean(axis=1))
    return from_samples(np.concatenate(parts) if parts else np.zeros(0, np.float32), rate, name=name)


def from_samples(samples_S: np.ndarray, rate: float, *, name: str = "audio") -> np.ndarray:
    """Turns decoded samples into a waveform at 16 kHz, resampled with soxr's "HQ" filter.

    Args:
      samples_S: any float [S], nominally in [-1, 1].
      rate: their sample rate in Hz.
      name: what an error calls them.

    Returns:
      waveform_S: float32 [S], S >= 1.

    Raises:
      AudioError: they are not one channel of floats, none, NaN or infinite, or the rate is none of audio.
    """
    if samples_S.ndim != 1 or not np.issubdtype(samples_S.dtype, np.floating):
        shape = list(samples_S.shape)
        raise AudioError(f"{name}: samples {samples_S.dtype}{shape}: give one channel of floats, from -1 to 1")
    if not len(samples_S):
        raise _no_samples(name)
    if not rate >= _LOWEST_RATE:
        raise AudioError(f"{name}: sample rate {rate} Hz: give that of the samples")
    if not np.isfinite(samples_S).all():
        where = int(np.argmin(np.isfinite(samples_S))) / rate
        raise AudioError(f"{name}: NaN or infinite samples, the first at {where:.3f} s: export the clip again")
    if rate != SAMPLE_RATE:
        samples_S = soxr.resample(samples_S, rate, SAMPLE_RATE, quality="HQ")
        if not len(samples_S):
            raise AudioError(f"{name}: too short for one sample at {SAMPLE_RATE} Hz: record it again")
    return np.ascontiguousarray(samples_S, dtype=np.float32)


def audio_seconds(source: str | Path | bytes | BinaryIO) -> float:
    """Length of a clip in seconds, by its header alone: nothing is decoded unless the header does not say.

    Raises AudioError as `load_audio` does for what a header shows: missing, empty, not audio, no samples.
    """
    name = _name(source)
    with _open(source, name) as file:
        if _known_length(file):
            n_samples = file.frames
        else:
            block = max(1, _BLOCK_VALUES // file.channels)
            n_samples = 0
            while n_read := len(file.read(block, dtype="float32", always_2d=True)):
                n_samples += n_read
        if not n_samples:
            raise _no_samples(name)
        return n_samples / file.samplerate


def stamp(path: str) -> tuple[int, int]:
    """Size and time of change of a clip's file, or of its record's shard. Raises OSError: there is none."""
    found = records.split(path)
    status = os.stat(records.local_file(found[0]) if found else path)
    return status.st_size, status.st_mtime_ns


def _name(source: str | Path | bytes | BinaryIO) -> str:
    if isinstance(source, bytes):
        return f"audio of {len(source)} bytes"
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    return str(getattr(source, "name", "audio stream"))


class _Sequential(soundfile.SoundFile):
    """Reads forward only: soundfile seeks after every read, which fails at the end of a FLAC of unknown length."""

    def seekable(self) -> bool:
        return False


class _Buffer(io.BytesIO):
    """Bytes for soundfile, which prints a traceback when damaged audio makes libsndfile seek before the start."""

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        try:
            return super().seek(offset, whence)
        except ValueError:
            return self.tell()


@contextlib.contextmanager
def _open(source: str | Path | bytes | BinaryIO, name: str) -> Iterator[soundfile.SoundFile]:
    """Opens a source, and turns what libsndfile reports here or while it is read into an AudioError."""
    if isinstance(source, str) and records.split(source):
        try:
            _, source = records.read(source)
        except records.RecordError as error:
            raise AudioError(f"{name}: a damaged record ({error}): pack the shard again") from None
    if isinstance(source, (str, os.PathLike)):
        size = _file_size(source, name)
        readable = os.fspath(source)
    else:
        data = source if isinstance(source, bytes) else source.read(_LARGEST_STREAM + 1)
        size = len(data)
        readable = _Buffer(data)
        if size > _LARGEST_STREAM:
            raise AudioError(f"{name}: over {_LARGEST_STREAM >> 20} MiB in memory: write it to a file, give its path")
    if not size:
        raise AudioError(f"{name}: empty, 0 bytes: record or download it again")
    try:
        with _Sequential(readable) as file:
            if file.samplerate < _LOWEST_RATE:
                raise AudioError(f"{name}: sample rate {file.samplerate} Hz: the header is damaged; export it again")
            yield file
    except soundfile.LibsndfileError as error:
        reason = error.error_string.strip().removeprefix("Error : ").rstrip(".")
        raise AudioError(f"{name}: cannot be decoded ({reason}): convert it to {_FORMATS}") from None


def _file_size(path: str | os.PathLike, name: str) -> int:
    """Bytes of a file that can be opened; else an AudioError that says why, as libsndfile would not."""
    if Path(path).suffix.lower() == ".raw":
        raise AudioError(f"{name}: headerless audio, format unknown: convert it to {_FORMATS}")
    try:
        with open(path, "rb") as file:
            return file.seek(0, os.SEEK_END)
    except FileNotFoundError:
        raise AudioError(f"{name}: no such audio file: check the path") from None
    except IsADirectoryError:
        raise AudioError(f"{name}: a directory: give an audio file") from None
    except OSError as error:
        raise AudioError(f"{name}: {error.strerror or error}: check the path and its permissions") from None
    except ValueError as error:
        raise AudioError(f"{name!r}: {error}: check the path") from None


def _known_length(file: soundfile.SoundFile) -> bool:
    return 0 <= file.frames < _UNKNOWN_LENGTH


def _too_long(name: str, seconds: float, max_seconds: float, *, at_least: str) -> AudioError:
    # Rounded up, so that the length never reads as if it were within the limit.
    shown = f"{at_least}{math.ceil(seconds * 100) / 100:g} s"
    return AudioError(f"{name}: {shown}, over the limit of {max_seconds:g} s: split the clip or raise max_seconds")


def _no_samples(name: str) -> AudioError:
    return AudioError(f"{name}: no samples: record or download it again, or take it out of the manifest")
