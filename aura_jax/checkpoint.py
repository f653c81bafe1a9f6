"""Checkpoints of what a run trains: asynchronous, on any mesh, and proven intact by checksums.

A workdir holds `config.json`, `checkpoints/STEP` (the newest), `best/STEP` (the best by periodic evaluation, only its
trained variables), and what else a run writes. Frozen weights are in no checkpoint; their fingerprints are. When a run
resumes, a checkpoint that was cut short or altered is found, moved to `corrupt/STEP`, and the one before is used.
"""

import contextlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from aura_jax import config as config_lib
from aura_jax import hosts, sharding, system
from aura_jax.config import Config
from aura_jax.errors import UserError

# What may differ between the machine that trained and the one that answers.
INFERENCE_KEYS = ("mesh.", "model.attention", "eval.")

_PIECE = 1 << 24  # bytes, or numbers, that are looked at at once on a host


@jax.jit
def _bits_sum(x: jax.Array) -> jax.Array:
    """Returns a uint32 that depends on every bit of `x` and its place, and on nothing else: not on the mesh."""
    bits = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize])
    index = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    # Odd weights: a change of one bit always changes the sum modulo 2^32.
    return jnp.sum(bits.astype(jnp.uint32) * (2 * index + 1), dtype=jnp.uint32)


def _bits_sum_on_host(x: np.ndarray) -> int:
    """Returns what `_bits_sum` does, without a device."""
    bits, total = np.ascontiguousarray(x).reshape(-1).view(f"u{x.dtype.itemsize}"), 0
    for start in range(0, bits.size, _PIECE):
        piece = bits[start : start + _PIECE].astype(np.uint32)
        index = np.arange(start, start + piece.size, dtype=np.uint64).astype(np.uint32)
        total += int(np.sum(piece * (2 * index + 1), dtype=np.uint32))
    return total % (1 << 32)


def _bits_sums(tree: Any) -> Iterator[tuple[str, int]]:
    """Yields (path, `_bits_sum`) of the leaves of a tree in the order of their paths, computed where they are."""
    for path, leaf in sorted(sharding.flatten(tree).items()):
        yield path, _bits_sum_on_host(leaf) if isinstance(leaf, np.ndarray) else int(_bits_sum(leaf))


def fingerprint(tree: Any) -> str:
    """Returns eight hexadecimal digits by which a tree of weights is known: their bits and their paths.

    The same on every mesh and number of hosts; computed where the arrays are, one leaf at a time.
    """
    total = 0
    for path, bits in _bits_sums(tree):
        total = (total * 31 + zlib.crc32(path.encode()) * (bits | 1)) % (1 << 32)
    return f"{total:08x}"


def fingerprints(params: Mapping[str, Any]) -> dict[str, str]:
    """Returns {"llm_fingerprint": ...}, and that of the encoder where one is kept: what a checkpoint says of them."""
    return {f"{name}_fingerprint": fingerprint(params[name]) for name in ("llm", "encoder") if name in params}


def _checksum(tree: Any) -> str:
    """Returns eight hexadecimal digits that no change of one bit leaves as they are, as it may a fingerprint."""
    total = 0
    for path, bits in _bits_sums(tree):
        total = zlib.crc32(f"{path} {bits:08x} ".encode(), total)
    return f"{total:08x}"


