"""Chooses among kernels for the same work by trying them: which one is fastest differs between makers of processors."""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip.engine import kernels
from blip.engine.encoders import attend_image, attend_image_by_heads
from blip.engine.kernels import PrecisionError
from blip.engine.linears import LINEARS

#: The kernels for each work in each precision; the first that a processor has is taken where nothing is tried.
KERNELS: dict[str, dict[str, tuple[str, ...]]] = {
    "float32": {"image_linear": ("packed", "sample"), "text_linear": ("packed",), "attention": ("heads", "fused")},
    "bfloat16": {"image_linear": ("packed", "sample"), "text_linear": ("packed",), "attention": ("heads", "fused")},
    "int8": {
        "image_linear": ("onednn", "fbgemm", "bfloat16"),
        "text_linear": ("fbgemm", "onednn"),
        "attention": ("heads", "fused"),
    },
}
#: How far a result may be off, as a share of its norm: what these precisions are off by on random numbers, twice.
BOUNDS = {"float32": 1e-5, "bfloat16": 2e-2, "int8": 3e-2}
ROUNDS = 2
#: By what share, and by how many seconds, another kernel must be faster than the first: less may be chance.
LEAST_SHARE, LEAST_SECONDS = 0.1, 2e-5
TIMED = 1e-3  # seconds at least that a kernel is timed for
HOPELESS = 1.5  # times the best; such a kernel is timed once
PROVEN = 64  # rows of each sample that are compared with the plain path
LOADING = 32 << 20  # bytes of blocks that are kept while weights are loaded, as glibc does it by itself

Kernel = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Choice:
    """The kernel for each work on a CPU.

    Attributes:
        image_linear: for the image encoder's linear layers: many rows.
        text_linear: for those of the text encoder and the decoder: mostly few rows.
        attention: for that among the states of an image.
    """

    image_linear: str
    text_linear: str
    attention: str

    def __str__(self) -> str:
        return ",".join(f"{work}={name}" for work, name in asdict(self).items())


def default(dtype: str) -> Choice:
    """What is taken where nothing is tried."""
    return Choice(**{work: names[0] for work, names in possible(dtype).items()})


def attention(name: str, dtype: str) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """A kernel for attention among the states of an image, called as `attend_image` is."""
    if name == "heads":
        return partial(attend_image_by_heads, dtype=kernels.attention_dtype(dtype))
    return attend_image


def possible(dtype: str) -> dict[str, tuple[str, ...]]:
    """Those of KERNELS that this processor has."""
    missing = set()
    if not kernels.has_bfloat16():
        missing.add("bfloat16")
    if dtype == "int8" and kernels.fbgemm_levels() < 127:
        missing.add("onednn")  # it overflows as well
    return {work: tuple(name for name in names if name not in missing) for work, names in KERNELS[dtype].items()}


def pinned(text: str, dtype: str) -> dict[str, str]:
    """The kernels that a setting fixes, as "work=kernel,work=kernel".

    Raises:
        PrecisionError: there is no such work or kernel, or a work has two.
    """
    known, found = possible(dtype), dict[str, str]()
    for part in filter(None, map(str.strip, text.split(","))):
        work, name = (word.strip() for word in part.partition("=")[::2])
        if name not in known.get(work, ()):
            choices = " or ".join(f"{work}={name}" for work, names in known.items() for name in names)
            raise PrecisionError(f"BLIP_KERNELS={part} is not possible in {dtype} here; choose {choices}.")
        if found.setdefault(work, name) != name:
            raise PrecisionError(f"BLIP_KERNELS has {work}={found[work]} and {work}={name}; leave one out.")
    return found


@torch.inference_mode()
def choose(net: Any, dtype: str, fixed: Mapping[str, str]) -> Choice:
    """Try the kernels on the shapes of one LAVIS model, whose weights are not read; a `fixed` one only proves right.

    Raises:
        PrecisionError: for some work no kernel computes right.
    """
    bert = net.text_decoder.bert if hasattr(net, "text_decoder") else net.text_encoder
    vit, dense = net.visual_encoder, bert.encoder.layer[0].intermediate.dense
    block, states = vit.blocks[0], vit.pos_embed.shape[1]
    works = {
        "image_linear": partial(_linears, dtype, states, block.mlp.fc1.in_features, block.mlp.fc1.out_features),
        "text_linear": partial(_linears, dtype, 3, dense.in_features, dense.out_features),
        "attention": partial(_attentions, dtype, states, block.attn.num_heads, block.mlp.fc1.in_features),
    }
    found = {}
    kernels.keep_memory()  # as it will be
    try:
        for work, names in possible(dtype).items():
            tried = (fixed[work],) if work in fixed else names
            found[work] = fastest(work, *works[work](tried), BOUNDS[dtype])
    finally:
        kernels.keep_memory(LOADING)
    return Choice(**found)


