"""The three tasks: a batch of prepared requests in, the published output strings out."""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from blip import engine
from blip.images import open_image, preprocessor
from blip.models import Model, import_lavis

CAPTIONING = "image_captioning"
ANSWERING = "visual_question_answering"
MATCHING = "image_text_matching"
_NAMES = {CAPTIONING: "caption", ANSWERING: "answer", MATCHING: "match"}  # in the bundle


@dataclass
class Sample:
    """One request, ready for the device.

    Attributes:
        pixels: (3, S, S) float32, normalised; in pinned memory where the device is a GPU.
        text: the question or the caption as LAVIS's processor leaves it; "" where the task has none.
        emit: is given the output string piece by piece as it becomes certain, where anyone wants that.
    """

    pixels: Tensor
    text: str
    emit: Callable[[str], None] | None = None
    _emitted: int = field(default=0, init=False)  # characters

    def tell(self, output: str) -> None:
        """Emit the words by which `output`, a beginning of the result, goes beyond what was emitted."""
        if self.emit:
            for word in re.findall(r"\s*\S+|\s+$", output[self._emitted :]):
                self.emit(word)
            # A batch that is run again after an error starts from the beginning.
            self._emitted = max(self._emitted, len(output))


class Tasks:
    """Runs batches of one task on the loaded models."""

    def __init__(self, models: dict[str, Model]) -> None:
        processors = import_lavis().blip_processors
        self._models = {task: models[name] for task, name in _NAMES.items()}
        self._preprocess = {task: preprocessor(model.image_size) for task, model in self._models.items()}
        self._process: dict[str, Callable[[str], str]] = {
            CAPTIONING: str,
            ANSWERING: processors.BlipQuestionProcessor(),
            MATCHING: processors.BlipCaptionProcessor(),
        }

    def prepare(self, task: str, image: Path, text: str, emit: Callable[[str], None] | None = None) -> Sample:
        """Decode and resize an image file for `task`; needs no device and may run in any thread.

        Raises:
            ImageError: the file is no usable image.
        """
        return self._sample(task, open_image(image), text, emit)

    def examples(self) -> dict[str, Sample]:
        """A request of each task for trying out a machine: every task, one grey image, some text."""
        image = Image.new("RGB", (64, 48), "gray")
        return {task: self._sample(task, image, "what is this?", None) for task in self._models}

    @torch.inference_mode()
    def run(self, task: str, samples: Sequence[Sample]) -> list[str | Exception]:
        """The output string or the error of every sample; what comes out for one depends on it alone."""
        model = self._models[task]
        device, texts = model.net.device, [sample.text for sample in samples]
        pixels = torch.stack([sample.pixels.to(device, non_blocking=True) for sample in samples])  # (B, 3, S, S)
        outputs: list[str | Exception]
        if task == MATCHING:
            outputs = [_say_match(match) for match in engine.match(model.net, pixels, texts)]
        else:
            search = {**model.lengths, "decoder": model.decoder}
            arguments: tuple[Any, ...] = (pixels,) if task == CAPTIONING else (pixels, texts)
            prefix = "Caption: " if task == CAPTIONING else "Answer: "
            if any(sample.emit for sample in samples):
                stream = engine.stream_caption if task == CAPTIONING else engine.stream_answer
                outputs = _follow(stream(model.net, *arguments, **search), prefix, samples)
            else:
                generate = engine.caption if task == CAPTIONING else engine.answer
                outputs = [_prefixed(prefix, text) for text in generate(model.net, *arguments, **search)]
        for sample, output in zip(samples, outputs, strict=True):
            if isinstance(output, str):
                sample.tell(output)
        return outputs

    def check_device(self) -> None:
        """Compute something small: some CUDA errors, unlike a lack of memory, spoil everything after them.

        Raises:
            RuntimeError: the device computes no more.
        """
        device = self._models[CAPTIONING].net.device
        with contextlib.suppress(torch.OutOfMemoryError):
            torch.ones(1, device=device).add_(1).item()

    def _sample(self, task: str, image: Image.Image, text: str, emit: Callable[[str], None] | None) -> Sample:
        pixels = self._preprocess[task](image)
        if self._models[task].net.device.type == "cuda":
            pixels = pixels.pin_memory()
        return Sample(pixels, self._process[task](text), emit)


def _follow(steps: Iterator[list[str | Exception]], prefix: str, samples: Sequence[Sample]) -> list[str | Exception]:
    """Emit the pieces of every step as they come; the whole strings at the end."""
    outputs: list[str | Exception] = [prefix] * len(samples)
    for pieces in steps:
        for index, piece in enumerate(pieces):
            output = outputs[index]
            if isinstance(piece, Exception):
                outputs[index] = piece
            elif isinstance(output, str) and piece:
                outputs[index] = output + piece
                samples[index].tell(output + piece)
    return outputs


def _prefixed(prefix: str, text: str | Exception) -> str | Exception:
    return prefix + text if isinstance(text, str) else text


def _say_match(match: Any) -> str | Exception:
    if isinstance(match, Exception):
        return match
    return (
        f"The image and text are matched with a probability of {match.probability:.4%}.\n"
        f"The image feature and text feature has a cosine similarity of {match.similarity:.4f}."
    )
