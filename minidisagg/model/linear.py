"""A linear layer that streams its weights as fast as the device allows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_ROWS = 64  # the step size to lay weights out for: up to a tenth faster than the default, at one row too
FEWEST_ROWS = 4  # oneDNN's kernels stream weights at 17 GB/s a thread for 3 to 6 rows, 14 for one, 12 for two
_RESCORED = 32  # logits a row: rounding to 8 bits moves a logit of 20 by 0.06, and few lie that close to the largest


class Linear:
    """y_NO = x_NI @ weight_OI.T + bias_O.

    On a CPU, float32 and bfloat16 weights are reordered once into oneDNN's blocked layout, which streams about twice
    as fast as the row-major one when a step has few tokens.
    """

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None) -> None:
        self.bias = bias_O
        self.packed = _can_pack(weight_OI)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight_OI, _ROWS) if self.packed else weight_OI

    def __call__(self, x_NI: Tensor) -> Tensor:
        if self.packed:
            y_NO: Tensor = torch.ops.mkldnn._linear_pointwise(x_NI, self.weight, self.bias, "none", [], "")
            return y_NO
        return F.linear(x_NI, self.weight, self.bias)


class OutputHead:
    """Logits in at least float32: in bfloat16 the two largest are too often exactly equal.

    On a CPU, a bfloat16 model reads its weights once as they are, and the few largest logits are computed again in
    float32: half the bytes of a float32 copy, and the logits that decide are exact.
    """

    def __init__(self, weight_VH: Tensor) -> None:
        self.weight = weight_VH
        self.linear = Linear(weight_VH)

    def __call__(self, x_SH: Tensor) -> Tensor:
        """x_SH is float32 (float64 for a float64 model); so is the result."""
        if self.weight.dtype == x_SH.dtype:
            return self.linear(x_SH)
        if x_SH.is_cuda:  # cuBLAS can keep its float32 accumulator
            return torch.mm(x_SH.to(self.weight.dtype), self.weight.t(), out_dtype=torch.float32)
        logits_SV = self.linear(x_SH.to(self.weight.dtype)).float()
        largest_SC = logits_SV.topk(min(_RESCORED, logits_SV.shape[1]), sorted=False).indices
        exact_SC1 = torch.bmm(self.weight[largest_SC].float(), x_SH[:, :, None])
        return logits_SV.scatter_(1, largest_SC, exact_SC1[:, :, 0])

    def exact(self, x_SH: Tensor) -> Tensor:
        """All logits in the precision of x_SH, at the price of a wider copy of the weights while it runs."""
        return F.linear(x_SH, self.weight.to(x_SH.dtype))


def padding(linear: Linear, rows: int) -> int:
    """How many rows of zeros make a step of so few rows faster."""
    return max(0, FEWEST_ROWS - rows) if linear.packed and rows else 0


def _can_pack(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32
