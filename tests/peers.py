"""Peers that misbehave: a receiver of webhooks and a file server."""

import gzip
import queue
import threading
import urllib.parse
from pathlib import Path
from typing import Any

from benchmarks.harness import DEADLINE, EXAMPLES, Peer, Request


class Receiver(Peer):
    """A webhook receiver that keeps the JSON bodies it is sent, in order; `requests` has them with their headers.

    `answers` are the statuses, or the addresses to redirect to, of its first answers; the others are 200. Nothing is
    answered until `release` is set, where `held` asks for that.
    """

    def __init__(
        self, *answers: int | str, address: str = "127.0.0.1", port: int = 0, held: bool = False, **headers: str
    ) -> None:
        self.release = threading.Event()
        if not held:
            self.release.set()
        self.tokens: list[str | None] = []
        self.requests: list[tuple[bytes, dict[str, str]]] = []
        self._bodies: queue.Queue[dict[str, Any]] = queue.Queue()
        self._coming, self._headers = list(answers), headers
        super().__init__(address, port)
        self.url += "/hook"

    def post(self, request: Request, body: dict[str, Any]) -> None:
        self.requests.append((request.body, dict(request.headers)))
        self.tokens.append(request.headers["Authorization"])
        answer = self._coming.pop(0) if self._coming else 200
        self._bodies.put(body)  # last: who takes it looks at the others
        self.release.wait(DEADLINE)
        if isinstance(answer, str):
            request.answer(302, b"", Location=answer, **self._headers)
        else:
            request.answer(answer, b"", **self._headers)

    def until_completed(self) -> list[dict[str, Any]]:
        """The bodies up to and with the first that has a final status."""
        bodies = []
        while True:
            bodies.append(self._bodies.get(timeout=DEADLINE))
            if bodies[-1]["status"] in ("succeeded", "failed", "canceled"):
                return bodies

    def is_empty(self) -> bool:
        """Whether nothing came that was not asked for."""
        return self._bodies.empty()

    def close(self) -> None:
        """Stop receiving; nothing stays held."""
        self.release.set()
        super().close()


class FileServer(Peer):
    """Serves the example images at /NAME, and misbehaves at the paths of `get`."""

    def __init__(self, address: str = "127.0.0.1", port: int = 0) -> None:
        self.release = threading.Event()
        self.requests = 0
        self.agents: set[str | None] = set()
        super().__init__(address, port)

    def get(self, request: Request) -> None:
        self.requests += 1
        self.agents.add(request.headers["User-Agent"])
        what, _, rest = request.path[1:].partition("/")
        if what == "held":
            self._hold_back(request)
        elif what == "status":  # /status/404
            request.answer(int(rest))
        elif what == "redirect":  # /redirect/URL
            request.answer(302, Location=urllib.parse.unquote(rest))
        elif what == "cookie" and request.headers["Cookie"] != "seen=1":  # asks for one, and for another try
            request.answer(302, Location=request.path, Set_Cookie="seen=1; Path=/")
        elif what == "loop":
            request.answer(302, Location="/loop")
        elif what == "huge":  # says so
            request.answer(200, Content_Length=str(10**12))
        elif what == "endless":  # does not say so
            request.answer(200, Content_Length=None)
            self._pour(request, bytes(1 << 16))
        elif what == "drip":  # never pauses for long, and never ends
            request.answer(200, Content_Length=None)
            self._drip(request)
        elif what == "drip-headers":
            self._drip(request)
        elif what == "cut":  # breaks off
            request.answer(200, bytes(10), Content_Length="1000")
        elif what == "junk":
            request.wfile.write(b"\x00\xff\r\n\r\n" * 100)
        elif what == "crumbs":
            request.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            self._pour(request, b"1\r\nx\r\n" * 1000)
        elif what == "redirect-bomb":
            body = gzip.compress(bytes(400_000_000), 1)
            request.answer(302, body, Location="/pair.jpg", Content_Encoding="gzip")
        elif what == "redirect-endless":
            request.answer(302, Location="/pair.jpg", Content_Length=None)
            self._pour(request, bytes(1 << 16))
        elif what == "gzip":  # unasked
            request.answer(200, gzip.compress(bytes(10**7)), Content_Encoding="gzip")
        else:
            request.answer(200, (EXAMPLES / Path(request.path).name).read_bytes())

    def _hold_back(self, request: Request) -> None:
        """Send the image when `release` is set; until then so little of it that nobody gives up waiting."""
        image = (EXAMPLES / Path(request.path).name).read_bytes()
        request.answer(200, image[:1], Content_Length=str(len(image)))
        sent = 1
        while not self.release.wait(1):
            request.wfile.write(image[sent : sent + 1])
            sent += 1
        request.wfile.write(image[sent:])

    def _pour(self, request: Request, block: bytes) -> None:
        while not self.release.is_set():
            request.wfile.write(block)

    def _drip(self, request: Request) -> None:
        while not self.release.wait(0.2):
            request.wfile.write(b"x")

    def close(self) -> None:
        """Stop serving; nothing stays held."""
        self.release.set()
        super().close()
