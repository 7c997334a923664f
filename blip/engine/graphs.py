"""A model on a GPU: what it does between two looks of the host is captured in CUDA graphs, for each bucket of batches.

A token is some hundred small kernels, and a GPU runs them faster than Python starts them. A graph starts them all at
once, but only in the buffers that it was captured with. So the buffers are made once, for the largest batch; smaller
buckets use a part of them, and a batch is padded to its bucket.

Nothing is trusted: each graph is replayed on random input and compared with the same work done without it. Where one
differs or cannot be made, batches of its size go without.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from blip.engine import forward
from blip.engine.beam import Sample
from blip.engine.decoder import CachedDecoder, DecoderShape
from blip.engine.device_beam import DeviceSearch
from blip.engine.encoders import Module

#: Something done in fixed buffers; it returns one of them, which the next work may use again.
Work = Callable[[], Tensor]
#: Gives what does a work again.
Recorder = Callable[[Work], Work]
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
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            result = work()

        def replay() -> Tensor:
            graph.replay()
            return result

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
        """Fill all rows at random, with texts of ids below `words`."""
        self.pixels.random_(256)
        self.ids.random_(words)
        self.mask.fill_(True)
        self.real.fill_(True)


class Graphs:
    """The recorded works of each bucket, for those that proved right."""

    def __init__(self, net: Module, works: dict[int, list[Work]], inputs: Inputs, record: Recorder) -> None:
        """Record and prove the works of each bucket, given in the order in which they are done."""
        self.inputs = inputs
        self._works = works  # they hold the buffers that the recorded ones read and write
        self._recorded: dict[int, list[Work]] = {}
        bound = BOUNDS[net.visual_encoder.pos_embed.dtype]
        for size in sorted(works, reverse=True):  # smaller ones fit in the memory of the largest
            try:
                recorded = [record(work) for work in works[size]]
                inputs.draw(len(net.tokenizer))
                proven = all(_replays(works[size], recorded, index, bound) for index in range(len(recorded)))
                reason = "" if proven else "its results differ"
            except RuntimeError as error:  # no memory, or something that cannot be captured
                reason = str(error).partition("\n")[0]
            if reason:
                print(f"Batches of {size} run without a CUDA graph: {reason}", flush=True)
            else:
                self._recorded[size] = recorded

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
        return lambda: forward.match_scores(net, inputs.pixels, inputs.ids, inputs.mask)

    def run(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """`forward.match_scores` for a batch that there is room for; valid until the next run."""
        self.inputs.fill(pixels, ids, mask)
        (match,) = self._recorded[self.bucket(len(pixels))]
        return match()[: len(pixels)]


class TextGraphs(Graphs):
    """A BlipCaption or a BlipVQA for any batch that has a bucket: encoders, steps and search."""

    def __init__(self, net: Module, shape: DecoderShape, prompt: Tensor, inputs: Inputs, record: Recorder) -> None:
        """For batches of up to the shape's, which begin with `prompt` (P,)."""
        whole = CachedDecoder(net.text_decoder, shape)
        self._prompt_length, self._max_length = len(prompt), shape.search.max_length
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

        def advance(logits: Tensor) -> Tensor:
            search.advance(logits)
            self._flag.copy_(search.done.all(), non_blocking=True)
            return logits

        def begin() -> Tensor:
            if decoder.shape.masked:
                logits = forward.begin_answer(net, decoder, inputs.pixels, inputs.ids, inputs.mask, prompt)
            else:
                logits = forward.begin_caption(net, decoder, inputs.pixels, prompt)
            search.start(inputs.real)
            return advance(logits[:, None].expand(-1, decoder.shape.beams, -1))

        return [begin, lambda: advance(decoder.step(search.next, search.parents))]

    def run(
        self, follow: bool, pixels: Tensor, ids: Tensor | None = None, mask: Tensor | None = None
    ) -> Iterator[list[Sample]]:
        """As `beam.beam_search`, for a batch that there is room for; without `follow` only the outcome is yielded."""
        batch, bucket = len(pixels), self.bucket(len(pixels))
        search = self._searches[bucket]
        begin, step = self._recorded[bucket]
        self.inputs.fill(pixels, ids, mask)
        self._flag.fill_(False)  # the device is idle: the run before has been read
        pace = _Pace(pixels.is_cuda)
        begin()
        for _ in range(self._prompt_length + 1, self._max_length):
            samples = search.samples(batch) if follow else []
            if not follow:
                pace.wait()
            if self._flag:
                break
            if follow:
                yield samples
            step()
        yield search.samples(batch)


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


def bucket_sizes(max_batch: int) -> list[int]:
    """The powers of two below `max_batch`, and `max_batch`."""
    return [*(2**power for power in range((max_batch - 1).bit_length())), max_batch]


def _replays(works: list[Work], recorded: list[Work], index: int, bound: float) -> bool:
    """Whether the recorded work at `index`, after those before it, gives what the work itself gives."""
    results = []
    for last in (works[index], recorded[index]):
        for work in works[:index]:
            work()
        results.append(last().clone())
    plain, replayed = results
    return bool(((plain - replayed).abs() <= bound * plain.abs().amax()).all())
