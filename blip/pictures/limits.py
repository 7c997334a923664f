"""What is taken of a picture, and what its decoding may take."""

from blip.errors import ImageError

MAX_PIXELS = 64_000_000
MAX_SIDE = 65_535  # as in JPEG; resizing needs 32 bytes for every pixel of a side
MAX_SCANS = 100  # as in libtiff; a hundred bytes of a progressive JPEG can be a scan over every pixel
MAX_BLOCKS = 10_000  # of metadata: chunks, extensions, boxes, tags; a camera writes a few dozen
MAX_SEGMENTS = 1_000  # of a JPEG; those of Exif are joined, and every one copies those before it
MAX_METADATA = 16_000_000  # bytes; the largest that cameras write hold a second picture, of a few MB
MAX_PIECES = 300_000  # of a picture: strips and tiles, chunks of pixels, frames of an animation
MAX_TEXT = 65_536  # bytes that a compressed text or profile of a PNG may inflate to; longer ones are left out

LARGE = 200  # MiB that decoding may need, from which on a picture waits for room
LARGE_TOTAL = 1200  # MiB for all such pictures at a time
MEMORY = 1280  # MiB of data that a process may have; the largest lossless WebP with transparency needs 1,000
CPU_SECONDS = 20  # the slowest kinds of 64 million pixels take 3 s
SECONDS = 45.0  # by the clock, without waiting for a free process or for room
PROCESSES = 8  # at most; one for each core
NICE = 5  # as the batching thread: what answers clients comes first


def needed_memory(form: str, pixels: int) -> int:
    """MiB that decoding so many pixels may need: a WebP needs 16 bytes for one, a progressive JPEG 12, most need 8."""
    return pixels * (16 if form == "WEBP" else 12) >> 20


def too_many(pixels: int | str) -> ImageError:
    """The refusal of a picture for its size."""
    most = f"more than the {MAX_PIXELS // 10**6} million that are taken"
    return ImageError(f"image has {pixels} pixels, {most}; send a smaller one.")
