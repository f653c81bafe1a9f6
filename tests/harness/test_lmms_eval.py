"""What lmms-eval's evaluator asks of a model, and that a run answers it."""

import importlib
import tomllib
from pathlib import Path

import numpy as np
import pytest

from aura_jax.errors import UserError
from aura_jax.infer.generate import Generator, Reply
from aura_jax.infer.prompting import Request
from aura_jax.infer.sampling import GREEDY, Sampling

CLIPS = [np.random.default_rng(i).standard_normal(n) * 0.1 for i, n in enumerate((9000, 15000, 9000))]
DOCUMENTS = [{"audio": {"array": x, "sampling_rate": 16000}, "answer": f"word {i}"} for i, x in enumerate(CLIPS)]
GREEDILY = {"max_new_tokens": 4, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False, "until": ["\n\n"]}
TASK, SPLIT = "clips", "test"


@pytest.fixture(scope="module")
def plugin():
    return importlib.import_module("aura_jax.harness.lmms_eval")


class Answers:
    """In the place of a run: says what it was asked for."""

    batch_size, max_new_tokens = 2, 7

    def __init__(self):
        self.rated = []

    def generate(self, requests, max_new_tokens, *, sampling, stop, progress):
        progress(len(requests))
        how = f"{max_new_tokens} {sampling.temperature:g}{''.join(stop).rstrip()}"
        lengths = ["text" if request.waveform is None else len(request.waveform) for request in requests]
        texts = [f"{r.number}: {r.prompt} {n} {how}" for r, n in zip(requests, lengths, strict=True)]
        return [Reply(text, (), True, 0.0) for text in texts]

    def losses(self, requests, answers):
        self.rated += [(request.prompt, answer) for request, answer in zip(requests, answers, strict=True)]
        return [(float(len(answer)), False) for answer in answers]


@pytest.fixture
def model(plugin, monkeypatch):
    monkeypatch.setattr(plugin, "Respondent", lambda workdir, **arguments: Answers())
    made = plugin.AuraJax("a workdir")
    made.task_dict[TASK] = {SPLIT: DOCUMENTS}
    return made


def instance(doc_id: int, second, text: str = "Answer.", media=lambda doc: [doc["audio"]], rest=(), kind="any"):
    from lmms_eval.api.instance import Instance

    arguments = (text, second, media, *rest, doc_id, TASK, SPLIT)
    return Instance(kind, arguments, idx=0, metadata={"task": TASK, "doc_id": doc_id, "repeats": 1})


def test_requests_are_answered_in_order_each_as_it_asks(model):
    drawing = {"max_new_tokens": 5, "temperature": 0.5}
    asked = [
        instance(0, GREEDILY),
        instance(1, drawing, "Say."),
        instance(0, GREEDILY, "Why?", media=lambda doc: []),
        instance(2, drawing),
        instance(1, {"until": [".", "?"]}),
    ]
    assert model.generate_until(asked) == [
        "0: Answer. 9000 4 0",
        "1: Say. 15000 5 0.5",
        "2: Why? text 4 0",
        "3: Answer. 9000 5 0.5",
        "4: Answer. 15000 7 0.?",
    ]


def test_a_prompt_takes_the_place_of_the_task_s(plugin, model):
    prompted = plugin.AuraJax("a workdir", prompt="Say.", batch_size="auto")
    prompted.task_dict = model.task_dict
    asked = [instance(0, GREEDILY), instance(1, GREEDILY, media=lambda doc: None)]
    assert prompted.generate_until(asked) == ["0: Say. 9000 4 0", "1: Answer. text 4 0"]


def test_a_run_answers(plugin, tiny_workdir, tiny_loaded):
    of_run = plugin.AuraJax(str(tiny_workdir))
    of_run.task_dict[TASK] = {SPLIT: DOCUMENTS}
    request = Request(CLIPS[0].astype(np.float32), "Answer.")
    (expected,) = Generator(*tiny_loaded, max_new_tokens=4).generate([request])
    assert of_run.generate_until([instance(0, GREEDILY)]) == [expected.text]


