"""What an interrupted evaluation keeps: found by the same one, and by no other."""

import json
import os

import pytest
import soundfile

from aura_jax.data.manifest import load_manifest
from aura_jax.evaluate.kept import Kept, identity, identity_of_file


class Makes:
    """Makes a value, and counts how often it is asked to."""

    def __init__(self, value=None):
        self.value, self.n = value or {"n": 3, "rate": 0.1 + 0.2}, 0

    def __call__(self):
        self.n += 1
        return self.value


def test_a_part_is_made_once_until_all_are_finished(tmp_path):
    make, what = Makes(), {"step": 3, "eval": {"sets": {"a": "a.jsonl"}}}
    first = Kept(tmp_path, what)
    assert first.part(["sets", "a"], "data", make) == make.value and first.seconds == 0
    again = Kept(tmp_path, what)
    assert again.part(["sets", "a"], "data", make) == make.value and make.n == 1
    assert again.seconds == json.loads(next((tmp_path / "evaluation").iterdir()).read_text())["seconds"] > 0
    again.finish()
    assert not (tmp_path / "evaluation").exists()
    assert Kept(tmp_path, what).part(["sets", "a"], "data", make) == make.value and make.n == 2


@pytest.mark.parametrize(
    ("what", "name", "of"),
    [
        ({"step": 4, "weights": "w"}, ["sets", "a"], "data"),
        ({"step": 3, "weights": "v"}, ["sets", "a"], "data"),
        ({"step": 3, "weights": "w"}, ["sets", "b"], "data"),
        ({"step": 3, "weights": "w"}, ["sets", "a", "white", "5 dB"], "data"),
        ({"step": 3, "weights": "w"}, ["sets", "a"], "other data"),
    ],
)
def test_what_is_stale_is_not_used(tmp_path, what, name, of):
    old, new = Makes("old"), Makes("new")
    Kept(tmp_path, {"step": 3, "weights": "w"}).part(["sets", "a"], "data", old)
    kept = Kept(tmp_path, what)
    assert kept.part(name, of, new) == "new"
    kept.finish()  # of another evaluation nothing is deleted
    assert Kept(tmp_path, {"step": 3, "weights": "w"}).part(["sets", "a"], "data", old) == "old" and old.n == 1


def test_of_an_interrupted_part_nothing_is_kept(tmp_path):
    def interrupted():
        raise KeyboardInterrupt

    kept = Kept(tmp_path, 1)
    kept.part(["a"], 0, Makes("a"))
    with pytest.raises(KeyboardInterrupt):
        kept.part(["b"], 0, interrupted)
    make_a, make_b = Makes(), Makes("b")
    again = Kept(tmp_path, 1)
    assert (again.part(["a"], 0, make_a), again.part(["b"], 0, make_b)) == ("a", "b")
    assert (make_a.n, make_b.n) == (0, 1)


def test_a_damaged_part_is_made_again(tmp_path):
    Kept(tmp_path, 1).part(["a"], 0, Makes("a"))
    next((tmp_path / "evaluation").iterdir()).write_text('{"value": ')
    make = Makes("a")
    assert Kept(tmp_path, 1).part(["a"], 0, make) == "a" and make.n == 1


def test_a_workdir_that_cannot_be_written_to_keeps_nothing_and_says_so_once(tmp_path, capsys):
    (tmp_path / "evaluation").write_text("no folder")
    kept = Kept(tmp_path, 1)
    assert kept.part(["a"], 0, Makes("a")) == "a" and kept.part(["b"], 0, Makes("b")) == "b"
    kept.finish()
    assert capsys.readouterr().err.count("nothing is kept to go on from") == 1


def test_the_identity_of_data_is_its_rows_and_clips(tmp_path):
    clip, manifest = tmp_path / "a.wav", tmp_path / "set.jsonl"
    soundfile.write(clip, [0.0] * 100, 16000)
    line = {"audio": "a.wav", "text": "hello", "intent": "greet"}
    seen = set()
    for changed in (line, {**line, "text": "bye"}, {**line, "intent": "leave"}, {**line, "prompt": "Say it."}):
        manifest.write_text(json.dumps(changed) + "\n")
        seen |= {identity(load_manifest(manifest)), identity(load_manifest(manifest))}
    assert len(seen) == 4
    os.utime(clip, ns=(1, 1))
    assert identity(load_manifest(manifest)) not in seen
    clip.unlink()
    assert identity(load_manifest(manifest)) not in seen
    before = identity_of_file(manifest)
    manifest.write_text("{}\n")
    assert identity_of_file(manifest) != before
