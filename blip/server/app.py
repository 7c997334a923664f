"""Cog's FastAPI app with limits on requests, our runner and worker, and an orderly end."""

import asyncio
import functools
import logging
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from contextvars import ContextVar
from types import MappingProxyType
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
from fastapi import FastAPI, Response
from fastapi.encoders import jsonable_encoder
from fastapi.exceptions import HTTPException, RequestValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import PlainTextResponse
from typing_extensions import override

import blip
from blip.config import Limits, shown
from blip.errors import ConfigError
from blip.server import extending, openapi, pages, probes, records, refusals
from blip.server.answers import Answer
from blip.server.bodies import BODIES, PATIENCE, BodyLimit
from blip.server.connections import Connections
from blip.server.egress import Egress
from blip.server.fetch import Fetcher
from blip.server.files import Files
from blip.server.history import History
from blip.server.inputs import Checks, PredictionRequest, image_path
from blip.server.logs import Log, RunnerLog
from blip.server.long_text import TEXT_BYTES, Texts
from blip.server.memory import resident
from blip.server.metrics import CONTENT_TYPE, Gauge, Metrics, children
from blip.server.preferring import Preferring
from blip.server.process import LAST_SECONDS, heed_interrupts
from blip.server.records import Current, Record, Recorder
from blip.server.room import Room
from blip.server.runner import Prediction, Runner, Setup
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
    cog_config: Config,
    shutdown_event: threading.Event | None,
    await_explicit_shutdown: bool = False,
    server_log: Log | None = None,
    **options: Any,
) -> FastAPI:
    """As `cog.server.http.create_app`, with the limits from the environment in force in this process.

    Args:
        cog_config: of Cog.
        shutdown_event: is set when the server is to end.
        await_explicit_shutdown: whether it goes on when the predictor is lost.
        server_log: where all that is printed goes; None if it is not changed.
        options: of Cog.

    Raises:
        ConfigError: a limit has an invalid value.
        UnknownCogError: something that is extended here is missing.
        SystemExit: there is no place for temporary files.
    """
    root = logging.getLogger()
    if server_log:
        server_log.take_over(root.handlers)
    limits = Limits.from_environment()
    log.info("settings", **shown())  # not in what the setup prints, which the health check shows to everyone
    egress = Egress(guarded=limits.egress == "public")
    try:
        files = Files()
    except ConfigError as error:
        log.error(str(error))
        sys.exit(1)
    outbox = Outbox(egress, files, limits.webhook_secret)
    fetcher = Fetcher(egress, files, limits)
    max_body = limits.max_image_bytes * 4 // 3 + TEXT_BYTES
    room = Room(BODIES * max_body, PATIENCE)
    current: Current = ContextVar("current")
    texts: ContextVar[Texts] = ContextVar("texts")
    history = History()
    runner: Runner | None = None

    def make_runner(**parts: Any) -> Runner:
        nonlocal runner
        runner = Runner(current=current, history=history, **parts)
        return runner

    # Cog has no parameters for these; it looks them up by name.
    extending.rebind(stock, "PredictionRunner", make_runner)
    extending.rebind(stock, "JSONResponse", Answer)
    runner_log = RunnerLog(cog.server.runner.log, with_info=root.isEnabledFor(logging.DEBUG))
    extending.rebind(cog.server.runner, "log", runner_log)
    extending.rebind(cog.server.runner, "PredictTask", Prediction)
    extending.rebind(cog.server.runner, "SetupTask", Setup)
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
    openapi.describe(app)
    pages.serve_documents(app)
    if limits.page:
        pages.add_page(app)
    _wrap(app, "/health-check", _with_version, {200: {"model": openapi.HealthDocument}})
    health = extending.route(app, "/health-check").endpoint
    probes.answer_head(app, "/health-check", health)
    probes.add_probes(app, health)
    if runner is None:  # the predictor cannot be loaded; the health check says so
        return app

    def end() -> None:
        log.error("the worker process has ended")
        app.state.health = stock.Health.DEFUNCT
        if shutdown_event and not await_explicit_shutdown:
            shutdown_event.set()

    runner.on_death(end)
    metrics = Metrics(_gauges(runner, outbox, room), lambda: runner.facts.about)
    outbox.count = metrics.count_webhook
    checks = Checks(egress, outbox, texts, current)
    preferring = Preferring(current)
    app.add_middleware(
        BodyLimit,
        room=room,
        current=current,
        texts=texts,
        files=files,
        max_body=max_body,
        max_image=limits.max_image_bytes,
        refusal=functools.partial(_refusal, app, runner),
    )
    if limits.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=limits.cors_origins,
            allow_methods=("GET", "POST", "PUT"),
            allow_headers=("*",),
            expose_headers=("Retry-After", "Preference-Applied"),
        )
    app.add_middleware(
        Recorder, current=current, tell=functools.partial(_tell, metrics), with_client=limits.log_clients
    )
    app.add_exception_handler(RequestValidationError, refusals.explain)
    app.add_exception_handler(StarletteHTTPException, refusals.explain_body)
    predictions = extending.route(app, "/predictions").response_model
    predicting = openapi.predicting(predictions)
    _wrap(app, "/", _without_shutdown)
    probes.answer_head(app, "/", extending.route(app, "/").endpoint)
    _wrap(app, "/predictions", lambda predict: _checked(checks, preferring.wrap(predict)), predicting)
    _wrap(
        app,
        "/predictions/{prediction_id}",
        lambda predict: _idempotent(runner, checks, preferring.wrap(predict)),
        predicting,
    )
    _wrap(app, "/predictions/{prediction_id}/cancel", None, {404: {"model": openapi.Nothing}})
    app.add_api_route(
        "/predictions/{prediction_id}",
        _lookup(history),
        response_model=openapi.kept(predictions),
        responses={404: openapi.UNKNOWN},
        name="get prediction",
    )
    app.add_api_route("/metrics", _metrics(metrics), name="metrics", response_class=PlainTextResponse)

    app.state.cut_off = functools.partial(_cut_off, app, runner)
    app.router.lifespan_context = _drained(runner, outbox, app.router.lifespan_context)
    return app