def fastest(work: str, candidates: Mapping[str, Kernel], x: Tensor, plain: Tensor, bound: float) -> str:
    """The name of the fastest kernel that is right; the first unless another is clearly faster.

    Args:
        work: what it is for.
        candidates: by name.
        x: two samples, (2, rows, ...).
        plain: what the plain path makes of their first PROVEN rows, (2, PROVEN, ...).
        bound: how far a result may be off, as a share of its norm.

    Raises:
        PrecisionError: none is right.
    """
    right = {}
    for name, kernel in candidates.items():
        if fault := _fault(kernel, x, plain, bound):
            print(f"{work}={name} is not used on this processor: {fault}.", flush=True)
        else:
            right[name] = kernel
    if not right:
        names = " or ".join(candidates)
        fault = "does not compute right on this processor; leave BLIP_KERNELS out, or set another BLIP_DTYPE."
        raise PrecisionError(f"{work}={names} {fault}")
    if len(right) == 1:
        return next(iter(right))
    with ThreadPoolExecutor(1) as ending:
        return ending.submit(_fastest, right, x[:1]).result()


@torch.inference_mode()
def _fastest(candidates: Mapping[str, Kernel], x: Tensor) -> str:
    kernels.compute_alone()  # the bundle is being verified beside it, and only this thread's time is looked at
    seconds = {name: _seconds(kernel, x) for name, kernel in candidates.items()}
    close = [name for name in seconds if seconds[name] < HOPELESS * min(seconds.values())]
    for _ in range(ROUNDS if len(close) > 1 else 0):
        for name in close:
            seconds[name] = min(seconds[name], _seconds(candidates[name], x))
    first, best = next(iter(seconds)), min(seconds, key=lambda name: seconds[name])
    gain = seconds[first] - seconds[best]
    return best if gain > max(LEAST_SHARE * seconds[first], LEAST_SECONDS) else first


def _seconds(kernel: Kernel, x: Tensor) -> float:
    """How long a call takes this thread, without the time that other work has its core."""
    calls, began, passed = 0, time.thread_time(), 0.0
    while passed < TIMED:
        kernel(x)
        calls, passed = calls + 1, time.thread_time() - began
    return passed / calls


def _fault(kernel: Kernel, x: Tensor, plain: Tensor, bound: float) -> str:
    """What is wrong with a kernel, or ""."""
    try:
        off = ((kernel(x[:, :PROVEN]).float() - plain).norm() / plain.norm()).item()
        is_same = kernel(x[:1]).equal(kernel(x)[:1])
    except RuntimeError as error:
        return str(error).splitlines()[0]
    if not off <= bound:
        return f"its result is off by {off:.1e}"
    return "" if is_same else "its result depends on the batch"


def _linears(
    dtype: str, rows: int, width: int, outputs: int, names: tuple[str, ...]
) -> tuple[dict[str, Kernel], Tensor, Tensor]:
    """Linear layers on the same random weight, two samples of rows for them, and the plain result."""
    random = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=random) for shape in ((2, rows, width), (outputs, width)))
    linear = nn.Linear(width, outputs, device="meta")

    def layer(name: str) -> Kernel:
        inner = torch.bfloat16 if "bfloat16" in (dtype, name) else torch.float32
        linear.weight = nn.Parameter(weight.to(inner), requires_grad=False)
        linear.bias = nn.Parameter(torch.zeros(outputs, dtype=inner), requires_grad=False)
        made = LINEARS[name](linear)
        return lambda part: made(part.to(inner))

    return {name: layer(name) for name in names}, x, F.linear(x[:, :PROVEN], weight)


def _attentions(
    dtype: str, states: int, heads: int, width: int, names: tuple[str, ...]
) -> tuple[dict[str, Kernel], Tensor, Tensor]:
    """Ways to attend, two samples of queries, keys and values (2, N, 3, H, d) for them, and the plain result."""
    shape = (2, states, 3, heads, width // heads)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    given = torch.bfloat16 if dtype == "bfloat16" else torch.float32

    def attend(name: str) -> Kernel:
        kernel = attention(name, dtype)
        return lambda part: kernel([part.to(given)])[0]

    q, k, v = x[:, :PROVEN].permute(2, 0, 3, 1, 4)
    plain = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v  # (2, H, PROVEN, d)
    return {name: attend(name) for name in names}, x, plain.transpose(1, 2).flatten(2)
