"""What a benchmark ran on."""

import os
from typing import Any

from blip.about import processor

__all__ = ["machine", "processor"]


def machine(device: str) -> dict[str, Any]:
    """The processor, its cores, the threads that compute and, where `device` is cuda, the GPU."""
    import torch  # not in every process of a benchmark

    found: dict[str, Any] = {"cpu": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    return found
