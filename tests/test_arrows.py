"""Which room may import which; see docs/architecture.md."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.harness import ROOT

#: A room -> the rooms that it may import. A room is a module or a package of blip/, or predict.py.
ARROWS = {
    "predict": {"service", "config", "batcher"},
    "service": {"tasks", "pictures", "batcher", "weights", "device", "about", "config", "errors"},
    "tasks": {"engine", "lavis", "texts"},
    "pictures": {"errors"},
    "weights": {"lavis", "engine", "errors"},
    "lavis": {"engine", "errors"},
    "engine": set(),
    "server": {"config", "errors"},
    "device": {"errors"},
    "about": {"engine"},
    "config": {"errors"},
    "batcher": set(),
    "texts": set(),
    "folder": {"service", "config", "errors"},
    "library": {"service", "engine", "config"},
    "errors": set(),
}
#: What may be imported from outside, where that is not left open.
OUTSIDE = {
    "engine": {"torch"},
    "pictures": {"PIL", "numpy", "pi_heif"},  # its processes start in no time and are small
    "errors": set(),
    "config": set(),
    "batcher": set(),
    "texts": set(),
}
ROOMS = sorted(ARROWS)


def files_of(room: str) -> list[Path]:
    if room == "predict":
        return [ROOT / "predict.py"]
    package = ROOT / "blip" / room
    return sorted(package.rglob("*.py")) if package.is_dir() else [package.with_suffix(".py")]


def imported(path: Path) -> Iterator[str]:
    """The full names of all modules that a file imports, wherever in it; `from a import b` is a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_the_rooms_it_may(room: str) -> None:
    names = {name for path in files_of(room) for name in imported(path)}
    rooms = {name.split(".")[1] for name in names if name.startswith("blip.")} - {room}
    assert rooms <= ARROWS[room]
    others = {name.partition(".")[0] for name in names} - {"blip"} - sys.stdlib_module_names
    assert room not in OUTSIDE or others <= OUTSIDE[room]


def test_no_arrow_runs_back() -> None:
    def reached(room: str) -> set[str]:
        return set().union(*({other} | reached(other) for other in ARROWS[room])) if ARROWS[room] else set()

    assert [room for room in ROOMS if room in reached(room)] == []


def test_every_module_has_its_room() -> None:
    commands = {"__init__", "__main__", "commands"}  # programs for users, which may import any room
    found = {path.stem for path in (ROOT / "blip").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert found - commands == set(ARROWS) - {"predict"}


def test_nothing_changes_where_python_looks_for_modules() -> None:
    ours = [
        path for folder in ("blip", "demo", "deploy", "benchmarks", "tests") for path in (ROOT / folder).rglob("*.py")
    ]
    changing = [str(path) for path in ours if path != Path(__file__) and "sys.path" in path.read_text()]
    assert changing == []
