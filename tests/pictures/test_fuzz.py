"""Thousands of damaged image files: each is pixels or one sentence, and ends or bloats no decoding process.

Index I of the same SEED is always the same file.
"""

import asyncio
import itertools
import random
import re
import struct
import time
import zlib
from pathlib import Path

from PIL import Image

from benchmarks.processes import memory, own_decoders
from blip.errors import ImageError
from blip.pictures.pool import Pool
from tests.image_files import chunk, encoded, noise, png, ramp, tiff
from tests.pictures.test_reading import DAMAGED, EMPTY, FILES, ORDINARY, UNKNOWN, damaged_exif

SEED = 20261123
SAMPLES = 20_000
SIDE = 32
LARGE = r"image (has|is in) [0-9a-zM ]+, more than (the )?[0-9a-z ]+; (send a smaller one|save it anew)\."
HUNGRY = "image takes more than 1280 MiB of memory to decode; send a smaller one."  # or says that it would
MUCH = r"image (has|is in) more than [0-9A-Za-z ]+; save it anew( without (it|them))?\."
SENTENCE = re.compile("|".join([*map(re.escape, (EMPTY, UNKNOWN, DAMAGED, HUNGRY)), LARGE, MUCH]))
NUMBERS = (0, 1, 2, 7, 8, 16, 127, 128, 255, 256, 4095, 32767, 32768, 65535, 65536, 2**24, 2**31 - 1, 2**31, 2**32 - 1)


def interlaced() -> bytes:
    starts = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    rows = [
        b"\0" + bytes(range(len(range(x, 48, dx)))) for x, y, dx, dy in starts for _ in range(len(range(y, 32, dy)))
    ]
    header = struct.pack(">IIBBBBB", 48, 32, 8, 0, 0, 0, 1)
    return png((48, 32), zlib.compress(b"".join(rows))).replace(
        chunk(b"IHDR", header[:-1] + b"\0"), chunk(b"IHDR", header)
    )


def run_length_bmp() -> bytes:
    palette = b"".join(bytes([i, 255 - i, i, 0]) for i in range(256))
    rows = b"".join(bytes([20, y, 0, 4, 1, 2, 3, y, 24, 9, 0, 0]) for y in range(32)) + b"\0\1"
    header = struct.pack("<IiiHHIIiiII", 40, 48, 32, 1, 8, 1, len(rows), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 0, 0, 0, 14 + len(header) + len(palette)) + header + palette + rows