class Checkpoints:
    """The checkpoints of one workdir; closing waits for what is being written.

    A checkpoint has three items: `own` (by path, every variable that is no base weight, and base weights that were
    trained), `rest` (all else that a step changes) and `meta`.

    Attributes:
      remarks: lines worth telling: which checkpoints were found to be damaged.
    """

    def __init__(self, workdir: Path, config: Config):
        """Puts what there is in order: damaged checkpoints newer than an intact one are moved to `corrupt/`.

        Host 0 does it, and reads whole checkpoints for it.

        Raises:
          UserError: there are checkpoints, but none is intact; one cannot be read, which is no damage; or hosts see
            different ones.
        """
        c = config.train
        # Before a manager lists them: it would go on believing in what was moved.
        self.remarks = hosts.on_first(lambda: _put_in_order(workdir, c.keep, c.keep_every))
        options = ocp.CheckpointManagerOptions(
            max_to_keep=c.keep,
            keep_period=c.keep_every or None,
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
        )
        self._latest = ocp.CheckpointManager((workdir / "checkpoints").absolute(), options=options)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=1, cleanup_tmp_directories=True, enable_async_checkpointing=False
        )
        self._best = ocp.CheckpointManager((workdir / "best").absolute(), options=options)
        self._saving = False
        seen = [sorted(manager.all_steps()) for manager in (self._latest, self._best)]
        hosts.check_same(
            seen, f"{workdir} shows other checkpoints here than on host 0: wait for its file system, or look"
        )

    def save(self, step: int, own: Any, rest: Any, meta: Mapping[str, Any]) -> None:
        """Starts writing a checkpoint; `meta` is JSON. A step that is there already is left as it is."""
        if step in self._latest.all_steps():
            return
        self._latest.save(step, args=_composite(meta, own=own, rest=rest))
        self._saving = True

    def wait(self) -> None:
        """Returns once what `save` started is written whole."""
        if self._saving:
            self._latest.wait_until_finished()
            self._saving = False

    def save_best(self, step: int, own: Any, meta: Mapping[str, Any]) -> None:
        """Replaces the best checkpoint by this one; one of the same step, from before a resume, is the same."""
        if step in self._best.all_steps():
            return
        self._best.save(step, args=_composite(meta, own=own), force=True)

    def newest(self) -> tuple[int, dict] | None:
        """Returns the newest step and its meta; None in a fresh workdir."""
        step = self._latest.latest_step()
        return None if step is None else (step, _meta(self._latest, step))

    def best(self) -> dict | None:
        """Returns the meta of the best checkpoint; None if there is none yet."""
        step = self._best.latest_step()
        return None if step is None else _meta(self._best, step)

    def restore(self, step: int, own: Any, rest: Any) -> tuple[Any, Any]:
        """Returns (own, rest) of that step, laid out as the shardings of the abstract arguments say.

        Raises:
          UserError: if what was read is not what was written, or has other shapes.
        """
        return _restore(self._latest, step, "own", own), _restore(self._latest, step, "rest", rest)

    def close(self) -> None:
        self._latest.close()
        self._best.close()


def _dtypes(own: Mapping[str, jax.Array]) -> dict[str, str]:
    return {path: str(leaf.dtype) for path, leaf in sorted(own.items())}


def _composite(meta: Mapping[str, Any], **items: Any) -> ocp.args.Composite:
    """Returns what to save: the items, and `meta` with their checksums and its own."""
    meta = {**meta, "own": _dtypes(items["own"])}
    checksums = {name: _checksum(value) for name, value in items.items()} | {"meta": _json_checksum(meta)}
    saves = {name: ocp.args.StandardSave(value) for name, value in items.items()}
    return ocp.args.Composite(**saves, meta=ocp.args.JsonSave({**meta, "checksums": checksums}))


def _json_checksum(meta: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(meta, sort_keys=True).encode()):08x}"


def _folder(manager: ocp.CheckpointManager, step: int) -> Path:
    return Path(manager.directory) / str(step)


def _put_in_order(workdir: Path, keep: int, keep_every: int) -> list[str]:
    """Moves damaged checkpoints aside, on this host alone; returns what to say about them."""
    remarks = []
    for kind, prefix in (("checkpoints", ""), ("best", "best-")):
        step, damaged = _newest_intact(workdir / kind)
        if kind == "checkpoints" and damaged and step is None:
            (_, reason), *_ = damaged.items()
            raise UserError(
                f"{workdir / kind}: no checkpoint is intact (the newest: {reason}): put back a copy of one, or start "
                "over with another --workdir"
            )
        for wrong, reason in damaged.items():
            folder = workdir / kind / str(wrong)
            aside = _move_aside(folder, workdir / "corrupt" / f"{prefix}{wrong}")
            remarks.append(f"checkpoint {folder} is damaged ({reason}): moved to {aside}")
    _finish_deleting(workdir / "checkpoints", keep, keep_every)
    _finish_deleting(workdir / "best", 1, 0)
    return remarks


def _finish_deleting(folder: Path, keep: int, keep_every: int) -> None:
    """Deletes checkpoints that a killed run had begun to delete: damaged ones, which were not to be kept."""
    steps = _steps(folder)
    for step in steps[:-keep]:
        if not (keep_every and step % keep_every == 0) and _damage(folder / str(step)) is not None:
            shutil.rmtree(folder / str(step))


def _steps(folder: Path) -> list[int]:
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdigit())


def _newest_intact(folder: Path) -> tuple[int | None, dict[int, str]]:
    """Returns the newest intact step, and what is wrong with each newer one, from the newest on."""
    damaged = {}
    for step in reversed(_steps(folder)):
        reason = _damage(folder / str(step))
        if reason is None:
            return step, damaged
        damaged[step] = reason
    return None, damaged


