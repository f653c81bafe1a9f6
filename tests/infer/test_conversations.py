"""Several clips in one conversation, against the model applied to columns that are joined by hand."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aura_jax import system as system_lib
from aura_jax.audio import features
from aura_jax.errors import UserError
from aura_jax.infer.cascade import Cascade
from aura_jax.infer.generate import Generator
from aura_jax.infer.prompting import Request, lay_out, tokenise
from aura_jax.models.speech_llm import Columns

# Seconds of three clips, in a room for four; the neighbours have two, in a room for two, and one.
CLIPS = [
    (np.random.default_rng(i).standard_normal(round(seconds * 16000)) * 0.1).astype(np.float32)
    for i, seconds in enumerate((0.61, 1.37, 0.9))
]
CHAT = Request(
    CLIPS[2],
    "Answer.",
    history=(
        {"role": "user", "audio": CLIPS[0]},
        {"role": "assistant", "content": "Which window?"},
        {"role": "user", "audio": CLIPS[1], "content": "And this?"},
        {"role": "assistant", "content": "The left one."},
        {"role": "user", "content": "Thanks."},
        {"role": "assistant", "content": "More?"},
    ),
)
WRITTEN_LAST = Request(prompt="Why?", history=CHAT.history)


def by_hand(system, variables, request: Request) -> np.ndarray:
    """Returns the logits [T, V] at every token: one row, one segment, no padding, clip after clip embedded alone."""
    turns = [*request.history, {"role": "user", "audio": request.waveform, "content": request.prompt}]
    render = lambda turn, mark: mark + ("\n" + turn["content"] if turn.get("content") else "")
    shown = [
        {
            "role": turn["role"],
            "content": render(turn, "<|audio|>") if turn.get("audio") is not None else turn["content"],
        }
        for turn in turns
    ]
    text = system.tokenizer.apply_chat_template(shown, add_generation_prompt=True, tokenize=False)
    clips = [turn["audio"] for turn in turns if turn.get("audio") is not None]
    tokens, spans = [], []
    for part, clip in zip(text.split("<|audio|>"), [*clips, None], strict=True):
        tokens += system.chat.text(part)
        if clip is not None:
            n_audio = int(features.n_audio_tokens(len(clip), system.config.embedder.token_rate))
            spans.append((len(tokens), len(tokens) + n_audio))
            tokens += [0] * n_audio
    n, longest = len(tokens), max(end - start for start, end in spans)
    source, starts, ends = np.full(n, -1), np.arange(n), np.arange(n) + 1
    for k, (start, end) in enumerate(spans):
        source[start:end] = k * longest + np.arange(end - start)
        starts[start:end], ends[start:end] = start, end
    row = lambda x: jnp.asarray(x, jnp.int32)[None]
    columns = Columns(
        tokens_BxT=row(tokens),
        position_BxT=row(np.arange(n)),
        segment_BxT=row(np.ones(n)),
        span_start_BxT=row(starts),
        span_end_BxT=row(ends),
        audio_source_BxT=row(source),
        audio_position_BxKxA=jnp.zeros((1, len(clips), longest), jnp.int32),
        request_audio_BxT=jnp.ones((1, n), bool),
    )
    n_samples = -(-max(map(len, clips)) // features.HOP) * features.HOP
    padded = np.stack([np.pad(clip, (0, n_samples - len(clip))) for clip in clips])
    lengths = np.array([len(clip) for clip in clips])
    mel = features.log_mel(padded, n_samples_B=lengths, normalisation=system.config.model.normalisation)
    h, _ = jax.jit(system.model.apply)(variables, columns, mel[None], features.n_frames(lengths)[None])
    return np.asarray(system.model.apply(variables, h[0], method="logits"))


@pytest.mark.parametrize("mask", ["bidirectional", "causal"])
def test_equals_the_model_on_joined_columns(tiny_config, tiny_loaded, mask):
    _, variables = tiny_loaded  # no mask has variables
    config = tiny_config()
    config.model.mask = mask
    system = system_lib.build(config)
    generator = Generator(system, variables)
    expected = by_hand(system, variables, CHAT)
    np.testing.assert_allclose(generator.prompt_logits(CHAT), expected, atol=2e-5 * np.abs(expected).max())
    if mask == "bidirectional":
        last = by_hand(system, variables, WRITTEN_LAST)
        np.testing.assert_allclose(generator.prompt_logits(WRITTEN_LAST), last, atol=2e-5 * np.abs(last).max())


def test_neighbours_and_padding_do_not_matter(tiny_loaded):
    generator = Generator(*tiny_loaded)
    first = Request(CLIPS[0], "Answer.")
    longer = Request(np.tile(CLIPS[1], 2), "Answer.", history=CHAT.history)  # another bucket
    alone = generator.generate([CHAT])[0].tokens
    together = generator.generate([longer, first, CHAT, Request(prompt="Hello.")])
    assert together[2].tokens == alone
    expected = by_hand(*tiny_loaded, CHAT)
    assert together[2].tokens[0] == expected[-1].argmax()
    other = Request(CHAT.waveform, CHAT.prompt, history=({**CHAT.history[0], "audio": CLIPS[1]}, *CHAT.history[1:]))
    assert generator.generate([other])[0].tokens != alone  # it hears the first clip
    assert len(generator.shapes) == 4  # text, one clip, four places for one row and for two


def test_few_shapes(tiny_loaded):
    system, _ = tiny_loaded
    turn = {"role": "user", "audio": CLIPS[0], "content": "So?"}
    shapes = []
    for n in (1, 2, 3, 4):
        prompt = tokenise(system, 0, Request(CLIPS[0], history=[turn, {"role": "assistant", "content": "Yes."}] * n))
        shapes.append(np.shape(lay_out(system, [prompt], 1).waveform_BxKxN))
    assert [shape[1] for shape in shapes] == [2, 4, 4, 8] and len({shape[2] for shape in shapes}) == 1


@pytest.mark.parametrize(
    ("history", "match"),
    [
        ([{"role": "assistant", "audio": CLIPS[0]}], "audio in a turn of 'assistant'"),
        ([{"role": "user", "audio": np.zeros((2, 800))}], "one mono waveform"),
        ([{"role": "user"}], "neither audio nor content"),
    ],
)
def test_bad_turns_say_why(tiny_loaded, history, match):
    with pytest.raises(UserError, match=match):
        Generator(*tiny_loaded).generate([Request(prompt="Why?", history=history)])


def test_a_cascade_hears_one_clip(tiny_loaded):
    generator: Any = Generator(*tiny_loaded)
    with pytest.raises(UserError, match="a cascade hears one clip"):
        Cascade(generator, generator).generate([CHAT])
