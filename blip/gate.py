"""What the stock server lets in: bodies of a bounded size, and every refusal as one plain sentence."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exception_handlers import http_exception_handler
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from blip import egress
from blip.config import Limits
from blip.fetch import Source
from blip.webhooks import Backlog

TEXT_BYTES = 1_000_000  # of a request beside its image
TEXT_LENGTH = 100_000  # characters of a question, a caption or an id
VALUES = 20_000  # in a request; a million wrong ones take many seconds to refuse, and everyone waits
BODIES = 4  # of the largest size may be in memory at a time; those below TEXT_BYTES are not counted
BODY_SECONDS = 60.0  # for a body to come
RESOLVE_SECONDS = 2.0
BUSY = "Already running a prediction"

_resolvers = ThreadPoolExecutor(32, "resolver")


def install(app: FastAPI, is_busy: Callable[[], bool]) -> None:
    """Put the limits from the environment in force in the server's process.

    Raises:
        ConfigError: a limit has a value that means nothing.
    """
    limits = Limits.from_environment()
    egress.install(guarded=limits.egress == "public")
    Source.max_bytes = limits.max_image_bytes
    app.add_middleware(BodyLimit, max_body=limits.max_image_bytes * 4 // 3 + TEXT_BYTES, is_busy=is_busy)
    app.add_exception_handler(RequestValidationError, _explain)
    app.add_exception_handler(StarletteHTTPException, _explain_body)


async def check(request: Any) -> None:
    """Refuse a prediction that has no input, or whose webhook cannot be served.

    Raises:
        HTTPException: 422 or 409.
    """
    if request is None or request.input is None:
        raise _refusal("input", "input is missing; send a JSON object with an input object that has an image.")
    texts = {"id": request.id, "output_file_prefix": request.output_file_prefix, **dict(request.input)}
    for name, text in [
        *texts.items(),
        *(("context", text) for item in (request.context or {}).items() for text in item),
    ]:
        if isinstance(text, str) and len(text) > TEXT_LENGTH:
            raise _refusal(name, f"{name} has more than {TEXT_LENGTH} characters; send fewer.")
        if isinstance(text, str) and not _is_unicode(text):
            raise _refusal(name, f"{name} has half of a surrogate pair, which is no character; send Unicode text.")
    if request.webhook is None:
        return
    if Backlog.is_full():
        raise HTTPException(409, "Too many webhooks wait for their receivers")
    webhook = request.webhook
    try:
        resolving = asyncio.get_running_loop().run_in_executor(_resolvers, egress.resolve, webhook.host, webhook.port)
        await asyncio.wait_for(resolving, RESOLVE_SECONDS)
    except egress.EgressError as error:
        raise _refusal("webhook", f"webhook may not be called: {error}; set a public one.") from error
    except OSError:  # also a timeout; delivering tries again, and checks again
        pass


class BodyLimit:
    """ASGI middleware: bounds the bodies of requests, one by one and together.

    A body that is refused is read all the same, unkept: a client that is still sending could miss the answer.
    """

    def __init__(self, app: ASGIApp, max_body: int, is_busy: Callable[[], bool]) -> None:
        self._app, self._max_body, self._is_busy = app, max_body, is_busy
        self._held = 0  # bytes of all large bodies that are in memory

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 422 to a body that is too large, 409 when there is no room for it, and 408 when it does not come."""
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT"):
            await self._app(scope, receive, send)
            return
        body, refusal = bytearray(), None
        if scope["path"] == "/predictions" and self._is_busy():
            refusal = HTTPException(409, BUSY)
        try:
            async with asyncio.timeout(BODY_SECONDS):
                refusal = await self._read(receive, body, refusal)
        except ClientDisconnect:
            self._held -= _charge(len(body))
            return
        except TimeoutError:
            refusal = HTTPException(408, f"The body did not come within {BODY_SECONDS:g} s")
        charge = _charge(len(body))
        try:
            if refusal:
                await JSONResponse({"detail": refusal.detail}, refusal.status_code)(scope, receive, send)
            else:
                await self._app(scope, _replay(body, receive), send)
        finally:
            self._held -= charge

    async def _read(self, receive: Receive, body: bytearray, refusal: HTTPException | None) -> HTTPException | None:
        """Fill `body`, unless and until there is a reason to refuse it, and return that."""
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
                refusal = _refusal("image", f"image is too large: the request has more than {limit}; send less.")
            elif values > VALUES:
                refusal = _refusal("json", f"the body has more than {VALUES} values; send an image as base64.")
            elif self._held + charge > BODIES * self._max_body:
                refusal = refusal or HTTPException(409, BUSY)
            if refusal is None:
                body += part
                self._held += charge
            elif size > BODIES * self._max_body:
                more = False  # enough politeness
        return refusal


def _charge(size: int) -> int:
    """The bytes of a body that count for the limit of all bodies."""
    return size if size > TEXT_BYTES else 0


def _replay(body: bytearray, receive: Receive) -> Receive:
    """A receive() that gives the body that was read, once, and then what the client does next."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


def _is_unicode(text: str) -> bool:
    """Whether `text` can be sent back: JSON may name surrogates one by one, UTF-8 cannot carry them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _refusal(name: str, sentence: str) -> HTTPException:
    return HTTPException(422, [{"loc": ["body", name], "msg": sentence, "type": "value_error"}])


async def _explain(request: Request, error: Exception) -> Response:
    """The answer to inputs that do not fit, in the shape of FastAPI's, without the values that were sent."""
    assert isinstance(error, RequestValidationError)
    sentences: dict[str, dict[str, Any]] = {}
    for item in error.errors():
        path = [str(step).encode(errors="replace").decode()[:100] for step in item["loc"]]
        name = path[2] if path[:2] == ["body", "input"] and len(path) > 2 else path[:2][-1]
        known = sentences.get(name)
        # An image has an error for each form that it could have; the one with our sentence says most.
        if known is None or item["type"] == "value_error":
            shown = name if name.isprintable() else ascii(name)  # a sentence is one line
            sentences[name] = {"loc": path[:3], "msg": _sentence(shown, item, request), "type": item["type"]}
    return JSONResponse({"detail": list(sentences.values())}, 422)


def _sentence(name: str, item: dict[str, Any], request: Request) -> str:
    """One sentence that names the input and the fix; `item` is pydantic's description of an error."""
    kind, context = item["type"], item.get("ctx", {})
    if kind == "value_error":
        return str(context["error"])
    if kind == "json_invalid":
        return "the body is not valid JSON; send a JSON object."
    if item["loc"] == ("body",):
        return "the body must be a JSON object; send one with Content-Type: application/json."
    if kind == "missing":
        return f"{name} is missing; send it."
    if kind == "extra_forbidden":
        known = request.app.openapi()["components"]["schemas"]["Input"]["properties"]
        return f"{name} is not an input; the inputs are {', '.join(known)}."
    if kind == "enum":
        return f"{name} must be {context['expected']}."
    return f"{name} is not usable: {item['msg']}."


async def _explain_body(request: Request, error: Exception) -> Response:
    """FastAPI answers 400 to a body that it cannot even decode; to a user that is the same as JSON that is wrong."""
    assert isinstance(error, StarletteHTTPException)
    if error.status_code == 400:
        error = _refusal("json", "the body is not valid JSON; send a JSON object in UTF-8.")
    return await http_exception_handler(request, error)
