"""Hides from Python, and from whatever it starts, the packages that are not in requirements.txt."""

import importlib.metadata
import re
import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import Distribution
from pathlib import Path
from types import ModuleType
from typing import Any

LOCK = Path(__file__).resolve().parents[3] / "requirements.txt"


def normal(name: str) -> str:
    """The name of a package as the index compares it (packaging.python.org, "Names and normalization")."""
    return re.sub(r"[-_.]+", "-", name).lower()


class LockedFinder:
    """Finds what Python's own finder of files does, but for what packages that are not locked have brought."""

    def __init__(self, locked: set[str]) -> None:
        brought = importlib.metadata.packages_distributions()
        self._hidden = {name for name, packages in brought.items() if not locked & set(map(normal, packages))}

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """None where it is hidden."""
        return None if name.partition(".")[0] in self._hidden else PathFinder.find_spec(name, path, target)

    def find_distributions(self, *context: Any) -> Iterator[Distribution]:
        """All of them."""
        yield from PathFinder.find_distributions(*context)


locked = {normal(name) for name in re.findall(r"^([\w.-]+)==", LOCK.read_text(), re.MULTILINE)}
sys.meta_path[sys.meta_path.index(PathFinder)] = LockedFinder(locked)
