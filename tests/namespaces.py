"""Tests that need a network or a file system of their own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.harness import ROOT


def assert_passes(program: str, kinds: tuple[str, ...], folder: Path) -> None:
    """Run the tests of a file of tests/server in new namespaces of these kinds, as root where it has to be."""
    sudo = [] if os.geteuid() == 0 else ["sudo", "-n"]
    unshare = shutil.which("unshare")
    assert unshare, "util-linux is missing"
    inner = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={folder}/inner"]
    ended = subprocess.run(
        [*sudo, unshare, *(f"--{kind}" for kind in kinds), *inner, str(ROOT / "tests" / "server" / program)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert " passed" in ended.stdout
