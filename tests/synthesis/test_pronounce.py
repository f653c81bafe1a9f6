"""Pronunciation: what a dictionary and regular English endings say, and nothing that must be guessed."""

import pytest

from aura_jax.synthesis.pronounce import Lexicon, Unspoken

WORDS = {
    "want": "wˈɔnt", "stop": "stˈɑp", "hope": "hˈOp", "hop": "hˈɑp", "bake": "bˈAk", "carry": "kˈæɹi", "box": "bˈɑks",
    "cat": "kˈæt", "dog": "dˈɔɡ", "sing": "sˈɪŋ", "singe": "sˈɪnʤ", "visit": "vˈɪzɪt", "apple": "ˈæpᵊl", "go": "ɡˌO",
    "wonder": "wˈʌndəɹ", "Mr.": "mˈɪstəɹ", "Paris": "pˈɛɹəs", "polish": "pˈɑlɪʃ", "Polish": "pˈOlɪʃ", "I": "ˈI",
    "read": {"DEFAULT": "ɹˈid", "VBD": "ɹˈɛd"}, "by": {"DEFAULT": "bI", "None": "bˈI"}, "of": "ʌv", "the": "ði",
    "increase": {"DEFAULT": "ɪnkɹˈis", "NOUN": "ˈɪnkɹis"}, "to": "tu", "etc": "ɛtsˈɛɾəɹə",
    "TV": "tˌivˈi", "well": "wˈɛl",
}  # fmt: skip
AMERICAN = Lexicon(WORDS, british=False)
BRITISH = Lexicon(WORDS | {"wonder": "wˈʌndə"}, british=True)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("cats", "kˈæts"), ("dogs", "dˈɔɡz"), ("boxes", "bˈɑksᵻz"), ("carries", "kˈæɹiz"), ("cat's", "kˈæts"),
        ("Paris's", "pˈɛɹəsᵻz"), ("wanted", "wˈɔntᵻd"), ("stopped", "stˈɑpt"), ("carried", "kˈæɹid"),
        ("hoped", "hˈOpt"), ("hopped", "hˈɑpt"), ("hoping", "hˈOpɪŋ"), ("hopping", "hˈɑpɪŋ"), ("singing", "sˈɪŋɪŋ"),
        ("visiting", "vˈɪzɪtɪŋ"), ("Baked", "bˈAkt"), ("well-baked", "wˈɛl bˈAkt"), ("increase", "ɪnkɹˈis"),
    ],
)  # fmt: skip
def test_regular_endings_are_said_as_their_stem_asks(word, said):
    assert AMERICAN.phonemes(word) == said


def test_accents_differ():
    assert AMERICAN.phonemes("wondering boxes") == "wˈʌndəɹɪŋ bˈɑksᵻz"
    assert BRITISH.phonemes("wondering boxes") == "wˈʌndəɹɪŋ bˈɑksɪz"


def test_small_words_are_said_as_what_follows_asks():
    said = AMERICAN.phonemes("Mr. Cat, go to the apple of a dog by an apple! I go to.")
    assert said == "mˈɪstəɹ kˈæt, ɡˌO tə ði ˈæpᵊl ʌv ɐ dˈɔɡ bI ɐn ˈæpᵊl! ˈI ɡˌO tu."
    assert AMERICAN.phonemes("go by.") == "ɡˌO bˈI."


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("go by 3", "a sign: '3'"),
        ("go --by", "a sign: '-'"),
        ("cats & dogs", "a sign: '&'"),
        ("I go to Narnia.", "an unknown word: 'Narnia'"),
        ("I read.", "said in two ways: 'read'"),
        ("Polish", "said in two ways: 'Polish'"),
        ("I TV", "letters or capitals: 'TV'"),
        ("B", "letters or capitals: 'B'"),
        ("Go etc. by", "an abbreviation: 'etc.'"),
        ("cats etc.", "an abbreviation: 'etc.'"),
        ("a cat. by", "an abbreviation: 'cat.'"),
        ("...", "no words"),
        ("", "no words"),
    ],
)
def test_what_would_have_to_be_guessed_is_refused(text, why):
    with pytest.raises(Unspoken) as caught:
        AMERICAN.phonemes(text)
    assert str(caught.value) == why