def test_answers_are_rated_without_the_blank_before_them(model):
    answers = [lambda doc: doc["answer"], " word 11", "word 2"]
    found = model.loglikelihood([instance(i, answer) for i, answer in enumerate(answers)])
    assert [result.text for result in found] == [(6.0, False), (7.0, False), (6.0, False)]
    assert model._respondent.rated == [("Answer.", "word 0"), ("Answer.", "word 11"), ("Answer.", "word 2")]


@pytest.mark.parametrize(
    ("settings", "sampling", "until"),
    [
        ({}, GREEDY, ()),
        (GREEDILY, GREEDY, ("\n\n",)),
        ({"until": None, "do_sample": False, "temperature": 0.2, "top_p": 0.9, "seed": 1}, GREEDY, ()),
        ({"temperature": 0.2, "top_p": None, "until": "."}, Sampling(0.2), (".",)),
        ({"until": ["?", ""]}, GREEDY, ("?",)),
        ({"do_sample": True, "top_p": 0.9, "seed": 2}, Sampling(1.0, 0.9, seed=2), ()),
        ({"do_sample": True, "temperature": 0, "repetition_penalty": 2}, Sampling(repetition_penalty=2.0), ()),
    ],
)
def test_generation_settings(plugin, settings, sampling, until):
    found = plugin.decoding_of(settings, 7)
    assert found == plugin.Decoding(settings.get("max_new_tokens", 7), sampling, until)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"top_q": 1}, "no generation setting 'top_q' .*did you mean 'top_p'"),
        ({"num_beams": 4}, "num_beams 4: there is no beam search"),
        ({"max_new_tokens": 0}, "max_new_tokens 0"),
        ({"until": [1]}, "until"),
        ({"temperature": -1}, "temperature -1"),
    ],
)
def test_wrong_settings(plugin, settings, match):
    with pytest.raises(UserError, match=match) as caught:
        plugin.decoding_of(settings, 7)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({}, "add --model_args workdir="),
        ({"workdir": "nowhere"}, "no config at nowhere/config.json"),
        ({"workdir": "x", "device": "cuda"}, "takes no 'device'"),
        ({"workdir": "x", "promt": "Say."}, "takes no 'promt'.* did you mean 'prompt'"),
        ({"workdir": "x", "batch_size": "auto:4"}, "--batch_size auto:4: give a number, or auto"),
    ],
)
def test_wrong_arguments(plugin, arguments, match):
    with pytest.raises(UserError, match=match) as caught:
        plugin.AuraJax(**arguments)
    assert "\n" not in str(caught.value)


def test_one_process(plugin, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="aura_jax is one process"):
        plugin.AuraJax("x")


def test_what_it_cannot_answer(model):
    with pytest.raises(UserError, match="clips, document 1: 2 clips or pictures"):
        model.generate_until([instance(1, GREEDILY, media=lambda doc: [doc["audio"]] * 2)])
    with pytest.raises(UserError, match="clips, document 1: object, not audio"):
        model.generate_until([instance(1, GREEDILY, media=lambda doc: [object()])])
    with pytest.raises(UserError, match="clips: a task of several rounds"):
        model.generate_until_multi_round([instance(1, GREEDILY, rest=(str,))])
    unconditional = instance(1, "word")
    unconditional.arguments = ("", "word")
    with pytest.raises(UserError, match="clips: a request of 2 parts"):
        model.loglikelihood([unconditional])


def test_the_entry_point_leads_to_the_model(plugin):
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    module, name = project["entry-points"]["lmms_eval.models"]["aura_jax"].split(":")
    manifest = getattr(importlib.import_module(module), name)()
    assert (manifest.model_id, manifest.chat_class_path) == ("aura_jax", None)
    module, name = manifest.simple_class_path.rsplit(".", 1)
    assert getattr(importlib.import_module(module), name) is plugin.AuraJax
    assert plugin.AuraJax.is_simple
