"""Values of a JSON file that anybody may have written: each of a type that can be worked with, or one sentence."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blip.errors import BundleError
from blip.weights.bundle import read_json

LARGEST = 1e30  # of any number that a setting may have


def read(path: Path) -> dict[str, Any]:
    """A JSON file of a model.

    Raises:
        BundleError: it is missing or something else.
    """
    return read_json(path, "restore the model")


def read_if_there(path: Path) -> dict[str, Any]:
    """The same, or nothing where there is no such file."""
    return read(path) if path.is_file() else {}


def shown(value: Any) -> str:
    """A value as a sentence shows it, which is not to be as long as a file."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def mapping(value: Any) -> dict[str, Any]:
    """`value`, or nothing where it is no JSON object."""
    return value if isinstance(value, dict) else {}


def array(value: Any) -> list[Any]:
    """`value`, or nothing where it is no JSON array."""
    return value if isinstance(value, list) else []


def is_number(value: Any) -> bool:
    """Whether it is a number that a float32 can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST < value < LARGEST


def is_place(value: Any, count: int) -> bool:
    """Whether it is a place in a list of `count`."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < count


def count(path: Path, settings: Mapping[str, Any], name: str) -> int:
    """The setting `name` of the file `path`, a whole number from 1.

    Raises:
        BundleError: it is something else.
    """
    value = settings[name]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise BundleError(f"{path} has {name} {shown(value)}; a whole number from 1 is needed.")
    return value


def number(path: Path, settings: Mapping[str, Any], name: str) -> float:
    """The setting `name` of the file `path`, a number above 0.

    Raises:
        BundleError: it is something else.
    """
    value = settings[name]
    if not is_number(value) or value <= 0:
        raise BundleError(f"{path} has {name} {shown(value)}; a number above 0 is needed.")
    return float(value)