def seeds() -> list[bytes]:
    """Small good pictures of every accepted format."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x011A] = 6, "the maker of it", 72.0
    exif.get_ifd(0x8769)[0x9003] = "2020:01:01 00:00:00"
    rgb, frames = noise(), {"save_all": True, "append_images": [noise(), noise()]}
    deep = Image.frombytes("I;16", (256, 1), ramp("<"))
    tiles = zlib.compress(bytes(range(256)))
    more = [
        encoded(rgb, "JPEG", exif=exif.tobytes(), icc_profile=b"profile" * 9, comment=b"hello"),
        encoded(noise("CMYK"), "JPEG", progressive=True),
        interlaced(),
        png((16, 8), zlib.compress(b"".join(b"\0" + ramp(">")[:32] for _ in range(8))), bits=16),
        encoded(rgb, "PNG", exif=exif.tobytes(), icc_profile=b"profile" * 9),
        png((48, 32), zlib.compress(bytes(49 * 32)), chunk(b"zTXt", b"a\0\0" + tiles), chunk(b"tRNS", b"\0\7")),
        encoded(rgb, "PNG", **frames),
        encoded(rgb, "GIF", **frames, disposal=2, transparency=3, comment=b"hello"),
        encoded(noise("P"), "GIF", interlace=1),
        encoded(noise("RGBA"), "BMP"),
        run_length_bmp(),
        encoded(rgb, "WEBP", **frames),
        encoded(noise("RGBA"), "WEBP", exif=exif.tobytes(), icc_profile=b"profile" * 9),
        encoded(rgb, "TIFF", **frames),
        encoded(rgb, "TIFF", exif=exif.tobytes()),
        encoded(rgb, "TIFF", compression="jpeg"),
        encoded(noise("1"), "TIFF", compression="group4"),
        encoded(noise("YCbCr"), "TIFF", compression="tiff_lzw"),
        encoded(deep, "TIFF"),
        encoded(deep, "TIFF", compression="tiff_lzw"),
        encoded(Image.frombytes("I;16B", (256, 1), ramp(">")), "TIFF"),
        tiff({256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 322: 16, 323: 16, 324: 8, 325: len(tiles)}, tiles),
        encoded(rgb, "AVIF", **frames),
        encoded(rgb, "AVIF", exif=exif.tobytes()),
        *(path.read_bytes() for path in FILES.glob("*.heic")),
        *(encoded(rgb, form, exif=block) for block in damaged_exif().values() for form in ("JPEG", "WEBP")),
    ]
    return [*ORDINARY.values(), *more]


def mutated(data: bytes, other: bytes, chance: random.Random) -> bytes:
    """`data` with one piece of damage."""
    size = len(data)
    at = chance.randrange(size)
    end = min(size, at + chance.choice((1, 2, 4, 8, 40, 300)))
    kind = chance.randrange(9)
    if kind == 0:  # a bit
        return data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]
    if kind == 1:  # a run of one byte
        return data[:at] + bytes([chance.choice((0, 255, chance.randrange(256)))]) * (end - at) + data[end:]
    if kind == 2:  # random bytes
        return data[:at] + chance.randbytes(end - at) + data[end:]
    if kind == 3:
        return data[:at]
    if kind == 4:  # a block once more
        return data[:end] + data[at:]
    if kind == 5:
        return data[:at] + chance.randbytes(end - at) + data[at:]
    if kind == 6:
        return data[:at] + data[end:]
    if kind == 7:  # the beginning of one and the end of another
        return data[:at] + other[chance.randrange(len(other)) :]
    layout = chance.choice("<>") + chance.choice("BHI")  # a field where headers are
    at = chance.choice((chance.randrange(min(size, 64)), max(0, size - 1 - chance.randrange(250)), at))
    number = chance.choice(NUMBERS) & (256 ** struct.calcsize(layout) - 1)
    return data[:at] + struct.pack(layout, number) + data[at + struct.calcsize(layout) :]


def with_checksums(data: bytes) -> bytes:
    """A PNG whose chunks have the right checksums, so that a decoder goes beyond them."""
    parts, at = [data[:8]], 8
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4])
        parts.append(data[at:end] + struct.pack(">I", zlib.crc32(data[at + 4 : end])))
        at = end + 4
    return b"".join(parts) + data[at:]


def sample(pictures: list[bytes], index: int) -> bytes:
    chance = random.Random(f"{SEED}/{index}")
    data, other = pictures[index % len(pictures)], chance.choice(pictures)
    for _ in range(chance.choice((1, 1, 1, 2, 4, 12))):
        data = mutated(data, other, chance) or b"\0"
    return with_checksums(data) if data.startswith(b"\x89PNG") and chance.random() < 0.7 else data


async def attempt(pool: Pool, path: Path, index: int) -> bool:
    """Whether the file is a picture."""
    sentence, cause, pixels = "", None, bytearray()
    try:
        pixels = await pool.pixels(path, SIDE)
    except ImageError as error:
        sentence, cause = str(error), error.__cause__
    assert SENTENCE.fullmatch(sentence) or len(pixels) == 3 * SIDE**2, (SEED, index, sentence, cause)
    return not sentence


def test_twenty_thousand_damaged_files_are_pictures_or_sentences(tmp_path: Path) -> None:
    pictures, indices = seeds(), itertools.count()
    good, longest = 0, 0.0

    async def work(pool: Pool, path: Path, until: int) -> None:
        nonlocal good, longest
        while (index := next(indices)) < until:
            path.write_bytes(sample(pictures, index))
            start = time.monotonic()
            good += await attempt(pool, path, index)
            longest = max(longest, time.monotonic() - start)

    async def main() -> list[int]:
        nonlocal indices
        pool = Pool()
        try:
            pool.wait()
            processes = own_decoders()
            held: list[int] = []
            for until in (SAMPLES // 4, SAMPLES):
                indices = itertools.count(0 if not held else SAMPLES // 4)
                await asyncio.gather(*[work(pool, tmp_path / str(pid), until) for pid in processes])
                held.append(sum(map(memory, processes)))
            assert own_decoders() == processes, "one has crashed"
            return held
        finally:
            pool.close()

    before, after = asyncio.run(main())
    print(f"{SAMPLES} samples, {good} pictures, {longest:.2f} s at most, {before >> 10} -> {after >> 10} KiB")
    assert SAMPLES // 20 < good < SAMPLES * 19 // 20
    assert after < before * 1.1 + (8 << 20)


def test_the_undamaged_pictures_are_read(tmp_path: Path) -> None:
    async def main() -> None:
        pool = Pool()
        try:
            for index, data in enumerate(seeds()):
                (tmp_path / "seed").write_bytes(data)
                assert await attempt(pool, tmp_path / "seed", index), index
        finally:
            pool.close()

    asyncio.run(main())
