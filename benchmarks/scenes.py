"""The demo weights on scenes drawn for them: LAVIS's results beside the engine's."""

import random
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip import engine
from blip.bundle import open_bundle
from blip.config import DEMO
from blip.images import preprocessor
from blip.models import Model, build, fill, load_models, load_tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import demo_scenes

BATCH = 8


@dataclass(frozen=True)
class Scenes:
    """Pictures with a question and a statement each."""

    pixels: Tensor  # (B, 3, S, S)
    questions: list[str]
    texts: list[str]

    def __getitem__(self, chosen: slice) -> "Scenes":
        return Scenes(self.pixels[chosen], self.questions[chosen], self.texts[chosen])


def draw(count: int, seed: int, image_size: int) -> Scenes:
    """`count` scenes with questions and statements of mixed kinds and lengths."""
    rng = random.Random(seed)
    scenes = [demo_scenes.random_scene(rng) for _ in range(count)]
    preprocess = preprocessor(image_size)
    return Scenes(
        pixels=torch.stack([preprocess(demo_scenes.draw(scene)) for scene in scenes]),
        questions=[rng.choice(demo_scenes.questions(scene, rng))[0] for scene in scenes],
        texts=[rng.choice(demo_scenes.match_texts(scene, rng))[0] for scene in scenes],
    )


def load_exact(device: torch.device) -> dict[str, Model]:
    """The demo models by task with LAVIS's own layers in float32, as `load_models` would not leave them."""
    bundle = open_bundle(DEMO)
    models = load_models(bundle, device, "float32")
    exact = {}
    for task, model in models.items():
        net = build(task, bundle.config(task), load_tokenizer(bundle))
        fill(net, bundle.tensors(task), device, torch.float32, where=str(DEMO))
        exact[task] = replace(model, net=net.to(device).eval())
    return exact


@torch.no_grad()
def lavis_results(models: dict[str, Model], task: str, scenes: Scenes) -> list[Any]:
    """What LAVIS gives; questions one by one, as in a batch it lets the decoder see the padding."""
    model = models[task]
    device = next(model.net.parameters()).device
    results: list[Any] = []
    for i in range(len(scenes.pixels)):
        image = scenes.pixels[i : i + 1].to(device)
        if task == "caption":
            results += model.net.generate({"image": image}, **model.lengths)
        elif task == "answer":
            results += model.net.predict_answers(
                {"image": image, "text_input": [scenes.questions[i]]},
                inference_method="generate",
                num_beams=model.num_beams,
                min_len=model.min_length,
                max_len=model.max_length,
            )
        else:
            samples = {"image": image, "text_input": [scenes.texts[i]]}
            probability = model.net(samples, match_head="itm").softmax(dim=1)[0, 1]
            results.append((float(probability), float(model.net(samples, match_head="itc"))))
    return results


def engine_results(models: dict[str, Model], task: str, scenes: Scenes) -> list[Any]:
    """What the engine gives for all scenes as one batch."""
    model = models[task]
    if task == "match":
        return list(engine.match(model.net, scenes.pixels, scenes.texts))
    if task == "caption":
        return list(engine.caption(model.net, scenes.pixels, **model.lengths))
    return list(engine.answer(model.net, scenes.pixels, scenes.questions, **model.lengths))


def disagreement(count: int, device: torch.device, dtype: str) -> dict[str, float]:
    """How far the engine in `dtype` is from LAVIS on `count` scenes.

    Returns:
        By task the share of other strings or, for a match, of other decisions (probability over a half), and the
        "largest_difference" between two probabilities.
    """
    exact, models = load_exact(device), load_models(open_bundle(DEMO), device, dtype)
    different = dict.fromkeys(exact, 0)
    largest = 0.0
    for task, model in exact.items():
        for first in range(0, count, BATCH):
            scenes = draw(min(BATCH, count - first), first, model.image_size)
            for ours, theirs in zip(
                engine_results(models, task, scenes), lavis_results(exact, task, scenes), strict=True
            ):
                if task == "match":
                    different[task] += (ours[0] > 0.5) != (theirs[0] > 0.5)
                    largest = max(largest, abs(ours[0] - theirs[0]))
                else:
                    different[task] += ours != theirs
    return {**{task: number / count for task, number in different.items()}, "largest_difference": largest}
