"""A server with its guard on, in a network of its own: run by test_egress.py in a new network namespace.

There the loopback interface also has a public address, so that images and webhooks can be had from one, and a name
server whose answers may change is the only one.
"""

import contextlib
import fcntl
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import pytest

from benchmarks.harness import Server
from blip.server.webhooks import SECONDS
from tests.peers import FileServer, Receiver

PUBLIC = "93.184.216.34"
CAPTION = "Caption: a large red circle to the left of a small blue square"
SIOCSIFADDR, SIOCSIFFLAGS, IFF_UP = 0x8916, 0x8914, 1  # <linux/sockios.h>, <linux/if.h>


class NameServer:
    """Answers UDP questions for IPv4 addresses; a name with several answers in turn gives one after the other.

    Names of silent.test are never answered; those of public.test are all the public address.
    """

    names: ClassVar[dict[str, list[list[str]]]] = {
        "public.test": [[PUBLIC]],
        "inner.test": [["10.0.0.1"]],
        "metadata.test": [["169.254.169.254"]],
        "mixed.test": [[PUBLIC, "127.0.0.1"]],
        "rebinding.test": [[PUBLIC], ["127.0.0.1"]],
    }

    def __init__(self) -> None:
        self.asked: list[str] = []
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 53))
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            question, client = self._socket.recvfrom(512)
            labels, at = [], 12
            while length := question[at]:
                labels.append(question[at + 1 : at + 1 + length].decode())
                at += 1 + length
            name, (kind,) = ".".join(labels), struct.unpack_from(">H", question, at + 1)
            if name.endswith(".silent.test"):
                continue
            turns = self.names.get("public.test" if name.endswith(".public.test") else name, [[]])
            addresses = []
            if kind == 1:
                addresses = turns[min(self.asked.count(name), len(turns) - 1)]
                self.asked.append(name)
            header = question[:2] + struct.pack(">HHHHH", 0x8180, 1, len(addresses), 0, 0)
            records = [struct.pack(">HHHIH", 0xC00C, 1, 1, 0, 4) + socket.inet_aton(one) for one in addresses]
            self._socket.sendto(header + question[12 : at + 5] + b"".join(records), client)


