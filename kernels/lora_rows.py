"""A LoRA on few rows: y += (x @ down^T) @ up^T, for the modulation layers, whose kernel has no low-rank branch.

Each factor is read once, which is all that counts here; cuBLAS would do as well, but wants memory of its own for each
stream, which a CUDA graph must not allocate.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import FMA

COLUMNS, OUTPUTS, RANKS = 1024, 128, 16  # of a step


@triton.jit(do_not_specialize=["R"])
def lora_down_kernel(x_ptr, down_ptr, t_ptr, K, R, stride_x, COLUMNS: tl.constexpr):
    """One column of one row of x @ down^T."""
    r, m = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    products = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, K, COLUMNS):
        k = first + tl.arange(0, COLUMNS)
        x = tl.load(x_ptr + m * stride_x + k, mask=k < K, other=0.0)
        products += x.to(tl.float32) * tl.load(down_ptr + r * K + k, mask=k < K, other=0.0).to(tl.float32)
    tl.store(t_ptr + m * R + r, tl.sum(products))


@triton.jit(do_not_specialize=["R"])
def lora_up_kernel(t_ptr, up_ptr, y_ptr, N, R, stride_y, OUTPUTS: tl.constexpr, RANKS: tl.constexpr):
    """OUTPUTS elements of one row of y += t @ up^T."""
    n, m = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS), tl.program_id(1).to(tl.int64)
    y = tl.load(y_ptr + m * stride_y + n, mask=n < N, other=0.0).to(tl.float32)
    for first in range(0, R, RANKS):
        r = first + tl.arange(0, RANKS)
        t = tl.load(t_ptr + m * R + r, mask=r < R, other=0.0)
        inside = (n < N)[:, None] & (r < R)[None, :]
        up = tl.load(up_ptr + n[:, None].to(tl.int64) * R + r[None, :], mask=inside, other=0.0)
        y += tl.sum(up.to(tl.float32) * t[None, :], axis=1)
    tl.store(y_ptr + m * stride_y + n, y.to(y_ptr.dtype.element_ty), mask=n < N)


def add_lora(y: Tensor, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """y + (x @ down^T) @ up^T in y's memory, sums in float32, rounded once; returns y.

    y: T [M, N] · x: T [M, K] · down: T [R, K] · up: T [N, R], contiguous; T bf16 or fp16, all on one GPU. Same numbers
    on every run. Raises ValueError where operands do not fit.
    """
    (m, k), (n, rank) = x.shape, up.shape
    if y.shape != (m, n) or down.shape != (rank, k) or not (down.is_contiguous() and up.is_contiguous()):
        shapes = ", ".join(str(list(tensor.shape)) for tensor in (y, x, down, up))
        raise ValueError(f"y, x, down, up are {shapes}; expected [M, N], [M, K], [R, K], [N, R], those contiguous")
    if x.stride(1) != 1 or y.stride(1) != 1:
        raise ValueError(f"x and y have strides {x.stride()} and {y.stride()}; expected contiguous rows")
    t = torch.empty(m, rank, dtype=torch.float32, device=x.device)
    # Triton launches on the current device, whatever the tensors are on.
    with torch.cuda.device_of(x):
        lora_down_kernel[(rank, m)](x, down, t, k, rank, x.stride(0), COLUMNS=COLUMNS, num_warps=4, **FMA)
        lora_up_kernel[(triton.cdiv(n, OUTPUTS), m)](
            t, up, y, n, rank, y.stride(0), OUTPUTS=OUTPUTS, RANKS=RANKS, num_warps=4, **FMA
        )
    return y
