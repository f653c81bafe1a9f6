"""Checkpoints: which remain, what is found to be damaged, and what is used in its place."""

import json
import os
import random
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from aura_jax import checkpoint, config
from aura_jax.errors import UserError

OWN = {"lora/a": np.arange(600, dtype=np.float32).reshape(2, 300), "params/embedder/gain": np.float32(3)}
META = {"llm_fingerprint": "01234567", "seconds": 1.5}


def own(step: int) -> dict:
    return {path: jnp.asarray(x + step) for path, x in OWN.items()}


def write(workdir: Path, *steps: int, best: int | None = None, **train: int) -> None:
    """Saves steps as a run does that ends after the last of them."""
    c = config.default()
    c.train.update(train)
    saving = checkpoint.Checkpoints(workdir, c)
    saving.newest()
    for step in steps:
        saving.save(step, own(step), {"step": jnp.int32(step)}, META)
    if best is not None:
        saving.save_best(best, own(best), META | {"validation": {"wer": 0.5}})
    saving.close()


def resume(workdir: Path, **train: int) -> tuple[int | None, list[str]]:
    """Returns the step that a run resumes at, whose values it checks, and what it says."""
    c = config.default()
    c.train.update(train)
    resuming = checkpoint.Checkpoints(workdir, c)
    newest = resuming.newest()
    if newest is not None:
        step, meta = newest
        wanted = own(step), {"step": jnp.int32(step)}
        values, rest = resuming.restore(step, *map(checkpoint.abstract_like, wanted))
        assert all((values[path] == x).all() for path, x in own(step).items()) and rest["step"] == step
        assert META.items() <= meta.items()
    resuming.close()
    return newest and newest[0], resuming.remarks


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def largest(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip(path: Path, place: int | None = None) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if place is None else place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "int8"])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 7)])
def test_a_fingerprint_is_the_same_on_a_host_and_on_a_device(dtype, shape, monkeypatch):
    monkeypatch.setattr(checkpoint, "_PIECE", 4)
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape) * 50).astype(dtype)
    for of in (checkpoint.fingerprint, checkpoint._checksum):
        assert of({"a": {"b": np.asarray(x)}}) == of({"a": {"b": x}})


def test_every_bit_counts():
    trees = [{"odd": x, "even": y} for x in (0, 1, 1 << 31) for y in (0, 1, 1 << 31)]
    as_arrays = [{path: np.array([x, 0], np.uint32) for path, x in tree.items()} for tree in trees]
    assert len(set(map(checkpoint._checksum, as_arrays))) == len(trees)


