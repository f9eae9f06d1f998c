"""AWQ W4A16 for the modulation layers: y[m, n] = sum_k x[m, k] * (code[n, k] * wscale[g, n] + wzero[g, n]) + bias[n].

M is 1 to 8 (one row per picture in the batch), so reading the 4-bit codes once is all that counts. Weights stay in the
file's order (kernels/layout.py, contract in int4.py); rows are written in BFL's order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .int4 import PackedAWQ

MAX_ROWS = 8


@triton.jit
def _gemv_kernel(
    x_ptr, qweight_ptr, wscales_ptr, wzeros_ptr, bias_ptr, y_ptr,
    M, N, K, splits,
    stride_xm, stride_ym,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = pid * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = offs_m < M
    mask_n = offs_n < N
    row_ptr = qweight_ptr + (offs_n // 4).to(tl.int64) * (K // 2) + (offs_n % 4) * 8
    words = K // 8  # of one row
    acc = tl.zeros([BLOCK_M, BLOCK_N, BLOCK_W], dtype=tl.float32)
    for start in range(0, words, BLOCK_W):
        offs_w = start + tl.arange(0, BLOCK_W)
        mask_w = offs_w < words
        group = offs_w // 8
        mask = mask_n[:, None] & mask_w[None, :]
        packed = tl.load(row_ptr[:, None] + group[None, :] * 32 + (offs_w % 8)[None, :], mask=mask, other=0)
        scale_offset = group.to(tl.int64)[None, :] * N + offs_n[:, None]
        scale = tl.load(wscales_ptr + scale_offset, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_N, BLOCK_W]
        zero = tl.load(wzeros_ptr + scale_offset, mask=mask, other=0.0).to(tl.float32)
        # A word holds k = group * 64 + half * 32 + 8 * i + pair * 2 + e in nibble i + 4 * e.
        k0 = group * 64 + (offs_w % 8) // 4 * 32 + offs_w % 4 * 2
        for i in tl.static_range(4):
            for e in tl.static_range(2):
                code = ((packed >> (4 * i + 16 * e)) & 15).to(tl.float32)
                w = tl.fma(code, scale, zero)
                offs_k = k0 + 8 * i + e
                x = tl.load(
                    x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm + offs_k[None, :],
                    mask=mask_m[:, None] & mask_w[None, :],
                    other=0.0,
                )  # [BLOCK_M, BLOCK_W]
                acc = tl.fma(x.to(tl.float32)[:, None, :], w[None, :, :], acc)
    y = tl.sum(acc, axis=2)  # [BLOCK_M, BLOCK_N]
    # stored row j * splits + i is row i * (N / splits) + j of the layer
    row = offs_n % splits * (N // splits) + offs_n // splits
    if HAS_BIAS:
        y += tl.load(bias_ptr + row, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    y_offset = offs_m.to(tl.int64)[:, None] * stride_ym + row[None, :]
    tl.store(y_ptr + y_offset, y.to(y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


def gemv_w4a16(x: Tensor, weight: PackedAWQ, bias: Tensor | None = None) -> Tensor:
    """AWQ W4A16 linear for few rows, accumulated in float32, rounded once.

    x: T [M, K], M up to MAX_ROWS, T bf16 or fp16, last axis contiguous · weight: file order · bias: [N] in BFL's row
    order, any float type, or None. Returns T [M, N], rows in BFL's order. Same numbers on every run.
    """
    m, k = x.shape
    n = weight.n
    if not 1 <= m <= MAX_ROWS:
        raise ValueError(f"x has {m} rows, gemv_w4a16 takes 1 to {MAX_ROWS}")
    if k != weight.k or x.stride(1) != 1:
        raise ValueError(f"x is {list(x.shape)}, strides {x.stride()}; expected [M, {weight.k}] with contiguous rows")
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    block_m = triton.next_power_of_2(m)
    block_n = 8
    # Triton launches on the current device, whatever the tensors are on.
    with torch.cuda.device(x.device):
        _gemv_kernel[(triton.cdiv(n, block_n),)](
            x_ptr=x,
            qweight_ptr=weight.qweight,
            wscales_ptr=weight.wscales,
            wzeros_ptr=weight.wzeros,
            bias_ptr=bias,
            y_ptr=y,
            M=m,
            N=n,
            K=k,
            splits=weight.splits,
            stride_xm=x.stride(0),
            stride_ym=y.stride(0),
            HAS_BIAS=bias is not None,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_W=128 if block_m <= 2 else 64,
            num_warps=4,
        )
    return y
