"""scripts/patch_cog on copies of the real stock server."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from server import ROOT


@pytest.fixture
def stock(tmp_path: Path) -> Path:
    """A package `cog` in `tmp_path` that holds the http.py of the installed release as it was shipped."""
    spec = importlib.util.find_spec("cog")
    assert spec is not None
    assert spec.submodule_search_locations
    shipped = Path(spec.submodule_search_locations[0]) / "server" / "http.py.stock"
    server = tmp_path / "cog" / "server"
    server.mkdir(parents=True)
    for package in (server.parent, server):
        (package / "__init__.py").touch()
    return Path(shutil.copy(shipped, server / "http.py"))


def run(command: list[str], packages: Path) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        command, env={"PYTHONPATH": str(packages), "PATH": path}, capture_output=True, text=True, check=False
    )


def patch(http: Path) -> subprocess.CompletedProcess[str]:
    return run([str(ROOT / "scripts" / "patch_cog"), sys.executable], http.parents[2])


def test_every_edit_takes_and_a_second_run_changes_nothing(stock: Path) -> None:
    assert patch(stock).returncode == 0
    once = stock.read_text()
    assert "0.0.0.0" not in once
    assert "/shutdown" not in once.replace("request to /shutdown", "")
    assert patch(stock).returncode == 0
    assert stock.read_text() == once
    assert sorted(path.name for path in stock.parent.iterdir()) == ["__init__.py", "http.py", "http.py.stock"]


def test_the_edits_of_an_older_script_are_replaced(stock: Path) -> None:
    patch(stock)
    newest = stock.read_text()
    stock.write_text(newest.replace("default=None", 'default="::"'))
    assert patch(stock).returncode == 0
    assert stock.read_text() == newest


@pytest.mark.parametrize("line", ['default="0.0.0.0"', '@app.post("/shutdown")', "        if runner.is_busy():"])
def test_an_edit_that_does_not_apply_fails_loudly_and_leaves_the_server_alone(stock: Path, line: str) -> None:
    other_release = stock.read_text().replace(line, "another_release()")
    stock.write_text(other_release)
    ended = patch(stock)
    assert ended.returncode == 1
    assert ended.stderr.startswith("scripts/patch_cog: cannot ")
    assert "is not the server of cog 0.16.12" in ended.stderr
    assert stock.read_text() == other_release


def test_the_run_step_of_cog_yaml_makes_the_same_server(stock: Path) -> None:
    by_script = Path(shutil.copytree(stock.parents[1], stock.parents[2] / "other" / "cog")) / "server" / "http.py"
    assert patch(by_script).returncode == 0
    (step,) = yaml.safe_load((ROOT / "cog.yaml").read_text())["build"]["run"]
    assert "\n" not in step["command"], "the cog CLI refuses commands of several lines"
    ended = run(["bash", "-c", step["command"]], stock.parents[2])
    assert ended.returncode == 0, ended.stderr
    assert stock.read_text() == by_script.read_text()
