"""Image files made at test time: by Pillow, or chunk by chunk."""

import io
import random
import struct
import zlib
from functools import cache
from typing import Any

from PIL import Image


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(size: tuple[int, int], pixels: bytes, *before: bytes, bits: int = 8, color: int = 0) -> bytes:
    """A PNG of compressed `pixels`, with other chunks before them."""
    header = struct.pack(">IIBBBBB", *size, bits, color, 0, 0, 0)
    chunks = [chunk(b"IHDR", header), *before, chunk(b"IDAT", pixels), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def noise(mode: str = "RGB") -> Image.Image:
    return Image.frombytes("RGB", (48, 32), random.Random(0).randbytes(3 * 48 * 32)).convert(mode)


def tiff(tags: dict[int, int | tuple[int, int, int]], data: bytes = b"") -> bytes:
    """A TIFF of `data` at byte 8 and of tags: a LONG, or (type, count, value)."""
    entries = [(tag, *(value if isinstance(value, tuple) else (4, 1, value))) for tag, value in sorted(tags.items())]
    directory = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(entries)) + directory + bytes(4)


def ramp(order: str) -> bytes:
    """256 x 1 pixels of 16 bits from 0 to 65535."""
    return struct.pack(f"{order}256H", *range(0, 65536, 257))


def segment(marker: int, data: bytes) -> bytes:
    """A JPEG segment."""
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(data) + 2) + data


@cache
def zeros(mebibytes: int) -> bytes:
    """Many zeros, compressed without ever holding them."""
    packer = zlib.compressobj(9, strategy=zlib.Z_RLE)  # the fastest for runs
    block = bytes(1 << 20)
    return b"".join(packer.compress(block) for _ in range(mebibytes)) + packer.flush()
