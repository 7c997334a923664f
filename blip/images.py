"""An image file -> the tensor a model takes; every bad image gives one sentence here."""

import contextlib
import io
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import IO

from PIL import Image, ImageOps
from PIL.TiffImagePlugin import TILELENGTH, TILEWIDTH
from torch import Tensor

from blip.errors import ImageError
from blip.lavis import import_lavis

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")  # Pillow's JPEG decoder reads MPO too
MAX_PIXELS = 64_000_000
MAX_SIDE = 65_535  # as in JPEG; resizing needs 32 bytes for every pixel of a side
MAX_SCANS = 100  # as in libtiff; a hundred bytes of a progressive JPEG can be a scan over every pixel

_SEND = "send a JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF file."
_TOO_MANY = f"more than the {MAX_PIXELS // 10**6} million that are taken; send a smaller one."
_SCAN = re.compile(rb"\xff\xda\0[\x06\x08\x0a\x0c][\x01-\x04]")  # the header of one

# Pillow refuses twice its limit before anything is allocated, and warns from the limit on. Its warnings, those about
# damaged tags too, are off for the whole process, because requests run in threads.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2
warnings.filterwarnings("ignore", module=r"PIL\.")
Image.init()


def open_image(path: Path) -> Image.Image:
    """Open the image file at `path`: upright, RGB, and the first frame if there are several.

    Raises:
        ImageError: the file is empty, is not an image, is too large, or is damaged.
    """
    try:
        with open(path, "rb") as file:
            return _decode(file)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        pixels = re.search(r"\d+", str(error))  # width and height are not known
        message = f"image has {pixels[0] if pixels else 'too many'} pixels, {_TOO_MANY}"
    except Exception:  # on damaged data the decoders raise anything, KeyError and struct.error included
        message = "image could not be read: it is damaged or incomplete; send it again or save it anew."
    raise ImageError(message)  # outside of `except`, or it would keep the half decoded image alive


def _decode(file: IO[bytes]) -> Image.Image:
    head = file.read(16)
    if not head:
        raise ImageError(f"image is empty; {_SEND}")
    if not any(accept and accept(head) for _, accept in map(Image.OPEN.__getitem__, FORMATS)):
        raise ImageError(f"image is not a picture in a known format; {_SEND}")
    image = _open(file)
    width, height = image.size
    if max(width, height) > MAX_SIDE:
        raise ImageError(f"image has {width} x {height} pixels, more than {MAX_SIDE} a side; send a smaller one.")
    tags = getattr(image, "tag_v2", {})  # a TIFF; its tiles are decoded whole and may be larger than the picture
    width, height = tags.get(TILEWIDTH, 1), tags.get(TILELENGTH, 1)
    if width * height > MAX_PIXELS:
        raise ImageError(f"image has tiles of {width} x {height} pixels, {_TOO_MANY}")
    file.seek(0)
    if image.format in ("JPEG", "MPO") and (scans := len(_SCAN.findall(file.read()))) > MAX_SCANS:
        raise ImageError(f"image has {scans} scans, more than the {MAX_SCANS} that are taken; save it anew.")
    image.load()
    with contextlib.suppress(Exception):  # a damaged EXIF block does not spoil the picture
        ImageOps.exif_transpose(image, in_place=True)
    bright = image.getextrema()[1] if image.mode == "I" else 0
    if image.mode.startswith("I;16") or 255 < bright < 2**16:  # type: ignore[operator] # one band, one number
        # 16 bits; convert("RGB") would make everything above 255 white.
        image = image.convert("I").point(lambda value: value / 256).convert("L")
    return image if image.mode == "RGB" else image.convert("RGB")


def _open(file: IO[bytes]) -> Image.Image:
    try:
        return Image.open(file, formats=FORMATS)
    except Exception:  # some decoders fail on a damaged EXIF block; they skip one that has another name
        file.seek(0)
        return Image.open(io.BytesIO(file.read().replace(b"Exif", b"none")), formats=FORMATS)


def preprocessor(image_size: int) -> Callable[[Image.Image], Tensor]:
    """LAVIS's evaluation processor: RGB image -> (3, S, S) float32, bicubic resize without crop, normalised."""
    processor: Callable[[Image.Image], Tensor] = import_lavis().blip_processors.BlipImageEvalProcessor(
        image_size=image_size
    )
    return processor
