"""Imports point one way: down the floors of docs/architecture.md, never up, never sideways."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "finetune"

FLOORS = [
    {"__init__", "__main__"},
    {"cli", "api"},
    {"pipeline", "compose", "processes"},
    {"doctor", "checks"},
    {"config", "report", "samples", "combine", "adaptation"},
    {"offsite", "quantize"},
    {"training", "export"},
    {"evaluation", "metrics"},
    {"model"},
    {"data"},
    {"adapters"},
    {"quant"},
    {"structure", "kernels"},
    {"registry"},
    {"device"},
    {"errors", "assets", "atomic", "startup"},
]


def room_of(parts: tuple[str, ...]) -> str:
    return parts[0] if parts else "__init__"


def imports_of(path: Path) -> set[str]:
    """Rooms of finetune that a file imports, at any depth of its code."""
    rooms: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            rooms |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("finetune.")}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "finetune":
            parts = node.module.split(".")[1:]
            rooms |= {parts[0]} if parts else {alias.name for alias in node.names}
    return rooms


def floor(room: str) -> int:
    found = [level for level, rooms in enumerate(FLOORS) if room in rooms]
    assert found, f"finetune.{room} has no floor: name it in FLOORS"
    return found[0]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    room = room_of(parts)
    for other in imports_of(path) - {room}:
        assert floor(other) > floor(room), (
            f"{path.relative_to(ROOT)} ({room}) imports finetune.{other}, which is not below it"
        )


def test_every_package_is_in_the_wheel() -> None:
    import tomllib

    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["packages"])
    found = {".".join(init.parent.relative_to(ROOT).parts) for init in PACKAGE.rglob("__init__.py")} | {"finetune.conf"}
    assert listed == found
