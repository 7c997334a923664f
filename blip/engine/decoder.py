"""LAVIS's text decoder (BertLMHeadModel in med.py) with a cache, for K beams per sample.

Two things make a step small. Keys and values of the encoder states are computed once per sample and read by its K
beams together, as K queries. The decoder's own keys and values go into a pool that the beams of a sample share: each
beam adds one entry per step, and a mask says which entries are a beam's own past. When beams are reordered only that
mask moves, never the cache.

A step works in buffers of fixed shapes and reads nothing back, so that it can be captured in a CUDA graph.
Shapes: B samples, K beams, P prompt tokens, N encoder states, S pool entries, V words, H heads of d channels.
"""

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from blip.engine import kernels
from blip.engine.beam import Search
from blip.engine.encoders import Module, additive, bert_layer, embed, keys_values, queries_keys_values


@dataclass(frozen=True)
class DecoderShape:
    """What the buffers of a decoder have room for.

    Attributes:
        batch: B.
        states: N, encoder states of a sample.
        masked: whether encoder states come with a mask.
        prompt: P, tokens.
        search: beams and lengths.
    """

    batch: int
    states: int
    masked: bool
    prompt: int
    search: Search

    @property
    def beams(self) -> int:
        """K."""
        return self.search.num_beams

    @property
    def entries(self) -> int:
        """S: the prompt, and one for each beam and step; the last token is never read."""
        return self.prompt + self.beams * (self.search.max_length - self.prompt - 1)


class CachedDecoder:
    """The state of decoding one batch: `load`, then `prefill`, then `step` for every further token.

    It can be loaded again, for another batch of the same shape.
    """

    def __init__(self, decoder: Module, shape: DecoderShape) -> None:
        """Reserve all buffers for `decoder`, LAVIS's XBertLMHeadDecoder.

        Its `cross_dtype`, if it has one, is the dtype of the encoder's keys and values.
        """
        self.shape = shape
        self._bert = decoder.bert
        self._head = decoder.cls
        layers, attention = decoder.bert.encoder.layer, decoder.bert.encoder.layer[0].attention.self
        heads, width = attention.num_attention_heads, attention.attention_head_size
        like = decoder.bert.embeddings.position_embeddings.weight  # of the dtype and on the device of all buffers
        batch, entries = shape.batch, shape.entries
        cross_dtype = getattr(decoder, "cross_dtype", like.dtype)
        self._cross = like.new_empty(len(layers), 2, batch, heads, shape.states, width, dtype=cross_dtype)
        masks = torch.zeros(batch, 1, 1, shape.states, dtype=torch.bool, device=like.device)
        self._cross_mask = additive(masks, cross_dtype) if shape.masked else None
        self._pool = like.new_empty(len(layers), 2, batch, heads, entries, width)
        # At the start a beam sees the prompt.
        seen = (torch.arange(entries, device=like.device) < shape.prompt).expand(batch, 1, shape.beams, entries)
        self._start = additive(seen, like.dtype)
        self._mask = additive(seen, like.dtype)  # of the pool, for each beam
        own = torch.eye(shape.beams, dtype=torch.bool, device=like.device)  # of the entries of one step
        self._own = additive(own, like.dtype).expand(batch, 1, -1, -1)
        self._first = torch.arange(shape.prompt, shape.prompt + shape.beams, device=like.device)
        self._slots = self._first.clone()  # (K,), where a step writes
        self._position = torch.empty(1, dtype=torch.long, device=like.device)

    def narrow(self, batch: int) -> "CachedDecoder":
        """Make a decoder for a smaller batch in the same memory; only one of the two can be in use."""
        smaller = copy.copy(self)
        smaller.shape = replace(self.shape, batch=batch)
        smaller._cross = self._cross[:, :, :batch]
        smaller._cross_mask = None if self._cross_mask is None else self._cross_mask[:batch]
        smaller._pool = self._pool[:, :, :batch]
        smaller._start, smaller._mask, smaller._own = (part[:batch] for part in (self._start, self._mask, self._own))
        return smaller

    def load(self, states: Tensor, mask: Tensor | None) -> None:
        """Begin a batch: compute the encoder's keys and values, and forget the past.

        Args:
            states: (B, N, C) encoder states.
            mask: (B, N) bool, False at padding; None where the decoder is not masked.
        """
        assert states.shape[:2] == (self.shape.batch, self.shape.states), states.shape
        for layer, cross in zip(self._bert.encoder.layer, self._cross, strict=True):
            cross[0], cross[1] = keys_values(layer.crossattention, states)  # (B, H, N, d), read at every step
        assert (mask is None) == (self._cross_mask is None)
        if self._cross_mask is not None and mask is not None:
            self._cross_mask.fill_(-torch.inf).masked_fill_(mask[:, None, None, :], 0)
        self.rewind()

    def rewind(self) -> None:
        """Go back to the state before the prompt."""
        self._pool.zero_()  # a hidden entry still takes part, with weight 0: it must be finite
        self._mask.copy_(self._start)
        self._slots.copy_(self._first)
        self._position.fill_(self.shape.prompt)

    def prefill(self, prompt: Tensor) -> Tensor:
        """The logits (B, V) that follow the prompt (B, P), computed once per sample for all of its beams."""
        length = self.shape.prompt
        assert prompt.shape == (self.shape.batch, length), prompt.shape
        x = embed(self._bert, prompt, torch.arange(length, device=prompt.device))  # (B, P, C)
        for layer, pool, cross in zip(self._bert.encoder.layer, self._pool, self._cross, strict=True):
            q, own = queries_keys_values(layer.attention, x)
            pool[..., :length, :] = own
            x = bert_layer(layer, x, q, own, cross, cross_mask=self._cross_mask, is_causal=True)
        return self._logits(x[:, -1])

    def step(self, tokens: Tensor, parents: Tensor) -> Tensor:
        """Append one token to every beam.

        Args:
            tokens: (B, K) ids.
            parents: (B, K); beam j continues what was beam parents[j] of the same sample.

        Returns:
            (B, K, V) logits, in float32 on a GPU.
        """
        assert tokens.shape == parents.shape == (self.shape.batch, self.shape.beams), tokens.shape
        self._mask.copy_(self._mask.gather(2, parents[:, None, :, None].expand_as(self._mask)))
        self._mask.index_copy_(3, self._slots, self._own)
        x = embed(self._bert, tokens, self._position)  # (B, K, C)
        for layer, pool, cross in zip(self._bert.encoder.layer, self._pool, self._cross, strict=True):
            q, own = queries_keys_values(layer.attention, x)
            pool.index_copy_(3, self._slots, own)
            x = bert_layer(layer, x, q, pool, cross, mask=self._mask, cross_mask=self._cross_mask)
        self._slots += self.shape.beams
        self._position += 1
        return self._logits(x)

    def _logits(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., V), not in float16: near 20, where the best are, its numbers are 0.016 apart."""
        predictions = self._head.predictions
        return kernels.linear_float32(predictions.transform(x), predictions.decoder)
