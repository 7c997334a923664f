"""Where the server may connect to, and for how long.

The stock server connects to whatever address a request names. A `Session` of this module makes every connection, also
for a redirect or to a proxy, to addresses that `Egress.check` allows. A name is resolved once and only the checked
addresses are used, so a name that resolves differently later cannot get past the check.
"""

import contextlib
import io
import ipaddress
import socket
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import partial
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from typing_extensions import override
from urllib3 import HTTPConnectionPool, HTTPSConnectionPool, PoolManager
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import ConnectTimeoutError, NameResolutionError, NewConnectionError

from blip.server.names import Names

INNER = [  # networks that Python 3.11 takes for global
    *map(ipaddress.ip_network, ("192.0.0.0/24", "192.88.99.0/24", "3fff::/20")),
    ipaddress.ip_network("168.63.129.16"),  # answers inside of Azure only
]
NOTICE_SECONDS = 0.1  # after which a thread that waits for a name notices that it is to end
MAX_ADDRESSES = 4  # of a name are tried; it may have thousands
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052; its last 32 bits are an IPv4 address

#: A connection's host, port and the options of urllib3's create_connection -> a socket.
Connect = Callable[..., socket.socket]


class EgressError(Exception):
    """An address that the server does not connect to; the message says which and why."""


def is_public(address: str) -> bool:
    """Whether an IP address is reachable by everyone: not loopback, link-local, private, reserved or multicast.

    For an IPv6 address that stands for an IPv4 address (mapped, NAT64, 6to4), the IPv4 address decides.
    """
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ipaddress.IPv4Address(ip.packed[-4:]) if ip in NAT64 else ip.ipv4_mapped or ip.sixtofour
        if inner:
            return is_public(str(inner))
        if ip.is_site_local:
            return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or any(ip in network for network in INNER))


class Egress:
    """Outgoing connections of this process; if `guarded`, to public addresses only."""

    def __init__(self, *, guarded: bool) -> None:
        self._guarded = guarded
        self._names = Names()

    def look_up(self, host: str, port: int) -> "Future[list[str]]":
        """The addresses of `host`, not checked yet; the future has an OSError where there are none."""
        return self._names.look_up(host, port)

    def check(self, host: str, addresses: list[str]) -> None:
        """Check that the server may connect to all addresses of `host`.

        Raises:
            EgressError: one of them is not public while connections are guarded.
        """
        for address in addresses:
            if self._guarded and not is_public(address):
                raise EgressError(f"{host} leads to {address}, which is not a public address")

    def session(self, seconds: float) -> "Session":
        """A session for one request, whose connections end when `seconds` have passed."""
        return Session(self, Deadline(seconds))


class Deadline:
    """Ends the connections that it watches when `seconds` have passed since `start`, or before.

    A socket's timeout restarts with every byte; this one does not. `expired` says whether the time ran out.
    """

    def __init__(self, seconds: float) -> None:
        self.expired = False
        self._lock = threading.Lock()
        self._connections: list[socket.socket] = []
        self._timer = threading.Timer(seconds, self.expire)
        self._timer.daemon = True

    def start(self) -> None:
        """Start the clock."""
        self._timer.start()

    def stop(self) -> None:
        """Stop the clock and release all connections."""
        self._timer.cancel()
        del self._timer  # it knows this deadline, which would then stay as garbage
        with self._lock:
            for connection in self._connections:
                connection.close()

    def watch(self, connection: socket.socket) -> None:
        """End `connection`, too, when the time is up."""
        with self._lock:
            # A duplicate, because TLS takes the descriptor out of the socket object that it is given.
            self._connections.append(connection.dup())
        if self.expired:
            self.expire()

    def expire(self) -> None:
        """End the connections now, from any thread, also while they are being made."""
        with self._lock:
            self.expired = True
            for connection in self._connections:
                with contextlib.suppress(OSError):  # it has ended by itself
                    connection.shutdown(socket.SHUT_RDWR)


