"""From a configuration to modules and tokenizer: what each key reaches, and what a directory must hold."""

import shutil

import pytest

from aura_jax import system
from aura_jax.data.prompts import CHATML
from aura_jax.errors import UserError


def test_keys_reach_template_and_teacher(tiny_config):
    c = tiny_config()
    c.model.attention = "cudnn"
    c.data.chat_template = CHATML + "{% if enable_thinking is false %}(no thinking){% endif %}"
    c.data.template_kwargs = {"enable_thinking": False}
    built = system.build(c)
    assert built.model.attention_impl == built.teacher.attention_impl == "cudnn"
    assert built.tokenizer.decode(built.chat.encode()[1]).endswith("(no thinking)")


def test_for_text_alone_no_teacher_is_looked_for(tiny_config):
    c = tiny_config()
    c.model.teacher, c.lora.n_blocks = "no/such/whisper", 99
    built = system.build_text(c)
    assert built.teacher is None and built.teacher_dir is None
    assert (c.model.teacher, c.lora.n_blocks) == ("no/such/whisper", 99)


@pytest.mark.parametrize("kind", ["tiny_llm_dir", "tiny_whisper_dir"])
def test_a_directory_without_or_with_a_broken_tokenizer_is_named(kind, request, tmp_path):
    shutil.copy(request.getfixturevalue(kind) / "config.json", tmp_path)
    with pytest.raises(UserError, match=r"no tokenizer \(tokenizer.json, .*\): copy it there") as caught:
        system.load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="the tokenizer cannot be read") as caught:
        system.load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
