"""Continuations: the LLM's own answers, whatever part, batch or call they come from."""

import json
import os
import signal
import subprocess
import sys

import pytest

from aura_jax import cli
from aura_jax.data.manifest import load_manifest
from aura_jax.errors import UserError
from aura_jax.infer import continuations
from aura_jax.infer.continuations import Part, write
from aura_jax.infer.generate import Generator
from aura_jax.infer.prompting import Request
from aura_jax.infer.sampling import Sampling

TEXTS = ("Turn on the lights.", "What is six plus two?", "Stop.", "Open the bedroom window, please.", "Thank you.")
HISTORY = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hello!"}]
PROMPT = "Continue the text."
DRAWN = Sampling(temperature=0.9, top_p=0.95, seed=5)


@pytest.fixture
def manifest(tmp_path):
    """Five speech rows around a text row, in a folder of their own."""
    (tmp_path / "in" / "clips").mkdir(parents=True)
    lines = [{"audio": f"clips/{i}.wav", "text": text, "voice": "anna"} for i, text in enumerate(TEXTS)]
    lines[1] |= {"prompt": "Write it down.", "response": "six plus two", "history": HISTORY, "id": "grüße"}
    lines[3]["audio"] = str(tmp_path / "in" / "clips" / "3.wav")
    lines.insert(2, {"prompt": "Why?", "response": "Because."})
    path = tmp_path / "in" / "mine.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def c(tiny_config):
    """A config whose teacher is nowhere: nobody may look for it."""
    c = tiny_config()
    c.model.teacher = "no/such/whisper"
    c.data.prompt = PROMPT
    c.eval.batch_size = 2
    return c


@pytest.fixture
def run(manifest, c, tmp_path):
    """Returns a function that writes continuations of the manifest; no progress bar."""
    return lambda name="out.jsonl", **how: write(str(manifest), tmp_path / name, c, progress=False, **how)


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def stop_after(monkeypatch, n_batches):
    """Interrupts the writing when so many batches are answered."""
    generate, answered = Generator.generate, []

    def stopping(*args):
        if len(answered) == n_batches:
            raise KeyboardInterrupt
        answered.append(args)
        return generate(*args)

    monkeypatch.setattr(Generator, "generate", stopping)


def test_the_responses_are_the_base_llm_s_and_all_else_stays(run, manifest, tiny_loaded, tmp_path):
    report = run()
    old, new = rows_of(manifest), rows_of(tmp_path / "out.jsonl")
    assert new[2] == old[2] and len(new) == 6
    speech = [0, 1, 3, 4, 5]
    requests = [Request(transcript=old[i]["text"], prompt=PROMPT, history=old[i].get("history", ())) for i in speech]
    expected = Generator(*tiny_loaded).generate(requests)
    for place, reply in zip(speech, expected, strict=True):
        # One that was cut inside a character is without the half of it.
        said = reply.text if reply.ended else reply.text.rstrip("\ufffd")
        assert new[place]["response"] == said and new[place]["prompt"] == PROMPT
        assert new[place]["ended"] is reply.ended
        mine = lambda row: {k: v for k, v in row.items() if k not in ("audio", "prompt", "response", "ended")}
        assert mine(new[place]) == mine(old[place])
    assert [row.audio for row in load_manifest(tmp_path / "out.jsonl")] == [r.audio for r in load_manifest(manifest)]
    assert new[0]["audio"] == "in/clips/0.wav" and new[4]["audio"] == old[4]["audio"]
    assert report.n_responses == 5 and report.n_others == 1 and report.n_kept == 0
    assert report.n_cut == sum(not reply.ended for reply in expected)
    assert any(reply.text.endswith("\ufffd") and not reply.ended for reply in expected)
    assert "5 responses" in report.summary and "1 rows without audio" in report.summary


def test_a_stopped_call_goes_on(run, tmp_path, monkeypatch):
    run("whole.jsonl", sampling=DRAWN)
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            run(sampling=DRAWN)
    part = tmp_path / "out.1-of-1.jsonl"
    assert not (tmp_path / "out.jsonl").exists() and len(rows_of(part)) == 1 + 2
    with part.open("ab") as file:  # a kill in the middle of a line
        file.write(b'{"row": 4, "resp')
    report = run(sampling=DRAWN)
    assert report.n_kept == 2 and report.n_responses == 5 and "(2 of them were there)" in report.summary
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    # A call more has nothing to do, and loads nothing.
    monkeypatch.setattr(continuations, "_load", None)
    (tmp_path / "out.jsonl").unlink()
    assert run(sampling=DRAWN).n_kept == 5
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


