"""PyTorch's private operators behind plain names; nothing else in this project calls one.

A plain Linear goes through MKL, which is slow on many processors, most of all for the few rows of a decoding step.
oneDNN is fast, with weights packed as torch's compiler packs frozen ones. It also gives each row the same result, bit
for bit, whatever the number of rows, so no result depends on its batch.
The operators are those of torch 2.8.0.
"""

from typing import Any

import torch
from torch import Tensor


def has_onednn() -> bool:
    """Whether `linear` and `pack` work."""
    return bool(torch.backends.mkldnn.is_available())


def has_bfloat16() -> bool:
    """Whether oneDNN computes in bfloat16 on this processor."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def has_int8() -> bool:
    """Whether `int8_linear` works on this processor."""
    return "fbgemm" in torch.backends.quantized.supported_engines


def pack(weight: Tensor) -> Tensor:
    """The weight (out, in) in oneDNN's blocked layout, for `linear`."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
    return packed


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """X weight^T + bias through oneDNN: (..., in), (out, in) packed or not, (out,) -> (..., out), all of one dtype."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


def linear_float32(x: Tensor, layer: Any) -> Tensor:
    """`layer`, a linear one, on x (..., in) -> (..., out); on a GPU the sums of half-precision products in float32."""
    if not x.is_cuda or x.dtype == torch.float32:
        out: Tensor = layer(x)
        return out
    rows: Tensor = torch.mm(x.flatten(0, -2), layer.weight.t(), out_dtype=torch.float32)
    return rows.add_(layer.bias).view(*x.shape[:-1], -1)


def pack_int8(weight: Tensor, scales: Tensor, bias: Tensor | None) -> Any:
    """A float32 weight (out, in) in 8 bits, with one scale per output (out,) and its bias, for `int8_linear`."""
    zeros = torch.zeros_like(scales, dtype=torch.long)
    quantised = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
    return torch.ops.quantized.linear_prepack(quantised, bias)


def int8_linear(x: Tensor, packed: Any) -> Tensor:
    """Multiply float32 rows (..., in) by what `pack_int8` made; the rows become 8-bit, with one scale for all."""
    out: Tensor = torch.ops.quantized.linear_dynamic(x, packed)
    return out
