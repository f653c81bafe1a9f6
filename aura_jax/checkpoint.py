"""Checkpoints of what a run trains: asynchronous, on any mesh, and proven intact by fingerprints.

A workdir holds `config.json`, `checkpoints/STEP` (the newest), `best/STEP` (the best by periodic evaluation, only its
trained variables), and what else a run writes. Frozen weights are in no checkpoint; their fingerprints are.
"""

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from aura_jax import config as config_lib
from aura_jax import sharding, system
from aura_jax.config import Config
from aura_jax.errors import UserError

# What may differ between the machine that trained and the one that answers.
INFERENCE_KEYS = ("mesh.", "model.attention", "eval.")


@jax.jit
def _bits_sum(x: jax.Array) -> jax.Array:
    """Returns a uint32 that depends on every bit of `x` and its place, and on nothing else: not on the mesh."""
    bits = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize])
    index = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    # Odd weights: a change of one bit always changes the sum modulo 2^32.
    return jnp.sum(bits.astype(jnp.uint32) * (2 * index + 1), dtype=jnp.uint32)


def fingerprint(tree: Any) -> str:
    """Returns eight hexadecimal digits that identify the leaves of a tree, their bits and their paths.

    The same on every mesh and number of hosts; computed where the arrays are, one leaf at a time.
    """
    total = 0
    for path, leaf in sorted(sharding.flatten(tree).items()):
        total = (total * 31 + zlib.crc32(path.encode()) * (int(_bits_sum(leaf)) | 1)) % (1 << 32)
    return f"{total:08x}"


class Checkpoints:
    """The checkpoints of one workdir; closing waits for what is being written.

    A checkpoint has three items: `own` (by path, every variable that is no base weight, and base weights that were
    trained), `rest` (all else that a step changes) and `meta`.
    """

    def __init__(self, workdir: Path, config: Config):
        c = config.train
        options = ocp.CheckpointManagerOptions(
            max_to_keep=c.keep, keep_period=c.keep_every or None, enable_async_checkpointing=True
        )
        self._latest = ocp.CheckpointManager((workdir / "checkpoints").absolute(), options=options)
        self._best = _best_manager(workdir)

    def save(self, step: int, own: Any, rest: Any, meta: Mapping[str, Any]) -> None:
        """Starts writing a checkpoint; `meta` is JSON. A step that is there already is left as it is."""
        if step in self._latest.all_steps():
            return
        meta = {**meta, "own": _dtypes(own), "fingerprints": {"own": fingerprint(own), "rest": fingerprint(rest)}}
        self._latest.save(
            step,
            args=ocp.args.Composite(
                own=ocp.args.StandardSave(own),
                rest=ocp.args.StandardSave(rest),
                meta=ocp.args.JsonSave(meta),
            ),
        )

    def save_best(self, step: int, own: Any, meta: Mapping[str, Any]) -> None:
        """Replaces the best checkpoint by this one; one of the same step, from before a resume, is the same."""
        if step in self._best.all_steps():
            return
        meta = {**meta, "own": _dtypes(own), "fingerprints": {"own": fingerprint(own)}}
        args = ocp.args.Composite(own=ocp.args.StandardSave(own), meta=ocp.args.JsonSave(meta))
        self._best.save(step, args=args, force=True)

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


def _best_manager(workdir: Path) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
    return ocp.CheckpointManager((workdir / "best").absolute(), options=options)


def _meta(manager: ocp.CheckpointManager, step: int) -> dict:
    return manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]


def _restore(manager: ocp.CheckpointManager, step: int, item: str, abstract: Any) -> Any:
    where = f"{manager.directory}/{step}"
    try:
        args = ocp.args.Composite(**{item: ocp.args.StandardRestore(abstract)})
        value = manager.restore(step, args=args)[item]
    except (ValueError, KeyError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"checkpoint {where} cannot be restored: {reason}; delete it to use the one before") from error
    if fingerprint(value) != _meta(manager, step)["fingerprints"][item]:
        raise UserError(f"checkpoint {where} is corrupt (its fingerprint differs): delete it to use the one before")
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
    llm = system.load_llm(built, mesh)
    if fingerprint(llm) != meta["llm_fingerprint"]:
        raise UserError(f"{built.llm_dir} is not the LLM that {workdir} was trained on: its weights differ")
    shapes = {p: s for p, s in sharding.flatten(system.abstract_variables(built)).items() if p in meta["own"]}
    wanted = {path: jax.ShapeDtypeStruct(s.shape, meta["own"][path]) for path, s in shapes.items()}
    own = _restore(manager, step, "own", _placed(wanted, mesh))
    manager.close()
    return built, sharding.join(own, {"params": {"llm": llm}})


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
    manager = _best_manager(workdir) if which == "best" and (workdir / "best").is_dir() else None
    if manager is None or manager.latest_step() is None:
        manager = ocp.CheckpointManager((workdir / "checkpoints").absolute())
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
