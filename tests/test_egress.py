"""The guard on its own, and through a real server in a network namespace where a public address can be reached."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
import urllib3.util.connection
from server import ROOT, FileServer

from blip import egress
from blip.egress import Deadline, EgressError, is_public


@pytest.fixture
def installed() -> Iterator[None]:
    """This process's connections through the module, unguarded, for one test."""
    stock = urllib3.util.connection.create_connection
    egress.install(guarded=False)
    yield
    egress.install(guarded=False)
    urllib3.util.connection.create_connection = stock


@pytest.fixture
def guard(installed: None) -> None:  # noqa: ARG001
    """The same, guarded."""
    egress.install(guarded=True)


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


@pytest.mark.usefixtures("guard")
def test_connections_of_requests_are_guarded_and_reach_nobody(files: FileServer) -> None:
    with pytest.raises(EgressError, match=r"^127\.0\.0\.1 leads to 127\.0\.0\.1, which is not a public address$"):
        requests.get(files.url, timeout=5)
    assert files.requests == 0


@pytest.mark.usefixtures("guard")
@pytest.mark.parametrize("host", ["nobody.invalid", "a" * 64, "\u2603" * 70, "a..b"])
def test_names_that_cannot_be_resolved_are_errors_of_the_connection(host: str) -> None:
    with pytest.raises((requests.ConnectionError, requests.exceptions.InvalidURL)):
        requests.get(f"http://{host}/", timeout=5)


@pytest.mark.usefixtures("installed")
def test_a_deadline_ends_connections_that_keep_sending(files: FileServer) -> None:
    for path in ("drip", "drip-headers", "endless"):
        started = time.monotonic()
        with Deadline(0.5) as deadline:
            try:
                with requests.get(f"{files.url}/{path}", stream=True, timeout=10) as response:
                    for _ in response.iter_content(1 << 16):
                        pass
            except requests.RequestException:
                pass
        assert deadline.expired
        assert time.monotonic() - started < 10


@pytest.mark.usefixtures("installed")
def test_a_deadline_that_is_met_leaves_no_descriptor_and_no_thread(files: FileServer) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        with Deadline(60) as deadline, requests.get(f"{files.url}/pair.jpg", timeout=10) as response:
            assert response.ok
        assert not deadline.expired
    files.close()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_a_server_with_its_guard_on_reaches_public_addresses_only(tmp_path: Path) -> None:
    """Runs guarded_server.py where it may do as it likes with the network."""
    sudo = [] if os.geteuid() == 0 else ["sudo", "-n"]
    unshare = shutil.which("unshare")
    assert unshare, "util-linux is missing"
    inner = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={tmp_path}/inner"]
    ended = subprocess.run(
        [*sudo, unshare, "--net", "--mount", *inner, str(ROOT / "tests" / "guarded_server.py")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert " passed" in ended.stdout
