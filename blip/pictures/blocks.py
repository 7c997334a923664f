"""Refuses files that are mostly no picture, before a decoder sees them.

Decoders read every block of metadata into objects of its own, some in time that grows with the square of their number.
One pass over the headers counts what they would read, without keeping any of it, and stops at a limit.
"""

import contextlib
import re
import struct
from collections.abc import Callable, Iterator
from mmap import mmap

from PIL.JpegImagePlugin import MARKER

from blip.errors import ImageError
from blip.pictures import tiff
from blip.pictures.limits import MAX_BLOCKS, MAX_METADATA, MAX_PIECES, MAX_PIXELS, MAX_SCANS, MAX_SEGMENTS, too_many

Data = mmap | bytes

_MARKER = re.compile(rb"\xff[^\x00\xff]")
_SCAN_OR_END = re.compile(rb"\xff(?:\xd9|\xda\0[\x06\x08\x0a\x0c][\x01-\x04])")  # the end, or the header of a scan
#: Boxes that hold boxes, and how many bytes come before these.
_CONTAINERS = {b"meta": 4, b"iprp": 0, b"ipco": 0, b"iinf": 6, b"iref": 4, b"moov": 0}


class _Tally:
    """Counts what is no picture, and refuses it from a limit on."""

    def __init__(self, most: int = MAX_BLOCKS) -> None:
        self._most = most
        self._blocks = self._bytes = self._pieces = 0

    def block(self, size: int, count: int = 1) -> None:
        """Count metadata of `size` bytes."""
        self._blocks += count
        self._bytes += size
        if self._blocks > self._most:
            raise ImageError(f"image has more than {self._most} blocks of metadata; save it anew without them.")
        if self._bytes > MAX_METADATA:
            raise ImageError(f"image has more than {MAX_METADATA // 10**6} MB of metadata; save it anew without it.")

    def piece(self, count: int = 1) -> None:
        """Count a piece of the picture."""
        self._pieces += count
        if self._pieces > MAX_PIECES:
            raise ImageError(f"image is in more than {MAX_PIECES} pieces; save it anew.")


def check(form: str, data: Data) -> None:
    """Check the blocks of a file that begins as one of `form`.

    Raises:
        ImageError: it has too many, too large ones, or an AVIF or HEIF box that tells of too many pixels.
    """
    with contextlib.suppress(struct.error, IndexError):  # it ends within a block; its decoder knows what that means
        _CHECKS[form](data)


def _jpeg(data: Data) -> None:
    tally, at = _Tally(MAX_SEGMENTS), 2
    while match := _MARKER.search(data, at):
        tally.block(0, match.start() - at)  # stray bytes; Pillow reads them one by one
        at = match.end()
        marker = 0xFF00 | data[at - 1]
        if marker not in MARKER:
            return  # Pillow gives up
        if marker == 0xFFDA:
            _scans(data, match.start())
            return
        size = 0
        if MARKER[marker][2]:  # it has a length, in Pillow's eyes at least
            size = max(2, struct.unpack_from(">H", data, at)[0])
        tally.block(size)
        at += size


def _scans(data: Data, at: int) -> None:
    """Count the scans of the picture whose first scan begins at `at`; another picture may follow it."""
    for scans, match in enumerate(_SCAN_OR_END.finditer(data, at), 1):
        if match.end() - match.start() == 2:
            return
        if scans > MAX_SCANS:
            raise ImageError(f"image has more than the {MAX_SCANS} scans that are taken; save it anew.")


def _png(data: Data) -> None:
    tally, at = _Tally(), 8
    while at + 8 <= len(data):
        size, name = struct.unpack_from(">I4s", data, at)
        if name == b"IEND":
            return
        if name in (b"IDAT", b"fdAT", b"fcTL"):
            tally.piece()
        else:
            tally.block(size + 12)
        at += size + 12


def _gif(data: Data) -> None:
    tally, flags = _Tally(), data[10]
    at = 13 + (3 << (flags & 7) + 1 if flags & 128 else 0)

    def sub_block() -> int:
        nonlocal at
        size = data[at]
        at += 1 + size
        tally.block(1 + size)
        return size

    while (kind := data[at]) not in b",;":  # up to the first frame, or the end
        at += 1
        if kind == ord("!"):
            label, at = data[at], at + 1
            size = sub_block()
            # In this order as Pillow reads them: but for a comment, an empty first one does not end them.
            while (size or label != 0xFE) and (size := sub_block()):
                pass
        tally.block(1)


def _webp(data: Data) -> None:
    tally, at = _Tally(), 12
    while at + 8 <= len(data):
        name, size = struct.unpack_from("<4sI", data, at)
        if name in (b"VP8 ", b"VP8L", b"ALPH", b"ANMF"):
            tally.piece()
        else:
            tally.block(size + 8)
        at += 8 + size + (size & 1)


def _tiff(data: Data) -> None:
    tally = _Tally()
    for entry in tiff.entries(data):
        if entry.tag in tiff.PIECES:
            tally.block(0)
            tally.piece(entry.count)
        else:
            tally.block(0 if entry.tag == tiff.LAYERS else entry.size)


def _iso(data: Data) -> None:
    tally = _Tally()
    for name, start, end in _boxes(data, 0, len(data), tally):
        if name in (b"meta", b"moov"):
            tally.block(end - start)
        if name == b"ispe":
            width, height = struct.unpack_from(">II", data, start + 4)
            if width * height > MAX_PIXELS:  # beyond some size their decoders do not say why they fail
                raise too_many(width * height)


def _boxes(data: Data, at: int, end: int, tally: _Tally) -> Iterator[tuple[bytes, int, int]]:
    """The name, the first byte and the end of every box from `at` to `end`, and of those within."""
    while at + 8 <= end:
        size, name = struct.unpack_from(">I4s", data, at)
        start = at + 8
        if size == 1:
            size, start = struct.unpack_from(">Q", data, start)[0], at + 16
        stop = min(at + size, end) if size else end
        tally.block(0)
        yield name, start, stop
        if name in _CONTAINERS:
            inner = start + _CONTAINERS[name]
            if name == b"iinf" and data[start]:  # from version 1 on its count has 4 bytes
                inner += 2
            yield from _boxes(data, inner, stop, tally)
        at = max(stop, start)


def _nothing(_: Data) -> None:
    """A BMP has a header and no more."""


_CHECKS: dict[str, Callable[[Data], None]] = {
    "JPEG": _jpeg,
    "PNG": _png,
    "GIF": _gif,
    "WEBP": _webp,
    "TIFF": _tiff,
    "AVIF": _iso,
    "HEIF": _iso,
    "BMP": _nothing,
}
