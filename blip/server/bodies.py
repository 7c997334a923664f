"""Limits on requests: the size of their bodies, one by one and together, how long they may take, and who waits."""

import asyncio
from collections.abc import Callable
from contextvars import ContextVar

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from blip.server.connections import ABORT
from blip.server.files import Files
from blip.server.long_text import MANY_VALUES, TEXT_BYTES, VALUES, Texts, cut
from blip.server.records import Current, is_for_a_prediction
from blip.server.refusals import BUSY, refusal
from blip.server.room import Holding, Room, never, who_is
from blip.server.uploads import Form, is_form

BODIES = 5  # of the largest size may be held at a time, with the answers that are not read; large ones take four
BODY_SECONDS = 60.0  # for a body to arrive
CALM = 32  # bodies that may come at a time as fast as they can; more of them come more slowly
TURN_SECONDS = 0.002  # between two parts of whichever bodies, while there are more
PATIENCE = 5.0  # seconds after which a body or an unread answer gives way to a new one where there is no room
ANSWER_BYTES = 20_000  # that an answer may have in addition to its request, which it repeats
CLOSE = {"Connection": "close"}
JSON = (b"content-type", b"application/json")


class BodyLimit:
    """ASGI middleware: bounds the bodies of requests, and cancels what nobody waits for any more.

    A refused body is still read, but not kept: a client that is still sending could miss the answer.

    Args:
        app: what answers.
        room: the bytes of all bodies and answers.
        current: the record of the request, which is given what the request holds.
        texts: are given what strings of the request stand for.
        files: where uploaded pictures go.
        max_body: bytes.
        max_image: bytes, of an uploaded picture.
        refusal: the reason why no prediction can be asked for at a path now, if there is one.
    """

    def __init__(
        self,
        app: ASGIApp,
        room: Room,
        current: Current,
        texts: ContextVar[Texts],
        files: Files,
        max_body: int,
        max_image: int,
        refusal: Callable[[str], HTTPException | None],
    ) -> None:
        self._app, self._room, self._current, self._texts = app, room, current, texts
        self._files, self._max_body, self._max_image, self._refusal = files, max_body, max_image, refusal
        self._coming = 0  # bodies
        self._next_turn = 0.0  # on the event loop's clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 422 to a body that is too large, 409 when there is no room for it, and 408 when it is too slow."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if {b"content-length", b"transfer-encoding"} <= {name for name, _ in scope["headers"]}:
            # A proxy in front may take another part of what follows for the body than h11 does (RFC 9112, 6.3).
            answer = JSONResponse({"detail": "Send Content-Length or Transfer-Encoding, not both"}, 400, CLOSE)
            await answer(scope, receive, send)
            return
        if scope["method"] not in ("POST", "PUT"):
            await self._app(scope, receive, send)
            return
        client, headers = scope["client"], dict(scope["headers"])
        holding = self._room.hold(who_is(client and client[0]), 0, force=True)
        assert holding
        body = _Body(holding)
        try:
            try:
                if is_form(headers) and is_for_a_prediction(scope["path"]):
                    body.form = Form(headers, self._files, self._max_image)
                    holding.at_end = body.form.drop
                    scope = {**scope, "headers": [*filter(_is_no_type, scope["headers"]), JSON]}
                refused = await self._read(scope["path"], body, receive)
                if not refused:
                    self._texts.set(await self._cut(body))
            except HTTPException as error:
                refused = error
            if refused:
                answer = JSONResponse({"detail": refused.detail}, refused.status_code, refused.headers)
                await answer(scope, receive, send)
            else:
                if record := self._current.get(None):
                    record.holding = holding
                await self._answer(scope, body, receive, send)
        except ClientDisconnect:
            pass
        finally:
            holding.let_go()

    async def _read(self, path: str, body: "_Body", receive: Receive) -> HTTPException | None:
        """Fill `body` within its time; if there is a reason to refuse it, return the reason."""
        refused = self._refusal(path)
        self._coming += 1
        try:
            async with asyncio.timeout(BODY_SECONDS) as clock:
                body.holding.give_way = lambda: body.give_way(clock)
                return await self._fill(body, receive, refused)
        except TimeoutError:
            if body.has_given_way:
                return self._no_room(CLOSE)
            return HTTPException(408, f"The body did not come within {BODY_SECONDS:g} s", CLOSE)
        finally:
            self._coming -= 1
            body.holding.give_way = never

    async def _fill(self, body: "_Body", receive: Receive, refused: HTTPException | None) -> HTTPException | None:
        size, more = 0, True
        most = self._max_image + TEXT_BYTES if body.form else self._max_body
        while more:
            message = await receive()
            if message["type"] != "http.request":
                raise ClientDisconnect
            part, more = message.get("body", b""), message.get("more_body", False)
            size += len(part)
            spare = self._max_body if size > TEXT_BYTES else 0  # large bodies leave room for small ones
            if size > most and not (body.form and refused):
                limit = f"{most / 1e6:.1f} MB"
                refused = refusal("image", f"image is too large: the request has more than {limit}; send less.")
            elif refused is None and not self._room.resize(body.holding, size, spare):
                refused = self._no_room()
            if refused is None:
                try:
                    await body.add(part)
                except HTTPException as error:
                    refused = error
            if refused is not None:
                body.clear()
                self._room.resize(body.holding, 0)
                if size > 4 * self._max_body:
                    more = False  # the refused client has sent enough
            del message, part  # up to 256 KB, which would wait for the turn
            if more and self._coming > CALM:
                await self._turn()
        return refused

    async def _turn(self) -> None:
        """Wait for a turn: of each body the event loop takes up to 256 KB at once, and answers nobody meanwhile."""
        now = asyncio.get_running_loop().time()
        self._next_turn = max(now, self._next_turn + TURN_SECONDS)
        await asyncio.sleep(self._next_turn - now)

    def _no_room(self, headers: dict[str, str] | None = None) -> HTTPException:
        if record := self._current.get(None):
            record.reason = "no room"
        return HTTPException(409, BUSY, headers)

    async def _cut(self, body: "_Body") -> Texts:
        """Leave only the short texts of a request in its body, as JSON, and refuse one of very many values."""
        texts = Texts()
        if body.form:
            short, texts = await body.form.end()
            body.whole = bytearray(short)
        elif len(body.whole) > TEXT_BYTES:
            short, long = await cut(body.whole)
            texts.update(long)
            body.whole = bytearray(short)
        if len(body.whole) - len(body.whole.translate(None, b",[{")) > VALUES:
            raise MANY_VALUES
        return texts

    async def _answer(self, scope: Scope, body: "_Body", receive: Receive, send: Send) -> None:
        """Answer; where the client hangs up before, cancel that."""
        gone = asyncio.Event()
        answer = _Answer(self._room, body.holding, scope, send)
        whole = bytes(body.whole)
        body.whole.clear()
        answering = asyncio.ensure_future(self._app(scope, _replay(whole, gone), answer.send))
        del whole  # it is let go when it has been read
        watching = asyncio.create_task(_until_gone(receive, gone))
        try:
            await asyncio.wait({answering, watching}, return_when=asyncio.FIRST_COMPLETED)
            if not answering.done() and not answer.is_complete:
                answering.cancel()
            await asyncio.wait({answering})
        finally:
            answering.cancel()
            watching.cancel()
        if not answering.cancelled():
            answering.result()


