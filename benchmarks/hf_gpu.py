"""Hugging Face's BLIP on a GPU, in float16, as it is and compiled: milliseconds for a batch.

    python -m benchmarks.hf_gpu [--small]

Runs in the environment of requirements-hf.txt. Prints a line of JSON for each figure as soon as it is known, those that
need compiling last: gpu.py, which runs it, may lose patience. "--small" is a trial on the CPU in float32.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.contender import Task, hugging_face

#: Sizes and lengths are those of random_bundle.py, which needs what this environment has not.
TASKS = (Task("match", 384), Task("caption", 384, 20), Task("answer", 480, 4))
BATCHES = (1, 16, 64)


def main(small: bool) -> None:
    """Time all of it."""
    device, dtype = torch.device("cpu" if small else "cuda"), torch.float32 if small else torch.float16
    torch.manual_seed(0)
    for compiled in (False, True):
        for task in TASKS:
            for batch in BATCHES[:1] if small or compiled else BATCHES:
                loaded = hugging_face(task, device, dtype, batch=batch, small=small, compiled=compiled)
                shape = batch, loaded.image_size, loaded.image_size, 3
                pixels = loaded.prepare(torch.randint(0, 256, shape, dtype=torch.uint8)).to(device, dtype)
                figure = {
                    "task": task.kind,
                    "dtype": str(dtype)[6:],
                    "compiled": compiled,
                    "batch": batch,
                    "ms": milliseconds(partial(loaded.run, pixels), device),
                }
                print(json.dumps(figure), flush=True)
                del loaded


def milliseconds(run: Callable[[], Any], device: torch.device) -> float:
    """The median of three, after two that do not count: the first compiles, the second may for growing shapes."""
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) * 1e3)
    return round(statistics.median(times[2:]), 2)


if __name__ == "__main__":
    main("--small" in sys.argv[1:])
