"""Where results go: a file beside each picture, or one table. None is ever empty or half, and a killed run goes on."""

import csv
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from blip.errors import UserError

#: What is found for a picture, by name: a caption, an answer, or a probability and a similarity.
Row = dict[str, Any]


class Output(ABC):
    """Takes results as they come, in the order of the pictures."""

    @abstractmethod
    def is_done(self, picture: Path) -> bool:
        """Whether an earlier run has written the result."""

    @abstractmethod
    def write(self, picture: Path, row: Row) -> None:
        """Write a result, whole or not at all."""

    @abstractmethod
    def close(self) -> None:
        """Finish, when every picture has been asked about."""


class Beside(Output):
    """A text file beside each picture, of its name and `extension`.

    Raises:
        UserError: two pictures would have the same file.
    """

    def __init__(self, pictures: Iterable[Path], extension: str, *, overwrite: bool) -> None:
        self._extension = f".{extension.lstrip('.')}"
        self._overwrite = overwrite
        known: dict[str, str] = {}  # strings, as there may be very many
        for picture in pictures:
            target = str(self._target(picture))
            other = known.setdefault(target, str(picture))
            if other != str(picture):
                raise UserError(f"{other} and {picture} would both have {target}; rename one of them.")

    def is_done(self, picture: Path) -> bool:
        """Whether its file is there, and not empty."""
        target = self._target(picture)
        return not self._overwrite and target.is_file() and target.stat().st_size > 0

    def write(self, picture: Path, row: Row) -> None:
        """Write its file."""
        target = self._target(picture)
        part = target.with_name(f".{target.name}.part")
        part.write_text(" ".join(map(str, row.values())), encoding="utf-8")
        os.replace(part, target)

    def close(self) -> None:
        """Do nothing: every file is whole."""

    def _target(self, picture: Path) -> Path:
        return picture.with_suffix(self._extension)


class Table(Output):
    """A file with a row for each picture, to which rows are added.

    Args:
        path: of the file.
        columns: of a result.
        overwrite: whether to begin anew.
    """

    def __init__(self, path: Path, columns: tuple[str, ...], *, overwrite: bool) -> None:
        self._path, self._columns = path, ("image", *columns)
        self._done: set[str] = set()
        if path.exists() and not overwrite:
            _cut_half_line(path)
            with path.open(encoding="utf-8", newline="") as file:
                self._done = {row["image"] for row in self._rows(file)}
        self._mode = "w" if overwrite else "a"
        self._file: IO[str] | None = None  # until there is something to write
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise PermissionError("it may not be written to")

    def is_done(self, picture: Path) -> bool:
        """Whether it has a row."""
        return picture.as_posix() in self._done

    def write(self, picture: Path, row: Row) -> None:
        """Add a row."""
        if self._file is None:
            self._file = self._path.open(self._mode, encoding="utf-8", newline="")
            if self._file.tell() == 0:
                self._begin(self._file)
        self._add(self._file, {"image": picture.as_posix(), **row})
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def _begin(self, file: IO[str]) -> None:
        """Write what stands before the rows."""

    def _check(self, columns: Iterable[str]) -> None:
        """Raise UserError unless the file has these columns."""
        if tuple(columns) != self._columns:
            raise UserError(f"{self._path} has other columns; choose another file, or begin anew with --overwrite.")

    @abstractmethod
    def _rows(self, file: IO[str]) -> Iterator[Row]: ...

    @abstractmethod
    def _add(self, file: IO[str], row: Row) -> None: ...


class Csv(Table):
    """Comma-separated values with the columns' names first."""

    def _begin(self, file: IO[str]) -> None:
        csv.writer(file, lineterminator="\n").writerow(self._columns)

    def _rows(self, file: IO[str]) -> Iterator[Row]:
        reader = csv.DictReader(file)
        self._check(reader.fieldnames or self._columns)
        yield from reader

    def _add(self, file: IO[str], row: Row) -> None:
        csv.DictWriter(file, self._columns, lineterminator="\n").writerow(row)


class JsonLines(Table):
    """A JSON object a line."""

    def _rows(self, file: IO[str]) -> Iterator[Row]:
        for line in file:
            row = json.loads(line)
            self._check(row)
            yield row

    def _add(self, file: IO[str], row: Row) -> None:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


class Parquet(JsonLines):
    """A Parquet file, made at the end of the lines of JSON that are kept until then.

    Raises:
        UserError: pyarrow is not installed.
    """

    def __init__(self, path: Path, columns: tuple[str, ...], *, overwrite: bool) -> None:
        try:
            import pyarrow.json
            import pyarrow.parquet
        except ImportError as error:
            raise UserError("--parquet needs pyarrow; install it, or use --jsonl.") from error
        self._read, self._write_table, self._target = pyarrow.json.read_json, pyarrow.parquet.write_table, path
        super().__init__(path.with_name(f"{path.name}.part.jsonl"), columns, overwrite=overwrite)

    def close(self) -> None:
        """Make the file."""
        super().close()
        if not self._path.exists():
            return
        part = self._target.with_name(f".{self._target.name}.part")
        self._write_table(self._read(self._path), part)
        os.replace(part, self._target)


def _cut_half_line(path: Path) -> None:
    """Cut off the end of a file that was being written when its run was killed."""
    with path.open("r+b") as file:
        file.truncate(file.read().rfind(b"\n") + 1)
