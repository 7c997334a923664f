"""Image files that are made to take memory or time."""

import json
import re
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable

import pytest
from PIL import Image

from benchmarks.harness import ROOT
from blip.pictures.limits import MAX_PIXELS
from tests.image_files import chunk, encoded, noise, png, segment, tiff, zeros
from tests.pictures.test_reading import FILES, ORDINARY, damaged_exif, quarters

Makers = dict[str, Callable[[], bytes]]  # of large files, which are made only when they are needed


def webp_canvas(width: int, height: int) -> bytes:
    """An extended WebP: a picture of 48 x 32 on a canvas of the size given."""
    size = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    body = b"WEBPVP8X" + struct.pack("<II", 10, 0) + size + encoded(noise(), "WEBP")[12:]
    return b"RIFF" + struct.pack("<I", len(body)) + body


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
    "avif beyond its decoder": lambda: resized(rb"ispe....", struct.pack(">II", 2**31, 2**31), ORDINARY["avif"]),
    "heif": lambda: resized(rb"ispe....", struct.pack(">II", 17000, 17000), (FILES / "quarters.heic").read_bytes()),
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
    "tiff rows": lambda: tiff({**GREY, 273: 8, 278: 0xFFFFFFFF, 279: len(zeros(977))}, zeros(977)),
    "png frames": lambda: png((1, 1), PIXEL, chunk(b"acTL", b"\x7f\xff\xff\xff" + bytes(4))),
}
REPEATED: Makers = {  # files of one part, over and over
    "exif segments": lambda: jpeg(segment(0xE1, b"Exif\0\0x") * 300_000),
    "comments": lambda: jpeg(segment(0xFE, b"") * 300_000),
    "restart markers": lambda: jpeg(b"\xff\xd0" * 2_000_000),
    "fill bytes": lambda: jpeg(b"\xff" * 8_000_000),
    "stray bytes": lambda: jpeg(bytes(8_000_000)),
    "stray zeros after ff": lambda: jpeg(b"\xff\0" * 2_000_000),
    "large comments": lambda: jpeg(segment(0xFE, bytes(65_000)) * 300),
    "gif comments": lambda: gif(b"!\xfe\1x\0" * 1_000_000),
    "gif comment": lambda: gif(b"!\xfe" + b"\1x" * 2_000_000 + b"\0"),
    "gif extensions": lambda: gif(b"!\xf9\4\0\0\0\0\0" * 1_000_000),
    "gif extensions of nothing": lambda: gif(b"!\xf9\0\0" * 1_000_000),
    "gif stray bytes": lambda: gif(bytes(8_000_000)),
    "png texts": lambda: png((1, 1), PIXEL, chunk(b"tEXt", b"a\0b") * 300_000),
    "png texts after the pixels": lambda: png((1, 1), PIXEL)[:-12] + chunk(b"tEXt", b"a\0b") * 300_000,
    "png profiles": lambda: png((1, 1), PIXEL, chunk(b"iCCP", b"a\0\0" + zeros(1)) * 20_000),
    "png private chunk": lambda: png((1, 1), PIXEL, chunk(b"abCd", bytes(20_000_000))),
    "png pixels in pieces": lambda: png((1, 1), PIXEL, chunk(b"IDAT", b"") * 400_000),
    "webp chunks": lambda: webp(b"abcd" + bytes(4), 4_000_000),
    "webp exif": lambda: webp(b"EXIF" + struct.pack("<I", 20_000_000) + bytes(20_000_000)),
    "webp frames": lambda: webp(b"ANMF" + struct.pack("<I", 16) + bytes(16), 400_000),
    "bigtiff tags": lambda: b"II+\0\x08\0\0\0\x10" + bytes(7) + struct.pack("<Q", 2_000_000) + bytes(8_000_000),
    "tiff profile": lambda: tiff({**GREY, 273: 8, 279: 8, 34675: (7, 20_000_000, 8)}, bytes(20_000_000)),
    "tiff strips": lambda: tiff({**GREY, 259: 1, 273: (4, 0xFFFFFFFF, 8), 278: 1, 279: (4, 0xFFFFFFFF, 8)}),
    "avif boxes": lambda: avif(b"\0\0\0\x08free" * 1_000_000),
    "avif items": lambda: avif(box(b"iinf", bytes(6) + box(b"infe", b"\2" + bytes(11)) * 300_000)),
    "avif of one large box": lambda: avif(box(b"uuid", bytes(20_000_000))),
}
ENDLESS: Makers = {  # of what comes after the first picture nothing is read
    "tiff of a page that follows itself": lambda: pages(1),
    "tiff of many pages": lambda: pages(300_000),
    "gif of 300,000 frames": lambda: ORDINARY["gif"][:-1] + b",\0\0\0\0\1\0\1\0\0\2\2\x44\1\0" * 300_000 + b";",
    "jpegs": lambda: ORDINARY["jpeg"] * 5_000,
}
WARNED_OF: Makers = {  # by Pillow
    "palette": lambda: ORDINARY["palette png with transparency in bytes"],
    "exif": lambda: encoded(quarters(), "JPEG", exif=damaged_exif()["text that is not there"]),
    "40 million pixels": lambda: png((8000, 5000), zeros(39)),
}


