"""What orchestrators ask over HTTP means what scripts/probe means."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import requests

from benchmarks.harness import DEADLINE, EXAMPLES, ROOT, Server, data_uri, free_port
from tests.peers import FileServer

NAMES = {"live": "livez", "ready": "readyz", "started": "startupz"}


def assert_probes_agree(server: Server, status: str, yes: set[str]) -> None:
    for question, path in NAMES.items():
        program = [sys.executable, str(ROOT / "scripts" / "probe"), question]
        ended = subprocess.run(
            program, env={**os.environ, "PORT": str(server.port)}, capture_output=True, text=True, check=False
        )
        assert server.health()["status"] == status, "it has changed meanwhile"
        assert (ended.returncode == 0) == (question in yes), ended.stdout
        for method in ("GET", "HEAD"):
            answer = requests.request(method, f"{server.url}/{path}", timeout=DEADLINE)
            assert answer.status_code == (200 if question in yes else 503)
            assert answer.text == (status if method == "GET" else "")


def test_probes_agree_while_it_starts_and_when_the_start_has_failed(tmp_path: Path) -> None:
    nobody = f"http://127.0.0.1:{free_port()}"
    environment = {"BLIP_WEIGHTS": "pretrained", "BLIP_CACHE": str(tmp_path), "BLIP_MIRROR": nobody}
    with Server(environment, ("--await-explicit-shutdown", "true")) as server:
        server.wait_for("STARTING")
        refused = server.predict(input={"image": data_uri(EXAMPLES / "pair.jpg")})
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
        assert refused.json() == {"detail": "The server is starting; send it again when /readyz answers 200"}
        assert_probes_agree(server, "STARTING", {"live"})
        server.wait_for("SETUP_FAILED")
        assert_probes_agree(server, "SETUP_FAILED", set())
        put = requests.put(f"{server.url}/predictions/one", json={"input": {}}, timeout=DEADLINE)
        assert (put.status_code, put.json()["detail"]) == (503, "The predictor has ended; send it to another server")


def test_probes_agree_when_it_is_ready_and_when_it_is_busy(files: FileServer) -> None:
    with Server({"COG_MAX_CONCURRENCY": "1"}) as server:
        server.wait_for("READY")
        assert_probes_agree(server, "READY", {"live", "ready", "started"})
        held = {"image": f"{files.url}/held/pair.jpg"}
        assert server.predict(input=held, headers={"Prefer": "respond-async"}).status_code == 202
        assert_probes_agree(server, "BUSY", {"live", "ready", "started"})
        refused = server.predict(input=held)
        assert (refused.status_code, refused.headers["Retry-After"]) == (409, "1")


@pytest.mark.parametrize("path", ["/", "/health-check"])
def test_head_has_the_headers_of_get_and_no_body(server: Server, path: str) -> None:
    get, head = (requests.request(method, server.url + path, timeout=DEADLINE) for method in ("GET", "HEAD"))
    assert (head.status_code, head.content) == (200, b"")
    assert get.headers["Content-Type"] == head.headers["Content-Type"] == "application/json"
