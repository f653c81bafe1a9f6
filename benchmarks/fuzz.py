"""Feeds damaged audio to `aura_jax.audio.io`, for as long as asked: benchmarks/results/fuzz.json.

    python benchmarks/fuzz.py --hours 1

Small valid files of every format and subtype that libsndfile writes are cut, spliced and overwritten, and their headers
made to lie about lengths, rates and channels. Each goes through `load_audio`, from bytes or from a file whose name may
have the wrong ending, and through `audio_seconds`. Either must end in one of two ways:

  - decoded: float32 at 16 kHz, finite, at least one sample, no longer than `max_seconds`;
  - refused: `AudioError`, one line.

Anything else is a finding: another exception, a crash of the process, more than `MEMORY` beyond what an idle worker
has, more than `SECONDS` of processor time, or a traceback on standard error. Inputs are decoded in a worker process
under these limits, so that a segmentation fault in a C library is seen, and the next input goes on. The first input of
each kind of finding is kept in the output. Exit code 1 if anything was found.

The mutator is here and not in the package, which never needs it; tests/audio/test_fuzz.py runs a short part of it.
"""

import argparse
import base64
import collections
import contextlib
import dataclasses
import io
import itertools
import json
import math
import os
import random
import re
import resource
import select
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from aura_jax import machine
from aura_jax.audio.features import SAMPLE_RATE
from aura_jax.audio.io import LONGEST_SECONDS, AudioError, audio_seconds, load_audio

ROOT = Path(__file__).parents[1]
SECONDS = 30  # of processor time that an input may take
MEMORY = 1 << 30  # bytes that an input may take: an hour at 16 kHz is 220 MiB, and joining its blocks takes twice that
LIMITS = (2.0, 30.0, None)  # `max_seconds`, drawn for each input
_AWAKE = 10 * SECONDS  # seconds of wall time after which a worker that does not answer sleeps for ever