def _damage(folder: Path) -> str | None:
    """Reads all of a checkpoint, on this host alone, and returns how it differs from what was saved; None: it does not.

    Raises:
      UserError: the file system refuses to read a file, which says nothing about what is in it.
    """
    try:
        json.loads((folder / "_CHECKPOINT_METADATA").read_bytes())
        meta = json.loads((folder / "meta" / "metadata").read_bytes())
        check, expected = _expected(meta)
        meta.pop("checksums", None)
        for item in expected:
            found = _json_checksum(meta) if item == "meta" else check(_on_host(folder / item))
            if found != expected[item]:
                return f"the checksum of {item!r} differs"
    except (MemoryError, jax.errors.JaxRuntimeError):  # this machine's trouble, not the checkpoint's
        raise
    except Exception as error:  # a byte that flipped in the description of an array can raise anything
        _check_readable(folder)
        return _one_line(error)
    return None


def _expected(meta: Mapping[str, Any]) -> tuple[Callable[[Any], str], dict[str, str]]:
    """Returns what a checkpoint's items are checked by, and {item: what that gives}."""
    # There were no checksums at first, but fingerprints.
    return (_checksum, meta["checksums"]) if "checksums" in meta else (fingerprint, meta["fingerprints"])


def _on_host(item: Path) -> Any:
    """Returns the arrays of an item as numpy's; Orbax's manager would have all hosts take part."""
    handler: Any = ocp.PyTreeCheckpointHandler()  # typed for paths of etils only
    item = item.absolute()  # it refuses any other
    # By way of a device, though only numpy arrays are wanted: restoring reads more files than reading into numpy does.
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # jax was told to have none
        device = jax.local_devices()[0]
    device = jax.sharding.SingleDeviceSharding(device)
    leaves, tree = jax.tree.flatten(handler.metadata(item).tree)
    arrays = []
    # One at a time: Orbax says pages about the reads that are under way when one fails.
    for i in range(len(leaves)):
        wanted = tree.unflatten([0 if i == j else ocp.PLACEHOLDER for j in range(len(leaves))])
        how = tree.unflatten([ocp.ArrayRestoreArgs(sharding=device)] * len(leaves))
        found = handler.restore(item, args=ocp.args.PyTreeRestore(item=wanted, restore_args=how))
        arrays.append(np.asarray(jax.tree.leaves(found)[i]))
    return tree.unflatten(arrays)


def _check_readable(folder: Path) -> None:
    """Raises UserError if the file system refuses to read a file of a checkpoint."""

    def refuse(error: OSError, path: str) -> None:
        raise UserError(f"{path} cannot be read ({error.strerror}): mend that; nothing was changed") from error

    for parent, _, names in os.walk(folder, onerror=lambda error: refuse(error, error.filename)):
        for path in (os.path.join(parent, name) for name in names):
            try:
                with open(path, "rb") as file:
                    while file.read(_PIECE):
                        pass
            except OSError as error:
                refuse(error, path)


def _move_aside(folder: Path, target: Path) -> Path:
    """Moves a folder to `target`, or to target-2, -3, ... if there is one, and returns where it is."""
    number, aside = 1, target
    while aside.exists():
        number += 1
        aside = target.with_name(f"{target.name}-{number}")
    try:
        aside.parent.mkdir(exist_ok=True)
        return folder.rename(aside)
    except OSError as error:
        raise UserError(f"{folder} is damaged and cannot be moved to {aside} ({error.strerror}): move it") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__


@contextlib.contextmanager
def _naming_damage(folder: Path) -> Iterator[None]:
    """Turns an error into a UserError if the checkpoint is damaged, or holds other variables than were asked for."""
    try:
        yield
    except Exception as error:
        reason = _damage(folder)
        if reason is not None:
            raise _damaged(folder, reason) from error
        if isinstance(error, ValueError | KeyError):
            raise UserError(f"checkpoint {folder} cannot be restored: {_one_line(error)}") from error
        raise


def _damaged(folder: Path, reason: str) -> UserError:
    newest = "take the newest one (--which latest)" if folder.parent.name == "best" else "move it to use the one before"
    return UserError(f"checkpoint {folder} is damaged ({reason}): {newest}")


def _meta(manager: ocp.CheckpointManager, step: int) -> dict:
    with _naming_damage(_folder(manager, step)):
        return manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]


