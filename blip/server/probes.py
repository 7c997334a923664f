"""What orchestrators ask over HTTP: whether the server is alive, ready, started. It means what scripts/probe means."""

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI
from fastapi.responses import PlainTextResponse
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

READY = frozenset({"READY", "BUSY"})
#: The statuses of the health check to which each answers 200.
STATUSES = {
    "/readyz": READY,
    "/livez": READY | {"STARTING"},
    "/startupz": READY | {"UNHEALTHY", "DEFUNCT"},
}

Health = Callable[[], Awaitable[dict[str, Any]]]


def add_probes(app: FastAPI, health: Health) -> None:
    """Answer each probe with 200 or 503, and the status in one word."""
    for path, fine in STATUSES.items():
        probe = _probe(health, fine)
        answer_head(app, path, probe)
        app.add_api_route(
            path,
            probe,
            name=path[1:],
            description="Whether the status of the health check is one of " + ", ".join(sorted(fine)) + ".",
            response_class=PlainTextResponse,
            responses={503: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "It is not."}},
        )


def _probe(health: Health, fine: frozenset[str]) -> Callable[[], Awaitable[Response]]:
    async def probe() -> Response:
        status = (await health())["status"]
        return PlainTextResponse(status, 200 if status in fine else 503)

    return probe


def answer_head(app: FastAPI, path: str, get: Callable[[], Awaitable[Any]]) -> None:
    """Answer HEAD as GET, without the body."""

    async def head(_: Request) -> Response:
        answer = await get()
        return answer if isinstance(answer, Response) else JSONResponse(answer)

    app.router.add_route(path, head, methods=["HEAD"], include_in_schema=False)
