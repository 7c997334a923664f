"""Delivers the events of predictions to their webhooks without delaying predictions.

The stock server sends an event before it goes on, so a receiver that is slow or down holds up every prediction. Here
each prediction has its own queue, and separate threads send. What is sent and how often stays as Cog promises.
"""

import asyncio
import logging
import time
import urllib.parse
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import requests
from cog.schema import PredictionResponse, Status
from cog.server import webhook as stock
from cog.server.response_throttler import ResponseThrottler
from fastapi.encoders import jsonable_encoder
from requests.adapters import HTTPAdapter
from standardwebhooks import Webhook
from urllib3.exceptions import HTTPError, MaxRetryError
from urllib3.util.retry import Retry

from blip.errors import FetchError
from blip.server.answers import as_json
from blip.server.egress import Egress, EgressError, Session
from blip.server.files import Files, Writer
from blip.server.logs import shown
from blip.server.names import host_is
from blip.server.room import Holding, Room, Who
from blip.server.turns import Turns

SECONDS = 15.0  # for one attempt
TIMEOUT = (5, SECONDS)  # seconds to connect, seconds without a byte
LONGEST_PAUSE = 120.0  # seconds between two attempts
MAX_BACKLOG = 256_000_000  # bytes of events that wait; an event carries the inputs of its prediction
MAX_OF_RECEIVER = MAX_BACKLOG // 2  # bytes for one host and port
EVENT_BYTES = 20_000  # that an event takes in addition to its JSON, for its session
LARGE = 1_000_000  # bytes from which on an event waits on the disk
THREADS = 128

log = logging.getLogger("blip.webhooks")

Body = list[bytes | memoryview]  # of an event, in parts


class Event:
    """One event; it gives way to others while it waits for another attempt."""

    def __init__(self, url: str, body: Body, name: str | None, *, final: bool) -> None:
        self.url, self.name, self.final = url, name, final
        self.id = uuid.uuid4().hex  # the same at each attempt, so that a receiver knows what it has
        self.size = sum(map(len, body))
        self.is_pausing = False
        self.is_given_up = False
        self.storing: asyncio.Future[None] | None = None  # of one that is large
        self._body = body
        self._file: Path | None = None

    def store(self, path: Path) -> None:
        """Keep the body in a file, if there is room for it on the disk; takes a while."""
        try:
            with Writer(path) as file:
                for part in self._body:
                    file.write(part)
        except FetchError:
            path.unlink(missing_ok=True)
            return
        self._file, self._body = path, []

    def body(self) -> bytes:
        """What is sent."""
        return self._file.read_bytes() if self._file else b"".join(self._body)

    def drop(self) -> None:
        """Let the body go."""
        self._body = []
        if self._file:
            self._file.unlink(missing_ok=True)

    def give_way(self) -> bool:
        """Be given up, if its receiver has not taken it at the first attempt."""
        if self.is_pausing:
            self.is_given_up = True
            self.drop()
            self.report("too many wait for their receivers")
        return self.is_pausing

    def report(self, failure: str) -> None:
        """Log that it is lost, without the parts of the webhook that may be secret."""
        parts = urllib.parse.urlsplit(self.url)
        where = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        kind = "final event" if self.final else "event"
        log.warning(
            "webhook to %s failed: %s; lost the %s of prediction %s for %s",
            *(parts.hostname, failure, kind, shown(self.name), where),
        )


class Outbox:
    """The events that wait or are being sent; used on the event loop's thread only.

    Args:
        egress: makes the connections.
        files: keeps large events.
        secret: what events are signed with; empty for no signature.

    Attributes:
        count: is told what became of each event: delivered, failed, refused or lost.
    """

    def __init__(self, egress: Egress, files: Files, secret: str = "") -> None:
        self.egress = egress
        self.files = files
        self.signer = Webhook(secret) if secret else None
        self.count: Callable[[str], None] = lambda _: None
        self.events: set[Event] = set()
        self.backlog = Room(MAX_BACKLOG, patience=0)
        self.turns = Turns(THREADS)
        self.senders = ThreadPoolExecutor(THREADS, "webhook")
        self.disk = ThreadPoolExecutor(1, "events")
        self.ending = asyncio.Event()  # then there is one last attempt
        self._lost = 0

    def has_room(self, url: str) -> bool:
        """Whether a prediction with this webhook can be taken; others may have to give way."""
        who = _who(url)
        return self.backlog.held_by(who[1]) < MAX_OF_RECEIVER and self.backlog.make_way(who, EVENT_BYTES)

    def has_place(self, who: Who, size: int) -> bool:
        """Whether there is place for an event that can be left out."""
        return self.backlog.held_by(who[1]) < MAX_OF_RECEIVER and self.backlog.total + size <= MAX_BACKLOG

    def lose(self, event: Event) -> None:
        """Log that the server has ended before an event was taken."""
        event.report("the server has ended")
        self.count("lost")
        self._lost += event.final
        self.events.discard(event)

    async def end(self, seconds: float) -> int:
        """Try a last time to send what waits, within `seconds`; how many final events are lost."""
        self.ending.set()
        until = time.monotonic() + seconds
        while self.events and time.monotonic() < until:
            await asyncio.sleep(0.05)
        for event in list(self.events):
            self.lose(event)
        return self._lost

    def caller(self, url: str) -> Callable[[PredictionResponse], None]:
        """Make a function that sends one prediction's state to `url`, like `cog.server.webhook.webhook_caller`."""
        throttler = ResponseThrottler(stock._response_interval)
        session = stock.requests_session_with_retries()
        adapter = session.get_adapter(url)
        assert isinstance(adapter, HTTPAdapter)
        delivery = Delivery(self, url, session.headers, adapter.max_retries)

        def call(response: PredictionResponse) -> None:
            if throttler.should_send_response(response):
                event = jsonable_encoder(response.model_dump(exclude_unset=True))
                delivery.post(event, final=Status.is_terminal(response.status))
                throttler.update_last_sent_response_time()

        return call


