"""Grey pictures of every depth: their numbers become the right shades."""

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.image_files import chunk, encoded, png, ramp
from tests.pictures.test_reading import ORIENTATION, opened

WIDTH, HEIGHT = 37, 16  # a row of most depths ends within a byte
#: 0 to 1, brighter to the right and downward.
SHADES = np.add.outer(np.arange(HEIGHT), np.arange(WIDTH)) / (HEIGHT + WIDTH - 2)


def grey_tiff(
    data: bytes, bits: int, *, order: str = "<", kind: int = 1, white_is_zero: bool = False, **more: Any
) -> bytes:
    """A TIFF of one strip of WIDTH x HEIGHT numbers, with `more` tags by number."""
    tags = {256: WIDTH, 257: HEIGHT, 258: bits, 259: 1, 262: 0 if white_is_zero else 1, 273: 8, 277: 1, 278: HEIGHT}
    tags |= {279: len(data), 339: kind, **more.get("tags", {})}
    tags = {tag: value for tag, value in tags.items() if value is not None}
    entries = b"".join(struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8 + len(data))
    return head + data + struct.pack(order + "H", len(tags)) + entries + bytes(4)


def packed(numbers: Any, bits: int) -> bytes:
    """Rows of numbers of so many bits each, the highest bit first; every row begins a byte."""
    places = np.arange(bits - 1, -1, -1)
    return np.packbits((numbers.astype(np.int64)[..., None] >> places & 1).reshape(len(numbers), -1), axis=1).tobytes()


def shades(tmp_path: Path, data: bytes) -> Any:
    """The shades of a file, 0 to 255."""
    image = opened(tmp_path, data)
    assert image.size == (WIDTH, HEIGHT)
    return np.asarray(image)[..., 0].astype(float)


def right(found: Any, steps: int) -> bool:
    """Whether the shades are as near to SHADES as so many steps of depth allow."""
    return bool(np.abs(found - 255 * SHADES).max() <= 255 / steps + 1)


@pytest.mark.parametrize("bits", [3, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("white_is_zero", [False, True])
def test_a_tiff_of_an_odd_depth_is_read(tmp_path: Path, bits: int, order: str, white_is_zero: bool) -> None:
    most = 2**bits - 1
    numbers = np.round((1 - SHADES if white_is_zero else SHADES) * most)
    data = grey_tiff(packed(numbers, bits), bits, order=order, white_is_zero=white_is_zero)
    assert right(shades(tmp_path, data), most)


@pytest.mark.parametrize("bits", [8, 12, 16, 32])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("white_is_zero", [False, True])
def test_signed_numbers_begin_at_zero_where_none_is_below(
    tmp_path: Path, bits: int, order: str, white_is_zero: bool
) -> None:
    most = 2 ** (bits - 1) - 1
    numbers = np.round((1 - SHADES if white_is_zero else SHADES) * most)
    data = packed(numbers, 12) if bits == 12 else numbers.astype(f"{order}i{bits // 8}").tobytes()
    assert right(shades(tmp_path, grey_tiff(data, bits, order=order, kind=2, white_is_zero=white_is_zero)), most)


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_signed_numbers_below_zero_are_the_darker_half(tmp_path: Path, bits: int) -> None:
    numbers = np.round(SHADES * (2**bits - 1)) - 2 ** (bits - 1)
    data = packed(numbers, 12) if bits == 12 else numbers.astype(f"<i{bits // 8}").tobytes()
    assert right(shades(tmp_path, grey_tiff(data, bits, kind=2)), 2**bits)


@pytest.mark.parametrize(("bits", "most"), [(16, 65535), (32, 255), (32, 65535), (32, 2**32 - 1)])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("white_is_zero", [False, True])
def test_numbers_from_zero_are_read(tmp_path: Path, bits: int, most: int, order: str, white_is_zero: bool) -> None:
    numbers = np.round((1 - SHADES if white_is_zero else SHADES) * most)
    data = numbers.astype(f"{order}u{bits // 8}").tobytes()
    assert right(shades(tmp_path, grey_tiff(data, bits, order=order, white_is_zero=white_is_zero)), most)


@pytest.mark.parametrize("most", [1, 255, 65535])
@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("order", ["<", ">"])
def test_fractions_up_to_one_and_wider_ones_are_read(tmp_path: Path, most: int, bits: int, order: str) -> None:
    numbers = SHADES * (min(most, 65504) if bits == 16 else most)  # the largest of 16 bits
    data = grey_tiff(numbers.astype(f"{order}f{bits // 8}").tobytes(), bits, order=order, kind=3)
    assert right(shades(tmp_path, data), 200)


def test_what_is_no_number_is_black_or_white(tmp_path: Path) -> None:
    numbers = SHADES.astype("<f4")
    numbers[0, :3] = np.nan, np.inf, -np.inf
    found = shades(tmp_path, grey_tiff(numbers.tobytes(), 32, kind=3))
    assert list(found[0, :3]) == [0, 255, 0]
    assert np.abs(found[1:] - 255 * SHADES[1:]).max() <= 2


def test_compressed_and_tiled_ones_are_read(tmp_path: Path) -> None:
    numbers = np.round(SHADES * 4095)
    deflated = zlib.compress(packed(numbers, 12))
    assert right(shades(tmp_path, grey_tiff(deflated, 12, tags={259: 8})), 4095)
    tile = np.zeros((16, 48))
    tile[:, :WIDTH] = numbers
    data = packed(tile, 12)
    tiled = grey_tiff(data, 12, tags={273: None, 278: None, 279: None, 322: 48, 323: 16, 324: 8, 325: len(data)})
    assert right(shades(tmp_path, tiled), 4095)


@pytest.mark.parametrize("bits", [12, 16])
def test_they_are_turned_upright(tmp_path: Path, bits: int) -> None:
    numbers = np.round(SHADES[::-1, ::-1] * (2**bits - 1))  # upside down
    data = packed(numbers, 12) if bits == 12 else numbers.astype("<u2").tobytes()
    assert right(shades(tmp_path, grey_tiff(data, bits, tags={ORIENTATION: 3})), 2**bits)


def test_16_bit_grey_is_scaled_and_not_clipped_to_white(tmp_path: Path) -> None:
    plain = zlib.compress(b"\0" + ramp(">"))
    deep = {
        "png": png((256, 1), plain, bits=16),
        "png with a transparent colour": png((256, 1), plain, chunk(b"tRNS", b"\0\1"), bits=16),
        "tiff": encoded(Image.frombytes("I;16", (256, 1), ramp("<")), "TIFF"),
        "big-endian tiff": encoded(Image.frombytes("I;16B", (256, 1), ramp(">")), "TIFF"),
        "deflate tiff": encoded(Image.frombytes("I;16", (256, 1), ramp("<")), "TIFF", compression="tiff_deflate"),
    }
    wanted = Image.frombytes("L", (256, 1), bytes(range(256))).convert("RGB").tobytes()
    for kind, data in deep.items():
        assert opened(tmp_path, data).tobytes() == wanted, kind


def test_wide_integers_that_fit_fewer_bits_are_scaled_by_these(tmp_path: Path) -> None:
    def grey(*values: int) -> list[int]:
        image = Image.new("I", (len(values), 1))
        for x, value in enumerate(values):
            image.putpixel((x, 0), value)
        return list(opened(tmp_path, encoded(image, "TIFF")).tobytes()[::3])

    assert grey(0, 256, 32768, 65535) == [0, 1, 128, 255]
    assert grey(0, 1, 128, 255) == [0, 1, 128, 255]  # already 8 bits
