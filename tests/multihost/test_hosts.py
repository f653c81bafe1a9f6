"""How hosts find each other, and which rows each of them reads."""

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from aura_jax import hosts, sharding
from aura_jax.data.batch import Part
from aura_jax.errors import UserError


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (("localhost:1", None, "0"), "all three or none"),
        (("localhost", "2", "0"), "'localhost' is not HOST:PORT"),
        (("localhost:1", "2", "2"), "host 2 of 2"),
        (("localhost:1", "two", "0"), "host 0 of two"),
    ],
)
def test_a_place_that_is_none_is_named(place, message, monkeypatch):
    with pytest.raises(UserError, match=f"^--coordinator.*{message}"):
        hosts.join(*place)
    for name, value in zip(hosts.VARIABLES, place, strict=True):
        monkeypatch.setenv(name, value or "")
    with pytest.raises(UserError, match=f"^AURA_JAX_COORDINATOR.*{message}"):
        hosts.join()


@pytest.fixture
def joined(monkeypatch):
    """Returns the arguments of the calls that would have joined."""
    calls = []
    monkeypatch.setattr(hosts.jax.distributed, "initialize", lambda *place, **how: calls.append((place, how)))
    for name in (*hosts.VARIABLES, "SLURM_NTASKS", "SLURM_STEP_NODELIST", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    return calls


def test_flags_go_before_variables_and_these_before_slurm(joined, monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "4")
    hosts.join()  # within an allocation, but in no step of it
    assert not joined
    monkeypatch.setenv("SLURM_STEP_NODELIST", "node[1-2]")
    hosts.join()
    for name, value in zip(hosts.VARIABLES, ("one:1", "2", "1"), strict=True):
        monkeypatch.setenv(name, value)
    hosts.join()
    hosts.join("two:2", "3", "0")
    hosts.join("two:2", "1", "0")  # alone
    places = [place for place, _ in joined]
    assert places == [(), ("one:1", 2, 1), ("two:2", 3, 0)]
    assert joined[0][1] == {"cluster_detection_method": "slurm"}


def test_hosts_that_cannot_be_joined_are_one_line(monkeypatch):
    def refuse(*place, **how):
        raise RuntimeError("no such\naddress")

    monkeypatch.setattr(hosts.jax.distributed, "initialize", refuse)
    with pytest.raises(UserError, match=r"cannot be joined \(no such address\)"):
        hosts.join("nowhere:1", "2", "1")


@pytest.mark.parametrize(("names", "calls"), [(None, 1), ("a,b", 1), ("localhost", 0)])
def test_a_tpu_joins_its_slice(joined, monkeypatch, names, calls):
    monkeypatch.setattr(hosts.libtpu, "on_tpu_machine", lambda: True)
    if names:
        monkeypatch.setenv("TPU_WORKER_HOSTNAMES", names)
    hosts.join()
    assert len(joined) == calls


def _mesh(process_of_device: list) -> Any:
    devices = np.vectorize(lambda i: SimpleNamespace(process_index=i))(np.array(process_of_device))
    return SimpleNamespace(devices=devices, shape=dict(zip(sharding.MESH_AXES, devices.shape, strict=True)))


def test_a_host_reads_the_rows_of_its_devices():
    squares = _mesh([[[0], [0], [1], [1]], [[0], [0], [1], [1]]])  # data 2, fsdp 4: hosts are squares
    assert sharding.part_of_host(squares, 0) == Part((0, 1, 4, 5), 8)
    assert sharding.part_of_host(squares, 1) == Part((2, 3, 6, 7), 8)
    wide = _mesh([[[0, 1]], [[2, 3]]])  # tensor parallel over two hosts: both read the same rows
    assert [sharding.part_of_host(wide, host) for host in range(4)] == [Part((i // 2,), 2) for i in range(4)]


def test_with_one_host_nothing_is_exchanged():
    def fail():
        raise UserError("mine")

    assert hosts.is_first() and hosts.anywhere([False, True]) == [False, True]
    hosts.check_same(3, "differs")
    assert hosts.on_first(lambda: 3) == 3 and hosts.together(lambda: 4) == 4
    values = hosts.arrays_of_first(lambda: {"x": np.arange(3)})
    assert values["x"].tolist() == [0, 1, 2]
    for call in (hosts.on_first, hosts.together):
        with pytest.raises(UserError, match="mine"):
            call(fail)
    with pytest.raises(UserError), hosts.ending_at_once():
        fail()


PROGRAM = """
import json, os, signal, sys
from aura_jax import hosts, sharding
from aura_jax.errors import UserError
from aura_jax.train.signals import Signals
import numpy as np

hosts.join()
import jax

me, said = jax.process_index(), []

def fail(where):
    def make():
        if me == where:
            raise UserError(f"mistake of {me}")
        return me
    return make

for call, where in ((hosts.on_first, 0), (hosts.together, 1)):
    try:
        call(fail(where))
    except UserError as error:
        said.append(str(error))
arrays = hosts.arrays_of_first(lambda: {"a": np.arange(3) + me, "b": np.float32([[me]])})
said += [hosts.on_first(lambda: {"of": me}), hosts.together(lambda: me), hosts.anywhere([me == 1, False])]
said += [{name: value.tolist() for name, value in arrays.items()}, hosts.is_first()]
with Signals(sharding.make_mesh(1, -1, 1)) as signals:
    if me == 1:
        os.kill(os.getpid(), signal.SIGTERM)  # before the first step
    said.append([signals.stop() for _ in range(4)] + [signals.received])
print(json.dumps(said), flush=True)
with hosts.ending_at_once():
    if me == 1:
        raise UserError("leaving")
sys.stdin.read()
os._exit(0)
"""


@pytest.mark.slow  # two processes
def test_two_hosts_agree(hosts_run):
    (_, out_0, _), (code_1, out_1, errors_1) = hosts_run(PROGRAM)
    same = ["mistake of 0", "host 1: mistake of 1", {"of": 0}]
    arrays = {"a": [0, 1, 2], "b": [[0.0]]}
    stops = [False, True, True, True]  # the answer to the question of the step before
    told = [*stops, "a signal at another host was"]
    assert json.loads(out_0.splitlines()[-1]) == [*same, 0, [True, False], arrays, True, told]
    assert json.loads(out_1.splitlines()[-1]) == [*same, 1, [True, False], arrays, False, [*stops, "SIGTERM"]]
    assert code_1 == 2 and "error: leaving" in errors_1
