"""What decoding pictures in processes of their own costs on an idle server, and how many a second are prepared.

    scripts/bench pictures [--rounds N] [--quick]

Two photo-like pictures, resized to 384 pixels and normalised, in two ways: by the pool of processes as the service does
it, and by LAVIS's processor in a thread of this process. "Alone" is one at a time, in turns; "together" is as many at a
time as the service may have. Prints a table and one line of JSON, and keeps that line under benchmarks/results.
"""

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.machine import machine
from benchmarks.outcome import finish, head
from blip.engine.encoders import normalise
from blip.lavis import import_lavis, pixel_values
from blip.pictures.pool import Pool

SIDE = 384
SIZES = {"640 x 480": (640, 480), "4000 x 3000": (4000, 3000)}
TOGETHER = 32  # the server's slots
Way = Callable[[Path], Awaitable[torch.Tensor]]


def main(argv: Sequence[str]) -> None:
    """Time both ways, print the table, keep the result."""
    parser = argparse.ArgumentParser(prog="scripts/bench pictures", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=100, help="pictures of a kind, one at a time (default 100)")
    parser.add_argument("--quick", action="store_true", help="3 rounds, and nothing kept: a trial, no result")
    options = parser.parse_args(argv)
    rounds = 3 if options.quick else options.rounds
    with tempfile.TemporaryDirectory() as folder:
        rows = asyncio.run(measure(make_pictures(Path(folder)), rounds))
    result = {
        **head("pictures", quick=options.quick),
        **machine("cpu"),
        "rounds": rounds,
        "rows": rows,
    }
    print_table(result)
    finish(result, None if options.quick else "pictures-cpu")


def make_pictures(folder: Path) -> dict[str, Path]:
    """JPEGs of noise."""
    paths = {}
    for name, size in SIZES.items():
        paths[name] = folder / f"{name}.jpg"
        noise(size).save(paths[name], quality=90)
    return paths


def noise(size: tuple[int, int]) -> Image.Image:
    """Noise that is as smooth as a photo."""
    bands = [Image.effect_noise((size[0] // 8, size[1] // 8), 90).resize(size) for _ in range(3)]
    return Image.merge("RGB", bands)


async def measure(paths: dict[str, Path], rounds: int) -> list[dict[str, Any]]:
    """A row for every picture."""
    pool = Pool()
    pool.wait()
    loop, values = asyncio.get_running_loop(), pixel_values({})
    processor = import_lavis().blip_processors.BlipImageEvalProcessor(image_size=SIDE)
    threads = ThreadPoolExecutor(min(4, os.cpu_count() or 1))

    async def in_processes(path: Path) -> torch.Tensor:
        pixels = await pool.pixels(path, SIDE)
        picture = torch.frombuffer(pixels, dtype=torch.uint8).view(1, SIDE, SIDE, 3)
        return await loop.run_in_executor(threads, lambda: normalise(values, picture)[0])

    async def in_threads(path: Path) -> torch.Tensor:
        return await loop.run_in_executor(threads, lambda: processor(Image.open(path).convert("RGB")))

    rows = []
    try:
        for name, path in paths.items():
            assert (await in_processes(path)).equal(await in_threads(path))
            alone: dict[Way, list[float]] = {in_threads: [], in_processes: []}
            for _ in range(rounds):
                for way, seconds in alone.items():
                    start = time.perf_counter()
                    await way(path)
                    seconds.append(time.perf_counter() - start)
            rates = [await rate(way, path, rounds) for way in alone]
            threads_ms, processes_ms = (1000 * statistics.median(seconds) for seconds in alone.values())
            rows.append(
                {
                    "picture": name,
                    "threads_ms": round(threads_ms, 2),
                    "processes_ms": round(processes_ms, 2),
                    "cost_ms": round(processes_ms - threads_ms, 2),
                    "threads_per_s": round(rates[0], 1),
                    "processes_per_s": round(rates[1], 1),
                }
            )
    finally:
        pool.close()
    return rows


async def rate(way: Way, path: Path, rounds: int) -> float:
    """Pictures a second when many are asked for at a time."""
    places = asyncio.Semaphore(TOGETHER)

    async def one() -> None:
        async with places:
            await way(path)

    count = max(4, 2 * rounds)
    start = time.perf_counter()
    await asyncio.gather(*[one() for _ in range(count)])
    return count / (time.perf_counter() - start)


def print_table(result: dict[str, Any]) -> None:
    """A line for every picture."""
    print(f"{result['rounds']} rounds, {result['cores']} cores, {result['cpu']}")
    print(f"{'':14}{'alone: threads':>16}{'processes':>12}{'cost':>10}{'together: threads':>20}{'processes':>14}")
    for row in result["rows"]:
        print(
            f"{row['picture']:14}{row['threads_ms']:13.2f} ms{row['processes_ms']:9.2f} ms{row['cost_ms']:7.2f} ms"
            f"{row['threads_per_s']:18.1f}/s{row['processes_per_s']:12.1f}/s"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
