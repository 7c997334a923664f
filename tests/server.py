"""A real server process, a real file server and a real webhook receiver for the tests."""

import base64
import contextlib
import http.server
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import requests

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
DEADLINE = 180.0  # seconds that anything may take before a test gives up


def free_port() -> int:
    """A TCP port that nothing listens on."""
    with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
        probe.bind(("::", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Poll until `condition` holds; an AssertionError naming `what` after the deadline."""
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, f"gave up waiting for {what}"
        time.sleep(0.05)


def data_uri(path: Path) -> str:
    """The file as a data URI."""
    return f"data:image/{path.suffix[1:]};base64,{base64.b64encode(path.read_bytes()).decode()}"


@dataclass
class Server:
    """`python -m cog.server.http` in the repository root, as production starts it."""

    environment: dict[str, str] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    port: int = field(default_factory=free_port)

    def __enter__(self) -> "Server":
        command = [sys.executable, "-m", "cog.server.http", *self.arguments]
        environment = {"BLIP_WEIGHTS": "demo", "BLIP_DEVICE": "cpu", **self.environment, "PORT": str(self.port)}
        self.log_path = Path(f"/tmp/blip-test-server-{os.getpid()}-{self.port}.log")
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, **environment}, stdout=log, stderr=subprocess.STDOUT
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)  # also ends a server that awaits an explicit shutdown
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.log_path.unlink()

    @property
    def url(self) -> str:
        """The server's IPv4 address."""
        return f"http://127.0.0.1:{self.port}"

    def log(self) -> str:
        """What the server printed so far."""
        return self.log_path.read_text(errors="replace")

    def health(self) -> dict[str, Any]:
        """The health document; status "no answer" while nothing listens."""
        try:
            body: dict[str, Any] = requests.get(f"{self.url}/health-check", timeout=10).json()
            return body
        except requests.RequestException:
            return {"status": "no answer"}

    def wait_for(self, status: str) -> None:
        """Poll the health until it is `status`."""

        def reached() -> bool:
            assert self.process.poll() is None, f"the server ended:\n{self.log()}"
            return bool(self.health()["status"] == status)

        wait_until(reached, f"{status}; the server said:\n{self.log()}")

    def predict(self, *, headers: dict[str, str] | None = None, **body: Any) -> requests.Response:
        """POST /predictions; `body` is the request's JSON beside `input`."""
        return requests.post(f"{self.url}/predictions", json=body, headers=headers, timeout=DEADLINE)


class Receiver:
    """A webhook receiver that keeps the JSON bodies it is sent, in order."""

    def __init__(self) -> None:
        received: queue.Queue[dict[str, Any]] = queue.Queue()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                received.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
                pass

        self._received = received
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/hook"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def until_completed(self) -> list[dict[str, Any]]:
        """The bodies up to and with the first that has a final status."""
        bodies = []
        while True:
            bodies.append(self._received.get(timeout=DEADLINE))
            if bodies[-1]["status"] in ("succeeded", "failed", "canceled"):
                return bodies

    def close(self) -> None:
        """Stop receiving."""
        self._server.shutdown()
        self._server.server_close()


class FileServer:
    """Serves the example images at /NAME; below /held/ an answer waits until `release` is set."""

    def __init__(self) -> None:
        release = threading.Event()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path.startswith("/held/"):
                    release.wait(DEADLINE)
                body = (EXAMPLES / Path(self.path).name).read_bytes()
                self.send_response(200)
                self.send_header("Content-Type", "image/jpeg")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                with contextlib.suppress(BrokenPipeError):  # a test that kills servers kills its client
                    self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
                pass

        self.release = release
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Stop serving; nothing stays held."""
        self.release.set()
        self._server.shutdown()
        self._server.server_close()
