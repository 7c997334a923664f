"""The batcher with real threads; the device is a function that waits for leave to go on."""

import threading
import weakref
from collections.abc import Sequence
from typing import Any

import pytest

from benchmarks.harness import wait_until
from blip.batcher import TRIES, Batcher, BatcherError

LIMIT = 30.0  # seconds


class Device:
    """Doubles numbers; holds each batch until it is let go, and keeps the batches it saw."""

    def __init__(self, capacity: int = 1000) -> None:
        self.batches: list[tuple[str, list[Any]]] = []
        self.capacity = capacity
        self.started = threading.Semaphore(0)
        self.leave = threading.Semaphore(0)

    def run(self, task: str, samples: Sequence[Any]) -> list[Any]:
        self.batches.append((task, list(samples)))
        self.started.release()
        assert self.leave.acquire(timeout=LIMIT)
        if len(samples) > self.capacity:
            raise MemoryError("out of memory")
        if "poison" in samples:
            raise RuntimeError("poisoned batch")
        if "death" in samples:
            raise SystemExit("the device is gone\nand a hint")
        return [ValueError(f"bad sample {s}") if isinstance(s, str) else 2 * s for s in samples]

    def wait_for_batch(self) -> None:
        assert self.started.acquire(timeout=LIMIT)

    def let_go(self, batches: int = 100) -> None:
        self.leave.release(batches)


def test_a_request_to_an_idle_device_runs_at_once_and_alone() -> None:
    device = Device()
    device.let_go()
    result = Batcher(device.run, max_batch=8).submit("double", 4).result(LIMIT)
    assert (result.value, result.batch_size) == (8, 1)
    assert result.queue_time >= 0
    assert result.device_time >= 0


def test_what_waits_runs_together_up_to_the_largest_batch() -> None:
    device = Device()
    batcher = Batcher(device.run, max_batch=3)
    first = batcher.submit("double", 0)
    device.wait_for_batch()
    waiting = [batcher.submit("double", n) for n in range(1, 6)]
    device.let_go()
    assert [future.result(LIMIT).value for future in (first, *waiting)] == [0, 2, 4, 6, 8, 10]
    assert [samples for _, samples in device.batches] == [[0], [1, 2, 3], [4, 5]]
    assert [future.result().batch_size for future in waiting] == [3, 3, 3, 2, 2]


def test_the_task_that_has_waited_longest_goes_first_so_none_starves() -> None:
    device = Device()
    batcher = Batcher(device.run, max_batch=2)
    futures = [batcher.submit("a", 0)]
    device.wait_for_batch()
    order = [("a", 1), ("b", 2), ("a", 3), ("a", 4), ("c", 5), ("b", 6)]
    futures += [batcher.submit(task, n) for task, n in order]
    device.let_go()
    for future in futures:
        future.result(LIMIT)
    assert device.batches == [("a", [0]), ("a", [1, 3]), ("b", [2, 6]), ("a", [4]), ("c", [5])]


def test_a_cancelled_request_leaves_the_queue() -> None:
    device = Device()
    batcher = Batcher(device.run, max_batch=8)
    first = batcher.submit("double", 0)
    device.wait_for_batch()
    kept, dropped = batcher.submit("double", 1), batcher.submit("double", 2)
    alone = batcher.submit("other", 3)
    assert dropped.cancel()
    assert alone.cancel()
    device.let_go()
    assert kept.result(LIMIT).value == 2
    assert first.result(LIMIT).value == 0
    assert device.batches == [("double", [0]), ("double", [1])]
    assert not first.cancel()


def test_a_sample_that_the_task_refuses_fails_alone() -> None:
    device = Device()
    batcher = Batcher(device.run, max_batch=8)
    batcher.submit("double", 0)
    device.wait_for_batch()
    good, bad, other = (batcher.submit("double", sample) for sample in (1, "text", 2))
    device.let_go()
    assert (good.result(LIMIT).value, other.result(LIMIT).value) == (2, 4)
    with pytest.raises(ValueError, match="bad sample text"):
        bad.result(LIMIT)


def test_a_sample_that_breaks_its_batch_is_found_and_fails_alone() -> None:
    device = Device()
    batcher = Batcher(device.run, max_batch=8)
    batcher.submit("double", 0)
    device.wait_for_batch()
    futures = [batcher.submit("double", sample) for sample in (1, 2, "poison", 3, 4)]
    device.let_go()
    assert [future.result(LIMIT).value for future in futures if future is not futures[2]] == [2, 4, 6, 8]
    with pytest.raises(RuntimeError, match="poisoned batch"):
        futures[2].result(LIMIT)


def test_a_batch_that_does_not_fit_is_halved_until_it_does() -> None:
    device = Device(capacity=2)
    batcher = Batcher(device.run, max_batch=8)
    batcher.submit("double", 0)
    device.wait_for_batch()
    futures = [batcher.submit("double", n) for n in range(8)]
    device.let_go()
    assert [future.result(LIMIT).value for future in futures] == [2 * n for n in range(8)]
    assert max(future.result().batch_size for future in futures) == 2