class Delivery:
    """Sends one prediction's events to its webhook, in order.

    Made on the event loop's thread; `headers` go with every event and `retry` says when a final one is sent again.
    """

    def __init__(self, outbox: Outbox, url: str, headers: Mapping[str, str | bytes], retry: Retry) -> None:
        self._loop = asyncio.get_running_loop()
        self._outbox, self._url, self._retry = outbox, url, retry
        self._headers = {**headers, "Content-Type": "application/json"}
        self._who = _who(url)
        self._queue: deque[tuple[Event, Holding]] = deque()
        self._running: asyncio.Task[None] | None = None

    def post(self, event: dict[str, Any], final: bool = False) -> None:
        """Queue an event, from any thread; nothing that the receiver does raises an error here."""
        made = Event(self._url, as_json(event), event.get("id"), final=final)
        self._loop.call_soon_threadsafe(self._add, made)

    def _add(self, event: Event) -> None:
        size = event.size + EVENT_BYTES
        # The final event repeats what is left out, and is taken in any case: its prediction was.
        if not (event.final or self._outbox.has_place(self._who, size)):
            event.drop()
            self._outbox.count("lost")
            return
        holding = self._outbox.backlog.hold(self._who, size, event.give_way, force=True)
        assert holding
        self._outbox.events.add(event)
        if event.size > LARGE:
            event.storing = self._loop.run_in_executor(self._outbox.disk, event.store, self._outbox.files.new())
        self._queue.append((event, holding))
        if not self._running:
            self._running = self._loop.create_task(self._run())

    async def _run(self) -> None:
        while self._queue:
            event, holding = self._queue.popleft()
            try:
                if event.storing:
                    await event.storing
                await self._send(event, self._retry if event.final else Retry(0))
            finally:
                event.drop()
                self._outbox.events.discard(event)
                holding.let_go()
        self._running = None

    async def _send(self, event: Event, retry: Retry) -> None:
        again = False
        while True:
            response, failure = None, "no answer"
            try:
                response = await self._attempt(event, again=again)
                failure = f"status {response.status_code}"
                if not retry.is_retry("POST", response.status_code, "Retry-After" in response.headers):
                    break
            except EgressError as error:
                log.warning("webhook refused: %s", error)
                self._outbox.count("refused")
                return
            except Exception as error:  # whatever a hostile receiver can make requests, urllib3 or http.client raise
                failure = type(error).__name__
            if self._outbox.ending.is_set():
                self._outbox.lose(event)
                return
            try:
                retry = retry.increment("POST", self._url, error=HTTPError(failure))
            except MaxRetryError:
                break
            await self._pause(event, _asked_pause(retry, response) or retry.get_backoff_time())
            if event.is_given_up:
                self._outbox.count("lost")
                return
            again = True
        if response is None or not response.ok:
            event.report(failure)
            self._outbox.count("failed")
        else:
            self._outbox.count("delivered")

    async def _pause(self, event: Event, seconds: float) -> None:
        """Wait before another attempt; not when the server ends."""
        event.is_pausing = True
        with suppress(TimeoutError):
            await asyncio.wait_for(self._outbox.ending.wait(), min(seconds, LONGEST_PAUSE))
        event.is_pausing = False

    async def _attempt(self, event: Event, *, again: bool) -> requests.Response:
        async with self._outbox.turns.turn(self._who[0], again=again) as turn:
            session = self._outbox.egress.session(SECONDS)
            turn.cut = session.deadline.expire
            return await self._loop.run_in_executor(self._outbox.senders, self._post, session, event)

    def _post(self, session: Session, event: Event) -> requests.Response:
        with session:
            session.headers.update(self._headers)
            session.hooks["response"].append(_keep_method)
            body = event.body()
            session.headers.update(self._signature(event, body))
            with session.post(self._url, data=body, timeout=TIMEOUT, stream=True) as response:
                response.request.body = None  # it would be kept until the next attempt
                return response  # its body is not read

    def _signature(self, event: Event, body: bytes) -> dict[str, str]:
        """The headers of Standard Webhooks, if there is a secret."""
        if not self._outbox.signer:
            return {}
        now = datetime.now(UTC)
        return {
            "webhook-id": event.id,
            "webhook-timestamp": str(int(now.timestamp())),
            "webhook-signature": self._outbox.signer.sign(event.id, now, body.decode()),
        }


def _who(url: str) -> Who:
    """The receiver at an address."""
    parts = urllib.parse.urlsplit(url)
    return host_is(parts.hostname or "", parts.port)


def _asked_pause(retry: Retry, response: requests.Response | None) -> float | None:
    """The seconds of the Retry-After header; None if there is none or it cannot be read."""
    try:
        return retry.get_retry_after(response.raw) if response is not None else None
    except Exception:  # a hostile header can make urllib3 or the date functions raise
        return None


def _keep_method(response: requests.Response, **_: Any) -> None:
    """Follow a redirect with the event: at 301, 302 and 303 requests turns a POST into a GET without a body."""
    if response.is_redirect:
        response.status_code = 307
