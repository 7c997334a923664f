"""Looks host names up in threads of its own, so that a name server that does not answer holds up only its own names."""

import ipaddress
import socket
import threading
import time
from collections import Counter, deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from blip.server.room import Who, who_is

THREADS = 64
THREADS_PER_DOMAIN = 8
SECONDS = 30.0  # after which nobody waits for an answer any more: the time of a whole download


def host_is(host: str, port: int | None) -> Who:
    """Who is behind a host: its domain (the last two labels) or network, and the host with its port."""
    literal = host.strip("[]")
    try:
        ipaddress.ip_address(literal)
    except ValueError:
        return ".".join(literal.lower().rstrip(".").split(".")[-2:]), f"{host}:{port}"
    return who_is(literal)[0], f"{host}:{port}"


@dataclass
class _LookUp:
    host: str
    port: int
    addresses: "Future[list[str]]" = field(default_factory=Future)
    asked: float = field(default_factory=time.monotonic)


class Names:
    """The look-ups that wait or run, by domain."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(THREADS, "names")
        self._lock = threading.Lock()
        self._running: Counter[str] = Counter()
        self._waiting: dict[str, deque[_LookUp]] = {}

    def look_up(self, host: str, port: int) -> "Future[list[str]]":
        """The addresses of a host, each once; the future has an OSError where there are none."""
        look_up = _LookUp(host.strip("[]"), port)
        try:  # a numeric address, in whatever spelling, is found at once
            look_up.addresses.set_result(_addresses(look_up, socket.AI_NUMERICHOST))
        except OSError:
            domain, _ = host_is(host, port)
            with self._lock:
                self._waiting.setdefault(domain, deque()).append(look_up)
            self._start(domain)
        return look_up.addresses

    def _start(self, domain: str) -> None:
        """Start what waits for a domain, as far as it may."""
        with self._lock:
            line = self._waiting.get(domain, deque())
            while line and self._running[domain] < THREADS_PER_DOMAIN:
                self._running[domain] += 1
                self._threads.submit(self._run, domain, line.popleft())
            if not line:
                self._waiting.pop(domain, None)

    def _run(self, domain: str, look_up: _LookUp) -> None:
        if look_up.addresses.set_running_or_notify_cancel():
            try:
                if time.monotonic() > look_up.asked + SECONDS:
                    raise TimeoutError("nobody waits for it any more")
                look_up.addresses.set_result(_addresses(look_up))
            except OSError as error:
                look_up.addresses.set_exception(error)
        with self._lock:
            self._running[domain] -= 1
            if not self._running[domain]:
                del self._running[domain]
        self._start(domain)


def _addresses(look_up: _LookUp, flags: int = 0) -> list[str]:
    try:
        found = socket.getaddrinfo(look_up.host, look_up.port, type=socket.SOCK_STREAM, flags=flags)
    except UnicodeError as error:
        raise socket.gaierror(socket.EAI_NONAME, "not a host name") from error
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))
