"""Prepare a loaded model for its device: the chosen precision and, on a CPU, the chosen kernels."""

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from blip.engine import kernels, trial
from blip.engine.encoders import absorb_projections, fold_biases, join_projections, padded_length
from blip.engine.kernels import PrecisionError
from blip.engine.linears import LINEARS, Int8Linear, PackedLinear, SampleLinear
from blip.engine.trial import Choice

PRECISIONS = ("float32", "float16", "bfloat16", "int8")


def chosen(net: Any, device: torch.device, dtype: str, pinned: str = "") -> Choice | None:
    """The kernels for models of the dimensions of `net`, which may be on the meta device; None where all are torch's.

    What is not `pinned` is tried, and what is chosen is printed.

    Raises:
        PrecisionError: a pinned kernel is not known here, or none is right.
    """
    if device.type != "cpu" or not kernels.has_onednn():
        return None
    began = time.perf_counter()
    # In a thread that ends: the OpenMP threads of one that stays would count, and with more of them than cores all of
    # them sleep between two operations, which costs a tenth of the speed.
    with ThreadPoolExecutor(1) as ending:
        choice = ending.submit(trial.choose, net, dtype, trial.pinned(pinned, dtype)).result()
    print(f"Kernels: {choice} ({time.perf_counter() - began:.2f} s).", flush=True)
    return choice


def prepare(model: Any, device: torch.device, dtype: str, choice: Choice | None = None) -> Any:
    """Convert a LAVIS model in place and return it.

    On a CPU it computes with the kernels of `choice`, by default with those that are tried first. int8 applies to the
    linear layers of the encoders and the decoder; all else is in float32.

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
    model.to(torch.float32 if dtype == "int8" else getattr(torch, dtype))
    if kernels.has_onednn() and hasattr(model, "text_encoder") and _has_few_queries(model):
        absorb_projections(model.text_encoder, kernels.attention_dtype(dtype))
    join_projections(model)
    if kernels.has_onednn():
        _choose_kernels(model, dtype, choice or trial.default(dtype))
    return model


def _has_few_queries(model: Any) -> bool:
    """Whether the longest text has fewer tokens than a head has channels; see absorbed.py."""
    bert = model.text_encoder
    width: int = bert.encoder.layer[0].crossattention.self.attention_head_size
    return padded_length(bert, model.max_txt_len) < width


def _choose_kernels(model: Any, dtype: str, choice: Choice) -> None:
    vit = model.visual_encoder
    if choice.image_linear == "bfloat16":
        vit.bfloat16()
        model.pixel_values = model.pixel_values.bfloat16()
    vit.attend = trial.attention(choice.attention, dtype)
    if LINEARS[choice.image_linear] is PackedLinear:
        vit.rows = kernels.BLOCK
    _replace_linears(vit, choice.image_linear)
    for name in ("text_encoder", "text_decoder"):
        if hasattr(model, name):
            _replace_linears(getattr(model, name), choice.text_linear)
    if hasattr(model, "text_decoder"):
        model.text_decoder.cross_dtype = kernels.attention_dtype(dtype)
    _replace_linears(model, "packed")  # the heads, which are small


def check(device: torch.device, dtype: str) -> None:
    """Raise PrecisionError unless `prepare` can convert to `dtype` on `device`."""
    if dtype not in PRECISIONS:
        raise PrecisionError(f"{dtype} is not a known precision; choose one of {', '.join(PRECISIONS)}.")
    if device.type == "cpu":
        if dtype == "float16":
            raise PrecisionError("float16 is not supported on a CPU; choose bfloat16, int8 or float32.")
        if dtype == "bfloat16" and not kernels.has_bfloat16():
            raise PrecisionError("This processor has no bfloat16 instructions; choose int8 or float32.")
        if dtype == "int8" and not (kernels.has_int8() and kernels.has_onednn()):
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


def _replace_linears(module: nn.Module, kind: str) -> None:
    if isinstance(module, (PackedLinear, SampleLinear, Int8Linear)):
        return
    if LINEARS[kind] is PackedLinear:
        _join_gelu(module)
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, LINEARS[kind](child))
        else:
            _replace_linears(child, kind)


def _join_gelu(module: Any) -> None:
    """Let a linear layer compute the GELU that follows it in LAVIS's vit.py or med.py."""
    for name, after in (("fc1", "act"), ("dense", "intermediate_act_fn"), ("dense", "transform_act_fn")):
        linear = getattr(module, name, None)
        if isinstance(linear, nn.Linear) and _is_gelu(getattr(module, after, None)):
            setattr(module, name, PackedLinear(linear, gelu=True))
            setattr(module, after, nn.Identity())


def _is_gelu(function: Any) -> bool:
    """Whether it is the exact GELU, of torch or of transformers."""
    if isinstance(function, nn.GELU):
        return function.approximate == "none"
    return getattr(function, "act", None) is F.gelu
