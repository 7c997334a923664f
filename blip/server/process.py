"""The server's process: how it listens, and how it ends."""

import asyncio
import atexit
import functools
import gc
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence

import structlog
import uvicorn
from cog.server import http as stock
from cog.server.http import Health
from fastapi import FastAPI
from typing_extensions import override

from blip.server.connections import Connection
from blip.server.extending import overrides
from blip.server.memory import give_back

WAKE = signal.SIGUSR2
GARBAGE = (2_000, 50, 50)  # new objects, and younger collections, before a collection; Python's are 700, 10, 10
SWITCH_SECONDS = 0.0005  # a tenth of Python's: the event loop's thread then waits less for those of downloads
LAST_SECONDS = 5  # after the grace period, to tell clients and webhooks what was cut off

log = structlog.get_logger("blip.server")


def heed_interrupts(shutdown_event: threading.Event) -> None:
    """Make SIGINT end the server in order at any time; stock handles it only after the start."""
    signal.signal(signal.SIGINT, stock.signal_set_event(shutdown_event))


@overrides
class Server(stock.Server):
    """Cog's uvicorn server, which ends when its work is done or the grace period is over.

    Stock gives requests in flight five seconds, then waits without limit for the threads of downloads.
    """

    def __init__(self, config: uvicorn.Config) -> None:
        assert isinstance(config.app, FastAPI)
        self._state = config.app.state
        # h11 takes 64 KiB of address and headers; httptools, the default, takes any amount.
        config.http = functools.partial(Connection, self._state.connections)  # type: ignore[assignment]
        config.ws = "none"  # a WebSocket would leave the connections that are counted
        # Stock closes them after five; a proxy that keeps its own for 60 then sends requests into a closing connection.
        config.timeout_keep_alive = self._state.limits.keep_alive_seconds
        super().__init__(config)

    @override
    def start(self) -> None:
        """Serve in a thread, and make sure that signals are noticed.

        Python handles signals in the main thread, which now sleeps; the kernel may deliver one to another thread.
        """
        sys.setswitchinterval(SWITCH_SECONDS)
        signals, self._signals = socket.socketpair()
        self._signals.setblocking(False)
        signal.signal(WAKE, lambda *_: None)
        signal.set_wakeup_fd(self._signals.fileno())
        threading.Thread(target=_wake, args=(signals, threading.get_ident()), daemon=True).start()
        super().start()

    @override
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        # Looking for garbage in all that has been imported takes 100 ms and more, for which everyone waits.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*GARBAGE)
        self._watching = asyncio.create_task(self._state.connections.watch())
        self._giving_back = asyncio.create_task(give_back(self._state.held))
        await super().startup(sockets)

    @override
    def _log_started_message(self, listeners: Sequence[socket.SocketType]) -> None:
        """Name what it listens on; uvicorn says 0.0.0.0, whatever that is."""
        log.info("running on " + " and ".join(sorted(_url(listener) for listener in listeners)))

    @override
    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        cutting = asyncio.create_task(self._cut_off())
        await super().shutdown(sockets)
        cutting.cancel()

    async def _cut_off(self) -> None:
        """End what still runs at the end of the grace period, so that uvicorn has answers to wait for."""
        await asyncio.sleep(self._state.stop_by - time.monotonic())
        self._state.cut_off()

    @override
    def stop(self) -> None:
        """End the server, and then the process.

        The status is 1 when its setup failed, its worker died, a prediction was cut off or a final event is lost.
        """
        grace = self._state.limits.grace_seconds
        setup_failed = self._state.health is Health.SETUP_FAILED  # and was not cut short by this stop
        log.info("waiting for work in flight", grace_seconds=grace)
        self.config.timeout_graceful_shutdown = grace + LAST_SECONDS
        self._state.stop_by = time.monotonic() + grace
        self.should_exit = True
        self._thread.join(grace + 3 * LAST_SECONDS)
        super().stop()  # if it still runs, waits 5 s more and then kills
        for process in multiprocessing.active_children():  # the worker, if it outlived the grace period
            process.kill()
        self._state.files.close()
        sys.stdout.flush()
        # Do what Python does at its exit, except to wait for the threads of downloads.
        atexit._run_exitfuncs()
        failed = setup_failed or self._state.health is Health.DEFUNCT
        os._exit(int(failed or self._state.lost > 0))


def _url(listener: socket.SocketType) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _wake(signals: socket.socket, thread: int) -> None:
    """Wake `thread` for every signal whose number arrives."""
    while number := signals.recv(1):
        if number[0] != WAKE:
            signal.pthread_kill(thread, WAKE)
