"""A short part of `benchmarks/fuzz.py`: damaged audio is decoded or refused, and its checks notice what is wrong."""

import dataclasses
import importlib.util
import io
import os
import random
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("fuzz", ROOT / "benchmarks" / "fuzz.py")
assert _spec is not None and _spec.loader is not None
fuzz = importlib.util.module_from_spec(_spec)
sys.modules["fuzz"] = fuzz  # dataclasses look there
_spec.loader.exec_module(fuzz)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the worker's limits are Linux's")


def test_damaged_audio_is_decoded_or_refused():
    found = fuzz.fuzz(seed=0, numbers=range(4000))
    assert found["findings"] == [] and found["wrong"] == 0
    assert found["inputs"] == 4000 and min(found["decoded"], found["refused"]) > 800
    assert {"WAV", "FLAC", "OGG", "MP3", "AIFF", "CAF", "AU", "W64", "RF64"} <= found["by format"].keys()


def test_an_input_is_the_same_for_the_same_seed_and_files_and_another_for_another():
    files = fuzz.valid_files()
    inputs = [fuzz.damaged(files, 0, number) for number in range(50)]
    assert inputs == [fuzz.damaged(files, 0, number) for number in range(50)]
    assert len({tried.data for tried in inputs}) > 45
    assert all(tried.data != files[tried.origin] for tried in inputs[:10])


def test_pages_of_ogg_are_mended():
    stream = io.BytesIO()
    soundfile.write(stream, np.zeros(1600), 16000, format="OGG", subtype="VORBIS")
    data = bytearray(stream.getvalue())
    serials = [i for i in range(len(data)) if data[i : i + 4] == b"OggS"]
    for page in serials:
        data[page + 14] ^= 1  # the serial number: what is read stays the same
    assert fuzz.outcome(fuzz.Input(bytes(data), "OGG VORBIS", None, None), Path()) == "refused"
    fuzz._mend_pages(data)
    assert fuzz.outcome(fuzz.Input(bytes(data), "OGG VORBIS", None, None), Path()) == "decoded"


@pytest.mark.parametrize(
    ("result", "found"),
    [
        (np.zeros(5, np.float64), "float64 (5,)"),
        (np.zeros(0, np.float32), "0 samples, max_seconds 2"),
        (np.zeros(32002, np.float32), "32002 samples, max_seconds 2"),
        (np.full(5, np.nan, np.float32), "NaN or infinite"),
        (RuntimeError("lost"), "RuntimeError: lost"),
        (MemoryError(), "MemoryError: "),
        (fuzz.AudioError("two\nlines"), r"not one line: 'two\nlines'"),
        (fuzz.AudioError("one line"), "refused"),
    ],
)
def test_what_is_neither_is_found(result, found, monkeypatch: pytest.MonkeyPatch):
    def load(*_, **__):
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(fuzz, "load_audio", load)
    assert fuzz.outcome(fuzz.Input(b"no audio", "WAV PCM_16", 2.0, None), Path()) == found


def test_a_crash_is_found_and_the_next_input_is_read():
    worker = fuzz.Worker()
    tried = fuzz.Input(fuzz.valid_files()["FLAC PCM_16"], "FLAC PCM_16", 2.0, ".wav")
    try:
        assert worker.read(tried)["outcome"] == "decoded"
        os.kill(worker._process.pid, signal.SIGSEGV)
        assert worker.read(tried) == {"outcome": f"the process ended with {-signal.SIGSEGV}"}
        broken = dataclasses.replace(tried, data=random.Random(0).randbytes(100))
        assert worker.read(broken)["outcome"] == "refused"
    finally:
        worker.close()
