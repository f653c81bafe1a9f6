"""A room imports only from the rooms above it in docs/architecture.md."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "aura_jax"


def rooms() -> list[list[str]]:
    """Returns the rooms of the document's table, from the ground floor on; rooms of one row are on one floor."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    table = text.split("## The rooms", 1)[1].split("\n## ", 1)[0]
    firsts = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    return [
        [name.removesuffix("/").removesuffix(".py") for name in re.findall(r"`([^`]+)`", first)] for first in firsts
    ]


def imported(file: Path) -> set[str]:
    """Returns the rooms that a file imports from, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in found if name.startswith("aura_jax.")}


def test_rooms_import_only_from_above():
    floors = {room: floor for floor, of_row in enumerate(rooms()) for room in of_row}
    there = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert there - {"__init__"} == set(floors)
    wrong = []
    for file in PACKAGE.rglob("*.py"):
        room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for other in imported(file) & set(floors) - {room}:
            if room != "__init__" and floors[other] > floors[room]:
                wrong.append(f"{file.relative_to(ROOT)} imports {other}")
    assert wrong == []
