"""The image of the Dockerfile, run as people run it; scripts/test_container builds it and starts this."""

import json
import os
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import requests

from benchmarks.harness import DEADLINE, EXAMPLES, data_uri, free_port, wait_until
from tests.peers import FileServer, Receiver

IMAGE = os.environ.get("BLIP_TEST_IMAGE", "")
PODMAN = os.environ.get("BLIP_TEST_PODMAN", "podman").split()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not IMAGE, reason="needs an image; scripts/test_container builds it"),
]

PAIR = data_uri(EXAMPLES / "pair.jpg")
CAPTION = "Caption: a large red circle to the left of a small blue square"
# The readiness probe of the reference deployment, word for word.
REFERENCE_PROBE = (
    "import requests,sys;sys.exit(0 if 'READY' in requests.get('http://[::1]:5000/health-check').text else -1)"
)


def podman(*arguments: str, given: str = "", check: bool = True) -> subprocess.CompletedProcess[str]:
    ended = subprocess.run(
        [*PODMAN, *arguments], input=given, capture_output=True, text=True, timeout=DEADLINE, check=False
    )
    assert ended.returncode == 0 or not check, ended.stderr
    return ended


class Container:
    """A container of an image; `url` is where the host reaches it, `probe` where scripts/probe is inside."""

    def __init__(self, *options: str, url: str = "", image: str = IMAGE, probe: str = "/src/scripts/probe") -> None:
        self.url = url
        self._probe = probe
        limits = ["--ulimit", "nofile=20000:20000", "--ulimit", "nproc=2000:2000"]
        # podman would have systemd run the HEALTHCHECK; its command is run below.
        started = time.monotonic()
        self.name = podman("run", "-d", "--no-healthcheck", *limits, *options, image).stdout.strip()
        try:
            wait_until(self.is_ready, "READY")
        except AssertionError:
            print(podman("logs", self.name).stdout)
            self.remove()
            raise
        self.seconds_to_ready = time.monotonic() - started

    def is_ready(self) -> bool:
        return self.run(self._probe, "ready").returncode == 0

    def run(self, *command: str, given: str = "") -> subprocess.CompletedProcess[str]:
        """Run a command inside."""
        return podman("exec", "-i", self.name, *command, given=given, check=False)

    def predict(self, headers: dict[str, str] | None = None, **body: Any) -> requests.Response:
        return requests.post(f"{self.url}/predictions", json=body, headers=headers, timeout=DEADLINE)

    def remove(self) -> None:
        podman("rm", "-f", "-t", "1", self.name)


