"""Whole layers on the INT4 kernels: what ``reference.py`` computes, on an NVIDIA GPU. Importing this imports Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from .gemm_int4 import gemm_w4a4
from .gemv import MAX_ROWS, gemv_w4a16
from .int4 import PackedAWQ, PackedW4A4
from .quantize import quantize_act


def linear_parts_w4a4(x: Tensor, parts: tuple[PackedW4A4, ...], axis: int, bias: Tensor | None) -> Tensor:
    """As :func:`kernels.reference.linear_parts_w4a4`: x T [M, K], bias [N] or None (the stored one) -> T [M, N].

    axis 0: outputs side by side in one tensor; axis 1: two inputs side by side, summed before anything is rounded.
    """
    if axis == 0:
        y = torch.empty(x.shape[0], sum(part.n for part in parts), dtype=x.dtype, device=x.device)
        start = 0
        for part in parts:
            stop = start + part.n
            part_bias = None if bias is None else bias[start:stop]
            gemm_w4a4(*quantize_act(x, part), part, part_bias, out=y[:, start:stop])
            start = stop
        return y
    first, second = parts
    operand = (*quantize_act(x[:, : first.k], first), first)
    return gemm_w4a4(*operand, bias, second=(*quantize_act(x[:, first.k :], second), second))


def linear_awq(x: Tensor, weight: PackedAWQ, bias: Tensor | None) -> Tensor | None:
    """A modulation layer on x T [M, K], as :func:`kernels.gemv.gemv_w4a16`; None where that kernel does not apply."""
    if not 1 <= x.shape[0] <= MAX_ROWS or x.dtype != weight.wscales.dtype:
        return None
    return gemv_w4a16(x, weight, bias)
