"""`bench train`: what a step must compute, what stops a measurement, and the whole of it on random tiny models."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import pytest

from aura_jax.data.batch import Batch
from aura_jax.errors import UserError
from aura_jax.experiments.bench import flops, protocol, train, train_report
from aura_jax.models.embedder import EmbedderConfig
from aura_jax.models.llm import LLMConfig
from aura_jax.models.lora import LoRAConfig
from aura_jax.models.speech_llm import SpeechLLMConfig
from aura_jax.models.whisper import WhisperConfig

ROOT = Path(__file__).parents[2]
LLM = LLMConfig("llama", 100, 8, 16, 3, 2, 1, 4, 1e4)
MODEL = SpeechLLMConfig(LLM, EmbedderConfig("stem", 80, 6, 8, 4), LoRAConfig(n_blocks=2, rank=2, alpha=2.0))
WHISPER = WhisperConfig(80, 6, 4, 2, 12, 4, 2, 12, 50)
PAIRS = ((0, 1), (1, 3))
SIZES = flops.Sizes(n_rows=5, n_tokens=20, n_clips=1, n_audio=10, n_samples=12800, n_targets=7)


def cost(*active: str, sizes: flops.Sizes = SIZES, model: SpeechLLMConfig = MODEL) -> dict[str, flops.Cost]:
    return flops.step(model, WHISPER, PAIRS, sizes, active)


def test_a_frozen_weight_costs_four_operations_a_token_and_a_trained_one_six():
    parts, tokens = cost("lm", "distill"), 5 * 20
    block = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16  # q; k and v of half the heads; o; the MLP
    lora = 2 * (2 * (8 + 8) + 2 * (8 + 4) + 3 * (8 + 16))
    assert parts["adapted blocks, frozen"] == flops.Cost(2 * 2 * block * tokens, 2 * 2 * block * tokens)
    assert parts["upper blocks, frozen"].total == 4 * block * tokens
    assert parts["adapted blocks, LoRA"] == flops.Cost(2 * 2 * lora * tokens, 4 * 2 * lora * tokens)
    assert parts["LM head"] == flops.Cost(*[2 * 8 * 100 * 5 * 7] * 3)
    assert parts["distillation heads"].total == 6 * 8 * 6 * 2 * 5 * 10
    attention = 2 * 2 * tokens * 20 * 8
    assert parts["upper blocks, attention"] == flops.Cost(attention, 2 * attention)
    assert "teacher" not in parts and "text objectives" not in parts
    assert flops.total(parts).total == sum(part.forward + part.backward for part in parts.values())


def test_only_what_the_objectives_read_is_counted():
    assert not {"upper blocks, frozen", "LM head"} & set(cost("distill"))
    assert "distillation heads" not in cost("lm")
    heard = dataclasses.replace(SIZES, precomputed=False)
    teacher = cost("distill", sizes=heard)["teacher"]
    assert teacher.backward == 0 and teacher.forward > 0
    twice = dataclasses.replace(heard, n_rows=10)
    assert cost("distill", sizes=twice)["teacher"].forward == 2 * teacher.forward
    patch = dataclasses.replace(MODEL, embedder=dataclasses.replace(MODEL.embedder, kind="patch"))
    assert cost("lm", model=patch)["embedder"].total < cost("lm")["embedder"].total


def test_text_costs_a_student_and_a_base_without_gradients():
    sizes = dataclasses.replace(SIZES, text_rows=5, text_tokens=20)
    anchor, kd = (cost(name, sizes=sizes)["text objectives"] for name in ("text_anchor", "text_kd"))
    adapted = [part for name, part in cost("lm").items() if name.startswith("adapted")]
    assert anchor.backward == sum(part.backward for part in adapted)
    lora = cost("lm")["adapted blocks, LoRA"].forward
    assert anchor.forward == 2 * sum(part.forward for part in adapted) - lora
    assert kd.forward > anchor.forward and kd.recompute > 0 == anchor.recompute


def test_sizes_are_read_off_a_batch():
    class Of:
        def __init__(self, *shape):
            self.shape = shape

    fields = dict.fromkeys(Batch._fields[:13], Of()) | {
        "tokens_BxT": Of(5, 20),
        "audio_position_BxKxA": Of(5, 1, 10),
        "waveform_BxKxS": Of(5, 1, 12800),
        "target_id_BxR": Of(5, 7),
    }
    assert flops.Sizes.of(Batch(**fields)) == dataclasses.replace(SIZES, precomputed=False)
    text = flops.Sizes.of(Batch(**fields, teacher_BxKxPxAxE=Of(), text_tokens_MxL=Of(3, 9)))
    assert text == dataclasses.replace(SIZES, text_rows=3, text_tokens=9)


def test_what_is_missing_is_said_before_anything_starts(tmp_path, monkeypatch):
    output = tmp_path / "train.json"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^no benchmarks/peers/worker.py: run this from the root of the repository$"):
        train.main(output)
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match="there is no folder"):
        train.main(tmp_path / "nowhere" / "train.json")
    with pytest.raises(UserError, match=r"a figure is an \.svg or a \.png"):
        train.main(output, figure=tmp_path / "train.pdf")
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else real(name))
    with pytest.raises(UserError, match=r'^the peer needs peft: pip install -e "\.\[torch\]"$'):
        train.main(output)


class Stub:
    """An arm whose first steps are known."""

    def __init__(self, arm: train.Arm, loss: float):
        self.arm, self.first = arm, {"batch": {"metrics": {"loss": loss, "grad_norm": 1.0}}}


def test_arms_that_disagree_are_not_timed():
    reference, ours, half = Stub(train.REFERENCE, 2.0), Stub(train.OURS, 2.0001), Stub(train.ARMS[-1], 2.1)
    train.check_agreement([reference, ours, half])
    for loss in (2.001, float("nan")):
        with pytest.raises(UserError, match="'ours, float32' disagrees with 'torch, eager, float32': loss of batch"):
            train.check_agreement([reference, Stub(train.OURS, loss)])


def test_a_worker_answers_and_says_what_went_wrong(tmp_path):
    program = tmp_path / "worker.py"
    program.write_text(
        "import os\n"
        "from aura_jax.experiments.bench import protocol\n"
        "class Arm:\n"
        "    def double(self, x):\n"
        "        print('chatter')\n"
        "        return {'y': 2 * x}\n"
        "    def fail(self):\n"
        "        raise ValueError('no such thing')\n"
        "    def die(self):\n"
        "        os._exit(1)\n"
        "protocol.serve(Arm())\n"
    )
    worker = protocol.Worker([sys.executable, str(program)], {}, tmp_path / "log")
    assert worker.ask("ready") == {} and worker.ask("double", x=3) == {"y": 6}
    with pytest.raises(protocol.WorkerFailed, match="ValueError: no such thing"):
        worker.ask("fail")
    worker.ask("watch")
    peak = worker.ask("peak")
    assert set(peak) == {"since_watch", "of_life"}
    if sys.platform == "linux":
        assert 1e6 < peak["since_watch"] <= peak["of_life"] < 1e9
    with pytest.raises(protocol.WorkerFailed, match=r"died: .*chatter"):
        worker.ask("die")
    worker.close()


@pytest.mark.slow
def test_the_whole_of_it_on_random_tiny_models(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["aura-jax", "bench", "train", "--quick"])
    output = tmp_path / "train.json"
    assert train.main(output, quick=True) == 0
    results = json.loads(output.read_text())
    printed = capsys.readouterr().out
    assert train_report.table(results) in printed
    assert (tmp_path / "train.svg").read_text().startswith("<?xml")
    assert results["command"] == "aura-jax bench train --quick"

    base = results["base"]
    assert set(base["arms"]) == {"torch, eager, float32", "ours, float32"} and not base["failed"]
    assert {stage: sum(counts.values()) for stage, counts in base["steps_of_bucket"].items()} == {
        "distil": 6,
        "joint": 6,
    }
    assert [batch["stage"] for batch in base["batches"]] == ["distil", "joint"]
    assert {"embedder", "teacher", "adapted blocks, LoRA"} < set(base["batches"][0]["parts"])
    for arm in base["arms"].values():
        assert arm["difference"]["largest"] <= train.PARITY
        assert all(len(seconds) == train.QUICK.rounds for seconds in arm["seconds"].values())
        assert arm["schedule"]["total"] > arm["schedule"]["start"] > 0
        for stage in ("distil", "joint"):
            assert f"{arm['stages'][stage]['seconds_per_step']:.3f}" in printed
            assert f"{arm['stages'][stage]['tokens_per_second']:.0f}" in printed
    ratio = base["ratios"]["ours, float32"]["torch, eager, float32"]["speed"]["joint"]
    assert ratio["low"] <= ratio["median"] <= ratio["high"] and f"{ratio['median']:.2f} (" in printed
    assert set(results["sweep"]) == set(train.QUICK.factors)
    for factor, points in results["sweep"].items():
        assert [point["value"] for point in points] == list(train.QUICK.factors[factor])
