"""The page against its dictionary: every number, every absence, hostile text, and that nothing is loaded."""

import copy
import json
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from aura_jax.report import page

VOID = {"meta", "link", "img", "br", "path", "use", "rect", "image", "line"}


class Parsed(HTMLParser):
    """The page's <data> elements with their text, all attributes, and its text without style sheets."""

    def __init__(self, html: str):
        super().__init__()
        self.numbers: list[tuple[dict[str, str | None], str]] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.text = ""
        self.by_id: dict[str, str] = {}
        self._stack: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag == "data":
            self.numbers.append((dict(attrs), ""))
        if tag not in VOID:
            self._stack.append((tag, dict(attrs)))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self._stack.pop()

    def handle_endtag(self, tag: str) -> None:
        opened, _ = self._stack.pop()
        assert opened == tag, f"<{opened}> is closed by </{tag}>"

    def handle_data(self, data: str) -> None:
        if self._stack and self._stack[-1][0] == "data":
            attributes, text = self.numbers[-1]
            self.numbers[-1] = attributes, text + data
        for _, attributes in self._stack:
            if name := attributes.get("id"):
                self.by_id[name] = self.by_id.get(name, "") + data
        if not any(tag in ("style", "title") for tag, _ in self._stack):
            self.text += data


def reached(data: Any, key: str) -> Iterator[Any]:
    """Yields what `key` may mean: names of test sets may themselves have dots."""
    if not key:
        yield data
    elif isinstance(data, list):
        index, _, rest = key.partition(".")
        if index.isdigit() and int(index) < len(data):
            yield from reached(data[int(index)], rest)
    elif isinstance(data, dict):
        for name in data:
            if key == name or key.startswith(f"{name}."):
                yield from reached(data[name], key[len(name) + 1 :])


def number(data: Any, key: str) -> float:
    [value] = [value for value in reached(data, key) if not isinstance(value, dict | list)]
    return value


def rounded(value: float, shown: str) -> bool:
    """Tells whether `shown` is `value` to as many digits as it has."""
    shown = shown.replace(",", "").replace("\u2212", "-")
    digits = len(shown.partition(".")[2])
    return abs(float(shown) - value) <= 0.5 * 10**-digits * (1 + 1e-9)


def check_numbers(data: dict[str, Any], parsed: Parsed) -> set[str]:
    """Compares every <data> element with the dictionary; returns the keys that were shown."""
    seen = set()
    for attributes, shown in parsed.numbers:
        key, how = attributes["data-key"] or "", attributes.get("data-how")
        keys = json.loads(key) if how else [key]
        values = [number(data, each) for each in keys]
        expected = {None: values[0], "sum": np.sum(values), "mean": np.mean(values)}[how]
        assert float(attributes["value"] or "") == pytest.approx(expected, rel=1e-12, abs=1e-12), key
        if how is None:
            assert json.loads(attributes["value"] or "") == values[0], key
        assert rounded(expected * float(attributes.get("data-scale") or 1), shown), (key, shown)
        seen |= set(keys)
    return seen


def test_every_number_is_the_dictionarys(report_data):
    seen = check_numbers(report_data, Parsed(page.render(report_data)))
    for name in report_data["scores"]["sets"]:
        for rate in ("wer", "exact_match"):
            assert {f"scores.sets.{name}.{rate}.{end}" for end in ("value", "low", "high")} <= seen
        assert f"scores.sets.{name}.n" in seen
    for i in range(len(report_data["parameters"])):
        assert {f"parameters.{i}.trained", f"parameters.{i}.frozen"} <= seen
    assert {f"examples.{i}.errors" for i in range(len(report_data["examples"]))} <= seen
    assert {"step", "total_steps", "speed.peak_memory_gib", "speed.breakdown.0.seconds"} <= seen
    assert {"scores.text.loss.all.rise", "scores.seconds.train", "validation.wer.1", "model.rank"} <= seen
    assert len(seen) > 90


def test_noise_and_likelihood_are_shown_where_they_were_measured(report_data):
    assert "In noise" not in page.render(report_data)
    rate = lambda value: {"value": value, "low": value / 2, "high": 2 * value, "n": 9}
    levels = {"20": {"n": 9, "wer": rate(0.25)}, "0": {"n": 9, "wer": rate(0.5)}}
    report_data["scores"]["noise"] = {"new voices": {"white": levels, "babble": levels}}
    reading = {"nats": rate(0.1), "perplexity": rate(1.1)}
    likelihood = {"n": 9, "tokens": 80, "speech": reading, "text": reading, "divergence": rate(0.3)}
    report_data["scores"]["likelihood"] = {"new voices": likelihood}
    seen = check_numbers(report_data, Parsed(page.render(report_data)))
    assert {f"scores.noise.new voices.{kind}.0.wer.high" for kind in ("white", "babble")} <= seen
    assert {f"scores.likelihood.new voices.{key}.value" for key in ("divergence", "text.perplexity")} <= seen


def test_a_number_that_differs_is_found(report_data):
    parsed = Parsed(page.render(report_data))
    report_data["scores"]["sets"]["new voices"]["wer"]["value"] += 0.01
    with pytest.raises(AssertionError):
        check_numbers(report_data, parsed)


def test_last_values_are_of_steps_that_have_them(report_data):
    shown = {
        key: text for attributes, text in Parsed(page.render(report_data)).numbers if (key := attributes["data-key"])
    }
    assert "alignment.value.1.3" in shown and "alignment.value.1.4" not in shown  # the last step has no distillation


def test_signs_and_zeros():
    numbers = page.Numbers(
        {"rise": 0.05, "fall": -0.05, "none": None, "nan": float("nan"), "tiny": -1e-9, "n": 1234567}
    )
    text = lambda *args, **kwargs: str(numbers.show(*args, **kwargs).striptags())
    assert text(["rise"], 2, plus=True) == "+0.05" and text(["fall"], 2, plus=True) == "\u22120.05"
    assert text(["none"]) == text(["nan"]) == "\u2013"
    assert text(["tiny"], 2) == text(["tiny"], 2, plus=True) == "0.00"
    assert text(["n"]) == "1,234,567" and text(["n"], 1, 1e-6) == "1.2"


def test_nothing_is_loaded_from_elsewhere(report_data):
    html = page.render(report_data)
    parsed = Parsed(html)
    assert "script" not in parsed.tags
    assert "@import" not in html
    for tag, name, value in parsed.attributes:
        if name in ("src", "href", "srcset", "poster", "data", "action") or name.endswith(":href"):
            assert value.startswith(("data:", "#")), (tag, name, value[:80])
        assert name == "src" or name == "href" or "//" not in value, (tag, name, value[:80])
        assert not name.startswith("on"), (tag, name)
    for piece in html.split("url(")[1:]:
        assert piece.startswith(("#", "data:"))
    assert "default-src 'none'" in html


def test_ids_are_unique_and_references_lead_to_them(report_data):
    parsed = Parsed(page.render(report_data))
    assert len(parsed.ids) == len(set(parsed.ids))
    targets = {value[1:] for _, name, value in parsed.attributes if name == "href" and value.startswith("#")}
    targets |= {value[5:-1] for _, _, value in parsed.attributes if value.startswith("url(#")}
    assert targets and targets <= set(parsed.ids)


def test_figures_follow_the_theme(report_data):
    html = page.render(report_data)
    figures = html.split("<svg ")[1:]
    assert len(figures) == 2 * len(page.drawings(report_data))
    for figure in figures:
        svg = figure.split("</svg>")[0]
        assert "var(--ink)" in svg or "var(--page)" in svg
        assert "font-family" not in svg and "DejaVu" not in svg and "#1b1f24" not in svg
        assert 'role="img" aria-label="' in svg


def minimal(data: dict[str, Any]) -> dict[str, Any]:
    return {key: data[key] for key in ("name", "step", "config", "model", "parameters", "stages", "missing")}


def test_a_minimal_dictionary_renders(report_data):
    data = minimal(report_data)
    html = page.render(data)
    check_numbers(data, Parsed(html))
    for section in ("metrics", "validation", "alignment", "similarity", "scores", "examples", "speed", "commands"):
        assert page.ABSENT[section] in Parsed(html).text


@pytest.mark.slow
@pytest.mark.parametrize("value", ["missing", None])
@pytest.mark.parametrize(
    "section",
    [
        *("metrics", "validation", "alignment", "similarity", "scores", "examples", "speed", "commands"),
        *("environment", "scores.text", "speed.breakdown", "speed.wall"),
    ],
)
def test_an_absence_is_told_by_its_line(report_data, section, value):
    *owner, name = section.split(".")
    holder = report_data[owner[0]] if owner else report_data
    del holder[name]
    if value is None:
        holder[name] = None
    line = f"no {name} here: do <this> & that"
    report_data["missing"] = {name: line}
    parsed = Parsed(page.render(report_data))
    assert line in parsed.text
    check_numbers(report_data, parsed)
    report_data["missing"] = {}
    assert page.ABSENT[name] in Parsed(page.render(report_data)).text


