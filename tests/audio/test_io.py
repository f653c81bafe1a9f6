import io
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr

import aura_jax.audio.io as audio_io
from aura_jax.audio.io import AudioError, audio_seconds, load_audio
from aura_jax.errors import UserError

SAMPLES = Path(__file__).parents[2] / "sample_data"


def tone(rate: int, seconds: float = 1.0, hz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hz * np.arange(round(rate * seconds)) / rate)).astype(np.float32)


def error_line(source, **options) -> str:
    with pytest.raises(AudioError) as error:
        load_audio(source, **options)
    line = str(error.value)
    assert isinstance(error.value, UserError) and "\n" not in line
    return line


@pytest.mark.parametrize(
    ("format", "subtype", "rate", "tolerance"),
    [
        ("WAV", "PCM_16", 16000, 1e-4),
        ("WAV", "PCM_U8", 8000, 2e-2),
        ("WAV", "FLOAT", 44100, 1e-3),
        ("FLAC", "PCM_16", 48000, 1e-3),
        ("OGG", "VORBIS", 22050, 5e-2),
        ("OGG", "OPUS", 16000, 5e-2),
        ("MP3", "MPEG_LAYER_III", 44100, 5e-2),
    ],
)
def test_formats_and_rates_give_the_same_tone(tmp_path: Path, format: str, subtype: str, rate: int, tolerance: float):
    path = tmp_path / f"tone.{format.lower()}"
    soundfile.write(path, tone(rate), rate, format=format, subtype=subtype)
    waveform_S = load_audio(path)
    assert waveform_S.dtype == np.float32 and waveform_S.ndim == 1 and waveform_S.flags.c_contiguous
    assert len(waveform_S) == pytest.approx(16000, abs=1)
    middle = slice(2000, 14000)  # codecs and resampling ring at the ends
    assert np.abs(waveform_S[middle] - tone(16000)[middle]).max() < tolerance
    assert audio_seconds(path) == pytest.approx(1.0, abs=1e-3)


def test_path_string_bytes_and_stream_agree():
    path = sorted((SAMPLES / "recordings" / "test").glob("*.ogg"))[0]
    expected_S = load_audio(path)
    assert len(expected_S) == round(audio_seconds(path) * 16000)

    class Pipe(io.RawIOBase):
        """What a pipe is: readable once, not seekable."""

        def __init__(self, data: bytes):
            self._stream = io.BytesIO(data)

        def readable(self) -> bool:
            return True

        def readinto(self, buffer) -> int:
            return self._stream.readinto(buffer)

    for source in (
        str(path),
        path.read_bytes(),
        io.BytesIO(path.read_bytes()),
        io.BufferedReader(Pipe(path.read_bytes())),
    ):
        np.testing.assert_array_equal(load_audio(source), expected_S)
    assert audio_seconds(path.read_bytes()) == audio_seconds(path)


def test_channels_are_averaged(tmp_path: Path):
    path = tmp_path / "stereo.wav"
    left, right = tone(16000), tone(16000, hz=700)
    soundfile.write(path, np.stack([left, right], axis=1), 16000, subtype="FLOAT")
    np.testing.assert_allclose(load_audio(path), (left + right) / 2, atol=1e-7)


def test_blocks_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name, channels in (("mono.flac", 1), ("stereo.ogg", 2)):
        path = tmp_path / name
        soundfile.write(path, np.stack([tone(24000)] * channels, axis=1), 24000)
        whole_S = load_audio(path)
        monkeypatch.setattr(audio_io, "_BLOCK_VALUES", 1001)
        np.testing.assert_array_equal(load_audio(path), whole_S)
        monkeypatch.undo()


def test_silence_is_valid(tmp_path: Path):
    path = tmp_path / "silence.wav"
    soundfile.write(path, np.zeros(8000, np.float32), 16000)
    np.testing.assert_array_equal(load_audio(path), np.zeros(8000))


def test_resampling_removes_what_the_rate_cannot_hold(tmp_path: Path):
    path = tmp_path / "high.wav"
    soundfile.write(path, tone(48000, hz=12_000), 48000)
    assert np.abs(load_audio(path)[1000:-1000]).max() < 1e-3  # 12 kHz would alias to 4 kHz


def test_limit_is_checked_in_the_header_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "long.wav"
    soundfile.write(path, tone(16000, seconds=2.0), 16000)
    assert len(load_audio(path, max_seconds=2.0)) == 32000
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda *_, **__: pytest.fail("decoded"))
    assert error_line(path, max_seconds=1.999) == (
        f"{path}: 2 s, over the limit of 1.999 s: split the clip or raise max_seconds"
    )
    assert audio_seconds(path) == 2.0


def flac_of_unknown_length(seconds: float) -> bytes:
    """As an encoder that writes to a pipe leaves it: the header's count of samples is 0."""
    stream = io.BytesIO()
    soundfile.write(stream, tone(16000, seconds), 16000, format="FLAC")
    data = bytearray(stream.getvalue())
    data[21] &= 0xF0
    data[22:26] = bytes(4)
    return bytes(data)


