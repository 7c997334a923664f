"""A model on a GPU: what it does between two looks of the host is captured in CUDA graphs, for each bucket of batches.

A token is some hundred small kernels, and a GPU runs them faster than Python starts them. A graph starts them all at
once, but only in the buffers that it was captured with. So the buffers are made once, for the largest batch; smaller
buckets use a part of them, and a batch is padded to its bucket.

Nothing is trusted: each graph is replayed on random input and compared with the same work done without it. Where one
differs or cannot be made, batches of its size go without.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from blip.engine import forward
from blip.engine.beam import Sample
from blip.engine.decoder import CachedDecoder, DecoderShape
from blip.engine.device_beam import DeviceSearch
from blip.engine.encoders import Module

#: Something done in fixed buffers; it returns those that it wrote, which the next work may use again. The first has its
#: numbers, the others what follows from them.
Work = Callable[[], tuple[Tensor, ...]]
#: Gives what does a work again.
Recorder = Callable[[Work], Work]
Made = TypeVar("Made")
#: How far numbers may be off where a library takes another kernel in a graph, as a part of the largest of them.
BOUNDS = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class CudaRecorder:
    """Captures works as CUDA graphs. They share their memory, because no two are replayed at the same time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # one for all, because libraries keep a workspace for each

    def __call__(self, work: Work) -> Work:
        """Do the work once, as what libraries do at their first use cannot be captured; then capture it."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            work()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with (
                torch.cuda.stream(torch.cuda.current_stream()),  # a capture that fails does not come back to it
                torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
            ):
                results = work()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # the allocator takes the memory of such a capture for one that still goes on
            self._pool = torch.cuda.graph_pool_handle()
            raise

        def replay() -> tuple[Tensor, ...]:
            graph.replay()
            return results

        return replay


@dataclass
class Inputs:
    """The buffers that a batch is copied to.

    Attributes:
        pixels: (B, S, S, 3) uint8.
        ids: (B, L), of the texts.
        mask: (B, L) bool, False at padding.
        real: (B,) bool, False for rows that only fill a bucket.
    """

    pixels: Tensor
    ids: Tensor
    mask: Tensor
    real: Tensor

    @classmethod
    def zeros(cls, batch: int, image_size: int, text_length: int, device: torch.device) -> "Inputs":
        """Buffers on `device`; the first token of a text is never padding, since attention to nothing gives NaN."""
        mask = torch.zeros(batch, text_length, dtype=torch.bool, device=device)
        mask[:, 0] = True
        return cls(
            pixels=torch.zeros(batch, image_size, image_size, 3, dtype=torch.uint8, device=device),
            ids=torch.zeros(batch, text_length, dtype=torch.long, device=device),
            mask=mask,
            real=torch.ones(batch, dtype=torch.bool, device=device),
        )

    def narrow(self, batch: int) -> "Inputs":
        """The first rows of the same buffers."""
        return Inputs(self.pixels[:batch], self.ids[:batch], self.mask[:batch], self.real[:batch])

    def fill(self, pixels: Tensor, ids: Tensor | None = None, mask: Tensor | None = None) -> None:
        """Copy a batch, with texts that may be shorter; rows beyond it keep what they have."""
        batch = len(pixels)
        self.pixels[:batch].copy_(pixels)
        if ids is not None and mask is not None:
            length = ids.shape[1]
            self.mask[:batch].zero_()
            self.ids[:batch, :length].copy_(ids)
            self.mask[:batch, :length].copy_(mask)
        self.real[:batch].fill_(True)
        self.real[batch:].fill_(False)

    def draw(self, words: int) -> None:
        """Fill all rows at random, with texts of any length and of ids below `words`; the first row is real."""
        self.pixels.random_(256)
        self.ids.random_(words)
        lengths = torch.empty_like(self.ids[:, :1]).random_(1, self.ids.shape[1] + 1)
        torch.lt(torch.arange(self.ids.shape[1], device=self.ids.device), lengths, out=self.mask)
        self.real.random_(2)
        self.real[:1].fill_(True)


class Graphs:
    """The recorded works of each bucket, for those that proved right."""

    def __init__(self, net: Module, works: dict[int, list[Work]], inputs: Inputs, record: Recorder) -> None:
        """Record and prove the works of each bucket: what is done once, then what may be done again and again."""
        self.inputs = inputs
        self._works = works  # they hold the buffers that the recorded ones read and write
        self._recorded: dict[int, list[Work]] = {}
        bound = BOUNDS[net.visual_encoder.pos_embed.dtype]
        for size in sorted(works, reverse=True):  # smaller ones fit in the memory of the largest
            try:
                recorded = [record(work) for work in works[size]]
                inputs.draw(len(net.tokenizer))
                if _are_proven(self._proof(works[size]), self._proof(recorded), bound):
                    self._recorded[size] = recorded
                else:
                    _say_without(size, "its results differ")
            except RuntimeError as error:  # no memory, or something that cannot be captured
                _say_without(size, error)

    def _proof(self, works: list[Work]) -> list[Work]:
        """What is done to prove the works of a bucket."""
        return works

    @property
    def sizes(self) -> list[int]:
        """The buckets that can be used, the smallest first."""
        return sorted(self._recorded)

    def has_room(self, batch: int, length: int = 0) -> bool:
        """Whether there is a bucket for `batch` samples with texts of `length` tokens."""
        return length <= self.inputs.ids.shape[1] and any(size >= batch for size in self._recorded)

    def bucket(self, batch: int) -> int:
        """The smallest that holds `batch` samples."""
        return min(size for size in self._recorded if size >= batch)


class MatchGraphs(Graphs):
    """A BlipITM for any batch that has a bucket."""

    def __init__(self, net: Module, inputs: Inputs, record: Recorder) -> None:
        works = {size: [self._work(net, inputs.narrow(size))] for size in bucket_sizes(len(inputs.real))}
        super().__init__(net, works, inputs, record)

    @staticmethod
    def _work(net: Module, inputs: Inputs) -> Work:
        return lambda: (forward.match_scores(net, inputs.pixels, inputs.ids, inputs.mask),)

    def run(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """`forward.match_scores` for a batch that there is room for; valid until the next run."""
        self.inputs.fill(pixels, ids, mask)
        (match,) = self._recorded[self.bucket(len(pixels))]
        (scores,) = match()
        return scores[: len(pixels)]


class TextGraphs(Graphs):
    """A BlipCaption or a BlipVQA for any batch that has a bucket: encoders, steps and search."""

    def __init__(self, net: Module, shape: DecoderShape, prompt: Tensor, inputs: Inputs, record: Recorder) -> None:
        """For batches of up to the shape's, which begin with `prompt` (P,)."""
        whole = CachedDecoder(net.text_decoder, shape)
        self._most_steps = shape.search.max_length - len(prompt) - 1  # the first token needs none
        # The host reads the flag while the device is at work.
        self._flag = torch.zeros((), dtype=torch.bool, pin_memory=prompt.is_cuda)
        self._searches: dict[int, DeviceSearch] = {}
        works = {}
        for size in bucket_sizes(shape.batch):
            search = DeviceSearch(size, shape.search, prompt, eos_token_id=net.tokenizer.sep_token_id)
            self._searches[size] = search
            works[size] = self._begin_and_step(net, inputs.narrow(size), whole.narrow(size), search)
        super().__init__(net, works, inputs, record)

    def _begin_and_step(self, net: Module, inputs: Inputs, decoder: CachedDecoder, search: DeviceSearch) -> list[Work]:
        prompt = search.prompt.expand(decoder.shape.batch, -1)

        def advance(logits: Tensor) -> tuple[Tensor, ...]:
            search.advance(logits)
            self._flag.copy_(search.done.all(), non_blocking=True)
            return logits, search.next, search.parents, search.scores, search.done, self._flag

        def begin() -> tuple[Tensor, ...]:
            if decoder.shape.masked:
                logits = forward.begin_answer(net, decoder, inputs.pixels, inputs.ids, inputs.mask, prompt)
            else:
                logits = forward.begin_caption(net, decoder, inputs.pixels, prompt)
            search.start(inputs.real)
            return advance(logits[:, None].expand(-1, decoder.shape.beams, -1))

        if not self._most_steps:
            return [begin]
        return [begin, lambda: advance(decoder.step(search.next, search.parents))]

    def _proof(self, works: list[Work]) -> list[Work]:
        """With two steps where there may be two: the second is the first that has beams to reorder."""
        begin, *steps = works
        return [begin, *(steps * 2)[: self._most_steps]]

    def run(
        self, follow: bool, pixels: Tensor, ids: Tensor | None = None, mask: Tensor | None = None
    ) -> Iterator[list[Sample]]:
        """As `beam.beam_search`, for a batch that there is room for; without `follow` only the outcome is yielded."""
        batch, bucket = len(pixels), self.bucket(len(pixels))
        search = self._searches[bucket]
        begin, *steps = self._recorded[bucket]
        self.inputs.fill(pixels, ids, mask)
        self._flag.fill_(False)  # the device is idle: the run before has been read
        pace = _Pace(pixels.is_cuda)
        begin()
        chosen = 1  # tokens
        for step in steps * self._most_steps:
            if follow:
                samples = search.samples(batch, chosen)
            else:
                pace.wait()
            if self._flag:
                break
            if follow:
                yield samples
            step()
            chosen += 1
        yield search.samples(batch, chosen)


