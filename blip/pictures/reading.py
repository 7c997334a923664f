"""An image file becomes an RGB picture; every bad image gives one sentence here."""

import io
import os
import re
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import IO, Any

from PIL import AvifImagePlugin, Image, ImageFile, PngImagePlugin

from blip.errors import ImageError
from blip.pictures import blocks, grey, tiff
from blip.pictures.limits import MAX_PIXELS, MAX_SIDE, MAX_TEXT, needed_memory, too_many

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # Pillow's JPEG decoder reads MPO too; and AVIF and HEIF
_AVIF = {b"avif", b"avis"}
_HEIF = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"mif2", b"msf1"}
_SEND = "send a JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF or HEIC file."
_ORIENTATION = 0x0112  # EXIF's tag
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# These are Pillow's settings for a whole process: what runs this module does nothing else.
# Pillow refuses twice its limit before anything is allocated, and warns from the limit on.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2
ImageFile.LOAD_TRUNCATED_IMAGES = True  # as LAVIS sets it
PngImagePlugin.MAX_TEXT_CHUNK = MAX_TEXT
AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # there is a process for each core
warnings.filterwarnings("ignore", module=r"PIL\.")
Image.init()


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture as RGB, as LAVIS makes it: without what it says of transparency."""
    return image if image.mode == "RGB" else image.convert("RGB")


def open_image(
    path: Path, admit: Callable[[int], None] = lambda _: None, rgb: Callable[[Image.Image], Image.Image] = to_rgb
) -> Image.Image:
    """Open the image file at `path`: upright, RGB, and the first frame if there are several.

    `admit` is called with the MiB of memory that decoding may need, before it begins. `rgb` makes of a picture in any
    mode of Pillow's one in RGB.

    Raises:
        ImageError: the file is empty, is not an image, is too large, or is damaged.
    """
    try:
        with open(path, "rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise ImageError(f"image is empty; {_SEND}")
            with mmap(file.fileno(), 0, access=ACCESS_READ) as data:
                return _decode(file, data, admit, rgb)
    except (ImageError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        pixels = re.search(r"\d+", str(error))  # width and height are not known
        refused = too_many(pixels[0] if pixels else "too many")
    except Exception:  # on damaged data the decoders raise anything, KeyError and struct.error included
        refused = ImageError("image could not be read: it is damaged or incomplete; send it again or save it anew.")
    raise refused  # outside of `except`, or it would keep the half decoded image alive


def _decode(
    file: IO[bytes], data: mmap, admit: Callable[[int], None], rgb: Callable[[Image.Image], Image.Image]
) -> Image.Image:
    form = _form(data)
    if form is None:
        raise ImageError(f"image is not a picture in a known format; {_SEND}")
    blocks.check(form, data)
    if form == "HEIF":
        _learn_heif()
    deep, source = _tiff(file, data) if form == "TIFF" else (None, file)
    image = _open(form, source)
    width, height = deep.width if deep and deep.width else image.width, image.height
    if width * height > MAX_PIXELS:
        raise too_many(width * height)
    if max(width, height) > MAX_SIDE:
        raise ImageError(f"image has {width} x {height} pixels, more than {MAX_SIDE} a side; send a smaller one.")
    admit(needed_memory(form, width * height))
    image = _load(form, image, source)
    if image.mode.startswith("I;16") and not deep:  # a PNG; convert("RGB") would make everything above 255 white
        deep = grey.Grey(16)
    turn = _turn(image)
    if deep:
        turn = _TURNS.get(deep.orientation, turn)
        image = grey.to_8_bits(image, deep)
    image = image if turn is None else image.transpose(turn)
    return rgb(image)


def _form(data: mmap) -> str | None:
    """What the file begins like, or None."""
    if data[4:8] == b"ftyp":
        end = min(struct.unpack_from(">I", data)[0], 1024)
        brands = {data[8:12], *(data[at : at + 4] for at in range(16, end, 4))}
        return "AVIF" if brands & _AVIF else "HEIF" if brands & _HEIF else None
    head = data[:16]
    return next((form for form in FORMATS if (accept := Image.OPEN[form][1]) and accept(head)), None)


def _learn_heif() -> None:
    """Load the reader of HEIF, when the first such file comes."""
    import pi_heif

    if "HEIF" not in Image.OPEN:
        pi_heif.register_heif_opener(decode_threads=1, thumbnails=False, depth_images=False, aux_images=False)


def _tiff(file: IO[bytes], data: mmap) -> tuple[grey.Grey | None, IO[bytes]]:
    """How a TIFF's numbers are meant, where Pillow does not know, and what to read it from.

    Raises:
        ImageError: its tiles, which are decoded whole and may be larger than the picture, have too many pixels.
    """
    tags = tiff.numbers(data)
    width, height = tags.get(tiff.TILE_WIDTH) or 1, tags.get(tiff.TILE_HEIGHT) or 1
    if width * height > MAX_PIXELS:
        most = f"more than the {MAX_PIXELS // 10**6} million that are taken"
        raise ImageError(f"image has tiles of {width} x {height} pixels, {most}; send a smaller one.")
    known = grey.of_tiff(data)
    if known:
        return known[0], io.BytesIO(known[1])
    # Pillow reads the tags of all pages to tell how many there are.
    return None, file if tiff.is_last(data) else io.BytesIO(tiff.changed(data, {}))


def _open(form: str, source: IO[bytes]) -> Image.Image:
    """The picture, not decoded yet."""
    # `Image.open` would try every reader whose magic number fits; here the choice is made.
    reader: Callable[[IO[bytes], str], Image.Image] = Image.OPEN[form][0]
    try:
        image = reader(source, "")
    except Exception:  # some decoders fail on a damaged EXIF block; they skip one that has another name
        source.seek(0)
        image = reader(io.BytesIO(source.read().replace(b"Exif", b"none")), "")
    _forget_xmp(image)
    return image


def _load(form: str, image: Image.Image, source: IO[bytes]) -> Image.Image:
    """Decode the picture; of a damaged one what can be, as the reference build does.

    Raises:
        Exception: any of a decoder's, where nothing can be seen.
    """
    try:
        with _strict():
            image.load()
    except MemoryError:
        raise
    except Exception:
        source.seek(0)
        image = _open(form, source)
        image.load()
        if _is_blank(form, image):
            raise
    return image


@contextmanager
def _strict() -> Iterator[None]:
    """Let Pillow raise where pixels are missing."""
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = True


def _is_blank(form: str, image: Image.Image) -> bool:
    """Whether a damaged picture is what a decoder makes of no data: zeros, or of a JPEG mid-grey."""
    extrema: Any = image.getextrema()
    ranges = extrema if len(image.getbands()) > 1 else (extrema,)
    blank = (0, 127, 128) if form == "JPEG" else (0,)  # CMYK is stored inverted
    return all(low == high and low in blank for low, high in ranges)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What makes the picture upright, by its EXIF block alone."""
    _forget_xmp(image)
    try:
        return _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # a damaged EXIF block does not spoil the picture
        return None


def _forget_xmp(image: Image.Image) -> None:
    """Drop the XMP, in which Pillow looks for an orientation where EXIF has none; a PNG's may come after its pixels."""
    for name in ("xmp", "XML:com.adobe.xmp"):
        image.info.pop(name, None)
