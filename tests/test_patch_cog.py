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
    """A package `cog` that holds the files of the installed release that are patched, as they were shipped."""
    spec = importlib.util.find_spec("cog")
    assert spec is not None
    assert spec.submodule_search_locations
    installed = Path(spec.submodule_search_locations[0])
    package = tmp_path / "cog"
    for shipped in installed.rglob("*.stock"):
        copy = package / shipped.relative_to(installed).with_suffix("")
        copy.parent.mkdir(parents=True, exist_ok=True)
        (copy.parent / "__init__.py").touch()
        shutil.copy(shipped, copy)
    return package


def read(package: Path) -> dict[str, str]:
    return {str(path.relative_to(package)): path.read_text() for path in package.rglob("*.py")}


def run(command: list[str], packages: Path) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        command, env={"PYTHONPATH": str(packages), "PATH": path}, capture_output=True, text=True, check=False
    )


def patch(package: Path) -> subprocess.CompletedProcess[str]:
    return run([str(ROOT / "scripts" / "patch_cog"), sys.executable], package.parent)


def test_every_edit_takes_and_a_second_run_changes_nothing(stock: Path) -> None:
    shipped = read(stock)
    assert patch(stock).returncode == 0
    once = read(stock)
    assert [name for name in shipped if once[name] == shipped[name]] == ["__init__.py", "server/__init__.py"]
    assert "0.0.0.0" not in once["server/http.py"]
    assert "/shutdown" not in once["server/http.py"].replace("request to /shutdown", "")
    assert patch(stock).returncode == 0
    assert read(stock) == once
    kept = {path.name for path in stock.rglob("*") if path.is_file() and path.suffix != ".py"}
    assert kept == {f"{Path(name).name}.stock" for name in shipped if not name.endswith("__init__.py")}


def test_the_edits_of_an_older_script_are_replaced(stock: Path) -> None:
    patch(stock)
    newest = read(stock)
    http = stock / "server" / "http.py"
    http.write_text(newest["server/http.py"].replace("default=None", 'default="::"'))
    assert patch(stock).returncode == 0
    assert read(stock) == newest


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("server/http.py", 'default="0.0.0.0"'),
        ("server/http.py", '@app.post("/shutdown")'),
        ("server/http.py", "        if runner.is_busy():"),
        ("server/worker.py", "                    task.cancel()"),
        ("types.py", "            shutil.copyfileobj(self.fileobj, dest)"),
    ],
)
def test_an_edit_that_does_not_apply_fails_loudly_and_leaves_the_server_alone(
    stock: Path, file: str, line: str
) -> None:
    path = stock / file
    path.write_text(path.read_text().replace(line, "another_release()"))
    other_release = read(stock)
    ended = patch(stock)
    assert ended.returncode == 1
    assert ended.stderr.startswith("scripts/patch_cog: cannot ")
    assert "is not that of cog 0.16.12" in ended.stderr
    assert read(stock) == other_release


def test_the_run_step_of_cog_yaml_makes_the_same_server(stock: Path) -> None:
    by_script = Path(shutil.copytree(stock, stock.parent / "other" / "cog"))
    assert patch(by_script).returncode == 0
    (step,) = yaml.safe_load((ROOT / "cog.yaml").read_text())["build"]["run"]
    assert "\n" not in step["command"], "the cog CLI refuses commands of several lines"
    ended = run(["bash", "-c", step["command"]], stock.parent)
    assert ended.returncode == 0, ended.stderr
    assert read(stock) == read(by_script)
