"""Audio files, records, bytes and streams to mono float32 waveforms at 16 kHz."""

import contextlib
import io
import math
import os
import stat
from collections.abc import Iterable, Iterator
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
# Hz. Beyond them a header is damaged: resampling a few bytes would fill the memory, or decoding a second take an hour.
_LOWEST_RATE, _HIGHEST_RATE = 1000, 768_000
_LOUDEST = 2.0**31  # of samples that hold integers as floats; far beyond it the features would overflow
_UNKNOWN_LENGTH = 1 << 62  # libsndfile reports about 2^63 frames when a header does not say: FLAC from a pipe
_LARGEST_STREAM = 1 << 30  # bytes
# An ID3v2.4 tag of ten empty bytes: in memory, libsndfile 1.2.2 reads no MP3 that begins without a tag.
_EMPTY_TAG = b"ID3\x04\0\0\0\0\0\x0a" + bytes(10)


LONGEST_SECONDS = 3600.0  # of a clip, where nothing else is asked for: 220 MiB as a waveform


class AudioError(UserError):
    """Audio that cannot be used: its text names the file and the mend."""


def load_audio(source: str | Path | bytes | BinaryIO, *, max_seconds: float | None = None) -> np.ndarray:
    """Decodes a clip to a mono waveform at 16 kHz.

    Channels are averaged and the rate is changed with soxr's "HQ" filter while decoding, block by block: what is held
    in memory is what is returned, whatever a header claims.

    Args:
      source: a path, the address of a record (`audio.records`), an audio file's bytes, or a binary stream, which is
        read to its end. WAV, FLAC, Ogg Vorbis, Opus or MP3.
      max_seconds: longer clips are refused: by their header before anything is decoded, and, where a header is wrong,
        as soon as the limit is passed. None: `LONGEST_SECONDS`.

    Returns:
      waveform_S: float32 [S], S >= 1, finite, nominally in [-1, 1]. Silence is valid.

    Raises:
      AudioError: the file is missing, empty, not audio, damaged, too long, has no samples or has NaN or infinite ones.
      UserError: the shard of a record is missing or damaged as a whole.
    """
    name = _name(source)
    max_seconds = LONGEST_SECONDS if max_seconds is None else max_seconds
    with _open(source, name) as file:
        rate = file.samplerate
        if _known_length(file) and file.frames > max_seconds * rate:
            raise _too_long(name, file.frames / rate, max_seconds, at_least="")
        return _waveform(_channel(file, name, max_seconds), Blocks(rate, name=name))


def from_samples(samples_S: np.ndarray, rate: float, *, name: str = "audio") -> np.ndarray:
    """Turns decoded samples into a waveform at 16 kHz, resampled with soxr's "HQ" filter.

    Args:
      samples_S: any float [S], nominally in [-1, 1]; up to `LONGEST_SECONDS`.
      rate: their sample rate in Hz.
      name: what an error calls them.

    Returns:
      waveform_S: float32 [S], S >= 1.

    Raises:
      AudioError: they are not one channel of floats, none, NaN or infinite, too many, or the rate is none of audio.
    """
    blocks = Blocks(rate, name=name)
    if samples_S.ndim == 1 and len(samples_S) > LONGEST_SECONDS * rate:
        raise _too_long(name, len(samples_S) / rate, LONGEST_SECONDS, at_least="")
    return _waveform([samples_S], blocks)


