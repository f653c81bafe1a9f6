"""The text of a growing answer: what is certain stays, whatever the tokenizer, and a stop string ends it."""

import itertools

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from aura_jax.errors import UserError
from aura_jax.infer.answer_text import AnswerText, checked_stop

END = 0  # the stop id
PIECES = ("a", "b", "ab", "n", "'", "t", "!", "\n")


def byte_level() -> tuple:
    """Returns a tokenizer as of Llama 3 and Qwen, and what tokens are made of: a character may be cut anywhere."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate(["<end>", *alphabet, "Ġa", "ab"])}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.decoder = decoders.ByteLevel()
    cut = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    as_bytes = lambda text: [vocab[c] for c in cut.pre_tokenize_str(text)[0][0]]
    parts = [as_bytes(c) for c in "€😀 ab\n!"] + [as_bytes("€")[:2], as_bytes("😀")[1:], [vocab["Ġa"]], [vocab["ab"]]]
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer), parts


def sentence_pieces(**options) -> tuple:
    """Returns one as of Llama 2: of a run of bytes one too few, and all before it are decoded to something else."""
    tokens = ["<end>", *(f"<0x{byte:02X}>" for byte in range(256)), *(f"{_}{x}" for _ in ("", "▁") for x in PIECES)]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    as_bytes = lambda text: [1 + byte for byte in text.encode()]
    parts = [[i] for i in range(257, len(tokens))] + [as_bytes("€"), as_bytes("😀"), as_bytes("€")[:2]]
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options), parts


KINDS = {
    "byte level": byte_level(),
    "byte fallback": sentence_pieces(),
    "clean-up": sentence_pieces(
        clean_up_tokenization_spaces=True, clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output=True
    ),
}


def read(tokenizer, tokens: list[int], stop: list[str], every: int) -> tuple[AnswerText, list[str]]:
    """Returns the answer after all its tokens, `every` at a time, and its text after each time."""
    answer, texts = AnswerText(tokenizer, (END,), stop), []
    for n in [*range(every, len(tokens), every), len(tokens)]:
        answer.read(tokens[:n], is_whole=n == len(tokens))
        texts.append(answer.text)
    return answer, texts


def as_read_by_character(text: str, stop: list[str]) -> tuple[str, bool]:
    """Returns the text before the first stop string that is complete, and whether there is one."""
    for n in range(1, len(text) + 1):
        ends = [s for s in stop if text[:n].endswith(s)]
        if ends:
            return text[: n - max(map(len, ends))], True
    return text, False


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_pieces_are_certain_and_any_number_at_a_time_gives_the_same(kind, data):
    tokenizer, parts = KINDS[kind]
    drawn = data.draw(st.lists(st.sampled_from([*parts, [END]]), min_size=1, max_size=14))
    tokens = list(itertools.chain.from_iterable(drawn))
    stop = data.draw(st.lists(st.text("ab€ n't\n", min_size=1, max_size=3), max_size=3))
    whole, _ = read(tokenizer, tokens, stop, len(tokens))
    own = tokens[: tokens.index(END)] if END in tokens else tokens
    text, stopped = as_read_by_character(tokenizer.decode(own, skip_special_tokens=True), stop)
    assert (whole.text, whole.ended) == (text.strip(), stopped or END in tokens)
    assert stopped or whole.tokens == own
    for every in (1, 3):
        answer, texts = read(tokenizer, tokens, stop, every)
        assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
        assert (answer.text, answer.ended) == (whole.text, whole.ended)
        assert answer.tokens == read(tokenizer, tokens, stop, 2)[0].tokens


def test_a_space_that_goes_when_its_neighbour_has_gone_is_held_back():
    tokenizer, _ = KINDS["clean-up"]
    vocab = tokenizer.get_vocab()
    texts = read(tokenizer, [vocab[piece] for piece in ("a", "▁n", "▁'", "▁t")], [], 1)[1]
    assert texts == ["", "a", "a", "an't"]


def told(stop: list[str], *pieces: str) -> list[str]:
    """Returns the text after each of the pieces of the byte-level tokenizer."""
    tokenizer, _ = KINDS["byte level"]
    vocab = tokenizer.get_vocab()
    return read(tokenizer, [vocab[piece] for piece in pieces], stop, 1)[1]


def test_what_may_still_change_is_held_back():
    assert told([], "a", "â", "Ĥ", "¬", "b") == ["a", "a", "a", "a€", "a€b"]  # the three bytes of €
    assert told([], "a", "Ġ", "Ġ", "b", "Ċ") == ["a", "a", "a", "a  b", "a  b"]
    assert told([" b!"], "a", "Ġ", "b", "a", "Ġ", "b", "!", "a") == ["a", "a", "a", "a ba", "a ba"] + 3 * ["a ba"]
    assert told(["!"], "a", "â", "Ĥ") == ["a", "a", "a\ufffd"]  # cut by the longest length


def test_the_stop_string_that_is_complete_first_counts():
    assert told(["ab!", "b"], "a", "b", "!") == ["", "a", "a"]
    assert told(["b", "ab"], "!", "a", "b") == ["!", "!", "!"]


def test_what_is_no_list_of_stop_strings_says_so():
    with pytest.raises(UserError, match=r"stop 'END': give a list of strings, such as \['END'\]"):
        checked_stop("END")
    with pytest.raises(UserError, match="an empty string is everywhere"):
        checked_stop(["END", ""])
