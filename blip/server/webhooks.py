"""Delivers the events of predictions to their webhooks without delaying predictions.

The stock server sends an event before it goes on, so a receiver that is slow or down holds up every prediction. Here
each prediction has its own queue, and separate threads send. What is sent and how often stays as Cog promises.
"""

import asyncio
import json
import logging
import urllib.parse
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from weakref import WeakValueDictionary

import requests
from cog.schema import PredictionResponse, Status
from cog.server import webhook as stock
from cog.server.response_throttler import ResponseThrottler
from fastapi.encoders import jsonable_encoder
from requests.adapters import HTTPAdapter
from urllib3.exceptions import HTTPError, MaxRetryError
from urllib3.util.retry import Retry

from blip.server.egress import Egress, EgressError

SECONDS = 15.0  # for one attempt
TIMEOUT = (5, SECONDS)  # seconds to connect, seconds without a byte
LONGEST_PAUSE = 120.0  # seconds between two attempts
MAX_BACKLOG = 256_000_000  # bytes of events that wait; an event carries the inputs of its prediction
EVENT_BYTES = 20_000  # that an event takes in addition to its JSON, for its session
THREADS = 32
THREADS_PER_HOST = 4  # so that a slow receiver leaves threads for the others

log = logging.getLogger("blip.webhooks")


class Outbox:
    """The events that wait or are being sent; counted on the event loop's thread only."""

    def __init__(self, egress: Egress) -> None:
        self.egress = egress
        self.events = 0
        self.size = 0  # bytes
        self.senders = ThreadPoolExecutor(THREADS, "webhook")
        self._turns: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()  # by host

    def is_full(self) -> bool:
        """Whether predictions with a webhook must be refused."""
        return self.size >= MAX_BACKLOG

    def turn(self, host: str) -> asyncio.Semaphore:
        """The semaphore that limits how many events are sent to `host` at a time."""
        return self._turns.setdefault(host, asyncio.Semaphore(THREADS_PER_HOST))

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
        self._host = urllib.parse.urlsplit(url).hostname or ""
        self._turn = outbox.turn(self._host)
        self._queue: deque[tuple[bytes, bool]] = deque()
        self._running: asyncio.Task[None] | None = None

    def post(self, event: dict[str, Any], final: bool = False) -> None:
        """Queue an event, from any thread; nothing that the receiver does raises an error here."""
        self._loop.call_soon_threadsafe(self._add, json.dumps(event).encode(), final)

    def _add(self, body: bytes, final: bool) -> None:
        if not final and self._outbox.is_full():  # the final event repeats everything
            return
        self._outbox.events += 1
        self._outbox.size += len(body) + EVENT_BYTES
        self._queue.append((body, final))
        if not self._running:
            self._running = self._loop.create_task(self._run())

    async def _run(self) -> None:
        while self._queue:
            body, final = self._queue.popleft()
            try:
                await self._send(body, self._retry if final else Retry(0))
            finally:
                self._outbox.events -= 1
                self._outbox.size -= len(body) + EVENT_BYTES
        self._running = None

    async def _send(self, body: bytes, retry: Retry) -> None:
        while True:
            response, failure = None, "no answer"
            try:
                async with self._turn:
                    response = await self._loop.run_in_executor(self._outbox.senders, self._attempt, body)
                failure = f"status {response.status_code}"
                if not retry.is_retry("POST", response.status_code, "Retry-After" in response.headers):
                    break
            except EgressError as error:
                log.warning("webhook refused: %s", error)
                return
            except Exception as error:  # whatever a hostile receiver can make requests, urllib3 or http.client raise
                failure = type(error).__name__
            try:
                retry = retry.increment("POST", self._url, error=HTTPError(failure))
            except MaxRetryError:
                break
            await asyncio.sleep(min(_asked_pause(retry, response) or retry.get_backoff_time(), LONGEST_PAUSE))
        if response is None or not response.ok:
            log.warning("webhook to %s failed: %s", self._host, failure)

    def _attempt(self, body: bytes) -> requests.Response:
        with self._outbox.egress.session(SECONDS) as session:
            session.headers.update(self._headers)
            session.hooks["response"].append(_keep_method)
            with session.post(self._url, data=body, timeout=TIMEOUT, stream=True) as response:
                return response  # its body is not read


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
