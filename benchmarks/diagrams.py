"""Draws every system of configs/systems with its dimensions: docs/systems/NAME.png.

python benchmarks/diagrams.py
"""

import importlib
from pathlib import Path

from aura_jax import system
from aura_jax.report import collect, diagram, theme

ROOT = Path(__file__).parents[1]


def main() -> None:
    folder = ROOT / "docs" / "systems"
    folder.mkdir(exist_ok=True)
    for path in sorted((ROOT / "configs" / "systems").glob("[!_]*.py")):
        config = importlib.import_module(f"configs.systems.{path.stem}").get_config()
        if not any(config.train.stages[name].objectives.distill for name in config.train.schedule):
            config.model.teacher, config.embedder.from_teacher = "", False  # it hears nothing and is not drawn
        theme.png(diagram.method(collect.model_of(system.build(config))), folder / f"{path.stem}.png")


if __name__ == "__main__":
    main()
