"""The predictions that run, by their ids."""

from collections.abc import Callable
from typing import Any

from cog.schema import PredictionRequest
from cog.server.errors import RunnerBusyError
from cog.server.runner import PredictionRunner, PredictTask
from cog.server.worker import WorkerState
from typing_extensions import override

from blip.server.extending import overrides
from blip.server.worker import Worker


@overrides
class Runner(PredictionRunner):
    """Cog's runner, which refuses what it cannot run. Stock answers 500, and 500 to all later requests."""

    _worker: Worker

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
        return super().predict(prediction, is_train, task_kwargs)

    def has_work(self) -> bool:
        """Whether a prediction has not ended yet."""
        return bool(self._predict_tasks)

    def on_death(self, call: Callable[[], None]) -> None:
        """Call `call` when the worker process ends by itself after its setup."""
        self._worker.on_death = call
