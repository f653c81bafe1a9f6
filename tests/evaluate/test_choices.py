"""Multiple choice: the usual forms of an answer, and all that must not be guessed at."""

import pytest

from aura_jax.errors import UserError
from aura_jax.evaluate.choices import Choices, parse, read_choices, score_choices

CITIES = ("Rome", "Paris", "a big town", "Forty-two")


@pytest.mark.parametrize(
    "answer",
    [
        "B", "b", "B.", "B)", "(B)", "(b)", "(B).", " B \n", "**B**", '"B"', "B:",
        "B. Paris", "B) Paris", "(B) Paris.", "B: Paris", "B - Paris", "**B.** Paris", "**B. Paris**",
        "(B) Because it is the capital.", "B. It is the capital of France.",
        "Paris", "paris.", "'Paris'", "*Paris*", "  PARIS",
        "The answer is B", "The answer is B.", "the answer is (B)", "The answer is: B", "Answer: B", "answer: (b)",
        "The correct answer is B.", "The right option is B", "My final answer is B!", "The answer is **B**.",
        "The correct answer is B) Paris.", "The answer is B: Paris", "The answer is (B) Paris", "Answer: Paris",
        "The answer is Paris.", "The answer is option B.", "Option B", "Answer B.", "Option B is correct.",
        "B is the correct answer.", "I think the answer is B.", "So, the answer is B because it is the capital.",
        "France is old. Therefore, the answer is B.", "Rome is in Italy.\nAnswer: B", "The answer is B, a capital.",
        "The answer is B. A capital is where the king lives.",
    ],
)  # fmt: skip
def test_the_usual_forms(answer):
    assert parse(answer, CITIES) == 1


@pytest.mark.parametrize(
    "answer",
    [
        "", ".", "E", "(E)", "The answer is E.", "Z. Paris", "Lyon", "It might be Paris or Rome.",
        "A or B", "A, B", "A and B", "B or C", "(A) or (B)", "A. B. C.", "B) or C)", "The answer is A or B.",
        "The answer is B, or C.", "The answer is A. No, the answer is B.", "B. Rome", "(B) Rome",
        "The answer is B: Rome", "The answer is B. Rome.", "The answer is (B) Rome",
        "The answer is not B.", "I don't think the answer is B.", "B is not correct.", "B is wrong.",
        "Is the answer B?", "B. Well, A is correct.",
        "If the answer is B, then why?", "I do not know.", "I think so.", "A town", "A nice place. B", "Be careful.",
        "The answer is a question.", "The answer is A town.", "Both are correct", "Parisian", "Not Paris", "Bob",
        "Plan B is correct.", "Paris Rome", "42", "(B) is not correct.",
        "(B) is wrong", "B) may be right", "(B) or (C)", "(B) versus the others", "(B) isn't it", "B: not sure",
        "The answer is the capital of France, Paris.", "Vitamin B",
    ],
)  # fmt: skip
def test_nothing_is_guessed(answer):
    assert parse(answer, CITIES) is None


def test_articles_and_pronouns_are_no_letters():
    assert parse("A", CITIES) == 0 and parse("A big town", CITIES) == 2
    assert parse("The answer is a big town.", CITIES) == 2 and parse("The answer is A big town", CITIES) == 2
    many = tuple(f"choice {i}" for i in range(10))
    assert parse("B. I think it is.", many) == 1 and parse("I", many) == 8 and parse("I do", many) is None
    assert parse("I.", many) == 8 and parse("C) A nice one", CITIES) == 2


def test_texts_that_look_like_letters_or_like_each_other():
    assert parse("B", ("B", "A")) is None  # the letter says A, the text B
    assert parse("B.", ("A", "B")) == 1
    assert parse("same", ("same", "Same.")) is None and parse("b", ("same", "Same.")) == 1
    assert parse("A. M. Turing", ("K. Zuse", "A. M. Turing")) == 1 and parse("(B) is correct.", CITIES) == 1
    assert parse("f(z)", ("f(x)", "f(y)")) is None and parse("f(x)", ("f(x)", "f(y)")) == 0
    assert parse("-5", ("5", "-5")) == 1 and parse("5!", ("5", "5!")) == 1


def test_of_a_row():
    of = lambda answer: read_choices({"choices": list(CITIES), "answer": answer, "voice": "x"}, "set.jsonl:1")
    assert of("B") == of("b") == of("(B)") == of("Paris") == of("paris") == Choices(CITIES, 1)
    assert of("B").answer == "B. Paris"
    assert read_choices({"voice": "x", "answer": "B"}, "set.jsonl:1") is None


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"choices": ["x", "y"]}, "'choices' without an 'answer'"),
        ({"choices": ["x", "y"], "answer": 1}, "letter from A to B"),
        ({"choices": "x", "answer": "A"}, "not a list of texts"),
        ({"choices": ["x", 2], "answer": "A"}, "not a list of texts"),
        ({"choices": ["x", " "], "answer": "A"}, "not a list of texts"),
        ({"choices": ["x"], "answer": "A"}, "has 1 texts: give 2 to 26"),
        ({"choices": ["x"] * 27, "answer": "A"}, "has 27 texts"),
        ({"choices": ["x", "y"], "answer": "C"}, "'answer' 'C' names none of the choices"),
        ({"choices": ["x", "x"], "answer": "x"}, "names several"),
        ({"choices": ["B", "A"], "answer": "A"}, "names several"),
    ],
)
def test_a_mistake_in_a_row_is_one_line_that_names_it(values, match):
    with pytest.raises(UserError, match=match) as caught:
        read_choices(values, "set.jsonl:7")
    assert str(caught.value).startswith("set.jsonl:7: ") and "\n" not in str(caught.value)


def test_the_unparsable_are_wrong_and_counted():
    questions = [Choices(("x", "y"), right) for right in (0, 1, 1, 0)]
    scores = score_choices(["A", "A", "who knows", "x"], questions)
    assert scores["multiple_choice"]["value"] == 0.5 and scores["unparsable"]["value"] == 0.25
    for one in scores.values():
        assert one["low"] <= one["value"] <= one["high"] and one["n"] == 4
