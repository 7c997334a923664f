"""The real predictor with faults to ask for: "die" ends the batching thread, "break" the device.

"think" makes the file that BLIP_TEST_THINKING names, and goes on when that is gone.
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path

from blip.service import Service
from blip.tasks import Outputs, Sample
from predict import Predictor as RealPredictor

CUDA_ERROR = "CUDA error: an illegal memory access was encountered"


class FaultyService(Service):
    """The tasks of a service, one request at a time, and its faults."""

    def __init__(self, real: Service) -> None:
        self.broken = False
        super().__init__(real.tasks, real.pictures, 1, self.check)

    def run_batch(self, task: str, samples: Sequence[Sample]) -> Outputs:
        if samples[0].text == "die":
            raise SystemExit("injected")
        if samples[0].text == "think":
            thinking = Path(os.environ["BLIP_TEST_THINKING"])
            thinking.touch()
            while thinking.exists():
                time.sleep(0.05)
        self.broken = self.broken or samples[0].text == "break"
        self.check()
        return super().run_batch(task, samples)

    def check(self) -> None:
        if self.broken:
            raise RuntimeError(CUDA_ERROR)


class Predictor(RealPredictor):
    def setup(self) -> None:
        super().setup()
        self.service = FaultyService(self.service)
