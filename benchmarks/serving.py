"""A server to measure: started on a free port, watched through /proc, pinned to cores; files and webhooks for it."""

import http.server
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

from benchmarks.coldstart import DEADLINE, ROOT, descendants, running

TIMEOUT = 60.0  # seconds after which a request counts as lost
MIB = 2**20


@dataclass(frozen=True)
class Serving:
    """A READY server on the loopback interface: its port, and the process ids of the server and of its predictor."""

    port: int
    parent: int
    worker: int

    def connect(self) -> HTTPConnection:
        """A connection that is made when it is first used."""
        return HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT)


@contextmanager
def serving(environment: dict[str, str], log: Path) -> Iterator[Serving]:
    """Start `python -m cog.server.http` in the repository root, its output in `log`; kill it at the end.

    `environment` comes on top of this process's; the weights are the demo's unless it or this process says otherwise.
    """
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    settings = {"BLIP_WEIGHTS": "demo", "COG_LOG_LEVEL": "error", **os.environ, **environment, "PORT": str(port)}
    connection, end = HTTPConnection("127.0.0.1", port, timeout=TIMEOUT), time.monotonic() + DEADLINE
    with running([sys.executable, "-m", "cog.server.http"], ROOT, settings, log) as process:
        while (status := health(connection)) != "READY":
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"The server did not become ready ({status}):\n{log.read_text()}")
            time.sleep(0.1)
        yield Serving(port, process.pid, worker_of(process.pid))


def health(connection: HTTPConnection) -> str:
    """What the server says of its health; "no answer" where it says nothing."""
    try:
        connection.request("GET", "/health-check")
        return str(json.loads(connection.getresponse().read())["status"])
    except (OSError, HTTPException):
        connection.close()
        return "no answer"


def post(
    connection: HTTPConnection, path: str, body: bytes, headers: dict[str, str] | None = None
) -> tuple[int, bytes]:
    """POST JSON; the status and the body of the answer.

    Raises:
        OSError, HTTPException: there was no whole answer in time.
    """
    connection.request("POST", path, body, {"Content-Type": "application/json", **(headers or {})})
    answer = connection.getresponse()
    return answer.status, answer.read()


def worker_of(server: int) -> int:
    """The process that holds the predictor; the server's other child is Python's resource tracker."""
    [worker] = [pid for pid in descendants(server) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return worker


def memory(pid: int) -> int:
    """Bytes that the process alone has and has written to (Private_Dirty of smaps_rollup), where leaks are.

    RSS and USS also hold unchanged pages of files, whose number changes with the page cache and with the neighbours.
    """
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(rollup.partition("Private_Dirty:")[2].split()[0]) * 1024


def pin(pid: int, core: int) -> None:
    """Keep all threads of a process, and those that they start, on one core."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(task.name), {core})


class _Handler(http.server.BaseHTTPRequestHandler):
    server: "Peer"

    def do_GET(self) -> None:
        if (body := self.server.files.get(self.path)) is None:
            self._answer(404, b"")
        else:
            self._answer(200, body)

    def do_POST(self) -> None:
        self.server.received(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self._answer(200, b"")

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass


class Peer(http.server.ThreadingHTTPServer):
    """What the server under test asks: serves `files` by path and gives the bodies of webhooks to `received`."""

    request_queue_size = 128

    def __init__(self, files: dict[str, bytes], received: Callable[[dict[str, Any]], None]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files, self.received = files, received
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()
