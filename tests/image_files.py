"""Image files made at test time: by Pillow, or chunk by chunk."""

import io
import struct
import zlib
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
