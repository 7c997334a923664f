"""What becomes of good, odd, damaged and hostile image files."""

import io
import json
import os
import re
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageChops, ImageFile

from benchmarks.harness import ROOT
from blip.errors import ImageError
from blip.images import FORMATS, MAX_PIXELS, open_image, preprocessor
from tests.image_files import chunk, encoded, png

pytestmark = pytest.mark.filterwarnings("ignore:::PIL")  # as blip.images has it; pytest's own filters hide that

Makers = dict[str, Callable[[], bytes]]  # of large files, which are made only when they are needed
SEND = "send a JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF file."
UNKNOWN = f"image is not a picture in a known format; {SEND}"
EMPTY = f"image is empty; {SEND}"
DAMAGED = "image could not be read: it is damaged or incomplete; send it again or save it anew."
ORIENTATION, EXIF_IFD = 0x0112, 0x8769
QUARTERS = {(8, 8): "red", (40, 8): "lime", (8, 24): "blue", (40, 24): "white"}


def quarters() -> Image.Image:
    """48 x 32 pixels, every quarter in its own colour."""
    image = Image.new("RGB", (48, 32))
    for (x, y), color in QUARTERS.items():
        image.paste(color, (x - 8, y - 8, x + 16, y + 8))
    return image


def noise(mode: str = "RGB") -> Image.Image:
    bands = [Image.effect_noise((48, 32), 90) for _ in range(3)]
    return Image.merge("RGB", bands).convert(mode)


@cache
def zeros(mebibytes: int) -> bytes:
    """Many zeros, compressed without ever holding them."""
    packer = zlib.compressobj(9, strategy=zlib.Z_RLE)  # the fastest for runs
    block = bytes(1 << 20)
    return b"".join(packer.compress(block) for _ in range(mebibytes)) + packer.flush()


def tiff(tags: dict[int, int | tuple[int, int, int]], data: bytes = b"") -> bytes:
    """A TIFF of `data` at byte 8 and of tags: a LONG, or (type, count, value)."""
    entries = [(tag, *(value if isinstance(value, tuple) else (4, 1, value))) for tag, value in sorted(tags.items())]
    directory = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(entries)) + directory + bytes(4)


def webp_canvas(width: int, height: int) -> bytes:
    """An extended WebP: a picture of 48 x 32 on a canvas of the size given."""
    size = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    body = b"WEBPVP8X" + struct.pack("<II", 10, 0) + size + encoded(noise(), "WEBP")[12:]
    return b"RIFF" + struct.pack("<I", len(body)) + body


def opened(tmp_path: Path, data: bytes, name: str = "image.jpg") -> Image.Image:
    path = tmp_path / name
    path.write_bytes(data)
    return open_image(path)


def refusal(tmp_path: Path, data: bytes) -> str:
    with pytest.raises(ImageError) as caught:
        opened(tmp_path, data)
    return str(caught.value)


def published(data: bytes) -> Image.Image:
    """What the published predictor makes of a file."""
    return Image.open(io.BytesIO(data)).convert("RGB")


def corners(image: Image.Image) -> dict[tuple[int, int], str]:
    """The name of the nearest colour in every quarter."""
    names = {name: Image.new("RGB", (1, 1), name).getpixel((0, 0)) for name in QUARTERS.values()}

    def nearest(place: tuple[int, int]) -> str:
        pixel: Any = image.getpixel(place)
        return min(names, key=lambda name: sum(abs(a - b) for a, b in zip(pixel, names[name], strict=True)))  # type: ignore[arg-type]

    return {place: nearest(place) for place in QUARTERS}


def test_every_format_has_a_decoder_and_truncated_files_are_errors() -> None:
    Image.init()
    preprocessor(384)  # parts of LAVIS set this flag for the whole process
    assert set(FORMATS) <= set(Image.OPEN)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


