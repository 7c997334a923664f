"""Our setup in this process, stage by stage, without the server.

    python -m benchmarks.stages BUNDLE STARTED DEVICE

STARTED is when the process was started, in seconds of time.time(); DEVICE is cpu or cuda. Prints a line of JSON: the
seconds of each stage, in order. A stage imports what it needs, as the predictor's setup does, so the imports are where
they count.
"""

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


class Clock:
    """The seconds that went by between marks."""

    def __init__(self, started: float) -> None:
        self.stages: dict[str, float] = {}
        self._last = started

    def mark(self, stage: str) -> None:
        """`stage` ends now."""
        now = time.time()
        self.stages[stage] = round(now - self._last, 2)
        self._last = now


def main(path: Path, started: float, device_name: str) -> None:
    """Set up, printing the stages last."""
    clock = Clock(started)
    clock.mark("interpreter")
    from blip.config import Settings
    from blip.weights.bundle import open_bundle

    max_batch = Settings.from_environment({}).max_batch  # by default
    bundle = open_bundle(path)
    with ThreadPoolExecutor(1) as verifier:
        verified = verifier.submit(bundle.verify)
        import torch

        clock.mark("import torch, verifying meanwhile")
        from blip.device import default_dtype
        from blip.lavis import import_lavis
        from blip.tasks import TASKS
        from blip.weights.load import load_models

        import_lavis()
        clock.mark("import LAVIS and what it needs")
        device = torch.device(device_name)
        models = load_models(bundle, device, default_dtype(device), max_batch=max_batch, cuda_graphs=True)
        tasks = [task(models[task.bundle_name]) for task in TASKS]
        clock.mark("weights" if device.type == "cpu" else "weights and graphs")
        verified.result()
        clock.mark("rest of the verification")
    for one in tasks:
        for size in one.sizes(max_batch):
            one.say(one.run([one.example()] * size)[0])
    clock.mark("predictions of each task")
    print(json.dumps(clock.stages))


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3])
