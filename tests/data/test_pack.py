"""Packing: every layout, the same shards whoever writes them, and going on after an interruption."""

import json
import os
import sys

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from aura_jax import cli
from aura_jax.audio import records
from aura_jax.audio.io import load_audio
from aura_jax.data import layouts, pack, shards
from aura_jax.data.manifest import clip_samples, load_manifest
from aura_jax.errors import UserError


def write_clip(path, i: int, rate: int = 16000, **options) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.1 * np.random.default_rng(i).standard_normal(3000 + 100 * i), rate, **options)
    return path.read_bytes()


@pytest.fixture
def manifest(tmp_path):
    lines = []
    for i in range(9):
        write_clip(tmp_path / "clips" / f"{i}.wav", i)
        lines.append({"audio": f"clips/{i}.wav", "text": f"number {i}"})
    path = tmp_path / "m.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def run(source, output, **options):
    return pack.pack([str(source)], str(output), **({"progress": False, "shard_bytes": 20_000} | options))


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def audio_of(row) -> bytes:
    return records.read(row.audio)[1]


def test_a_record_holds_the_line_and_the_bytes_of_the_file(manifest, tmp_path):
    run(manifest, tmp_path / "out")
    rows = load_manifest(tmp_path / "out")
    for i, row in enumerate(rows):
        line, audio = records.read(row.audio)
        assert json.loads(line)["text"] == f"number {i}" and row.header_seconds == (3000 + 100 * i) / 16000
        assert audio == (tmp_path / "clips" / f"{i}.wav").read_bytes()
        assert (
            line
            == (tmp_path / "out" / row.where.rpartition("/")[2].partition(":")[0])
            .read_bytes()
            .split(b"\n")[int(row.audio.rpartition("#")[2])]
        )


def test_a_conversation_and_a_response_that_was_cut_stay_what_they_are(manifest, tmp_path):
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    lines[1] |= {"response": "One, two,", "ended": False, "history": HISTORY}
    manifest.write_text("\n".join(map(json.dumps, lines)))
    run(manifest, tmp_path / "out")
    first, second, *_ = load_manifest(tmp_path / "out")
    assert (first.ended, first.history, second.ended, second.history) == (True, (), False, tuple(HISTORY))


def test_the_same_input_gives_the_same_shards(manifest, tmp_path):
    run(manifest, tmp_path / "one")
    run(manifest, tmp_path / "two", n_processes=2)
    wanted = contents(tmp_path / "one")
    assert contents(tmp_path / "two") == wanted
    assert sorted(wanted) == ["index.json"] + [
        f"shard-000000{i}.{e}" for i in range(4) for e in ("array_record", "jsonl")
    ]
    index = json.loads(wanted["index.json"])
    assert index["version"] == 1 and index["rows"] == 9 and [s["records"] for s in index["shards"]] == [3, 2, 2, 2]


def test_a_second_call_writes_what_is_missing(manifest, tmp_path, monkeypatch):
    run(manifest, tmp_path / "whole")
    wanted, out, written = contents(tmp_path / "whole"), tmp_path / "out", []
    original = pack._write_shard

    def stop_at_two(job):
        if job.name.endswith("2") and not written:
            raise KeyboardInterrupt
        return original(job)

    monkeypatch.setattr(pack, "_write_shard", stop_at_two)
    with pytest.raises(KeyboardInterrupt):
        run(manifest, out)
    assert not (out / "index.json").exists() and (out / "shard-0000001.json").exists()
    with pytest.raises(UserError, match=r"out: no index.json in it"):
        load_manifest(out)
    (out / ".shard-0000002.array_record.partial").write_bytes(b"of a killed process")

    monkeypatch.setattr(pack, "_write_shard", lambda job: written.append(job.name) or original(job))
    report = run(manifest, out)
    assert written == ["shard-0000002", "shard-0000003"] and report.n_kept == 2 and "2 of them" in report.summary
    assert contents(out) == wanted
    (out / "shard-0000001.array_record").unlink()
    (out / "shard-0000003.jsonl").write_bytes(b"{}\n")  # a checksum that differs is for `validate` to find
    assert run(manifest, out).n_kept == 3 and written[2:] == ["shard-0000001"]
    assert run(manifest, out).n_kept == 4 and len(written) == 3


