"""Writes the golden files: `python -m tests.golden.write`. Read the difference before you commit it.

`sharding/CONFIG.txt`: where every parameter of a flagship config lies on a mesh that splits all three axes.
"""

from pathlib import Path

from jax.sharding import AbstractMesh

from aura_jax import config, sharding, system
from aura_jax.experiments.compile import shapes

CONFIGS = Path(__file__).parents[2] / "configs"
SHARDING = Path(__file__).parent / "sharding"
MESH = AbstractMesh((2, 2, 2), sharding.MESH_AXES)
FLAGSHIPS = sorted(path.stem for path in CONFIGS.glob("whisper_*.py"))


def sharding_of(name: str) -> str:
    """Returns a line for every parameter of a config, the teacher's included: its path, dtype, shape and spec."""
    c = config.load([f"--config={CONFIGS / name}.py"])
    with shapes.build(c) as built:
        variables = system.abstract_variables(built) | {"teacher": system.abstract_teacher(built)}
    lines = []
    for path, x in sorted(sharding.flatten(variables).items()):
        axes = ", ".join(str(axis) for axis in sharding.parameter_spec(path, x.shape, MESH))
        lines.append(f"{path}: {x.dtype}{list(x.shape)} P({axes})\n")
    return "".join(lines)


def main() -> None:
    SHARDING.mkdir(exist_ok=True)
    for path in SHARDING.glob("*.txt"):
        path.unlink()
    for name in FLAGSHIPS:
        (SHARDING / f"{name}.txt").write_text(sharding_of(name), encoding="utf-8")


if __name__ == "__main__":
    main()
