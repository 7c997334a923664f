"""Pictures are found in an order that is the same every time."""

from pathlib import Path

import pytest

from blip.errors import UserError
from blip.folder.find import pictures


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.JPG", "a.png", "notes.txt", ".hidden.png", "below/c.webp", "below/.cache/d.png", "z/e.heic"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.touch()
    return tmp_path


def names(folder: Path, *given: str, recursive: bool = False) -> list[str]:
    found = pictures([str(folder / one) for one in given], recursive=recursive)
    return [path.relative_to(folder).as_posix() for path in found]


def test_a_folder_has_its_pictures_by_name(folder: Path) -> None:
    assert names(folder, "") == ["a.png", "b.JPG"]
    assert names(folder, "", recursive=True) == ["a.png", "b.JPG", "below/c.webp", "z/e.heic"]


def test_files_and_patterns_are_taken_as_they_are_and_once(folder: Path) -> None:
    assert names(folder, "notes.txt", "*.png", "b.JPG", "", "z") == ["notes.txt", "a.png", "b.JPG", "z/e.heic"]
    assert names(folder, "**/*.webp") == ["below/c.webp"]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [("none", "is no file and no folder; check its name."), ("below/.cache/none*", "is no file and no folder")],
)
def test_what_is_not_there_is_one_sentence(folder: Path, given: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        names(folder, given)


def test_a_folder_without_pictures_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no picture in any of these folders"):
        pictures([str(tmp_path)], recursive=False)
