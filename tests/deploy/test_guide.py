"""SaladCloud's guide for BLIP with Cog, followed with our files beside it, and what docs/saladcloud.md says of it."""

import re
import shutil
from pathlib import Path

import pytest
import requests

from benchmarks.harness import ROOT, Server
from tests.deploy.test_container import CAPTION, PAIR
from tests.documents import blocks

DOCKERFILE = (ROOT / "tests" / "deploy" / "guide" / "Dockerfile").read_text()
DOCUMENT = ROOT / "docs" / "saladcloud.md"
TEXT = DOCUMENT.read_text()
BENCHMARKS = (ROOT / "docs" / "benchmarks.md").read_text()


@pytest.fixture
def app(tmp_path: Path) -> Path:
    """What the Dockerfile copies into /app, and nothing else."""
    for line in re.findall(r"^COPY (.*)", DOCKERFILE, re.MULTILINE):
        *sources, target = line.replace("${WEIGHTS}", "demo").split()
        for source in sources:
            to = tmp_path / target.removeprefix("/app").strip("/")
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, to, ignore=shutil.ignore_patterns("__pycache__"))
                continue
            if target.endswith("/"):
                to.mkdir(exist_ok=True)
            shutil.copy(ROOT / source, to)
    return tmp_path


def slots(server: Server) -> str:
    """How many predictions may be in progress."""
    found = re.search(r"^blip_slots (\d+)", requests.get(f"{server.url}/metrics", timeout=10).text, re.MULTILINE)
    assert found
    return found[1]


@pytest.mark.parametrize(("whose", "expected"), [("our", "32"), ("the guide's", "1")])
def test_what_the_dockerfile_copies_is_enough_with_either_cog_yaml(app: Path, whose: str, expected: str) -> None:
    if whose == "the guide's":
        (app / "cog.yaml").write_text("build: {gpu: true}\npredict: 'predict.py:Predictor'\n")
    alone = {"PYTHONPATH": "", "BLIP_WEIGHTS": str(app / "weights" / "demo")}
    with Server(alone, directory=app) as server:
        server.wait_for("READY")
        assert server.predict(input={"image": PAIR}).json()["output"] == CAPTION
        assert slots(server) == expected


def test_the_document_has_the_lines_that_are_added_to_the_guides_dockerfile() -> None:
    (lines,) = [block.code.splitlines() for block in blocks(DOCUMENT) if block.language == "dockerfile"]
    base = re.search(r"^ARG BASE_IMAGE=docker.io/(.*)", DOCKERFILE, re.MULTILINE)
    assert base
    known = DOCKERFILE.replace("${BASE_IMAGE}", base[1]).splitlines()
    added = [line for line in lines if not line.startswith("#")]
    assert len(added) > 5
    positions = [known.index(line) for line in added]
    assert positions == sorted(positions)


def test_the_base_is_that_of_our_own_image() -> None:
    (base,) = re.findall(r"^ARG BASE_IMAGE=.*", DOCKERFILE, re.MULTILINE)
    assert base in (ROOT / "Dockerfile").read_text().splitlines()


def test_the_costs_follow_from_what_was_measured() -> None:
    rows = re.findall(r"^\| .* \| (.*?) \| ([\d,.]+) \| ([\d,.]+) . P \|$", TEXT, re.MULTILINE)
    assert len(rows) >= 4
    for measured, rate, hours in rows:
        assert measured in BENCHMARKS
        number = float(measured.split()[0].replace(",", ""))
        per_second = number if re.search("per s|a second", measured) else 1 / number
        assert float(rate.replace(",", "")) == pytest.approx(per_second, rel=0.005)
        assert float(hours.replace(",", "")) == pytest.approx(1e6 / (per_second * 3600), rel=0.005)
