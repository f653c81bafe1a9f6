"""The real loop on two hosts of two CPU devices: the losses of one host with four, checkpoints, resuming, stopping."""

from pathlib import Path

import pytest

from tests.multihost.conftest import records

pytestmark = pytest.mark.slow  # every host is a process that compiles its own steps

SMOKE = (
    "--config=configs/smoke.py",
    "--config.data.text_rows=4",
    "--config.model.matmul_dtype=",  # rounding to bfloat16 would hide what is compared
    "--config.train.stages.distil.steps=4",
    "--config.train.stages.joint.steps=4",
    "--config.train.checkpoint_every=1",
    "--config.train.eval_every=4",
    "--config.train.profile_start=4",
)


def same_losses(one: dict[int, dict], other: dict[int, dict]) -> None:
    assert one.keys() == other.keys()
    for step, values in one.items():
        for name, value in values.items():
            if name.startswith("loss"):
                assert other[step][name] == pytest.approx(value, rel=1e-5, abs=1e-6), (step, name)


def test_two_hosts_stopped_damaged_and_resumed_take_the_steps_of_one_which_can_go_on_from_them(run, hosts_of, tmp_path):
    """All that a run does: precomputed teacher states, the null space of text, validation, a profile, two stages."""
    whole, two = tmp_path / "whole", tmp_path / "two"
    train = lambda n, workdir, *more, **how: run(
        [*hosts_of(n), *SMOKE, "--workdir", str(workdir), *more], devices=4 // n, **how
    )
    done = train(1, whole)
    assert done.code == 0, done.errors
    stopped = train(2, two, when=lambda: len(records(two)) >= 2)  # SIGTERM saves on both hosts
    assert stopped.code == 75, stopped.errors
    assert "saved at step" in stopped.errors
    last = max(records(two))
    assert 2 <= last < 7
    meta = two / "checkpoints" / str(last) / "meta" / "metadata"
    meta.write_text(meta.read_text()[:-9])
    resumed = train(2, two, "--config.train.steps=7")
    assert resumed.code == 0, resumed.errors
    assert f"checkpoints/{last} is damaged" in resumed.errors and f"at step {last - 1}" in resumed.errors
    assert list(records(two)) == list(range(1, 8))
    assert max(int(path.name) for path in (two / "checkpoints").iterdir()) == 7
    done = train(1, two)
    assert done.code == 0, done.errors
    same_losses(records(whole), records(two))
    files = lambda workdir: {path.name.split(".")[0] for path in Path(workdir).iterdir()}
    assert files(two) - files(whole) == {"corrupt"}


PROGRAM = """
import os, sys
from pathlib import Path
from aura_jax import config, hosts
from aura_jax.train import loop

hosts.join()
import jax

c = config.load(["--config=configs/smoke.py", "--config.data.text_rows=4"])
workdir, change = sys.argv[1:]
me = jax.process_index()
exec(change)
with hosts.ending_at_once():
    loop.train(c, Path(workdir))
"""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("c.seed = me", "host 1: config.seed differs from that of host 0: start all hosts with the same"),
        ("me and os.chdir('/')", "host 1: sample_data/commands/train.jsonl"),
        (
            "from aura_jax.train import inputs; f = inputs.load_manifest; "
            "inputs.load_manifest = lambda path: f(path)[: -me or None]",
            "host 1: data.train reads otherwise than on host 0",
        ),
        ("workdir += str(me)", "host 1: "),
    ],
    ids=["another configuration", "data that are not there", "other data", "another workdir"],
)
def test_what_is_wrong_on_one_host_ends_both_in_one_line(hosts_run, tmp_path, change, message):
    for code, _, errors in hosts_run(PROGRAM, str(tmp_path / "run"), change):
        assert code == 2
        assert errors.splitlines()[-1].startswith(f"error: {message}")
