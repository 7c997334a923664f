"""stock_predict.py for the checkpoints of small_upstream.py, whose dimensions LAVIS's own configs do not have."""

import pathlib

from cog import BasePredictor, Input, Path


class Predictor(BasePredictor):
    """LAVIS's loader reads the checkpoints beside torch.hub's cache into models of their size."""

    def setup(self) -> None:
        """Three calls of load_checkpoint."""
        from benchmarks.small_upstream import NAMES, configs
        from blip.lavis import build, make_tokenizer

        checkpoints = pathlib.Path("hub/checkpoints")
        tokenizer = make_tokenizer(checkpoints / "vocab.txt")
        self.models = {}
        for task, config in configs().items():
            self.models[task] = build(task, config, tokenizer).to_empty(device="cpu")
            self.models[task].load_checkpoint(str(checkpoints / NAMES[task]))

    def predict(self, image: Path = Input(description="Input image")) -> str:
        """Nothing: only the start is measured."""
        return str(image.name)
