"""Which device to compute on, and whether it still computes."""

import contextlib

import torch

from blip.errors import ConfigError


def choose_device(name: str) -> torch.device:
    """Choose the device for `name` ("auto", "cpu" or "cuda") and test it with a real allocation.

    "auto" falls back to the CPU and says so; "cuda" does not.

    Raises:
        ConfigError: "cuda" was asked for and does not work.
    """
    if name == "cpu":
        return torch.device("cpu")
    try:
        torch.ones(1, device="cuda")
        return torch.device("cuda")
    except (RuntimeError, AssertionError) as error:  # no driver, no device, or a torch built without CUDA
        reason = str(error).splitlines()[0]
        if name == "cuda":
            raise ConfigError(f"BLIP_DEVICE=cuda and CUDA does not work here: {reason}") from error
        print(f"CUDA does not work here, using the CPU: {reason}")
        return torch.device("cpu")


def default_dtype(device: torch.device) -> str:
    """The precision to compute in where the settings do not say."""
    return "float16" if device.type == "cuda" else "float32"


def describe(device: torch.device) -> str:
    """The name of the GPU, or "cpu"."""
    return str(torch.cuda.get_device_name(device)) if device.type == "cuda" else device.type


def used_memory(device: torch.device) -> int | None:
    """Bytes of a GPU's memory that are in use, by whatever process; None for a CPU."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return int(total - free)


def check_device(device: torch.device) -> None:
    """Wait for what was begun, and compute something small: after some CUDA errors (not of memory) nothing works.

    Raises:
        RuntimeError: the device no longer computes.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    with contextlib.suppress(torch.OutOfMemoryError):
        torch.ones(1, device=device).add_(1).item()