class _Body:
    """What has come of a body: all of it, or a form that it is read into."""

    def __init__(self, holding: Holding) -> None:
        self.holding = holding
        self.whole = bytearray()
        self.form: Form | None = None
        self.has_given_way = False

    async def add(self, part: bytes) -> None:
        """Take what comes next.

        Raises:
            HTTPException: it does not belong in a form.
        """
        if self.form:
            await self.form.add(part)
        else:
            self.whole += part

    def clear(self) -> None:
        """Drop what has come."""
        self.whole.clear()
        if self.form:
            self.form.drop()

    def give_way(self, clock: asyncio.Timeout) -> bool:
        """Drop what has come, and have the reader notice."""
        self.has_given_way = True
        self.whole.clear()
        clock.reschedule(asyncio.get_running_loop().time())
        return True


class _Answer:
    """Sends an answer, if there is room for one that is much larger than its request; it then gives way unread.

    The state of a running prediction repeats its image at every PUT.
    """

    def __init__(self, room: Room, holding: Holding, scope: Scope, send: Send) -> None:
        self._room, self._holding, self._scope, self._send = room, holding, scope, send
        self._is_refused = False
        self.is_complete = False

    async def send(self, message: Message) -> None:
        """Send a message, in place of ASGI's send."""
        if message["type"] == "http.response.start":
            size = int(dict(message["headers"]).get(b"content-length", 0))
            if size > self._holding.size + ANSWER_BYTES and not self._room.resize(self._holding, size):
                self._is_refused = True
                busy = JSONResponse({"detail": BUSY}, 409)
                await self._send({**message, "status": 409, "headers": busy.raw_headers})
                message = {"type": "http.response.body", "body": busy.body}
            else:
                self._holding.give_way = self._scope[ABORT]
        elif self._is_refused:
            return
        # Before it is sent: uvicorn then says that the client is gone.
        self.is_complete = message["type"] == "http.response.body" and not message.get("more_body", False)
        await self._send(message)


def _replay(body: bytes, gone: asyncio.Event) -> Receive:
    """A receive() that gives the body once, and then the end of the connection."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        if messages:
            return messages.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    return replay


def _is_no_type(header: tuple[bytes, bytes]) -> bool:
    return header[0] != JSON[0]


async def _until_gone(receive: Receive, gone: asyncio.Event) -> None:
    """Wait until the client hangs up or has its answer."""
    while (await receive())["type"] != "http.disconnect":
        pass
    gone.set()
