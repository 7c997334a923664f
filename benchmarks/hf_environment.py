"""An environment with Hugging Face's newest BLIP, whose requirements are not ours."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.harness import ROOT

REQUIREMENTS = ROOT / "benchmarks" / "requirements-hf.txt"


def hf_python() -> Path:
    """Its interpreter; the environment is made where it is not there yet."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "blip-bench-hf"
    python, installed = cache / "bin" / "python", cache / "requirements-hf.txt"
    if not installed.is_file() or installed.read_text() != REQUIREMENTS.read_text():
        print(f"Making {cache} (it fetches about 4 GB).", flush=True)
        if has_uv():
            subprocess.run(["uv", "venv", "--quiet", "--clear", "--python", "3.11", cache], check=True)
            subprocess.run(["uv", "pip", "install", "--quiet", "--python", python, "-r", REQUIREMENTS], check=True)
        else:
            subprocess.run([sys.executable, "-m", "venv", "--clear", cache], check=True)  # Python 3.11, as we are
            subprocess.run([python, "-m", "pip", "install", "--quiet", "-r", REQUIREMENTS], check=True)
        installed.write_text(REQUIREMENTS.read_text())
    return python


def has_uv() -> bool:
    """Whether there is a uv that runs; what is on the path may be a stand-in for one that is not installed."""
    return shutil.which("uv") is not None and subprocess.run(["uv", "--version"], capture_output=True).returncode == 0