def show(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Print a figure in spite of pytest's capture."""
    with capsys.disabled():
        print(f"\n{line}")


@pytest.fixture(scope="module")
def published() -> Iterator[Container]:
    """On a network of its own with a published port, everything taken away that it does not need."""
    port = free_port()
    hardened = ["--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"]
    container = Container("-p", f"{port}:5000", *hardened, "-v", "/cache", url=f"http://127.0.0.1:{port}")
    yield container
    container.remove()


def test_the_image_says_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    (image,) = json.loads(podman("image", "inspect", IMAGE).stdout)
    show(f"Image size: {image['Size'] / 1e9:.2f} GB", capsys)
    assert image["Config"]["Cmd"] == ["python", "-m", "cog.server.http"]
    assert list(image["Config"]["ExposedPorts"]) == ["5000/tcp"]
    assert image["Config"]["User"] == "10001:10001"
    assert image["Labels"]["org.opencontainers.image.title"] == "blip"
    assert image["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0"


def test_the_host_reaches_the_three_tasks_through_a_published_port(
    published: Container, capsys: pytest.CaptureFixture[str]
) -> None:
    show(f"Time to READY: {published.seconds_to_ready:.1f} s", capsys)
    assert published.predict(input={"image": PAIR}).json()["output"] == CAPTION
    question = {"task": "visual_question_answering", "question": "what color is the circle?"}
    assert published.predict(input={"image": PAIR, **question}).json()["output"] == "Answer: red"
    match = published.predict(input={"image": PAIR, "task": "image_text_matching", "caption": "a red circle"}).json()
    assert re.fullmatch(
        r"The image and text are matched with a probability of \d+\.\d{4}%\.\n"
        r"The image feature and text feature has a cosine similarity of -?\d\.\d{4}\.",
        match["output"],
    )


def test_the_reference_probe_works_inside_word_for_word(published: Container) -> None:
    assert published.run("python", "-c", REFERENCE_PROBE).returncode == 0


def test_the_server_answers_on_ipv6_and_ipv4_inside(published: Container) -> None:
    for host in ("[::1]", "127.0.0.1"):
        code = f"import requests; print(requests.get('http://{host}:5000/health-check').json()['status'])"
        assert published.run("python", "-c", code).stdout == "READY\n"


def test_the_healthcheck_and_every_question_of_the_probe_say_yes(published: Container) -> None:
    (image,) = json.loads(podman("image", "inspect", IMAGE).stdout)
    kind, *command = image["Healthcheck"]["Test"]
    assert (kind, published.run(*command).stdout) == ("CMD", "ready: READY\n")
    for question in ("live", "started"):
        assert published.run("/opt/venv/bin/python", "/src/scripts/probe", question).returncode == 0


@pytest.mark.parametrize("host", ["127.0.0.1:5000", "localhost:5000", "[::1]:5000", "169.254.169.254", "10.0.0.1"])
def test_inner_addresses_are_refused_unless_it_is_told_otherwise(published: Container, host: str) -> None:
    body = published.predict(input={"image": f"http://{host}/a.jpg"}).json()
    assert body["status"] == "failed"
    assert body["error"].startswith("image may not be downloaded: ")
    assert published.predict(input={"image": PAIR}, webhook=f"http://{host}/hook").status_code == 422


def test_the_doctor_finds_the_weights_that_are_baked_in(published: Container) -> None:
    said = published.run("/src/scripts/entrypoint", "python", "-W", "ignore", "-m", "blip", "doctor").stdout
    line = r"^weights +demo \(float16\) for caption, answer, match at /src/weights/demo/?, whole$"
    assert re.search(line, said, re.MULTILINE)


def test_it_runs_as_nobody_special_and_writes_only_where_it_may(published: Container) -> None:
    assert published.run("id", "-u").stdout == "10001\n"
    for directory, writable in {"/tmp": True, "/cache": True, "/src": False, "/opt/venv": False, "/": False}.items():
        assert (published.run("touch", f"{directory}/x").returncode == 0) == writable, directory


def test_it_starts_and_answers_with_no_network_at_all() -> None:
    container = Container("--network", "none", "--read-only", "--tmpfs", "/tmp")
    try:
        code = (
            "import json,requests,sys; "
            "print(requests.post('http://[::1]:5000/predictions', json=json.load(sys.stdin)).json()['output'])"
        )
        body = json.dumps({"input": {"image": PAIR}})
        assert container.run("python", "-c", code, given=body).stdout == f"{CAPTION}\n"
    finally:
        container.remove()


@pytest.fixture
def on_host() -> Iterator[Container]:
    """On the host's network, where it reaches the test's own servers, at a port of our choice."""
    port = free_port()
    options = ["--network", "host", "-e", f"PORT={port}", "-e", "BLIP_EGRESS=any"]
    container = Container(*options, url=f"http://127.0.0.1:{port}")
    yield container
    container.remove()


def test_at_another_port_it_sends_webhooks_and_finishes_work_on_sigterm(
    on_host: Container, receiver: Receiver, files: FileServer
) -> None:
    later = {"Prefer": "respond-async"}
    answer = on_host.predict(later, input={"image": PAIR}, webhook=receiver.url)
    assert answer.status_code == 202
    last = receiver.until_completed()[-1]
    assert (last["status"], last["output"]) == ("succeeded", CAPTION)

    held = {"input": {"image": f"{files.url}/held/pair.jpg"}}
    answers: list[requests.Response] = []
    client = threading.Thread(target=lambda: answers.append(on_host.predict(**held)))
    client.start()
    assert on_host.predict(later, webhook=receiver.url, **held).status_code == 202
    wait_until(lambda: files.requests == 2, "both predictions to fetch their image")
    stopping = threading.Thread(target=podman, args=("stop", "-t", "90", on_host.name))
    stopping.start()

    def refuses() -> bool:
        try:
            requests.get(f"{on_host.url}/health-check", timeout=10)
        except requests.ConnectionError:
            return True
        return False

    wait_until(refuses, "new connections to be refused")
    assert answers == []
    files.release.set()
    client.join(DEADLINE)
    assert answers[0].json()["output"] == CAPTION
    assert receiver.until_completed()[-1]["output"] == CAPTION
    stopping.join(DEADLINE)
    assert podman("inspect", on_host.name, "--format", "{{.State.ExitCode}}").stdout == "0\n"
