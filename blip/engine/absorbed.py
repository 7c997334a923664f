"""Attention of few queries to many states on a CPU, without the keys and the values of the states.

A key is W s + b, so q.(W s + b) = (q W).s + q.b, and a softmax ignores q.b, which all states share. Its weights sum to
1, so the weighted sum of the values V s + c is V times the weighted sum of the states, plus c. Thus both weights meet
the queries and not the states. DeepSeek-V2 (arXiv 2405.04434, section 2.1.2) says that they are absorbed. It takes
fewer products where a head has fewer queries than channels.
Shapes: B samples, H heads of d channels, L queries, N states of E channels.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from blip.engine import kernels

#: Queries at a time: products of one shape have one result, whatever a sample's neighbours are.
QUERIES = 16


class PackedStates(NamedTuple):
    """The states of one sample as two weights of `kernels.linear`: every layer multiplies by both."""

    rows: Tensor  # (N, E)
    columns: Tensor  # (E, N)


class AbsorbedAttention(nn.Module):
    """What LAVIS's BertSelfAttention computes where it attends to states, in `dtype`; it has copies of one's weights.

    The weights themselves would keep a bundle's file mapped, with all others that are mapped together with them.
    """

    def __init__(self, attention: Any, dtype: torch.dtype) -> None:
        super().__init__()
        heads = attention.num_attention_heads
        self.key = attention.key.weight.detach().to(dtype, copy=True).unflatten(0, (heads, -1))  # (H, d, E)
        self.value = attention.value.weight.detach().to(dtype, copy=True).unflatten(0, (heads, -1)).mT  # (H, E, d)
        self.bias = attention.value.bias.detach().to(dtype).view(heads, 1, -1)  # (H, 1, d)

    def pack(self, states: Tensor) -> list[PackedStates]:
        """States (B, N, E) for `forward` of this and of every other layer."""
        samples = states.to(self.key.dtype)
        return [PackedStates(kernels.pack(sample), kernels.pack(sample.mT)) for sample in samples]

    def forward(self, q: Tensor, states: Sequence[PackedStates]) -> Tensor:
        """The queries (B, H, L, d) and the states of B samples -> (B, L, H*d)."""
        scaled = (q * q.shape[-1] ** -0.5).to(self.key.dtype)
        samples = [
            torch.cat([self._attend(part.contiguous(), packed) for part in sample.split(QUERIES, dim=1)], dim=1)
            for sample, packed in zip(scaled, states, strict=True)
        ]
        return torch.stack(samples).transpose(1, 2).flatten(2).to(q.dtype)

    def _attend(self, q: Tensor, states: PackedStates) -> Tensor:
        """Attend with (H, L, d) queries of one sample -> (H, L, d)."""
        rows = torch.bmm(q, self.key)  # (H, L, E)
        weights = kernels.linear(rows.flatten(0, 1), states.rows).softmax(-1)  # (H*L, N)
        sums = kernels.linear(weights, states.columns).view_as(rows)
        return torch.baddbmm(self.bias, sums, self.value)
