"""The three tasks: a batch of prepared requests in, the published output strings out."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from blip import engine
from blip.engine.model import Model
from blip.lavis import import_lavis
from blip.texts import cut

Outputs = list[str | Exception]


@dataclass
class Sample:
    """One request, ready for the device.

    Attributes:
        pixels: (S, S, 3) uint8; in pinned memory where the device is a GPU.
        text: the question or the caption as LAVIS's processor leaves it; "" where the task has none.
        ids: its tokens.
        emit: gets the output string piece by piece as it becomes certain; None if not wanted.
    """

    pixels: Tensor
    text: str
    ids: list[int]
    emit: Callable[[str], None] | None = None
    _emitted: int = field(default=0, init=False)  # characters

    def tell(self, output: str) -> None:
        """Emit the words of `output`, a beginning of the result, that were not emitted yet."""
        if self.emit:
            for word in re.findall(r"\s*\S+|\s+$", output[self._emitted :]):
                self.emit(word)
            # A batch that is run again after an error starts from the beginning.
            self._emitted = max(self._emitted, len(output))


class Task(ABC):
    """One task on its loaded model.

    Attributes:
        name: as requests name it.
        bundle_name: its directory in a bundle.
        text_input: the input with its question or caption; "" where it has none.
    """

    name: ClassVar[str]
    bundle_name: ClassVar[str]
    text_input: ClassVar[str] = ""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._process_text = self._text_processor()

    def prepare(self, pixels: bytearray, text: str, emit: Callable[[str], None] | None = None) -> Sample:
        """Make a request of a picture, (S, S, 3) bytes, and its text; needs no device and may run in any thread."""
        side = self.model.image_size
        picture = torch.frombuffer(pixels, dtype=torch.uint8).view(side, side, 3)
        if self.model.device.type == "cuda":
            picture = picture.pin_memory()
        text = self._process_text(cut(text))
        ids = engine.tokenize(self.model.net, text) if self.text_input else []
        return Sample(picture, text, ids, emit)

    def example(self) -> Sample:
        """A request for trying out a machine: a grey image and some text."""
        return self.prepare(bytearray(b"\x80") * (3 * self.model.image_size**2), "what is this?")

    @torch.inference_mode()
    def run(self, samples: Sequence[Sample]) -> Outputs:
        """The output string or the error of every sample; no result depends on the other samples."""
        device = self.model.device
        pixels = torch.stack([sample.pixels.to(device, non_blocking=True) for sample in samples])  # (B, S, S, 3)
        outputs = self._outputs(pixels, samples)
        for sample, output in zip(samples, outputs, strict=True):
            if isinstance(output, str):
                sample.tell(output)
        return outputs

    def _text_processor(self) -> Callable[[str], str]:
        return str

    @abstractmethod
    def _outputs(self, pixels: Tensor, samples: Sequence[Sample]) -> Outputs: ...


class _Generating(Task):
    """A task whose output is a prefix and generated text."""

    prefix: ClassVar[str]

    def _outputs(self, pixels: Tensor, samples: Sequence[Sample]) -> Outputs:
        arguments = self._arguments(pixels, samples)
        if any(sample.emit for sample in samples):
            return self._follow(self._stream(*arguments), samples)
        return [text if isinstance(text, Exception) else self.prefix + text for text in self._generate(*arguments)]

    def _follow(self, steps: Iterator[Outputs], samples: Sequence[Sample]) -> Outputs:
        """Emit the pieces of every step as they come; the whole strings at the end."""
        outputs: Outputs = [self.prefix] * len(samples)
        for pieces in steps:
            for index, piece in enumerate(pieces):
                output = outputs[index]
                if isinstance(piece, Exception):
                    outputs[index] = piece
                elif isinstance(output, str) and piece:
                    outputs[index] = output + piece
                    samples[index].tell(output + piece)
        return outputs

    #: The engine's functions for the task.
    _generate: ClassVar[Callable[..., Outputs]]
    _stream: ClassVar[Callable[..., Iterator[Outputs]]]

    @abstractmethod
    def _arguments(self, pixels: Tensor, samples: Sequence[Sample]) -> tuple[Any, ...]: ...


class Captioning(_Generating):
    """A sentence about an image."""

    name = "image_captioning"
    bundle_name = "caption"
    prefix = "Caption: "
    _generate = staticmethod(engine.caption)
    _stream = staticmethod(engine.stream_caption)

    def _arguments(self, pixels: Tensor, samples: Sequence[Sample]) -> tuple[Any, ...]:  # noqa: ARG002
        return self.model.net, pixels, self.model.search, self.model.texts


class Answering(_Generating):
    """The answer to a question about an image."""

    name = "visual_question_answering"
    bundle_name = "answer"
    text_input = "question"
    prefix = "Answer: "
    _generate = staticmethod(engine.answer)
    _stream = staticmethod(engine.stream_answer)

    def _text_processor(self) -> Callable[[str], str]:
        processor: Callable[[str], str] = import_lavis().blip_processors.BlipQuestionProcessor()
        return processor

    def _arguments(self, pixels: Tensor, samples: Sequence[Sample]) -> tuple[Any, ...]:
        questions = [sample.ids for sample in samples]
        return self.model.net, pixels, questions, self.model.search, self.model.texts


class Matching(Task):
    """How well an image and a text go together."""

    name = "image_text_matching"
    bundle_name = "match"
    text_input = "caption"

    def _text_processor(self) -> Callable[[str], str]:
        processor: Callable[[str], str] = import_lavis().blip_processors.BlipCaptionProcessor()
        return processor

    def _outputs(self, pixels: Tensor, samples: Sequence[Sample]) -> Outputs:
        matches = engine.match(self.model.net, pixels, [sample.ids for sample in samples], self.model.matches)
        return [match if isinstance(match, Exception) else self._say(match) for match in matches]

    @staticmethod
    def _say(match: engine.Match) -> str:
        return (
            f"The image and text are matched with a probability of {match.probability:.4%}.\n"
            f"The image feature and text feature has a cosine similarity of {match.similarity:.4f}."
        )


TASKS: tuple[type[Task], ...] = (Captioning, Answering, Matching)