def test_other_optional_parts_may_be_missing(report_data):
    for owner, name in (
        (report_data["scores"], "seconds"),
        (report_data["scores"], "peak_memory_gib"),
        (report_data["speed"], "peak_memory_gib"),
        (report_data["speed"]["stages"][0], "wait_share"),
        (report_data["scores"]["text"], "questions"),
        (report_data["scores"]["sets"]["new voices"], "intent_accuracy"),
        (report_data["examples"][0], "audio"),
        (report_data["examples"][0], "mel"),
    ):
        del owner[name]
        check_numbers(report_data, Parsed(page.render(report_data)))


def test_similarity_without_pairs(report_data):
    for when in ("before", "after"):
        report_data["similarity"][when]["cosine"] = None
    parsed = Parsed(page.render(report_data))
    assert page.ABSENT["cosine"] in parsed.text
    check_numbers(report_data, parsed)


def test_hostile_text_is_escaped(report_data):
    bad = """<script>alert("x")</script> & ' " {{ name }} $x$ </style>"""
    report_data["name"] = report_data["model"]["llm"] = report_data["model"]["teacher"] = bad
    report_data["scores"]["sets"][bad] = copy.deepcopy(report_data["scores"]["sets"]["new voices"])
    report_data["examples"][0] |= {"hypothesis": bad, "reference": bad, "set": bad, "id": bad, "problem": bad}
    report_data["commands"][0]["command"] = report_data["similarity"]["set"] = report_data["environment"]["python"] = (
        bad
    )
    report_data["scores"]["text"]["questions"]["answers"][0] |= {"question": bad, "base": bad, "adapted": bad}
    report_data["scores"]["text"]["loss"][bad] = report_data["scores"]["text"]["loss"]["prose"]
    report_data["stages"][0]["name"] = report_data["parameters"][0]["part"] = bad
    report_data["config"]["key"] = bad
    report_data["missing"] = {"wall": bad}
    report_data["speed"]["wall"] = None
    parsed = Parsed(page.render(report_data))
    assert "script" not in parsed.tags
    assert parsed.text.count(bad) >= 12
    assert json.loads(parsed.by_id["config"]) == report_data["config"]
    check_numbers(report_data, parsed)


def test_wrong_words_are_marked():
    said, heard = page.marked_words("Set a timer for forty minutes.", "set a timer for fifteen minutes please")
    assert str(said) == "Set a timer for <del>forty</del> minutes."
    assert str(heard) == "set a timer for <ins>fifteen</ins> minutes <ins>please</ins>"
    assert [str(text) for text in page.marked_words("Hello, there!", "hello there")] == ["Hello, there!", "hello there"]
    said, heard = page.marked_words("That is forty two.", "That's 42")
    assert "<del>" not in said and "<ins>" not in heard  # the same, as scored
    said, heard = page.marked_words("", "<b>")
    assert (str(said), str(heard)) == ("", "&lt;b&gt;")  # what is in brackets is no word to the normaliser
    said, heard = page.marked_words("one", "")
    assert (str(said), str(heard)) == ("<del>one</del>", "")


def test_as_many_words_are_marked_as_are_errors(report_data):
    for example in report_data["examples"]:
        said, heard = page.marked_words(example["reference"], example["hypothesis"])
        assert max(said.count("<del>"), heard.count("<ins>")) <= example["errors"]
        assert said.count("<del>") + heard.count("<ins>") >= example["errors"]


def test_write_replaces_and_leaves_nothing_else(report_data, tmp_path):
    assert page.write(minimal(report_data), tmp_path / "report") == tmp_path / "report" / "report.html"
    path = page.write(report_data, tmp_path / "report")
    assert path.read_text(encoding="utf-8") == page.render(report_data)
    files = {str(found.relative_to(path.parent)) for found in path.parent.rglob("*") if found.is_file()}
    assert files == {"report.html"} | {f"figures/{name}.png" for name in page.drawings(report_data)}
    assert all(found.read_bytes().startswith(b"\x89PNG") for found in (path.parent / "figures").iterdir())
