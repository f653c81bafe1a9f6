"""`aura_jax.load`: runs and exports, clips of every kind, long ones, conversations, and what it refuses."""

import dataclasses
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile

import aura_jax
from aura_jax import api, cli
from aura_jax import system as system_lib
from aura_jax.api import Model
from aura_jax.convert import random_models
from aura_jax.errors import UserError
from aura_jax.exchange.export import FORMATS, export_run
from aura_jax.infer.generate import Generator
from aura_jax.infer.prompting import Request
from aura_jax.models.lora import merge

PAGE = Path(__file__).parents[1] / "docs" / "inference.md"
CLIP = (np.random.default_rng(0).standard_normal(13_000) * 0.1).astype(np.float32)


@pytest.fixture(scope="module")
def model(tiny_workdir) -> Model:
    return Model(tiny_workdir)


@pytest.fixture(scope="module")
def streaming_workdir(tiny_config, tiny_loaded, write_workdir, tmp_path_factory) -> Path:
    c = tiny_config()
    c.model.normalisation = "streaming"
    return write_workdir(system_lib.build(c), tiny_loaded[1], tmp_path_factory.mktemp("runs") / "streaming")


@pytest.fixture(scope="module")
def exported(tiny_workdir, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("exported")
    return {name: export_run(tiny_workdir, root / name, name) for name in FORMATS}


@pytest.fixture(scope="module")
def answer(tiny_loaded) -> str:
    return Generator(*tiny_loaded).generate([Request(CLIP)])[0].text


def test_importing_the_package_imports_no_jax():
    code = "import sys, aura_jax; assert 'jax' not in sys.modules and 'load' in aura_jax.__all__"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = aura_jax.lod


def test_load_keeps_compiled_programs_unless_jax_does(tiny_workdir, monkeypatch, tmp_path):
    monkeypatch.setenv("AURA_JAX_CACHE", str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    try:
        for own, expected in ((None, str(tmp_path / "compiled")), ("/of/the/user", "/of/the/user")):
            jax.config.update("jax_compilation_cache_dir", own)
            with pytest.raises(UserError, match="no such folder"):
                aura_jax.load(tmp_path / "nowhere")
            assert jax.config.jax_compilation_cache_dir == expected
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_clips_of_every_kind_have_the_same_answer(model, answer, tmp_path):
    path = tmp_path / "clip.wav"
    soundfile.write(path, CLIP, 16000, subtype="FLOAT")
    reply = model.generate((CLIP, 16000))
    assert str(reply) == reply.text == answer and reply.pieces == ()
    data = path.read_bytes()
    replies = model.generate([path, str(path), data, io.BytesIO(data)])
    assert [r.text for r in replies] == [answer] * 4
    assert model.generate([]) == []


def test_text_with_adapters_and_without(model, tiny_loaded):
    ask = lambda **how: model.generate(prompt="Why?", **how).tokens
    plain, adapted = (
        Generator(*tiny_loaded, adapters_on_text=on).generate([Request(prompt="Why?")])[0].tokens
        for on in (False, True)
    )
    assert ask() == ask(adapters=False) == plain and ask(adapters=True) == adapted != plain


def test_merged_text_is_the_merged_llm(tiny_workdir, tiny_loaded, exported):
    system, variables = tiny_loaded
    llm = merge(variables["params"]["llm"], variables["lora"]["llm"], system.model.config.lora)
    merged = Generator(system, {"params": variables["params"] | {"llm": llm}})
    expected = [reply.tokens for reply in merged.generate([Request(CLIP), Request(prompt="Why?")])]
    for found in (Model(tiny_workdir, adapters="merged"), Model(exported["merged"])):
        assert [found.generate((CLIP, 16000)).tokens, found.generate(prompt="Why?").tokens] == expected
        with pytest.raises(UserError, match="adapters=False: they are merged into this LLM"):
            found.generate(prompt="Why?", adapters=False)


def test_exports_answer_as_the_run(exported, answer, tmp_path):
    elsewhere = shutil.copytree(exported["hf"], tmp_path / "hf")
    about = json.loads((elsewhere / "audio_config.json").read_text())
    about["run"]["model"]["teacher"] = "/only/where/it/was/trained"
    (elsewhere / "audio_config.json").write_text(json.dumps(about))
    assert Model(elsewhere).generate((CLIP, 16000)).text == answer
    peft = shutil.copytree(exported["peft"], tmp_path / "peft")
    about = json.loads((peft / "audio_config.json").read_text())
    base, about["run"]["model"]["llm"] = about["run"]["model"]["llm"], "/moved/away"
    (peft / "audio_config.json").write_text(json.dumps(about))
    found = Model(peft, overrides=[f"--config.model.llm={base}"])
    assert found.generate((CLIP, 16000)).text == answer
    with pytest.raises(UserError, match=r"model\.llm is part of what the run was trained with"):
        Model(exported["hf"], overrides=[f"--config.model.llm={base}"])
    other = tmp_path / "other"
    other.mkdir()
    random_models.build_llm(other, seed=1)
    with pytest.raises(UserError, match=r"for another base: model.llm .*other has fingerprint"):
        Model(peft, overrides=[f"--config.model.llm={other}"])


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_other_dtypes(tiny_workdir, dtype):
    found = Model(tiny_workdir, dtype=dtype)
    kernels = {str(x.dtype) for x in jax.tree.leaves(found.variables["params"]["llm"]) if x.ndim == 3}
    assert kernels == {dtype}
    assert found.system.model.dtype == jnp.dtype("bfloat16" if dtype == "bfloat16" else "float32")
    assert len(found.generate((CLIP, 16000)).tokens) > 0
    if dtype != "int8":
        assert found.system.model.matmul_dtype is None  # computed in what it is held in
    else:
        with pytest.raises(UserError, match="int8 weights cannot take what LoRA learned"):
            Model(tiny_workdir, dtype=dtype, adapters="merged")


def test_a_long_recording_is_answered_in_pieces(model, monkeypatch):
    monkeypatch.setattr(model, "longest_seconds", 1.0)
    long = np.concatenate([CLIP, np.zeros(3_000, np.float32), CLIP])
    reply = model.generate((long, 16000))
    starts, ends, texts = zip(*reply.pieces, strict=True)
    assert starts == (0.0, ends[0]) and ends[1] == len(long) / 16000 and 13_000 < ends[0] * 16000 <= 16_000
    assert reply.text == " ".join(filter(None, texts))
    cut = round(ends[0] * 16000)
    assert [r.text for r in model.generate([(long[:cut], 16000), (long[cut:], 16000)])] == list(texts)
    assert "".join(model.stream((long, 16000))) == reply.text
    # What a clip draws does not depend on what the one before it was cut into.
    drawn = {"temperature": 2.0, "seed": np.int64(3), "stop": None}
    after_long, after_short = (model.generate([(first, 16000), (CLIP, 16000)], **drawn)[1] for first in (long, CLIP))
    assert after_long.tokens == after_short.tokens
    with pytest.raises(UserError, match=r"audio: 1.8 s, and this model takes at most 1 s at once: cut it"):
        model.generate((long, 16000), split=False)
    with pytest.raises(UserError, match="takes at most 1 s"):
        model.chat().say(audio=(long, 16000))


def test_answers_of_all_lengths_share_weights(model):
    model._weights.__dict__.pop("apart", None)
    held = []
    for n in (2, 3):
        model.generate((CLIP, 16000), max_new_tokens=n)
        held.append(model._weights.__dict__["apart"])
    assert held[0] is held[1]


def test_an_encoder_s_window_bounds_a_clip(tiny_config, random_variables, write_workdir, tmp_path):
    c = tiny_config()
    c.embedder.kind, c.embedder.from_teacher = "stack", False
    c.model.encoder, c.model.teacher, c.lora.n_blocks = c.model.teacher, "", 2
    c.data.max_seconds = 60.0
    built = system_lib.build(c)
    variables = random_variables(built)
    found = Model(write_workdir(built, variables, tmp_path / "run"))
    assert found.longest_seconds == 30.0
    expected = Generator(built, variables).generate([Request(CLIP)])[0]
    assert found.generate((CLIP, 16000)).tokens == expected.tokens


def test_a_chat_hears_its_earlier_turns(model, tiny_loaded):
    chat = model.chat()
    one = chat.say(audio=(CLIP, 16000))
    two = chat.say("And why?")
    history = ({"role": "user", "audio": CLIP}, {"role": "assistant", "content": one.text})
    expected = Generator(*tiny_loaded).generate([Request(prompt="And why?", history=history)])[0]
    assert two.tokens == expected.tokens
    assert [turn["role"] for turn in chat.turns] == ["user", "assistant"] * 2
    with pytest.raises(UserError, match="nothing to answer"):
        chat.say()
    with pytest.raises(UserError, match="every 0: at least 1"):
        chat.stream("And why?", every=0)
    assert len(chat.turns) == 4


def test_a_chat_s_answer_can_be_streamed(model):
    told, said = model.chat(), model.chat()
    said.say(audio=(CLIP, 16000), prompt="What is it?")
    parts = told.stream("What is it?", audio=(CLIP, 16000))
    assert told.turns == []
    assert "".join(parts) == said.turns[1]["content"]
    np.testing.assert_array_equal(told.turns[0].pop("audio"), said.turns[0].pop("audio"))
    assert told.turns == said.turns


def test_a_stream_is_the_answer(model, answer):
    assert "".join(model.stream((CLIP, 16000), every=3)) == answer
    for wrong, match in (({"every": 0}, "every 0: at least 1"), ({"stop": ""}, "stop '': an empty string")):
        with pytest.raises(UserError, match=match):
            model.stream((CLIP, 16000), **wrong)
    with pytest.raises(UserError, match="a stream is of one answer"):
        model.stream([(CLIP, 16000)])


@pytest.mark.parametrize(
    ("audio", "how", "match"),
    [
        (None, {}, "nothing to answer"),
        (CLIP, {}, r"audio: ndarray: give a path, bytes, a binary stream, or \(samples, rate\)"),
        ((CLIP.astype(np.int16), 16000), {}, "give one channel of floats"),
        ([(CLIP, 16000), (CLIP, 10)], {}, r"audio\[1\]: sample rate 10 Hz"),
        ("missing.wav", {}, "missing.wav: no such audio file"),
        ((CLIP, 16000), {"adapters": False}, "adapters=False is for text"),
        ((CLIP, 16000), {"temperature": -1.0}, "temperature -1.0: give 0"),
        ((CLIP, 16000), {"top_p": 0.5}, "temperature 0 draws nothing"),
        ((CLIP, 16000), {"max_new_tokens": 0}, "0 new tokens: give a whole number from 1 on"),
        ((CLIP, 16000), {"max_new_tokens": 2.5}, "2.5 new tokens: give a whole number"),
        ((CLIP, "16000"), {}, r"audio: tuple: give a path, .*; of several, a list"),
        (("a.wav", "b.wav"), {}, r"audio: tuple: give a path, .*; of several, a list"),
        ((CLIP, None), {}, "audio: sample rate None Hz"),
        ([(CLIP, 16000)], {"prompt": ["Why?"]}, "a turn's text is one string, not list: give one prompt for all clips"),
        (None, {"prompt": "why \udcff"}, r"a turn's text is not Unicode, 'why \\udcff': write it in UTF-8"),
        (None, {"prompt": "why " * 2100}, r"tokens to read and max_new_tokens 8 are more than the 2048 positions"),
    ],
)
def test_mistakes_are_one_line(model, audio, how, match):
    with pytest.raises(UserError, match=match) as error:
        model.generate(audio, **how)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("how", "match"),
    [
        ({"which": "newest"}, "which='newest': "),
        ({"dtype": "float16"}, "dtype='float16': did you mean"),
        ({"adapters": "off"}, "adapters='off': "),
        ({"batch_size": 0}, "batch size 0"),
        ({"max_new_tokens": 0}, "0 new tokens"),
        ({"overrides": ["--config.lora.rank=4"]}, "lora.rank is part of what the run was trained with"),
    ],
)
def test_mistakes_of_loading(tiny_workdir, how, match):
    with pytest.raises(UserError, match=match):
        Model(tiny_workdir, **how)


def test_a_model_without_adapters_merges_none(tiny_workdir, tiny_loaded, monkeypatch):
    built, variables = tiny_loaded
    plain = built.model.clone(config=dataclasses.replace(built.model.config, lora=None))
    read = dataclasses.replace(built, model=plain), {"params": variables["params"]}
    monkeypatch.setattr(api, "_read", lambda *_: read)
    with pytest.raises(UserError, match="adapters='merged': this model has none: leave it out"):
        Model(tiny_workdir, adapters="merged")


def test_folders_that_hold_no_model(tiny_workdir, tiny_llm_dir, exported, tmp_path):
    def mistake(path, **how) -> str:
        with pytest.raises(UserError) as error:
            Model(path, **how)
        return str(error.value)

    assert "neither a run nor an export is in it" in mistake(tmp_path)
    assert "a model without audio_config.json hears nothing" in mistake(tiny_llm_dir)
    (tmp_path / "run").mkdir()
    shutil.copy(tiny_workdir / "config.json", tmp_path / "run")
    assert "holds no checkpoint yet" in mistake(tmp_path / "run")
    assert "is an export: leave it out" in mistake(exported["hf"], which="latest")
    for name, lost, said in (
        ("hf", "model.safetensors", "no model.safetensors"),
        ("peft", "audio_config.json", "an adapter without audio_config.json hears nothing"),
    ):
        folder = shutil.copytree(exported[name], tmp_path / name)
        (folder / lost).unlink()
        assert said in mistake(folder)
    (tmp_path / "template").mkdir()
    broken = shutil.copytree(exported["hf"], tmp_path / "template", dirs_exist_ok=True)
    about = json.loads((broken / "audio_config.json").read_text())
    about["run"]["data"]["chat_template"] = "{{ nothing('of the kind') }}"
    (broken / "audio_config.json").write_text(json.dumps(about))
    assert "the chat template fails" in mistake(broken)


def test_the_command_line_takes_exports(exported, answer, tmp_path, capsys):
    soundfile.write(tmp_path / "clip.wav", CLIP, 16000, subtype="FLOAT")
    argv = ["generate", "--audio", str(tmp_path / "clip.wav")]
    assert cli.main([*argv, "--model", str(exported["hf"])]) == 0
    assert capsys.readouterr().out.strip() == answer
    assert cli.main([*argv, "--model", str(exported["merged"]), "--merged"]) == 0
    assert cli.main([*argv, "--model", "x", "--workdir", "y"]) == 2
    assert "not allowed with argument" in capsys.readouterr().err


def test_a_model_listens(model, streaming_workdir, monkeypatch):
    streams = Model(streaming_workdir, adapters="merged")
    session = streams.listen("Answer.", rate=8000, max_new_tokens=5, stop="!", temperature=0.5, seed=2)
    for start in range(0, len(CLIP), 1000):
        session.push(CLIP[start : start + 1000])
    expected = streams.generate((CLIP, 8000), "Answer.", max_new_tokens=5, stop="!", temperature=0.5, seed=2)
    assert session.reply().tokens == expected.tokens
    with pytest.raises(UserError, match=r"model.normalisation 'whisper' hears whole clips only"):
        model.listen()
    with pytest.raises(UserError, match="stop '': an empty string"):
        streams.listen(stop="")
    monkeypatch.setattr(streams, "_n_positions", 380)
    streams.listen(max_seconds=20, max_new_tokens=5)
    with pytest.raises(UserError, match="tokens to read and max_new_tokens 5 are more than the 380 positions"):
        streams.listen(max_seconds=30, max_new_tokens=5)


def test_the_page_s_code_runs(tiny_workdir, streaming_workdir, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "quickstart").symlink_to(tiny_workdir)
    (tmp_path / "runs" / "quickstart-streaming").symlink_to(streaming_workdir)
    for name in ("clip.wav", "other.wav"):
        soundfile.write(tmp_path / name, CLIP, 16000)
    soundfile.write(tmp_path / "meeting.wav", CLIP, 16000)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AURA_JAX_CACHE", str(tmp_path / "cache"))
    before = jax.config.jax_compilation_cache_dir
    names: dict = {}
    try:
        for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
            exec(block, names)
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert isinstance(names["reply"], aura_jax.Reply)
