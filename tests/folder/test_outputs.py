"""Results are whole, and a run that was killed goes on."""

import json
from pathlib import Path

import pyarrow.parquet as parquet
import pytest

from blip.errors import UserError
from blip.folder.outputs import Beside, Csv, JsonLines, Parquet, Table

PICTURES = [Path("a.jpg"), Path('für, "b".png'), Path("c.gif")]
CAPTIONS = ["one", 'two, "three"', "vier für"]


def fill(output: Table, count: int = 3) -> None:
    for picture, caption in list(zip(PICTURES, CAPTIONS, strict=True))[:count]:
        if not output.is_done(picture):
            output.write(picture, {"caption": caption})
    output.close()


@pytest.mark.parametrize("kind", [Csv, JsonLines])
def test_a_table_that_was_cut_off_anywhere_goes_on(kind: type[Csv | JsonLines], tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    fill(kind(whole, ("caption",), overwrite=False))
    expected = whole.read_bytes()
    assert expected.count(b"\n") == 3 + (kind is Csv)
    for size in range(len(expected)):
        cut = tmp_path / "cut"
        cut.write_bytes(expected[:size])
        fill(kind(cut, ("caption",), overwrite=False))
        assert cut.read_bytes() == expected, size


def test_a_table_with_other_columns_is_left_alone(tmp_path: Path) -> None:
    for kind in (Csv, JsonLines):
        fill(kind(tmp_path / "table", ("caption",), overwrite=True))
        before = (tmp_path / "table").read_bytes()
        with pytest.raises(UserError, match="has other columns"):
            kind(tmp_path / "table", ("answer",), overwrite=False)
        assert (tmp_path / "table").read_bytes() == before
        kind(tmp_path / "table", ("answer",), overwrite=True).close()
        assert (tmp_path / "table").read_bytes() == before, "as nothing was written"


def test_parquet_is_made_at_the_end_from_lines_that_stay(tmp_path: Path) -> None:
    fill(Parquet(tmp_path / "out.parquet", ("caption",), overwrite=False), 2)
    fill(Parquet(tmp_path / "out.parquet", ("caption",), overwrite=False))
    rows = parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert rows == [{"image": str(path), "caption": text} for path, text in zip(PICTURES, CAPTIONS, strict=True)]


def test_lines_are_json_with_the_names_of_the_pictures(tmp_path: Path) -> None:
    fill(JsonLines(tmp_path / "table", ("caption",), overwrite=False))
    lines = [json.loads(line) for line in (tmp_path / "table").read_text().splitlines()]
    assert lines[1] == {"image": 'für, "b".png', "caption": 'two, "three"'}


def test_a_text_beside_a_picture_is_done_once_it_has_something(tmp_path: Path) -> None:
    picture = tmp_path / "a.b.jpg"
    output = Beside([picture], "caption", overwrite=False)
    (tmp_path / "a.b.caption").touch()
    assert not output.is_done(picture)
    output.write(picture, {"probability": 0.5, "similarity": 0.25})
    assert [path.name for path in tmp_path.iterdir()] == ["a.b.caption"]
    assert (tmp_path / "a.b.caption").read_text() == "0.5 0.25"
    assert output.is_done(picture)
    assert not Beside([picture], ".caption", overwrite=True).is_done(picture)


def test_two_pictures_never_share_a_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.jpg and .*a\.png would both have .*a\.txt; rename one of them"):
        Beside([tmp_path / "a.jpg", tmp_path / "a.png"], ".txt", overwrite=False)
