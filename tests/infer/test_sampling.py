"""Sampling: against transformers' processors, against the softmax, and independent of the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
import transformers
from transformers.generation import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from aura_jax import system as system_lib
from aura_jax.errors import UserError
from aura_jax.infer import generate
from aura_jax.infer.generate import Generator
from aura_jax.infer.prompting import Request
from aura_jax.infer.sampling import Choice, Sampling, adjusted, next_token

VOCAB = 1000
CLIP = (np.random.default_rng(0).standard_normal(16000) * 0.1).astype(np.float32)
DRAWN = Sampling(temperature=0.8, top_p=0.95, repetition_penalty=1.1, seed=7)


def choice(sampling: Sampling, tokens: np.ndarray, vocab: int = VOCAB, numbers: np.ndarray | None = None) -> Choice:
    numbers = np.arange(len(tokens)) if numbers is None else numbers
    return Choice.of(sampling, numbers, tokens, np.ones(tokens.shape, bool), vocab)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.7])
def test_equals_transformers(temperature, top_p, penalty):
    rng = np.random.default_rng(1)
    logits = (rng.standard_normal((8, VOCAB)) * 4).astype(np.float32)
    tokens = rng.integers(0, VOCAB, (8, 50))
    theirs = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty), TemperatureLogitsWarper(temperature)])
    if top_p < 1:
        theirs.append(TopPLogitsWarper(top_p))
    expected = theirs(torch.tensor(tokens), torch.tensor(logits)).numpy()
    sampling = Sampling(temperature=temperature, top_p=top_p, repetition_penalty=penalty)
    found = np.asarray(jax.jit(adjusted)(logits, choice(sampling, tokens)))
    assert np.array_equal(np.isinf(found), np.isinf(expected)) and np.isfinite(found).any(1).all()
    stays = np.isfinite(expected)
    assert np.abs(found[stays] - expected[stays]).max() <= 1e-4 * np.abs(expected[stays]).max()


@pytest.mark.parametrize("sampling", [Sampling(temperature=1.0), Sampling(temperature=0.7, top_p=0.8, seed=11)])
@pytest.mark.parametrize("place", [0, 5])
def test_draws_follow_the_softmax(sampling, place):
    logits, n = np.array([2.0, 1.5, 0.0, -0.5, 1.0, -3.0, 0.3], np.float32), 20_000
    drawn = next_token(jnp.tile(logits, (n, 1)), choice(sampling, np.zeros((n, 1), int), len(logits)), place)
    counts = np.bincount(np.asarray(drawn), minlength=len(logits))
    share = np.exp(logits.astype(float) / sampling.temperature)
    if sampling.top_p < 1:
        above = np.cumsum(np.sort(share / share.sum())[::-1]) - np.sort(share / share.sum())[::-1]
        share[np.argsort(-share)[above >= sampling.top_p]] = 0
    assert 3 <= (share > 0).sum() <= len(share) and counts[share == 0].sum() == 0
    expected = n * share / share.sum()
    assert scipy.stats.chisquare(counts[share > 0], expected[share > 0]).pvalue > 0.01


def test_draws_of_successive_tokens_are_independent():
    n = 20_000
    chosen = choice(Sampling(temperature=1.0), np.zeros((n, 1), int), 3)
    first, second = (np.asarray(next_token(jnp.zeros((n, 3)), chosen, place)) for place in (1, 2))
    assert scipy.stats.chisquare(np.bincount(3 * first + second, minlength=9)).pvalue > 0.01


def test_a_draw_depends_on_seed_number_and_place_alone():
    logits = np.random.default_rng(2).standard_normal((6, VOCAB)).astype(np.float32)
    tokens, numbers = np.zeros((6, 1), int), np.array([4, 9, 0, 2**32 - 1, 7, 8])
    drawn = lambda seed, rows, place: np.asarray(
        next_token(logits[rows], choice(Sampling(1.0, seed=seed), tokens[rows], numbers=numbers[rows]), place)
    ).tolist()
    rows = np.arange(6)
    together = drawn(1, rows, 3)
    assert drawn(1, rows[::-1], 3) == together[::-1]
    assert [drawn(1, rows[[i]], 3)[0] for i in rows] == together
    assert (
        len({tuple(drawn(*other)) for other in ((1, rows, 3), (1, rows, 4), (2, rows, 3), (2**32 - 1, rows, 3))}) == 4
    )


def test_the_penalty_counts_text_alone_and_then_the_answer():
    tokens, is_text = np.array([[1, 2, 3]]), np.array([[True, False, True]])
    chosen = Choice.of(Sampling(repetition_penalty=2.0), np.zeros(1), tokens, is_text, 6)
    assert np.flatnonzero(chosen.seen_BxV[0]).tolist() == [1, 3]
    chosen = chosen.after(jnp.array([5]))
    logits = np.array([[1.0, 2.0, 1.5, -1.0, 0.5, 4.0]], np.float32)
    assert adjusted(logits, chosen).tolist() == [[1.0, 1.0, 1.5, -2.0, 0.5, 2.0]]


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"temperature": -0.1}, r"temperature -0.1: give 0 \(the likeliest token\), or 0.001 to 100"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"temperature": 1e-9}, "temperature 1e-09"),
        ({"temperature": 1, "top_p": 0}, "top_p 0: give a share above 0 and up to 1"),
        ({"temperature": 1, "top_p": 1.5}, r"top_p 1\.5"),
        ({"repetition_penalty": 0}, "repetition_penalty 0: give 0.01 to 100"),
        ({"temperature": 1, "seed": -1}, "seed -1: give a whole number from 0 to 4294967295"),
        ({"temperature": 1, "seed": 2**32}, "seed 4294967296"),
        ({"top_p": 0.9}, "top_p 0.9 is of sampling, and temperature 0 draws nothing"),
        ({"seed": 3}, "seed 3 is of sampling"),
    ],
)
def test_values_out_of_range_say_so(values, match):
    with pytest.raises(UserError, match=match):
        Sampling(**values)


def test_a_request_is_answered_alike_in_any_batch(tiny_loaded):
    requests = [Request(prompt="Turn on the lights."), Request(CLIP), Request(prompt="Why?"), Request(CLIP[:9000])]
    generator = Generator(*tiny_loaded)
    together = [reply.tokens for reply in generator.generate(requests, sampling=DRAWN)]
    assert together == [reply.tokens for reply in generator.generate(requests, sampling=DRAWN)]
    assert together != [reply.tokens for reply in generator.generate(requests)]
    alone = Generator(*tiny_loaded, batch_size=1)
    for number in (2, 3):
        request = Request(requests[number].waveform, requests[number].prompt, number=number)
        assert alone.generate([request], sampling=DRAWN)[0].tokens == together[number]
    same = Request(prompt="Why?")
    assert len({reply.tokens for reply in generator.generate([same] * 4, sampling=DRAWN)}) == 4


def test_other_numbers_compile_nothing_and_greedy_is_what_it_was(tiny_loaded):
    requests, generator = [Request(prompt="Why?")] * 4, Generator(*tiny_loaded)
    generator.generate(requests, sampling=DRAWN)
    sizes = lambda: (generate._prefill._cache_size(), generate._decode._cache_size())
    before = sizes()
    for other in (Sampling(1.5, 0.5, 1.7, 1), Sampling(0.1, 0.99, 0.9, 2)):
        generator.generate(requests, sampling=other)
    assert sizes() == before
    assert jax.tree.leaves(choice(Sampling(), np.zeros((2, 3), int))) == []  # nothing enters the greedy program


def test_a_penalty_equals_transformers_generate(tiny_config):
    built = system_lib.build(tiny_config())
    variables = {"params": {"llm": system_lib.load_llm(built, system_lib.sharding.make_mesh(1, -1, 1))}}
    reply = Generator(built, variables).generate(
        [Request(prompt="Turn on the lights.")], sampling=Sampling(repetition_penalty=1.5)
    )[0]
    model = transformers.AutoModelForCausalLM.from_pretrained(built.llm_dir, dtype=torch.float32)
    ids = torch.tensor([built.chat.encode("Turn on the lights.", has_audio=False)[0]])
    with torch.no_grad():
        settings = dict(do_sample=False, repetition_penalty=1.5, max_new_tokens=8)
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, ids.shape[1] :].tolist()
    stop = next((i for i, token in enumerate(expected) if token in built.chat.stop_ids), len(expected))
    assert list(reply.tokens) == expected[:stop]
