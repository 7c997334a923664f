"""An assertion that fails on the device, after which it computes nothing: what the batcher makes of it.

    python -m benchmarks.gpu_error DEVICE

Says what became of the three requests after it. On a CPU the error spoils nothing.
"""

import os
import sys
import threading
from collections.abc import Sequence

import torch

from benchmarks.harness import DEADLINE
from blip.batcher import Batcher, Result
from blip.config import DEMO
from blip.device import check_device
from blip.tasks import Captioning, Outputs, Sample
from blip.weights.bundle import open_bundle
from blip.weights.load import load_models


def main(device: torch.device) -> None:
    """Try it, and say in the last line how it went."""
    models = load_models(open_bundle(DEMO), device, "float32", max_batch=4, cuda_graphs=True)
    task = Captioning(models["caption"])
    spoil, died = threading.Event(), threading.Event()

    def run(_: str, samples: Sequence[Sample]) -> Outputs:
        if spoil.is_set():
            torch.zeros(4, device=device)[torch.tensor([9], device=device)].sum().item()
        return task.run(samples)

    batcher = Batcher(run, 4, lambda: check_device(device), died.set)
    sample = task.example()
    batcher.submit("caption", sample).result(DEADLINE)
    spoil.set()
    failed = sum(isinstance(outcome(batcher, sample), Exception) for _ in range(3))
    dead = died.wait(5) and not batcher.is_alive()
    print(f"{failed} of 3 requests failed, the batching thread {'ended' if dead else 'goes on'}", flush=True)
    os._exit(0)  # CUDA's own ending would abort


def outcome(batcher: Batcher, sample: Sample) -> Result | Exception:
    """What a request came to, waited for or refused."""
    try:
        return batcher.submit("caption", sample).result(DEADLINE)
    except Exception as error:
        return error


if __name__ == "__main__":
    main(torch.device(sys.argv[1]))
