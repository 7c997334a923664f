"""The edits to the stock server, by scripts/patch_cog and by cog.yaml; the rest of it is as it was shipped."""

import base64
import hashlib
import os
import re
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest
import yaml

from benchmarks.harness import ROOT

FIRST = 'if __name__ == "__main__": import blip.server\n'
OURS = "    from blip.server import Server, create_app\n"
#: The hash of every file, from the wheel's RECORD.
SHIPPED = {str(file): file.hash.value for file in distribution("cog").files or () if file.hash}
HTTP = "cog/server/http.py"


def installed(name: str) -> Path:
    return Path(str(distribution("cog").locate_file(name)))


def digest(path: Path) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(path.read_bytes()).digest()).rstrip(b"=").decode()


@pytest.fixture
def http(tmp_path: Path) -> Path:
    """The server's main module as it was shipped, in a package `cog` of its own."""
    copy = tmp_path / HTTP
    copy.parent.mkdir(parents=True)
    (tmp_path / "cog" / "__init__.py").touch()
    host = re.compile(r'(dest="host",\s+type=str,\s+default=)None')
    copy.write_text(host.sub(r'\1"0.0.0.0"', installed(HTTP).read_text().removeprefix(FIRST).replace(OURS, "")))
    assert digest(copy) == SHIPPED[HTTP]
    return copy


def run(http: Path, *command: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {"PYTHONPATH": str(http.parents[2]), "PATH": path}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def patch(http: Path) -> subprocess.CompletedProcess[str]:
    return run(http, str(ROOT / "scripts" / "patch_cog"), sys.executable)


def test_nothing_but_a_host_and_two_lines_of_one_file_differs_from_the_release(http: Path) -> None:
    others = [name for name, shipped in SHIPPED.items() if name != HTTP and digest(installed(name)) != shipped]
    assert others == []
    shipped = http.read_text()
    assert patch(http).returncode == 0
    edited = http.read_text()
    assert edited == installed(HTTP).read_text()
    assert len(edited.splitlines()) == len(shipped.splitlines()) + 2
    assert patch(http).returncode == 0
    assert http.read_text() == edited


def test_what_an_older_release_has_patched_gets_what_it_lacks(http: Path) -> None:
    assert patch(http).returncode == 0
    edited = http.read_text()
    http.write_text(edited.removeprefix(FIRST))
    assert patch(http).returncode == 0
    assert http.read_text() == edited


@pytest.mark.parametrize("ours_first", [False, True])
def test_the_sed_of_saladclouds_guide_changes_nothing_before_it_or_after_it(http: Path, ours_first: bool) -> None:
    guides = ("sed", "-i", "s/0.0.0.0/::/g", str(http))
    for step in (patch, lambda _: run(http, *guides))[:: 1 if ours_first else -1]:
        assert step(http).returncode == 0
    assert http.read_text() == installed(HTTP).read_text()


@pytest.mark.parametrize("line", ['default="0.0.0.0"', 'if __name__ == "__main__":'])
def test_another_release_is_refused_and_left_alone(http: Path, line: str) -> None:
    other = http.read_text().replace(line, "another_release()")
    http.write_text(other)
    ended = patch(http)
    assert ended.returncode == 1
    assert "is not that of cog 0.16.12" in ended.stderr
    assert http.read_text() == other


def test_the_run_step_of_cog_yaml_makes_the_same_server(http: Path) -> None:
    (step,) = yaml.safe_load((ROOT / "cog.yaml").read_text())["build"]["run"]
    assert "\n" not in step["command"], "the cog CLI refuses commands of several lines"
    ended = run(http, "bash", "-c", step["command"])
    assert ended.returncode == 0, ended.stderr
    assert http.read_text() == installed(HTTP).read_text()