ORDINARY = {
    "jpeg": encoded(noise(), "JPEG"),
    "progressive jpeg": encoded(noise(), "JPEG", progressive=True),
    "grey jpeg": encoded(noise("L"), "JPEG"),
    "cmyk jpeg": encoded(noise("CMYK"), "JPEG"),
    "mpo": encoded(noise(), "MPO", save_all=True, append_images=[noise()]),
    "png": encoded(noise(), "PNG"),
    "grey png": encoded(noise("L"), "PNG"),
    "black and white png": encoded(noise("1"), "PNG"),
    "png with alpha": encoded(noise("RGBA"), "PNG"),
    "grey png with alpha": encoded(noise("LA"), "PNG"),
    "palette png": encoded(noise("P"), "PNG"),
    "palette png with one transparent colour": encoded(noise("P"), "PNG", transparency=3),
    "palette png with transparency in bytes": encoded(noise("P"), "PNG", transparency=bytes(range(255, -1, -1))),
    "png with a transparent colour": encoded(noise(), "PNG", transparency=(1, 2, 3)),
    "webp": encoded(noise(), "WEBP"),
    "webp with alpha": encoded(noise("RGBA"), "WEBP", lossless=True),
    "gif": encoded(noise("P"), "GIF"),
    "gif with a transparent colour": encoded(noise("P"), "GIF", transparency=3),
    "bmp": encoded(noise(), "BMP"),
    "palette bmp": encoded(noise("P"), "BMP"),
    "tiff": encoded(noise(), "TIFF"),
    "lzw tiff": encoded(noise(), "TIFF", compression="tiff_lzw"),
    "deflate tiff": encoded(noise("RGBA"), "TIFF", compression="tiff_adobe_deflate"),
    "packbits tiff": encoded(noise("P"), "TIFF", compression="packbits"),
    "cmyk tiff": encoded(noise("CMYK"), "TIFF"),
    "float tiff": encoded(noise("L").convert("F"), "TIFF"),
    "32-bit tiff": encoded(noise("L").convert("I"), "TIFF"),
    "avif": encoded(noise(), "AVIF"),
    "avif with alpha": encoded(noise("RGBA"), "AVIF"),
}


@pytest.mark.parametrize("kind", ORDINARY)
def test_an_ordinary_picture_is_what_the_published_predictor_reads(tmp_path: Path, kind: str) -> None:
    image = opened(tmp_path, ORDINARY[kind])
    assert (image.mode, image.size) == ("RGB", (48, 32))
    assert image.tobytes() == published(ORDINARY[kind]).tobytes()


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF", "AVIF", "MPO"])
def test_of_an_animation_the_first_frame_is_taken(tmp_path: Path, form: str) -> None:
    others = [Image.new("RGB", (48, 32), color) for color in ("black", "gray")]
    image = opened(tmp_path, encoded(quarters(), form, save_all=True, append_images=others))
    assert corners(image) == QUARTERS


def test_frames_after_the_first_are_not_decoded(tmp_path: Path) -> None:
    whole = encoded(noise("P"), "GIF", save_all=True, append_images=[noise("P"), noise("P")])
    first = encoded(noise("P"), "GIF")
    assert opened(tmp_path, whole[: len(first) + 200]).size == (48, 32)  # cut off within the second


STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", STORED)
def test_a_picture_is_turned_upright_as_its_exif_block_says(tmp_path: Path, form: str, orientation: int) -> None:
    turn, exif = STORED[orientation], Image.Exif()
    exif[ORIENTATION] = orientation
    stored = quarters() if turn is None else quarters().transpose(turn)
    image = opened(tmp_path, encoded(stored, form, exif=exif.tobytes(), quality=95))
    assert image.size == (48, 32)
    assert corners(image) == QUARTERS


def damaged_exif() -> dict[str, bytes]:
    head, entry = b"Exif\0\0MM\0*\0\0\0\x08", struct.Struct(">HHII").pack
    beyond = entry(0x010F, 2, 4000, 60000) + entry(ORIENTATION, 3, 1, 1 << 16)
    return {
        "no tiff": b"Exif\0\0hello, world",
        "cut off": b"Exif\0\0MM\0*",
        "offset beyond the end": b"Exif\0\0MM\0*\xff\xff\xff\xff",
        "more tags than there are": head + b"\xff\xff" + entry(ORIENTATION, 3, 1, 99 << 16),
        "text that is not there": head + b"\0\2" + beyond + bytes(4),
        "orientation as a fraction": head + b"\0\1" + entry(ORIENTATION, 5, 1, 0) + bytes(4),
        # Pillow's JPEG decoder fails on it with IndexError
        "resolution as empty text": head + b"\0\2" + entry(0x011A, 2, 1, 0) + entry(0x0128, 3, 1, 2 << 16) + bytes(4),
    }


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("kind", damaged_exif())
def test_a_damaged_exif_block_does_not_spoil_the_picture(tmp_path: Path, form: str, kind: str) -> None:
    image = opened(tmp_path, encoded(quarters(), form, exif=damaged_exif()[kind]))
    assert corners(image) == QUARTERS


