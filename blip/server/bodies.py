"""Limits on request bodies: their size, and how long they may take."""

import asyncio
from collections.abc import Callable

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from blip.server.refusals import BUSY, refusal

TEXT_BYTES = 1_000_000  # of a request beside its image
VALUES = 20_000  # in a request; refusing a million wrong ones takes many seconds, and everyone waits
BODIES = 4  # of the largest size may be in memory at a time; those below TEXT_BYTES are not counted
BODY_SECONDS = 60.0  # for a body to arrive


class BodyLimit:
    """ASGI middleware: bounds the bodies of requests, one by one and together.

    A refused body is still read, but not kept: a client that is still sending could miss the answer.
    """

    def __init__(self, app: ASGIApp, max_body: int, is_busy: Callable[[], bool]) -> None:
        self._app, self._max_body, self._is_busy = app, max_body, is_busy
        self._held = 0  # bytes of all large bodies that are in memory

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 422 to a body that is too large, 409 when there is no room for it, and 408 when it is too slow."""
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT"):
            await self._app(scope, receive, send)
            return
        body, refused = bytearray(), None
        if scope["path"] == "/predictions" and self._is_busy():
            refused = HTTPException(409, BUSY)
        try:
            async with asyncio.timeout(BODY_SECONDS):
                refused = await self._read(receive, body, refused)
        except ClientDisconnect:
            self._held -= _charge(len(body))
            return
        except TimeoutError:
            refused = HTTPException(408, f"The body did not come within {BODY_SECONDS:g} s")
        charge = _charge(len(body))
        try:
            if refused:
                await JSONResponse({"detail": refused.detail}, refused.status_code)(scope, receive, send)
            else:
                await self._app(scope, _replay(body, receive), send)
        finally:
            self._held -= charge

    async def _read(self, receive: Receive, body: bytearray, refused: HTTPException | None) -> HTTPException | None:
        """Fill `body`; if there is a reason to refuse it, stop filling and return the reason."""
        size, values, more = 0, 0, True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                raise ClientDisconnect
            part, more = message.get("body", b""), message.get("more_body", False)
            size += len(part)
            values += len(part) - len(part.translate(None, b",[{"))  # none of which is in base64
            charge = _charge(len(body) + len(part)) - _charge(len(body))
            if size > self._max_body:
                limit = f"{self._max_body / 1e6:.1f} MB"
                refused = refusal("image", f"image is too large: the request has more than {limit}; send less.")
            elif values > VALUES:
                refused = refusal("json", f"the body has more than {VALUES} values; send an image as base64.")
            elif self._held + charge > BODIES * self._max_body:
                refused = refused or HTTPException(409, BUSY)
            if refused is None:
                body += part
                self._held += charge
            elif size > BODIES * self._max_body:
                more = False  # the refused client has sent enough
        return refused


def _charge(size: int) -> int:
    """The bytes of a body that count for the limit of all bodies."""
    return size if size > TEXT_BYTES else 0


def _replay(body: bytearray, receive: Receive) -> Receive:
    """A receive() that gives the body once, and after it the client's next messages."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay
