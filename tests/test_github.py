"""Workflows, forms and documents for GitHub: what it needs is there, and what they promise is so."""

import os
import re
import shutil
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.harness import ROOT
from blip import __version__

GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").iterdir())
FORMS = [GITHUB / "ISSUE_TEMPLATE" / "bug.yml", GITHUB / "ISSUE_TEMPLATE" / "feature.yml"]
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
ON = True  # how YAML 1.1 reads the key `on`


def read(path: Path) -> dict[Any, Any]:
    document = yaml.safe_load(path.read_text())
    assert isinstance(document, dict)
    return document


CI = read(GITHUB / "workflows" / "ci.yml")
RELEASE = read(GITHUB / "workflows" / "release.yml")


def steps(workflow: dict[Any, Any]) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job.get("steps", [])]


def sections() -> dict[str, str]:
    """The text under each version of the changelog, newest first."""
    parts = re.split(r"^## (.*)\n", CHANGELOG, flags=re.MULTILINE)
    return {heading: text.strip() for heading, text in zip(parts[1::2], parts[2::2], strict=True)}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_every_action_is_pinned_by_its_commit_with_the_version_beside_it(path: Path) -> None:
    used = re.findall(r"^\s*(?:- )?uses: (.*)$", path.read_text(), re.MULTILINE)
    assert used
    for action in used:
        assert re.fullmatch(r"\./\S+|[\w-]+/[\w/-]+@[0-9a-f]{40} # v\d+(\.\d+)*", action), action


def test_an_action_has_one_version_everywhere() -> None:
    texts = "".join(path.read_text() for path in WORKFLOWS)
    pins = set(re.findall(r"uses: (\S+@.*)$", texts, re.MULTILINE))
    assert len(pins) == len({pin.partition("@")[0] for pin in pins})


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_only_reads_keeps_no_token_and_ends_in_time(path: Path) -> None:
    workflow = read(path)
    assert workflow["permissions"] == {"contents": "read"}
    assert "concurrency" in workflow
    for job in workflow["jobs"].values():
        assert "uses" in job or job["timeout-minutes"] <= 120
    for step in steps(workflow):
        assert "checkout" not in step.get("uses", "") or step["with"]["persist-credentials"] is False


def test_a_job_of_the_release_may_write_only_what_it_makes() -> None:
    assert {name: job["permissions"] for name, job in RELEASE["jobs"].items() if "permissions" in job} == {
        "images": {"contents": "read", "packages": "write", "id-token": "write"},
        "release": {"contents": "write"},
    }


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_nothing_from_outside_becomes_part_of_a_command(path: Path) -> None:
    commands = [step["run"] for step in steps(read(path)) if "run" in step]
    assert commands
    assert [command for command in commands if "${{" in command] == []


def test_ci_runs_for_pushes_and_pull_requests_and_ends_older_runs() -> None:
    assert {"push", "pull_request"} <= set(CI[ON])
    assert CI["concurrency"]["cancel-in-progress"] is True
    assert ".ci/run" in steps(CI)[-1]["run"]


def test_nothing_is_published_before_the_tests_and_the_tag_are_right() -> None:
    jobs = RELEASE["jobs"]
    assert RELEASE[ON] == {"push": {"tags": ["v*"]}}
    assert jobs["test"]["uses"] == "./.github/workflows/ci.yml"
    assert jobs["images"]["needs"] == ["prepare", "test"]
    assert jobs["release"]["needs"] == ["prepare", "images"]
    assert 'scripts/release_notes "$GITHUB_REF_NAME" >notes.md' in [step.get("run") for step in steps(RELEASE)]


def test_the_images_are_for_gpu_and_cpu_with_sbom_provenance_and_a_signed_digest() -> None:
    images = RELEASE["jobs"]["images"]
    kinds = images["strategy"]["matrix"]["include"]
    assert {(kind["platforms"], kind["build-args"]) for kind in kinds} == {
        ("linux/amd64", ""),
        ("linux/amd64,linux/arm64", "TORCH=cpu"),
    }
    build = next(step["with"] for step in images["steps"] if step.get("id") == "build")
    assert (build["push"], build["sbom"], build["provenance"]) == (True, True, "mode=max")
    assert build["build-args"].startswith("VERSION=")
    assert 'cosign sign --yes "$IMAGE@$DIGEST"' in images["steps"][-1]["run"]


@pytest.mark.parametrize(
    ("version", "suffix", "tags"),
    [
        ("1.2.3", "", "i:1.2.3,i:1.2,i:latest"),
        ("1.2.3", "-cpu", "i:1.2.3-cpu,i:1.2-cpu,i:latest-cpu"),
        ("1.3.0rc1", "-cpu", "i:1.3.0rc1-cpu"),
    ],
)
def test_only_a_final_version_becomes_the_latest(version: str, suffix: str, tags: str, tmp_path: Path) -> None:
    names = next(step for step in RELEASE["jobs"]["images"]["steps"] if step.get("id") == "names")
    given = {"IMAGE": "i", "VERSION": version, "SUFFIX": suffix}
    assert set(names["env"]) == set(given)
    output = tmp_path / "output"
    environment = {**os.environ, **given, "GITHUB_OUTPUT": str(output)}
    subprocess.run(["bash", "-euo", "pipefail", "-c", names["run"]], env=environment, check=True)
    assert output.read_text() == f"tags={tags}\n"


