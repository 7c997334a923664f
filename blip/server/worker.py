"""The predictor's process and the server's end of the pipe to it."""

import asyncio
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from cog.server import worker as stock
from cog.server.connection import AsyncConnection
from cog.server.eventtypes import Cancel, Done, Envelope, PredictionInput, PredictionMetric
from typing_extensions import override

from blip.config import COMPUTING
from blip.errors import UserError
from blip.server.extending import overrides, rebind
from blip.server.inputs import ImageAddress
from blip.server.logs import tell, tell_of_thread

FACTS_SECONDS = 1.0  # between two looks at the device's memory, each of which takes a fraction of a millisecond


@dataclass(frozen=True)
class Facts:
    """What the predictor's process tells of it: what it runs, and the memory of the device that it has."""

    about: dict[str, str]
    device_bytes: int | None = None


@overrides
class Worker(stock.Worker):
    """Cog's worker, where a prediction ends exactly once: by itself, cancelled in whatever state, or cut off.

    Messages of 16 KiB or more get mixed up when several threads send at once; here one thread sends.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        for name, value in COMPUTING.items():
            os.environ.setdefault(name, value)  # for the process that is started later
        super().__init__(*args, **options)
        self._sender = ThreadPoolExecutor(1, "sender")
        #: The images of predictions that have not been sent to the process; guarded by Cog's `_predictions_lock`.
        self._fetching: dict[str | None, list[ImageAddress]] = {}
        self.on_death: Callable[[], None] = lambda: None
        self.facts = Facts({})

    @override
    def cancel(self, tag: str | None = None) -> None:
        """Cancel a prediction, started or not; do nothing if it has ended."""
        with self._predictions_lock:
            state = self._predictions_in_flight.get(tag)
            if state is None or state.cancel_sent:
                return
            state.cancel_sent = True
            images = self._fetching.pop(tag, None)
            if images is None:
                self._sender.submit(self._events.send, Envelope(Cancel(), tag))
        if images is not None:
            self._stop_fetching(images)
            self._end(Done(canceled=True), tag)

    def cut_off(self, reason: str) -> int:
        """End all predictions as failed, and take no others; how many there were."""
        with self._predictions_lock:
            self._state = stock.WorkerState.DEFUNCT
            tags = list(self._predictions_in_flight)
            fetching = list(self._fetching.values())
            self._fetching.clear()
        for images in fetching:
            self._stop_fetching(images)
        return sum(self._end(Done(error=True, error_detail=reason), tag) for tag in tags)

    @override
    def _start_prediction(
        self, tag: str | None, payload: dict[str, Any], *, context: dict[str, str] | None
    ) -> Callable[[], None]:
        images = [value for value in payload.values() if isinstance(value, ImageAddress)]
        self._fetching[tag] = images

        def start() -> None:
            """Run in the prediction's own thread, so slow downloads delay no other; stock shares eight threads."""
            failure = None
            try:
                for name, value in payload.items():
                    if isinstance(value, ImageAddress):
                        began = time.monotonic()
                        payload[name] = value.convert()
                        if value.is_remote:
                            seconds = time.monotonic() - began
                            super(Worker, self)._publish(Envelope(PredictionMetric("download_time", seconds), tag))
            except Exception as error:
                failure = Done(error=True, error_detail=str(error))
            with self._predictions_lock:
                ended = self._fetching.get(tag) is not images
                if not ended:
                    del self._fetching[tag]
                    if not failure:
                        self._sender.submit(self._events.send, Envelope(PredictionInput(payload, context or {}), tag))
            if ended:  # while the image was fetched
                for image in images:
                    image.unlink(missing_ok=True)
            elif failure:
                self._end(failure, tag)

        return start

    @override
    def _publish(self, e: Envelope) -> None:
        if isinstance(e.event, Facts):
            self.facts = e.event
        elif not (isinstance(e.event, Done) and e.tag is not None):  # `_end` tells the end of a prediction
            super()._publish(e)

    @override
    def _complete_prediction(self, done: Done, tag: str | None) -> None:
        self._end(done, tag)

    def _end(self, done: Done, tag: str | None) -> bool:
        """End a prediction; tell whether it had not ended before."""
        with self._predictions_lock:
            state = self._predictions_in_flight.pop(tag, None)
        if state is None:
            return False
        super()._publish(Envelope(done, tag))
        state.result.set_result(done)
        return True

    @staticmethod
    def _stop_fetching(images: list[ImageAddress]) -> None:
        for image in images:
            image.cancel()

    @override
    def _consume_events(self) -> None:
        try:
            super()._consume_events()
        finally:
            if not self._terminating and self._setup_result.done() and not self._setup_result.exception():
                self.on_death()


@overrides
class _Connection(AsyncConnection):
    """Lets a prediction take its first step before it is cancelled: a task that never ran cannot report its end."""

    @override
    async def recv(self) -> Envelope:
        envelope: Envelope = await super().recv()
        if isinstance(envelope.event, Cancel):
            await asyncio.sleep(0)
        return envelope


@overrides
class ChildWorker(stock._ChildWorker):
    """Cog's process of the predictor, which leaves stopping to the server.

    A signal to the whole process group (systemd, GNU timeout) would end it in the middle of its work.
    """

    @override
    def run(self) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        threading.excepthook = tell_of_thread
        rebind(stock, "AsyncConnection", _Connection)
        rebind(stock, "traceback", SimpleNamespace(print_exc=self._tell_error))
        super().run()

    @override
    def _setup(self, redirector: Any) -> None:
        super()._setup(redirector)
        self._told, self._next_told = Facts({}), 0.0
        self._tell_facts()

    @override
    async def _apredict(self, *args: Any, **options: Any) -> None:
        await super()._apredict(*args, **options)
        self._tell_facts()

    def _tell_facts(self) -> None:
        """Send what has changed about the predictor, if it tells of itself, and not too often."""
        facts_of = getattr(self._predictor, "facts", None)
        if not facts_of or time.monotonic() < self._next_told:
            return
        facts = Facts(*facts_of())
        self._next_told = time.monotonic() + FACTS_SECONDS
        if facts != self._told:
            self._told = facts
            self._events.send(Envelope(facts, None))  # type: ignore[arg-type] # not one of Cog's own events

    def _tell_error(self) -> None:
        """Tell of the current exception in place of its traceback.

        Of a user's error the prediction's logs have the sentence. Any other is one line of the server's log.
        """
        error = sys.exc_info()[1]
        text = f"{error}\n"
        if error and not isinstance(error, UserError):
            text = traceback.format_exc()
            tell(error, "blip.predictor", "ERROR")
        self._stream_write_hook(sys.stderr.name, text)

    @override
    def terminate(self) -> None:
        """End the process, which ignores SIGTERM."""
        self.kill()
