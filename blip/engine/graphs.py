"""The decoder for a GPU: its step is captured in a CUDA graph, one for each bucket of batch sizes.

A step is some hundred small kernels, and a GPU runs them faster than Python starts them. A graph starts them all at
once, but only in the buffers it was captured with. So the buffers are made once, for the largest batch; smaller
buckets use a part of them, and a batch is padded to its bucket.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from blip.engine.decoder import CachedDecoder, DecoderShape
from blip.engine.encoders import Module


class GraphedDecoder:
    """A CachedDecoder for batches of any size up to its shape's, with its steps captured if asked for."""

    def __init__(self, decoder: Module, shape: DecoderShape, *, capture: bool) -> None:
        """Make the buffers and, if `capture` (CUDA only), the graphs.

        Args:
            decoder: LAVIS's XBertLMHeadDecoder.
            shape: for the largest batch and the most encoder states; if masked, fewer states are padded.
            capture: False runs the same buckets eagerly.
        """
        whole = CachedDecoder(decoder, shape)
        self._shape = shape
        self._buckets = {size: whole.narrow(size) for size in bucket_sizes(shape.batch)}
        # The largest first, so that the smaller ones can reuse its memory pool.
        sizes = sorted(self._buckets, reverse=True) if capture else []
        self._steps = {size: _CapturedStep(self._buckets[size]) for size in sizes}

    def load(self, states: Tensor, mask: Tensor | None) -> None:
        """As `CachedDecoder.load`, for any batch that is not larger than the shape's."""
        batch, length, _ = states.shape
        self._batch = batch
        self._size = min(size for size in self._buckets if size >= batch)
        rows, more = self._size - batch, self._shape.states - length
        states = F.pad(states, (0, 0, 0, more, 0, rows))
        if self._shape.masked:
            if mask is None:
                mask = states.new_ones(batch, length, dtype=torch.bool)
            # Padding rows see the first state: attention to no state would give NaN.
            mask = F.pad(mask, (0, more, 0, rows))
            mask[batch:, 0] = True
        self._buckets[self._size].load(states, mask)

    def prefill(self, prompt: Tensor) -> Tensor:
        """As `CachedDecoder.prefill`."""
        padded = F.pad(prompt, (0, 0, 0, self._size - self._batch))
        return self._buckets[self._size].prefill(padded)[: self._batch]

    def step(self, tokens: Tensor, parents: Tensor) -> Tensor:
        """As `CachedDecoder.step`; the logits are valid until the next step."""
        rows = self._size - self._batch
        tokens, parents = F.pad(tokens, (0, 0, 0, rows)), F.pad(parents, (0, 0, 0, rows))
        run = self._steps.get(self._size, self._buckets[self._size].step)
        return run(tokens, parents)[: self._batch]


def bucket_sizes(max_batch: int) -> list[int]:
    """The powers of two below `max_batch`, and `max_batch`."""
    return [*(2**power for power in range((max_batch - 1).bit_length())), max_batch]


class _CapturedStep:
    """One bucket's step as a graph, with the tensors that it reads and writes."""

    def __init__(self, decoder: CachedDecoder) -> None:
        decoder.rewind()
        self._tokens = decoder._slots.new_zeros(decoder.shape.batch, decoder.shape.beams)
        self._parents = self._tokens.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what libraries do at their first use cannot be captured
            decoder.step(self._tokens, self._parents)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._logits = decoder.step(self._tokens, self._parents)

    def __call__(self, tokens: Tensor, parents: Tensor) -> Tensor:
        self._tokens.copy_(tokens)
        self._parents.copy_(parents)
        self._graph.replay()
        return self._logits
