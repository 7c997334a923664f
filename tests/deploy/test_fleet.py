"""Three replicas behind HAProxy under load: one is killed and restarted, one is drained; no request is lost."""

import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

from benchmarks.harness import DEADLINE, EXAMPLES, ROOT, Server, data_uri, free_port, wait_until
from tests.peers import FileServer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("haproxy") is None, reason="needs HAProxy; scripts/test_fleet installs it"),
]

CLIENTS = 6
PAUSE = 0.25  # seconds between a client's requests, on average: the load is steady and bounded
ANSWERS = 40  # of the load, at least, between two events
IMAGE = data_uri(EXAMPLES / "pair.jpg")
#: Of the last text no digit is near where it rounds, which kernels of the replicas might do otherwise.
INPUTS: list[dict[str, Any]] = [
    {"image": IMAGE},
    {"image": IMAGE, "task": "visual_question_answering", "question": "what color is the circle?"},
    {"image": IMAGE, "task": "image_text_matching", "caption": "a red circle and a blue square"},
]


@dataclass
class Answered:
    """One request as its client saw it."""

    phase: str
    replica: str
    problem: str
    seconds: float


class Load:
    """Clients that each send one request after another, and note what came of it."""

    def __init__(self, url: str, expected: list[str]) -> None:
        self.phase = ""
        self.sent = 0
        self.answered: list[Answered] = []
        self._held: list[threading.Thread] = []
        self._url, self._expected = url, expected
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._clients = [threading.Thread(target=self._client, args=(random.Random(n),)) for n in range(CLIENTS)]
        for client in self._clients:
            client.start()

    def _client(self, chance: random.Random) -> None:
        while not self._stop.wait(chance.uniform(0, 2 * PAUSE)):
            choice = chance.randrange(len(INPUTS))
            self._request(INPUTS[choice], self._expected[choice])

    def _request(self, inputs: dict[str, Any], expected: str) -> None:
        with self._lock:
            self.sent += 1
        phase, started = self.phase, time.monotonic()
        replica, problem = self._ask(inputs, expected)
        with self._lock:
            self.answered.append(Answered(phase, replica, problem, time.monotonic() - started))

    def _ask(self, inputs: dict[str, Any], expected: str) -> tuple[str, str]:
        try:
            answer = requests.post(self._url, json={"input": inputs}, timeout=DEADLINE)
        except requests.RequestException as error:
            return "", repr(error)
        right = answer.status_code == 200 and answer.json()["output"] == expected
        return answer.headers.get("X-Served-By", ""), "" if right else f"HTTP {answer.status_code}: {answer.text[:200]}"

    def hold(self, phase: str, files: FileServer) -> None:
        """Begin a phase with requests that stay in flight, some at every replica, until they are let go."""
        self.phase = phase
        files.release.clear()
        arrived = files.requests + CLIENTS
        inputs = {"image": f"{files.url}/held/pair.jpg"}
        self._held = [threading.Thread(target=self._request, args=(inputs, self._expected[0])) for _ in range(CLIENTS)]
        for held in self._held:
            held.start()
        wait_until(lambda: files.requests >= arrived, "the replicas to fetch the images that are held")

    def let_go(self, files: FileServer) -> None:
        """Let the requests that are held go on to their answers."""
        files.release.set()
        for held in self._held:
            held.join(DEADLINE)

    def run(self, phase: str, *replicas: str) -> None:
        """Name what happens from now on, and let it go on until these replicas have all answered, and often."""
        self.phase = phase

        def enough() -> bool:
            answers = self.replicas(phase)
            return answers.total() >= ANSWERS and answers.keys() >= set(replicas)

        wait_until(enough, f"{ANSWERS} answers of {' and '.join(replicas)} while {phase}")

    def stop(self) -> None:
        """Send no more, and wait for the answers."""
        self._stop.set()
        for client in (*self._clients, *self._held):
            client.join(DEADLINE)

    def replicas(self, phase: str) -> Counter[str]:
        """How many requests of a phase each replica answered."""
        with self._lock:
            return Counter(answered.replica for answered in self.answered if answered.phase == phase)

    def report(self) -> str:
        """The counts of every phase."""
        lines = [f"{'phase':<28}{'answered':>9}{'failed':>8}{'slowest':>10}  by replica"]
        for phase in dict.fromkeys(answered.phase for answered in self.answered):
            rows = [answered for answered in self.answered if answered.phase == phase]
            failed = sum(bool(row.problem) for row in rows)
            slowest = max(row.seconds for row in rows)
            shares = ", ".join(f"{name} {count}" for name, count in sorted(self.replicas(phase).items()))
            lines.append(f"{phase:<28}{len(rows):>9}{failed:>8}{slowest:>8.2f} s  {shares}")
        failed = sum(bool(answered.problem) for answered in self.answered)
        lines.append(f"{'all':<28}{len(self.answered):>9}{failed:>8}  of {self.sent} sent")
        return "\n".join(lines)