class Session(requests.Session):
    """One request and its redirects, in a `with` block, through an `Egress` and within a `Deadline`."""

    def __init__(self, egress: Egress, deadline: Deadline) -> None:
        super().__init__()
        self._egress = egress
        self.deadline = deadline
        self.hooks["response"] = [_drop_redirect_body]
        for scheme in ("http://", "https://"):
            self.mount(scheme, _Adapter(self._connect))

    @override
    def __enter__(self) -> "Session":
        self.deadline.start()
        return self

    @override
    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        # What would stay as garbage otherwise: the adapters know this session, and urllib3's frames their exceptions.
        self.adapters.clear()
        failure: BaseException | None = error[1]
        while failure:
            traceback.clear_frames(failure.__traceback__)
            failure = failure.__cause__ or failure.__context__
        self.deadline.stop()

    def _connect(self, address: tuple[str, int], **options: Any) -> socket.socket:
        """urllib3's create_connection, to addresses that the server may connect to, within the deadline."""
        host, port = address
        addresses = self._resolve(host, port)
        self._egress.check(host, addresses)
        if not addresses:
            raise OSError(f"{host} has no address")
        *others, last = addresses[:MAX_ADDRESSES]
        for numeric in others:
            with contextlib.suppress(OSError):
                return self._connect_to(numeric, port, **options)
        return self._connect_to(last, port, **options)

    def _resolve(self, host: str, port: int) -> list[str]:
        addresses = self._egress.look_up(host, port)
        while not self.deadline.expired:
            wait([addresses], NOTICE_SECONDS)
            if addresses.done():
                return addresses.result()
        addresses.cancel()
        raise TimeoutError("the time is up")

    def _connect_to(
        self, numeric: str, port: int, timeout: float, source_address: Any, socket_options: Any
    ) -> socket.socket:
        family, kind, protocol, _, address = socket.getaddrinfo(
            numeric, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
        )[0]
        connection = socket.socket(family, kind, protocol)
        try:
            self.deadline.watch(connection)
            if self.deadline.expired:
                raise TimeoutError("the time is up")
            for option in socket_options or ():
                connection.setsockopt(*option)
            connection.settimeout(timeout)
            if source_address:
                connection.bind(source_address)
            connection.connect(address)
        except BaseException:
            connection.close()
            raise
        return connection


def _drop_redirect_body(response: requests.Response, **_: Any) -> None:
    """Close a redirect's body unread (a response hook): requests would read all of it before it follows."""
    if response.is_redirect:
        answer = response.raw._original_response
        response.close()
        response.raw = _Drained(answer)


class _Drained(io.BytesIO):
    """The body of an answer whose body is of no interest; requests reads the cookies from the answer's headers."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self._original_response = answer


class _Adapter(HTTPAdapter):
    """An adapter of requests that connects through `connect`, to hosts and to proxies."""

    def __init__(self, connect: Connect) -> None:
        self._connect = connect
        super().__init__()

    @override
    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        super().init_poolmanager(*args, **options)
        self._equip(self.poolmanager)

    @override
    def proxy_manager_for(self, proxy: str, **options: Any) -> Any:
        return self._equip(super().proxy_manager_for(proxy, **options))

    def _equip(self, manager: PoolManager) -> PoolManager:
        pools = {"http": partial(_Pool, self._connect), "https": partial(_SecurePool, self._connect)}
        manager.pool_classes_by_scheme = pools  # type: ignore[assignment] # called like classes
        return manager


class _Pool(HTTPConnectionPool):
    """A pool whose connections are given `connect`."""

    def __init__(self, connect: Connect, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.conn_kw["connect"] = connect


class _SecurePool(_Pool, HTTPSConnectionPool):
    """The same for https."""


class _Connection(HTTPConnection):
    def __init__(self, *args: Any, connect: Connect, **options: Any) -> None:
        super().__init__(*args, **options)
        self._connect = connect

    @override
    def _new_conn(self) -> socket.socket:
        return _open(self, self._connect)


class _SecureConnection(_Connection, HTTPSConnection):
    pass


_Pool.ConnectionCls = _Connection
_SecurePool.ConnectionCls = _SecureConnection


def _open(connection: HTTPConnection, connect: Connect) -> socket.socket:
    """What `HTTPConnection._new_conn` does, with the exceptions that requests knows."""
    host = connection.host
    try:
        return connect(
            (connection._dns_host, connection.port),
            timeout=connection.timeout,
            source_address=connection.source_address,
            socket_options=connection.socket_options,
        )
    except socket.gaierror as error:
        raise NameResolutionError(host, connection, error) from error
    except TimeoutError as error:
        raise ConnectTimeoutError(connection, f"Connecting to {host} took too long.") from error
    except OSError as error:
        raise NewConnectionError(connection, f"Connecting to {host} failed: {error}") from error
