"""Grey pictures of other depths than 8 bits, as 8 bits.

Pillow reads some kinds as numbers whose range is lost, inverts none where white is zero, and refuses most depths. So a
TIFF of such a kind is given to it under tags that it knows, and the numbers are read from what comes back.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from mmap import mmap
from typing import TYPE_CHECKING, Any

from PIL import Image

from blip.pictures import tiff

if TYPE_CHECKING:  # most pictures need none
    from numpy.typing import NDArray

_UNSIGNED, _SIGNED, _FLOAT, _UNDEFINED = 1, 2, 3, 4  # SampleFormat
_STRIP = 1 << 18  # pixels that are turned into numbers at a time


@dataclass(frozen=True)
class Grey:
    """How a picture's numbers are meant.

    Attributes:
        bits: of a number.
        kind: as SampleFormat says it: 1 for whole numbers from zero, 2 for signed ones, 3 for fractions.
        inverted: whether zero is white.
        width: pixels of a row; 0 where every pixel of the picture that Pillow reads is one number.
        orientation: as in EXIF.
    """

    bits: int
    kind: int = _UNSIGNED
    inverted: bool = False
    width: int = 0
    orientation: int = 1


def of_tiff(data: mmap | bytes) -> tuple[Grey, bytearray] | None:
    """What a TIFF's numbers mean, and the file under tags that Pillow knows; None where it knows the file's own.

    Raises:
        struct.error: the file is cut off.
    """
    tags = tiff.numbers(data)
    bits, kind = tags.get(tiff.BITS, 1), tags.get(tiff.SAMPLE_FORMAT, _UNSIGNED)
    photometric, width = tags.get(tiff.PHOTOMETRIC, 0), tags.get(tiff.WIDTH)
    if tags.get(tiff.SAMPLES, 1) != 1 or photometric not in (0, 1) or not width or not bits:
        return None
    if kind == _UNSIGNED and bits in (1, 2, 4, 8):
        return None
    kind = _UNSIGNED if kind == _UNDEFINED else kind
    if (kind == _FLOAT and bits not in (16, 32)) or kind not in (_UNSIGNED, _SIGNED, _FLOAT) or 16 < bits != 32:
        return None
    new = {tiff.PHOTOMETRIC: 1, tiff.ORIENTATION: 1, tiff.SAMPLE_FORMAT: _UNSIGNED}
    if bits == 32:
        new[tiff.SAMPLE_FORMAT] = _FLOAT if kind == _FLOAT else _SIGNED
    elif bits not in (8, 16):  # packed across bytes: Pillow is to see rows of bytes
        tile = tags.get(tiff.TILE_WIDTH) or 0
        new |= {tiff.BITS: 8, tiff.WIDTH: -(-width * bits // 8), tiff.TILE_WIDTH: tile * bits // 8}
    packed = width if tiff.WIDTH in new else 0
    return Grey(bits, kind, photometric == 0, packed, tags.get(tiff.ORIENTATION) or 1), tiff.changed(data, new)


def to_8_bits(image: Image.Image, grey: Grey) -> Image.Image:
    """The picture in mode L; black and white are where `_levels` puts them."""
    import numpy as np

    low, high = np.inf, -np.inf
    for _, numbers in _strips(image, grey):
        finite = numbers[np.isfinite(numbers)]
        if finite.size:
            low, high = min(low, finite.min()), max(high, finite.max())
    black, white = _levels(grey, float(low), float(high))
    # Of 8 bits or more the highest 8 count; fewer, and fractions, are stretched.
    factor, half = (256 / (white - black + 1), 0.0) if white - black >= 255 else (255 / (white - black), 0.5)
    result = Image.new("L", (grey.width or image.width, image.height))
    for top, numbers in _strips(image, grey):
        levels = np.clip(np.nan_to_num((numbers - black) * factor + half), 0, 255).astype(np.uint8)
        result.paste(Image.fromarray(255 - levels if grey.inverted else levels), (0, top))
    return result


def _levels(grey: Grey, low: float, high: float) -> tuple[float, float]:
    """The numbers that are black and white, given the lowest and the highest of the picture.

    Up to 16 bits the range is that of the numbers; of signed ones it begins at zero where none is below. Wider numbers
    and fractions seldom use theirs: it is the narrowest of the usual ranges that holds the highest.
    """
    if grey.kind == _FLOAT:
        return 0, next((white for white in (1.0, 255.0, 65535.0) if high <= white), high)
    if grey.bits > 16:
        widest = 2.0 ** (grey.bits if grey.kind == _UNSIGNED else grey.bits - 1) - 1
        return 0, next((white for white in (255.0, 65535.0) if high <= white), widest)
    if grey.kind == _UNSIGNED:
        return 0, 2**grey.bits - 1
    half = 2 ** (grey.bits - 1)
    return (-half if low < 0 else 0), half - 1


def _strips(image: Image.Image, grey: Grey) -> Iterator[tuple[int, "NDArray[Any]"]]:
    """The first row of every strip of the picture, and its numbers: (rows, width) float64."""
    import numpy as np

    kinds = {_UNSIGNED: "u", _SIGNED: "i", _FLOAT: "f"}
    height = max(1, _STRIP // image.width)
    for top in range(0, image.height, height):
        strip = image.crop((0, top, image.width, min(image.height, top + height)))
        numbers = np.asarray(strip)
        if grey.width:
            numbers = _unpacked(numbers, grey)
        else:
            size = numbers.dtype.itemsize
            numbers = numbers.astype(numbers.dtype.newbyteorder("=")).view(f"{kinds[grey.kind]}{size}")
        yield top, numbers.astype(np.float64)


def _unpacked(rows: "NDArray[Any]", grey: Grey) -> "NDArray[Any]":
    """Numbers of any width, the highest bit first, from rows of bytes."""
    import numpy as np

    bits = np.unpackbits(rows, axis=1)[:, : grey.width * grey.bits].reshape(len(rows), grey.width, grey.bits)
    weights = 2 ** np.arange(grey.bits - 1, -1, -1, dtype=np.int64)
    if grey.kind == _SIGNED:
        weights[0] = -weights[0]
    return bits @ weights
