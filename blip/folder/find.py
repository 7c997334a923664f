"""Which pictures are meant: files, folders and patterns, in an order that is the same every time."""

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from blip.errors import UserError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif"}


def pictures(given: Sequence[str], *, recursive: bool) -> list[Path]:
    """The pictures of files, folders and patterns, each once; those of a folder by name.

    Raises:
        UserError: there is no such file or folder, or no picture in any.
    """
    found = dict.fromkeys(path for one in given for path in _of(one, recursive))
    if not found:
        raise UserError("There is no picture in any of these folders; add --recursive for those below them.")
    return list(found)


def _of(given: str, recursive: bool) -> Iterator[Path]:
    matches = [given] if Path(given).exists() else sorted(glob.glob(given, recursive=True))
    if not matches:
        raise UserError(f"{given} is no file and no folder; check its name.")
    for path in map(Path, matches):
        if path.is_dir():
            yield from _in(path, recursive)
        else:
            yield path


def _in(folder: Path, recursive: bool) -> Iterator[Path]:
    for directory, below, names in os.walk(folder):
        below[:] = sorted(name for name in below if not name.startswith(".")) if recursive else []
        for name in sorted(names):
            if Path(name).suffix.lower() in SUFFIXES and not name.startswith("."):
                yield Path(directory, name)
