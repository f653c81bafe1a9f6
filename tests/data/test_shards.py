"""Folders of shards: the same batches as from files, and what each kind of damage is told."""

import json

import numpy as np
import pytest
import soundfile
from transformers import AutoTokenizer

from aura_jax import cli
from aura_jax.audio import records
from aura_jax.audio.io import load_audio
from aura_jax.data import shards, validate
from aura_jax.data.batch import Part
from aura_jax.data.manifest import clip_samples, load_manifest
from aura_jax.data.pack import pack
from aura_jax.data.pipeline import make_dataset
from aura_jax.data.plan import BatchPlan
from aura_jax.data.prompts import CHATML, ChatFormat
from aura_jax.data.sources import make_source
from aura_jax.errors import UserError

FORMATS = ("wav", "flac", "ogg", "mp3")


@pytest.fixture(scope="module")
def chat(tiny_llm_dir):
    return ChatFormat(AutoTokenizer.from_pretrained(tiny_llm_dir), CHATML)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """Clips of several formats, rates and channels, with and without 'seconds', bad ones, and text-only rows."""
    folder = tmp_path_factory.mktemp("files")
    rng, lines = np.random.default_rng(0), []
    for i in range(12):
        rate = (16000, 8000, 44100)[i % 3]
        clip = 0.1 * rng.standard_normal((round(rate * rng.uniform(0.2, 0.9)), 1 + i % 2))
        name = f"{i}.{FORMATS[i % 4]}"
        soundfile.write(folder / name, clip, rate)
        line = {"audio": name, "text": f"clip number {i}, às", "voice": f"v{i % 2}"}
        lines.append({**line, "seconds": round(len(clip) / rate, 3)} if i % 5 == 0 else line)
    soundfile.write(folder / "3.mp3", np.zeros(0), 16000, format="WAV")
    (folder / "4.wav").unlink()
    (folder / "5.flac").write_bytes(b"not audio")
    lines.insert(3, {"prompt": "Two and two?", "response": "Four.", "id": 7})
    lines.insert(5, {"text": "Once upon a time\u2028there was a clip."})
    lines += [{"audio": "0.wav", "response": "A tone.", "prompt": "What is it?", "history": []}]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return folder / "train.jsonl"


@pytest.fixture(scope="module")
def packed(manifest, tmp_path_factory):
    """The manifest in several shards."""
    folder = tmp_path_factory.mktemp("packed") / "shards"
    report = pack([str(manifest)], str(folder), shard_bytes=60_000, progress=False)
    assert report.n_shards >= 3 and report.n_kept == 0 and report.n_rows == 15 and len(report.problems) == 3
    assert "15 rows" in report.summary and "3 clips cannot be read" in report.summary
    return folder


def make_plan(sources, **changes) -> BatchPlan:
    arguments = {
        "batch_size": 4,
        "bucket_seconds": (0.5, 1.1),
        "token_rate": 12.5,
        "speeds": (0.9, 1.0, 1.1),
        "seed": 3,
    }
    return BatchPlan([s.lengths for s in sources], **(arguments | changes))


def batches(rows, chat, tmp_path, n=6, **options):
    sources = [make_source(rows, chat)]
    with make_dataset(sources, make_plan(sources), quarantine=tmp_path / "q.jsonl", **options) as dataset:
        return [next(dataset) for _ in range(n)]


def assert_same(ones, others) -> None:
    for (i, one), (j, other) in zip(ones, others, strict=True):
        assert i == j
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a, b)


def test_rows_are_those_of_the_manifest(manifest, packed):
    rows, others = load_manifest(manifest), load_manifest(packed)
    assert [r.audio for r in load_manifest(packed / "index.json")] == [r.audio for r in others]
    for row, other in zip(rows, others, strict=True):
        kept = ("id", "text", "prompt", "response", "seconds", "history", "extra")
        assert [getattr(row, key) for key in kept] == [getattr(other, key) for key in kept]
        assert (row.audio is None) == (other.audio is None) and str(packed) in other.where
    assert clip_samples(rows) == clip_samples(others)
    for row, other in zip(rows, others, strict=True):
        if row.id in ("0.wav", "1.flac", "2.ogg", "7.mp3"):
            np.testing.assert_array_equal(load_audio(row.audio), load_audio(other.audio))


def test_batches_are_bit_identical(manifest, packed, chat, tmp_path):
    wanted = batches(load_manifest(manifest), chat, tmp_path, n_threads=1)
    rows = load_manifest(packed)
    assert_same(batches(rows, chat, tmp_path / "a", n_threads=1), wanted)
    assert_same(batches(rows, chat, tmp_path / "b", n_threads=3, cache_bytes=0), wanted)
    assert_same(batches(rows, chat, tmp_path / "c", n_workers=2, n=3), wanted[:3])
    lists = [(tmp_path / name / "q.jsonl").read_text().splitlines() for name in (".", "a")]
    assert len(lists[0]) == len(lists[1]) == 3
    assert all(".array_record#" in json.loads(line)["audio"] for line in lists[1])


