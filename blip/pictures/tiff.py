"""The first directory of a TIFF: what its tags say, and a copy of the file in which they say something else."""

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from mmap import mmap

WIDTH, BITS, COMPRESSION, PHOTOMETRIC, ORIENTATION, SAMPLES = 256, 258, 259, 262, 274, 277
TILE_WIDTH, SAMPLE_FORMAT = 322, 339
HEIGHT, TILE_HEIGHT = 257, 323
LAYERS = 37724  # Photoshop's own copy of a picture in layers
PIECES = (273, 279, 324, 325)  # where strips and tiles are, and how large

#: Bytes of one value of a type; the types are numbered as in TIFF 6.0 and BigTIFF.
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_NUMBERS = {1: "B", 3: "H", 4: "I", 16: "Q"}  # unsigned integers, for struct
_LONG = 4


@dataclass(frozen=True)
class Entry:
    """One entry of a directory.

    Attributes:
        tag: what it tells of.
        count: how many values it has.
        size: bytes of all of them.
        at: where it stands in the file.
        number: its first value, where that is in the entry itself and a whole number; else None.
    """

    tag: int
    count: int
    size: int
    at: int
    number: int | None


@dataclass(frozen=True)
class _Layout:
    order: str  # for struct
    big: bool
    first: int  # where the entries begin
    count: int

    @property
    def length(self) -> int:
        """Bytes of an entry."""
        return 20 if self.big else 12

    @property
    def end(self) -> int:
        """Where the address of the next directory stands."""
        return self.first + self.count * self.length


def _layout(data: mmap | bytes) -> _Layout:
    order = "<" if data[:2] == b"II" else ">"
    if struct.unpack_from(order + "H", data, 2)[0] == 43:
        (at,) = struct.unpack_from(order + "Q", data, 8)
        return _Layout(order, True, at + 8, struct.unpack_from(order + "Q", data, at)[0])
    (at,) = struct.unpack_from(order + "I", data, 4)
    return _Layout(order, False, at + 2, struct.unpack_from(order + "H", data, at)[0])


def entries(data: mmap | bytes) -> Iterator[Entry]:
    """The entries of the first directory, in their order, as far as the file goes.

    Raises:
        struct.error: the file ends before them.
    """
    layout = _layout(data)
    head, inline = ("HHQ", 8) if layout.big else ("HHI", 4)
    for index in range(layout.count):
        at = layout.first + index * layout.length
        if at + layout.length > len(data):
            return
        tag, kind, count = struct.unpack_from(layout.order + head, data, at)
        size, number = count * _SIZES.get(kind, 0), None
        if kind in _NUMBERS and 0 < size <= inline:
            (number,) = struct.unpack_from(layout.order + _NUMBERS[kind], data, at + layout.length - inline)
        yield Entry(tag, count, size, at, number)


def numbers(data: mmap | bytes) -> dict[int, int | None]:
    """Of every tag of the first directory its `Entry.number`; of equal tags the first counts."""
    found: dict[int, int | None] = {}
    for entry in entries(data):
        found.setdefault(entry.tag, entry.number)
    return found


def is_last(data: mmap | bytes) -> bool:
    """Whether no other directory follows the first."""
    layout = _layout(data)
    return not any(data[layout.end : layout.end + (8 if layout.big else 4)])


def changed(data: mmap | bytes, new: Mapping[int, int]) -> bytearray:
    """A copy of the file without its other pages, whose tags of one value have `new` numbers, where it has them."""
    layout, copy = _layout(data), bytearray(data)
    head = layout.order + ("HHQII" if layout.big else "HHII")
    for entry in entries(data):
        if entry.tag in new and entry.count == 1:
            value = (new[entry.tag], 0) if layout.big else (new[entry.tag],)  # of 8 bytes, or of 4
            struct.pack_into(head, copy, entry.at, entry.tag, _LONG, 1, *value)
    next_page = slice(layout.end, layout.end + (8 if layout.big else 4))
    copy[next_page] = bytes(len(copy[next_page]))
    return copy
