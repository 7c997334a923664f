"""The connections of clients: how many there are, and how long one may take to ask and to read its answer.

uvicorn has a time-out for connections that are idle after an answer, and for nothing else.
"""

import asyncio
import contextlib
import resource
import socket
import struct
import sys
import traceback
from typing import Any

import h11
from starlette.types import ASGIApp, Receive, Scope, Send
from typing_extensions import override
from uvicorn.protocols.http.h11_impl import H11Protocol

from blip.server.extending import overrides
from blip.server.room import Holding, Room, who_is

CONNECTIONS = 1000
DESCRIPTORS = 65_536  # files that are open at a time, where the system allows as many
HEAD_SECONDS = 30.0  # for a request's headers, from their first byte
SEND_SECONDS = 60.0  # for an answer to be read
BUFFER = 65_536  # bytes of an answer that a connection has in any case: asyncio's high-water mark
ABORT = "blip.abort"  # in an ASGI scope: ends the connection, and tells that it did


class Connections:
    """All connections of clients.

    Args:
        answers: the room, in bytes, that answers share while they are not read.
        idle_seconds: how long a connection may ask for nothing.
    """

    def __init__(self, answers: Room, idle_seconds: float) -> None:
        self.answers = answers
        self.idle_seconds = idle_seconds
        self.open: set[Connection] = set()
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        descriptors = DESCRIPTORS if most == resource.RLIM_INFINITY else min(DESCRIPTORS, most)
        resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, most))
        self.room = Room(min(CONNECTIONS, descriptors // 2), patience=0)

    async def watch(self) -> None:
        """End, once a second, those whose time is over."""
        while True:
            await asyncio.sleep(1)
            for connection in list(self.open):
                connection.end_if_overdue()


@overrides
class Connection(H11Protocol):
    """uvicorn's connection, which is counted, gives way when it asks for nothing, and ends when it is overdue."""

    def __init__(self, connections: Connections, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._connections = connections
        self._holding: Holding | None = None
        self._idle_since = self.loop.time()
        self._head_since: float | None = None
        self._unread_since: float | None = None

    @property
    def app(self) -> ASGIApp:
        """What responds: not kept, as it knows the connection, which would then stay as garbage after its end."""
        return self._serve

    @app.setter
    def app(self, respond: ASGIApp) -> None:
        self._respond = respond

    @override
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn's
        super().connection_made(transport)
        address = self.client[0] if self.client else None
        self._holding = self._connections.room.hold(who_is(address), 1, self._give_way)
        self._connections.open.add(self)
        if not self._holding:
            self._abort()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.open.discard(self)
        if self._holding:
            self._holding.let_go()
            self._holding = None  # as with `app`
        super().connection_lost(exc)

    @override
    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._look_for_a_head()

    @override
    def send_400_response(self, msg: str) -> None:
        traceback.clear_frames(sys.exc_info()[2])  # h11's frames know the error, and would stay as garbage
        super().send_400_response(msg)

    @override
    def on_response_complete(self) -> None:
        self._idle_since = self.loop.time()
        super().on_response_complete()
        self._look_for_a_head()
        if self._holding and not self._is_serving():
            self._connections.room.renew(self._holding)

    def end_if_overdue(self) -> None:
        """End the connection when its client has had its time."""
        now = self.loop.time()
        if not self.transport.get_write_buffer_size():
            self._unread_since = None
        elif self._unread_since is None:
            self._unread_since = now
        elif now > self._unread_since + SEND_SECONDS:
            self._abort()
        if self._is_serving():  # a body has its own time
            return
        last = self._idle_since + self._connections.idle_seconds
        if self._head_since is not None:
            last = min(last, self._head_since + HEAD_SECONDS)
        if now > last:
            self.transport.close()

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Respond; what the client has not read then counts until it has, or until it gives way."""
        scope[ABORT] = self._abort
        try:
            await self._respond(scope, receive, send)
        finally:
            del scope[ABORT]  # as with `app`
        unread = self.transport.get_write_buffer_size()
        if unread <= BUFFER:
            return
        client = scope["client"]
        holding = self._connections.answers.hold(who_is(client and client[0]), unread, self._abort, force=True)
        assert holding
        try:
            await self.flow.drain()  # also at the end of the connection
        finally:
            holding.let_go()

    def _look_for_a_head(self) -> None:
        """Note when the headers of a request have begun to come and are not complete."""
        begun = self.conn.their_state is h11.IDLE and bool(self.conn.trailing_data[0])
        if not begun:
            self._head_since = None
        elif self._head_since is None:
            self._head_since = self.loop.time()

    def _is_serving(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _give_way(self) -> bool:
        """End the connection for another one, unless it has sent a whole request that is not answered yet."""
        if self._is_serving() and not self.cycle.more_body:
            return False
        return self._abort()

    def _abort(self) -> bool:
        """End the connection, and have the kernel drop what the client has not read, which may be megabytes."""
        connection = self.transport.get_extra_info("socket")
        with contextlib.suppress(OSError):  # it has ended by itself
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()
        return True
