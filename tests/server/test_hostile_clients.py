"""Clients that say nothing, read nothing or never end: what they hold is bounded, and others are served."""

import contextlib
import json
import resource
import select
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from benchmarks.harness import DEADLINE, EXAMPLES, MIB, Server, data_uri, wait_until
from benchmarks.processes import memory
from blip.server.bodies import BODY_SECONDS
from blip.server.connections import CONNECTIONS, HEAD_SECONDS, SEND_SECONDS
from tests.peers import FileServer

PAIR = data_uri(EXAMPLES / "pair.jpg")
CAPTION = "Caption: a large red circle to the left of a small blue square"
MAX_BYTES = 8_000_000
KEEP_ALIVE = 20  # seconds
GROWTH = 200 * MIB  # several times what all bodies and answers may hold
POST = "POST /predictions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
SCRIPT = b"GET /docs/swagger-ui-bundle.js HTTP/1.1\r\nHost: a\r\n\r\n"
DOCUMENT = b"GET /openapi.json HTTP/1.1\r\nHost: a\r\n\r\n"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server that takes images of 8 MB, so that all bodies and answers may hold 58 MB."""
    environment = {"BLIP_MAX_IMAGE_BYTES": str(MAX_BYTES), "BLIP_KEEP_ALIVE_SECONDS": str(KEEP_ALIVE)}
    with Server(environment) as running:
        running.wait_for("READY")
        yield running
        assert "Exception in ASGI application" not in running.log()


@pytest.fixture
def clients(server: Server) -> Iterator["Clients"]:
    with contextlib.ExitStack() as stack:
        yield Clients(server, stack)


class Clients:
    """Makes connections that take little at a time, and closes them all in the end."""

    def __init__(self, server: Server, stack: contextlib.ExitStack) -> None:
        self._port, self._stack = server.port, stack

    def send(self, data: bytes = b"") -> socket.socket:
        """A connection on which `data` has been sent, as much of it as the server takes."""
        client = self._stack.enter_context(socket.socket())
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(DEADLINE)
        with contextlib.suppress(OSError):  # the server may have closed it
            client.connect(("127.0.0.1", self._port))
            client.settimeout(1)
            client.sendall(data)
        return client


def request(body: bytes, head: str = POST) -> bytes:
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def assert_it_serves(server: Server) -> None:
    def is_served() -> bool:  # what was sent before may still have to be read, and old bodies to grow old
        answer = server.predict(input={"image": PAIR})
        assert answer.status_code in (200, 409)
        return answer.status_code == 200 and answer.json()["output"] == CAPTION

    wait_until(is_served, "a good request to be served")
    assert server.health()["status"] == "READY"


def ends(client: socket.socket, drip: bytes = b"") -> bool:
    """Whether the server has closed a connection, from which one byte is read and to which `drip` is sent."""
    client.setblocking(False)
    with contextlib.suppress(OSError):
        client.send(drip)
        client.recv(1)
    closed = select.poll()
    closed.register(client, select.POLLRDHUP)  # errors are told in any case
    return bool(closed.poll(0))


def test_connections_that_are_slow_in_whatever_way_are_closed_within_their_time(
    server: Server, clients: Clients
) -> None:
    large = json.dumps({"input": {"image": "data:;base64," + "A" * 10_000_000}}).encode()
    slow = {
        "says nothing": (clients.send(), b"", KEEP_ALIVE),
        "half a head": (clients.send(b"GET / HTTP/1.1\r\nHost: a\r\nX-Half: "), b"", HEAD_SECONDS),
        "endless head": (clients.send(b"GET / HTTP/1.1\r\n"), b"a", HEAD_SECONDS),
        "half a body": (clients.send(request(b"{" + b" " * 999)[:-500]), b"", BODY_SECONDS),
        "endless body": (clients.send(request(b"{" + b" " * 99_999)[:-99_000]), b" ", BODY_SECONDS),
        "a body of GET": (clients.send(request(b" " * 99_999, "GET / HTTP/1.1\r\nHost: a\r\n")[:-99_000]), b" ", 0),
        "reads a byte": (clients.send(request(large)), b"", SEND_SECONDS),
        "pipelines": (clients.send(DOCUMENT * 3000), b"", SEND_SECONDS),
    }
    started, left = time.monotonic(), dict(slow)
    while left:
        time.sleep(1)
        for name, (client, drip, seconds) in list(left.items()):
            if ends(client, drip):
                del left[name]
            # Twice: what they have been sent before may still have to be read.
            assert name not in left or time.monotonic() - started < 2 * (seconds + KEEP_ALIVE) + DEADLINE, name
    assert_it_serves(server)


def test_more_connections_than_there_may_be_keep_nobody_out(
    server: Server, clients: Clients, files: FileServer
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    held = clients.send(request(json.dumps({"input": {"image": f"{files.url}/held/pair.jpg"}}).encode()))
    wait_until(lambda: files.requests == 1, "the download")
    try:
        for data in (b"", b"GET / HTTP", request(b"{}")[:-1]):
            flood = [clients.send(data) for _ in range(CONNECTIONS + 200)]
            assert_it_serves(server)
            assert len(list(Path(f"/proc/{server.process.pid}/fd").iterdir())) < CONNECTIONS + 200
            for client in flood:
                client.close()
        files.release.set()
        held.settimeout(DEADLINE)
        assert held.recv(15) == b"HTTP/1.1 200 OK", "who waits for a prediction is not closed"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("way", ["small bodies", "large bodies", "answers", "states", "documents", "scripts"])
def test_what_clients_hold_is_bounded(server: Server, clients: Clients, files: FileServer, way: str) -> None:
    """Each would hold 400 MB and more."""
    assert_it_serves(server)
    before = memory(server.process.pid)
    number, data = 40, DOCUMENT * 10_000
    if way == "small bodies":
        number, data = 450, request(b" " * 999_000)[:-10]
    elif way == "scripts":  # of 1.5 MB
        number, data = 450, SCRIPT * 100
    elif way == "large bodies":
        data = request(b" " * 10_900_000)[:-10]
    elif way == "answers":
        data = request(json.dumps({"input": {"image": "data:;base64," + "A" * 10_600_000}}).encode())
    elif way == "states":  # of a running prediction, which repeat its request
        context = {str(part): "x" * 90_000 for part in range(11)}
        body = {"input": {"image": f"{files.url}/held/pair.jpg"}, "context": context}
        url = f"{server.url}/predictions/held"
        requests.put(url, json={**body, "id": "held"}, headers={"Prefer": "respond-async"}, timeout=DEADLINE)
        head = POST.replace("POST /predictions", "PUT /predictions/held")
        number, data = 450, request(json.dumps({"input": {"image": PAIR}}).encode(), head)
    for _ in range(number):
        clients.send(data)
        assert memory(server.process.pid) < before + GROWTH
    files.release.set()
    assert_it_serves(server)
    assert memory(server.process.pid) < before + GROWTH


def test_a_request_that_two_may_read_differently_is_refused(clients: Clients) -> None:
    smuggling = POST + "Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    client = clients.send(smuggling.encode() + b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    client.settimeout(DEADLINE)
    answer = b"".join(iter(lambda: client.recv(65_536), b""))
    assert answer.startswith(b"HTTP/1.1 400")
    assert answer.count(b"HTTP/1.1") == 1


def test_text_beside_an_image_is_bounded_together(server: Server) -> None:
    context = {str(part): "x" * 90_000 for part in range(12)}
    refused = server.predict(input={"image": PAIR}, context=context)
    assert refused.status_code == 422
    sentence = "the body has more than 1000000 characters beside its image; send fewer."
    assert refused.json()["detail"][0]["msg"] == sentence
