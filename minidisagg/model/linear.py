"""A linear layer that streams its weights as fast as the device allows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_ROWS = 64  # the step size to lay weights out for: up to a tenth faster than the default, at one row too


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
    """Logits in at least float32: in bfloat16 the two largest are too often exactly equal."""

    def __init__(self, weight_VH: Tensor) -> None:
        self.on_gpu = weight_VH.is_cuda and weight_VH.dtype in (torch.bfloat16, torch.float16)
        wide = weight_VH if self.on_gpu or weight_VH.dtype == torch.float64 else weight_VH.float()
        self.linear = Linear(wide)

    def __call__(self, x_SH: Tensor) -> Tensor:
        """x_SH is float32 (float64 for a float64 model); so is the result."""
        if self.on_gpu:  # cuBLAS can keep its float32 accumulator, so the weights need no float32 copy
            weight_VH = self.linear.weight
            return torch.mm(x_SH.to(weight_VH.dtype), weight_VH.t(), out_dtype=torch.float32)
        return self.linear(x_SH)


def _can_pack(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32