def test_other_input_is_refused(manifest, tmp_path):
    run(manifest, tmp_path / "out")
    wanted = contents(tmp_path / "out")
    with pytest.raises(UserError, match=r"out/shard-0000000: packed from other input, or with another --shard-size: n"):
        run(manifest, tmp_path / "out", shard_bytes=30_000)
    lines = manifest.read_text().splitlines()
    manifest.write_text("\n".join(lines[:3]))
    with pytest.raises(UserError, match="shard-0000001: packed from other input"):
        run(manifest, tmp_path / "out")
    assert contents(tmp_path / "out") == wanted
    (tmp_path / "out" / "shard-0000000.json").write_text("{")
    with pytest.raises(UserError, match=r"shard-0000000.json: damaged: delete it"):
        run(manifest, tmp_path / "out")


def test_several_inputs_follow_each_other(manifest, tmp_path):
    report = pack.pack([str(manifest), str(manifest)], str(tmp_path / "out"), progress=False)
    assert report.n_shards == 1 and [row.id for row in load_manifest(tmp_path / "out")] == [
        f"clips/{i}.wav" for _ in range(2) for i in range(9)
    ]


def test_librispeech(tmp_path):
    for chapter in ("84/121550", "84/121123", "1272/128104"):
        prefix, lines = chapter.replace("/", "-"), []
        for i in range(2):
            write_clip(tmp_path / "dev" / chapter / f"{prefix}-{i:04}.flac", i)
            lines.append(f"{prefix}-{i:04} HELLO NUMBER {i}")
        (tmp_path / "dev" / chapter / f"{prefix}.trans.txt").write_text("\n".join(lines) + "\n")
    run(tmp_path / "dev", tmp_path / "out")
    rows = load_manifest(tmp_path / "out")
    assert [row.id for row in rows] == [
        f"{c}-000{i}" for c in ("1272-128104", "84-121123", "84-121550") for i in range(2)
    ]
    assert rows[3].text == "HELLO NUMBER 1" and rows[3].extra == {"speaker": "84"}
    assert audio_of(rows[3]) == (tmp_path / "dev/84/121123/84-121123-0001.flac").read_bytes()
    (tmp_path / "dev/84/121123/84-121123.trans.txt").write_text("84-121123-0000\n")
    with pytest.raises(UserError, match=r"84-121123.trans.txt:1: '84-121123-0000' and no text: give 'ID TEXT' a line"):
        run(tmp_path / "dev", tmp_path / "out")


def test_common_voice(tmp_path):
    lines = ["client_id\tpath\tsentence\tage\tlocale"]
    for i in range(3):
        write_clip(tmp_path / "cv" / "clips" / f"common_voice_{i}.mp3", i, 32000)
        lines.append(f'abc{i}\tcommon_voice_{i}{".mp3" if i else ""}\tHe said "{i}"\u2028 twice.\t\tfr')
    (tmp_path / "cv" / "train.tsv").write_text("\n".join(lines) + "\n")
    run(tmp_path / "cv" / "train.tsv", tmp_path / "out")
    rows = load_manifest(tmp_path / "out")
    assert rows[1].text == 'He said "1"\u2028 twice.' and rows[1].id == "common_voice_1.mp3"
    assert rows[1].extra == {"speaker": "abc1", "locale": "fr"}
    for i, row in enumerate(rows):
        assert audio_of(row) == (tmp_path / "cv" / "clips" / f"common_voice_{i}.mp3").read_bytes()
    with pytest.raises(UserError, match=r"cv: a folder with train.tsv: name one of these tables"):
        run(tmp_path / "cv", tmp_path / "out")
    (tmp_path / "cv" / "train.tsv").write_text("\n".join([lines[0], "abc0"]))
    with pytest.raises(UserError, match=r"train.tsv:2: fewer columns than the first line names"):
        run(tmp_path / "cv" / "train.tsv", tmp_path / "out")
    (tmp_path / "cv" / "train.tsv").write_text("a\tb\n")
    with pytest.raises(UserError, match=r"train.tsv: no column 'path'"):
        run(tmp_path / "cv" / "train.tsv", tmp_path / "out")


