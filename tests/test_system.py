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


def test_the_embedder_has_a_shape_of_its_own_where_no_whisper_gives_one(tiny_config):
    c = tiny_config()
    c.model.teacher = ""
    c.embedder.update(from_teacher=False, width=24, n_mels=40)
    embedder = system.build(c).model.config.embedder
    assert (embedder.width, embedder.n_mels) == (24, 40)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"n_mels": 128}, r"embedder.n_mels 128 is not the 80 of model\.teacher: set it to 0"),
        ({"width": 64}, r"embedder.width 64 is not the 32 of model\.teacher: set it to 0"),
    ],
)
def test_an_embedder_that_does_not_fit_its_whisper(tiny_config, changes, match):
    c = tiny_config()
    c.embedder.update(**changes)
    with pytest.raises(UserError, match=match):
        system.build(c)