_COUNTS = (0, 1, 2, 3, 255, 256, 1023, 1024, 1025, 0x7FFF, 0x8000, 0xFFFF)
_LARGE = (10**6, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
_MAGIC = (
    *(b"RIFF\x24\0\0\0WAVEfmt ", b"RF64\xff\xff\xff\xffWAVEds64", b"riff\x2e\x91\xcf\x11", b"FORM\0\0\0\x40AIFFCOMM"),
    *(
        b"FORM\0\0\0\x40AIFC",
        b"FORM\0\0\0\x408SVX",
        b"fLaC\0\0\0\x22",
        b"OggS\0\x02",
        b"ID3\x03\0\0\0\0\0\x10",
        b".snd",
    ),
    *(b"\xff\xfb\x90\x64", b"caff\0\x01\0\0desc", b"Creative Voice File\x1a", b"NIST_1A\n   1024\n", b"MATLAB 5.0 MAT"),
    *(b" paf", b"fap ", b"PVF1\n1 16000 16\n", b"\x64\xa3\x01\0", b"2BIT", b"Extended Instrument: ", b"\xf0\x7e\0\x01"),
)


@dataclasses.dataclass(frozen=True)
class Input:
    """Damaged audio: the bytes, the format they were made of, and how they are read."""

    data: bytes
    origin: str  # such as "WAV PCM_16"
    max_seconds: float | None
    suffix: str | None  # of the file that it is read from; None: from bytes


def valid_files() -> dict[str, bytes]:
    """Returns a small file of each format and subtype that this libsndfile writes, mono and stereo where it can be."""
    rng = np.random.default_rng(0)
    out = {}
    for format in soundfile.available_formats():
        if format in ("RAW", "SD2"):  # the header is nowhere, or in another file
            continue
        for subtype in soundfile.available_subtypes(format):
            for channels in (1, 2):
                rate = 8000 if format == "WVE" else SAMPLE_RATE
                stream = io.BytesIO()
                with contextlib.suppress(soundfile.LibsndfileError, ValueError):
                    soundfile.write(stream, 0.1 * rng.normal(size=(1200, channels)), rate, subtype, format=format)
                    out[f"{format} {subtype}" + " stereo" * (channels - 1)] = stream.getvalue()
    return out


def damaged(files: dict[str, bytes], seed: int, number: int) -> Input:
    """Returns an input of a seed: the same for the same files, and some of those hold the date or a random number."""
    rng = random.Random(f"{seed}/{number}")
    format = rng.choice(sorted({name.split()[0] for name in files}))
    origin = rng.choice([name for name in files if name.split()[0] == format])
    data = bytearray(files[origin])
    for _ in range(rng.choice((1, 1, 2, 3, 6))):
        data = rng.choices(_DAMAGES, _OFTEN)[0](data, rng, files)
    if data[:4] == b"OggS" and rng.random() < 0.7:
        _mend_pages(data)  # libogg drops a page whose checksum is wrong: nothing behind it would be tested
    suffix = None
    if rng.random() < 0.25:
        suffix = rng.choice((f".{origin.split()[0].lower()}", ".wav", ".mp3", ".txt", ""))
    return Input(bytes(data), origin, rng.choice(LIMITS), suffix)


def _place(data: bytearray, rng: random.Random) -> int:
    """A position, mostly in what may be a header."""
    return rng.randrange(min(len(data), rng.choice((64, 256, len(data)))) or 1) if data else 0


def _cut(data: bytearray, rng: random.Random, files: dict[str, bytes]) -> bytearray:
    return data[: _place(data, rng)]


def _flip(data: bytearray, rng: random.Random, files: dict[str, bytes]) -> bytearray:
    for _ in range(rng.choice((1, 2, 8, 64)) if data else 0):
        data[_place(data, rng)] ^= 1 << rng.randrange(8)
    return data


def _lie(data: bytearray, rng: random.Random, files: dict[str, bytes]) -> bytearray:
    """Puts a length, rate or count that is wrong somewhere behind the name of a chunk, or anywhere."""
    chunks = [found.end() for found in re.finditer(rb"[A-Za-z0-9_ .]{4}", data)]
    place = rng.choice(chunks) + rng.randrange(0, 26, 2) if chunks and rng.random() < 0.7 else _place(data, rng)
    size = rng.choice((1, 2, 4, 4, 8))
    value = rng.choice(rng.choice((_COUNTS, _LARGE))) % (1 << 8 * size)
    data[place : place + size] = value.to_bytes(size, rng.choice(("little", "big")))
    return data


def _lie_in_text(data: bytearray, rng: random.Random, files: dict[str, bytes]) -> bytearray:
    """Overwrites a number that a header spells out, as NIST's and PVF's do."""
    numbers = list(re.finditer(rb"\d+", data[:1024]))
    if not numbers:
        return _lie(data, rng, files)
    found = rng.choice(numbers)
    data[found.start() : found.end()] = b"%d" % rng.choice((-1, *_COUNTS, *_LARGE))
    return data


def _splice(data: bytearray, rng: random.Random, files: dict[str, bytes]) -> bytearray:
    """Puts the end of another file behind the beginning of this one."""
    other = files[rng.choice(list(files))]
    return data[: _place(data, rng)] + other[rng.randrange(len(other)) :]


def _repeat(data: bytearray, rng: random.Random, files: dict[str, bytes]) -> bytearray:
    """Repeats or drops a part."""
    start = _place(data, rng)
    part = data[start : start + rng.choice((1, 4, 16, 512))]
    return data[:start] + part * rng.choice((0, 2, 2, 40)) + data[start + len(part) :]


def _noise(data: bytearray, rng: random.Random, files: dict[str, bytes]) -> bytearray:
    """Random bytes behind a magic number, or over a part of the file."""
    if rng.random() < 0.3:
        return bytearray(rng.choice(_MAGIC) + rng.randbytes(rng.choice((0, 8, 64, 1000))))
    start = _place(data, rng)
    part = rng.randbytes(min(len(data) - start, rng.choice((4, 32, 500))))
    data[start : start + len(part)] = part
    return data


_DAMAGES = (_lie, _flip, _cut, _lie_in_text, _splice, _repeat, _noise)
_OFTEN = (8, 4, 2, 1, 2, 2, 1)


def _mend_pages(data: bytearray) -> None:
    """Writes the right checksum into each page of an Ogg file whose extent can still be found (RFC 3533)."""
    start = data.find(b"OggS")
    while start >= 0 and start + 27 <= len(data):
        body = start + 27 + data[start + 26]
        end = body + sum(data[start + 27 : body])
        data[start + 22 : start + 26] = bytes(4)
        crc = 0
        for byte in data[start:end]:
            crc = ((crc << 8) & 0xFFFFFFFF) ^ _CRC[(crc >> 24) ^ byte]
        data[start + 22 : start + 26] = crc.to_bytes(4, "little")
        start = data.find(b"OggS", start + 4)


def _crc_of(byte: int) -> int:
    crc = byte << 24
    for _ in range(8):
        crc = (crc << 1) ^ (0x104C11DB7 if crc & 0x80000000 else 0)
    return crc


_CRC = [_crc_of(byte) for byte in range(256)]


def outcome(tried: Input, folder: Path) -> str:
    """Reads an input; returns "decoded", "refused", or what is wrong."""
    source: bytes | Path = tried.data
    if tried.suffix is not None:
        source = folder / f"damaged{tried.suffix}"
        source.write_bytes(tried.data)
    longest = LONGEST_SECONDS if tried.max_seconds is None else tried.max_seconds
    result = "refused"
    try:
        with contextlib.suppress(AudioError):
            seconds = audio_seconds(source)
            if not (math.isfinite(seconds) and seconds > 0):
                return f"audio_seconds: {seconds}"
        waveform_S = load_audio(source, max_seconds=tried.max_seconds)
        result = "decoded"
        if waveform_S.dtype != np.float32 or waveform_S.ndim != 1:
            return f"{waveform_S.dtype} {waveform_S.shape}"
        if not 1 <= len(waveform_S) <= longest * SAMPLE_RATE + 1:
            return f"{len(waveform_S)} samples, max_seconds {longest:g}"
        if not np.isfinite(waveform_S).all():
            return "NaN or infinite"
    except AudioError as error:
        if "\n" in str(error) or not str(error).isprintable():
            return f"not one line: {str(error)!r}"
    except Exception as error:  # whatever it is, it is a finding
        return f"{type(error).__name__}: {error}"
    return result


def _work() -> None:
    """The worker: reads inputs on standard input, a line of JSON each, and writes a line about each."""
    warnings.simplefilter("error")  # an overflow that numpy warns of is a finding
    with (
        os.fdopen(os.dup(1), "w") as replies,
        tempfile.TemporaryFile() as said,
        tempfile.TemporaryDirectory() as folder,
    ):
        for file in valid_files().values():  # what libraries allocate once
            load_audio(file)
        for stream in (1, 2):
            os.dup2(said.fileno(), stream)  # C libraries write there too
        idle = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (idle + MEMORY, idle + MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        started = _peak()
        print("ready", file=replies, flush=True)
        for line in sys.stdin:
            values = json.loads(line)
            tried = Input(**values | {"data": base64.b64decode(values["data"])})
            spent = time.process_time()
            resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(spent) + SECONDS, resource.RLIM_INFINITY))
            found = outcome(tried, Path(folder))
            said.seek(0)
            if b"Traceback" in (text := said.read()):
                found = f"printed: {text.decode(errors='replace').splitlines()[-1]}"
            said.seek(0)
            said.truncate()
            reply = {"outcome": found, "seconds": time.process_time() - spent, "memory": _peak() - started}
            print(json.dumps(reply), file=replies, flush=True)