def gigaspeech(folder):
    """Two recordings, whose samples count up, with segments that overlap, are noise, or are of other subsets."""

    def segment(sid, begin, end, text, *subsets):
        names = [f"{{{name}}}" for name in subsets]
        return {"sid": sid, "begin_time": begin, "end_time": end, "text_tn": text, "subsets": names, "speaker": "N/A"}

    folder.mkdir(parents=True)
    ramp = np.arange(16000 * 4) / 2**15 / 4
    (folder / "audio").mkdir()
    for name in ("a.wav", "b.wav"):
        soundfile.write(folder / "audio" / name, ramp, 16000, "PCM_24")
    first = [
        segment("A2", 1.5, 2.5, "WELL <COMMA> YES <QUESTIONMARK>", "XS", "S"),
        segment("A1", 0.25, 1.75, "HELLO <PERIOD>", "XS", "S"),
        segment("A3", 2.0, 2.25, "<MUSIC>", "XS"),
        segment("A4", 3.5, 4.0, "BYE", "S"),
    ]
    audios = [
        {"aid": "A", "path": "audio/a.wav", "title": 'with a ] and a " in it', "segments": first},
        {"aid": "B", "path": "audio/b.wav", "segments": [segment("B1", 0.0, 1.0, "<SIL>", "XS")]},
    ]
    (folder / "GigaSpeech.json").write_text(
        json.dumps({"dataset": "GigaSpeech", "audios": audios, "more": {}}, indent=1)
    )
    return ramp


def test_gigaspeech(tmp_path, monkeypatch):
    ramp = gigaspeech(tmp_path / "gs")
    monkeypatch.setattr(layouts, "_CHUNK", 100)  # every object is read in pieces
    run(tmp_path / "gs", tmp_path / "out", subset="XS")
    rows = load_manifest(tmp_path / "out")
    assert [(row.id, row.text) for row in rows] == [("A1", "HELLO."), ("A2", "WELL, YES?")]
    assert rows[0].extra == {"recording": "A"} and clip_samples(rows) == [24001, 16001]
    for row, begin, end in zip(rows, (4000, 24000), (28000, 40000), strict=True):
        assert audio_of(row).startswith(b"fLaC")
        np.testing.assert_allclose(load_audio(row.audio), ramp[begin:end], atol=2**-15)
    run(tmp_path / "gs" / "GigaSpeech.json", tmp_path / "all")
    assert [row.id for row in load_manifest(tmp_path / "all")] == ["A1", "A2", "A4"]
    with pytest.raises(UserError, match=r"GigaSpeech.json: no subset XM: valid: S, XS"):
        run(tmp_path / "gs", tmp_path / "other", subset="XM")

    metadata = json.loads((tmp_path / "gs/GigaSpeech.json").read_text())
    metadata["audios"][0]["segments"][3]["begin_time"] = 5.0
    metadata["audios"][0]["segments"][3]["end_time"] = 6.0
    (tmp_path / "gs/GigaSpeech.json").write_text(json.dumps(metadata))
    report = run(tmp_path / "gs", tmp_path / "late")
    assert len(report.problems) == 1 and "4 s, but a span is 5 to 6 s: mend the span" in report.problems[0]
    assert [row.header_seconds for row in load_manifest(tmp_path / "late")] == [1.5, 1.0, 0.0]
    (tmp_path / "gs/audio/a.wav").unlink()
    assert len(run(tmp_path / "gs", tmp_path / "gone").problems) == 3


