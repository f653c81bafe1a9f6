"""Resuming the loop: after damage, after a kill in the middle of a line, and on another mesh."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from aura_jax import config
from aura_jax.data.pipeline import Quarantine
from aura_jax.errors import UserError
from aura_jax.train import loop
from aura_jax.train.inputs import Inputs
from aura_jax.train.workdir import claim


def losses(workdir: Path) -> dict[int, float]:
    lines = (json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.mark.slow
def test_a_run_goes_on_from_the_step_before_a_damaged_checkpoint_and_after_cut_lines(make_config, tmp_path, capsys):
    c = make_config(lm=1.0)
    c.train.update(steps=4, checkpoint_every=2)
    run = tmp_path / "run"
    loop.train(c, run)
    before = losses(run)
    commands = (run / "commands.jsonl").read_text()
    (run / "checkpoints" / "4" / "meta" / "metadata").write_text("{")
    for name in ("metrics", "validation", "nonfinite", "commands"):
        with (run / f"{name}.jsonl").open("a") as file:
            file.write('{"step": ')  # as a kill leaves it
    for name in ("config", "metrics"):
        (run / f"{name}.partial").write_text("half")
    c.train.steps = 6
    assert loop.train(c, run).step == 6
    said = capsys.readouterr().err
    assert f"checkpoint {run / 'checkpoints' / '4'} is damaged" in said and f"resuming {run} at step 2" in said
    after = losses(run)
    assert list(after) == [1, 2, 3, 4, 5, 6] and {step: after[step] for step in before} == before
    assert (run / "commands.jsonl").read_text().startswith(commands)
    for name in ("validation", "nonfinite"):
        assert not (run / f"{name}.jsonl").read_text()
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["4", "6"]
    assert not (run / "config.partial").exists() and not (run / "metrics.partial").exists()


def test_a_run_that_was_killed_as_it_wrote_its_config_begins_anew(tmp_path):
    c = config.default()
    (tmp_path / "config.partial").write_text("{")
    claim(tmp_path, c)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_run_may_go_on_with_another_mesh_and_other_readers_only(tmp_path):
    c = config.default()
    claim(tmp_path, c)
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    c.mesh.update(data=2, fsdp=2)
    c.data.threads += 1
    claim(tmp_path, c)
    c.data.batch_size += 1
    with pytest.raises(UserError, match=r"another data\.batch_size"):
        claim(tmp_path, c)


def test_a_clip_is_added_after_a_line_that_was_cut_short(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    Quarantine(path).add("a.wav", "m:1", "broken")
    whole = path.read_text()
    path.write_text(whole + '{"audio": "b.w')
    for audio in ("a.wav", "b.wav"):
        Quarantine(path).add(audio, "m:2", "broken")
    first, second = path.read_text().splitlines(keepends=True)
    assert first == whole and json.loads(second)["audio"] == "b.wav"


def note_batches(patch: pytest.MonkeyPatch, notes: Path) -> None:
    """Has a line about the batch of each step written to `notes`."""
    to_mesh = Inputs.to_mesh

    def noting(self, batch, *rest):
        digest = hashlib.sha256()
        for x in jax.tree.leaves(batch):
            digest.update(np.ascontiguousarray(x).tobytes())
        with notes.open("a") as file:
            file.write(digest.hexdigest() + "\n")
        return to_mesh(self, batch, *rest)

    patch.setattr(Inputs, "to_mesh", noting)


@pytest.mark.slow
def test_a_resume_on_another_mesh_takes_the_same_rows_to_the_same_losses(make_config, tmp_path):
    c = make_config(lm=1.0, distill=1.0)
    # Adam's first steps are signs, and that of rounding is anything: so small gradients count as such.
    c.optimizer.eps = 1e-3
    c.train.keep = 3
    c.data.augment.update(gain_db=(-3.0, 3.0), noise_probability=0.5)
    for steps, mesh in ((2, dict(data=1, fsdp=4)), (4, dict(data=2, fsdp=2))):
        c.mesh.update(mesh)
        c.train.steps = steps
        (tmp_path / f"{steps}.json").write_text(config.to_json(c))
    child = subprocess.run(  # one for both: the number of devices is settled when jax starts
        [sys.executable, "-m", "tests.train.test_resume", *map(str, (tmp_path / "run", tmp_path / "run.txt"))]
        + [str(tmp_path / f"{steps}.json") for steps in (2, 4)],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr[-3000:]
    c.mesh.update(data=1, fsdp=1)
    c.train.steps = 6
    for name in ("run", "whole"):
        with pytest.MonkeyPatch.context() as patch:
            note_batches(patch, tmp_path / f"{name}.txt")
            loop.train(c, tmp_path / name)
    assert (tmp_path / "run.txt").read_text() == (tmp_path / "whole.txt").read_text()
    got, expected = losses(tmp_path / "run"), losses(tmp_path / "whole")
    assert list(got) == list(expected) == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose(list(got.values()), list(expected.values()), rtol=1e-5)
    saved = [json.loads(path.read_text()) for path in tmp_path.glob("*/checkpoints/*/meta/metadata")]
    assert len(saved) == 4  # of the run at steps 2, 4 and 6, and of the whole
    assert len({(meta["llm_fingerprint"], meta["teacher_fingerprint"]) for meta in saved}) == 1


if __name__ == "__main__":
    run, notes, *configs = map(Path, sys.argv[1:])
    with pytest.MonkeyPatch.context() as monkeypatch:
        note_batches(monkeypatch, notes)
        for path in configs:
            loop.train(config.from_json(path), run)
