"""A run's own evaluation: noise and likelihood among its scores, and one that is interrupted goes on."""

import json
import shutil

import pytest

from aura_jax import checkpoint, cli, config
from aura_jax.errors import UserError
from aura_jax.evaluate import suite
from aura_jax.infer.generate import Generator, Reply
from tests.evaluate.test_noise_sweep import write_set

VOICES = ["ann", "ben", "cy"]


class Decoder:
    """Stands in for `Generator.generate`: answers at once, counts the rows, and is interrupted after so many calls."""

    def __init__(self, calls=1 << 30, text="hello"):
        self.rows, self.left, self.text = 0, calls, text

    def __call__(self, requests, progress=None):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        self.rows += len(requests)
        return [Reply(self.text, (), True, 0.0) for _ in requests]

    def patch(self, monkeypatch):
        monkeypatch.setattr(Generator, "generate", lambda _, requests, progress=None: self(requests, progress))
        return self


@pytest.fixture
def workdir(tiny_workdir, tmp_path):
    """A run of the random models with two sets of its own."""
    home = tmp_path / "run"
    shutil.copytree(tiny_workdir, home)
    c = config.from_json(home / "config.json")
    c.eval.sets = {"a": str(write_set(tmp_path / "a", VOICES)), "b": str(write_set(tmp_path / "b", VOICES))}
    c.data.train = ((c.eval.sets["a"], 1.0),)
    (home / "config.json").write_text(config.to_json(c))
    return home


NOISE = [f"--config.eval.noise.{text}" for text in ("kinds=('white',)", "snr_db=(20.0, 0.0)", "sets=('b',)")]


@pytest.mark.slow
def test_noise_and_likelihood_are_among_the_scores(workdir, capsys):
    overrides = ["--config.eval.noise.kinds=('babble',)", "--config.eval.noise.snr_db=(0.0,)"]
    overrides += ["--config.eval.noise.sets=('a',)", "--config.eval.likelihood=('b',)"]
    assert cli.main(["eval", "--workdir", str(workdir), *overrides]) == 0
    shown = capsys.readouterr().out
    scores = json.loads((workdir / "scores.json").read_text())
    assert list(scores["noise"]) == ["a"] and list(scores["noise"]["a"]) == ["babble"]
    in_noise = scores["noise"]["a"]["babble"]["0"]
    assert in_noise["n"] == 3 and set(in_noise["wer"]) == {"value", "low", "high", "n"}
    found = scores["likelihood"]["b"]
    assert found["n"] == 3 and found["divergence"]["value"] > 0 and found["speech"]["perplexity"]["value"] > 1
    assert scores["eval"]["noise"]["kinds"] == ["babble"] and scores["eval"]["likelihood"] == ["b"]
    assert "a, babble 0 dB" in shown and "b (3 rows" in shown
    assert not (workdir / "evaluation").exists()
    # What is heard in noise is scored, and not listed.
    assert set(json.loads((workdir / "transcripts.json").read_text())) == {"a", "b"}


def test_an_interrupted_evaluation_goes_on(workdir, monkeypatch):
    decoder = Decoder(calls=3).patch(monkeypatch)  # a, b, and b at 20 dB
    with pytest.raises(KeyboardInterrupt):
        suite.score_run(workdir, overrides=NOISE)
    assert decoder.rows == 9 and not (workdir / "scores.json").exists()
    assert len(list((workdir / "evaluation").iterdir())) == 3
    decoder = Decoder(text="bye").patch(monkeypatch)
    scores, transcripts = suite.score_run(workdir, overrides=NOISE)
    assert decoder.rows == 3
    assert [scores["sets"][name]["wer"]["value"] for name in "ab"] == [0, 0]
    in_noise = scores["noise"]["b"]["white"]
    assert list(in_noise) == ["20", "0"] and [one["wer"]["value"] for one in in_noise.values()] == [0, 1]
    assert in_noise["0"]["intent_accuracy"]["value"] == scores["sets"]["a"]["intent_accuracy"]["value"] == 1
    assert transcripts["a"][0] == {"id": "row-0", "reference": "hello", "hypothesis": "hello"}
    assert not (workdir / "evaluation").exists()
    assert json.loads((workdir / "scores.json").read_text()) == scores
    Decoder(text="bye").patch(monkeypatch)
    assert suite.score_run(workdir, overrides=NOISE)[0]["sets"]["a"]["wer"]["value"] == 1  # all of it anew


def other_settings(workdir, monkeypatch):
    return ["--config.eval.max_new_tokens=4"]


def other_data(workdir, monkeypatch):
    manifest = workdir.parent / "a" / "set.jsonl"
    manifest.write_text(manifest.read_text().replace("hello", "Hello!"))
    return []


def other_weights(workdir, monkeypatch):
    known = checkpoint.inference_meta
    monkeypatch.setattr(
        checkpoint, "inference_meta", lambda *args: (known(*args)[0], known(*args)[1] | {"checksums": {"own": "0"}})
    )
    return []


def other_step(workdir, monkeypatch):
    known = checkpoint.inference_meta
    monkeypatch.setattr(checkpoint, "inference_meta", lambda *args: (2, known(*args)[1]))
    return []


@pytest.mark.parametrize("change", [other_settings, other_data, other_weights, other_step])
def test_stale_results_are_not_used(workdir, monkeypatch, change):
    Decoder(calls=1).patch(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        suite.score_run(workdir)
    overrides = change(workdir, monkeypatch)
    decoder = Decoder(text="bye").patch(monkeypatch)
    assert suite.score_run(workdir, overrides=overrides)[0]["sets"]["a"]["wer"]["value"] == 1 and decoder.rows == 6


def test_sets_of_the_command_line_go_on_too(workdir, monkeypatch, capsys):
    argv = ["eval", "--workdir", str(workdir), *(f"--set={n}={workdir.parent / n / 'set.jsonl'}" for n in "ba")]
    Decoder(calls=1).patch(monkeypatch)
    cli.main(argv)
    assert len(list((workdir / "evaluation").iterdir())) == 1
    decoder = Decoder().patch(monkeypatch)
    assert cli.main(argv) == 0 and decoder.rows == 3
    assert capsys.readouterr().out.count("0.0 [0.0, 0.0]") == 4
    assert not (workdir / "evaluation").exists()


@pytest.mark.parametrize("override", ["noise.kinds=('white',)", "likelihood=('a',)"])
def test_other_evaluations_have_neither_noise_nor_likelihood(workdir, capsys, override):
    for arguments in (["--data", str(workdir.parent / "a" / "set.jsonl")], ["--system", "cascade"]):
        assert cli.main(["eval", "--workdir", str(workdir), *arguments, f"--config.eval.{override}"]) == 2
        assert "eval.noise and eval.likelihood belong to the run's own evaluation" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "match"),
    [
        ("--config.eval.noise.kinds=('pink',)", r"unknown kind 'pink' in eval\.noise\.kinds: valid: babble, white"),
        ("--config.eval.likelihood=('c',)", r"eval\.likelihood names 'c', which eval\.sets does not"),
    ],
)
def test_mistakes_come_before_decoding(workdir, monkeypatch, override, match):
    decoder = Decoder().patch(monkeypatch)
    with pytest.raises(UserError, match=match):
        suite.score_run(workdir, overrides=[override])
    assert decoder.rows == 0
