"""PyTorch's private operators behind plain names; nothing else in this project calls one.

A plain Linear goes through MKL, which is slow on many processors, most of all for the few rows of a decoding step.
oneDNN is fast, with weights packed as torch's compiler packs frozen ones. It also gives each row the same result, bit
for bit, whatever the number of rows, so no result depends on its batch; for its exceptions in float32 see
`inputs_at_a_time` and `rows_at_a_time`. Sums of 8-bit products are whole numbers: they do not depend on it either.
The operators are those of torch 2.8.0.
"""

import ctypes
import sys
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # of glibc's malloc.h
#: The rows that `linear` multiplies at a time on most processors: fewer take it as long.
BLOCK = 64
#: Up to so many products of two bfloat16 numbers in a sample, torch multiplies it otherwise alone than in a batch
#: (mkldnn_gemm_min_size in its Matmul.cpp).
FEW_PRODUCTS = 16**3
#: Below so many float32 products in a head, torch's `bmm` leaves MKL out (contraction_size in its LinearAlgebra.cpp).
FEW_FLOAT32_PRODUCTS = 400
#: oneDNN lets threads share a sum only of more float32 products than this, and only more than so many threads where a
#: layer has a quarter as many outputs as inputs (use_parallel_ic_reduction in its brgemm_inner_product_utils.cpp).
UNSHARED_INPUTS, UNSHARED_THREADS = 1024, 2
#: With AVX2 it adds up few float32 rows in another order than many (use_small_os_kernels and avx2_small_os there):
#: never more than the first of these, always as many as the second, or the last where few outputs meet many threads.
FEW_ROWS, FEWER_ROWS, FEWEST_ROWS = 80, 64, 16
_MOST_OF_OLDER = 32 << 20  # bytes; what glibc's manual says is the largest threshold


class PrecisionError(ValueError):
    """The precision asked for does not exist on this device; the message is one sentence."""


def has_onednn() -> bool:
    """Whether `linear` and `pack` work."""
    return bool(torch.backends.mkldnn.is_available())


def has_bfloat16() -> bool:
    """Whether oneDNN computes in bfloat16 on this processor."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def has_int8() -> bool:
    """Whether `fbgemm_linear` works on this processor."""
    return "fbgemm" in torch.backends.quantized.supported_engines


def attention_dtype(dtype: str) -> torch.dtype:
    """What the products of attention are computed in on a CPU, in the precision `dtype`."""
    if dtype == "int8":
        return torch.bfloat16 if has_bfloat16() else torch.float32
    found: torch.dtype = getattr(torch, dtype)
    return found


def pack(weight: Tensor) -> Tensor:
    """The weight (out, in) in oneDNN's blocked layout, for `linear`."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
    return packed


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gelu: bool = False) -> Tensor:
    """X weight^T + bias through oneDNN: (..., in), (out, in) packed or not, (out,) -> (..., out), all of one dtype.

    With `gelu`, the exact GELU of that, computed before it is rounded.
    """
    after, algorithm = ("gelu", "none") if gelu else ("none", "")
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, after, [], algorithm)
    return out


def linear_plus(x: Tensor, weight: Tensor, other: Tensor) -> Tensor:
    """X weight^T + other through oneDNN: (..., in), (out, in) packed or not, (..., out) -> (..., out)."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, weight, None, "add")
    return out


def inputs_at_a_time(weight: Tensor) -> int:
    """How many inputs of a weight (out, in) to multiply by at a time, that each sum be of one thread.

    Into how many parts oneDNN divides a long one depends on the number of rows, and so would the result on the batch.
    """
    is_shared = weight.dtype == torch.float32 and torch.get_num_threads() > UNSHARED_THREADS
    return UNSHARED_INPUTS if is_shared else weight.shape[1]


def rows_at_a_time(weight: Tensor) -> int:
    """How many rows of small samples to multiply by a weight (out, in) at a time, that all sums be of one order.

    0 where every sample, small or not, is to be multiplied alone.
    """
    outputs, inputs = weight.shape
    if weight.dtype != torch.float32:
        return sys.maxsize
    if not _have_one_order(min(inputs, UNSHARED_INPUTS), 2):  # a processor without AVX2
        return 0
    if _have_one_order(min(inputs, UNSHARED_INPUTS), FEW_ROWS + 1):
        return sys.maxsize
    return FEWER_ROWS if outputs % 32 == 0 or outputs >= 64 * torch.get_num_threads() else FEWEST_ROWS


@cache
def _have_one_order(inputs: int, rows: int) -> bool:
    """Whether so many rows and one alone are added up in one order."""
    random = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(length, inputs, generator=random) for length in (rows, 32))
    packed = pack(weight)
    return linear(x, packed)[:1].equal(linear(x[:1], packed))


def keeps_aligned(sample: Tensor) -> bool:
    """Whether the next sample of a batch begins at a multiple of 64 bytes if this one does, as all tensors do.

    MKL may add up in another order where one does not.
    """
    return sample.nbytes % 64 == 0


def apart(x: Tensor) -> list[Tensor]:
    """The samples (1, ...) of a batch, each in memory of its own and so aligned."""
    return [sample.clone() for sample in x.split(1)]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T) v^T in oneDNN's tensors, whose softmax is quicker: (N, d), (N, d), (d, N) -> (N, d)."""
    multiply = torch.ops.aten.mkldnn_linear
    out: Tensor = multiply(multiply(q.to_mkldnn(), k).softmax(-1), v).to_dense()
    return out