def _restore(manager: ocp.CheckpointManager, step: int, item: str, abstract: Any) -> Any:
    folder = _folder(manager, step)
    with _naming_damage(folder):
        args = ocp.args.Composite(**{item: ocp.args.StandardRestore(abstract)})
        value = manager.restore(step, args=args)[item]
    check, expected = _expected(_meta(manager, step))
    if check(value) != expected[item]:
        raise _damaged(folder, f"the checksum of {item!r} differs")
    return value


def abstract_like(tree: Any) -> Any:
    """Returns shapes, dtypes and shardings of a tree of arrays, for `Checkpoints.restore`."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def load_for_inference(workdir: Path, which: str = "best", overrides: Sequence[str] = ()) -> tuple[system.System, dict]:
    """Returns the system of a workdir and its variables `params` and `lora`: `load` without the heads."""
    built, variables = load(workdir, which, overrides)
    # After a merged stage there are no adapters.
    return built, {name: variables[name] for name in ("params", "lora") if name in variables}


def load(workdir: Path, which: str = "best", overrides: Sequence[str] = ()) -> tuple[system.System, dict]:
    """Returns the system of a workdir and its variables, without the teacher.

    Args:
      which: "best" by periodic evaluation (the latest if there was none), or "latest".
      overrides: `--config.KEY=VALUE` for what another machine may need: mesh.*, model.attention, eval.*.

    Raises:
      UserError: for a directory without a run in it, base weights other than those it was trained on, or a key that
        may not change.
    """
    config = config_lib.override(config_lib.from_json(workdir / "config.json"), overrides, INFERENCE_KEYS)
    manager, step = _for_inference(workdir, which)
    meta = _meta(manager, step)

    built = system.build(config)
    mesh = system_mesh(config)
    base = system.load_base(built, mesh)
    for key, value in fingerprints(base).items():
        if value != meta[key]:
            name = key.partition("_")[0]
            what = {"llm": "LLM"}.get(name, name)
            raise UserError(f"{config.model[name]} is not the {what} that {workdir} was trained on: its weights differ")
    shapes = {p: s for p, s in sharding.flatten(system.abstract_variables(built)).items() if p in meta["own"]}
    wanted = {path: jax.ShapeDtypeStruct(s.shape, meta["own"][path]) for path, s in shapes.items()}
    own = _restore(manager, step, "own", _placed(wanted, mesh))
    manager.close()
    return built, sharding.join(own, {"params": base})


def check_llm(config: Config, found: str, wanted: str | None) -> None:
    """Raises UserError if weights that want an LLM of that fingerprint (None: any) found another one."""
    if wanted not in (None, found):
        raise UserError(
            f"the weights are for another base: model.llm {config.model.llm} has fingerprint {found}, they want "
            f"{wanted}"
        )


def inference_step(workdir: Path, which: str = "best") -> int:
    """Returns the step whose weights `load_for_inference` loads."""
    return inference_meta(workdir, which)[0]


def inference_meta(workdir: Path, which: str = "best") -> tuple[int, dict]:
    """Returns the step whose weights `load_for_inference` loads, and what its checkpoint says of the run."""
    manager, step = _for_inference(workdir, which)
    meta = _meta(manager, step)
    manager.close()
    return step, meta


def newest_step(workdir: Path) -> tuple[int, float]:
    """Returns the step of a run's newest checkpoint, and the seconds of training that led to it.

    Raises:
      UserError: there is none.
    """
    manager, step = _for_inference(workdir, "latest")
    seconds = _meta(manager, step)["seconds"]
    manager.close()
    return step, seconds


def _for_inference(workdir: Path, which: str) -> tuple[ocp.CheckpointManager, int]:
    options = ocp.CheckpointManagerOptions(create=False)
    of = lambda name: ocp.CheckpointManager((workdir / name).absolute(), options=options)
    manager = of("best" if which == "best" else "checkpoints")
    if manager.latest_step() is None and which == "best":
        manager = of("checkpoints")
    step = manager.latest_step()
    if step is None:
        raise UserError(f"{workdir} holds no checkpoint yet: train first, or wait for the first one")
    return manager, step


def _placed(abstract: dict[str, jax.ShapeDtypeStruct], mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    shardings = sharding.tree_shardings(abstract, mesh)
    return {path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings[path]) for path, x in abstract.items()}


def system_mesh(config: Config) -> Mesh:
    """The mesh that a configuration asks for."""
    return sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