def replica(port: int) -> Server:
    """A server with one computing thread, so that three share a small machine."""
    environment = {"COG_LOG_LEVEL": "warning", "OMP_NUM_THREADS": "1", "BLIP_EGRESS": "any"}
    return Server({**environment, "BLIP_WEIGHTS": os.environ.get("BLIP_WEIGHTS", "demo")}, port=port)


def kill(server: Server) -> None:
    """SIGKILL the server and its worker process, as when a container is killed."""
    os.killpg(server.process.pid, signal.SIGKILL)
    server.process.wait()


@pytest.fixture
def fleet() -> Iterator[dict[str, Server]]:
    with ExitStack() as stack:
        servers = {name: stack.enter_context(replica(free_port())) for name in ("one", "two", "three")}
        for server in servers.values():
            server.wait_for("READY")
        yield servers


@pytest.fixture
def balancer(fleet: dict[str, Server], tmp_path: Path) -> Iterator[str]:
    """HAProxy with the configuration of deploy/haproxy; only the names of the replicas are the test's."""
    replicas = tmp_path / "replicas.cfg"
    servers = [f"    server {name} 127.0.0.1:{server.port}" for name, server in fleet.items()]
    replicas.write_text("\n".join(["backend blip", *servers]) + "\n")
    port = free_port()
    command = ["haproxy", "-db", "-f", str(ROOT / "deploy" / "haproxy" / "haproxy.cfg"), "-f", str(replicas)]
    process = subprocess.Popen(
        command, env={**os.environ, "BLIP_PORT": str(port)}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        try:
            return requests.get(f"{url}/health-check", timeout=10).status_code == 200
        except requests.ConnectionError:
            return False

    try:
        wait_until(answers, "HAProxy")
        yield url
    finally:
        process.terminate()
        process.wait(DEADLINE)


def test_no_request_is_lost_while_replicas_are_killed_and_drained(
    fleet: dict[str, Server], balancer: str, files: FileServer, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = [fleet["one"].predict(input=inputs).json()["output"] for inputs in INPUTS]
    load = Load(f"{balancer}/predictions", expected)
    try:
        load.run("three replicas", "one", "two", "three")
        load.hold("one is killed", files)
        kill(fleet["one"])
        load.let_go(files)
        load.run("one is gone", "two", "three")
        load.phase = "one starts again"
        fleet["one"].__enter__()  # on its old port; the fixture ends it
        fleet["one"].wait_for("READY")
        load.run("one is back", "one", "two", "three")
        load.hold("two is drained by SIGTERM", files)
        fleet["two"].process.send_signal(signal.SIGTERM)
        wait_until(lambda: fleet["two"].health()["status"] == "no answer", "two to refuse connections")
        load.let_go(files)
        assert fleet["two"].process.wait(DEADLINE) == 0
        load.run("two is gone", "one", "three")
    finally:
        load.stop()
        with capsys.disabled():
            print(f"\n{load.report()}")

    assert [answered.problem for answered in load.answered if answered.problem] == []
    assert len(load.answered) == load.sent
    assert set(load.replicas("one is gone")) == {"two", "three"}
    assert set(load.replicas("two is gone")) == {"one", "three"}
