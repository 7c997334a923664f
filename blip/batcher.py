"""Requests wait here while the device is busy; when it is free, those that wait run as one batch."""

import os
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

NICE = 5  # of the batching thread: what answers clients comes first
TRIES = 20  # full batches of a smaller size, after the memory was too small for a larger one


class BatcherError(RuntimeError):
    """The batcher has stopped and takes no more requests."""


@dataclass(frozen=True)
class Result:
    """One request's value, how its batch ran, and what its sample took before (times in seconds)."""

    value: Any
    queue_time: float
    device_time: float
    batch_size: int
    decode_time: float = 0.0


@dataclass(frozen=True)
class _Request:
    sample: Any
    future: "Future[Result]"
    submitted: float


class Batcher:
    """One worker thread that runs samples of the same task together.

    `run(task, samples)` returns one value or exception per sample. When it raises, `check()` tests the device.
    If the device works, each half of the batch is tried again, so that only a sample that fails on its own fails;
    where none does, memory was too small, and batches are smaller for a while. If `check()` raises too, the thread
    dies. When it dies, for whatever reason, all waiting requests get the error, and then `on_death()` is called.
    """

    def __init__(
        self,
        run: Callable[[str, Sequence[Any]], Sequence[Any]],
        max_batch: int,
        check: Callable[[], None] = lambda: None,
        on_death: Callable[[], None] = lambda: None,
    ) -> None:
        self._run = run
        self._check = check
        self._on_death = on_death
        self._max_batch = max_batch
        self._queues: dict[str, deque[_Request]] = {}
        self._sizes: dict[str, _Size] = {}
        self._changed = threading.Condition()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)
        self._thread.start()

    def submit(self, task: str, sample: Any) -> "Future[Result]":
        """Queue a sample; cancelling the future before its batch starts takes it out of the queue.

        Raises:
            BatcherError: the worker has died.
        """
        return self.submit_together(task, [sample])[0]

    def submit_together(self, task: str, samples: Sequence[Any]) -> "list[Future[Result]]":
        """`submit` several samples, which an idle device runs as one batch."""
        now = time.perf_counter()
        requests = [_Request(sample, Future(), now) for sample in samples]
        with self._changed:
            if self._failure:
                raise self._died(self._failure) from self._failure
            self._queues.setdefault(task, deque()).extend(requests)
            self._changed.notify()
        return [request.future for request in requests]

    def close(self) -> None:
        """End the worker when its batch has run; what waits gets an error."""
        self._give_up(BatcherError("it was closed"))
        self._thread.join()

    def is_alive(self) -> bool:
        """Whether the worker can still run requests."""
        return self._thread.is_alive() and self._failure is None

    def _work(self) -> None:
        taken: list[_Request] = []
        try:
            # On Linux of this thread alone, and of those that it starts to compute.
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
            while batch := self._take():
                task, taken = batch
                self._run_batch(task, taken)
        except BaseException as error:
            self._give_up(error, taken)
            threading.excepthook(threading.ExceptHookArgs((type(error), error, error.__traceback__, self._thread)))
            self._on_death()

    def _give_up(self, error: BaseException, taken: Sequence[_Request] = ()) -> None:
        """Take no more requests, and give what waits or was taken the error."""
        with self._changed:
            self._failure = self._failure or error
            waiting = [request for queue in self._queues.values() for request in queue]
            self._queues.clear()
            self._changed.notify()
        waiting = [request for request in waiting if request.future.set_running_or_notify_cancel()]
        for request in (*taken, *waiting):
            if not request.future.done():
                request.future.set_exception(self._died(self._failure))

    @staticmethod
    def _died(error: BaseException) -> BatcherError:
        """The error for requests that come too late; of some errors, such as CUDA's, the first line says what it is."""
        return BatcherError(f"the batching thread has died: {str(error).partition(chr(10))[0]}")

    def _take(self) -> tuple[str, list[_Request]] | None:
        """Take the next batch: requests of the task whose first request has waited longest, oldest first.

        None after `close`.
        """
        with self._changed:
            while True:
                if self._failure:
                    return None
                waiting = {task: queue for task, queue in self._queues.items() if queue}
                if not waiting:
                    self._changed.wait()
                    continue
                task = min(waiting, key=lambda name: waiting[name][0].submitted)
                size = self._sizes.setdefault(task, _Size(self._max_batch)).take(len(waiting[task]))
                taken: list[_Request] = []
                while waiting[task] and len(taken) < size:
                    request = waiting[task].popleft()
                    if request.future.set_running_or_notify_cancel():
                        taken.append(request)
                if taken:
                    return task, taken

    def _run_batch(self, task: str, requests: Sequence[_Request]) -> bool:
        """Run a batch, or its parts if it fails; return whether every request came through."""
        started = time.perf_counter()
        failure = None
        try:
            values = self._run(task, [request.sample for request in requests])
            assert len(values) == len(requests)
        except Exception as error:
            failure = error
        if failure is not None:
            # Outside of `except`, and with its frames emptied: they hold what the batch had on the device.
            _let_go(failure)
            self._check()
            return self._run_parts(task, requests, failure)
        device_time = time.perf_counter() - started
        for request, value in zip(requests, values, strict=True):
            if isinstance(value, Exception):
                request.future.set_exception(value)
            else:
                queue_time = started - request.submitted
                request.future.set_result(Result(value, queue_time, device_time, len(requests)))
        return True

    def _run_parts(self, task: str, requests: Sequence[_Request], failure: Exception) -> bool:
        if len(requests) == 1:
            requests[0].future.set_exception(failure)
            return False
        half = len(requests) // 2
        parts = [self._run_batch(task, requests[:half]), self._run_batch(task, requests[half:])]
        if all(parts):  # no sample was to blame: there was too little room for all of them
            self._sizes[task].shrink(half)
        return all(parts)


class _Size:
    """How many requests of a task run together: all that are allowed, until so many did not fit."""

    def __init__(self, most: int) -> None:
        self._most = self._now = most
        self._full_batches = 0

    def take(self, waiting: int) -> int:
        """The size of the next batch. After `TRIES` full ones that fitted, one of twice the size is tried."""
        size = min(waiting, self._now)
        if self._now < self._most and size == self._now:
            self._full_batches += 1
            if self._full_batches > TRIES:
                self._full_batches = 0
                self._now = min(2 * self._now, self._most)
        return size

    def shrink(self, fitted: int) -> None:
        """Take no more than `fitted` from now on."""
        self._now = min(self._now, fitted)
        self._full_batches = 0


def _let_go(error: BaseException | None) -> None:
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
