"""Where the server may connect to, and for how long.

The stock server connects to whatever address a request names. `install` puts `connect` in the place of urllib3's
create_connection, through which requests makes every connection, that of a redirect too: a name is resolved once, and
only the addresses that were checked are connected to, so a name that resolves differently later gains nothing.
"""

import contextlib
import io
import ipaddress
import socket
import threading
from types import TracebackType
from typing import Any

import requests
import urllib3.util.connection
from urllib3.util.connection import create_connection

INNER = [  # which Python 3.11 calls global
    *map(ipaddress.ip_network, ("192.0.0.0/24", "192.88.99.0/24", "3fff::/20")),
    ipaddress.ip_network("168.63.129.16"),  # answers inside of Azure only
]
MAX_ADDRESSES = 4  # of a name are tried; it may have thousands
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052; its last 32 bits are an IPv4 address


class EgressError(Exception):
    """An address that the server does not connect to; the message says which and why."""


class _State(threading.local):
    deadline: "Deadline | None" = None


_state = _State()
_guarded = False


def install(guarded: bool) -> None:
    """Send every later connection of this process through `connect`; `guarded` limits them to public addresses."""
    global _guarded
    _guarded = guarded
    urllib3.util.connection.create_connection = connect


def is_public(address: str) -> bool:
    """Whether an IP address is reachable by everyone: not loopback, link-local, private, reserved or multicast.

    An IPv6 address that stands for an IPv4 address (mapped, NAT64, 6to4) is what that one is.
    """
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ipaddress.IPv4Address(ip.packed[-4:]) if ip in NAT64 else ip.ipv4_mapped or ip.sixtofour
        if inner:
            return is_public(str(inner))
        if ip.is_site_local:
            return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or any(ip in network for network in INNER))


def resolve(host: str, port: int) -> list[str]:
    """The addresses of `host`, when the server may connect to all of them.

    Raises:
        EgressError: one of them is not public while connections are guarded.
        OSError: the name cannot be resolved.
    """
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
    except UnicodeError as error:
        raise socket.gaierror(socket.EAI_NONAME, "not a host name") from error
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    for address in addresses:
        if _guarded and not is_public(address):
            raise EgressError(f"{host} leads to {address}, which is not a public address")
    return addresses


def connect(address: tuple[str, int], *arguments: Any, **options: Any) -> socket.socket:
    """urllib3's create_connection, to the addresses that `resolve` allows; the thread's deadline applies."""
    host, port = address
    failure: OSError | None = None
    for numeric in resolve(host, port)[:MAX_ADDRESSES]:
        if _state.deadline and _state.deadline.expired:
            raise TimeoutError("the time is up")
        try:
            connection = create_connection((numeric, port), *arguments, **options)
        except OSError as error:
            failure = error
            continue
        if _state.deadline:
            _state.deadline.watch(connection)
        return connection
    raise failure or OSError(f"{host} has no address")


def drop_redirect_body(response: requests.Response, **_: Any) -> None:
    """A hook for requests, which reads the body of a redirect, of whatever size, before it follows it."""
    if response.is_redirect:
        response.close()
        response.raw = io.BytesIO()


class Deadline:
    """Ends the connections that this thread makes in a `with` block when `seconds` have passed.

    Timeouts of sockets start anew with every byte; this one does not. `expired` says whether it came to that.
    """

    def __init__(self, seconds: float) -> None:
        self.expired = False
        self._lock = threading.Lock()
        self._connections: list[socket.socket] = []
        self._timer = threading.Timer(seconds, self._expire)
        self._timer.daemon = True

    def __enter__(self) -> "Deadline":
        _state.deadline = self
        self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _state.deadline = None
        self._timer.cancel()
        with self._lock:
            for connection in self._connections:
                connection.close()

    def watch(self, connection: socket.socket) -> None:
        """Take `connection` into the block."""
        with self._lock:
            # A duplicate, because TLS takes the descriptor out of the socket object that it is given.
            self._connections.append(connection.dup())
        if self.expired:
            self._expire()

    def _expire(self) -> None:
        with self._lock:
            self.expired = True
            for connection in self._connections:
                with contextlib.suppress(OSError):  # it has ended by itself
                    connection.shutdown(socket.SHUT_RDWR)
