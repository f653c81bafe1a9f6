"""Transcripts: what Whisper hears of each clip, whatever part, batch or call it comes from."""

import functools
import json

import numpy as np
import pytest
import soundfile
from transformers import AutoTokenizer

from aura_jax import cli
from aura_jax.audio.io import load_audio
from aura_jax.audio.pauses import cut_in_pauses
from aura_jax.data.manifest import load_manifest
from aura_jax.data.pack import pack
from aura_jax.data.prompts import CHATML, ChatFormat
from aura_jax.data.sources import make_source
from aura_jax.errors import UserError
from aura_jax.infer import continuations, transcripts
from aura_jax.infer.generate import Reply
from aura_jax.infer.parts import Part
from aura_jax.infer.prompting import Request
from aura_jax.infer.transcriber import Transcriber

SECOND = 16000
SAMPLES = {"a": 4000, "b": 5000, "long": 40000, "silent": 8000, "c": 6000}


@pytest.fixture
def manifest(tmp_path):
    """Five clips to be heard, around a transcribed one and a text: two short, one long, a silent and a broken one."""
    clips = tmp_path / "in" / "clips"
    clips.mkdir(parents=True)
    for name, n in SAMPLES.items():
        noise = 0.1 * np.random.default_rng(n).standard_normal(n)
        soundfile.write(clips / f"{name}.wav", noise * (name != "silent"), SECOND)
    (clips / "broken.wav").write_bytes(b"no audio")
    lines = [
        {"audio": "clips/a.wav", "voice": "anna"},
        {"audio": "clips/b.wav", "text": "Keep me."},
        {"text": "A text, which is no speech."},
        {"audio": str(clips / "long.wav"), "prompt": "Why?", "response": "Because.", "id": "grüße"},
        {"audio": "clips/silent.wav"},
        {"audio": "clips/broken.wav"},
        {"audio": "clips/c.wav", "text": " "},
    ]
    path = tmp_path / "in" / "mine.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(autouse=True)
def one_second(monkeypatch):
    """Whisper's window is 1 s, to be quick."""
    monkeypatch.setattr(transcripts, "Transcriber", functools.partial(Transcriber, window_seconds=1, max_new_tokens=4))


@pytest.fixture
def hears_lengths(monkeypatch):
    """A Whisper that hears how many samples there are, nothing in silence, and comes to no end with 4000."""

    def generate(self, requests):
        clips = [request.waveform for request in requests]
        assert all(len(clip) <= SECOND for clip in clips)
        return [Reply(f"{len(clip)}." if clip.any() else "", (), len(clip) != 4000, 0.0) for clip in clips]

    monkeypatch.setattr(Transcriber, "generate", generate)


@pytest.fixture
def run(manifest, tiny_whisper_dir, tmp_path, hears_lengths):
    """Returns a function that writes transcripts of the manifest; no progress bar."""
    how = {"whisper": str(tiny_whisper_dir), "batch_size": 2, "progress": False}
    return lambda name="out.jsonl", **more: transcripts.write(str(manifest), tmp_path / name, **(how | more))


def interrupt():
    raise KeyboardInterrupt


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_verb_writes_what_whisper_hears_and_leaves_the_rest(manifest, tiny_whisper_dir, tmp_path, capsys):
    out = tmp_path / "new" / "out.jsonl"
    argv = ["data", "transcribe", str(manifest), "--output", str(out), "--batch-size", "1"]
    assert cli.main([*argv, "--whisper", str(tiny_whisper_dir)]) == 0
    printed = capsys.readouterr()
    assert f"{out}: 4 transcripts" in printed.out and "2 rows as they were" in printed.out
    assert f"cannot be read: {manifest}:6: {manifest.parent}/clips/broken.wav" in printed.err

    transcriber = transcripts.Transcriber(tiny_whisper_dir, batch_size=1)
    old, new = rows_of(manifest), rows_of(out)
    del old[5]
    assert [row.get("id") for row in new] == [row.get("id") for row in old] and new[2] == old[2]
    for before, after in zip(old, new, strict=True):
        if (before.get("text") or "").strip():
            assert after["text"] == before["text"]
        else:
            wave_S = load_audio(manifest.parent / before["audio"])
            pieces = [Request(wave_S[a:b]) for a, b in cut_in_pauses(wave_S, SECOND)]
            assert after["text"] == " ".join(reply.text for reply in transcriber.generate(pieces)) != ""
        assert {**after, "text": 0, "audio": 0} == {**before, "text": 0, "audio": 0}
    assert new[0]["audio"] == "../in/clips/a.wav" and new[3]["audio"] == old[3]["audio"]
    assert load_manifest(out)[1].audio == str(manifest.parent / "clips" / "b.wav")


