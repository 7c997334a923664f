"""Trying a machine out before it is READY, and batches on a device with graphs."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from blip.config import DEMO
from blip.engine.graphs import Work
from blip.pictures.pool import Pool
from blip.service import Service
from blip.tasks import TASKS, Matching, Outputs, Sample, Task
from blip.weights.bundle import open_bundle
from blip.weights.load import load_models, with_graphs


class Watched(Service):
    """A service that keeps the sizes of the batches that run."""

    def __init__(self, tasks: dict[str, Task], max_batch: int) -> None:
        self.batches: dict[str, list[int]] = {name: [] for name in tasks}
        super().__init__(tasks, Pool(), max_batch)

    def run_batch(self, task: str, samples: Sequence[Sample]) -> Outputs:
        self.batches[task].append(len(samples))
        return super().run_batch(task, samples)


@pytest.mark.parametrize(("graphs", "sizes"), [(True, [1, 2, 4, 6]), (False, [1])])
def test_batches_of_every_bucket_are_tried_where_there_are_buckets(graphs: bool, sizes: list[int]) -> None:
    models = load_models(open_bundle(DEMO), torch.device("cpu"), "float32")
    if graphs:
        models = with_graphs(models, 3, lambda work: work)  # fewer than may run together, as where memory is short
    service = Watched({task.name: task(models[task.bundle_name]) for task in TASKS}, 6)
    try:
        service.try_out()
    finally:
        service.close()
    assert service.batches == {task.name: sizes for task in TASKS}


@pytest.mark.parametrize("largest", [2, 3])
def test_a_batch_larger_than_all_graphs_runs_in_parts_that_have_one(largest: int) -> None:
    ran: list[int] = []

    def record(work: Work) -> Work:
        def counted() -> tuple[Tensor, ...]:
            results = work()
            ran.append(len(results[0]))
            return results

        return counted

    models = load_models(open_bundle(DEMO), torch.device("cpu"), "float32")
    task = Matching(with_graphs(models, largest, record)["match"])
    sample = task.example()
    ran.clear()
    outputs = task.run([sample] * 7)
    assert ran == [largest] * (7 // largest) + [1]
    assert outputs == [*task.run([sample])] * 7
