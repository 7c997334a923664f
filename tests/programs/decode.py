"""Decodes one picture through the pool and prints how many bytes it gets: decode IMAGE."""

import asyncio
import sys
from pathlib import Path

from blip.pictures.pool import Pool


def main(image: Path) -> None:
    pool = Pool()
    pool.wait()
    print(len(asyncio.run(pool.pixels(image, 8))))
    pool.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