def has_few_products(heads: int, width: int) -> bool:
    """Whether it depends on the number of states, from 16 on, how torch multiplies one query of heads of `width`."""
    return heads * width * 16 <= FEW_PRODUCTS or width * 16 < FEW_FLOAT32_PRODUCTS


def linear_float32(x: Tensor, layer: Any) -> Tensor:
    """`layer`, a linear one, on x (..., in) -> (..., out); on a GPU the sums of half-precision products in float32."""
    if not x.is_cuda or x.dtype == torch.float32:
        out: Tensor = layer(x)
        return out
    rows: Tensor = torch.mm(x.flatten(0, -2), layer.weight.t(), out_dtype=torch.float32)
    return rows.add_(layer.bias).view(*x.shape[:-1], -1)


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 weight (out, in) as int8 from -127 to 127, and one scale per output (out,), in float32."""
    scales = weight.abs().amax(dim=1).clamp_(min=1e-8) / 127
    return (weight / scales[:, None]).round_().to(torch.int8), scales


def pack_fbgemm(numbers: Tensor, scales: Tensor) -> Any:
    """What `quantise` made, for `fbgemm_linear`."""
    zeros = torch.zeros_like(scales, dtype=torch.long)
    quantised = torch._make_per_channel_quantized_tensor(numbers, scales, zeros, 0)
    return torch.ops.quantized.linear_prepack(quantised, None)


def fbgemm_linear(x: Tensor, packed: Any, levels: int) -> Tensor:
    """Multiply float32 rows (..., in) of -1 to 1, taken in steps of 1 / levels, by an 8-bit weight -> (..., out)."""
    multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
    out: Tensor = multiply(x, 1 / levels, levels + 1, packed)
    return out


@cache
def fbgemm_levels() -> int:
    """127, or 63 on a processor whose products of 8-bit numbers are added up in 16 bits: larger ones overflow."""
    ones, scale = torch.ones(1, 64), torch.ones(1)
    packed = pack_fbgemm(torch.full((1, 64), 127, dtype=torch.int8), scale)
    return 127 if fbgemm_linear(ones, packed, 127).item() == 64 * 127 else 63


def pack_onednn_int8(numbers: Tensor, scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `quantise` made, for `onednn_int8_linear`: the weight, its scales and its zeros."""
    packed = torch.ops.onednn.qlinear_prepack(numbers, [1, numbers.shape[1]])
    return packed, scales, torch.zeros_like(scales, dtype=torch.int32)


def onednn_int8_linear(x: Tensor, packed: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """`fbgemm_linear` with 127 levels through oneDNN, which knows more instructions: AMX for one."""
    quantised = torch.quantize_per_tensor(x, 1 / 127, 128, torch.quint8)
    steps = torch.empty(0, dtype=torch.uint8)  # of the same memory: `int_repr` copies it, in half the time of a product
    steps.set_(quantised.untyped_storage(), 0, quantised.shape, quantised.stride())
    multiply = partial(torch.ops.onednn.qlinear_pointwise, steps, 1 / 127, 128, *packed)
    out: Tensor = multiply(None, 1.0, 0, torch.float32, "none", [], "")
    return out


def compute_alone() -> None:
    """Let this thread compute without others from now on; they keep their number, and so do threads that begin later.

    `torch.set_num_threads` would change it for those too. Once that was called, MKL has a number of its own.
    """
    torch.get_num_threads()  # a thread takes over the number for all at its first look
    library = ctypes.CDLL(torch._C.__file__)
    library.omp_set_num_threads(1)
    if torch.backends.mkl.is_available():
        library.MKL_Set_Num_Threads_Local(1)


def keep_memory(largest: int = 1 << 30) -> None:
    """Let this process keep freed blocks of up to `largest` bytes for the next batch, where the C library is glibc.

    By itself glibc gives the memory of large tensors back after each use, and more so in other threads than the first.
    Having it again costs a page fault for every 4 KiB: 8 % of a float32 encoding, 13 % of four at a time.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        library.mallopt(_ARENA_MAX, 1)
        library.mallopt(_TRIM_THRESHOLD, largest)
        if not library.mallopt(_MMAP_THRESHOLD, largest):
            library.mallopt(_MMAP_THRESHOLD, min(largest, _MOST_OF_OLDER))
