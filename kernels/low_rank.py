"""Low-rank factors from file order (layout.py) to what the INT8 kernels read, on the GPU.

proj_up goes to natural order, [N, R]. proj_down, [R, K], goes to operand order: [R / 16, K / 32, 2, 32 lanes, 8] holds
the A operands of 16-bit MMAs for lanes that have eight columns of x side by side. Lane 4 * r + c of operand j has the
ranks r and r + 8 of columns 8c + 4j and 8c + 4j + 1, two and two, and then the same of the next two columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import FMA
from .epilogue import require
from .int4 import PackedW4A4


@triton.jit
def _factors_kernel(down_ptr, up_ptr, down_out_ptr, up_out_ptr, K, N, R, stride_up, BLOCK: tl.constexpr):
    """Elements of proj_down in operand order, then of proj_up [N, R] in natural order."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < K * R
    tile, lane = offs // 512, offs // 8 % 32
    r = tile // (K // 32) * 16 + offs // 2 % 2 * 8 + lane // 4
    k = tile % (K // 32) * 32 + lane % 4 * 8 + offs // 256 % 2 * 4 + offs // 4 % 2 * 2 + offs % 2
    place = (k // 16 * (R // 16) + r // 16) * 256
    place += r % 8 * 32 + k % 8 // 2 * 8 + r // 8 % 2 * 4 + k // 8 % 2 * 2 + k % 2
    tl.store(down_out_ptr + offs, tl.load(down_ptr + place, mask=mask), mask=mask)
    offs -= K * R
    mask = (offs >= 0) & (offs < N * R)
    n, r = offs // R, offs % R
    place = (n // 16 * (R // 16) + r // 16) * 256
    place += n % 8 * 32 + r % 8 // 2 * 8 + n // 8 % 2 * 4 + r // 8 % 2 * 2 + r % 2
    tl.store(up_out_ptr + n * stride_up + r, tl.load(up_ptr + place, mask=mask), mask=mask)


def natural_factors(
    weight: PackedW4A4, proj_down: Tensor | None = None, proj_up: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(proj_down T, nominal [R, K], in operand order, proj_up T [N, R] in natural order) of a weight.

    Those of more ranks are ``torch.cat`` of these, along axis 0 and 1.

    proj_down, proj_up: where to write them; rows of proj_up may be apart, columns of a wider tensor.
    """
    n, k, rank = weight.n, weight.k, weight.rank
    device, dtype = weight.proj_down.device, weight.proj_down.dtype
    down = torch.empty(rank, k, dtype=dtype, device=device) if proj_down is None else proj_down
    up = torch.empty(n, rank, dtype=dtype, device=device) if proj_up is None else proj_up
    require("proj_down", down, (rank, k), dtype)
    if up.shape != (n, rank) or up.dtype != dtype or up.stride(1) != 1:
        found = f"{up.dtype} {tuple(up.shape)}, strides {up.stride()}"
        raise ValueError(f"proj_up is {found}; expected {dtype} {(n, rank)} with contiguous rows")
    if rank:
        block = 2048
        with torch.cuda.device_of(down):
            _factors_kernel[(triton.cdiv((n + k) * rank, block),)](
                weight.proj_down, weight.proj_up, down, up, k, n, rank, up.stride(0), BLOCK=block, num_warps=8, **FMA
            )
    return down, up
