"""Delivers the events of predictions to their webhooks, beside the work.

The stock server sends an event where it arises: a receiver that is slow or down holds up every prediction. Here
each prediction has a queue of its own and threads that only send; what is sent and how often stays as Cog promises.
"""

import asyncio
import json
import logging
import urllib.parse
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from weakref import WeakValueDictionary

import requests
from urllib3.exceptions import HTTPError, MaxRetryError
from urllib3.util.retry import Retry

from blip.egress import Deadline, EgressError, drop_redirect_body

SECONDS = 15.0  # for one attempt
TIMEOUT = (5, SECONDS)  # seconds to connect, seconds without a byte
LONGEST_PAUSE = 120.0  # seconds between two attempts
MAX_BACKLOG = 256_000_000  # bytes of events that wait; an event carries the inputs of its prediction
EVENT_BYTES = 20_000  # of an event beside its JSON, for its session
THREADS = 32
THREADS_PER_HOST = 4  # so that a slow receiver leaves some to the others

log = logging.getLogger("blip.webhooks")


class Backlog:
    """The events that wait or are being sent; counted on the event loop's thread only."""

    events = 0
    size = 0  # bytes

    @classmethod
    def is_full(cls) -> bool:
        """Whether predictions with a webhook have to be refused."""
        return cls.size >= MAX_BACKLOG


_senders = ThreadPoolExecutor(THREADS, "webhook")
_turns: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()  # by host


class Delivery:
    """The way of one prediction's events to its webhook, in their order.

    Made on the event loop's thread; `session` carries the headers and `retry` says when a final event is sent again.
    """

    def __init__(self, url: str, session: requests.Session, retry: Retry) -> None:
        self._loop = asyncio.get_running_loop()
        self._url, self._session, self._retry = url, session, retry
        self._host = urllib.parse.urlsplit(url).hostname or ""
        self._turn = _turns.setdefault(self._host, asyncio.Semaphore(THREADS_PER_HOST))
        self._queue: deque[tuple[bytes, bool]] = deque()
        self._running: asyncio.Task[None] | None = None
        session.hooks["response"] = [drop_redirect_body, _keep_method]

    def post(self, event: dict[str, Any], final: bool = False) -> None:
        """Queue an event; from any thread, and without an error whatever the receiver does."""
        self._loop.call_soon_threadsafe(self._add, json.dumps(event).encode(), final)

    def _add(self, body: bytes, final: bool) -> None:
        if not final and Backlog.is_full():  # the final event tells it all again
            return
        Backlog.events += 1
        Backlog.size += len(body) + EVENT_BYTES
        self._queue.append((body, final))
        if not self._running:
            self._running = self._loop.create_task(self._run())

    async def _run(self) -> None:
        while self._queue:
            body, final = self._queue.popleft()
            try:
                await self._send(body, self._retry if final else Retry(0))
            finally:
                Backlog.events -= 1
                Backlog.size -= len(body) + EVENT_BYTES
        self._running = None

    async def _send(self, body: bytes, retry: Retry) -> None:
        while True:
            response, failure = None, "no answer"
            try:
                async with self._turn:
                    response = await self._loop.run_in_executor(_senders, self._attempt, body)
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
        with Deadline(SECONDS):
            headers = {"Content-Type": "application/json"}
            with self._session.post(self._url, data=body, headers=headers, timeout=TIMEOUT, stream=True) as response:
                return response  # its body is of no interest


def _asked_pause(retry: Retry, response: requests.Response | None) -> float | None:
    """The seconds of the Retry-After header, where there is one that can be read."""
    try:
        return retry.get_retry_after(response.raw) if response is not None else None
    except Exception:  # a hostile one fails in urllib3 and in the calendar
        return None


def _keep_method(response: requests.Response, **_: Any) -> None:
    """Have a redirect followed with the event: requests makes a POST a GET without a body at 301, 302 and 303."""
    if response.is_redirect:
        response.status_code = 307
