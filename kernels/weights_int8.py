"""INT4 checkpoint weights to INT8, one scale per output channel: what ``gemm_int8.py`` multiplies."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .epilogue import require
from .int4 import GROUP, PackedW4A4

_ROUND = tl.constexpr(12582912.0)  # 3 * 2^22: adding it rounds a small float32 to an integer, ties to even
_ROUND_BITS = tl.constexpr(0x4B400000)
_EXPONENT = tl.constexpr(0x4B000000)  # the float 2^23, whose last bit is worth 1


@dataclass(frozen=True)
class W8:
    """One INT8 weight: q int8 [N, K], row-major · scales float32 [N] · sums int32 [N]: of q along K · act_unsigned: as
    in int4.py; the activation codes it takes are then those of an unsigned layer."""

    q: Tensor
    scales: Tensor
    sums: Tensor
    act_unsigned: bool = False

    @property
    def n(self) -> int:
        return self.q.shape[0]

    @property
    def k(self) -> int:
        return self.q.shape[1]


@triton.jit
def _expand_kernel(
    words_ptr, wscales_ptr, q_ptr, scales_ptr, sums_ptr, G,
    SUMS: tl.constexpr, STEP: tl.constexpr, BLOCK_G: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """16 rows and all of K, STEP groups at a time: one contiguous 512 bytes of each tile of the file (layout.py)."""
    pid = tl.program_id(0)
    row = tl.arange(0, 16)
    # Scales: [N / 128, G, 128], 16 rows as in layout.unpack_vector.
    place = row % 8 // 2 * 4 + row // 8 * 2 + row % 2
    wscales_ptr += pid // 8 * (G * 128) + pid % 8 * 16
    largest = tl.zeros([16], tl.float32)
    for g in range(0, G, BLOCK_G):
        offs_g = g + tl.arange(0, BLOCK_G)
        s = tl.load(wscales_ptr + offs_g[:, None] * 128 + place[None, :], mask=(offs_g < G)[:, None], other=0.0)
        largest = tl.maximum(largest, tl.max(tl.abs(s.to(tl.float32)), axis=0))
    scales = largest * 0.0625
    tl.store(scales_ptr + pid * 16 + row, scales)
    inverse = tl.where(scales > 0.0, 1.0 / scales, 0.0)

    words_ptr += pid // 8 * (G * 1024) + pid % 8 * 128
    q_ptr += (pid * 16).to(tl.int64) * (G * 64)
    offs_step = tl.arange(0, STEP)
    offs_q = row[:, None] * (G * 64) + tl.arange(0, STEP * 64)[None, :]
    shifts = 4 * tl.arange(0, 8)
    sums = tl.zeros([16], tl.int32)
    for g in tl.range(0, G, STEP, num_stages=STAGES):
        inside = g + offs_step < G
        words = tl.load(
            words_ptr + (g + offs_step)[:, None] * 1024 + tl.arange(0, 128)[None, :], mask=inside[:, None], other=0
        )
        s = tl.load(wscales_ptr + (g + offs_step)[None, :] * 128 + place[:, None], mask=inside[None, :], other=0.0)
        ratio = s.to(tl.float32) * inverse[:, None]  # [16, STEP], at most 16
        # axes: group, n%8, k/8%4, n/8, k/32 -> n/8, n%8, group, k/32, k/8%4
        words = tl.permute(tl.reshape(words, [STEP, 8, 4, 2, 2]), [3, 1, 0, 4, 2])
        code = ((tl.reshape(words, [16, STEP, 8])[:, :, :, None] >> shifts) & 15) ^ 8  # the code + 8
        code = (code | _EXPONENT).to(tl.float32, bitcast=True) - 8388616.0
        scaled = tl.fma(code, tl.broadcast_to(ratio[:, :, None, None], [16, STEP, 8, 8]), _ROUND)
        q = tl.reshape(scaled.to(tl.int32, bitcast=True) - _ROUND_BITS, [16, STEP * 64])
        if SUMS:
            sums += tl.sum(q, axis=1)
        tl.store(q_ptr + g * 64 + offs_q, q.to(tl.int8), mask=g * 64 + tl.arange(0, STEP * 64)[None, :] < G * 64)
    if SUMS:
        tl.store(sums_ptr + pid * 16 + row, sums)


def expand_w4_to_int8(
    weight: PackedW4A4, out: Tensor | None = None, step: int = 8, warps: int = 4, stages: int = 2
) -> W8:
    """As :func:`kernels.reference.expand_w4_to_int8`, from file order to natural row-major.

    out: int8 [N, K] to write q into, or None · step (groups at a time), warps, stages: for benchmarks. ``sums`` is
    filled only where the layer takes unsigned activation codes. One pass, bound by memory: 1.5 bytes per weight.
    """
    n, k = weight.n, weight.k
    device = weight.qweight.device
    q = torch.empty(n, k, dtype=torch.int8, device=device) if out is None else out
    require("out", q, (n, k), torch.int8)
    scales = torch.empty(n, dtype=torch.float32, device=device)
    sums = torch.empty(n, dtype=torch.int32, device=device) if weight.act_unsigned else scales.view(torch.int32)
    with torch.cuda.device_of(q):
        _expand_kernel[(n // 16,)](
            words_ptr=weight.qweight.view(torch.int32),
            wscales_ptr=weight.wscales,
            q_ptr=q,
            scales_ptr=scales,
            sums_ptr=sums,
            G=k // GROUP,
            SUMS=weight.act_unsigned,
            STEP=step,
            BLOCK_G=16,
            STAGES=stages,
            num_warps=warps,
        )
    return W8(q, scales, sums, weight.act_unsigned)
