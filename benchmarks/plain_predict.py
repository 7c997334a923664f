"""The predictor to compare with: LAVIS called as the reference build calls it, one request at a time.

`BENCH_BUNDLE` names a bundle whose weights fill LAVIS's own models in float32 (float16 is never used). Its beams and
lengths are asked for; those of the pretrained weights are LAVIS's defaults.
"""

import os
import pathlib
from typing import Optional

from cog import BasePredictor, Input, Path


class Predictor(BasePredictor):
    """The reference's three models and calls: gradients tracked, the image encoded twice for a match."""

    def setup(self) -> None:
        """Fill LAVIS's models and leave them as LAVIS makes them."""
        import torch

        from blip.device import choose_device
        from blip.lavis import build, fill, import_lavis
        from blip.weights.bundle import open_bundle
        from blip.weights.load import load_tokenizer

        bundle = open_bundle(pathlib.Path(os.environ["BENCH_BUNDLE"]))
        self.device = choose_device(os.environ["BLIP_DEVICE"])
        processors = import_lavis().blip_processors
        self.models, self.images, self.searches = {}, {}, {}
        for task in ("caption", "answer", "match"):
            config = bundle.config(task)
            net = build(task, config, load_tokenizer(bundle, task))
            fill(net, bundle.tensors(task), self.device, torch.float32, where=task)
            for parameter in net.parameters():
                parameter.requires_grad_(True)
            self.models[task] = net.to(self.device).eval()
            self.images[task] = processors.BlipImageEvalProcessor(image_size=config["image_size"])
            self.searches[task] = [config.get(name) for name in ("num_beams", "min_length", "max_length")]
        self.question, self.caption = processors.BlipQuestionProcessor(), processors.BlipCaptionProcessor()

    def predict(
        self,
        image: Path = Input(description="Input image"),
        task: str = Input(
            choices=["image_captioning", "visual_question_answering", "image_text_matching"],
            default="image_captioning",
        ),
        question: Optional[str] = Input(default=None),
        caption: Optional[str] = Input(default=None),
    ) -> str:
        """One request through LAVIS's own generate, predict_answers and forward."""
        from PIL import Image

        name = {"image_captioning": "caption", "visual_question_answering": "answer", "image_text_matching": "match"}
        model = self.models[name[task]]
        pixels = self.images[name[task]](Image.open(str(image)).convert("RGB")).unsqueeze(0).to(self.device)
        if task == "image_captioning":
            beams, low, high = self.searches[name[task]]
            found = model.generate({"image": pixels}, num_beams=beams, min_length=low, max_length=high)
            return f"Caption: {found[0]}"
        if task == "visual_question_answering":
            samples = {"image": pixels, "text_input": self.question(question)}
            beams, low, high = self.searches[name[task]]
            found = model.predict_answers(
                samples, inference_method="generate", num_beams=beams, min_len=low, max_len=high
            )
            return f"Answer: {found[0]}"
        samples = {"image": pixels, "text_input": self.caption(caption)}
        probability = model(samples, match_head="itm").softmax(dim=1)[:, 1].item()
        similarity = model(samples, match_head="itc").item()
        return (
            f"The image and text are matched with a probability of {probability:.4%}.\n"
            f"The image feature and text feature has a cosine similarity of {similarity:.4f}."
        )
