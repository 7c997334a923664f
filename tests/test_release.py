"""What a release is made of says the same of itself everywhere."""

import json
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import blip
from benchmarks.harness import ROOT


def packages(lock: str) -> set[tuple[str, str]]:
    """The names and versions in a lock."""
    return set(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / lock).read_text(), re.MULTILINE))


LOCKED = dict(packages("requirements.txt"))


def test_the_image_has_the_version_on_its_label() -> None:
    assert f"\nARG VERSION={blip.__version__}\n" in (ROOT / "Dockerfile").read_text()


def test_cog_build_gets_the_cog_and_the_cuda_of_the_lock() -> None:
    build = yaml.safe_load((ROOT / "cog.yaml").read_text())["build"]
    assert build["sdk_version"] == LOCKED["cog"]
    assert LOCKED["nvidia-cuda-runtime-cu12"].startswith(f"{build['cuda']}.")


def test_the_base_image_has_the_pytorch_of_the_lock() -> None:
    base = re.search(r"^ARG BASE_IMAGE=\S+:(\S+)-cuda(\S+)-cudnn", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert base
    assert base[1] == LOCKED["torch"]
    assert LOCKED["nvidia-cuda-runtime-cu12"].startswith(f"{base[2]}.")


@pytest.mark.parametrize("lock", ["requirements.txt", "requirements-cpu.txt"])
def test_the_sbom_has_every_package_of_the_lock_with_its_hash(lock: str, tmp_path: Path) -> None:
    subprocess.run([ROOT / "scripts" / "sbom", "sbom.json", lock], cwd=tmp_path, check=True, capture_output=True)
    document = json.loads((tmp_path / "sbom.json").read_text())
    assert document["bomFormat"] == "CycloneDX"
    assert document["metadata"]["component"]["version"] == blip.__version__
    expected = {package for package in packages(lock) if package[0] != "colorama"}  # for Windows
    assert {(part["name"], part["version"]) for part in document["components"]} == expected
    for part in document["components"]:
        assert any(reference.get("hashes") for reference in part["externalReferences"]), part["name"]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the lock has other packages elsewhere")
def test_the_licences_are_those_of_the_packages(tmp_path: Path) -> None:
    subprocess.run([ROOT / "scripts" / "licences", tmp_path / "licences.md"], check=True, capture_output=True)
    text = (tmp_path / "licences.md").read_text()
    assert text == (ROOT / "docs" / "licences.md").read_text()
    rows = re.findall(r"^\| (\S+) \| \S+ \| (.+) \|$", text, re.MULTILINE)[1:]
    named = {name.lower().replace("_", "-") for name, _ in rows}
    assert LOCKED.keys() - named == {"colorama"}  # for Windows
    assert [name for name, licence in rows if licence in ("", "UNKNOWN")] == []


def test_githubs_forms_and_workflows_have_their_schemas() -> None:
    checks = {
        "vendor.github-workflows": sorted((ROOT / ".github" / "workflows").iterdir()),
        "vendor.dependabot": [ROOT / ".github" / "dependabot.yml"],
        "vendor.github-issue-forms": [
            ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml" for name in ("bug", "feature")
        ],
    }
    for schema, files in checks.items():
        command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, *map(str, files)]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stdout
