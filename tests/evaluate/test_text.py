"""Text losses against a direct computation, adapters off and on, and plain questions."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aura_jax import system as system_lib
from aura_jax.errors import UserError
from aura_jax.evaluate.text import Question, ask, compare_text, load_heldout, load_questions, text_loss
from aura_jax.infer.generate import Generator, Reply
from aura_jax.models.lora import merge
from aura_jax.models.speech_llm import text_context

LINES = """\
{"text": "Turn on the lights in the kitchen, please.", "kind": "prose"}

{"messages": [{"role": "user", "content": "Open it."}, {"role": "assistant", "content": "Done."}, \
{"role": "user", "content": "Thanks."}, {"role": "assistant", "content": "You are welcome."}], "kind": "chat"}
"""


@pytest.fixture
def rows(tmp_path, tiny_loaded):
    path = tmp_path / "text.jsonl"
    path.write_text(LINES)
    return load_heldout(path, tiny_loaded[0].chat)


def test_of_a_conversation_the_assistant_s_words_count(tiny_loaded, rows):
    tokenizer = tiny_loaded[0].tokenizer
    assert [row.kind for row in rows] == ["prose", "chat", "chat"]
    said = [tokenizer.decode(row.tokens[row.first_target :]) for row in rows]
    assert said[1:] == ["Done.<|im_end|>", "You are welcome.<|im_end|>"]
    assert "Thanks." in tokenizer.decode(rows[2].tokens) and "Done." in tokenizer.decode(rows[2].tokens)
    assert rows[0].first_target == 1


def test_long_text_is_cut_into_pieces(tmp_path, tiny_loaded):
    path = tmp_path / "long.jsonl"
    path.write_text('{"text": "' + "Turn on the lights. " * 200 + '"}\n')
    rows = load_heldout(path, tiny_loaded[0].chat)
    assert len(rows) > 1 and all(len(row.tokens) <= 256 for row in rows)
    assert sum(len(row.tokens) for row in rows) == len(tiny_loaded[0].chat.text("Turn on the lights. " * 200))


def test_losses_are_the_models(tiny_loaded, rows):
    system, variables = tiny_loaded
    model = system.model
    found = compare_text(system, variables, rows, progress=False)

    @jax.jit
    def log_probs(variables, tokens) -> jax.Array:
        position = jnp.arange(tokens.shape[1])[None]
        x = model.apply(variables, tokens, method="embed_text")
        ctx = text_context(position, jnp.ones_like(tokens))
        x, _, _ = model.apply(variables, x, ctx, method="adapted_blocks")
        h, _ = model.apply(variables, x, ctx, method="plain_blocks")
        return jax.nn.log_softmax(model.apply(variables, h, method="logits"))[0]

    row = rows[0]
    table = log_probs(variables, jnp.array([row.tokens]))
    expected = -sum(float(table[i - 1, row.tokens[i]]) for i in range(1, len(row.tokens))) / (len(row.tokens) - 1)
    assert found["prose"]["adapted"] == pytest.approx(expected, rel=1e-5)
    assert found["prose"]["tokens"] == len(row.tokens) - 1
    assert found["chat"]["tokens"] == sum(len(r.tokens) - r.first_target for r in rows[1:])
    assert found["all"]["tokens"] == found["prose"]["tokens"] + found["chat"]["tokens"]
    assert found["all"]["rise"] == pytest.approx(found["all"]["adapted"] - found["all"]["base"])
    # Of texts that are drawn again, a conversation whole: that of one is its own, that of several is about theirs.
    assert found["prose"]["low"] == found["prose"]["rise"] == found["prose"]["high"] and found["prose"]["n"] == 1
    assert found["all"]["low"] < found["all"]["rise"] < found["all"]["high"] and found["all"]["n"] == 2
    assert abs(found["prose"]["rise"]) > 1e-3  # the adapters do something, so the base is another model


def test_after_a_merge_the_base_is_the_llm_as_it_was(tiny_loaded, rows, monkeypatch):
    system, variables = tiny_loaded
    llm = merge(variables["params"]["llm"], variables["lora"]["llm"], system.model.config.lora)
    merged = {"params": {**variables["params"], "llm": llm}}
    prose = rows[:1]
    before = compare_text(system, variables, prose, progress=False)["all"]
    after = compare_text(system, merged, prose, progress=False)["all"]
    assert after["base"] == before["base"]
    assert after["adapted"] == pytest.approx(before["adapted"], rel=1e-4) and abs(after["rise"]) > 1e-3

    read = lambda self, requests: [
        Reply("base" if self.variables["params"]["llm"] is not llm else "merged", (), True, 0.0) for _ in requests
    ]
    monkeypatch.setattr(Generator, "generate", read)
    found = ask(system, merged, [Question("Which?", ("base",))])
    assert (found["base"], found["adapted"]) == (1, 0)


def test_under_plora_text_is_untouched(tiny_config, tiny_loaded, rows):
    config = tiny_config()
    config.lora.scope = "audio"
    system = system_lib.build(config)
    prose = rows[:1]
    (on, _), (off, _) = (
        text_loss(system, tiny_loaded[1], prose, adapters=adapters, progress=False)["prose"]
        for adapters in (True, False)
    )
    assert np.array_equal(on, off)


def test_questions(tmp_path, tiny_loaded, monkeypatch):
    path = tmp_path / "questions.jsonl"
    lines = [{"prompt": "What is 2 + 2?", "patterns": [r"\b4\b", "four"]}, {"prompt": "Where?", "patterns": ["paris"]}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def answers(self, requests):
        on = self._text_lora == "everywhere"
        return [
            Reply("It is Four." if r.prompt.startswith("What") or not on else "Rome", (), True, 0.0) for r in requests
        ]

    monkeypatch.setattr(Generator, "generate", answers)
    found = ask(*tiny_loaded, load_questions(path))
    assert (found["n"], found["base"], found["adapted"]) == (2, 1, 1)
    assert found["answers"][1] == {
        "question": "Where?",
        "base": "It is Four.",
        "base_right": False,
        "adapted": "Rome",
        "adapted_right": False,
    }


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "no text"),
        ('{"text": "good"}\n{"txt": "bad"}\n', r"text.jsonl:2: neither 'text' nor 'messages'"),
        ('{"messages": ["hello"]}\n', "neither"),
        ("[1]\n", "text.jsonl:1: not an object"),
        ("{\n", "text.jsonl:1: not JSON"),
    ],
)
def test_bad_text_says_where(tmp_path, tiny_loaded, text, match):
    path = tmp_path / "text.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=match):
        load_heldout(path, tiny_loaded[0].chat)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "no questions"),
        ('{"prompt": "Why?"}\n', "questions.jsonl:1: give 'prompt'"),
        ('{"prompt": "Why?", "patterns": ["("]}\n', "regular expression"),
    ],
)
def test_bad_questions_say_where(tmp_path, text, match):
    path = tmp_path / "questions.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=match):
        load_questions(path)
    with pytest.raises(UserError, match="cannot be read"):
        load_questions(tmp_path / "missing.jsonl")
