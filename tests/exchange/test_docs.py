"""The code that docs/pytorch.md and the model cards tell people to copy runs as it stands."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from aura_jax.exchange.export import FORMATS
from aura_jax.infer.generate import Generator
from aura_jax.infer.prompting import Request

pytestmark = pytest.mark.slow  # every format is exported and loaded in torch

PAGE = Path(__file__).parents[2] / "docs" / "pytorch.md"
BLOCKS = dict(re.findall(r"<!-- tested: (\w+) -->\n```python\n(.*?)```", PAGE.read_text(), re.DOTALL))
CLIP = np.random.default_rng(0).normal(0, 0.1, 13_000).astype(np.float32)


@pytest.fixture
def run(exported, tiny_llm_dir, monkeypatch):
    """Returns a function: runs code on the export of a format, and returns its variables."""

    def run(code: str, name: str) -> dict:
        monkeypatch.setattr(sys, "path", [*sys.path])
        monkeypatch.delitem(sys.modules, "audio_embedder", raising=False)
        variables = {"DIRECTORY": str(exported[name]), "BASE": str(tiny_llm_dir), "waveform": CLIP}
        exec(code, variables)
        return variables

    return run


@pytest.fixture(scope="module")
def answer(tiny_loaded) -> str:
    return Generator(*tiny_loaded, max_new_tokens=64).generate([Request(CLIP)])[0].text


def test_every_format_has_code():
    assert BLOCKS.keys() == set(FORMATS)


def test_hf(run, answer):
    answers = run(BLOCKS["hf"], "hf")["answers"]
    assert len(answers) == 2 and answers[0].strip() == answer


def test_peft(run, answer):
    assert [text.strip() for text in run(BLOCKS["peft"], "peft")["answers"]] == [answer]


def test_merged(run):
    variables = run(BLOCKS["merged"], "merged")
    n_audio = -(-len(CLIP) // 1280)
    embeddings, table = variables["embeddings"], variables["table"].weight
    assert embeddings.shape[1] == table.shape[1] and embeddings.shape[0] > n_audio
    is_text = (embeddings[:, None] == table).all(-1).any(-1)
    assert int((~is_text).sum()) == n_audio


@pytest.mark.parametrize("name", FORMATS)
def test_the_card_s_code(run, exported, answer, name, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (exported[name] / "README.md").read_text(), re.DOTALL)
    run(code, name)
    assert capsys.readouterr().out.strip() == answer