def test_a_damaged_exif_block_does_not_spoil_an_avif_or_a_tiff(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010F] = "the maker of it"
    exif.get_ifd(EXIF_IFD)[0x9003] = "2020:01:01 00:00:00"
    avif = encoded(quarters(), "AVIF", exif=exif.tobytes()).replace(b"MM\0*\0\0\0\x08", b"MM\0*\xff\xff\xff\xff")
    assert corners(opened(tmp_path, avif.replace(b"II*\0\x08", b"XX*\0\x08"))) == QUARTERS
    whole = encoded(quarters(), "TIFF", exif=exif.tobytes())
    spoilt = whole.replace(b"2020:01:01", b"\xff" * 10).replace(struct.pack("<HHI", 0x9003, 2, 20), b"\xff" * 8)
    assert spoilt != whole
    assert corners(opened(tmp_path, spoilt)) == QUARTERS


def ramp(order: str) -> bytes:
    """256 x 1 pixels of 16 bits from 0 to 65535."""
    return struct.pack(f"{order}256H", *range(0, 65536, 257))


def grey_tiff(order: str, sample_format: int = 1) -> bytes:
    image = Image.frombytes("I;16" if order == "<" else "I;16B", (256, 1), ramp(order))
    data = encoded(image, "TIFF", tiffinfo={339: sample_format})
    assert Image.open(io.BytesIO(data)).mode == {1: "I;16" if order == "<" else "I;16B", 2: "I"}[sample_format]
    return data


def test_16_bit_grey_is_scaled_and_not_clipped_to_white(tmp_path: Path) -> None:
    deep = {
        "png": png((256, 1), zlib.compress(b"\0" + ramp(">")), bits=16),
        "png with a transparent colour": png(
            (256, 1), zlib.compress(b"\0" + ramp(">")), chunk(b"tRNS", b"\0\1"), bits=16
        ),
        "tiff": grey_tiff("<"),
        "big-endian tiff": grey_tiff(">"),
        "deflate tiff": encoded(Image.frombytes("I;16", (256, 1), ramp("<")), "TIFF", compression="tiff_deflate"),
    }
    wanted = Image.frombytes("L", (256, 1), bytes(range(256))).convert("RGB").tobytes()
    for kind, data in deep.items():
        assert opened(tmp_path, data).tobytes() == wanted, kind


def test_a_tiff_of_wide_integers_is_scaled_where_they_fit_16_bits(tmp_path: Path) -> None:
    def grey(*values: int) -> list[int]:
        image = Image.new("I", (len(values), 1))
        for x, value in enumerate(values):
            image.putpixel((x, 0), value)
        return list(opened(tmp_path, encoded(image, "TIFF")).tobytes()[::3])

    assert grey(0, 256, 32768, 65535) == [0, 1, 128, 255]
    assert grey(0, 1, 128, 255) == [0, 1, 128, 255]  # already 8 bits


def test_an_empty_file_is_said_to_be_empty(tmp_path: Path) -> None:
    assert refusal(tmp_path, b"") == EMPTY


SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect width="9" height="9"/></svg>'
OTHER = {
    "text": b"hello",
    "html": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "svg": b'<?xml version="1.0"?>' + SVG,
    "pdf": encoded(noise(), "PDF"),
    "eps": encoded(noise(), "EPS"),
    "psd": b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 1, 1, 8, 3) + bytes(40),
    "ico": encoded(noise(), "ICO"),
    "tga": encoded(noise(), "TGA"),
    "ppm": encoded(noise(), "PPM"),
    "jpeg 2000": encoded(noise(), "JPEG2000"),
    "heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99),
    "zeros": bytes(4096),
    "zip": b"PK\3\4" + bytes(99),
}


@pytest.mark.parametrize("kind", OTHER)
def test_what_is_no_picture_is_refused_whatever_it_is_called(tmp_path: Path, kind: str) -> None:
    assert refusal(tmp_path, OTHER[kind]) == UNKNOWN


