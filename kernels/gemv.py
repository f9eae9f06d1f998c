"""AWQ W4A16 for the modulation layers: y[m, n] = sum_k x[m, k] * (code[n, k] * wscale[g, n] + wzero[g, n]) + bias[n].

M is 1 to 8 (one row per picture in the batch), so reading the 4-bit codes once is all that counts. They go through
16-bit MMAs with the layer as the A operand and x as B, which takes two instructions for a code instead of eight,
whatever M is: a code is exact in bf16 and fp16. A group's product with the codes and its sum of x (a product with ones)
are scaled in float32. Weights stay in the file's order (kernels/layout.py, contract in int4.py); rows are written in
BFL's order.

A thread block has 16 stored rows, four warps that share the groups, and one accumulator tensor [warp, lane] for each of
the four output registers of an MMA. Stored row 2 * r of a block is row r of its MMA and 2 * r + 1 row r + 8, so that a
lane's scales are one word. Columns of x and codes have the order in which a lane finds them side by side: the MMA at i
takes k = 32 * (c / 2) + 8 * i + 4 * (c % 2) + 0..3 in lane 4 * r + c.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .device import FMA
from .epilogue import BF16, FP16, unpack_pair
from .gluon_compat import gl, gluon
from .int4 import PackedAWQ
from .int4_block import mma_16bit

MAX_ROWS = 8
ROWS = 16  # stored rows of a thread block
WARPS = 4
UNROLL = 3  # groups that a warp has under way


@gluon.jit
def _codes_as_16bit(word, T: gl.constexpr):
    """The eight codes of a word as four pairs of T: the pair at i is (nibble i, nibble i + 4)."""
    # As the last bits of 128 (bf16) or 1024 (fp16), whose last bit is worth 1; then without it, which is exact.
    magic: gl.constexpr = "0x43004300" if T == BF16 else "0x64006400"
    minus: gl.constexpr = "0xC300C300" if T == BF16 else "0xE400E400"
    one: gl.constexpr = "0x3F803F80" if T == BF16 else "0x3C003C00"
    kind: gl.constexpr = "bf16x2" if T == BF16 else "f16x2"
    asm: gl.constexpr = (
        "{\n.reg .b32 m, o, s, a, b, c;\n"
        "mov.b32 m, " + minus + ";\nmov.b32 o, " + one + ";\n"
        "shr.u32 a, $4, 4;\nshr.u32 b, $4, 8;\nshr.u32 c, $4, 12;\n"
        "lop3.b32 s, $4, 0x000F000F, " + magic + ", 0xEA;\nfma.rn." + kind + " $0, s, o, m;\n"
        "lop3.b32 s, a, 0x000F000F, " + magic + ", 0xEA;\nfma.rn." + kind + " $1, s, o, m;\n"
        "lop3.b32 s, b, 0x000F000F, " + magic + ", 0xEA;\nfma.rn." + kind + " $2, s, o, m;\n"
        "lop3.b32 s, c, 0x000F000F, " + magic + ", 0xEA;\nfma.rn." + kind + " $3, s, o, m;\n}"
    )
    return gl.inline_asm_elementwise(
        asm, "=&r,=&r,=&r,=&r,r", [word], dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=True, pack=1
    )


@gluon.jit
def _pairs(ptr, mask, P: gl.constexpr):
    """Two words of each lane: pointers and mask [warp, lane, 2] -> two [warp, lane] in layout P."""
    low, high = gl.split(gl.load(ptr, mask=mask, other=0))
    return gl.convert_layout(low, P, assert_trivial=True), gl.convert_layout(high, P, assert_trivial=True)


@gluon.jit
def gemv_kernel(x_ptr, qweight_ptr, wscales_ptr, wzeros_ptr, bias_ptr, y_ptr, M, N, K, splits, stride_xm, stride_ym,
                HAS_BIAS: gl.constexpr, T: gl.constexpr, WARPS: gl.constexpr, UNROLL: gl.constexpr):  # fmt: skip
    """x, qweight, wscales, wzeros: int32 words; stride_xm in words."""
    P: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [WARPS, 1], [1, 0])
    PAIR: gl.constexpr = gl.BlockedLayout([1, 1, 2], [1, 32, 1], [WARPS, 1, 1], [2, 1, 0])
    warp = gl.arange(0, WARPS, gl.SliceLayout(1, P))[:, None]
    lane = gl.arange(0, 32, gl.SliceLayout(0, P))[None, :]
    warp2 = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, PAIR)))[:, None, None]
    lane2 = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(2, PAIR)))[None, :, None]
    word = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, PAIR)))[None, None, :]
    groups = K // 64
    first = gl.program_id(0) * 16

    row = first + lane2 // 4 * 2  # and the one behind it, of the same four that share their words
    codes_ptr = qweight_ptr + (row // 4).to(gl.int64) * (K // 2) + row % 4 * 8 + lane2 % 4 * 2 + word
    column = lane2 % 4 // 2 * 16 + lane2 % 2 * 2 + word  # in words
    inputs_ptr = x_ptr + (lane2 // 4).to(gl.int64) * stride_xm + column
    stored = first + lane // 4 * 2
    scales_at = stored // 2
    zero = gl.zeros([WARPS, 32], gl.float32, P)
    y0, y1, y2, y3 = zero, zero, zero, zero
    one: gl.constexpr = 0x3F803F80 if T == BF16 else 0x3C003C00
    ones = gl.full([WARPS, 32], one, gl.int32, P)
    for start in range(0, groups, WARPS * UNROLL):
        for u in gl.static_range(UNROLL):
            group, group2 = start + u * WARPS + warp, start + u * WARPS + warp2
            valid, valid2 = (group < groups) & (stored < N), (group2 < groups) & (row < N)
            q0, q1 = _pairs(codes_ptr + group2 * 32, valid2, P)
            r0, r1 = _pairs(codes_ptr + group2 * 32 + 8, valid2, P)
            at = group.to(gl.int64) * (N // 2) + scales_at
            scale0, scale1 = unpack_pair(gl.load(wscales_ptr + at, mask=valid, other=0), T)
            zero0, zero1 = unpack_pair(gl.load(wzeros_ptr + at, mask=valid, other=0), T)
            a00, a01, a02, a03 = _codes_as_16bit(q0, T)
            a20, a21, a22, a23 = _codes_as_16bit(q1, T)
            a10, a11, a12, a13 = _codes_as_16bit(r0, T)
            a30, a31, a32, a33 = _codes_as_16bit(r1, T)
            here = (group2 < groups) & (lane2 // 4 < M)
            b0, b1 = _pairs(inputs_ptr + group2 * 32, here, P)
            d0, d1, d2, d3 = mma_16bit(a00, a10, a20, a30, b0, b1, zero, zero, zero, zero, T)
            s0, s1, s2, s3 = mma_16bit(ones, ones, ones, ones, b0, b1, zero, zero, zero, zero, T)
            b0, b1 = _pairs(inputs_ptr + group2 * 32 + 4, here, P)
            d0, d1, d2, d3 = mma_16bit(a01, a11, a21, a31, b0, b1, d0, d1, d2, d3, T)
            s0, s1, s2, s3 = mma_16bit(ones, ones, ones, ones, b0, b1, s0, s1, s2, s3, T)
            b0, b1 = _pairs(inputs_ptr + group2 * 32 + 8, here, P)
            d0, d1, d2, d3 = mma_16bit(a02, a12, a22, a32, b0, b1, d0, d1, d2, d3, T)
            s0, s1, s2, s3 = mma_16bit(ones, ones, ones, ones, b0, b1, s0, s1, s2, s3, T)
            b0, b1 = _pairs(inputs_ptr + group2 * 32 + 12, here, P)
            d0, d1, d2, d3 = mma_16bit(a03, a13, a23, a33, b0, b1, d0, d1, d2, d3, T)
            s0, s1, s2, s3 = mma_16bit(ones, ones, ones, ones, b0, b1, s0, s1, s2, s3, T)
            y0 = gl.fma(s0, zero0, gl.fma(d0, scale0, y0))
            y1 = gl.fma(s1, zero0, gl.fma(d1, scale0, y1))
            y2 = gl.fma(s2, zero1, gl.fma(d2, scale1, y2))
            y3 = gl.fma(s3, zero1, gl.fma(d3, scale1, y3))
    # Register i of lane 4 * r + c: stored row 2 * r + i / 2, row 2 * c + i % 2 of x.
    lane = gl.arange(0, 32, gl.SliceLayout(0, P))
    for i in gl.static_range(2):
        stored = first + lane // 4 * 2 + i
        # stored row j * splits + i is row i * (N / splits) + j of the layer
        at = stored % splits * (N // splits) + stored // splits
        even, odd = (gl.sum(y0, axis=0), gl.sum(y1, axis=0)) if i == 0 else (gl.sum(y2, axis=0), gl.sum(y3, axis=0))
        if HAS_BIAS:
            bias = gl.load(bias_ptr + at, mask=stored < N, other=0.0).to(gl.float32)
            even += bias
            odd += bias
        m = lane % 4 * 2
        out = y_ptr + m.to(gl.int64) * stride_ym + at
        gl.store(out, even.to(y_ptr.dtype.element_ty), mask=(stored < N) & (m < M))
        gl.store(out + stride_ym, odd.to(y_ptr.dtype.element_ty), mask=(stored < N) & (m + 1 < M))


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
    if x.dtype != weight.wscales.dtype:
        raise ValueError(f"x is {x.dtype}, expected {weight.wscales.dtype} as the layer's scales")
    if (m > 1 and x.stride(0) % 2) or x.data_ptr() % 4:  # it is read in words
        x = x.clone(memory_format=torch.contiguous_format)
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    # Triton launches on the current device, whatever the tensors are on.
    with torch.cuda.device(x.device):
        gemv_kernel[(-(-n // ROWS),)](
            _words(x),
            weight.qweight,
            _words(weight.wscales),
            _words(weight.wzeros),
            bias,
            y,
            m,
            n,
            k,
            weight.splits,
            x.stride(0) // 2,
            y.stride(0),
            HAS_BIAS=bias is not None,
            T=(BF16 if x.dtype == torch.bfloat16 else FP16).value,
            WARPS=WARPS,
            UNROLL=UNROLL,
            num_warps=WARPS,
            **FMA,
        )
    return y


def _words(x: Tensor) -> Tensor:
    """The same memory as int32. A single row may have any stride, by which torch would refuse."""
    return (x.flatten() if x.is_contiguous() else x).view(torch.int32)
