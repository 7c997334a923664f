"""A real server process, a real file server and a real webhook receiver for the tests."""

import base64
import contextlib
import gzip
import http.server
import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import requests

from benchmarks.serving import worker_of

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
        environment = {
            "BLIP_WEIGHTS": "demo",
            "BLIP_DEVICE": "cpu",
            "BLIP_EGRESS": "any",
            **self.environment,
            "PORT": str(self.port),
        }
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

    @property
    def processes(self) -> list[int]:
        """The server's own process and its predictor's."""
        return [self.process.pid, worker_of(self.process.pid)]

    def peak_memory(self) -> list[int]:
        """The most memory that each of `processes` had so far, in bytes."""
        statuses = [Path(f"/proc/{pid}/status").read_text() for pid in self.processes]
        return [int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024 for status in statuses]

    def predict(self, *, headers: dict[str, str] | None = None, **body: Any) -> requests.Response:
        """POST /predictions; `body` is the request's JSON beside `input`."""
        return requests.post(f"{self.url}/predictions", json=body, headers=headers, timeout=DEADLINE)


class Receiver:
    """A webhook receiver that keeps the JSON bodies it is sent, in order.

    `answers` are the statuses, or the addresses to redirect to, of its first answers; the others are 200. Nothing is
    answered until `release` is set, where `held` asks for that.
    """

    def __init__(
        self, *answers: int | str, address: str = "127.0.0.1", port: int = 0, held: bool = False, **headers: str
    ) -> None:
        received: queue.Queue[dict[str, Any]] = queue.Queue()
        tokens: list[str | None] = []
        coming, release = list(answers), threading.Event()
        if not held:
            release.set()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                received.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                tokens.append(self.headers["Authorization"])
                answer = coming.pop(0) if coming else 200
                release.wait(DEADLINE)
                self.send_response(answer if isinstance(answer, int) else 302)
                for name, value in {"Content-Length": "0", **headers}.items():
                    self.send_header(name.replace("_", "-"), value)
                if isinstance(answer, str):
                    self.send_header("Location", answer)
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
                pass

        self.release, self.tokens = release, tokens
        self._received = received
        self._server = http.server.ThreadingHTTPServer((address, port), Handler)
        self.url = f"http://{address}:{self._server.server_address[1]}/hook"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def until_completed(self) -> list[dict[str, Any]]:
        """The bodies up to and with the first that has a final status."""
        bodies = []
        while True:
            bodies.append(self._received.get(timeout=DEADLINE))
            if bodies[-1]["status"] in ("succeeded", "failed", "canceled"):
                return bodies

    def is_empty(self) -> bool:
        """Whether nothing came that was not asked for."""
        return self._received.empty()

    def close(self) -> None:
        """Stop receiving."""
        self.release.set()
        self._server.shutdown()
        self._server.server_close()


class FileServer:
    """Serves the example images at /NAME, and misbehaves at the paths of `Handler.do_GET`."""

    def __init__(self, address: str = "127.0.0.1", port: int = 0) -> None:
        release, files = threading.Event(), self
        self.requests = 0

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                files.requests += 1
                with contextlib.suppress(ConnectionError):  # the other side may hang up at any point
                    what, _, rest = self.path[1:].partition("/")
                    if what == "held":  # until `release` is set
                        release.wait(DEADLINE)
                    if what == "status":  # /status/404
                        self.answer(int(rest), b"")
                    elif what == "redirect":  # /redirect/URL
                        self.answer(302, b"", Location=urllib.parse.unquote(rest))
                    elif what == "loop":
                        self.answer(302, b"", Location="/loop")
                    elif what == "huge":  # says so
                        self.answer(200, b"", Content_Length=str(10**12))
                    elif what == "endless":  # does not say so
                        self.answer(200, b"", Content_Length=None)
                        while not release.is_set():
                            self.wfile.write(bytes(1 << 16))
                    elif what == "drip":  # never pauses for long, and never ends
                        self.answer(200, b"", Content_Length=None)
                        self.drip()
                    elif what == "drip-headers":
                        self.drip()
                    elif what == "cut":  # breaks off
                        self.answer(200, bytes(10), Content_Length="1000")
                    elif what == "junk":
                        self.wfile.write(b"\x00\xff\r\n\r\n" * 100)
                    elif what == "crumbs":
                        self.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
                        while not release.is_set():
                            self.wfile.write(b"1\r\nx\r\n" * 1000)
                    elif what == "redirect-bomb":
                        body = gzip.compress(bytes(400_000_000), 1)
                        self.answer(302, body, Location="/pair.jpg", Content_Encoding="gzip")
                    elif what == "redirect-endless":
                        self.answer(302, b"", Location="/pair.jpg", Content_Length=None)
                        while not release.is_set():
                            self.wfile.write(bytes(1 << 16))
                    elif what == "gzip":  # unasked
                        self.answer(200, gzip.compress(bytes(10**7)), Content_Encoding="gzip")
                    else:
                        self.answer(200, (EXAMPLES / Path(self.path).name).read_bytes())

            def answer(self, status: int, body: bytes, **headers: str | None) -> None:
                self.send_response(status)
                for name, value in {"Content_Length": str(len(body)), **headers}.items():
                    if value is not None:
                        self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                self.wfile.write(body)

            def drip(self) -> None:
                while not release.wait(0.2):
                    self.wfile.write(b"x")

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
                pass

        class Files(http.server.ThreadingHTTPServer):
            address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
            daemon_threads = True
            request_queue_size = 128

        self.release = release
        self._server = Files((address, port), Handler)
        host = f"[{address}]" if ":" in address else address
        self.url = f"http://{host}:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Stop serving; nothing stays held."""
        self.release.set()
        self._server.shutdown()
        self._server.server_close()
