"""What becomes of good, odd and damaged image files."""

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops, ImageFile

from blip.engine.encoders import normalise
from blip.errors import ImageError
from blip.lavis import import_lavis, pixel_values
from blip.pictures.reading import FORMATS, open_image
from tests.image_files import chunk, encoded, noise, png, segment, tiff

pytestmark = pytest.mark.filterwarnings("ignore:::PIL")  # as blip.pictures has it; pytest's own filters hide that

FILES = Path(__file__).parent / "files"  # of pillow-heif's encoder
SEND = "send a JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF or HEIC file."
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


def opened(tmp_path: Path, data: bytes, name: str = "image.jpg") -> Image.Image:
    path = tmp_path / name
    path.write_bytes(data)
    return open_image(path)


def refusal(tmp_path: Path, data: bytes) -> str:
    with pytest.raises(ImageError) as caught:
        opened(tmp_path, data)
    return str(caught.value)


def published(data: bytes) -> Image.Image:
    """What the published predictor makes of a file, with the setting of Pillow that LAVIS makes."""
    assert ImageFile.LOAD_TRUNCATED_IMAGES
    return Image.open(io.BytesIO(data)).convert("RGB")


def corners(image: Image.Image) -> dict[tuple[int, int], str]:
    """The name of the nearest colour in every quarter."""
    names = {name: Image.new("RGB", (1, 1), name).getpixel((0, 0)) for name in QUARTERS.values()}

    def nearest(place: tuple[int, int]) -> str:
        pixel: Any = image.getpixel(place)
        return min(names, key=lambda name: sum(abs(a - b) for a, b in zip(pixel, names[name], strict=True)))  # type: ignore[arg-type]

    return {place: nearest(place) for place in QUARTERS}


def test_every_format_has_a_reader() -> None:
    assert {*FORMATS, "AVIF"} <= set(Image.OPEN)


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
    "film": b"\0\0\0\x18ftypisom\0\0\0\0mp41avc1" + bytes(99),
    "zeros": bytes(4096),
    "zip": b"PK\3\4" + bytes(99),
}


@pytest.mark.parametrize("kind", OTHER)
def test_what_is_no_picture_is_refused_whatever_it_is_called(tmp_path: Path, kind: str) -> None:
    assert refusal(tmp_path, OTHER[kind]) == UNKNOWN


CUT = ["jpeg", "progressive jpeg", "cmyk jpeg", "png", "webp", "gif", "bmp", "palette bmp", "tiff", "lzw tiff", "avif"]


@pytest.mark.parametrize("kind", CUT)
@pytest.mark.parametrize("lost", [1, 4, 16, 0.1, 0.5, 0.8, 0.95])
def test_a_cut_off_picture_is_what_the_published_predictor_reads(tmp_path: Path, kind: str, lost: float) -> None:
    data = ORDINARY[kind]
    data = data[: max(20, len(data) - int(lost if lost >= 1 else lost * len(data)))]
    try:
        wanted = published(data)
    except Exception:
        assert refusal(tmp_path, data) == DAMAGED
        return
    if all(low == high for low, high in wanted.getextrema()):  # type: ignore[misc]
        assert refusal(tmp_path, data) == DAMAGED  # nothing can be seen
    else:
        assert opened(tmp_path, data).tobytes() == wanted.tobytes()


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_a_picture_of_one_colour_that_lacks_its_end_is_read(tmp_path: Path, form: str) -> None:
    plain = encoded(Image.new("RGB", (48, 32), "red"), form)
    assert opened(tmp_path, plain[:-2]).tobytes() == published(plain).tobytes()


@pytest.mark.parametrize("name", [b"tEXt", b"iTXt", b"zTXt", b"tIME", b"gAMA", b"abCd"])
def test_a_wrong_checksum_of_a_chunk_that_is_not_needed_does_not_matter(tmp_path: Path, name: bytes) -> None:
    plain = ORDINARY["png"]
    for at in (33, len(plain) - 12):  # before the pixels, and after them
        spoilt = chunk(name, b"Comment\0\0\0\0\0")[:-4] + b"\0\0\0\1"
        assert opened(tmp_path, plain[:at] + spoilt + plain[at:]).tobytes() == published(plain).tobytes()