def test_a_stopped_call_goes_on_and_parts_joined_are_one_whole_run(run, tmp_path, monkeypatch):
    report = run("whole.jsonl")
    whole = (tmp_path / "whole.jsonl").read_bytes()
    texts = [row["text"] for row in rows_of(tmp_path / "whole.jsonl")]
    assert [texts[i] for i in (0, 1, 2, 4)] == ["4000.", "Keep me.", "A text, which is no speech.", "6000."]
    heard = [int(n) for n in texts[3].replace(".", "").split()]
    assert len(heard) > 2 and sum(heard) == SAMPLES["long"]
    assert report.summary.endswith(
        "whole.jsonl: 3 transcripts, 1 cut at the longest length; left out: 1 clips in which nothing was heard; "
        "left out: 1 that cannot be read; 2 rows as they were"
    )

    with monkeypatch.context() as patch:
        generate, calls = Transcriber.generate, iter([True])
        patch.setattr(Transcriber, "generate", lambda *args: generate(*args) if next(calls, False) else interrupt())
        with pytest.raises(KeyboardInterrupt):
            run()
    part = tmp_path / "out.1-of-1.jsonl"
    assert [row["row"] for row in rows_of(part)[1:]] == [0, 3]
    with part.open("ab") as file:  # a kill in the middle of a line
        file.write(b'{"row": 4, "te')
    assert run().n_kept == 2
    assert (tmp_path / "out.jsonl").read_bytes() == whole

    assert run("shared.jsonl", part=Part(2, 2)).summary.endswith(
        "shared.2-of-2.jsonl: 1 transcripts; left out: 1 that cannot be read"
    )
    with pytest.raises(UserError, match=r"shared\.1-of-2\.jsonl: 0 of 3 rows: first finish it with --shard 1/2"):
        run("shared.jsonl")
    run("shared.jsonl", part=Part(1, 2))
    monkeypatch.setattr(transcripts, "_load", None)  # joining loads nothing
    run("shared.jsonl")
    assert (tmp_path / "shared.jsonl").read_bytes() == whole
    for how, match in (
        (dict(anew=True), r"another choice of rows \(--all\) \(false, now true\): name another --output"),
        (dict(language="en"), r'another --language \(null, now "en"\)'),
        (dict(whisper="another/whisper"), r"another Whisper \("),
    ):
        with pytest.raises(UserError, match=match):
            run("shared.jsonl", **how)
    # Parts of another kind are not taken for these.
    (tmp_path / "out.1-of-1.jsonl").write_text('{"format": "aura-jax continuations"}\n')
    with pytest.raises(UserError, match=r'another format \("aura-jax continuations", now "aura-jax transcripts"\)'):
        run()


def test_all_writes_the_texts_anew(run, tmp_path):
    run(anew=True, limit=2)
    assert [row["text"] for row in rows_of(tmp_path / "out.jsonl")] == ["4000.", "5000."]


def test_shards_are_heard_as_files_are(manifest, run, tiny_whisper_dir, tmp_path):
    answer = json.dumps({"audio": "clips/b.wav", "prompt": "Why?", "response": "Because."})
    manifest.write_text(answer + "\n")
    pack([str(manifest)], str(tmp_path / "shards"), progress=False)
    transcripts.write(str(tmp_path / "shards"), tmp_path / "out.jsonl", str(tiny_whisper_dir), progress=False)
    (row,) = load_manifest(tmp_path / "out.jsonl")
    assert (row.text, row.response, len(load_audio(row.audio))) == ("5000.", "Because.", 5000)


@pytest.mark.parametrize(
    ("line", "how", "match"),
    [
        ({"text": "Prose."}, {}, "mine.jsonl: no row with 'audio'"),
        ({"audio": "clips/a.wav", "text": "A."}, {}, "mine.jsonl: every speech row has its 'text': add --all"),
        ({"audio": "nowhere/a.wav"}, {}, "mine.jsonl:1: the folder .*nowhere of 'audio' does not exist"),
        ({"audio": "clips/a.wav"}, {"batch_size": 0}, "--batch-size must be at least 1, not 0"),
        ({"audio": "clips/a.wav"}, {"limit": 0}, "--limit must be at least 1, not 0"),
    ],
)
def test_what_will_not_do_is_said_before_anything_is_loaded(run, manifest, tmp_path, monkeypatch, line, how, match):
    monkeypatch.setattr(transcripts, "_load", None)
    manifest.write_text(json.dumps(line) + "\n")
    with pytest.raises(UserError, match=match):
        run(**how)
    assert {path.name for path in tmp_path.iterdir()} == {"in"}


def test_whoever_lacks_a_transcript_is_told_how_to_get_it(manifest, tiny_config, tiny_llm_dir, tmp_path):
    told = r"mine\.jsonl:1: .*let `aura-jax data transcribe` write it down"
    with pytest.raises(UserError, match=told):  # what `data.train` names
        load_manifest(manifest)
    manifest.write_text(json.dumps({"audio": "clips/a.wav", "response": "Because."}) + "\n")
    chat = ChatFormat(AutoTokenizer.from_pretrained(tiny_llm_dir), CHATML)
    with pytest.raises(UserError, match=told):  # what objectives read
        make_source(load_manifest(manifest), chat, transcripts=True)
    manifest.write_text(json.dumps({"audio": "clips/a.wav", "text": "Why?"}) + "\n")
    with pytest.raises(UserError, match=r"mine\.jsonl:1: .*let `aura-jax data continue` write what the LLM"):
        make_source(load_manifest(manifest), chat, transcripts=True, responses=True)
    for text in (None, " "):
        manifest.write_text(json.dumps({"audio": "clips/a.wav", "response": "Because.", "text": text}) + "\n")
        with pytest.raises(UserError, match=told):
            continuations.write(str(manifest), tmp_path / "out.jsonl", tiny_config())