def _refusal(app: FastAPI, runner: Runner, path: str) -> HTTPException | None:
    """Why no prediction can be asked for at a path now, if there is a reason."""
    if not records.is_for_a_prediction(path):
        return None
    if app.state.health is stock.Health.STARTING:
        return HTTPException(503, "The server is starting; send it again when /readyz answers 200")
    if app.state.health is not stock.Health.READY:
        return HTTPException(503, "The predictor has ended; send it to another server")
    # PUT may ask for the state of a prediction that runs.
    return HTTPException(409, refusals.BUSY) if path == "/predictions" and runner.is_busy() else None


def _tell(metrics: Metrics, record: Record) -> None:
    records.write(record)
    metrics.observe(record)


def _gauges(runner: Runner, outbox: Outbox, room: Room) -> list[Gauge]:
    """What is looked at when the metrics are scraped."""

    def memory() -> dict[str, float]:
        found = {"server": float(resident(os.getpid()))}
        if worker := runner.process():
            found |= {"worker": resident(worker), "decoders": sum(map(resident, children(worker)))}
        return found

    def device() -> dict[str, float]:
        used = runner.facts.device_bytes
        return {} if used is None else {"": used}

    return [
        ("predictions_in_progress", "Predictions that have not ended.", "", lambda: {"": runner.in_progress()}),
        ("slots", "Predictions that can run at a time.", "", lambda: {"": runner.slots}),
        ("held_bytes", "Bytes of the bodies and the unread answers that are held.", "", lambda: {"": room.total}),
        ("webhook_backlog_events", "Events that wait for receivers.", "", lambda: {"": len(outbox.events)}),
        ("webhook_backlog_bytes", "Bytes of them.", "", lambda: {"": outbox.backlog.total}),
        ("resident_memory_bytes", "Memory of the processes.", "process", memory),
        ("device_memory_bytes", "Memory of the GPU that is in use, by whatever process.", "", device),
    ]


def _metrics(metrics: Metrics) -> Endpoint:
    async def scrape() -> Response:
        """Everything that Prometheus can count."""
        return Response(metrics.document(), media_type=CONTENT_TYPE)

    return scrape


def _lookup(history: History) -> Endpoint:
    async def lookup(prediction_id: str) -> Response:
        """The state of a prediction that runs, or that ended within the hour, without its image."""
        state = history.get(prediction_id)
        if state is None:
            raise HTTPException(404, "No prediction with this id is running or has ended within the hour")
        return Response(state, media_type="application/json")

    return lookup


def _wrap(
    app: FastAPI,
    path: str,
    wrapper: Callable[[Endpoint], Endpoint] | None,
    responses: Mapping[int | str, dict[str, Any]] = MappingProxyType({}),
) -> None:
    """Replace the endpoint at `path` by what `wrapper` makes of it, in the same place among the routes.

    `responses` are added to its description.
    """
    route = extending.route(app, path)
    endpoint = functools.wraps(route.endpoint)(wrapper(route.endpoint)) if wrapper else route.endpoint
    place = app.router.routes.index(route)
    app.add_api_route(
        path,
        endpoint,
        methods=list(route.methods),
        response_model=None if 200 in responses else route.response_model,
        response_model_exclude_unset=route.response_model_exclude_unset,
        responses=dict(responses),
    )
    app.router.routes[place] = app.router.routes.pop()


def _with_version(health: Endpoint) -> Endpoint:
    async def versioned() -> dict[str, Any]:
        return {**(await health()), "version": blip.__version__}

    return versioned


def _without_shutdown(root: Endpoint) -> Endpoint:
    async def index() -> Response:
        urls = {name: url for name, url in (await root()).items() if name != "shutdown_url"}
        return Answer(urls, headers={"Vary": "Accept"})  # browsers get a page

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
