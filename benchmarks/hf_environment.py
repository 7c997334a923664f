"""An environment with Hugging Face's newest BLIP, whose requirements are not ours."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.harness import ROOT

REQUIREMENTS = ROOT / "benchmarks" / "requirements-hf.txt"


class MissingError(RuntimeError):
    """The environment is not here and cannot be made; the message is one line."""


def hf_python(seconds: float | None = None, *, make: bool = True) -> Path:
    """Its interpreter; the environment is made where it is not there yet, each step of it in `seconds` at most.

    Raises:
        MissingError: it cannot be made, or shall not.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "blip-bench-hf"
    python, installed = cache / "bin" / "python", cache / "requirements-hf.txt"
    if installed.is_file() and installed.read_text() == REQUIREMENTS.read_text():
        return python
    if not make:
        raise MissingError(f"there is no environment for it in {cache}")
    print(f"Making {cache} (it fetches about 4 GB).", flush=True)
    steps: list[list[str | Path]]
    if has_uv():
        steps = [
            ["uv", "venv", "--quiet", "--clear", "--python", "3.11", cache],
            ["uv", "pip", "install", "--quiet", "--python", python, "-r", REQUIREMENTS],
        ]
    else:
        steps = [
            [sys.executable, "-m", "venv", "--clear", cache],  # Python 3.11, as we are
            [python, "-m", "pip", "install", "--quiet", "-r", REQUIREMENTS],
        ]
    for step in steps:
        try:
            subprocess.run(step, check=True, stderr=subprocess.PIPE, text=True, timeout=seconds)
        except subprocess.TimeoutExpired as error:
            raise MissingError(f"making its environment took more than {seconds:.0f} s") from error
        except subprocess.CalledProcessError as error:
            reason = (error.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise MissingError(f"its environment cannot be made: {reason}") from error
    installed.write_text(REQUIREMENTS.read_text())
    return python


def has_uv() -> bool:
    """Whether there is a uv that runs; what is on the path may be a stand-in for one that is not installed."""
    return shutil.which("uv") is not None and subprocess.run(["uv", "--version"], capture_output=True).returncode == 0
