"""Predictions that run, and for a while those that have ended: whoever knows an id can ask for the result."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from cog.schema import PredictionResponse
from fastapi.encoders import jsonable_encoder

from blip.server.answers import as_json

SECONDS = 3600.0  # that a prediction is kept after its end
NUMBER = 10_000  # of predictions that are kept
SIZE = 64_000_000  # bytes of them


def _kept(prediction: PredictionResponse) -> bytes:
    """The state of a prediction without its image, which may be large, as JSON."""
    state = prediction.model_dump(exclude={"input": {"image"}})
    try:
        written = as_json(state)
    except TypeError:  # see there; what is no JSON, such as times, has to be made so in Python then
        written = as_json(jsonable_encoder(state))
    return bytes(memoryview(b"".join(written)))  # a copy: orjson's own bytes take 4 KB, however few they are


@dataclass(frozen=True, slots=True)
class _Ended:
    state: bytes
    expires: float  # on the monotonic clock


class History:
    """Predictions by id, used on the event loop's thread only; those that ended first are the first to go."""

    def __init__(self) -> None:
        self._running: dict[str, Callable[[], PredictionResponse]] = {}
        self._ended: dict[str, _Ended] = {}
        self._size = 0

    def start(self, name: str, state: Callable[[], PredictionResponse]) -> None:
        """Note a prediction that runs; `state` gives what is known of it."""
        self._forget(name)
        self._running[name] = state

    def end(self, name: str) -> None:
        """Keep a prediction that has ended, as long as there is room."""
        self._forget(name)
        state = _kept(self._running.pop(name)())
        self._ended[name] = _Ended(state, time.monotonic() + SECONDS)
        self._size += len(state)
        while len(self._ended) > NUMBER or self._size > SIZE:
            self._forget(next(iter(self._ended)))

    def get(self, name: str) -> bytes | None:
        """The state of a prediction as JSON; None where it is not known."""
        now = time.monotonic()
        while self._ended and (oldest := next(iter(self._ended.items())))[1].expires < now:
            self._forget(oldest[0])
        if running := self._running.get(name):
            return _kept(running())
        ended = self._ended.get(name)
        return ended.state if ended else None

    def _forget(self, name: str) -> None:
        if ended := self._ended.pop(name, None):
            self._size -= len(ended.state)
