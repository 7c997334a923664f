"""The demo weights on scenes drawn for them: LAVIS's results beside the engine's."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from benchmarks.random_blip import FULL, dimensions, normalised
from blip import engine
from blip.config import DEMO
from blip.engine import Search, precision
from blip.engine.model import Model
from blip.lavis import build, fill
from blip.weights.bundle import TASKS, Bundle, open_bundle
from blip.weights.load import load_models, load_tokenizer
from demo import scenes as drawing
from demo import sentences

BATCH = 8


@dataclass(frozen=True)
class Scenes:
    """Pictures with a question and a statement each."""

    pixels: Tensor  # (B, S, S, 3) uint8
    questions: list[str]
    texts: list[str]

    def __getitem__(self, chosen: slice) -> "Scenes":
        return Scenes(self.pixels[chosen], self.questions[chosen], self.texts[chosen])


def draw(count: int, seed: int, image_size: int) -> Scenes:
    """`count` scenes with questions and statements of mixed kinds and lengths."""
    rng = random.Random(seed)
    scenes = [drawing.random_scene(rng) for _ in range(count)]
    size = image_size, image_size
    pictures = [drawing.draw(scene).resize(size, Image.Resampling.BICUBIC) for scene in scenes]
    bytes_of_all = bytearray(b"".join(picture.tobytes() for picture in pictures))
    return Scenes(
        pixels=torch.frombuffer(bytes_of_all, dtype=torch.uint8).view(count, *size, 3),
        questions=[rng.choice(sentences.questions(scene, rng))[0] for scene in scenes],
        texts=[rng.choice(sentences.match_texts(scene, rng))[0] for scene in scenes],
    )


def load_exact(bundle: Bundle, device: torch.device) -> dict[str, Model]:
    """The models by task with LAVIS's own layers in float32, as `load_models` would not leave them."""
    exact = {}
    for task in TASKS:
        config = bundle.config(task)
        net = build(task, config, load_tokenizer(bundle, task))
        fill(net, bundle.tensors(task), device, torch.float32, where=str(bundle.path))
        search = None if task == "match" else Search.of(config)
        exact[task] = Model(net.to(device).eval(), device, config["image_size"], search)
    return exact


def lavis_results(models: dict[str, Model], task: str, scenes: Scenes) -> list[Any]:
    """What LAVIS gives for all scenes."""
    model = models[task]
    pixels = normalised(scenes.pixels).to(model.net.visual_encoder.pos_embed)
    return run_lavis(task, model, pixels, scenes.texts if task == "match" else scenes.questions)


@torch.no_grad()
def run_lavis(task: str, model: Model, pixels: Tensor, texts: Sequence[str]) -> list[Any]:
    """LAVIS's results for pixels (B, 3, S, S) as it takes them; one by one, as in a batch its decoder sees padding."""
    results: list[Any] = []
    for image, text in zip(pixels.split(1), texts, strict=True):
        if task == "match":
            samples = {"image": image, "text_input": [text]}
            probability = model.net(samples, match_head="itm").softmax(dim=1)[0, 1]
            results.append((float(probability), float(model.net(samples, match_head="itc"))))
            continue
        assert model.search is not None
        beams, low, high = model.search.num_beams, model.search.min_length, model.search.max_length
        if task == "caption":
            results += model.net.generate({"image": image}, num_beams=beams, min_length=low, max_length=high)
        else:
            results += model.net.predict_answers(
                {"image": image, "text_input": [text]},
                inference_method="generate",
                num_beams=beams,
                min_len=low,
                max_len=high,
            )
    return results


def engine_results(models: dict[str, Model], task: str, scenes: Scenes) -> list[Any]:
    """What the engine gives for all scenes as one batch, as it is served: with the model's graphs where it has any."""
    model = models[task]
    texts = scenes.texts if task == "match" else scenes.questions
    return run(task, model, scenes.pixels.to(model.device), texts, model.graphs)


def run(task: str, model: Model, pixels: Tensor, texts: Sequence[str], graphs: Any) -> list[Any]:
    """The engine's results for a batch on the model's device."""
    if task == "match":
        return list(engine.match(model.net, pixels, texts, graphs))
    assert model.search is not None
    if task == "caption":
        return texts_of(model.net, engine.caption(model.net, pixels, model.search, graphs))
    return texts_of(model.net, engine.answer(model.net, pixels, texts, model.search, graphs))


def texts_of(net: Any, found: Sequence[engine.Tokens | Exception]) -> list[Any]:
    """The texts of captions or answers, an error where there is one."""
    return [one if isinstance(one, Exception) else engine.text_of(net, one) for one in found]


def disagreement(count: int, device: torch.device, dtypes: Sequence[str]) -> dict[str, dict[str, float]]:
    """How far the engine in each of `dtypes` on `device` is from LAVIS in float32 on the CPU, on `count` scenes.

    On a CPU with the kernels that are the fastest for full-size models.

    Returns:
        By dtype: by task the share of other strings or, for a match, of other decisions (probability over a half), and
        the "largest_difference" between two probabilities.
    """
    bundle = open_bundle(DEMO)
    exact = load_exact(bundle, torch.device("cpu"))
    tokenizer = load_tokenizer(bundle, "caption")
    full_size = build("caption", dimensions("caption", tokenizer, FULL), tokenizer)
    loaded = {}
    for dtype in dtypes:
        # The demo's models are small; others may be the fastest for them than for what people serve.
        kernels = str(precision.chosen(full_size, device, dtype) or "")
        loaded[dtype] = load_models(bundle, device, dtype, max_batch=BATCH, cuda_graphs=True, pinned=kernels)
    different = {dtype: dict.fromkeys(exact, 0) for dtype in dtypes}
    largest = dict.fromkeys(dtypes, 0.0)
    for task, model in exact.items():
        for first in range(0, count, BATCH):
            scenes = draw(min(BATCH, count - first), first, model.image_size)
            expected = lavis_results(exact, task, scenes)
            for dtype, models in loaded.items():
                for ours, theirs in zip(engine_results(models, task, scenes), expected, strict=True):
                    if task == "match":
                        different[dtype][task] += (ours[0] > 0.5) != (theirs[0] > 0.5)
                        largest[dtype] = max(largest[dtype], abs(ours[0] - theirs[0]))
                    else:
                        different[dtype][task] += ours != theirs
    return {
        dtype: {**{task: number / count for task, number in counts.items()}, "largest_difference": largest[dtype]}
        for dtype, counts in different.items()
    }