def jpeg(parts: bytes) -> bytes:
    """A JPEG with parts after its first segment."""
    return ORDINARY["jpeg"][:20] + parts + ORDINARY["jpeg"][20:]


def gif(parts: bytes) -> bytes:
    """A GIF with parts before its first frame."""
    at = 13 + 768
    assert ORDINARY["gif"][at] in b"!,"
    return ORDINARY["gif"][:at] + parts + ORDINARY["gif"][at:]


def webp(part: bytes, count: int = 1) -> bytes:
    """An extended WebP with a part before its picture."""
    body = webp_canvas(48, 32)[8:30] + part * count + encoded(noise(), "WEBP")[12:]
    return b"RIFF" + struct.pack("<I", len(body)) + body


def box(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data) + 8) + name + data


def avif(parts: bytes) -> bytes:
    """An AVIF with parts in its box of metadata."""
    data = ORDINARY["avif"]
    at = data.index(b"meta")
    (size,) = struct.unpack_from(">I", data, at - 4)
    return data[: at - 4] + struct.pack(">I", size + len(parts)) + data[at : at + 8] + parts + data[at + 8 :]


def pages(count: int) -> bytes:
    """A TIFF of so many pages, of which the last is followed by the first."""
    tags = {256: 1, 257: 1, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: 1}
    page = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    size = 2 + len(page) + 4
    starts = [10 + index * size for index in range(count)] + [10]
    return (
        b"II*\0"
        + struct.pack("<I", 10)
        + b"\x80\0"
        + b"".join(struct.pack("<H", len(tags)) + page + struct.pack("<I", after) for after in starts[1:])
    )


def scans(count: int) -> bytes:
    """A progressive JPEG of so many scans over 64 million pixels; each takes 100 bytes and 30 ms."""
    data = encoded(Image.new("L", (8000, 8000)), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * (count - data.count(b"\xff\xda")) + data[-2:]


@pytest.fixture(scope="module")
def bombs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, int]]:
    """The result of every bomb, and how many MiB the process grew for it; all in one process of its own."""
    folder = tmp_path_factory.mktemp("bombs")
    files = {**TOO_MANY, **UNWIELDY, **INFLATING, **SQUAT, **REPEATED, **ENDLESS, **WARNED_OF}
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
        "jpeg scans": "image has more than the 100 scans that are taken; save it anew.",
        "tiff tile": "image has tiles of 40000 x 25600 pixels, more than the 64 million that are taken; "
        "send a smaller one.",
    }
    assert max(bombs[kind][1] for kind in UNWIELDY) < 20


@pytest.mark.parametrize("kind", INFLATING)
def test_text_that_inflates_without_end_is_not_inflated(bombs: dict[str, tuple[str, int]], kind: str) -> None:
    assert bombs[kind][0] == "(1, 1)"
    assert bombs[kind][1] < 50


def test_large_claims_that_come_to_nothing_take_no_memory(bombs: dict[str, tuple[str, int]]) -> None:
    assert {kind: bombs[kind][0] for kind in SQUAT} == {"tiff rows": "(100, 100)", "png frames": "(1, 1)"}
    assert max(bombs[kind][1] for kind in SQUAT) < 50


@pytest.mark.parametrize("kind", REPEATED)
def test_files_that_are_mostly_no_picture_are_refused_before_they_are_read(
    bombs: dict[str, tuple[str, int]], kind: str
) -> None:
    sentence, grown = bombs[kind]
    much = r"has more than (1000|10000) blocks of metadata; save it anew without them"
    large = r"has more than 16 MB of metadata; save it anew without it"
    assert re.fullmatch(rf"image ({much}|{large}|is in more than 300000 pieces; save it anew)\.", sentence), sentence
    assert grown < 50  # of the file, which is read where it lies


@pytest.mark.parametrize("kind", ENDLESS)
def test_what_follows_the_first_picture_is_not_read(bombs: dict[str, tuple[str, int]], kind: str) -> None:
    sentence, grown = bombs[kind]
    assert sentence in ("(48, 32)", "(1, 1)")
    assert grown < 100


def test_files_about_which_pillow_warns_are_read_and_nothing_is_said(bombs: dict[str, tuple[str, int]]) -> None:
    results = [bombs[kind][0] for kind in WARNED_OF]
    assert results == ["(48, 32)", "(48, 32)", "(8000, 5000)"]