def test_a_host_reads_the_records_of_its_rows_only(packed, chat, tmp_path, monkeypatch):
    rows = load_manifest(packed)
    sources = [make_source(rows, chat)]
    plan = make_plan(sources, sequential=True, speeds=(1.0,))
    original = records.read
    for part in (Part((0,), 2), Part((1,), 2)):
        read = []
        monkeypatch.setattr(records, "read", lambda source, read=read: read.append(source) or original(source))
        with make_dataset(sources, plan, part=part, quarantine=tmp_path / "q.jsonl") as dataset:
            assert len(list(dataset)) == plan.n_batches
        examples = [plan.batch(i, part).examples for i in range(plan.n_batches)]
        mine = [rows[pick.row].audio for batch in examples for picks in batch for pick in picks]
        assert sorted(read) == sorted(audio for audio in mine if audio)


def copy(packed, tmp_path):
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in packed.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def cut(path, n):
    path.write_bytes(path.read_bytes()[:n])


def edit_index(folder, **changes):
    path = folder / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def shrink_index(folder):
    """An index that agrees with a shard whose end is missing."""
    path = folder / "shard-0000001.array_record"
    cut(path, path.stat().st_size // 2)
    index = json.loads((folder / "index.json").read_text())
    index["shards"][1]["bytes"] = path.stat().st_size
    edit_index(folder, **index)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (
            lambda f: (f / "shard-0000001.array_record").unlink(),
            "shard-0000001.array_record: no such file, but index.j",
        ),
        (lambda f: (f / "shard-0000002.jsonl").unlink(), r"shard-0000002.jsonl: no such file, but index.json names it"),
        (
            lambda f: cut(f / "shard-0000001.array_record", 999),
            r"shard-0000001.array_record: 999 bytes, not the \d+ of",
        ),
        (lambda f: cut(f / "shard-0000001.jsonl", 50), "shard-0000001.jsonl: not the lines that index.json has the"),
        (shrink_index, "shard-0000001.array_record: not a whole shard: delete it, and run `aura-jax data pack` again"),
        (lambda f: (f / "index.json").unlink(), "copy: no index.json in it: name a manifest, or a"),
        (lambda f: edit_index(f, version=2), r"index.json: version 2, and this aura-jax reads version 1: pack again"),
        (lambda f: edit_index(f, shards=[{"name": "a"}]), "index.json: damaged"),
        (lambda f: edit_index(f, format="x"), "index.json: not an index of shards"),
        (lambda f: cut(f / "index.json", 40), "index.json: not JSON"),
    ],
)
def test_damage_is_told_in_one_line(packed, tmp_path, harm, message):
    folder = copy(packed, tmp_path)
    harm(folder)
    with pytest.raises(UserError, match=message) as error:
        load_manifest(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_a_shard_that_vanishes_stops_and_a_damaged_record_is_left_out(packed, chat, tmp_path):
    folder = copy(packed, tmp_path)
    rows = load_manifest(folder)
    row = next(row for row in rows if row.id == "0.wav")
    path = folder / "shard-0000000.array_record"
    data = bytearray(path.read_bytes())
    data[len(data) // 8] ^= 1  # in the middle of the first clip
    path.write_bytes(data)
    with pytest.raises(
        UserError, match=r"shard-0000000.array_record#0: a damaged record \(Corrupted .*pack the shard ag"
    ):
        load_audio(row.audio)
    batches(rows, chat, tmp_path)
    assert "a damaged record" in (tmp_path / "q.jsonl").read_text()
    path.unlink()
    with pytest.raises(UserError, match=r"shard-0000000.array_record: no such shard"):
        batches(rows, chat, tmp_path)
    with pytest.raises(UserError, match=r"shard-0000001.array_record: \d records, and number 99 is not among them"):
        load_audio(str(folder / "shard-0000001.array_record#99"))


def test_validate(packed, tmp_path, capsys):
    folder = copy(packed, tmp_path)
    report = validate.check(packed, decode=True, progress=False)
    assert report.n_rows == 15 and report.n_clips == 13 and len(report.problems) == 3
    path = folder / "shard-0000001.array_record"
    data = bytearray(path.read_bytes())
    data[-100_000 % len(data)] ^= 1
    path.write_bytes(data)
    assert cli.main(["data", "validate", str(folder)]) == 2
    errors = capsys.readouterr().err
    assert f"error: {path}: not the checksum of index.json: copy it again, or delete it and run" in errors


def test_a_folder_is_known_from_a_manifest(packed, manifest):
    assert shards.is_shards(packed) and shards.is_shards(f"{packed}/index.json") and shards.is_shards("gs://bucket/a")
    assert not shards.is_shards(manifest) and not shards.is_shards("nowhere.jsonl")


def test_a_manifest_may_name_records(packed, tmp_path):
    lines = (packed / "shard-0000000.jsonl").read_text().strip().split("\n")
    values = json.loads(lines[0])
    values["audio"] = f"{packed}/{values['audio']}"
    (tmp_path / "m.jsonl").write_text(json.dumps(values))
    (row,) = load_manifest(tmp_path / "m.jsonl")
    assert len(load_audio(row.audio)) > 0 and len(load_manifest(packed / "shard-0000000.jsonl")) == len(lines)
