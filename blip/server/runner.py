"""The predictions that run, by their ids."""

import asyncio
import functools
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import structlog
from cog.schema import PredictionRequest
from cog.server.errors import RunnerBusyError
from cog.server.eventtypes import Done
from cog.server.runner import PredictionRunner, PredictTask, SetupTask
from cog.server.worker import WorkerState
from typing_extensions import override

from blip.server.extending import overrides
from blip.server.history import History
from blip.server.records import Current, Record
from blip.server.worker import Facts, Worker

FRESH, STALE = 0.5, 2.0  # seconds that a worker's health is not asked for again, and at most that it is told

log = structlog.get_logger("blip.server")


@overrides
class Setup(SetupTask):
    """Cog's setup, which tells why it failed in one sentence. Stock logs its own traceback."""

    @override
    def _handle_done(self, f: "Future[Done]") -> None:
        if error := f.exception():
            log.error("the setup failed", error=str(error))
            self.append_logs(f"{error}\n")
            self.failed()


@overrides
class Prediction(PredictTask):
    """Cog's prediction, which is cancelled when the client who waits for it hangs up."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.cancel: Callable[[], None] = lambda: None

    @override
    def track(self, fut: "Future[Done]") -> None:
        super().track(fut)
        fut.add_done_callback(self._let_go)

    def _let_go(self, fut: "Future[Done]") -> None:
        """Let the callbacks go: they know this prediction, which would then stay, with its image, as garbage."""
        self._fut = Future()
        if error := fut.exception():
            self._fut.set_exception(error)
        else:
            self._fut.set_result(fut.result())

    @override
    async def wait_async(self) -> None:
        assert self._fut
        try:
            # Stock would cancel the future itself, and the worker's thread would then fail to complete it.
            await asyncio.shield(asyncio.wrap_future(self._fut))
        except asyncio.CancelledError:
            self.cancel()
            raise


@overrides
class Runner(PredictionRunner):
    """Cog's runner, which refuses what it cannot run. Stock answers 500, and 500 to all later requests.

    `current` has the record of the request that is being answered; a prediction keeps what it holds until its end.
    """

    _worker: Worker

    def __init__(self, *, current: Current, history: History, **parts: Any) -> None:
        super().__init__(**parts)
        self._current, self._history = current, history
        self._health = Done()
        self._health_known = -STALE  # on the monotonic clock
        self._asking: asyncio.Task[None] | None = None

    @override
    async def healthcheck(self) -> Done:
        """Whether predictions can be made, by the latest answer of the worker process.

        That takes four threads of two busy processes. Stock asks anew for each health check, and each waits.
        """
        age = time.monotonic() - self._health_known
        if age > FRESH and (self._asking is None or self._asking.done()):
            self._asking = asyncio.create_task(self._ask_for_health())
        if self._asking and age > STALE:
            await asyncio.shield(self._asking)
        return self._health

    async def _ask_for_health(self) -> None:
        if self._worker._state is WorkerState.READY:  # when it has ended the app says so
            self._health = await super().healthcheck()
            self._health_known = time.monotonic()

    @override
    def predict(
        self, prediction: PredictionRequest, is_train: bool, task_kwargs: dict[str, Any] | None = None
    ) -> PredictTask:
        """Start a prediction.

        Raises:
            RunnerBusyError: all slots are taken, one with this id is running, or the worker process has ended.
        """
        if prediction.id in self._predict_tasks or self._worker._state is not WorkerState.READY:
            raise RunnerBusyError("prediction running")
        task = super().predict(prediction, is_train, task_kwargs)
        assert isinstance(task, Prediction)
        with self._predict_tasks_lock:
            tags = [tag for tag, known in self._predict_tasks.items() if known is task]
        for tag in tags:  # none, if it has ended
            task.cancel = functools.partial(self._worker.cancel, tag)
        if record := self._current.get(None):
            self._follow(task, record)
        return task

    def _follow(self, task: Prediction, record: Record) -> None:
        """Have a prediction keep what its request holds, and be known to those who ask for it."""
        name, holding = task.result.id, record.holding
        assert name and holding
        holding.keep()
        record.start(task.result)
        self._history.start(name, lambda: task.result)
        loop = asyncio.get_running_loop()

        def over() -> None:
            holding.let_go()
            self._history.end(name)
            record.end()

        task.add_done_callback(lambda _: _call_in(loop, over))

    def in_progress(self) -> int:
        """How many predictions have not ended."""
        return len(self._predict_tasks)

    @property
    def slots(self) -> int:
        """How many predictions can run at a time."""
        return self._max_concurrency

    @property
    def facts(self) -> Facts:
        """What is known of the predictor, from its own process."""
        return self._worker.facts

    def process(self) -> int | None:
        """The id of the predictor's process; None before it has one."""
        pid: int | None = self._worker._child.pid
        return pid

    def has_work(self) -> bool:
        """Whether a prediction has not ended yet."""
        return self.in_progress() > 0

    def cut_off(self, reason: str) -> int:
        """End all predictions as failed, and take no others; how many there were."""
        return self._worker.cut_off(reason)

    def on_death(self, call: Callable[[], None]) -> None:
        """Call `call` when the worker process ends by itself after its setup."""
        self._worker.on_death = call


def _call_in(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    """Call `call` in the event loop's thread, from any."""
    loop.call_soon_threadsafe(call)
