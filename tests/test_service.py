"""Trying a machine out before it is READY."""

from collections.abc import Sequence

import pytest
import torch

from blip.config import DEMO
from blip.pictures.pool import Pool
from blip.service import Service
from blip.tasks import TASKS, Outputs, Sample, Task
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