def test_gigaspeech_that_is_not(tmp_path):
    path = tmp_path / "GigaSpeech.json"
    for text, message in (
        ('{"a": 1}', "no list 'audios'"),
        ('{"audios": [{"aid": "A"}]}', r"recording A: no GigaSpeech metadata \(KeyError: 'segments'\)"),
        ('{"audios": [{"aid": "A"', "ends within 'audios', or not JSON"),
        ('{"audios": []}', "no recordings"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message) as error:
            run(path, tmp_path / "out")
        assert "\n" not in str(error.value)
    path.write_bytes(b'{"audios": [\xff')
    with pytest.raises(UserError, match="not UTF-8"):
        run(path, tmp_path / "out")


def parquet(path, **changes):
    path.parent.mkdir(exist_ok=True)
    clips = [write_clip(path.parent / "clips" / f"{i}.flac", i) for i in range(6)]
    columns = {
        "audio": [{"bytes": clip, "path": f"{i}.flac"} for i, clip in enumerate(clips)],
        "sentence": [f"sentence {i}" for i in range(6)],
        "speaker_id": list(range(6)),
        "words": [["a", "b"]] * 6,
        "history": [HISTORY] * 6,
        "other": [b"bytes"] * 6,
        "gender": [None, "f"] * 3,
        "raw": [f"Sentence {i}." for i in range(6)],
    } | changes
    table = pa.table({name: values for name, values in columns.items() if values is not None})
    pq.write_table(table, path, row_group_size=2)
    return clips


HISTORY = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hi."}]


def test_parquet(tmp_path):
    clips = parquet(tmp_path / "hf" / "train-00000-of-00002.parquet")
    parquet(tmp_path / "hf" / "train-00001-of-00002.parquet", audio=[{"bytes": c, "path": None} for c in clips])
    run(tmp_path / "hf", tmp_path / "out", n_processes=2, shard_bytes=30_000)
    rows = load_manifest(tmp_path / "out")
    assert [row.text for row in rows] == [f"sentence {i}" for i in range(6)] * 2
    assert list(rows[1].history) == HISTORY
    assert rows[1].id == "1.flac" and rows[1].extra == {
        "speaker_id": 1,
        "words": ["a", "b"],
        "gender": "f",
        "raw": "Sentence 1.",
    }
    assert rows[7].id == "train-00001-of-00002-1" and rows[6].extra == {
        "speaker_id": 0,
        "words": ["a", "b"],
        "raw": "Sentence 0.",
    }
    assert [audio_of(row) for row in rows] == clips * 2
    file = tmp_path / "hf" / "train-00001-of-00002.parquet"
    run(file, tmp_path / "named", text_column="raw")
    rows = load_manifest(tmp_path / "named")
    assert [row.text for row in rows] == [f"Sentence {i}." for i in range(6)]
    assert rows[0].extra["sentence"] == "sentence 0"


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        (
            {"audio": None},
            {},
            "no column 'audio' with bytes, but sentence, speaker_id, words, history, other, gender, raw: rename",
        ),
        ({"audio": [{"path": "a"}] * 6}, {}, "no column 'audio' with bytes"),
        ({"sentence": None}, {}, "no column of text with a usual name, but .*: name it with --text-column"),
        ({}, {"text_column": "speaker_id"}, "no column 'speaker_id' of text"),
        ({}, {"subset": "XS"}, "--subset XS is for GigaSpeech only"),
        ({"sentence": ["a", None] * 3}, {}, r"x.parquet: row 1: 'audio' without 'text' or 'response'"),
        ({"seconds": [-1.0] * 6}, {}, r"x.parquet: row 0: 'seconds' is -1.0: give a positive number"),
    ],
)
def test_parquet_mistakes(tmp_path, changes, options, message):
    parquet(tmp_path / "hf" / "x.parquet", **changes)
    with pytest.raises(UserError, match=message) as error:
        run(tmp_path / "hf", tmp_path / "out", **options)
    assert "\n" not in str(error.value)


def test_parquet_without_pyarrow_or_bytes(tmp_path, monkeypatch):
    clips = parquet(tmp_path / "x.parquet", audio=[{"bytes": b"", "path": "a"}, {"bytes": None, "path": "b"}] * 3)
    report = run(tmp_path / "x.parquet", tmp_path / "out")
    assert len(clips) == len(report.problems) == 6 and "row 1: no bytes in column 'audio'" in report.problems[1]
    (tmp_path / "y.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"y.parquet: not a parquet file"):
        run(tmp_path / "y.parquet", tmp_path / "out")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"needs pyarrow: pip install 'aura-jax\[parquet\]'"):
        run(tmp_path / "x.parquet", tmp_path / "out")


