"""Environments with Hugging Face's newest BLIP, whose requirements are not ours: alone, or with OpenVINO."""

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import ROOT

REQUIREMENTS = ROOT / "benchmarks" / "requirements-hf.txt"
MORE_FOR_OPENVINO = ROOT / "benchmarks" / "requirements-openvino.txt"


class MissingError(RuntimeError):
    """The environment is not here and cannot be made; the message is one line."""


def hf_python(seconds: float | None = None, *, make: bool = True) -> Path:
    """The interpreter of the one with Hugging Face's BLIP alone.

    The environment is made where it is not there yet, each step of it in `seconds` at most.

    Raises:
        MissingError: it cannot be made, or shall not.
    """
    return _python("hf", [REQUIREMENTS], seconds, make=make)


def openvino_python() -> Path:
    """The interpreter of the one with OpenVINO; made where it is not there yet.

    Raises:
        MissingError: it cannot be made.
    """
    return _python("openvino", [REQUIREMENTS, MORE_FOR_OPENVINO], None, make=True)


def _python(name: str, lists: Sequence[Path], seconds: float | None, *, make: bool) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / f"blip-bench-{name}"
    python, installed = cache / "bin" / "python", cache / f"requirements-{name}.txt"
    wanted = "".join(path.read_text() for path in lists)
    if installed.is_file() and installed.read_text() == wanted:
        return python
    if not make:
        raise MissingError(f"there is no environment for it in {cache}")
    print(f"Making {cache} (it fetches about 4 GB).", flush=True)
    steps: list[list[str | Path]]
    packages: list[str | Path] = ["--no-deps"]  # the lists are whole
    for path in lists:
        packages += ["-r", path]
    if has_uv():
        steps = [
            ["uv", "venv", "--quiet", "--clear", "--python", "3.11", cache],
            ["uv", "pip", "install", "--quiet", "--python", python, *packages],
        ]
    else:
        steps = [
            [sys.executable, "-m", "venv", "--clear", cache],  # Python 3.11, as we are
            [python, "-m", "pip", "install", "--quiet", *packages],
        ]
    for step in steps:
        try:
            subprocess.run(step, check=True, stderr=subprocess.PIPE, text=True, timeout=seconds)
        except subprocess.TimeoutExpired as error:
            raise MissingError(f"making its environment took more than {seconds:.0f} s") from error
        except subprocess.CalledProcessError as error:
            reason = (error.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise MissingError(f"its environment cannot be made: {reason}") from error
    installed.write_text(wanted)
    return python


def has_uv() -> bool:
    """Whether there is a uv that runs; what is on the path may be a stand-in for one that is not installed."""
    return shutil.which("uv") is not None and subprocess.run(["uv", "--version"], capture_output=True).returncode == 0


#: What our own environment has as well, in versions that serve.
OURS = re.compile(
    r"(torch|torchvision|nvidia-.*|triton|numpy|pillow|sympy|mpmath|networkx|jinja2|markupsafe|setuptools)=="
)


def hf_packages() -> Path:
    """A directory with transformers in that release and what it needs, for our interpreter to find before our own.

    Torch is ours. It is made where it is not there yet (it fetches about 30 MB).
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    lines = [line for line in REQUIREMENTS.read_text().splitlines() if not line.startswith("#")]
    wanted = "".join(f"{line}\n" for line in lines if not OURS.match(line))
    packages = cache / f"blip-hf-packages-{hashlib.sha256(wanted.encode()).hexdigest()[:12]}"
    if not packages.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            new, requirements = Path(folder) / "packages", Path(folder) / "requirements.txt"
            requirements.write_text(wanted)
            install: list[str | Path] = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--no-deps"]
            subprocess.run([*install, "--target", new, "-r", requirements], check=True)
            with contextlib.suppress(OSError):  # another process was faster
                new.rename(packages)
    return packages
