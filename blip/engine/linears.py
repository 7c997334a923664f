"""Linear layers for a CPU, each on its own kernel and none with a result that depends on the batch.

Each takes (B, ..., in) and gives (B, ..., out).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip.engine import kernels


class PackedLinear(nn.Module):
    """Through oneDNN with packed weights; input and output of the weight's dtype. With `gelu`, the exact GELU of it.

    It takes parts of the inputs or of the rows where a sum would otherwise depend on the number of rows.
    """

    def __init__(self, linear: nn.Linear, *, gelu: bool = False) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self._inputs, self._rows = kernels.inputs_at_a_time(weight), kernels.rows_at_a_time(weight)
        self.weight, *self._others = (kernels.pack(part) for part in weight.split(self._inputs, dim=1))
        self.bias = None if linear.bias is None else linear.bias.detach()
        self._gelu = gelu

    def forward(self, x: Tensor) -> Tensor:
        """The product with the weight, plus the bias."""
        rows = x.shape[1:-1].numel()  # of a sample
        if (self._rows and rows > kernels.FEW_ROWS) or len(x) * rows <= self._rows:
            return self._multiply(x)
        parts = x.flatten(0, -2).split(max(rows, self._rows))
        out: Tensor = torch.cat([self._multiply(part) for part in parts]).unflatten(0, x.shape[:-1])
        return out

    def _multiply(self, x: Tensor) -> Tensor:
        if not self._others:
            return kernels.linear(x, self.weight, self.bias, gelu=self._gelu)
        first, *others = x.split(self._inputs, dim=-1)
        out = kernels.linear(first, self.weight, self.bias)
        for part, weight in zip(others, self._others, strict=True):
            out = kernels.linear_plus(part, weight, out)
        return F.gelu(out) if self._gelu else out


class SampleLinear(nn.Module):
    """Torch's own, on one sample after the other: in a batch it may add up in another order."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        """The product with the weight, plus the bias."""
        if len(x) == 1:
            return self.linear(x)  # type: ignore[no-any-return]
        samples = x.split(1) if kernels.keeps_aligned(x[0]) else kernels.apart(x)
        return torch.cat([self.linear(sample) for sample in samples])


class Int8Linear(nn.Module):
    """8-bit weights with a scale per output, and 8-bit inputs with a scale per row; in and out are float32."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        numbers, scales = kernels.quantise(linear.weight.detach().float())
        self._pack(numbers, scales)
        self.bias = torch.zeros(len(scales)) if linear.bias is None else linear.bias.detach().float()

    def forward(self, x: Tensor) -> Tensor:
        """The product with the weight, plus the bias."""
        largest = x.abs().amax(-1, keepdim=True).clamp_(min=torch.finfo(x.dtype).tiny)  # (..., 1)
        products = self._multiply(x / largest)
        return torch.addcmul(self.bias, products, largest, out=products)

    def _pack(self, numbers: Tensor, scales: Tensor) -> None:
        self._packed, self._levels = kernels.pack_fbgemm(numbers, scales), kernels.fbgemm_levels()

    def _multiply(self, x: Tensor) -> Tensor:
        return kernels.fbgemm_linear(x, self._packed, self._levels)


class OneDnnInt8Linear(Int8Linear):
    """The same through oneDNN."""

    def _pack(self, numbers: Tensor, scales: Tensor) -> None:
        self._packed = kernels.pack_onednn_int8(numbers, scales)

    def _multiply(self, x: Tensor) -> Tensor:
        return kernels.onednn_int8_linear(x, self._packed)


#: By the names of `blip.engine.trial`; "bfloat16" in a model that is in 8 bits elsewhere.
LINEARS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "packed": PackedLinear,
    "sample": SampleLinear,
    "bfloat16": PackedLinear,
    "fbgemm": Int8Linear,
    "onednn": OneDnnInt8Linear,
}
