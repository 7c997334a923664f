"""scripts/run: which Python it takes, and when it makes the environment first."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.harness import DEADLINE, ROOT

PACKAGES = {"with packages": "", "without packages": "-S"}


def program(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A repository with one module, whose scripts/install makes a .venv that says that it is used."""
    root = tmp_path / "clone"
    python = f'#!/bin/sh\\necho .venv\\nexec {sys.executable} "$@"\\n'
    install = ["echo installing", "mkdir -p .venv/bin", f"printf '{python}' >.venv/bin/python"]
    program(root / "scripts" / "install", 'cd "$(dirname "$0")/.."', *install, "chmod +x .venv/bin/python")
    shutil.copy(ROOT / "scripts" / "run", root / "scripts" / "run")
    (root / "greet.py").write_text("import sys\nprint('hello', *sys.argv[1:])\n")
    return root


def run(clone: Path, python3: str, *arguments: str) -> tuple[str, str]:
    """What is printed on both outputs, started in another directory where python3 has packages or none."""
    programs = clone.parent / "bin"
    program(programs / "python3", f'exec {sys.executable} {PACKAGES[python3]} "$@"')
    ended = subprocess.run(
        [clone / "scripts" / "run", *arguments],
        cwd=programs,
        env={"PATH": f"{programs}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=True,
    )
    return ended.stdout, ended.stderr


def test_a_fresh_clone_gets_its_environment_first(clone: Path) -> None:
    assert run(clone, "without packages", "--install", "greet", "you") == (".venv\nhello you\n", "installing\n")


def test_an_image_whose_python3_has_the_packages_installs_nothing(clone: Path) -> None:
    assert run(clone, "with packages", "--install", "greet", "you") == ("hello you\n", "")
    assert not (clone / ".venv").exists()


def test_an_environment_that_is_there_is_brought_up_to_date(clone: Path) -> None:
    (clone / ".venv").mkdir()
    assert run(clone, "with packages", "--install", "greet") == (".venv\nhello\n", "installing\n")


def test_what_needs_no_package_installs_nothing(clone: Path) -> None:
    assert run(clone, "without packages", "greet", "a b") == ("hello a b\n", "")