@pytest.fixture
def bucket():
    yield "memory://bucket/speech"
    fsspec.filesystem("memory").store.clear()


def test_a_bucket(manifest, tmp_path, bucket, monkeypatch):
    monkeypatch.setenv("AURA_JAX_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"memory://bucket/speech: no index.json in it"):
        load_manifest(bucket)
    run(manifest, bucket)
    run(manifest, tmp_path / "local")
    files = fsspec.filesystem("memory")
    assert {p.rpartition("/")[2]: files.cat_file(p) for p in files.ls("/bucket/speech", detail=False)} == contents(
        tmp_path / "local"
    )
    rows = load_manifest(bucket)
    assert rows[0].audio == f"{bucket}/shard-0000000.array_record#0"
    assert [audio_of(row) for row in rows] == [(tmp_path / "clips" / f"{i}.wav").read_bytes() for i in range(9)]
    assert len(list((tmp_path / "cache" / "shards").glob("*/*.array_record"))) == 4
    files.rm_file("/bucket/speech/shard-0000002.array_record")
    with pytest.raises(UserError, match=r"memory://bucket/speech/shard-0000002.array_record: no such file, but index"):
        load_manifest(bucket)
    assert run(manifest, bucket).n_kept == 3
    assert cli.main(["data", "validate", bucket]) == 0
    files.pipe_file("/bucket/speech/shard-0000001.array_record", b"x")
    with pytest.raises(UserError, match=r"shard-0000001.array_record: 1 bytes, not the"):
        load_manifest(bucket)


def test_file_addresses(manifest, tmp_path):
    run(manifest, f"file://{tmp_path}/out")
    assert load_manifest(f"file://{tmp_path}/out")[0].audio == f"{tmp_path}/out/shard-0000000.array_record#0"


def test_the_command(manifest, tmp_path, capsys, monkeypatch):
    (tmp_path / "clips" / "3.wav").write_bytes(b"")
    (tmp_path / "clips" / "4.wav").unlink()
    monkeypatch.chdir(tmp_path)
    assert cli.main(["data", "pack", "m.jsonl", "--output", "out", "--processes", "1"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "out: 1 shards, 9 rows, 0.00 hours, 2 clips cannot be read\n"
    assert "cannot be read: m.jsonl:4: empty, 0 bytes" in captured.err
    assert f"cannot be read: {tmp_path}/clips/4.wav: cannot be read (No such file or directory)" in captured.err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["none.jsonl", "--output", "out"],
            "none.jsonl: no such file or folder: give a manifest (JSON lines), a Libri",
        ),
        (["clips", "--output", "out"], "clips: nothing in it that can be packed: give a manifest"),
        (
            ["m.jsonl", "--output", "out", "--text-column", "x"],
            "--text-column x is for parquet files only: leave it out",
        ),
        (["m.jsonl", "--output", "out", "--shard-size", "0"], "--shard-size must be at least 1, not 0"),
        (["m.jsonl", "--output", "nix://a/b"], "nix://a/b: Protocol not known: nix: give another path"),
        (["m.jsonl", "--output", "m.jsonl/out"], "m.jsonl/out"),
        (["m.jsonl"], "--output"),
    ],
)
def test_mistakes_are_one_line(argv, message, manifest, capsys, monkeypatch):
    monkeypatch.chdir(manifest.parent)
    assert cli.main(["data", "pack", *argv]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1] and lines[-1].startswith("error: ") and sorted(os.listdir()) == ["clips", "m.jsonl"]


def test_shards_cannot_be_packed_again(manifest, tmp_path):
    run(manifest, tmp_path / "out")
    with pytest.raises(UserError, match="out: shards already"):
        run(tmp_path / "out", tmp_path / "again")
    assert not shards.is_shards(tmp_path / "again")
