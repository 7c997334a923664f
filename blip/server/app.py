"""Cog's FastAPI app with limits on requests, our runner and worker, and an orderly end."""

import asyncio
import functools
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any

import cog.schema
import cog.server.http as stock
import cog.server.runner
import cog.server.webhook
import cog.types
import structlog
from cog.base_input import BaseInput
from cog.config import Config
from cog.server import worker as stock_worker
from fastapi import FastAPI
from fastapi.encoders import jsonable_encoder
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from typing_extensions import override

from blip.config import Limits
from blip.errors import ConfigError
from blip.server import extending, refusals
from blip.server.answers import Answer
from blip.server.bodies import BODIES, PATIENCE, TEXT_BYTES, BodyLimit
from blip.server.connections import Connections
from blip.server.egress import Egress
from blip.server.fetch import Fetcher
from blip.server.files import Files
from blip.server.inputs import Checks, PredictionRequest, image_path
from blip.server.long_text import Texts
from blip.server.process import LAST_SECONDS, heed_interrupts
from blip.server.room import Holding, Room
from blip.server.runner import Prediction, Runner
from blip.server.webhooks import Outbox
from blip.server.worker import ChildWorker, Worker

Endpoint = Callable[..., Any]

log = structlog.get_logger("blip.server")


@extending.overrides
class PredictorConfig(Config):
    """Cog's configuration, which reads a predictor's inputs from the predictor.

    Stock reads a shortened copy of the source, which lacks names, and logs an error.
    """

    @override
    def _predictor_code(self, *_: Any) -> None:
        return None


def create_app(
    cog_config: Config, shutdown_event: threading.Event | None, await_explicit_shutdown: bool = False, **options: Any
) -> FastAPI:
    """As `cog.server.http.create_app`, with the limits from the environment in force in this process.

    Raises:
        ConfigError: a limit has an invalid value.
        UnknownCogError: something that is extended here is missing.
        SystemExit: there is no place for temporary files.
    """
    limits = Limits.from_environment()
    egress = Egress(guarded=limits.egress == "public")
    try:
        files = Files()
    except ConfigError as error:
        sys.exit(str(error))
    outbox = Outbox(egress, files)
    fetcher = Fetcher(egress, files, limits)
    max_body = limits.max_image_bytes * 4 // 3 + TEXT_BYTES
    room = Room(BODIES * max_body, PATIENCE)
    current: ContextVar[Holding] = ContextVar("current")
    texts: ContextVar[Texts] = ContextVar("texts")
    runner: Runner | None = None

    def make_runner(**parts: Any) -> Runner:
        nonlocal runner
        runner = Runner(current=current, **parts)
        return runner

    # Cog has no parameters for these; it looks them up by name.
    extending.rebind(stock, "PredictionRunner", make_runner)
    extending.rebind(stock, "JSONResponse", Answer)
    extending.rebind(cog.server.runner, "PredictTask", Prediction)
    extending.rebind(stock_worker, "Worker", Worker)
    extending.rebind(stock_worker, "_ChildWorker", ChildWorker)
    extending.rebind(cog.schema, "PredictionRequest", PredictionRequest)
    extending.rebind(cog.server.webhook, "webhook_caller", outbox.caller)
    extending.rebind(cog.types.Path, "validate", functools.partial(image_path, fetcher, texts))
    BaseInput.model_config["extra"] = "forbid"  # stock ignores an input whose name is misspelt

    if shutdown_event:
        heed_interrupts(shutdown_event)
    app: FastAPI = stock.create_app(
        PredictorConfig(cog_config._config),
        shutdown_event,
        await_explicit_shutdown=await_explicit_shutdown,
        **options,
    )
    app.state.limits, app.state.files = limits, files
    app.state.connections = Connections(room, limits.keep_alive_seconds)
    app.state.held = lambda: room.total  # bytes, of what clients sent and have not read
    app.state.cut_off = lambda: None  # there is nothing to end
    app.state.lost = 0  # predictions that were cut off, and final events that nobody was told
    app.router.routes.remove(extending.route(app, "/shutdown"))  # anyone who reaches the port could stop the replica
    if runner is None:  # the predictor cannot be loaded; the app's one route says so
        return app

    def end() -> None:
        log.error("the worker process has ended")
        app.state.health = stock.Health.DEFUNCT
        if shutdown_event and not await_explicit_shutdown:
            shutdown_event.set()

    runner.on_death(end)
    checks = Checks(egress, outbox, texts)
    app.add_middleware(BodyLimit, room=room, current=current, texts=texts, max_body=max_body, is_busy=runner.is_busy)
    app.add_exception_handler(RequestValidationError, refusals.explain)
    app.add_exception_handler(HTTPException, refusals.explain_body)
    _wrap(app, "/", _without_shutdown)
    _wrap(app, "/predictions", functools.partial(_checked, checks))
    _wrap(app, "/predictions/{prediction_id}", functools.partial(_idempotent, runner, checks))

    app.state.cut_off = functools.partial(_cut_off, app, runner)
    app.router.lifespan_context = _drained(runner, outbox, app.router.lifespan_context)
    return app


def _wrap(app: FastAPI, path: str, wrapper: Callable[[Endpoint], Endpoint]) -> None:
    """Replace the endpoint at `path` by what `wrapper` makes of it, in the same place among the routes."""
    route = extending.route(app, path)
    place = app.router.routes.index(route)
    app.add_api_route(
        path,
        functools.wraps(route.endpoint)(wrapper(route.endpoint)),
        methods=list(route.methods),
        response_model=route.response_model,
        response_model_exclude_unset=route.response_model_exclude_unset,
    )
    app.router.routes[place] = app.router.routes.pop()


def _without_shutdown(root: Endpoint) -> Endpoint:
    async def index() -> dict[str, str]:
        return {name: url for name, url in (await root()).items() if name != "shutdown_url"}

    return index


def _checked(checks: Checks, predict: Endpoint) -> Endpoint:
    async def checked(request: Any, **headers: Any) -> Any:
        await checks.check(request)
        return await predict(request=request, **headers)

    return checked


def _idempotent(runner: Runner, checks: Checks, predict: Endpoint) -> Endpoint:
    """Stock looks for a running prediction of the same id only when all slots are taken."""

    async def put(prediction_id: str, request: Any, **headers: Any) -> Any:
        task = runner.get_predict_task(prediction_id)
        if task and request.id in (None, prediction_id):
            return Answer(jsonable_encoder(task.result), 202)
        await checks.check(request, prediction_id)
        return await predict(prediction_id=prediction_id, request=request, **headers)

    return put


def _cut_off(app: FastAPI, runner: Runner) -> None:
    """End the predictions that the grace period was too short for."""
    seconds = app.state.limits.grace_seconds
    app.state.lost += runner.cut_off(f"the server was stopped, and it took longer than {seconds} s; send it again.")


def _drained(runner: Runner, outbox: Outbox, lifespan: Callable[[FastAPI], Any]) -> Callable[[FastAPI], Any]:
    """Give predictions and webhooks until `stop_by` to end; stock ends the worker process at once."""

    @asynccontextmanager
    async def drained(app: FastAPI) -> AsyncIterator[Any]:
        async with lifespan(app) as state:
            yield state
            while (runner.has_work() or outbox.events) and time.monotonic() < app.state.stop_by:
                await asyncio.sleep(0.05)
            app.state.cut_off()
            await asyncio.sleep(0)  # their final events are on their way to the outbox
            app.state.lost += await outbox.end(LAST_SECONDS)

    return drained
