"""An image file -> the tensor a model takes; every bad image ends here with one sentence."""

from collections.abc import Callable
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from torch import Tensor

from blip.models import import_lavis


class ImageError(ValueError):
    """An image that cannot be used; the message is one sentence for the user."""


def open_image(path: Path) -> Image.Image:
    """The image in the file at `path` as RGB.

    Raises:
        ImageError: the file is empty, is not an image, or is damaged.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except UnidentifiedImageError as error:
        raise ImageError(
            "image is not a picture in a known format; send a JPEG, PNG, WebP, GIF or BMP file."
        ) from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(f"image could not be read: it is damaged or incomplete ({error}).") from error


def preprocessor(image_size: int) -> Callable[[Image.Image], Tensor]:
    """LAVIS's evaluation processor: RGB image -> (3, S, S) float32, bicubic resize without crop, normalised."""
    processor: Callable[[Image.Image], Tensor] = import_lavis().blip_processors.BlipImageEvalProcessor(
        image_size=image_size
    )
    return processor