class _Pace:
    """Keeps the host one step ahead of the device: it waits for the step before the last, while the last one runs."""

    def __init__(self, cuda: bool) -> None:
        self._cuda = cuda
        self._last: torch.cuda.Event | None = None

    def wait(self) -> None:
        """Call it after each step."""
        if self._cuda:
            before, self._last = self._last, torch.cuda.Event()
            self._last.record()
            if before is not None:
                before.synchronize()


def for_as_many(make: Callable[[int], Made], max_batch: int) -> Made | None:
    """What `make` makes for batches of up to `max_batch`, or of as many as memory allows; None if it allows none."""
    for size in reversed(bucket_sizes(max_batch)):
        try:
            return make(size)
        except RuntimeError as error:
            _say_without(size, error)
    return None


def bucket_sizes(max_batch: int) -> list[int]:
    """The powers of two below `max_batch`, and `max_batch`."""
    return [*(2**power for power in range((max_batch - 1).bit_length())), max_batch]


def _say_without(size: int, reason: object) -> None:
    first_line = str(reason).partition("\n")[0]
    print(f"Batches of {size} run without a CUDA graph: {first_line}", flush=True)


def _are_proven(works: list[Work], recorded: list[Work], bound: float) -> bool:
    """Whether the recorded works, done one after the other, give what the works themselves give."""
    before = recorded  # what each finds in the buffers comes from these
    for index, wanted in enumerate(_outcomes(works)):
        *_, found = _outcomes([*before[:index], recorded[index]])
        if not _agree(wanted, found, bound):
            return False
        if not wanted[0].equal(found[0]):
            before = works  # for other words may be chosen from other numbers, and all that follows is another search
    return True


def _outcomes(works: Sequence[Work]) -> list[list[Tensor]]:
    """What each of the works gives, in memory of its own."""
    outcomes = []
    for work in works:
        results = work()
        if results[0].is_cuda:
            torch.cuda.synchronize()  # some of them are in the host's memory
        outcomes.append([result.clone() for result in results])
    return outcomes


def _agree(wanted: Sequence[Tensor], found: Sequence[Tensor], bound: float) -> bool:
    """Whether the numbers are equal and so is what follows from them, or differ within the bound."""
    numbers, others = wanted[0], found[0]
    if numbers.equal(others):
        return all(map(torch.equal, wanted, found))
    return bool(((numbers - others).abs() <= bound * numbers.abs().amax()).all())