def test_a_single_sample_that_does_not_fit_fails_and_the_next_one_runs() -> None:
    device = Device(capacity=0)
    batcher = Batcher(device.run, max_batch=8)
    device.let_go()
    with pytest.raises(MemoryError):
        batcher.submit("double", 1).result(LIMIT)
    device.capacity = 1
    assert batcher.submit("double", 1).result(LIMIT).value == 2


def test_a_batch_that_does_not_fit_is_let_go_before_its_parts_are_tried() -> None:
    class Buffer:
        """What a batch has on the device."""

    held: list[weakref.ref[Buffer]] = []
    alive: list[int] = []

    def run(_: str, samples: Sequence[Any]) -> list[Any]:
        alive.append(sum(buffer() is not None for buffer in held))
        buffer = Buffer()
        held.append(weakref.ref(buffer))
        if len(samples) > 1:
            try:
                raise MemoryError("no room")
            except MemoryError as error:
                raise RuntimeError("out of memory") from error
        return list(samples)

    batcher = Batcher(run, max_batch=8)
    futures = batcher.submit_together("same", range(8))
    assert [future.result(LIMIT).value for future in futures] == list(range(8))
    assert alive == [0] * 15


def test_after_a_batch_that_did_not_fit_batches_are_smaller_for_a_while() -> None:
    sizes: list[int] = []
    capacity = [2]

    def run(_: str, samples: Sequence[Any]) -> list[Any]:
        sizes.append(len(samples))
        if len(samples) > capacity[0]:
            raise MemoryError("out of memory")
        return list(samples)

    batcher = Batcher(run, max_batch=8)

    def submit(count: int) -> None:
        futures = batcher.submit_together("same", range(count))
        assert [future.result(LIMIT).value for future in futures] == list(range(count))

    submit(8)
    assert sizes == [8, 4, 2, 2, 4, 2, 2]
    sizes.clear()
    submit(8)
    assert sizes == [2, 2, 2, 2]
    capacity[0] = 8
    submit(2 * TRIES + 8 * TRIES)
    assert max(sizes) == 8


def test_a_sample_that_fails_on_its_own_makes_no_batch_smaller() -> None:
    device = Device()
    device.let_go(1000)
    batcher = Batcher(device.run, max_batch=4)
    futures = batcher.submit_together("double", (1, "poison", 2, 3))
    with pytest.raises(RuntimeError, match="poisoned batch"):
        futures[1].result(LIMIT)
    device.batches.clear()
    futures = batcher.submit_together("double", range(4))
    assert [future.result(LIMIT).batch_size for future in futures] == [4, 4, 4, 4]


def test_when_the_thread_dies_all_who_wait_get_an_error_and_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []
    monkeypatch.setattr(threading, "excepthook", lambda what: told.append(what.exc_value))
    device = Device()
    batcher = Batcher(device.run, max_batch=1)
    futures = [batcher.submit("double", sample) for sample in ("death", 1, 2)]
    device.wait_for_batch()
    futures.append(batcher.submit("other", 3))
    assert batcher.is_alive()
    device.let_go()
    for future in futures:
        with pytest.raises(BatcherError, match="the batching thread has died: the device is gone"):
            future.result(LIMIT)
    assert not batcher.is_alive()
    with pytest.raises(BatcherError, match=r"the batching thread has died: the device is gone$"):
        batcher.submit("double", 4)
    wait_until(lambda: len(told) == 1, "the telling")


def test_many_threads_submitting_at_once_lose_nothing() -> None:
    device = Device()
    device.let_go(10_000)
    batcher = Batcher(device.run, max_batch=16)
    answers: dict[int, int] = {}

    def client(start: int) -> None:
        for n in range(start, start + 100):
            answers[n] = batcher.submit(f"task {n % 3}", n).result(LIMIT).value

    clients = [threading.Thread(target=client, args=(100 * k,)) for k in range(16)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    assert answers == {n: 2 * n for n in range(1600)}
    assert max(len(samples) for _, samples in device.batches) <= 16


def test_after_a_close_what_runs_ends_and_what_waits_gets_an_error() -> None:
    device = Device()
    batcher = Batcher(device.run, max_batch=1)
    running = batcher.submit("double", 4)
    device.wait_for_batch()
    waiting = batcher.submit("double", 5)
    closing = threading.Thread(target=batcher.close)
    closing.start()
    with pytest.raises(BatcherError, match="it was closed"):
        waiting.result(LIMIT)
    device.let_go()
    closing.join(LIMIT)
    assert running.result(LIMIT).value == 8
    assert not batcher.is_alive()
    with pytest.raises(BatcherError, match="it was closed"):
        batcher.submit("double", 6)
