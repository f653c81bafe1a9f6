"""The chat format: both readings have the same tokens outside the span."""

import pickle

import pytest
from transformers import AutoTokenizer

from aura_jax.data.prompts import CHATML, ChatFormat
from aura_jax.errors import UserError

LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] | trim }} [/INST]"
    "{% else %} {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
)
HISTORY = ({"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hi!"})


@pytest.fixture(scope="module")
def tokenizer(tiny_llm_dir):
    return AutoTokenizer.from_pretrained(tiny_llm_dir)


@pytest.mark.parametrize("template", [None, CHATML, LLAMA2])
@pytest.mark.parametrize("history", [(), HISTORY])
def test_the_parts_join_to_what_the_template_renders(tokenizer, template, history):
    chat = ChatFormat(tokenizer, template)
    prefix, suffix = chat.encode("Say it again.", history=history)
    joined = tokenizer.decode([*prefix, *chat.text("the transcript"), *suffix])
    rendered = tokenizer.apply_chat_template(
        [*history, {"role": "user", "content": "the transcript\nSay it again."}],
        chat_template=template,
        add_generation_prompt=True,
        tokenize=False,
    )
    assert joined == rendered
    whole, nothing = chat.encode("the transcript\nSay it again.", has_audio=False, history=history)
    assert tokenizer.decode(whole) == rendered and nothing == ()


def test_audio_alone_and_system_turn(tokenizer):
    chat = ChatFormat(tokenizer, CHATML, system="Be brief.")
    prefix, suffix = chat.encode()
    assert tokenizer.decode(prefix) == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
    assert tokenizer.decode(suffix) == "<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(ChatFormat(tokenizer, CHATML).encode()[0]) == "<|im_start|>user\n"


@pytest.mark.parametrize(("template", "end"), [(CHATML, "<|im_end|>"), (LLAMA2, None)])
def test_a_response_ends_with_its_turn(tokenizer, template, end):
    chat = ChatFormat(tokenizer, template)
    ids = chat.response("Yes.")
    assert tokenizer.decode(ids) == "Yes." + (end or tokenizer.eos_token)
    assert ids[-1] in chat.stop_ids and set(chat.stop_ids) >= {tokenizer.eos_token_id}
    assert all(isinstance(i, int) for i in ids)
    assert chat.response("Yes.", ended=False) == ids[: len(chat.text("Yes."))] != ids
    assert chat.response("", ended=False) == chat.response("")  # a target is needed


def test_conversation_holds_every_turn(tokenizer):
    text = tokenizer.decode(ChatFormat(tokenizer, CHATML).conversation(HISTORY))
    assert text == "<|im_start|>user\nHello.<|im_end|>\n<|im_start|>assistant\nHi!<|im_end|>\n"


def test_template_variables_reach_the_template(tokenizer):
    template = CHATML + "{% if quiet %}(quiet){% endif %}"
    _, suffix = ChatFormat(tokenizer, template, template_kwargs={"quiet": True}).encode()
    assert tokenizer.decode(suffix).endswith("(quiet)")


def test_it_travels_to_a_worker(tokenizer):
    chat = ChatFormat(tokenizer, CHATML)
    assert pickle.loads(pickle.dumps(chat)).encode("a") == chat.encode("a")


def test_mistakes(tokenizer, tiny_llm_dir):
    bare = AutoTokenizer.from_pretrained(tiny_llm_dir)
    bare.chat_template = None
    with pytest.raises(UserError, match=r"no chat template: set data\.chat_template"):
        ChatFormat(bare)
    assert all(ChatFormat(bare, CHATML).encode())
    with pytest.raises(UserError, match="0 times: set one that does once"):
        ChatFormat(tokenizer, "{% for m in messages %}{{ m['role'] }}{% endfor %}")
    with pytest.raises(UserError, match=r"template fails .* set another data\.chat_template, or an empty data\.system"):
        ChatFormat(tokenizer, "{{ raise_exception('no system') }}")
    no_end = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert ChatFormat(tokenizer, no_end).response("a")[-1] == tokenizer.eos_token_id