@pytest.mark.parametrize("kind", ["jpeg", "progressive jpeg", "png", "webp", "gif", "bmp", "tiff", "lzw tiff", "avif"])
@pytest.mark.parametrize("part", [0.05, 0.2, 0.5, 0.9])
def test_a_cut_off_picture_is_damaged(tmp_path: Path, kind: str, part: float) -> None:
    data = ORDINARY[kind]
    assert refusal(tmp_path, data[: max(20, int(part * len(data)))]) == DAMAGED


DAMAGES = {
    "jpeg without a picture": b"\xff\xd8\xff\xe0" + bytes(99),
    "jpeg header with nothing after it": ORDINARY["jpeg"][:200] + b"\0" * 400,
    "png with a false checksum": ORDINARY["png"].replace(b"\x08\x02\x00\x00\x00", b"\x08\x02\x00\x00\x00\xff", 1),
    "png without pixels": b"\x89PNG\r\n\x1a\n" + chunk(b"IEND", b""),
    "png of junk": png((48, 32), b"no deflate stream"),
    "png of no width": png((0, 32), zlib.compress(bytes(9))),
    "png of an unknown colour type": png((8, 8), zlib.compress(bytes(99)), color=9),
    "png with too few pixels": png((48, 32), zlib.compress(bytes(100))),
    "webp of junk": b"RIFF" + struct.pack("<I", 99) + b"WEBPVP8 " + bytes(99),
    "gif without frames": b"GIF89a" + struct.pack("<HHBBB", 9, 9, 0, 0, 0) + b";",
    "bmp that is text": b"BMW makes cars and motorcycles.",
    "bmp of no depth": ORDINARY["bmp"][:28] + b"\x63\0" + ORDINARY["bmp"][30:],
    "tiff of no tags": tiff({}),
    "tiff that points at itself": b"II*\0\0\0\0\0",
    "tiff with an unknown compression": tiff({256: 9, 257: 9, 258: 8, 259: 60000, 262: 1, 273: 8, 279: 81}, bytes(81)),
    "tiff with strips far away": tiff({256: 9, 257: 9, 258: 8, 259: 1, 262: 1, 273: 0xFFFFFF00, 279: 81}),
    "tiff with 4 billion strips": tiff(
        {256: 9, 257: 9, 258: 8, 259: 1, 262: 1, 273: (4, 0xFFFFFFFF, 8), 278: 1, 279: (4, 0xFFFFFFFF, 8)}
    ),
    "tiff with 4 billion samples": tiff({256: 9, 257: 9, 258: 8, 259: 1, 262: 2, 273: 8, 277: 0xFFFFFFFF}),
    "tiff with text for a width": tiff({256: (2, 4, 0x414141), 257: 9, 258: 8, 259: 1, 262: 1, 273: 8}),
    "tiff of tiles without width": tiff({256: 9, 257: 9, 258: 8, 259: 1, 262: 1, 322: 0, 323: 0, 324: 8}),
    "tiff with text for a tile": tiff({256: 9, 257: 9, 258: 8, 259: 8, 262: 1, 322: (2, 4, 0x414141), 323: 9, 324: 8}),
    "avif of junk": b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf" + bytes(99),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_data_ends_in_one_sentence_without_the_words_of_a_decoder(tmp_path: Path, kind: str) -> None:
    assert refusal(tmp_path, DAMAGES[kind]) == DAMAGED


def test_a_refused_file_is_closed_and_its_pixels_are_let_go(tmp_path: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    errors = []
    for data in [*DAMAGES.values(), ORDINARY["lzw tiff"][:900], ORDINARY["gif"][:900], b"", *ORDINARY.values()]:
        try:
            opened(tmp_path, data)
        except ImageError as error:
            errors.append(error)
    assert set(os.listdir("/proc/self/fd")) <= before
    assert all(error.__context__ is None for error in errors)


def test_no_other_decoder_is_tried_on_a_file_that_begins_like_a_known_one(tmp_path: Path) -> None:
    plain = Image.new("L", (48, 32), "white")  # noise may hold what Pillow takes for a frame of a GIF
    header, pixels = encoded(plain, "IM").split(b"\x1a", 1)
    disguised = b"GIF89a: \r\n" + header[:-10] + b"\x1a" + pixels
    assert Image.open(io.BytesIO(disguised)).format == "IM"
    assert refusal(tmp_path, disguised) == DAMAGED


def test_threads_read_pictures_side_by_side(tmp_path: Path) -> None:
    names = [*ORDINARY] * 20

    def read(index: int) -> bytes:
        return opened(tmp_path, ORDINARY[names[index]], str(index)).tobytes()

    with ThreadPoolExecutor(8) as pool:
        pictures = list(pool.map(read, range(len(names))))
    assert pictures == [published(ORDINARY[name]).tobytes() for name in names]


@pytest.mark.parametrize("size", [(1, 1), (20000, 1), (1, 20000), (65535, 1)])
def test_the_smallest_and_the_thinnest_pictures_can_be_prepared(tmp_path: Path, size: tuple[int, int]) -> None:
    image = opened(tmp_path, encoded(Image.new("RGB", size, "red"), "PNG"))
    assert image.size == size
    pixels = preprocessor(384)(image)
    assert (tuple(pixels.shape), pixels.dtype) == ((3, 384, 384), torch.float32)
    assert bool(torch.isfinite(pixels).all())


def test_a_picture_of_just_the_most_pixels_is_read(tmp_path: Path) -> None:
    assert opened(tmp_path, encoded(Image.new("1", (8000, 8000)), "PNG")).size == (8000, 8000)


def gif_frame(side: int) -> bytes:
    """A GIF of one pixel with a frame that claims to be larger and is to be wiped to the background."""
    screen, control = struct.pack("<HHBBB", 1, 1, 0, 0, 0), b"!\xf9\x04\x08" + bytes(4)
    return b"GIF89a" + screen + control + b"," + struct.pack("<HHHHBB", 0, 0, side, side, 0, 8)


def resized(before: bytes, size: bytes, data: bytes) -> bytes:
    """`data` with another size where it stands, after `before`."""
    found = re.search(before, data, re.DOTALL)
    assert found
    return data[: found.end()] + size + data[found.end() + len(size) :]


GREY = {256: 100, 257: 100, 258: 8, 259: 8, 262: 1, 277: 1}  # deflated
PIXEL = zlib.compress(bytes(2))
TOO_MANY: Makers = {
    "png header": lambda: png((60000, 60000), zlib.compress(b"")),
    "png": lambda: png((60000, 60000), zeros(430), bits=1),
    "png just too large": lambda: png((8001, 8000), zlib.compress(b"")),
    "jpeg": lambda: resized(rb"\xff\xc0..\x08", b"\xff\xdc\xff\xdc", ORDINARY["jpeg"]),
    "gif screen": lambda: ORDINARY["gif"][:6] + b"\xff\xff\xff\xff" + ORDINARY["gif"][10:],
    "gif frame": lambda: gif_frame(60000),
    "webp canvas": lambda: webp_canvas(16000, 16000),
    "webp canvas just too large": lambda: webp_canvas(8001, 8000),
    "bmp": lambda: ORDINARY["bmp"][:18] + struct.pack("<ii", 60000, 60000) + ORDINARY["bmp"][26:],
    "tiff": lambda: tiff({**GREY, 256: 60000, 257: 60000, 273: 8, 279: 99}, bytes(99)),
    "avif": lambda: resized(rb"ispe....", struct.pack(">II", 16000, 16000), ORDINARY["avif"]),
}
UNWIELDY: Makers = {  # little to hold, much to resize, to unpack or to decode
    "long png": lambda: png((64_000_000, 1), zeros(62)),
    "tall png": lambda: png((1, 64_000_000), zeros(123)),
    "jpeg scans": lambda: scans(20_000),
    "tiff tile": lambda: tiff({**GREY, 322: 40000, 323: 25600, 324: 8, 325: len(zeros(977))}, zeros(977)),
}
INFLATING: Makers = {
    "zTXt": lambda: png((1, 1), PIXEL, chunk(b"zTXt", b"a\0\0" + zeros(1024))),
    "iTXt": lambda: png((1, 1), PIXEL, chunk(b"iTXt", b"a\0\1\0\0\0" + zeros(1024))),
    "iCCP": lambda: png((1, 1), PIXEL, chunk(b"iCCP", b"a\0\0" + zeros(1024))),
    "200 texts": lambda: png((1, 1), PIXEL, *[chunk(b"zTXt", b"a\0\0" + zeros(1))] * 200),
}
SQUAT: Makers = {  # large claims that come to nothing
    "tiff strips": lambda: DAMAGES["tiff with 4 billion strips"],
    "tiff rows": lambda: tiff({**GREY, 273: 8, 278: 0xFFFFFFFF, 279: len(zeros(977))}, zeros(977)),
    "png frames": lambda: png((1, 1), PIXEL, chunk(b"acTL", b"\x7f\xff\xff\xff" + bytes(4))),
}
WARNED_OF: Makers = {  # by Pillow
    "palette": lambda: ORDINARY["palette png with transparency in bytes"],
    "exif": lambda: encoded(quarters(), "JPEG", exif=damaged_exif()["text that is not there"]),
    "40 million pixels": lambda: png((8000, 5000), zeros(39)),
}


def scans(count: int) -> bytes:
    """A progressive JPEG of so many scans over 64 million pixels; each takes 100 bytes and 30 ms."""
    data = encoded(Image.new("L", (8000, 8000)), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * (count - data.count(b"\xff\xda")) + data[-2:]


@pytest.fixture(scope="module")
def bombs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, int]]:
    """The result of every bomb, and how many MiB the process grew for it; all in one process of its own."""
    folder = tmp_path_factory.mktemp("bombs")
    files = {**TOO_MANY, **UNWIELDY, **INFLATING, **SQUAT, **WARNED_OF}
    for name, make in files.items():
        (folder / name).write_bytes(make())
    command = [sys.executable, "-m", "tests.programs.open_images", *(str(folder / name) for name in files)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, "")  # and so without a warning
    return {name: (result, grown) for name, result, grown in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("kind", TOO_MANY)
def test_too_many_pixels_are_refused_before_any_is_decoded(bombs: dict[str, tuple[str, int]], kind: str) -> None:
    sentence, grown = bombs[kind]
    said = re.fullmatch(
        r"image has (\d+) pixels, more than the 64 million that are taken; send a smaller one\.", sentence
    )
    assert said, sentence
    assert int(said[1]) > MAX_PIXELS
    assert grown < 20


def test_sides_tiles_and_scans_that_take_gigabytes_or_minutes_are_refused(
    bombs: dict[str, tuple[str, int]],
) -> None:
    said = {kind: bombs[kind][0] for kind in UNWIELDY}
    assert said == {
        "long png": "image has 64000000 x 1 pixels, more than 65535 a side; send a smaller one.",
        "tall png": "image has 1 x 64000000 pixels, more than 65535 a side; send a smaller one.",
        "jpeg scans": "image has 20000 scans, more than the 100 that are taken; save it anew.",
        "tiff tile": "image has tiles of 40000 x 25600 pixels, more than the 64 million that are taken; "
        "send a smaller one.",
    }
    assert max(bombs[kind][1] for kind in UNWIELDY) < 20


@pytest.mark.parametrize("kind", INFLATING)
def test_text_that_inflates_without_end_is_not_inflated(bombs: dict[str, tuple[str, int]], kind: str) -> None:
    assert bombs[kind][0] == DAMAGED
    assert bombs[kind][1] < 150


def test_large_claims_that_come_to_nothing_take_no_memory(bombs: dict[str, tuple[str, int]]) -> None:
    assert {kind: bombs[kind][0] for kind in SQUAT} == {
        "tiff strips": DAMAGED,
        "tiff rows": "(100, 100)",
        "png frames": "(1, 1)",
    }
    assert max(bombs[kind][1] for kind in SQUAT) < 50


def test_files_about_which_pillow_warns_are_read_and_nothing_is_said(bombs: dict[str, tuple[str, int]]) -> None:
    results = [bombs[kind][0] for kind in WARNED_OF]
    assert results == ["(48, 32)", "(48, 32)", "(8000, 5000)"]


def test_an_rgb_picture_is_not_copied(tmp_path: Path) -> None:
    image = opened(tmp_path, ORDINARY["png"])
    assert isinstance(image, ImageFile.ImageFile)
    assert ImageChops.difference(image, published(ORDINARY["png"])).getbbox() is None