def test_flac_of_unknown_length(monkeypatch: pytest.MonkeyPatch):
    data = flac_of_unknown_length(3.0)
    monkeypatch.setattr(audio_io, "_BLOCK_VALUES", 10_000)
    assert len(load_audio(data)) == 48000
    assert audio_seconds(data) == 3.0
    assert "at least 1.25 s, over the limit of 1 s" in error_line(data, max_seconds=1.0)


def test_wav_of_unknown_length():
    stream = io.BytesIO()
    soundfile.write(stream, tone(16000), 16000, format="WAV")
    data = bytearray(stream.getvalue())
    data[4:8] = data[40:44] = struct.pack("<I", 0xFFFFFFFF)
    assert data[36:40] == b"data" and len(load_audio(bytes(data))) == 16000


def test_every_error_names_the_file_and_the_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def written(name: str, data: bytes) -> Path:
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    def sound(name: str, samples_S: np.ndarray, rate: int = 16000, subtype: str = "FLOAT") -> Path:
        soundfile.write(tmp_path / name, samples_S, rate, subtype=subtype)
        return tmp_path / name

    missing = tmp_path / "missing.wav"
    assert error_line(missing) == f"{missing}: no such audio file: check the path"
    assert error_line(tmp_path) == f"{tmp_path}: a directory: give an audio file"
    assert error_line("a\0b.wav") == "'a\\x00b.wav': embedded null byte: check the path"
    assert "File name too long: check the path" in error_line("x" * 5000)

    empty = written("empty.wav", b"")
    assert error_line(empty) == f"{empty}: empty, 0 bytes: record or download it again"
    assert error_line(b"") == "audio of 0 bytes: empty, 0 bytes: record or download it again"
    assert error_line(io.BytesIO()) == "audio stream: empty, 0 bytes: record or download it again"

    convert = "convert it to WAV, FLAC, Ogg Vorbis, Opus or MP3"
    text = written("text.wav", b"this is not audio, whatever its name says")
    assert error_line(text) == f"{text}: cannot be decoded (Format not recognised): {convert}"
    raw = written("samples.raw", bytes(1000))
    assert error_line(raw) == f"{raw}: headerless audio, format unknown: {convert}"
    flac = io.BytesIO()
    soundfile.write(flac, np.random.default_rng(0).normal(size=48000) / 8, 16000, format="FLAC")
    cut = written("cut.flac", flac.getvalue()[: len(flac.getvalue()) // 2])
    assert error_line(cut) == f"{cut}: cannot be decoded (flac decoder lost sync): {convert}"

    nothing = sound("nothing.wav", np.zeros(0, np.float32))
    assert error_line(nothing) == f"{nothing}: no samples: record or download it again, or take it out of the manifest"
    one = sound("one.wav", np.zeros(1, np.float32), rate=48000)
    assert error_line(one) == f"{one}: too short for one sample at 16000 Hz: record it again"
    for bad in (np.nan, np.inf):
        samples_S = tone(16000)
        samples_S[4000] = bad
        path = sound("bad.wav", samples_S)
        assert error_line(path) == f"{path}: NaN or infinite samples, the first at 0.250 s: export the clip again"
    slow = sound("slow.wav", tone(16000), rate=10)
    assert error_line(slow) == f"{slow}: sample rate 10 Hz: the header is damaged; export it again"

    for path in (missing, empty, text, raw, nothing, slow):
        with pytest.raises(AudioError) as error:
            audio_seconds(path)
        assert str(error.value) == error_line(path)

    monkeypatch.setattr(audio_io, "_LARGEST_STREAM", 1 << 20)
    message = "audio stream: over 1 MiB in memory: write it to a file, give its path"
    assert error_line(io.BytesIO(bytes((1 << 20) + 1))) == message


def test_unreadable_file_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "locked.wav"
    path.write_bytes(b"x")

    def refuse(*_):
        raise PermissionError(13, os.strerror(13), str(path))

    monkeypatch.setattr("builtins.open", refuse)  # root, who runs many a container, may read anything
    assert error_line(path) == f"{path}: Permission denied: check the path and its permissions"


def test_damaged_bytes_print_no_traceback(capfd: pytest.CaptureFixture[str]):
    stream = io.BytesIO()
    soundfile.write(stream, tone(16000), 16000, format="AIFF")
    assert "cannot be decoded" in error_line(stream.getvalue()[:44])
    stream = io.BytesIO()
    soundfile.write(stream, tone(16000), 16000, format="RF64")
    huge = bytearray(stream.getvalue())
    huge[28:36] = (2**63 - 1).to_bytes(8, "little")  # bytes of samples, it says
    assert len(load_audio(bytes(huge))) == 16000
    assert "Traceback" not in capfd.readouterr().err


def test_mp3_reads_the_same_from_bytes(tmp_path: Path):
    path = tmp_path / "tone.mp3"
    soundfile.write(path, tone(44100), 44100)
    assert path.read_bytes()[:1] == b"\xff"  # no ID3 tag: libsndfile alone reads it from a path only
    np.testing.assert_array_equal(load_audio(path.read_bytes()), load_audio(path))


def test_blocks_are_resampled_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "tone.wav"
    soundfile.write(path, tone(44100), 44100, subtype="FLOAT")
    monkeypatch.setattr(audio_io, "_BLOCK_VALUES", 1001)
    expected_S = soxr.resample(tone(44100), 44100, 16000, quality="HQ")
    np.testing.assert_array_equal(load_audio(path), expected_S)
    np.testing.assert_array_equal(audio_io.from_samples(tone(44100), 44100), expected_S)


def test_an_hour_is_the_limit_where_none_is_given(monkeypatch: pytest.MonkeyPatch):
    stream = io.BytesIO()
    soundfile.write(stream, np.zeros(3_700_000, np.float32), 1000, format="FLAC")
    bomb = stream.getvalue()
    assert len(bomb) < 20_000  # decoded and resampled: 237 MB
    decoded = []
    read = soundfile.SoundFile.read
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda *a, **kw: decoded.append(1) or read(*a, **kw))
    end = "over the limit of 3600 s: split the clip"
    assert f": 3700 s, {end}" in error_line(bomb)
    assert audio_seconds(bomb) == 3700.0 and decoded == []
    unknown = bytearray(bomb)
    unknown[21] &= 0xF0
    unknown[22:26] = bytes(4)
    with pytest.raises(AudioError, match=f"at least .* s, {end}"):
        audio_seconds(bytes(unknown))
    assert f" s, {end}" in error_line(bytes(unknown), max_seconds=None)


def test_headers_that_lie():
    def wav(channels: int = 1, rate: int = 16000, claimed: int = 3200) -> bytes:
        fmt = struct.pack("<HHIIHH", 1, channels, rate, (rate * channels * 2) & 0xFFFFFFFF, (channels * 2) & 0xFFFF, 16)
        size = struct.pack("<I", claimed)
        return b"RIFF" + size + b"WAVEfmt \x10\0\0\0" + fmt + b"data" + size + bytes(3200)

    assert len(load_audio(wav())) == 1600
    assert len(load_audio(wav(claimed=0x7FFFFFFF))) == 1600
    assert len(load_audio(wav(channels=1024))) == 1
    for rate in (1, 999, 768_001, 0x7FFFFFFF):
        assert f"sample rate {rate} Hz: the header is damaged" in error_line(wav(rate=rate))
    for damaged in (wav(channels=0), wav(channels=1025), wav(rate=0), wav(rate=1 << 31)):
        error_line(damaged)


def test_samples_that_are_no_sound(tmp_path: Path):
    for value, said in ((1e30, "samples of 1e+30"), (-3e38, "samples of -3e+38"), (1e300, "NaN or infinite samples")):
        path = tmp_path / "loud.wav"
        soundfile.write(path, np.r_[np.zeros(1600), value, -value], 16000, subtype="DOUBLE")
        assert error_line(path) == f"{path}: {said}, the first at 0.100 s: export the clip again"
        with pytest.raises(AudioError, match=r"the first at 0\.000 s"):
            audio_io.from_samples(np.array([value, -value]), 48000)
    half_S = tone(44100).astype(np.float16)
    np.testing.assert_array_equal(
        audio_io.from_samples(half_S, 44100), audio_io.from_samples(half_S.astype(np.float32), 44100)
    )
    with pytest.raises(AudioError, match="sample rate 1000000 Hz: give that of the samples"):
        audio_io.from_samples(tone(16000), 1_000_000)


def test_what_is_no_file_does_not_hang(tmp_path: Path):
    pipe = tmp_path / "pipe.wav"
    os.mkfifo(pipe)
    for path in (pipe, "/dev/zero"):
        assert error_line(path) == f"{path}: a pipe or a device: open it and give the stream, or write it to a file"
    closed = io.BytesIO(b"x")
    closed.close()
    assert error_line(closed) == "audio stream: cannot be read (I/O operation on closed file.): open it again"
    assert error_line(io.StringIO("RIFF")) == "audio stream: a stream of text: open it in binary mode"
    missing = tmp_path / "two\nlines.wav"
    assert error_line(missing) == f"{str(missing)!r}: no such audio file: check the path"


def test_a_stream_that_gives_little_at_a_time_is_read_to_its_end():
    stream = io.BytesIO()
    soundfile.write(stream, tone(16000), 16000, format="WAV")

    class Slow(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            return super().read(1000)

    np.testing.assert_array_equal(load_audio(Slow(stream.getvalue())), load_audio(stream.getvalue()))


def test_blocks_are_the_whole():
    samples = tone(44100)
    blocks = audio_io.Blocks(44100)
    parts = [blocks.push(part) for part in (samples[:0], samples[:1], samples[1:4000], samples[4000:])]
    assert blocks.n_samples == len(samples)
    np.testing.assert_allclose(np.concatenate([*parts, blocks.end()]), audio_io.from_samples(samples, 44100), atol=1e-6)
