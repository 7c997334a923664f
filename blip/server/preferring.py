"""Answers as the client prefers: at the end of the prediction, at once, or after some seconds."""

import asyncio
from collections.abc import Callable
from typing import Any

from fastapi.encoders import jsonable_encoder

from blip.server.answers import Answer
from blip.server.records import Current

Endpoint = Callable[..., Any]


class Preferring:
    """Gives Cog's endpoints what the Prefer header of the request that is being answered means.

    Stock knows the header as a whole to be "respond-async" or not.
    """

    def __init__(self, current: Current) -> None:
        self._current = current
        self._running: set[asyncio.Future[Any]] = set()  # that are answered already; asyncio would lose them

    def wrap(self, predict: Endpoint) -> Endpoint:
        """Make an endpoint that heeds preferences of one that runs a prediction."""

        async def preferring(**options: Any) -> Any:
            record = self._current.get()
            wait = record.preference.wait
            if wait is None:
                prefer = "respond-async" if record.preference.respond_async else None
                return await predict(**{**options, "prefer": prefer})
            running = asyncio.ensure_future(predict(**{**options, "prefer": None}))
            try:
                await asyncio.sleep(0)  # the prediction starts
                await asyncio.wait({running}, timeout=wait)
            except asyncio.CancelledError:  # the client has hung up
                running.cancel()
                raise
            if running.done():
                return running.result()
            self._running.add(running)
            running.add_done_callback(self._forget)
            assert record.prediction
            return Answer(jsonable_encoder(record.prediction), 202)

        return preferring

    def _forget(self, running: "asyncio.Future[Any]") -> None:
        self._running.discard(running)
        if not running.cancelled():
            running.exception()  # its client has been answered; the log has what became of the prediction
