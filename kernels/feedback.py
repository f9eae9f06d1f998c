"""Rounding a group of columns with error feedback (GPTQ, arXiv 2210.17323): what is done one column after the other,
and the search for the group's scale before it, in one launch. The arithmetic is that of quantizer/solve.py, which takes
about 800 launches for it; sums are in another order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import FMA
from .int4 import GROUP

ROWS, WARPS = 16, 4  # of a program
_INTEGERS = tl.constexpr(12582912.0)  # 1.5 * 2^23: near it float32 has no fractions


@triton.jit
def _codes(values, scale, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Nearest integers of values / scale, ties to even; 0 for 0 / 0."""
    q = tl.div_rn(values, scale)
    q = tl.minimum(tl.maximum(tl.where(q == q, q, 0.0), LOW), HIGH)
    return (q + _INTEGERS) - _INTEGERS


@triton.jit(do_not_specialize=["start"])
def feedback_kernel(
    work_ptr, inverse_ptr, importance_ptr, steps_ptr, scales_ptr, zeros_ptr, codes_ptr, errors_ptr, N, K, start,
    STEPS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, BF16: tl.constexpr, ROWS: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """ROWS rows of the group that begins with column ``start``."""
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, GROUP)
    inside, wide = rows < N, rows.to(tl.int64)
    at, both = wide[:, None] * K + start + columns[None, :], inside[:, None] & (columns < GROUP)[None, :]
    values = tl.load(work_ptr + at, mask=both, other=0.0)
    group_at = wide * (K // GROUP) + start // GROUP
    if STEPS:
        importance = tl.load(importance_ptr + start + columns)[None, :]
        amax, weighted = tl.max(tl.abs(values), axis=1), values * importance
        scale, best_gain = tl.full([ROWS], 1.0, tl.float32), tl.zeros([ROWS], tl.float32)
        for index in range(STEPS):
            q = _codes(values, (amax * tl.load(steps_ptr + index))[:, None], LOW, HIGH)
            vq, qq = tl.sum(weighted * q, axis=1), tl.sum(q * q * importance, axis=1)
            tried = tl.div_rn(vq, qq)
            tried = tried.to(tl.bfloat16 if BF16 else tl.float16).to(tl.float32)
            gain = tried * (2 * vq - tried * qq)
            better = (gain > best_gain) & (tl.abs(tried) < float("inf"))
            scale, best_gain = tl.where(better, tried, scale), tl.where(better, gain, best_gain)
        zero = tl.zeros([ROWS], tl.float32)
        tl.store(scales_ptr + group_at, scale, mask=inside)
    else:
        scale = tl.load(scales_ptr + group_at, mask=inside, other=1.0)
        zero = tl.load(zeros_ptr + group_at, mask=inside, other=0.0)
    codes, errors = tl.zeros([ROWS, GROUP], tl.float32), tl.zeros([ROWS, GROUP], tl.float32)
    for column in range(GROUP):
        here = (columns == column)[None, :]
        value = tl.sum(tl.where(here, values, 0.0), axis=1)
        q = _codes(value - zero, scale, LOW, HIGH)
        row = inverse_ptr + (start + column).to(tl.int64) * K + start
        error = tl.div_rn(value - (q * scale + zero), tl.load(row + column))
        spread = tl.load(row + columns, mask=columns > column, other=0.0)
        values -= error[:, None] * spread[None, :]
        codes, errors = tl.where(here, q[:, None], codes), tl.where(here, error[:, None], errors)
    tl.store(codes_ptr + at, codes.to(tl.int8), mask=both)
    tl.store(errors_ptr + wide[:, None] * GROUP + columns[None, :], errors, mask=both)


def round_group(
    work: Tensor, start: int, inverse: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, low: int, high: int,
    search: tuple[Tensor, Tensor, torch.dtype] | None = None,
) -> Tensor:  # fmt: skip
    """Round the 64 columns of work from ``start`` on; returns errors float32 [N, 64], to be spread over those behind.

    work: float32 [N, K] · inverse: float32 [K, K], upper triangular (solve.inverse_factor) · codes: int8 [N, K], in
    ``low``..``high`` · scales, zeros: float32 [N, K / 64]; of these and of the codes the group's columns are written,
    or scales and zeros read where there is no search · search: (importance float32 [K], step sizes relative to a
    group's largest value float32 [S], 16-bit type of scales). All on one GPU, contiguous. Raises ValueError where
    operands do not fit.
    """
    n, k = work.shape
    shapes = {(n, k): (work, codes), (k, k): (inverse,), (n, k // GROUP): (scales, zeros)}
    importance, steps, dtype = search or (scales, scales, torch.bfloat16)
    wrong = [t for shape, found in shapes.items() for t in found if tuple(t.shape) != shape or not t.is_contiguous()]
    if wrong or start % GROUP or not 0 <= start < k or (search and importance.shape != (k,)):
        found = ", ".join(str(list(t.shape)) for t in (work, inverse, codes, scales, zeros, importance))
        raise ValueError(
            f"work, inverse, codes, scales, zeros, importance are {found}, start is {start}; expected contiguous "
            f"[N, K], [K, K], [N, K], [N, K / {GROUP}] twice, [K], and the first column of a group"
        )
    errors = torch.empty(n, GROUP, dtype=torch.float32, device=work.device)
    with torch.cuda.device_of(work):
        feedback_kernel[(triton.cdiv(n, ROWS),)](
            work, inverse, importance, steps, scales, zeros, codes, errors, n, k, start,
            STEPS=len(steps) if search else 0, LOW=low, HIGH=high, ROWS=ROWS, GROUP=GROUP, num_warps=WARPS,
            BF16=dtype == torch.bfloat16, **FMA,
        )  # fmt: skip
    return errors