DAMAGES = {
    "weights cut short": lambda at: os.truncate(largest(at / "own" / "ocdbt.process_0" / "d"), 99),
    "weights altered": lambda at: flip(largest(at / "own" / "ocdbt.process_0" / "d")),
    "a file of the weights gone": lambda at: largest(at / "own" / "d").unlink(),
    "moments gone": lambda at: shutil.rmtree(at / "rest"),
    "what says which arrays there are, cut short": lambda at: (at / "own" / "_METADATA").write_text("{"),
    "what the arrays are, cut short": lambda at: (at / "own" / "array_metadatas" / "process_0").write_text("{"),
    "meta is not JSON": lambda at: (at / "meta" / "metadata").write_text('{"seconds": '),
    "meta says something else": lambda at: flip(
        at / "meta" / "metadata", (at / "meta" / "metadata").read_text().index("01234567")
    ),
    "meta gone": lambda at: shutil.rmtree(at / "meta"),
    "Orbax's own file gone": lambda at: (at / "_CHECKPOINT_METADATA").unlink(),
    "empty": lambda at: (shutil.rmtree(at), at.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_step_before_a_damaged_one_is_used_and_said_to_be(tmp_path, damage):
    write(tmp_path, 2, 4)
    DAMAGES[damage](tmp_path / "checkpoints" / "4")
    step, (line,) = resume(tmp_path)
    assert step == 2 and names(tmp_path / "checkpoints") == ["2"] and names(tmp_path / "corrupt") == ["4"]
    assert line.startswith(f"checkpoint {tmp_path / 'checkpoints' / '4'} is damaged (")
    assert line.endswith(f"): moved to {tmp_path / 'corrupt' / '4'}") and "\n" not in line
    # Taken again and damaged again, both are kept to be looked at.
    write(tmp_path, 4)
    assert resume(tmp_path) == (4, [])
    DAMAGES[damage](tmp_path / "checkpoints" / "4")
    assert resume(tmp_path)[0] == 2 and names(tmp_path / "corrupt") == ["4", "4-2"]


@pytest.mark.slow
def test_a_flipped_bit_anywhere_is_harmless_or_found(tmp_path):
    write(tmp_path / "whole", 2, 4)
    at = tmp_path / "whole" / "checkpoints" / "4"
    rng = random.Random(0)
    found = set()
    for file in sorted(path.relative_to(at) for path in at.rglob("*") if path.is_file() and path.stat().st_size):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(tmp_path / "whole", tmp_path / "run")
        path = tmp_path / "run" / "checkpoints" / "4" / file
        flip(path, rng.randrange(path.stat().st_size))
        step, remarks = resume(tmp_path / "run")  # which looks at the values
        assert (step, len(remarks)) in ((4, 0), (2, 1))
        found.add(step)
    assert found == {2, 4}


def test_a_workdir_may_be_named_from_where_one_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    workdir = Path("runs/one")
    write(workdir, 2, 4, best=4)
    assert resume(workdir) == (4, [])
    flip(largest(workdir / "checkpoints" / "4"))
    step, (line,) = resume(workdir)
    assert step == 2 and line.startswith("checkpoint runs/one/checkpoints/4 is damaged (")


def test_two_damaged_ones_are_passed_over(tmp_path):
    write(tmp_path, 2, 4, 6, keep=3)
    for step in (4, 6):
        flip(largest(tmp_path / "checkpoints" / str(step) / "own" / "ocdbt.process_0" / "d"))
    step, remarks = resume(tmp_path, keep=3)
    assert step == 2 and ["/6 is" in remarks[0], "/4 is" in remarks[1]] == [True, True]


def test_with_none_intact_nothing_is_moved_and_nothing_begins_anew(tmp_path):
    write(tmp_path, 2, 4)
    for step in ("2", "4"):
        shutil.rmtree(tmp_path / "checkpoints" / step / "own")
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"checkpoints: no checkpoint is intact .*start over with another --workdir"
        ):
            resume(tmp_path)
    assert names(tmp_path / "checkpoints") == ["2", "4"] and not (tmp_path / "corrupt").exists()


def test_a_file_that_cannot_be_read_is_no_damage(tmp_path):
    write(tmp_path, 2, 4)
    path = largest(tmp_path / "checkpoints" / "4" / "own" / "ocdbt.process_0" / "d")
    path.unlink()
    path.symlink_to(path)  # opening it fails, whoever asks
    with pytest.raises(UserError, match=rf"{path} cannot be read \(Too many levels.*nothing was changed"):
        resume(tmp_path)
    assert names(tmp_path / "checkpoints") == ["2", "4"] and not (tmp_path / "corrupt").exists()


def test_a_damaged_best_one_is_moved_too(tmp_path):
    write(tmp_path, 2, best=2)
    assert checkpoint.inference_step(tmp_path) == 2
    flip(largest(tmp_path / "best" / "2" / "own" / "ocdbt.process_0" / "d"))
    step, (line,) = resume(tmp_path)
    assert step == 2 and "/best/2 is damaged" in line and names(tmp_path / "corrupt") == ["best-2"]
    write(tmp_path, best=2)
    assert names(tmp_path / "best") == ["2"] and resume(tmp_path) == (2, [])


def test_those_that_were_promised_remain_over_resumes(tmp_path):
    write(tmp_path, 3, 5, 6, 9, keep=2, keep_every=5)
    assert names(tmp_path / "checkpoints") == ["5", "6", "9"]
    write(tmp_path, 10, 12, keep=2, keep_every=5)
    assert names(tmp_path / "checkpoints") == ["10", "12", "5"]
    write(tmp_path, 15, 18, 21, keep=3, keep_every=5)
    assert names(tmp_path / "checkpoints") == ["10", "15", "18", "21", "5"]
    assert resume(tmp_path, keep=9) == (21, []) and len(names(tmp_path / "checkpoints")) == 5
    # Asking deletes nothing: who asks may be mistaken. The next save does.
    assert resume(tmp_path, keep=1, keep_every=0) == (21, []) and len(names(tmp_path / "checkpoints")) == 5
    write(tmp_path, 24, keep=1, keep_every=0)
    assert names(tmp_path / "checkpoints") == ["24"]


def test_what_a_kill_left_half_written_or_half_deleted_goes(tmp_path):
    write(tmp_path, 2, 4, best=4)
    for folder in (tmp_path / "checkpoints", tmp_path / "best"):
        (folder / "5.orbax-checkpoint-tmp" / "own.orbax-checkpoint-tmp").mkdir(parents=True)
        (folder / "1" / "own").mkdir(parents=True)
    assert resume(tmp_path) == (4, [])
    assert names(tmp_path / "checkpoints") == ["2", "4"] and names(tmp_path / "best") == ["4"]


def test_what_asks_for_a_damaged_one_is_told_what_to_do(tmp_path):
    write(tmp_path, 2, 4, best=2)
    for meta in tmp_path.glob("*/*/meta/metadata"):
        if meta.parts[-4:-2] != ("checkpoints", "2"):
            meta.write_text(meta.read_text()[:20])
    with pytest.raises(UserError, match=r"best/2 is damaged \(.*\): take the newest one \(--which latest\)"):
        checkpoint.inference_meta(tmp_path)
    for ask in (lambda: checkpoint.inference_meta(tmp_path, "latest"), lambda: checkpoint.newest_step(tmp_path)):
        with pytest.raises(UserError, match=r"checkpoints/4 is damaged \(.*\): move it to use the one before"):
            ask()
    shutil.move(tmp_path / "checkpoints" / "4", tmp_path / "4")
    assert checkpoint.newest_step(tmp_path) == (2, 1.5)


def test_checkpoints_that_have_fingerprints_instead_of_checksums_are_checked_by_them(tmp_path):
    write(tmp_path, 2, 4)
    for step in (2, 4):
        path = tmp_path / "checkpoints" / str(step) / "meta" / "metadata"
        meta = json.loads(path.read_text())
        del meta["checksums"]
        meta["fingerprints"] = {
            "own": checkpoint.fingerprint(own(step)),
            "rest": checkpoint.fingerprint({"step": jnp.int32(step)}),
        }
        path.write_text(json.dumps(meta))
    assert resume(tmp_path) == (4, [])
    DAMAGES["weights altered"](tmp_path / "checkpoints" / "4")
    assert resume(tmp_path)[0] == 2


def test_asking_for_a_run_makes_no_folders(tmp_path):
    for which in ("best", "latest"):
        with pytest.raises(UserError, match="holds no checkpoint yet"):
            checkpoint.inference_meta(tmp_path, which)
    assert not names(tmp_path)


def test_meta_names_the_dtypes_of_what_it_comes_with(tmp_path):
    write(tmp_path, 2)
    meta = json.loads((tmp_path / "checkpoints" / "2" / "meta" / "metadata").read_text())
    assert meta["own"] == dict.fromkeys(OWN, "float32") and set(meta["checksums"]) == {"own", "rest", "meta"}
