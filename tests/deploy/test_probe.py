"""scripts/probe against servers of every kind."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from benchmarks.harness import ROOT, Server
from tests.deploy.refusing import refusing_port

PROBE = [sys.executable, str(ROOT / "scripts" / "probe")]


def probe(question: str, port: int | str) -> tuple[int, str]:
    ended = subprocess.run(
        [*PROBE, question], env={**os.environ, "PORT": str(port)}, capture_output=True, text=True, check=False
    )
    assert ended.stderr == ""
    assert ended.stdout.count("\n") == 1, "one line"
    return ended.returncode, ended.stdout.rstrip("\n")


@contextmanager
def answering(answer: bytes, host: str = "127.0.0.1", pause: float = 0) -> Iterator[int]:
    """A server that sends these bytes to everyone, one by one with a pause between them if there is one."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:  # closed
                    return
                with connection:
                    try:
                        connection.recv(4096)
                        for byte in answer if pause else ():
                            connection.sendall(bytes([byte]))
                            time.sleep(pause)
                        connection.sendall(b"" if pause else answer)
                    except OSError:  # the probe has gone
                        pass

        threading.Thread(target=serve, daemon=True).start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)


def document(status: str) -> bytes:
    """A health document, with a log that would fool a search for words."""
    body = json.dumps({"status": status, "setup": {"logs": 'READY "status":"READY" BUSY\n'}}).encode()
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n" + body


@pytest.mark.parametrize(
    ("status", "ready", "live", "started"),
    [
        ("READY", True, True, True),
        ("BUSY", True, True, True),
        ("STARTING", False, True, False),
        ("SETUP_FAILED", False, False, False),
        ("DEFUNCT", False, False, True),
        ("UNHEALTHY", False, False, True),
        ("UNKNOWN", False, False, False),
    ],
)
def test_each_status_has_its_three_answers(status: str, ready: bool, live: bool, started: bool) -> None:
    with answering(document(status)) as port:
        for question, expected in (("ready", ready), ("live", live), ("started", started)):
            line = f"{question}: {status}" if expected else f"not {question}: the server's status is {status}"
            assert probe(question, port) == (0 if expected else 1, line)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_either_family_of_addresses_will_do(host: str) -> None:
    with answering(document("READY"), host) as port:
        assert probe("ready", port) == (0, "ready: READY")


@pytest.mark.parametrize("question", ["ready", "live", "started"])
def test_an_absent_server_is_none_of_the_three(question: str) -> None:
    with refusing_port() as port:
        assert probe(question, port) == (1, f"not {question}: no server answers at port {port}: Connection refused")


@pytest.mark.parametrize("pause", [0, 0.5], ids=["silent", "dribbling"])
def test_a_server_that_takes_too_long_is_given_up(pause: float) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, answering(document("READY"), pause=0.5) as dribbling:
        port = dribbling if pause else silent.getsockname()[1]
        assert probe("live", port) == (1, f"not live: the server at port {port} gave no answer in 4 s")


def test_every_deployment_gives_the_probe_longer_than_it_takes() -> None:
    files = [ROOT / "Dockerfile", *ROOT.glob("deploy/kubernetes/*.yaml"), *ROOT.glob("deploy/saladcloud/*.json")]
    pattern = re.compile(r'(?:--timeout=|timeoutSeconds: |"timeout_seconds": )(\d+)')
    given = {path.name: {int(seconds) for seconds in pattern.findall(path.read_text())} for path in files}
    for without_pods in ("service.yaml", "monitoring.yaml", "autoscaling.yaml"):
        given.pop(without_pods)
    assert all(given.values()), given
    assert min(set.union(*given.values())) > 4, given


@pytest.mark.parametrize(
    "answer",
    [b"", b"SSH-2.0\r\n", b"HTTP/1.1 200 OK\r\n\r\nREADY", b"HTTP/1.1 200 OK\r\n\r\n[]", b"HTTP/1.1 200 OK\r\n\r\n{}"],
)
def test_an_answer_that_is_no_health_document_is_a_no(answer: bytes) -> None:
    with answering(answer) as port:
        assert probe("ready", port) == (1, f"not ready: the answer at port {port} is not a health document")


def test_an_http_error_is_a_no() -> None:
    with answering(b"HTTP/1.1 503 Service Unavailable\r\n\r\n" + document("READY")) as port:
        expected = f"not ready: the server at port {port} answers /health-check with HTTP 503"
        assert probe("ready", port) == (1, expected)


def test_a_port_that_is_no_number_is_a_no() -> None:
    assert probe("ready", "http") == (1, "not ready: PORT=http is not a number")


@pytest.mark.parametrize("arguments", [[], ["alive"], ["ready", "live"]])
def test_a_wrong_question_is_a_usage_error(arguments: list[str]) -> None:
    ended = subprocess.run([*PROBE, *arguments], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (2, "usage: scripts/probe ready|live|started\n")


def test_the_probe_imports_little(server: Server) -> None:
    """What Python imports is most of the time that a probe takes."""
    command = [sys.executable, "-X", "importtime", *PROBE[1:], "ready"]
    environment = {**os.environ, "PORT": str(server.port)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (0, "ready: READY\n")
    imported = {line.rpartition("|")[2].strip() for line in ended.stderr.splitlines()}
    assert {"json", "socket"} <= imported
    assert imported.isdisjoint({"argparse", "asyncio", "email", "http", "logging", "ssl", "subprocess", "urllib"})
