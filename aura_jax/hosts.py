"""Several hosts in one run: how they find each other, and agree on what only one of them knows.

With one host everything here does nothing, or what its argument does.
"""

import contextlib
import io
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from aura_jax import libtpu
from aura_jax.errors import INTERRUPTED, USER_MISTAKE, UserError

_T = TypeVar("_T")

VARIABLES = ("AURA_JAX_COORDINATOR", "AURA_JAX_HOSTS", "AURA_JAX_HOST")
_MESSAGE_BYTES = 1000  # of a host's mistake, as the others hear of it


class Place(NamedTuple):
    """Where this process stands among the hosts: the address of host 0, how many there are, its own number."""

    coordinator: str
    count: int
    index: int


def join(coordinator: str | None = None, count: str | None = None, index: str | None = None) -> None:
    """Joins the hosts of a run, before jax looks for devices.

    They are those of the arguments; else of the variables AURA_JAX_COORDINATOR, AURA_JAX_HOSTS and AURA_JAX_HOST; else
    of Slurm, or of the TPU slice that this machine is part of. Where there is none of these, there is one host.

    Args:
      coordinator: HOST:PORT of host 0, as the others reach it.
      count, index: of hosts, and the number of this one, from 0.

    Raises:
      UserError: for some of the three without the others, or numbers that are none.
    """
    place = _place("--coordinator, --hosts and --host", coordinator, count, index)
    place = place or _place(", ".join(VARIABLES), *(os.environ.get(name) or None for name in VARIABLES))
    if place is not None:
        if place.count > 1:
            _initialize(*place, cluster_detection_method="deactivate")
    elif int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_STEP_NODELIST" in os.environ:
        _initialize(cluster_detection_method="slurm")
    elif libtpu.on_tpu_machine() and "," in os.environ.get("TPU_WORKER_HOSTNAMES", ","):
        with contextlib.suppress(ValueError):  # jax found no slice
            _initialize()
        if jax.process_count() > 1 and not jax.distributed.is_initialized():
            raise UserError(
                "this TPU slice has several hosts, and jax cannot tell which: give --coordinator and the rest"
            )


def _initialize(*place: Any, **how: Any) -> None:
    try:
        jax.distributed.initialize(*place, **how)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"the hosts of this run cannot be joined ({reason}): look at --coordinator") from error


def _place(names: str, coordinator: str | None, count: str | None, index: str | None) -> Place | None:
    given = [value is not None for value in (coordinator, count, index)]
    if not any(given):
        return None
    if not all(given):
        raise UserError(f"{names}: give all three or none")
    assert coordinator is not None and count is not None and index is not None
    if not coordinator.rpartition(":")[2].isdigit() or coordinator.startswith(":"):
        raise UserError(f"{names}: {coordinator!r} is not HOST:PORT")
    if not (count.isdigit() and index.isdigit() and int(index) < int(count)):
        raise UserError(f"{names}: host {index} of {count}: hosts are numbered from 0 to their count - 1")
    return Place(coordinator, int(count), int(index))


def is_first() -> bool:
    """Whether this is host 0, which writes what is written once."""
    return jax.process_index() == 0


def on_first(make: Callable[[], _T]) -> _T:
    """Calls `make` on host 0 only, and returns its value, which must be JSON, on every host.

    Raises:
      UserError: on every host, if `make` raises it.
    """
    if jax.process_count() == 1:
        return make()
    told = b""
    if is_first():
        try:
            told = json.dumps({"value": make()}).encode()
        except UserError as error:
            told = json.dumps({"error": str(error)}).encode()
    heard = json.loads(_broadcast(told))
    if "error" in heard:
        raise UserError(heard["error"])
    return heard["value"]


def arrays_of_first(make: Callable[[], Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Calls `make` on host 0 only, and returns its arrays on every host."""
    if jax.process_count() == 1:
        return dict(make())
    file = io.BytesIO()
    if is_first():
        arrays: Any = make()
        np.savez(file, **arrays)
    with np.load(io.BytesIO(_broadcast(file.getvalue())), allow_pickle=False) as arrays:
        return dict(arrays)


def _broadcast(told: bytes) -> bytes:
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(told))))
    data = np.frombuffer(told if is_first() else bytes(size), np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(data)).astype(np.uint8).tobytes()


def together(make: Callable[[], _T]) -> _T:
    """Returns what `make` returns on this host; `make` must not compute on all devices.

    Raises:
      UserError: on every host, if `make` raises it on any: none is left waiting for another.
    """
    if jax.process_count() == 1:
        return make()
    value, mistake = None, ""
    try:
        value = make()
    except UserError as error:
        mistake = str(error)
    data = np.zeros(_MESSAGE_BYTES, np.uint8)
    encoded = np.frombuffer(mistake.encode()[:_MESSAGE_BYTES], np.uint8)
    data[: len(encoded)] = encoded
    everywhere = multihost_utils.process_allgather(data)
    for host, line in enumerate(np.asarray(everywhere).astype(np.uint8)):
        if line.any():
            raise UserError(f"host {host}: {line.tobytes().rstrip(bytes(1)).decode(errors='replace')}")
    return value  # pyright: ignore[reportReturnType]


def anywhere(flags: Sequence[bool]) -> list[bool]:
    """Returns which of the flags are set on any host; each has as many."""
    if jax.process_count() == 1:
        return list(flags)
    everywhere = multihost_utils.process_allgather(np.asarray(flags, np.int32))
    return [bool(column.any()) for column in np.asarray(everywhere).reshape(-1, len(flags)).T]


def check_same(value: Any, mistake: str) -> None:
    """Raises UserError, on every host, if one of them has another value (JSON) than host 0."""
    first = on_first(lambda: value)

    def compare() -> None:
        if value != first:
            raise UserError(mistake)

    together(compare)


@contextlib.contextmanager
def ending_at_once() -> Iterator[None]:
    """Ends this process when an exception comes out, if there are other hosts.

    One that left in order would wait for the others, which wait for it in the middle of a step.
    """
    try:
        yield
    except BaseException as error:
        if not jax.distributed.is_initialized():
            raise
        if isinstance(error, UserError):
            code = USER_MISTAKE
            print(f"error: {error}", file=sys.stderr)
        elif isinstance(error, KeyboardInterrupt):
            code = INTERRUPTED
        else:
            code = 1
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
