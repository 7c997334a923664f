"""The real predictor with a fault: the question "die" ends the thread that runs the batches."""

from collections.abc import Sequence

from blip.batcher import Batcher
from blip.tasks import Sample
from predict import Predictor as RealPredictor


class Predictor(RealPredictor):
    def setup(self) -> None:
        super().setup()
        self.batcher = Batcher(self.run_or_die, max_batch=1)

    def run_or_die(self, task: str, samples: Sequence[Sample]) -> list[str | Exception]:
        if samples[0].text == "die":
            raise SystemExit("injected")
        return self.tasks.run(task, samples)