def test_of_several_pictures_in_a_file_the_first_is_taken(tmp_path: Path) -> None:
    first = encoded(quarters(), "JPEG", quality=95)
    others = encoded(noise(), "JPEG", progressive=True) * 150
    assert corners(opened(tmp_path, first + others)) == QUARTERS


def xmp(orientation: int) -> bytes:
    return f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><r tiff:Orientation="{orientation}"/></x:xmpmeta>'.encode()


def test_an_orientation_in_xmp_turns_nothing(tmp_path: Path) -> None:
    jpeg, plain = encoded(quarters(), "JPEG", quality=95), encoded(quarters(), "PNG")
    text = chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp(6))
    files = {
        "jpeg": jpeg[:2] + segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp(6)) + jpeg[2:],
        "png": plain[:33] + text + plain[33:],
        "png, at its end": plain[:-12] + text + plain[-12:],
        "webp": encoded(quarters(), "WEBP", xmp=xmp(6), quality=95),
        "avif": encoded(quarters(), "AVIF", xmp=xmp(6), quality=95),
        "tiff": encoded(quarters(), "TIFF", tiffinfo={700: xmp(6)}),
    }
    for kind, data in files.items():
        assert b"Orientation" in data, kind
        assert corners(opened(tmp_path, data)) == QUARTERS, kind


@pytest.mark.parametrize("brand", ["heic", "heix", "hevc", "heim", "mif1", "mif2", "msf1"])
@pytest.mark.parametrize("name", ["quarters", "turned"])
def test_heif_of_any_brand_is_read_and_turned_once(tmp_path: Path, brand: str, name: str) -> None:
    data = (FILES / f"{name}.heic").read_bytes()
    assert data[4:8] == b"ftyp"
    image = opened(tmp_path, data[:8] + brand.encode() + data[12:])
    assert image.size == (96, 64)
    assert corners(image.resize((48, 32))) == QUARTERS


def test_a_cut_off_heif_is_damaged(tmp_path: Path) -> None:
    data = (FILES / "quarters.heic").read_bytes()
    for part in (0.1, 0.5, 0.7):
        assert refusal(tmp_path, data[: int(part * len(data))]) == DAMAGED


@pytest.mark.parametrize("side", [384, 480])
@pytest.mark.parametrize("kind", ["jpeg", "png with alpha", "grey png", "gif"])
def test_the_pixels_are_what_lavis_makes_of_the_published_picture(tmp_path: Path, kind: str, side: int) -> None:
    wanted = import_lavis().blip_processors.BlipImageEvalProcessor(image_size=side)(published(ORDINARY[kind]))
    resized = opened(tmp_path, ORDINARY[kind]).resize((side, side), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(resized))[None]
    assert normalise(pixel_values({}), pixels)[0].equal(wanted)


DAMAGES = {
    "jpeg without a picture": b"\xff\xd8\xff\xe0" + bytes(99),
    "jpeg header with nothing after it": ORDINARY["jpeg"][:200] + b"\0" * 400,
    "png with a false checksum": ORDINARY["png"].replace(b"IHDR\0\0\0", b"IHDR\0\0\1", 1),
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


@pytest.mark.parametrize("size", [(1, 1), (20000, 1), (1, 20000), (65535, 1)])
def test_the_smallest_and_the_thinnest_pictures_can_be_prepared(tmp_path: Path, size: tuple[int, int]) -> None:
    image = opened(tmp_path, encoded(Image.new("RGB", size, "red"), "PNG"))
    assert image.size == size
    assert image.resize((384, 384), Image.Resampling.BICUBIC).getextrema() == ((255, 255), (0, 0), (0, 0))


def test_a_picture_of_just_the_most_pixels_is_read(tmp_path: Path) -> None:
    assert opened(tmp_path, encoded(Image.new("1", (8000, 8000)), "PNG")).size == (8000, 8000)


def test_an_rgb_picture_is_not_copied(tmp_path: Path) -> None:
    image = opened(tmp_path, ORDINARY["png"])
    assert isinstance(image, ImageFile.ImageFile)
    assert ImageChops.difference(image, published(ORDINARY["png"])).getbbox() is None
