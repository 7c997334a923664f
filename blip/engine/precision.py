"""Prepare a loaded model for its device: the chosen precision and, on a CPU, packed linear layers."""

from typing import Any

import torch
from torch import Tensor, nn

from blip.engine import kernels
from blip.engine.encoders import fold_biases, join_projections

PRECISIONS = ("float32", "float16", "bfloat16", "int8")


class PrecisionError(ValueError):
    """The precision asked for does not exist on this device; the message is one sentence."""


def prepare(model: Any, device: torch.device, dtype: str) -> Any:
    """Convert a LAVIS model in place and return it.

    On a CPU, int8 applies to the image encoder's linear layers. The text layers, which a batch may pad, are in
    bfloat16 where the processor has it, else float32.

    Raises:
        PrecisionError: `dtype` is unknown or not available on `device`.
    """
    check(device, dtype)
    model.eval().requires_grad_(False)
    if device.type != "cpu":
        set_arithmetic()
        join_projections(model)
        if hasattr(model, "text_decoder"):
            fold_biases(model.text_decoder.bert)
        return model.to(device, getattr(torch, dtype))
    if dtype == "int8":
        values = model.pixel_values
        model.to(torch.bfloat16 if kernels.has_bfloat16() else torch.float32)
        model.visual_encoder.float()
        model.pixel_values = values  # of the encoder's precision
        _replace_linears(model.visual_encoder, Int8Linear)
    else:
        model.to(getattr(torch, dtype))
    if kernels.has_onednn():
        _replace_linears(model, PackedLinear)
    return model


def check(device: torch.device, dtype: str) -> None:
    """Raise PrecisionError unless `prepare` can convert to `dtype` on `device`."""
    if dtype not in PRECISIONS:
        raise PrecisionError(f"{dtype} is not a known precision; choose one of {', '.join(PRECISIONS)}.")
    if device.type == "cpu":
        if dtype == "float16":
            raise PrecisionError("float16 is not supported on a CPU; choose bfloat16, int8 or float32.")
        if dtype == "bfloat16" and not kernels.has_bfloat16():
            raise PrecisionError("This processor has no bfloat16 instructions; choose int8 or float32.")
        if dtype == "int8" and not kernels.has_int8():
            raise PrecisionError("This processor has no int8 kernels in PyTorch; choose float32.")
    elif dtype == "int8":
        raise PrecisionError("int8 is for CPUs; on a GPU choose float16, bfloat16 or float32.")
    elif dtype == "bfloat16":
        check_bfloat16(torch.cuda.get_device_capability(device))


def check_bfloat16(capability: tuple[int, int]) -> None:
    """Raise PrecisionError below compute capability 8.0, which has no bfloat16 (NVIDIA, Ampere tuning guide)."""
    if capability < (8, 0):
        raise PrecisionError("This GPU has no bfloat16 instructions; choose float16 or float32.")


def set_arithmetic() -> None:
    """Let CUDA's libraries compute as precisely as the types say, in kernels that cost nothing to choose.

    By default convolutions take float32 in 10 bits, and sums of float16 products are rounded on the way.
    cuDNN's attention plans every new shape for some 70 ms (measured on an H200), and gains less than a tenth.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.enable_cudnn_sdp(False)


class PackedLinear(nn.Module):
    """A Linear with its weight in oneDNN's blocked layout: (..., in) -> (..., out), both of the weight's dtype."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = kernels.pack(linear.weight.detach())
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """The product with the weight, plus the bias."""
        return kernels.linear(x, self.weight, self.bias)


class Int8Linear(nn.Module):
    """A Linear with 8-bit weights, one scale per output, and 8-bit inputs with one scale per sample.

    Input (B, N, in), output (B, N, out), both float32. Samples go through one by one: a scale taken over the batch
    would make a sample's result depend on its neighbours.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scales = weight.abs().amax(dim=1).clamp(min=1e-8) / 127  # (out,)
        bias = None if linear.bias is None else linear.bias.detach().float()
        self.packed = kernels.pack_int8(weight, scales, bias)

    def forward(self, x: Tensor) -> Tensor:
        """The product with the weight, plus the bias."""
        return torch.stack([kernels.int8_linear(sample, self.packed) for sample in x])


def _replace_linears(module: nn.Module, kind: type[PackedLinear] | type[Int8Linear]) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, kind(child))
        else:
            _replace_linears(child, kind)