def _peak() -> float:
    return machine.process_peak_gib() * 2**30


class Worker:
    """A process that reads inputs under limits, and is started anew when one of them ends it. Linux only."""

    def __init__(self):
        self._process: subprocess.Popen[str] | None = None

    def read(self, tried: Input) -> dict[str, Any]:
        """Returns {"outcome", "seconds", "memory"}; after a crash only the first.

        Seconds are of processor time; memory is the worker's peak so far, less that at its start.
        """
        if self._process is None:
            command = [sys.executable, "-m", "benchmarks.fuzz", "--worker"]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
            )
            if self._process.stdout is None or not self._process.stdout.readline():
                raise RuntimeError(f"the worker does not start: try {' '.join(command)}")
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        values = dataclasses.asdict(tried) | {"data": base64.b64encode(tried.data).decode()}
        with contextlib.suppress(BrokenPipeError):  # it has ended: there is nothing to read either
            process.stdin.write(json.dumps(values) + "\n")
            process.stdin.flush()
        awake, _, _ = select.select([process.stdout], [], [], _AWAKE)
        if awake and (line := process.stdout.readline()):
            return json.loads(line)
        found = f"the process ended with {process.wait()}" if awake else "waits for ever"
        self.close()
        return {"outcome": found}

    def close(self) -> None:
        """Ends the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def fuzz(seed: int, numbers: Iterable[int], seconds: float = math.inf) -> dict[str, Any]:
    """Reads inputs of a seed until they or the time are at an end; returns counts, and what was found."""
    files, worker = valid_files(), Worker()
    begun = time.monotonic()
    outcomes: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    wrong: dict[str, dict[str, Any]] = {}
    slowest, peak = 0.0, 0
    with contextlib.closing(worker):
        for number in numbers:
            if time.monotonic() - begun > seconds:
                break
            tried = damaged(files, seed, number)
            reply = worker.read(tried)
            found = reply["outcome"]
            slowest, peak = max(slowest, reply.get("seconds", 0.0)), max(peak, reply.get("memory", 0))
            if found not in ("decoded", "refused"):
                data = base64.b64encode(tried.data).decode()
                case = dataclasses.asdict(tried) | {"data": data, "number": number, "outcome": found}
                wrong.setdefault(f"{tried.origin}: {found}", case)
                found = "wrong"
            outcomes[tried.origin.split()[0]][found] += 1
    total = sum(outcomes.values(), collections.Counter())
    return {
        "inputs": total.total(),
        "decoded": total["decoded"],
        "refused": total["refused"],
        "wrong": total["wrong"],
        "seconds": round(time.monotonic() - begun, 1),
        "slowest input, seconds of processor time": round(slowest, 2),
        "peak memory beyond an idle worker, MiB": round(peak / 2**20),
        "kinds of valid files": len(files),
        "by format": {name: dict(sorted(counts.items())) for name, counts in sorted(outcomes.items())},
        "findings": list(wrong.values()),
    }


def main(argv: list[str] | None = None) -> int:
    """Returns 0 if every input was decoded or refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "fuzz.json")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        _work()
        return 0
    found = fuzz(args.seed, itertools.count(), 3600 * args.hours)
    out = {
        "command": f"python benchmarks/fuzz.py --hours {args.hours:g} --seed {args.seed}",
        "seed": args.seed,
        "machine": machine.describe(),
        "versions": machine.versions(("soundfile", "soxr", "numpy")) | {"libsndfile": soundfile.__libsndfile_version__},
        "results": found,
    }
    args.output.write_text(json.dumps(out, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    return bool(found["wrong"])


if __name__ == "__main__":
    sys.exit(main())
