"""The three tasks: a batch of prepared requests in, what becomes the published output strings out."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import Tensor

from blip import engine
from blip.engine.graphs import bucket_sizes
from blip.engine.model import Model
from blip.lavis import import_lavis
from blip.texts import cut

#: What the device finds for a request; `Task.say` makes the output string of it.
Found = engine.Tokens | engine.Match
Outputs = Sequence[Found | Exception]
TRIED_TOKENS = 3  # the first comes from the prompt, the second and the third from a step each, the third reorders beams


@dataclass
class Sample:
    """One request, ready for the device.

    Attributes:
        pixels: (S, S, 3) uint8; in pinned memory where the device is a GPU.
        text: the question or the caption as the library's processor leaves it; "" where the task has none.
        ids: its tokens.
        emit: gets what is certain of the tokens when it has grown; None if not wanted.
        tokens: how many are enough, in a batch of such samples alone; None for all.
    """

    pixels: Tensor
    text: str
    ids: list[int]
    emit: Callable[[Found], None] | None = None
    tokens: int | None = None


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
        self._process_text = self._text_processor() if model.library == "lavis" else str  # transformers changes nothing

    def prepare(self, pixels: bytearray, text: str, emit: Callable[[Found], None] | None = None) -> Sample:
        """Make a request of a picture, (S, S, 3) bytes, and its text; needs no device and may run in any thread."""
        side = self.model.image_size
        picture = torch.frombuffer(pixels, dtype=torch.uint8).view(side, side, 3)
        if self.model.device.type == "cuda":
            picture = picture.pin_memory()
        text = self._process_text(cut(text))
        ids = engine.tokenize(self.model.net, text) if self.text_input else []
        return Sample(picture, text, ids, emit)

    def example(self) -> Sample:
        """A request for trying out a machine: a grey image and some text.

        A few tokens need all that more would, but on a GPU, whose graphs are recorded for whole searches.
        """
        sample = self.prepare(bytearray(b"\x80") * (3 * self.model.image_size**2), "what is this?")
        return sample if self.model.graphs else replace(sample, tokens=TRIED_TOKENS)

    def sizes(self, max_batch: int) -> list[int]:
        """Batches of up to `max_batch` to try a machine with: on a GPU one for each bucket, with a graph or without."""
        buckets = self.model.graphs is not None or self.model.device.type == "cuda"
        return bucket_sizes(max_batch) if buckets else [1]

    @torch.inference_mode()
    def run(self, samples: Sequence[Sample]) -> Outputs:
        """What is found for every sample, or its error; no result depends on the other samples."""
        graphs = self.model.graphs
        # Batches with a graph, one after the other, are quicker than one without: on an H200 a step of sixteen captions
        # took 14.5 ms without one, a step of four 1.3 ms with one.
        most = graphs.sizes[-1] if graphs and graphs.sizes else len(samples)
        parts = [samples[start : start + most] for start in range(0, len(samples), most)]
        return [output for part in parts for output in self._run(part)]

    def _run(self, samples: Sequence[Sample]) -> Outputs:
        device = self.model.device
        pixels = torch.stack([sample.pixels.to(device, non_blocking=True) for sample in samples])  # (B, S, S, 3)
        return self._outputs(pixels, samples)

    @abstractmethod
    def say(self, found: Any) -> str:
        """The output string of what `run` found, or as much of it as is certain; needs no device, in any thread."""

    def value(self, found: Any) -> Any:
        """What `run` found, for programs: the text, or the numbers."""
        return found

    def _text_processor(self) -> Callable[[str], str]:
        return str

    @abstractmethod
    def _outputs(self, pixels: Tensor, samples: Sequence[Sample]) -> Outputs: ...


class _Generating(Task):
    """A task whose output is a prefix and generated text."""

    prefix: ClassVar[str]

    def say(self, found: engine.Tokens) -> str:
        """The prefix and the text, once there is some of it."""
        text = self.value(found)
        return self.prefix + text if text or found.whole else ""

    def value(self, found: engine.Tokens) -> str:
        """The text alone."""
        return engine.text_of(self.model.net, found)

    def _outputs(self, pixels: Tensor, samples: Sequence[Sample]) -> Outputs:
        arguments = self._arguments(pixels, samples)
        enough = [sample.tokens for sample in samples if sample.tokens]
        if len(enough) == len(samples):
            return list(islice(self._stream(*arguments), max(enough)))[-1]
        if not any(sample.emit for sample in samples):
            return self._generate(*arguments)
        emitted: dict[int, Found] = {}
        for outputs in self._stream(*arguments):
            for index, (sample, found) in enumerate(zip(samples, outputs, strict=True)):
                if sample.emit and isinstance(found, engine.Tokens) and found != emitted.get(index):
                    emitted[index] = found
                    sample.emit(found)
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
        return engine.match(self.model.net, pixels, [sample.ids for sample in samples], self.model.matches)

    def say(self, found: engine.Match) -> str:
        """Two sentences."""
        return (
            f"The image and text are matched with a probability of {found.probability:.4%}.\n"
            f"The image feature and text feature has a cosine similarity of {found.similarity:.4f}."
        )


TASKS: tuple[type[Task], ...] = (Captioning, Answering, Matching)
