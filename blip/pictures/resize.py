"""A picture becomes a small square, exactly as the library does it whose results the model gives.

LAVIS resizes with torchvision's `Resize`, which takes Pillow's bicubic filter for a Pillow picture. transformers
resizes a tensor of bytes with torch's: the same filter, but with weights of 16 bits, which changes some values by one.
Before that LAVIS forgets what is transparent, and transformers lays it on white.
"""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Pixels = NDArray[np.uint8]

CUBIC = -0.5  # the filter's parameter, as in Pillow
REACH = 2  # of the filter to each side, in pixels of the smaller scale
PART = 16  # pixels made at a time, from the few of the source that they see
ROWS = 1 << 20  # numbers or pixels of the source taken at a time, so that memory stays small


def resized(image: Image.Image, side: int, library: str) -> bytes:
    """An RGB picture as (side, side, 3) uint8, by the resize of `library`, "lavis" or "transformers"."""
    if library == "lavis" or image.size == (side, side):
        return image.resize((side, side), Image.Resampling.BICUBIC).tobytes()
    import numpy as np  # no other picture needs it

    pixels: Pixels = np.asarray(image)
    pixels = pixels if pixels.shape[1] == side else _narrowed(pixels, side)
    pixels = pixels if pixels.shape[0] == side else _narrowed(pixels.swapaxes(0, 1), side).swapaxes(0, 1)
    return pixels.tobytes()


def on_white(image: Image.Image) -> Image.Image:
    """The picture as RGB, as transformers' `convert_to_rgb` makes it; rows are taken together as memory allows."""
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    flat = Image.new("RGB", image.size)
    step = max(1, ROWS // image.width)
    for top in range(0, image.height, step):
        rows = image.crop((0, top, image.width, min(top + step, image.height))).convert("RGBA")
        white = Image.new("RGBA", rows.size, (255, 255, 255, 255))
        flat.paste(Image.alpha_composite(white, rows).convert("RGB"), (0, top))
    return flat


def _narrowed(pixels: "Pixels", width: int) -> "Pixels":
    """(H, W, 3) uint8 -> (H, width, 3) uint8: one pass of torch's, which rounds to bytes after each."""
    import numpy as np

    height, before, colours = pixels.shape
    narrow = np.empty((height, width, colours), np.uint8)
    windows = list(_windows(before, width))
    largest = max(float(weights.max()) for _, weights in windows)
    precision = next((bits for bits in range(22) if int(0.5 + largest * (1 << bits + 1)) >= 1 << 15), 22)
    for first in range(0, width, PART):
        some = windows[first : first + PART]
        start, stop = some[0][0], max(at + len(weights) for at, weights in some)
        table = np.zeros((stop - start, len(some)))
        for column, (at, weights) in enumerate(some):
            scaled = weights * (1 << precision)
            table[at - start : at - start + len(weights), column] = np.trunc(scaled + np.copysign(0.5, scaled))
        step = max(1, ROWS // (stop - start))
        for top in range(0, height, step):
            # Doubles hold these sums of whole numbers exactly, in any order.
            source = pixels[top : top + step, start:stop].swapaxes(1, 2).astype(np.float64)  # (h, 3, n)
            sums = np.floor((source @ table + (1 << precision - 1)) / (1 << precision))
            narrow[top : top + step, first : first + PART] = sums.clip(0, 255).swapaxes(1, 2)
    return narrow


def _windows(before: int, after: int) -> "Iterator[tuple[int, NDArray[np.float64]]]":
    """For each new pixel the first old one that it sees, and the weights from there on.

    As `HelperInterpBase::_compute_index_ranges_weights` of torch 2.8 (UpSampleKernel.cpp) computes them.
    """
    import numpy as np

    scale = before / after
    support = REACH * scale if scale >= 1 else float(REACH)
    inverse = 1 / scale if scale >= 1 else 1.0
    for index in range(after):
        center = scale * (index + 0.5)
        start = max(math.trunc(center - support + 0.5), 0)
        stop = min(math.trunc(center + support + 0.5), before)
        x = np.abs((np.arange(start, stop) - center + 0.5) * inverse)
        near = ((CUBIC + 2) * x - (CUBIC + 3)) * x * x + 1
        far = CUBIC * (((x - 5) * x + 8) * x - 4)
        weights = np.where(x < 1, near, np.where(x < REACH, far, 0.0))
        yield start, weights / weights.sum()