def test_the_version_is_known_without_any_package() -> None:
    asked = [sys.executable, "-S", "-c", "import blip; print(blip.__version__)"]
    assert subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True).stdout == f"{__version__}\n"


def test_the_changelog_is_one_of_keep_a_changelog() -> None:
    assert CHANGELOG.startswith("# Changelog\n")
    first, *released = sections()
    assert first == "[Unreleased]"
    found = [re.fullmatch(r"\[(\d+\.\d+\.\d+\w*)\] - (\d{4}-\d{2}-\d{2})", heading) for heading in released]
    days = [date.fromisoformat(heading[2]) for heading in found if heading]
    assert len(days) == len(released)
    assert days == sorted(days, reverse=True)
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.*)$", CHANGELOG, re.MULTILINE)) <= kinds


def release_notes(tag: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([folder / "scripts" / "release_notes", tag], capture_output=True, text=True, check=False)


def test_the_release_of_this_version_shows_its_section() -> None:
    section = next(text for heading, text in sections().items() if heading.startswith(f"[{__version__}] - "))
    shown = release_notes(f"v{__version__}")
    assert (shown.stdout, shown.stderr) == (f"{section}\n", "")
    assert not re.search(r"\]\((?!https://)", section), "GitHub does not resolve other links in a release"


@pytest.mark.parametrize("tag", [__version__, "v0.9.9", f"v{__version__}.1", ""])
def test_a_tag_of_another_version_makes_no_release(tag: str) -> None:
    shown = release_notes(tag)
    assert (shown.returncode, shown.stdout) == (1, "")
    assert shown.stderr == f"scripts/release_notes: this is version {__version__}; give the tag v{__version__}.\n"


@pytest.mark.parametrize("left", ["", f"## [{__version__}] - 2026-01-01\n\n## [0.1.0] - 2025-01-01\n\n- Other\n"])
def test_a_version_without_its_section_makes_no_release(left: str, tmp_path: Path) -> None:
    for name in ("scripts", "blip"):
        (tmp_path / name).mkdir()
    shutil.copy(ROOT / "scripts" / "release_notes", tmp_path / "scripts")
    for name in ("__init__.py", "errors.py"):
        shutil.copy(ROOT / "blip" / name, tmp_path / "blip")
    (tmp_path / "CHANGELOG.md").write_text(left)
    shown = release_notes(f"v{__version__}", tmp_path)
    assert (shown.returncode, shown.stdout) == (1, "")
    assert f'CHANGELOG.md says nothing under "## [{__version__}] - DATE"' in shown.stderr


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_a_form_for_issues_has_what_github_needs(path: Path) -> None:
    form = read(path)
    assert all(isinstance(form[key], str) and form[key] for key in ("name", "description"))
    asked = [element for element in form["body"] if element["type"] != "markdown"]
    assert {element["type"] for element in asked} <= {"textarea", "input", "dropdown", "checkboxes"}
    assert all(element["attributes"]["label"] for element in asked)
    assert len({element["id"] for element in asked}) == len(asked)


def test_a_report_of_a_bug_has_the_request_what_was_expected_and_the_doctors_findings() -> None:
    form = read(FORMS[0])
    needed = {element["id"] for element in form["body"] if element.get("validations", {}).get("required")}
    assert {"asked", "expected", "doctor"} <= needed
    assert "python -m blip doctor" in FORMS[0].read_text()
    assert "SECURITY.md" in form["body"][0]["attributes"]["value"]
    assert read(FORMS[0].with_name("config.yml")) == {"blank_issues_enabled": False}


def test_dependabot_is_told_what_to_update_and_how_often() -> None:
    config = read(GITHUB / "dependabot.yml")
    assert config["version"] == 2
    for update in config["updates"]:
        assert update["package-ecosystem"] in ("github-actions", "docker", "pip", "uv")
        assert (ROOT / update["directory"].lstrip("/")).is_dir()
        assert update["schedule"]["interval"] in ("daily", "weekly", "monthly")


def test_contributors_read_little_and_what_they_are_told_to_run_is_there() -> None:
    assert len(CONTRIBUTING.splitlines()) <= 80
    told = CONTRIBUTING + (GITHUB / "PULL_REQUEST_TEMPLATE.md").read_text()
    commands = set(re.findall(r"\b(?:scripts|tests)/\w[\w.]*|\.ci/run", told))
    assert {"scripts/install", "scripts/check", "scripts/test", "scripts/release_notes"} <= commands
    assert [name for name in commands if not (ROOT / name).is_file()] == []
    assert [name for name in commands if "tests/" not in name and not os.access(ROOT / name, os.X_OK)] == []
    links = re.findall(r"\]\(([^)#]+)", told)
    assert [link for link in links if not (ROOT / link).exists()] == []
