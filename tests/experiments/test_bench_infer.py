"""`bench infer`: what stops a measurement, which arms there are, and the whole of it on random tiny models."""

import dataclasses
import importlib.util
import itertools
import json
import random
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from aura_jax import cli, config, system
from aura_jax.experiments.bench import infer, infer_case, infer_report

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def workdir(tiny_loaded, write_workdir, sample_data, tmp_path_factory) -> Path:
    """A run of the random models whose test set is three clips."""
    folder = tmp_path_factory.mktemp("infer")
    lines = (sample_data / "commands" / "test_new_voices.jsonl").read_text().splitlines()[:3]
    rows = [json.loads(line) for line in lines]
    rows = [row | {"audio": str(sample_data / "commands" / row["audio"])} for row in rows]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    built, variables = tiny_loaded
    c = built.config.copy_and_resolve_references()
    with c.ignore_type():
        c.eval.sets = {"rows": str(folder / "rows.jsonl")}
    return write_workdir(dataclasses.replace(built, config=c), variables, folder / "run")


def mistake(capsys, *arguments: str) -> str:
    assert cli.main(["bench", "infer", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_what_is_missing_is_said_before_anything_starts(workdir, tiny_workdir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    run, output = ["--workdir", str(workdir)], ["--output", str(tmp_path / "infer.json")]
    alone = [*run, *output, "--peers", "none"]
    assert "add --workdir RUN" in mistake(capsys)
    assert "drop --config.lora.rank=4" in mistake(capsys, *alone, "--config.lora.rank=4")
    assert "unknown peer 'lama.cpp': did you mean 'llama.cpp'?" in mistake(capsys, *run, *output, "--peers", "lama.cpp")
    assert "a figure is an .svg or a .png" in mistake(capsys, *alone, "--figure", "x.pdf")
    assert "no run is in it" in mistake(capsys, "--workdir", str(tmp_path), *output, "--peers", "none")
    assert "eval.sets is empty" in mistake(capsys, "--workdir", str(tiny_workdir), *output, "--peers", "none")
    assert "keeps no encoder, so it is no bridge" in mistake(capsys, *alone, "--bridge", str(workdir))
    assert "hears whole clips only: train configs/" in mistake(capsys, *alone, "--streaming", str(workdir))
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llama_cpp" else real(name))
    monkeypatch.setattr(infer, "_PACKAGES", infer._PACKAGES | {"llama.cpp": (("llama_cpp", "peers"),)})
    line = mistake(capsys, *run, *output, "--peers", "llama.cpp")
    assert line.endswith('needs llama_cpp: pip install -e ".[peers]", or leave it out of --peers')
    monkeypatch.chdir(tmp_path)
    assert "run this from the root of the repository" in mistake(capsys, *run, *output, "--peers", "torch")


def test_bridges_and_llms_that_a_peer_cannot_read_are_refused(workdir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    c = config.from_json(workdir / "config.json")
    c.model.encoder, c.model.teacher = c.model.teacher, ""
    (tmp_path / "config.json").write_text(config.to_json(c))
    line = mistake(capsys, "--workdir", str(tmp_path), "--output", str(tmp_path / "x.json"), "--peers", "none")
    assert "it keeps an encoder: name it by --bridge" in line


def test_arms_are_those_that_the_run_and_the_peers_allow(workdir, monkeypatch):
    silence = {"seconds": 3.0, "windows": [4.0], "wer": {}}
    files = {name: name for name in ("llm", "whisper", "ctranslate2", "export", *infer._GGUF)}
    names = lambda peers, found: [arm.name for arm in infer.speech_arms(workdir, workdir, workdir, peers, found, files)]
    own = ["AuRA merged", "AuRA", "AuRA streaming, merged", "bridge", "cascade, 30 s window"]
    assert names([], None) == own
    assert names(["torch", "hf"], silence) == [
        *own,
        "cascade, 3 s of silence",
        "torch Whisper + torch LLM",
        "AuRA, our export in torch",
    ]
    c = config.from_json(workdir / "config.json")
    c.model.matmul_dtype = "bfloat16"
    monkeypatch.setattr(infer, "_config", lambda _: c)
    rounded = ("AuRA merged, blocks in bfloat16", "cascade, 30 s window, blocks in bfloat16")
    assert names([], None) == [*own[:2], rounded[0], *own[2:], rounded[1]]
    decode = [arm.name for arm in infer.decode_arms(c, infer.Plan().dtypes, infer.PEERS, files)]
    assert set(infer.EQUAL) | set(infer.EQUAL.values()) < set(decode)


def test_arms_take_turns_in_orders_that_are_drawn(monkeypatch):
    monkeypatch.setattr(infer, "_REST", 0.0)
    asked = []
    running = [infer.Running(infer.Arm(name, (), {}), name, {}, {}) for name in "abc"]
    found = infer.take_turns(running, 6, lambda worker: asked.append(worker) or len(asked), random.Random(0))
    rounds = ["".join(asked[i : i + 3]) for i in range(0, 18, 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds) and len(set(rounds)) > 2
    assert found["a"] == [3 * i + one.index("a") + 1 for i, one in enumerate(rounds)]


def test_gguf_matrices_are_the_runs_own(tiny_llm_dir, tmp_path):
    import gguf
    import gguf_file
    from safetensors.numpy import load_file

    from aura_jax.convert.gguf import unpermute_rope

    wanted = load_file(tiny_llm_dir / "model.safetensors")
    for kind, most in (("F32", 0.0), ("BF16", 0.01), ("Q8_0", 0.01), ("Q4_1", 0.1)):
        gguf_file.write(tiny_llm_dir, tmp_path / kind, kind)
        found = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(tmp_path / kind).tensors}
        assert len(found) == len(wanted)
        for name, key, n_heads in (
            ("blk.1.attn_q.weight", "model.layers.1.self_attn.q_proj.weight", 4),
            ("blk.3.attn_k.weight", "model.layers.3.self_attn.k_proj.weight", 2),
        ):
            q = unpermute_rope(found[name], n_heads)
            assert np.abs(q - wanted[key]).max() <= most * np.abs(wanted[key]).max()
        assert np.array_equal(found["output_norm.weight"], wanted["model.norm.weight"])


def test_a_peer_that_dies_is_left_out(tmp_path):
    died = (sys.executable, "-c", "import sys; sys.exit('no such instruction')")
    left_out = []
    case = infer_case.Case(tmp_path, {}, (), 0.0)
    with infer.started([infer.Arm("theirs", died, {})], case, "1", tmp_path, left_out) as running:
        assert running == []
    assert left_out == ["theirs: died: no such instruction"]


class FakeWhisper:
    """What faster-whisper offers."""

    def __init__(self, directory, **options):
        assert options == {"device": "cpu", "compute_type": "int8", "cpu_threads": infer_case.machine.n_cores()}

    def transcribe(self, waveform, **options):
        assert options["max_new_tokens"] == 7 and options["beam_size"] == 1
        return [types.SimpleNamespace(text=f" heard {len(waveform)}"), types.SimpleNamespace(text=" samples")], None


class FakeLlama:
    """What llama-cpp-python offers: it writes the length of its prompt, and that plus 1, 2, ..."""

    def __init__(self, model_path, **options):
        self.prompts, self.clean = [], False

    def reset(self):
        self.clean = True

    def generate(self, prompt, temp, repeat_penalty):
        assert self.clean and temp == 0.0  # nothing of an earlier prompt is used again
        self.clean = False
        self.prompts.append(prompt)
        return itertools.count(len(prompt))


def test_a_peer_reads_the_transcript_in_the_runs_own_prompt(workdir, tmp_path, monkeypatch):
    import infer_worker

    monkeypatch.setitem(sys.modules, "faster_whisper", types.SimpleNamespace(WhisperModel=FakeWhisper))
    monkeypatch.setitem(sys.modules, "llama_cpp", types.SimpleNamespace(Llama=FakeLlama))
    built = system.build(config.from_json(workdir / "config.json"))
    case = infer_case.write(built, (1.0,), 2, 2, 7, 64, tmp_path / "case")
    assert case.tests == case.batch == ("test 0", "test 1") == tuple(case.sets["rows"]) and case.seconds > 1
    assert all(case.sets["rows"].values())
    (tmp_path / "model.gguf").write_bytes(b"12345")
    arm, options = (
        infer_worker.Arm(),
        {"compute_type": "int8", "whisper": "w", "directory": str(tmp_path / "model.gguf")},
    )
    about = arm.load(str(case.directory), hears="faster-whisper", answers="llama.cpp", **options)
    assert about["weight_bytes"] == 5 and about["batch"] == 1
    assert arm.answer("1", 3)["seconds"] > 0 and arm.batch(2)["seconds"] > 0
    said = "heard 16000 samples"
    before, after = built.chat.encode(built.config.data.prompt, has_audio=True)
    llama = arm._answers._model
    assert llama.prompts[0] == [*before, *built.chat.text(said), *after] and len(llama.prompts) == 3
    assert arm.hear(["1"]) == {"texts": [said]}
    alone = infer_worker.Arm()
    alone.load(str(case.directory), hears=None, answers="llama.cpp", directory=options["directory"])
    alone.answer("text", 2)
    assert alone._answers._model.prompts == [list(built.chat.encode(infer_case.TEXT, has_audio=False)[0])]


@pytest.mark.slow
def test_the_whole_of_it_on_random_tiny_models(workdir, tiny_loaded, write_workdir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(sys, "argv", ["aura-jax", "bench", "infer", "--quick"])
    output = tmp_path / "infer.json"
    c = config.from_json(workdir / "config.json")
    c.model.normalisation = "streaming"
    streaming = write_workdir(dataclasses.replace(tiny_loaded[0], config=c), tiny_loaded[1], tmp_path / "streaming")
    assert infer.main(workdir, output, None, streaming, ("torch", "hf"), quick=True) == 0
    results = json.loads(output.read_text())
    printed = capsys.readouterr().out
    assert infer_report.table(results) in printed
    assert (tmp_path / "infer.svg").read_text().startswith("<?xml")
    assert results["test"]["clips"] == {"rows": 2} and "bridge: no --bridge" in results["left_out"]
    arms = results["arms"]
    assert list(arms) == [
        *("AuRA merged", "AuRA", "AuRA streaming, merged", "cascade, 30 s window"),
        *("torch Whisper + torch LLM", "AuRA, our export in torch"),
    ]
    # What is the same model hears the same words, wherever it runs.
    assert arms["AuRA"]["wer"] == arms["AuRA merged"]["wer"] == arms["AuRA, our export in torch"]["wer"]
    assert arms["cascade, 30 s window"]["wer"] == arms["torch Whisper + torch LLM"]["wer"]
    assert arms["AuRA merged"]["weight_bytes"] < arms["AuRA"]["weight_bytes"]
    assert arms["AuRA"]["weight_bytes"] == arms["AuRA, our export in torch"]["weight_bytes"]
    for arm in arms.values():
        assert arm["first_token"]["1"]["median"] > 0 and set(arm["start_seconds"]) == {"cold"}
        assert f"{1000 * arm['first_token']['1']['median']:.0f}" in printed
    assert arms["AuRA merged"]["first_token"]["1"]["times"] == {"median": 1, "low": 1, "high": 1}
    decode = results["decode"]["arms"]
    assert list(decode) == ["ours, float32", "torch, float32"]
    assert decode["ours, float32"]["weight_bytes"] == decode["torch, float32"]["weight_bytes"]
