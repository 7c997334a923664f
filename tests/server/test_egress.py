"""The guard on its own, and through a real server in a network namespace where a public address can be reached."""

import contextlib
import gc
import os
import socket
import ssl
import subprocess
from pathlib import Path

import pytest
import requests

from benchmarks.harness import DEADLINE, EXAMPLES
from blip.server.egress import Egress, EgressError, is_public
from tests.namespaces import assert_passes
from tests.peers import FileServer

PAIR = (EXAMPLES / "pair.jpg").read_bytes()


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.255.255.254", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254"),
        *("100.64.0.1", "192.0.2.1", "198.18.0.1", "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255"),
        *("::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "fec0::1", "ff02::1", "2001:db8::1"),
        *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe"),
        *("192.0.0.192", "168.63.129.16", "192.88.99.1", "3fff::1"),
        *("2002:7f00:1::", "2002:a9fe:a9fe::1", "2001:0:7f00:1::"),
    ],
)
def test_addresses_that_not_everyone_can_reach_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "93.184.216.34", "2001:4860:4860::8888", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
def test_addresses_that_everyone_can_reach_are_public(address: str) -> None:
    assert is_public(address)


def test_connections_of_a_session_are_guarded_and_reach_nobody(files: FileServer) -> None:
    guarded = Egress(guarded=True)
    with (
        guarded.session(5) as session,
        pytest.raises(EgressError, match=r"^127\.0\.0\.1 leads to 127\.0\.0\.1, which is not a public address$"),
    ):
        session.get(files.url, timeout=5)
    assert files.requests == 0


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_connections_to_a_proxy_are_guarded_too(
    files: FileServer, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    monkeypatch.setenv(f"{scheme}_proxy", files.url)
    with Egress(guarded=True).session(5) as session, pytest.raises(EgressError, match=r"^127\.0\.0\.1 leads to"):
        session.get(f"{scheme}://93.184.216.34/pair.jpg", timeout=5)
    assert files.requests == 0


def test_a_proxy_of_the_environment_is_used_where_it_may_be(files: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", files.url)
    with Egress(guarded=False).session(DEADLINE) as session:
        assert session.get("http://nobody.invalid/pair.jpg", timeout=DEADLINE).content == PAIR
    assert files.requests == 1


def test_https_is_guarded_and_has_a_deadline_too(files: FileServer, tmp_path: Path) -> None:
    pem = tmp_path / "server.pem"
    make = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    subprocess.run([*make.split(), "-keyout", pem, "-out", tmp_path / "cert"], capture_output=True, check=True)
    pem.write_bytes(pem.read_bytes() + (tmp_path / "cert").read_bytes())
    secure = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    secure.load_cert_chain(pem)
    files.socket = secure.wrap_socket(files.socket, server_side=True)
    url = files.url.replace("http://127.0.0.1", "https://localhost")
    with Egress(guarded=False).session(DEADLINE) as session:
        assert session.get(f"{url}/pair.jpg", verify=str(pem), timeout=DEADLINE).content == PAIR
    with Egress(guarded=False).session(0.5) as session:
        with contextlib.suppress(requests.RequestException):
            session.get(f"{url}/drip", verify=str(pem), timeout=DEADLINE)
        assert session.deadline.expired
    with Egress(guarded=True).session(DEADLINE) as session, pytest.raises(EgressError, match=r"^localhost leads to"):
        session.get(f"{url}/pair.jpg", verify=str(pem), timeout=DEADLINE)


@pytest.mark.parametrize("host", ["nobody.invalid", "a" * 64, "\u2603" * 70, "a..b"])
def test_names_that_cannot_be_resolved_are_errors_of_the_connection(host: str) -> None:
    with (
        Egress(guarded=True).session(DEADLINE) as session,
        pytest.raises((requests.ConnectionError, requests.exceptions.InvalidURL)),
    ):
        session.get(f"http://{host}/", timeout=DEADLINE)


@pytest.mark.parametrize("path", ["drip", "drip-headers", "endless"])
def test_a_deadline_ends_connections_that_keep_sending(files: FileServer, path: str) -> None:
    with Egress(guarded=False).session(0.5) as session:
        with contextlib.suppress(requests.RequestException):
            for _ in session.get(f"{files.url}/{path}", stream=True, timeout=DEADLINE).iter_content(1 << 16):
                pass
        assert session.deadline.expired


def test_a_deadline_that_is_met_leaves_no_descriptor_and_no_thread(files: FileServer) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        with Egress(guarded=False).session(DEADLINE) as session:
            assert session.get(f"{files.url}/pair.jpg", timeout=DEADLINE).ok
            assert not session.deadline.expired
    files.close()
    assert len(os.listdir("/proc/self/fd")) <= before


@pytest.mark.parametrize("way", ["answered", "refused", "late"])
def test_a_request_leaves_nothing_to_the_garbage_collector(files: FileServer, way: str) -> None:
    """A collection that has much to do holds up everyone; what fails often must not leave it much."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent_url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        url = {"answered": f"{files.url}/pair.jpg", "refused": "http://127.0.0.1:1", "late": silent_url}[way]

        def attempt() -> None:
            with contextlib.suppress(requests.RequestException), Egress(guarded=False).session(0.2) as session:
                session.get(url, timeout=5, stream=True).close()

        attempt()
        gc.collect()
        gc.disable()
        try:
            attempt()
            assert gc.collect() == 0
        finally:
            gc.enable()


def test_a_server_with_its_guard_on_reaches_public_addresses_only(tmp_path: Path) -> None:
    """Runs guarded_server.py where it may do as it likes with the network."""
    assert_passes("guarded_server.py", ("net", "mount"), tmp_path)
