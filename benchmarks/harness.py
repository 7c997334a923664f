"""A real server process, and the peers that it asks, for the tests and the benchmarks alike."""

import base64
import contextlib
import http.server
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from types import TracebackType
from typing import Any

import requests

from benchmarks.processes import peak_memory, worker_of

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
DEADLINE = 180.0  # seconds that anything may take before its caller gives up
START = 600.0  # seconds that a server may take to be READY with full-size weights
TIMEOUT = 60.0  # seconds after which a request on a Connection counts as lost
ENDING = 15.0  # seconds that a server has to end after SIGINT
POLL = 0.05  # seconds between two checks
MIB = 2**20


class Ports:
    """Gives out TCP ports that nothing listens on, none of them twice.

    They lie below those that the kernel gives to outgoing connections, which come and go at any time.
    """

    LOWEST = 10_000

    def __init__(self) -> None:
        above = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
        self._left = list(range(self.LOWEST, max(above, self.LOWEST + 10_000)))
        random.SystemRandom().shuffle(self._left)  # another process has an order of its own

    def free(self) -> int:
        """The next one that can be bound."""
        while True:
            port = self._left.pop()
            with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe, contextlib.suppress(OSError):
                probe.bind(("::", port))
                return port


#: A port that nothing listens on, a different one at every call.
free_port = Ports().free


def wait_until(condition: Callable[[], bool], what: str, seconds: float = DEADLINE) -> None:
    """Poll until `condition` holds; an AssertionError naming `what` after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"gave up waiting for {what}"
        time.sleep(POLL)


def data_uri(path: Path) -> str:
    """The file as a data URI."""
    return f"data:image/{path.suffix[1:]};base64,{base64.b64encode(path.read_bytes()).decode()}"


def chosen(**defaults: str) -> dict[str, str]:
    """Settings for a server that this process's environment may set otherwise."""
    return {name: os.environ.get(name, default) for name, default in defaults.items()}