_KILLED = """
import os, signal, sys
from aura_jax import cli
from aura_jax.infer.generate import Generator

generate = Generator.generate
def killing(self, requests, progress, sampling):
    if killing.calls:
        os.kill(os.getpid(), signal.SIGKILL)
    killing.calls += 1
    return generate(self, requests, progress, sampling)
killing.calls = 0
Generator.generate = killing
cli.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_killed_process_goes_on(manifest, tiny_llm_dir, tmp_path):
    argv = ["data", "continue", str(manifest), "--llm", str(tiny_llm_dir), "--prompt", PROMPT, "--max-new-tokens", "8"]
    argv += ["--config.eval.batch_size=2", "--temperature", "0.9", "--seed", "5", "--output"]
    killed = subprocess.run([sys.executable, "-c", _KILLED, *argv, str(tmp_path / "out.jsonl")], env=os.environ)
    assert killed.returncode == -signal.SIGKILL
    assert len(rows_of(tmp_path / "out.1-of-1.jsonl")) == 1 + 2
    assert cli.main([*argv, str(tmp_path / "out.jsonl")]) == cli.main([*argv, str(tmp_path / "whole.jsonl")]) == 0
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_parts_joined_are_one_whole_run(run, c, manifest, tmp_path, monkeypatch):
    run("whole.jsonl", sampling=DRAWN)
    assert run(sampling=DRAWN, part=Part(2, 2)).summary.startswith(f"{tmp_path / 'out.2-of-2.jsonl'}: 2 responses")
    with pytest.raises(UserError, match=r"out\.1-of-2\.jsonl: 0 of 3 rows: first finish it with --shard 1/2"):
        run(sampling=DRAWN)
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            run(sampling=DRAWN, part=Part(1, 2))
    with pytest.raises(UserError, match=r"out\.1-of-2\.jsonl: 2 of 3 rows: first finish"):
        run(sampling=DRAWN)
    assert run(sampling=DRAWN, part=Part(1, 2)).n_kept == 2
    monkeypatch.setattr(continuations, "_load", None)  # joining loads nothing
    assert run(sampling=DRAWN).n_responses == 5
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"parts of 2 and of 3: remove those that are not wanted"):
        run(sampling=DRAWN, part=Part(1, 3))
    # Parts of another LLM's weights under the same name are not joined.
    second = tmp_path / "out.2-of-2.jsonl"
    head, *rest = second.read_text().splitlines()
    second.write_text("\n".join([json.dumps({**json.loads(head), "weights": "00000000"}), *rest]) + "\n")
    with pytest.raises(UserError, match=r"out\.2-of-2\.jsonl: written with another LLM's weights"):
        run(sampling=DRAWN)


def test_what_is_there_must_be_of_the_same_making(run, c, manifest, tmp_path, monkeypatch):
    run(limit=2)
    assert len(rows_of(tmp_path / "out.jsonl")) == 2
    monkeypatch.setattr(continuations, "_load", None)  # said before anything is loaded
    for how, match in (
        (dict(limit=1), r"out.1-of-1.jsonl: written with another input \(MANIFEST or --limit\) \(\"2 rows, "),
        (dict(limit=2, prompt="Go on."), r'another prompt \("Continue the text.", now "Go on."\): name another --out'),
        (dict(limit=2, sampling=DRAWN), r"another sampling \(.*\"temperature\": 0.0"),
        (dict(limit=2, max_new_tokens=3), r"another --max-new-tokens \(8, now 3\)"),
    ):
        with pytest.raises(UserError, match=match):
            run(**how)
    c.model.llm = "another/llm"
    with pytest.raises(UserError, match=r"another LLM \(.*another/llm"):
        run(limit=2)
    (tmp_path / "out.1-of-1.jsonl").unlink()
    with pytest.raises(UserError, match=r"out\.jsonl: there already, and no part of it"):
        run(limit=2)
    with pytest.raises(UserError, match="the manifest itself"):
        write(str(manifest), manifest, c)
    (tmp_path / "other.1-of-1.jsonl").write_text('{"audio": "clip.wav", "text": "Hello."}\n')
    with pytest.raises(UserError, match=r"other\.1-of-1\.jsonl:1: damaged, or no part"):
        run("other.jsonl")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "mine.jsonl: an empty manifest"),
        ('{"audio": "clips/a.wav", "text": "  "}', r"mine.jsonl:1: 'text' is empty: add what is said"),
        ('{"audio": "clips/a.wav", "response": "Yes."}', r"mine.jsonl:1: a speech row without 'text'"),
        ('{"audio": "clips/a.wav"}', r"mine.jsonl:1: 'audio' without 'text' or 'response'"),
        ('{"text": "Prose."}', "mine.jsonl: no row with 'audio'"),
    ],
)
def test_manifests_that_will_not_do(run, manifest, tmp_path, text, match):
    manifest.write_text(text + "\n")
    with pytest.raises(UserError, match=match):
        run()
    assert {path.name for path in tmp_path.iterdir()} == {"in"}


def test_the_verb(manifest, tiny_llm_dir, tmp_path, capsys):
    out = tmp_path / "new" / "out.jsonl"
    argv = ["data", "continue", str(manifest), "--output", str(out), "--limit", "2", "--config.eval.batch_size=2"]
    assert cli.main([*argv, "--llm", "no/such/model"]) == 2
    assert "no/such/model" in capsys.readouterr().err and not list(out.parent.iterdir())
    argv += ["--llm", str(tiny_llm_dir), "--prompt", PROMPT, "--max-new-tokens", "8"]
    assert cli.main([*argv, "--config.model.dtype=float23"]) == 2
    assert "unknown model.dtype 'float23'" in capsys.readouterr().err
    assert cli.main([*argv, "--shard", "1/2"]) == cli.main([*argv, "--shard", "2/2"]) == cli.main(argv) == 0
    assert f"{out}: 2 responses" in capsys.readouterr().out
    assert all(row["prompt"] == PROMPT and "response" in row for row in rows_of(out))
