"""The real loop on two hosts of two CPU devices: the losses of one host with four, checkpoints, resuming, stopping."""

from pathlib import Path

import pytest

from tests.multihost.conftest import records

pytestmark = pytest.mark.slow  # every host is a process that compiles its own steps

REAL = """
from aura_jax.config import stage
from configs import quickstart


def get_config():
    c = quickstart.get_config()  # its models: Whisper tiny.en and SmolLM2-135M
    c.model.matmul_dtype = ""  # rounding to bfloat16 would hide what is compared
    c.lora.update(n_blocks=2, rank=8, alpha=8.0, text_energy=1.0)
    c.teacher.precompute = False
    c.distill.target_norm = "layernorm"  # needs no pass over the data
    c.data.update(batch_size=4, validation_values=(), min_seconds=1.0, max_seconds=2.0, buckets=(2.0,), speeds=(1.0,))
    c.train.stages.only = stage(4, 1e-4, {"lm": 1.0, "distill": 1.0})
    c.train.schedule = ("only",)
    c.train.update(log_every=1, checkpoint_every=1, eval_every=0)
    return c
"""


def same_losses(one: dict[int, dict], other: dict[int, dict]) -> None:
    assert one.keys() == other.keys()
    for step, values in one.items():
        for name, value in values.items():
            if name.startswith("loss"):
                assert other[step][name] == pytest.approx(value, rel=1e-5, abs=1e-6), (step, name)


def test_two_hosts_take_the_steps_of_one_and_one_goes_on_from_two(run, hosts_of, tmp_path):
    (tmp_path / "real.py").write_text(REAL)
    train = lambda n, *arguments: run([*hosts_of(n), f"--config={tmp_path / 'real.py'}", *arguments], devices=4 // n)
    whole, two = tmp_path / "whole", tmp_path / "two"
    assert train(1, "--workdir", str(whole)).code == 0
    assert train(2, "--workdir", str(two), "--config.train.steps=2").code == 0
    assert sorted(path.name for path in (two / "checkpoints").iterdir()) == ["1", "2"]
    assert list(records(two)) == [1, 2]
    assert train(1, "--workdir", str(two)).code == 0
    same_losses(records(whole), records(two))


SMOKE = (
    "--config=configs/smoke.py",
    "--config.data.text_rows=4",
    "--config.model.matmul_dtype=",
    "--config.train.checkpoint_every=1",
)


def test_everything_that_a_run_does_on_two_hosts_stopped_damaged_and_resumed(run, hosts_of, tmp_path):
    """Precomputed teacher states, the null space of text, validation, two stages; SIGTERM saves on both hosts."""
    whole, two = tmp_path / "whole", tmp_path / "two"
    assert run([*hosts_of(1), *SMOKE, "--workdir", str(whole)], devices=4).code == 0
    command = [*hosts_of(2), *SMOKE, "--workdir", str(two)]
    stopped = run(command, devices=2, when=lambda: len(records(two)) >= 2)
    assert stopped.code == 75, stopped.errors
    assert "saved at step" in stopped.errors
    last = max(records(two))
    assert 2 <= last < max(records(whole))
    meta = two / "checkpoints" / str(last) / "meta" / "metadata"
    meta.write_text(meta.read_text()[:-9])
    finished = run(command, devices=2)
    assert finished.code == 0, finished.errors
    assert f"checkpoints/{last} is damaged" in finished.errors and f"at step {last - 1}" in finished.errors
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
