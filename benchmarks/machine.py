"""What a benchmark ran on."""

import os
import platform
from pathlib import Path
from typing import Any


def processor() -> str:
    """The processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def machine(device: str) -> dict[str, Any]:
    """The processor, its cores, the threads that compute and, where `device` is cuda, the GPU."""
    import torch  # not in every process of a benchmark

    found: dict[str, Any] = {"cpu": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    return found
