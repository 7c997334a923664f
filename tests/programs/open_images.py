"""Opens image files one after the other and prints for each its result and how many MiB the process grew for it."""

import json
import resource
import sys
from pathlib import Path

from blip.errors import ImageError
from blip.pictures.reading import open_image


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    open_image(Path("examples/pair.jpg"))
    for path in map(Path, sys.argv[1:]):
        before = peak()
        try:
            result = str(open_image(path).size)
        except ImageError as error:
            result = str(error)
        print(json.dumps([path.name, result, (peak() - before) >> 10]))


if __name__ == "__main__":
    main()
