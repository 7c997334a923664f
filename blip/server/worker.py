"""The predictor's process and the server's end of the pipe to it."""

import asyncio
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from cog.server import worker as stock
from cog.server.connection import AsyncConnection
from cog.server.eventtypes import Cancel, Done, Envelope, PredictionInput
from cog.types import URLPath
from typing_extensions import override

from blip.server.extending import overrides, rebind


@overrides
class Worker(stock.Worker):
    """Cog's worker, with one thread that sends.

    Messages of 16 KiB or more get mixed up when several threads send at once. One sender also keeps a prediction and
    its cancellation in order; stock loses a cancellation that comes while the image is fetched.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._sender = ThreadPoolExecutor(1, "sender")
        self.on_death: Callable[[], None] = lambda: None

    @override
    def cancel(self, tag: str | None = None) -> None:
        """Cancel a prediction, started or not; do nothing if it has ended."""
        with self._predictions_lock:
            state = self._predictions_in_flight.get(tag)
            if state and not state.cancel_sent:
                state.cancel_sent = True
                self._sender.submit(self._events.send, Envelope(Cancel(), tag))

    @override
    def _start_prediction(
        self, tag: str | None, payload: dict[str, Any], *, context: dict[str, str] | None
    ) -> Callable[[], None]:
        def start() -> None:
            """Run in the prediction's own thread, so slow downloads delay no other; stock shares eight threads."""
            try:
                for name, value in payload.items():
                    if isinstance(value, URLPath):
                        payload[name] = value.convert()
                envelope = Envelope(PredictionInput(payload, context or {}), tag)
                begun = self._sender.submit(self._send_unless_cancelled, envelope).result()
                done = None if begun else Done(canceled=True)
            except Exception as error:
                done = Done(error=True, error_detail=str(error))
            if done and tag in self._predictions_in_flight:  # the death of the worker ends all of them
                self._publish(Envelope(done, tag))
                self._complete_prediction(done, tag)

        return start

    def _send_unless_cancelled(self, envelope: Envelope) -> bool:
        if self._predictions_in_flight[envelope.tag].cancel_sent:
            return False
        self._events.send(envelope)
        return True

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
        rebind(stock, "AsyncConnection", _Connection)
        super().run()

    @override
    def terminate(self) -> None:
        """End the process, which ignores SIGTERM."""
        self.kill()
