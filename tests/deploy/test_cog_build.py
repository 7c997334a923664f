"""The image that the cog CLI makes of cog.yaml; scripts/test_container builds it by the CLI's steps and starts this."""

import os
from collections.abc import Iterator

import pytest

from benchmarks.harness import ROOT
from tests.deploy.cog_cli import requirements
from tests.deploy.test_container import CAPTION, PAIR, Container

IMAGE = os.environ.get("BLIP_TEST_COG_IMAGE", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not IMAGE, reason="needs an image; scripts/test_container builds it"),
]


@pytest.fixture(scope="module")
def built() -> Iterator[Container]:
    container = Container("--network", "none", "-e", "BLIP_WEIGHTS=demo", image=IMAGE)
    yield container
    container.remove()


def test_it_starts_with_the_patched_server_and_answers_on_ipv4_and_ipv6(built: Container) -> None:
    code = (
        "import requests, sys; "
        "print(requests.post(f'http://{sys.argv[1]}:5000/predictions', json={'input': {'image': sys.argv[2]}})"
        ".json()['output'])"
    )
    for host in ("[::1]", "127.0.0.1"):
        assert built.run("python", "-c", code, host, PAIR).stdout == f"{CAPTION}\n"


def test_it_has_the_packages_of_the_lock_and_no_others(built: Container) -> None:
    frozen = built.run("python", "-m", "pip", "freeze", "--all").stdout.lower().replace("_", "-").split()
    theirs = {"pip", "uv"}  # of the environment that stands in for the CLI's
    wanted = {line.lower().replace("_", "-") for line in requirements((ROOT / "requirements.txt").read_text())}
    assert {line for line in frozen if line.partition("==")[0] not in theirs} ^ wanted <= {"cog==0.16.12"}
