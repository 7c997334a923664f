"""The predictor to compare starts with: the three models as the reference build loads them, with LAVIS's own loader.

The checkpoints are found in torch.hub's cache (`TORCH_HOME`), the tokenizer's vocabulary in
`bert-base-uncased/` of the working directory, where the hub's name is a path.
"""

from cog import BasePredictor, Input, Path


class Predictor(BasePredictor):
    """Loads as the reference does and stops there."""

    def setup(self) -> None:
        """Three calls of load_model_and_preprocess."""
        import torch
        from lavis.models import load_model_and_preprocess

        device = "cuda" if torch.cuda.is_available() else "cpu"
        names = {"caption": ("blip_caption", "base_coco"), "answer": ("blip_vqa", "vqav2")}
        names["match"] = ("blip_image_text_matching", "base")
        self.models = {
            task: load_model_and_preprocess(name=name, model_type=kind, is_eval=True, device=device)
            for task, (name, kind) in names.items()
        }

    def predict(self, image: Path = Input(description="Input image")) -> str:
        """Nothing: only the start is measured."""
        return str(image.name)
