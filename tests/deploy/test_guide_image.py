"""The image that the Dockerfile of SaladCloud's guide makes with our files; scripts/test_container builds it."""

import os
import re
from collections.abc import Iterator

import pytest
import requests

from benchmarks.harness import ROOT, free_port
from tests.deploy.test_container import CAPTION, PAIR, REFERENCE_PROBE, Container

IMAGE = os.environ.get("BLIP_TEST_GUIDE_IMAGE", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not IMAGE, reason="needs an image; scripts/test_container builds it"),
]
#: The commands that docs/saladcloud.md gives for the probes.
PROBES = [
    command
    for row in re.findall(
        r"^\| (?:startup|liveness|readiness) \|.*", (ROOT / "docs/saladcloud.md").read_text(), re.MULTILINE
    )
    for command in re.findall("`(.*?)`", row)
]


@pytest.fixture(scope="module")
def followed() -> Iterator[Container]:
    """A container of the image, with a published port."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    container = Container("-p", f"{port}:5000", url=url, image=IMAGE, probe="/app/scripts/probe")
    yield container
    container.remove()


def test_it_is_ready_and_captions_a_picture(followed: Container) -> None:
    assert requests.get(f"{followed.url}/health-check", timeout=10).json()["status"] == "READY"
    assert followed.predict(input={"image": PAIR}).json()["output"] == CAPTION


def test_it_listens_on_ipv4_and_ipv6_whatever_the_guides_sed_did(followed: Container) -> None:
    for host in ("127.0.0.1", "[::1]"):
        asked = followed.run("curl", "-fsS", f"http://{host}:5000/health-check")
        assert '"status":"READY"' in asked.stdout, asked.stderr


def test_the_guides_own_probe_works_word_for_word(followed: Container) -> None:
    assert followed.run("python", "-c", REFERENCE_PROBE).returncode == 0


def test_each_probe_of_the_document_says_yes(followed: Container) -> None:
    assert len(PROBES) == 6
    for command in PROBES:
        ended = followed.run(*command.split())
        assert ended.returncode == 0, (command, ended.stderr)


def test_the_probe_with_curl_says_no_where_nothing_listens(followed: Container) -> None:
    (ready,) = [command for command in PROBES if command.startswith("curl") and "readyz" in command]
    assert followed.run(*ready.replace(":5000", ":5001").split()).returncode != 0