def configure(name: str, address: str) -> None:
    """Give an address to the interface and bring it up."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        given = struct.pack("16sH2s4s8x", name.encode(), socket.AF_INET, b"", socket.inet_aton(address))
        fcntl.ioctl(any_socket, SIOCSIFADDR, given)
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sH22x", name.encode(), IFF_UP))


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> NameServer:
    configure("lo", "127.0.0.1")
    configure("lo:1", PUBLIC)
    resolver = tmp_path_factory.mktemp("etc") / "resolv.conf"
    resolver.write_text("nameserver 127.0.0.1\n")
    subprocess.run(["mount", "--bind", str(resolver), str(Path("/etc/resolv.conf").resolve())], check=True)
    return NameServer()


@pytest.fixture(scope="module")
def guarded(names: NameServer) -> Iterator[Server]:  # noqa: ARG001
    with Server({"BLIP_EGRESS": ""}) as server:
        server.wait_for("READY")
        yield server


@pytest.fixture(scope="module")
def public(names: NameServer) -> Iterator[FileServer]:  # noqa: ARG001
    with contextlib.closing(FileServer(PUBLIC, 80)) as serving:
        yield serving


@pytest.fixture(scope="module", params=["127.0.0.1", "::1"])
def inner(names: NameServer, request: pytest.FixtureRequest) -> Iterator[FileServer]:  # noqa: ARG001
    with contextlib.closing(FileServer(request.param)) as serving:
        yield serving


def error_of(server: Server, image: str) -> str:
    body = server.predict(input={"image": image}).json()
    assert body["status"] == "failed"
    return str(body["error"])


def test_public_images_are_fetched_by_address_name_and_redirect(guarded: Server, public: FileServer) -> None:
    for image in (f"{public.url}/pair.jpg", "http://public.test/pair.jpg", f"{public.url}/redirect//pair.jpg"):
        assert guarded.predict(input={"image": image}).json()["output"] == CAPTION


def test_inner_images_are_refused_also_behind_a_redirect(
    guarded: Server, public: FileServer, inner: FileServer
) -> None:
    address = f"{inner.url}/pair.jpg"
    host = inner.url.removeprefix("http://").rpartition(":")[0].strip("[]")
    sentence = (
        f"image may not be downloaded: {host} leads to {host}, which is not a public address; send the file itself."
    )
    assert error_of(guarded, address) == sentence
    assert error_of(guarded, f"{public.url}/redirect/{address}") == sentence
    assert inner.requests == 0


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("localhost", "127.0.0.1"),
        ("127.1", "127.0.0.1"),
        ("2130706433", "127.0.0.1"),
        ("0x7f000001", "127.0.0.1"),
        ("0", "0.0.0.0"),
        ("[::ffff:127.0.0.1]", "::ffff:127.0.0.1"),
        ("inner.test", "10.0.0.1"),
        ("metadata.test", "169.254.169.254"),
        ("169.254.169.254", "169.254.169.254"),
        ("mixed.test", "127.0.0.1"),
        ("224.0.0.1", "224.0.0.1"),
    ],
)
def test_names_and_spellings_of_inner_addresses_are_refused(guarded: Server, host: str, address: str) -> None:
    error = error_of(guarded, f"http://{host}/pair.jpg")
    assert error.startswith("image may not be downloaded: ")
    assert f" leads to {address}, which is not a public address" in error or host == "localhost"


def test_a_name_that_resolves_differently_later_does_not_get_through(
    guarded: Server, public: FileServer, names: NameServer
) -> None:
    with contextlib.closing(FileServer("127.0.0.1", 80)) as inner:
        first = guarded.predict(input={"image": "http://rebinding.test/pair.jpg"}).json()
        assert first["output"] == CAPTION
        assert names.asked.count("rebinding.test") == 1
        assert "127.0.0.1" in error_of(guarded, "http://rebinding.test/pair.jpg")
        names.asked.clear()
        # The redirect resolves the name anew, as the attacker would have it.
        assert "127.0.0.1" in error_of(guarded, "http://rebinding.test/redirect/http://rebinding.test/pair.jpg")
        assert names.asked.count("rebinding.test") == 2
        assert inner.requests == 0
    assert public.requests > 0


def test_inner_webhooks_are_refused_with_422(guarded: Server, public: FileServer) -> None:
    with contextlib.closing(Receiver()) as inner:
        for webhook in (inner.url, "http://inner.test/hook", "http://[::1]/hook", "http://169.254.169.254/latest"):
            answer = guarded.predict(input={"image": f"{public.url}/pair.jpg"}, webhook=webhook)
            assert answer.status_code == 422
            (refusal,) = answer.json()["detail"]
            assert refusal["loc"] == ["body", "webhook"]
            assert refusal["msg"].startswith("webhook may not be called: ")
            assert refusal["msg"].endswith(", which is not a public address; set a public one.")
        assert inner.is_empty()


def test_webhooks_that_turn_inward_later_reach_nobody(guarded: Server, public: FileServer, names: NameServer) -> None:
    with (
        contextlib.closing(Receiver()) as inner,
        contextlib.closing(Receiver(*[inner.url] * 10, address=PUBLIC)) as redirecting,
        contextlib.closing(Receiver(port=8080)) as rebound,
    ):
        names.asked.clear()
        for webhook in (redirecting.url, "http://rebinding.test:8080/hook"):
            body = guarded.predict(input={"image": f"{public.url}/pair.jpg"}, webhook=webhook).json()
            assert body["output"] == CAPTION
        assert [event["status"] for event in redirecting.until_completed()] == ["processing", "succeeded"]
        assert inner.is_empty()
        assert rebound.is_empty()
        assert "webhook refused: rebinding.test leads to 127.0.0.1" in guarded.log()


def test_public_webhooks_are_called(guarded: Server, public: FileServer) -> None:
    with contextlib.closing(Receiver(address=PUBLIC)) as receiver:
        guarded.predict(input={"image": f"{public.url}/pair.jpg"}, webhook=receiver.url)
        assert receiver.until_completed()[-1]["output"] == CAPTION


@pytest.mark.parametrize("domain", ["silent.test", "public.test"])
def test_a_wildcard_of_hosts_that_never_answer_delays_no_other(
    guarded: Server, public: FileServer, domain: str
) -> None:
    """Neither hosts that take connections and are silent, nor names that are never resolved."""
    image = f"{public.url}/pair.jpg"
    with (
        contextlib.closing(Receiver(address=PUBLIC)) as receiver,
        contextlib.closing(socket.create_server((PUBLIC, 0), backlog=1000)) as silent,
        ThreadPoolExecutor(32) as pool,
    ):

        def ask(number: int) -> int:
            hook = f"http://host{number}.{domain}:{silent.getsockname()[1]}/hook"
            answer = guarded.predict(input={"image": image}, webhook=hook, webhook_events_filter=["completed"])
            return answer.status_code

        assert set(pool.map(ask, range(200))) == {200}
        started = time.monotonic()
        guarded.predict(input={"image": image}, webhook=receiver.url, webhook_events_filter=["completed"])
        assert receiver.until_completed()[-1]["output"] == CAPTION
        assert time.monotonic() - started < SECONDS, "an attempt takes as long where nobody waits"