def _channel(file: soundfile.SoundFile, name: str, max_seconds: float) -> Iterator[np.ndarray]:
    """Yields blocks of the mean of a file's channels; raises AudioError once they are longer than `max_seconds`."""
    block = max(1, _BLOCK_VALUES // file.channels)
    n_samples = 0
    while len(values_SxC := file.read(block, dtype="float32", always_2d=True)):
        n_samples += len(values_SxC)
        if n_samples > max_seconds * file.samplerate:
            raise _too_long(name, n_samples / file.samplerate, max_seconds, at_least="at least ")
        with np.errstate(over="ignore", invalid="ignore"):  # of damaged floats: infinite or NaN then, and refused
            yield values_SxC[:, 0] if file.channels == 1 else values_SxC.mean(axis=1)


class Blocks:
    """Turns blocks of decoded samples into blocks at 16 kHz as they come, resampled with soxr's "HQ" filter.

    Attributes:
      name: what an error calls them.
      n_samples: given so far, at their own rate.
    """

    def __init__(self, rate: float, *, name: str = "audio"):
        """
        Args:
          rate: sample rate in Hz.
          name: as of the attribute.

        Raises:
          AudioError: the rate is none of audio.
        """
        if not isinstance(rate, (int, float, np.number)) or not _LOWEST_RATE <= rate <= _HIGHEST_RATE:
            raise AudioError(f"{name}: sample rate {rate!r} Hz: give that of the samples, a number")
        self.n_samples = 0
        self._rate, self.name = rate, name
        self._resampler = None if rate == SAMPLE_RATE else soxr.ResampleStream(rate, SAMPLE_RATE, 1, quality="HQ")

    def push(self, samples_S: np.ndarray) -> np.ndarray:
        """Returns what is known at 16 kHz after this block: float32 [T], T >= 0.

        Args:
          samples_S: any float [S], S >= 0, nominally in [-1, 1].

        Raises:
          AudioError: it is not one channel of floats, or has NaN or infinite ones; it then counts for nothing.
        """
        if samples_S.ndim != 1 or not np.issubdtype(samples_S.dtype, np.floating):
            what = f"samples {samples_S.dtype}{list(samples_S.shape)}"
            raise AudioError(f"{self.name}: {what}: give one channel of floats, from -1 to 1")
        with np.errstate(over="ignore"):  # of float64: infinite then, and refused
            samples_S = np.ascontiguousarray(samples_S, dtype=np.float32)
        sound_S = np.abs(samples_S) <= _LOUDEST
        if not sound_S.all():
            first = int(np.argmin(sound_S))
            what = f"samples of {samples_S[first]:.3g}" if np.isfinite(samples_S[first]) else "NaN or infinite samples"
            where = f"{(self.n_samples + first) / self._rate:.3f} s"
            raise AudioError(f"{self.name}: {what}, the first at {where}: export the clip again")
        self.n_samples += len(samples_S)
        return samples_S if self._resampler is None else self._resampler.resample_chunk(samples_S)

    def end(self) -> np.ndarray:
        """Returns what the filter still holds: float32 [T], T >= 0."""
        if self._resampler is None:
            return np.zeros(0, np.float32)
        return self._resampler.resample_chunk(np.zeros(0, np.float32), last=True)


def _waveform(parts: Iterable[np.ndarray], blocks: Blocks) -> np.ndarray:
    """Checks blocks of samples as they come, and joins them at 16 kHz."""
    resampled = [blocks.push(samples_S) for samples_S in parts]
    if not blocks.n_samples:
        raise _no_samples(blocks.name)
    waveform_S = np.concatenate([*resampled, blocks.end()])
    if not len(waveform_S):
        raise AudioError(f"{blocks.name}: too short for one sample at {SAMPLE_RATE} Hz: record it again")
    return waveform_S


def audio_seconds(source: str | Path | bytes | BinaryIO) -> float:
    """Length of a clip in seconds, by its header alone: nothing is decoded unless the header does not say.

    Raises AudioError as `load_audio` does for what a header shows: missing, empty, not audio, no samples. A clip that
    has to be decoded is refused beyond `LONGEST_SECONDS`.
    """
    name = _name(source)
    with _open(source, name) as file:
        n_samples = file.frames if _known_length(file) else sum(map(len, _channel(file, name, LONGEST_SECONDS)))
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
    is_path = isinstance(source, (str, os.PathLike))
    name = str(os.fspath(source) if is_path else getattr(source, "name", "audio stream"))
    return name if name.isprintable() else repr(name)  # an error is one line


class _Sequential(soundfile.SoundFile):
    """Reads forward only: soundfile seeks after every read, which fails at the end of a FLAC of unknown length."""

    def seekable(self) -> bool:
        return False


class _Buffer(io.BytesIO):
    """Bytes for soundfile, which prints a traceback when damaged audio makes libsndfile seek where no file can be."""

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        try:
            return super().seek(offset, whence)
        except (ValueError, OverflowError):  # before the start, or beyond 2**63
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
        data = source if isinstance(source, bytes) else _read(source, name)
        size = len(data)
        is_untagged_mp3 = data[:1] == b"\xff" and data[1:2] >= b"\xe0"
        readable = _Buffer(_EMPTY_TAG + data if is_untagged_mp3 else data)
    if not size:
        raise AudioError(f"{name}: empty, 0 bytes: record or download it again")
    try:
        with _Sequential(readable) as file:
            if not _LOWEST_RATE <= file.samplerate <= _HIGHEST_RATE:
                raise AudioError(f"{name}: sample rate {file.samplerate} Hz: the header is damaged; export it again")
            yield file
    except soundfile.LibsndfileError as error:
        reason = " ".join(error.error_string.split()).removeprefix("Error : ").rstrip(".")
        raise AudioError(f"{name}: cannot be decoded ({reason}): convert it to {_FORMATS}") from None


def _read(stream: BinaryIO, name: str) -> bytes:
    """Reads a stream to its end: a pipe may give less at a time than is asked for."""
    parts, left = [], _LARGEST_STREAM
    try:
        while part := stream.read(left + 1):
            parts.append(part)
            left -= len(part)
            if left < 0:
                size = f"over {_LARGEST_STREAM >> 20} MiB in memory"
                raise AudioError(f"{name}: {size}: write it to a file, give its path")
    except (OSError, ValueError) as error:
        raise AudioError(f"{name}: cannot be read ({' '.join(str(error).split())}): open it again") from None
    if not all(isinstance(part, bytes) for part in parts):
        raise AudioError(f"{name}: a stream of text: open it in binary mode")
    return b"".join(parts)


def _file_size(path: str | os.PathLike, name: str) -> int:
    """Bytes of a file that can be opened; else an AudioError that says why, as libsndfile would not."""
    if Path(path).suffix.lower() == ".raw":
        raise AudioError(f"{name}: headerless audio, format unknown: convert it to {_FORMATS}")
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # opening a pipe waits for its writer, maybe for ever
            raise AudioError(f"{name}: a pipe or a device: open it and give the stream, or write it to a file")
        with open(path, "rb") as file:
            return file.seek(0, os.SEEK_END)
    except FileNotFoundError:
        raise AudioError(f"{name}: no such audio file: check the path") from None
    except IsADirectoryError:
        raise AudioError(f"{name}: a directory: give an audio file") from None
    except OSError as error:
        raise AudioError(f"{name}: {error.strerror or error}: check the path and its permissions") from None
    except ValueError as error:
        raise AudioError(f"{name}: {error}: check the path") from None


def _known_length(file: soundfile.SoundFile) -> bool:
    return 0 <= file.frames < _UNKNOWN_LENGTH


def _too_long(name: str, seconds: float, max_seconds: float, *, at_least: str) -> AudioError:
    # Rounded up, so that the length never reads as if it were within the limit.
    shown = f"{at_least}{math.ceil(seconds * 100) / 100:g} s"
    mend = "split the clip" if max_seconds == LONGEST_SECONDS else "split the clip or raise max_seconds"
    return AudioError(f"{name}: {shown}, over the limit of {max_seconds:g} s: {mend}")


def _no_samples(name: str) -> AudioError:
    return AudioError(f"{name}: no samples: record or download it again, or take it out of the manifest")