class Connection(HTTPConnection):
    """A connection to a server on this machine, made when it is first used, and kept."""

    def __init__(self, port: int) -> None:
        super().__init__("127.0.0.1", port, timeout=TIMEOUT)

    def post(self, path: str, body: bytes, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
        """POST JSON; the status and the body of the answer.

        Raises:
            OSError, HTTPException: there was no whole answer in time.
        """
        self.request("POST", path, body, {"Content-Type": "application/json", **(headers or {})})
        answer = self.getresponse()
        return answer.status, answer.read()

    def health(self) -> str:
        """What the server says of its health; "no answer" where it says nothing."""
        status, body = self.look("/health-check")
        return str(json.loads(body)["status"]) if status else "no answer"

    def look(self, path: str) -> tuple[int, bytes]:
        """GET a path; the status and the body of the answer, 0 where there is none."""
        try:
            self.request("GET", path)
            answer = self.getresponse()
            return answer.status, answer.read()
        except (OSError, HTTPException):
            self.close()
            return 0, b""


@dataclass
class Server:
    """`python -m cog.server.http`, as production starts it; ended with the `with` block that it is used in.

    Attributes:
        environment: added to this process's; by default the weights are the demo's, the device is the CPU, and
            pictures and webhooks may be anywhere.
        arguments: of the server's command line.
        port: where it listens.
        directory: where it starts, and finds its cog.yaml and predict.py.
    """

    environment: dict[str, str] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    port: int = field(default_factory=free_port)
    directory: Path = ROOT

    def __enter__(self) -> "Server":
        environment = {
            **os.environ,
            "BLIP_WEIGHTS": "demo",
            "BLIP_DEVICE": "cpu",
            "BLIP_EGRESS": "any",
            **self.environment,
            "PORT": str(self.port),
        }
        if self.directory != ROOT and "PYTHONPATH" not in self.environment:  # the patched server imports blip
            paths = (str(ROOT), environment.get("PYTHONPATH", ""))
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        self._log = tempfile.NamedTemporaryFile(prefix="blip-server-", suffix=".log")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cog.server.http", *self.arguments],
            cwd=self.directory,
            env=environment,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a process group of its own
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)  # also ends a server that awaits an explicit shutdown
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(ENDING)
        with contextlib.suppress(ProcessLookupError):  # nothing is left of it
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._log.close()

    @property
    def url(self) -> str:
        """The server's IPv4 address."""
        return f"http://127.0.0.1:{self.port}"

    def connect(self) -> Connection:
        """A connection of its own, made when it is first used."""
        return Connection(self.port)

    def log(self) -> str:
        """What the server printed so far."""
        return Path(self._log.name).read_text(errors="replace")

    def entries(self) -> list[dict[str, Any]]:
        """The lines of the log so far, each of which is a JSON object; a ValueError where one is not."""
        whole, _, _ = self.log().rpartition("\n")
        return [json.loads(line) for line in whole.splitlines()]

    def health(self) -> dict[str, Any]:
        """The health document; status "no answer" while nothing listens."""
        try:
            body: dict[str, Any] = requests.get(f"{self.url}/health-check", timeout=10).json()
            return body
        except requests.RequestException:
            return {"status": "no answer"}

    def wait_for(self, status: str, seconds: float = DEADLINE) -> None:
        """Poll the health until it is `status`; an AssertionError with the log where it will not be."""

        def reached() -> bool:
            assert self.process.poll() is None, f"the server ended:\n{self.log()}"
            now = self.health()["status"]
            assert now == status or now != "SETUP_FAILED", f"the setup failed:\n{self.log()}"
            return bool(now == status)

        wait_until(reached, f"{status} of the server on port {self.port}", seconds)

    @property
    def processes(self) -> list[int]:
        """The server's own process and its predictor's."""
        return [self.process.pid, worker_of(self.process.pid)]

    def peak_memory(self) -> list[int]:
        """The most memory that each of `processes` had so far, in bytes."""
        return [peak_memory(pid) for pid in self.processes]

    def predict(self, *, headers: dict[str, str] | None = None, **body: Any) -> requests.Response:
        """POST /predictions; `body` is the request's JSON beside `input`."""
        return requests.post(f"{self.url}/predictions", json=body, headers=headers, timeout=DEADLINE)


class Request(http.server.BaseHTTPRequestHandler):
    """One request to a peer, which answers it."""

    server: "Peer"

    def do_GET(self) -> None:
        """Have the peer answer; the other side may hang up at any point."""
        with contextlib.suppress(ConnectionError):
            self.server.get(self)

    def do_POST(self) -> None:
        """Read the JSON and have the peer answer."""
        self.body = self.rfile.read(int(self.headers["Content-Length"]))
        with contextlib.suppress(ConnectionError):
            self.server.post(self, json.loads(self.body))

    def answer(self, status: int, body: bytes = b"", **headers: str | None) -> None:
        """Answer; `Content_Length=None` leaves out that default header."""
        self.send_response(status)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            if value is not None:
                self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Log nothing: requests to peers are not of interest."""


class Peer(http.server.ThreadingHTTPServer):
    """An HTTP server that the server under test connects to, in threads of this process.

    Attributes:
        files: what GET finds, by path.
        received: is given the JSON of every POST.
        url: where it listens.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: str = "127.0.0.1", port: int = 0) -> None:
        self.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        super().__init__((address, port), Request)
        self.files: dict[str, bytes] = {}
        self.received: Callable[[dict[str, Any]], None] = lambda _: None
        host = f"[{address}]" if ":" in address else address
        self.url = f"http://{host}:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(POLL,), daemon=True).start()

    def get(self, request: Request) -> None:
        """Answer a GET."""
        body = self.files.get(request.path)
        request.answer(404 if body is None else 200, body or b"")

    def post(self, request: Request, body: dict[str, Any]) -> None:
        """Answer a POST."""
        self.received(body)
        request.answer(200)

    def close(self) -> None:
        """Stop serving."""
        self.shutdown()
        self.server_close()
