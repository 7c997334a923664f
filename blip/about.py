"""What runs, for operators: versions, the machine, and what its device can do."""

import contextlib
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import blip

if TYPE_CHECKING:  # whoever asks for the processor alone does not wait for it
    import torch

PACKAGES = ("cog", "salesforce-lavis", "torch", "torchvision", "transformers")


def about(device: "torch.device") -> dict[str, str]:
    """What runs and where, by name, each in one line."""
    return {
        "blip": blip.__version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": f"{processor()}, {len(os.sched_getaffinity(0))} of {os.cpu_count()} cores",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.1f} GB",
        "device": _describe(device),
        "precisions": _precisions(device),
    }


def processor() -> str:
    """The processor's name, with its family and model, by which those are told apart that hide their names."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    found = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if "model name" not in found:
        return platform.processor() or platform.machine()
    kind = f" (family {found['cpu family']}, model {found['model']})" if "cpu family" in found else ""
    return f"{found['model name']}{kind}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def _describe(device: "torch.device") -> str:
    if device.type != "cuda":
        return device.type
    import torch

    properties = torch.cuda.get_device_properties(device)
    capability = f"{properties.major}.{properties.minor}"
    return (
        f"{properties.name}, compute capability {capability}, {properties.total_memory / 1e9:.1f} GB, "
        f"CUDA {torch.version.cuda}"
    )


def _precisions(device: "torch.device") -> str:
    """Those that it computes in."""
    from blip.engine.kernels import PrecisionError
    from blip.engine.precision import PRECISIONS, check

    can = []
    for name in PRECISIONS:
        with contextlib.suppress(PrecisionError):
            check(device, name)
            can.append(name)
    return ", ".join(can)
