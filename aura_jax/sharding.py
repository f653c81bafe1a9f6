"""The mesh, and the two tables: parameter path to mesh axes, and parameter path to trained or frozen.

A path is the keys of a variable tree joined by "/", such as `params/llm/adapted/attn/q/kernel`.
"""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from aura_jax.data.batch import Part
from aura_jax.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")  # the rows of a batch are split over both

# Logical axis of an array's dimension -> mesh axes that it is split over. The low-rank side of an adapter is too narrow
# to split, so its other side ("outer") takes both axes: first the one by which the linear's own side is split.
LOGICAL_TO_MESH = {
    "vocab": ("tensor",),
    "width": ("fsdp",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "outer": ("tensor", "fsdp"),
    None: (),
}

# Path (searched, first match wins) -> logical axes of the *last* dimensions; earlier ones, such as the axis that a
# scan stacks blocks on, are not split.
PARAMETER_AXES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"embed/embedding$", ("vocab", "width")),
    (r"lm_head/kernel$", ("width", "vocab")),
    (r"(q|k|v)/kernel$", ("width", "heads")),
    (r"(q|k|v)/a$", ("width", None)),
    (r"(q|k|v)/b$", (None, "outer")),
    (r"(q|k|v)/bias$", ("heads",)),
    (r"attn/o/kernel$", ("heads", "width")),
    (r"attn/o/a$", ("outer", None)),
    (r"attn/o/b$", (None, "width")),
    (r"mlp/(gate|up|fc1)/kernel$", ("width", "mlp")),
    (r"mlp/(gate|up)/a$", ("width", None)),
    (r"mlp/(gate|up)/b$", (None, "outer")),
    (r"mlp/fc1/bias$", ("mlp",)),
    (r"mlp/(down|fc2)/kernel$", ("mlp", "width")),
    (r"mlp/down/a$", ("outer", None)),
    (r"mlp/down/b$", (None, "width")),
    (r"(conv\d|patch|proj|fired|gate|up|down)/kernel$", (None, "width")),
    (r"heads/kernel$", ("width", None)),
    (r"(scale|bias|mean|std|positions|gain|text_rms)$", ()),
)


