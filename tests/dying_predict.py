"""The real predictor with faults to ask for: "die" ends the batching thread, "break" the device, "think" takes long."""

import time
from collections.abc import Sequence

from blip.batcher import Batcher
from blip.tasks import Sample
from predict import Predictor as RealPredictor
from predict import end_worker

CUDA_ERROR = "CUDA error: an illegal memory access was encountered"
THINKING = 14.0  # seconds


class Predictor(RealPredictor):
    broken = False

    def setup(self) -> None:
        super().setup()
        self.batcher = Batcher(self.run_or_fail, 1, self.check_device, end_worker)

    def run_or_fail(self, task: str, samples: Sequence[Sample]) -> list[str | Exception]:
        if samples[0].text == "die":
            raise SystemExit("injected")
        if samples[0].text == "think":
            time.sleep(THINKING)
        self.broken = self.broken or samples[0].text == "break"
        self.check_device()
        return self.tasks.run(task, samples)

    def check_device(self) -> None:
        if self.broken:
            raise RuntimeError(CUDA_ERROR)
        self.tasks.check_device()
