"""What becomes of each request for a prediction: one line of the log, and what the metrics count."""

import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import structlog
from cog.schema import PredictionResponse
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from blip.server.logs import shown
from blip.server.prefer import Preference
from blip.server.room import Holding

RETRY_AFTER = 1  # seconds; a slot is free again after a fraction of one, on a GPU
#: Why a request was refused, by the status of its answer, where nobody says it better.
REASONS = {
    400: "malformed",
    404: "unknown",
    405: "malformed",
    408: "slow",
    409: "busy",
    422: "invalid",
    503: "not ready",
}
ERROR_LENGTH = 300  # characters of an error in the log

log = structlog.get_logger("blip.requests")


@dataclass(eq=False)
class Record:
    """A request, and the prediction that it started, if it did; used on the event loop's thread only.

    Attributes:
        client: its address, if that is known and may be logged.
        preference: how it wants to be answered.
        received, sent: bytes of the bodies.
        http_status: of the answer; 0 where the client did not wait for it.
        reason: why it was refused, where its status does not say it well enough.
        holding: the room that the request takes.
        prediction: what it started.
    """

    client: str | None
    preference: Preference
    tell: "Callable[[Record], None]"
    began: float = field(default_factory=time.monotonic)
    received: int = 0
    sent: int = 0
    http_status: int = 0
    reason: str | None = None
    holding: Holding | None = None
    prediction: PredictionResponse | None = None
    _awaited: int = 1  # the answer, and the end of the prediction

    @property
    def task(self) -> str:
        """Which of the three tasks it asks for; "none" for a predictor without tasks."""
        task = self.prediction.input.get("task") if self.prediction else None
        return str(getattr(task, "value", task or "none"))

    @property
    def status(self) -> str:
        """How its prediction is; "" where it started none."""
        return str(self.prediction.status.value) if self.prediction and self.prediction.status else ""

    @property
    def refused_for(self) -> str:
        """Why it was refused, in a word or two; "" where it was not."""
        if self.prediction or self.http_status < 400:
            return ""
        return self.reason or REASONS.get(self.http_status, "error")

    @property
    def applied(self) -> str:
        """Which of its preferences the answer honours, for the header; "" for none."""
        if not self.prediction or self.http_status not in (200, 202):
            return ""
        return self.preference.applied(is_async=self.http_status == 202)

    @property
    def seconds(self) -> float:
        """How long it has taken so far."""
        return time.monotonic() - self.began

    def start(self, prediction: PredictionResponse) -> None:
        """Note that it started a prediction."""
        self.prediction = prediction
        self._awaited += 1

    def end(self) -> None:
        """Note that it is answered, or that its prediction has ended; tell of it when all is over."""
        self._awaited -= 1
        if not self._awaited:
            self.tell(self)


#: The request that is being answered.
Current = ContextVar[Record]


class Recorder:
    """ASGI middleware, the outermost: records what becomes of the requests for predictions.

    Args:
        app: what answers.
        current: is given the record of each request while it is answered.
        tell: is given each record when all is over.
        with_client: whether records have the address of the client.
    """

    def __init__(self, app: ASGIApp, current: Current, tell: Callable[[Record], None], *, with_client: bool) -> None:
        self._app, self._current, self._tell, self._with_client = app, current, tell, with_client

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Have it answered; a refusal that says to come back gets the header that says when."""
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT") or not is_for_a_prediction(scope["path"]):
            await self._app(scope, receive, send)
            return
        client = scope["client"][0] if self._with_client and scope["client"] else None
        record = Record(client, Preference.of(scope["headers"]), self._tell)
        self._current.set(record)

        async def count_received() -> Message:
            message = await receive()
            record.received += len(message.get("body", b""))
            return message

        async def count_sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.http_status = message["status"]
                headers = MutableHeaders(scope=message)
                if record.http_status in (409, 503):
                    headers.setdefault("Retry-After", str(RETRY_AFTER))
                if record.applied:
                    headers["Preference-Applied"] = record.applied
            record.sent += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, count_received, count_sent)
        except Exception:  # Starlette answers it outside of here
            record.http_status = 500
            raise
        finally:
            record.end()


def is_for_a_prediction(path: str) -> bool:
    """Whether POST or PUT to this path asks for a prediction."""
    return path == "/predictions" or (path.startswith("/predictions/") and not path.endswith("/cancel"))


def write(record: Record) -> None:
    """Log a request in one line."""
    prediction = record.prediction
    line: dict[str, Any] = {
        "http_status": record.http_status or None,
        "bytes_in": record.received,
        "bytes_out": record.sent,
        "seconds": round(record.seconds, 4),
    }
    if prediction:
        metrics = prediction.metrics or {}
        line |= {"id": shown(prediction.id), "task": record.task, "status": record.status}
        for name, key in TIMES.items():
            if key in metrics:
                line[name] = round(metrics[key], 4)
        if "batch_size" in metrics:
            line["batch_size"] = metrics["batch_size"]
        if prediction.error:
            line["error"] = prediction.error[:ERROR_LENGTH]
        message = f"prediction {record.status}"
    elif reason := record.refused_for:
        line["reason"] = reason
        message = "request refused"
    elif record.http_status:
        message = "request answered"  # with the state of a prediction that runs
    else:
        message = "client left"
    if record.client:
        line["client"] = record.client
    log.info(message, **line)


#: What a line calls the times that a prediction's metrics have, in seconds.
TIMES = {
    "queue_seconds": "queue_time",
    "device_seconds": "device_time",
    "decode_seconds": "decode_time",
    "download_seconds": "download_time",
}