def path_string(path: Sequence[Any]) -> str:
    """Joins a key path of `jax.tree_util` into "a/b/c"."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def make_mesh(data: int, fsdp: int, tensor: int, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns the mesh of all devices; one of the axes may be -1, which fills.

    Raises:
      UserError: if the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    wanted = ", ".join(f"{a}={s}" for a, s in zip(MESH_AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes):
        raise UserError(f"mesh {wanted}: axes are positive, and at most one is -1")
    if -1 in sizes:
        known = -int(np.prod(sizes))
        if len(devices) % known:
            raise UserError(f"mesh {wanted} does not divide {len(devices)} devices: change mesh.*")
        sizes[sizes.index(-1)] = len(devices) // known
    if int(np.prod(sizes)) != len(devices):
        raise UserError(
            f"mesh {wanted} needs {int(np.prod(sizes))} devices, and there are {len(devices)}: change mesh.*"
        )
    return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def parameter_spec(path: str, shape: Sequence[int], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Returns how the parameter at `path` is split over the mesh.

    Raises:
      UserError: if the table has no row for the path, or a mesh axis does not divide the dimension.
    """
    logical = next((axes for pattern, axes in PARAMETER_AXES if re.search(pattern, path)), None)
    if logical is None:
        raise UserError(f"no row of sharding.PARAMETER_AXES matches {path}: add one")
    axes: list[Any] = [None] * len(shape)
    for dim, name in zip(range(len(shape) - len(logical), len(shape)), logical, strict=True):
        split = tuple(axis for axis in LOGICAL_TO_MESH[name] if mesh.shape[axis] > 1)
        if not split:
            continue
        if shape[dim] % math.prod(mesh.shape[axis] for axis in split):
            sizes = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in split)
            names = " or ".join(f"mesh.{axis}" for axis in split)
            raise UserError(f"mesh axis {sizes} does not divide {path} {tuple(shape)}: change {names}")
        axes[dim] = next(iter(split)) if len(split) == 1 else split
    while axes and axes[-1] is None:
        axes.pop()
    return PartitionSpec(*axes)


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
    """Returns the NamedSharding of every leaf of a variable tree, by the table."""
    of = lambda path, leaf: NamedSharding(mesh, parameter_spec(path_string(path), leaf.shape, mesh))
    return jax.tree_util.tree_map_with_path(of, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows (axis 0 of every array of a batch) over the data and fsdp axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def part_of_host(mesh: Mesh, host: int) -> Part:
    """Returns the rows of a batch that a host's devices hold; hosts that share a row's devices hold the same."""
    n_blocks = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    devices = mesh.devices.reshape(n_blocks, -1)
    mine = tuple(i for i, block in enumerate(devices) if any(device.process_index == host for device in block))
    return Part(mine, n_blocks)


def keep_rows(x: jax.Array) -> jax.Array:
    """Keeps the rows (axis 0) of an activation where the batch put them, and all else of it whole.

    Under FSDP a weight and an activation are split over the same devices. Left to itself, the partitioner may well
    gather the activations of all devices instead of the weight. Does nothing outside of `jax.set_mesh`, on one device,
    and for rows that do not divide over the devices.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size == 1 or not set(BATCH_AXES) <= set(mesh.axis_names):
        return x
    if x.shape[0] % math.prod(mesh.shape[axis] for axis in BATCH_AXES):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES))


def keep_heads(x_HxK: jax.Array, n_kv_heads: int) -> jax.Array:
    """Keeps the heads (axis -2) of queries, keys or values whole: split over the tensor axis, or all on every chip.

    They are split if the axis divides the key/value heads. If not, the linears around attention are split all the same,
    and attention itself, little of the work of an answer, is done on every chip: left to itself, the partitioner would
    cut through heads, and sum scores over chips. Does nothing outside of `jax.set_mesh`, and without a tensor axis.
    """
    n = jax.sharding.get_abstract_mesh().shape.get("tensor", 1)
    if n == 1:
        return x_HxK
    free = (PartitionSpec.UNCONSTRAINED,) * (x_HxK.ndim - 2)
    spec = PartitionSpec(*free, None if n_kv_heads % n else "tensor", None)
    return jax.lax.with_sharding_constraint(x_HxK, spec)


def gathered(path: str, x: jax.Array) -> jax.Array:
    """Returns the parameter at `path` gathered over the axes that split rows: before a loop that would do it each time.

    Does nothing outside of `jax.set_mesh` and on one device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size == 1 or not set(BATCH_AXES) <= set(mesh.axis_names):
        return x
    axes = [(axis,) if isinstance(axis, str) else axis or () for axis in parameter_spec(path, x.shape, mesh)]
    left = [tuple(axis for axis in split if axis not in BATCH_AXES) or None for split in axes]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*left))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def flatten(tree: Any) -> dict[str, Any]:
    """Returns {path: leaf} of a nested dictionary."""
    return {path_string(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def unflatten(flat: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        node = tree
        *parents, last = path.split("/")
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def learning_rates(paths: Iterable[str], table: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Returns the learning-rate multiplier of every trained path; a path that no row matches is frozen.

    Raises:
      UserError: for a row that matches no path.
    """
    paths = list(paths)
    rates: dict[str, float] = {}
    for pattern, rate in table:
        matched = [p for p in paths if re.match(pattern, p)]
        if not matched:
            raise UserError(f"trainable: {pattern!r} matches no parameter; there are {', '.join(_roots(paths))}")
        for path in matched:
            rates.setdefault(path, float(rate))
    return rates


def _roots(paths: Iterable[str]) -> list[str]:
    return sorted({"/".join(p.split("/")[:2]) for p in paths})


def split(variables: dict, trained: Iterable[str]) -> tuple[dict[str, Any], dict]:
    """Splits a variable tree into {path: trained leaf} and the tree of frozen leaves; `join` is the inverse."""
    trained = set(trained)
    flat = flatten(variables)
    return (
        {p: x for p, x in flat.items() if p in trained},
        unflatten({p: x for p, x in flat.items() if p not in trained}),
    )


def join(trained: dict[str, Any], frozen: dict) -> dict:
    """Returns the whole variable tree."""
    return unflatten({**flatten(frozen), **trained})
