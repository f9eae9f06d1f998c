"""Low-rank factors from file order (layout.py) to natural order, on the GPU: what the INT8 kernels read."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .int4 import PackedW4A4


@triton.jit
def _factors_kernel(down_ptr, up_ptr, down_out_ptr, up_out_ptr, K, N, R, stride_up, BLOCK: tl.constexpr):
    """Elements of proj_down [R, K], then of proj_up [N, R], in natural order."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < K * R
    r, k = offs // K, offs % K
    place = (k // 16 * (R // 16) + r // 16) * 256
    place += r % 8 * 32 + k % 8 // 2 * 8 + r // 8 % 2 * 4 + k // 8 % 2 * 2 + k % 2
    tl.store(down_out_ptr + offs, tl.load(down_ptr + place, mask=mask), mask=mask)
    offs -= K * R
    mask = (offs >= 0) & (offs < N * R)
    n, r = offs // R, offs % R
    place = (n // 16 * (R // 16) + r // 16) * 256
    place += n % 8 * 32 + r % 8 // 2 * 8 + n // 8 % 2 * 4 + r // 8 % 2 * 2 + r % 2
    tl.store(up_out_ptr + n * stride_up + r, tl.load(up_ptr + place, mask=mask), mask=mask)


def natural_factors(weight: PackedW4A4, proj_up: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(proj_down T [R, K], proj_up T [N, R]) of a weight in natural order, as ``layout.unpack_lowrank_*``.

    proj_up: where to write it, [N, R] with contiguous rows, may be columns of a wider tensor.
    """
    n, k, rank = weight.n, weight.k, weight.rank
    device, dtype = weight.proj_down.device, weight.proj_down.dtype
    down = torch.empty(rank, k, dtype=dtype, device=device)
    up = torch.empty(n, rank, dtype=dtype, device=device) if proj_up is None else proj_up
    if up.shape != (n, rank) or up.dtype != dtype or up.stride(1) != 1:
        found = f"{up.dtype} {tuple(up.shape)}, strides {up.stride()}"
        raise ValueError(f"proj_up is {found}; expected {dtype} {(n, rank)} with contiguous rows")
    if rank:
        block = 2048
        with torch.cuda.device_of(down):
            _factors_kernel[(triton.cdiv((n + k) * rank, block),)](
                weight.proj_down, weight.proj_up, down, up, k, n, rank, up.stride(0), BLOCK=block, num_warps=8
            )
    return down, up
