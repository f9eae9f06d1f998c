"""What follows a GEMM while its results are still float32 in registers, up to writing them: GELU, gate and residual,
RMSNorm and RoPE.

Accumulators are four tensors c0..c3 [m16 tiles, n8 tiles, 32 lanes] in the layout P of ``gemm_int4.py``: lane 4 * r + c
holds row r, columns 2c and 2c + 1 (c0, c1), and the same of row r + 8 (c2, c3). Nothing is rounded in between, so a
fused chain is nearer to the exact result than its parts one after the other. Formulas: ``reference.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .gluon_compat import gl, gluon

BF16 = gl.constexpr(0)  # type of scales and low-rank factors (T), or of the output
FP16 = gl.constexpr(1)
FP32 = gl.constexpr(2)

KINDS = ("NONE", "GELU", "GATE_RESIDUAL", "NORM_ROPE")  # in the order of these numbers:
NONE = gl.constexpr(0)
GELU = gl.constexpr(1)
GATE_RESIDUAL = gl.constexpr(2)
NORM_ROPE = gl.constexpr(3)

HEAD = gl.constexpr(128)
EPS = gl.constexpr(1e-6)


@gluon.jit
def unpack_pair(x, T: gl.constexpr):
    """The two 16-bit floats of an int32 word as float32, low half first."""
    if T == BF16:
        low = (x << 16).to(gl.float32, bitcast=True)
        high = (x & -65536).to(gl.float32, bitcast=True)
    else:
        low, high = gl.inline_asm_elementwise(
            "{\n.reg .b16 l, h;\nmov.b32 {l, h}, $2;\ncvt.f32.f16 $0, l;\ncvt.f32.f16 $1, h;\n}",
            "=f,=f,r",
            [x],
            dtype=(gl.float32, gl.float32),
            is_pure=True,
            pack=1,
        )
    return low, high


@gluon.jit
def pack_pair(low, high, T: gl.constexpr, SATURATE: gl.constexpr):
    """Two float32, rounded to nearest even, as the 16-bit halves of an int32 word; fp16 may saturate at 65504."""
    kind: gl.constexpr = "bf16x2" if T == BF16 else "f16x2"
    limit: gl.constexpr = (
        "mov.b32 l, 0x7BFF7BFF;\nmin.NaN.f16x2 x, x, l;\nmov.b32 l, 0xFBFFFBFF;\nmax.NaN.f16x2 x, x, l;\n"
        if SATURATE and T == FP16
        else ""
    )
    asm: gl.constexpr = "{\n.reg .b32 x, l;\ncvt.rn." + kind + ".f32 x, $2, $1;\n" + limit + "mov.b32 $0, x;\n}"
    return gl.inline_asm_elementwise(asm, "=r,f,f", [low, high], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _exchange(x, y, odd):
    """Neighbouring lanes swap: an even lane gets (x, neighbour's x), an odd one (neighbour's y, y)."""
    return gl.inline_asm_elementwise(
        "{\n.reg .pred p;\n.reg .b32 s, r;\nsetp.ne.b32 p, $4, 0;\nselp.b32 s, $2, $3, p;\n"
        "shfl.sync.bfly.b32 r, s, 1, 31, -1;\nselp.b32 $0, r, $2, p;\nselp.b32 $1, $3, r, p;\n}",
        "=r,=r,r,r,r",
        [x, y, odd],
        dtype=(gl.int32, gl.int32),
        is_pure=False,
        pack=1,
    )


@gluon.jit
def gelu_tanh(x):
    """GELU, tanh approximation, as x * sigmoid(2u): one exponential and one division."""
    u = x * (0.7978845608028654 + 0.035677408136300125 * x * x)
    return x / (1.0 + gl.exp2(u * -2.8853900817779268))


@gluon.jit
def _gate_residual(x, y, row, lane, n8_tile, gate_ptr, residual_ptr, N, rows_per_gate, T: gl.constexpr):
    """residual + gate * (x, y); the pointers are at the block's first column. Addresses are a row's plus a constant."""
    gate0, gate1 = unpack_pair(gl.load(gate_ptr + (row // rows_per_gate * (N // 2) + lane % 4) + n8_tile * 4), T)
    x *= gate0
    y *= gate1
    row_ptr = residual_ptr + (row.to(gl.int64) * (N // 2) + lane % 4)
    residual0, residual1 = unpack_pair(gl.load(row_ptr + n8_tile * 4), T)
    return x + residual0, y + residual1


@gluon.jit
def _norm_rope(x, y, row, column, norm_ptr, rotary_ptr, plain,
               P: gl.constexpr, ROWS: gl.constexpr, Q: gl.constexpr):  # fmt: skip
    """RMSNorm over one head, which is the block's 128 columns, then rotation of the column pair (x, y).

    row [m16, 1, 32], column [1, n8, 32] of x inside the head · plain: do nothing (a head of v), without a branch, which
    would cost copies of all accumulators · ROWS: layout [m16, 8 rows] that belongs to P.
    """
    m16: gl.constexpr = x.shape[0]
    n8: gl.constexpr = x.shape[1]
    gl.static_assert(n8 * 8 == HEAD, "a block is one head wide")
    squares = gl.sum(gl.sum(gl.reshape(x * x + y * y, [m16, n8, 8, 4]), axis=3), axis=1)
    inverse = gl.rsqrt(gl.convert_layout(squares, ROWS) * (1.0 / HEAD) + EPS)  # [m16, 8]
    inverse = gl.reshape(gl.expand_dims(inverse, 2).broadcast_to([m16, 8, 4]), [m16, 32])
    inverse = gl.expand_dims(gl.convert_layout(inverse, gl.SliceLayout(1, P)), 1)
    x *= gl.where(plain, 1.0, inverse * gl.load(norm_ptr + column).to(gl.float32))
    y *= gl.where(plain, 1.0, inverse * gl.load(norm_ptr + column + 1).to(gl.float32))
    # Pair p of a head is columns 2p and 2p + 1: its sine and cosine are elements 2p and 2p + 1 of the row's 128.
    place = gl.expand_dims(gl.convert_layout(row * HEAD + column, gl.SliceLayout(3, Q), assert_trivial=True), 3)
    element = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, Q))))[None, None, None, :]
    sine, cosine = gl.split(gl.load(rotary_ptr + (place + element)))
    sine = gl.where(plain, 0.0, gl.convert_layout(sine, P, assert_trivial=True))
    cosine = gl.where(plain, 1.0, gl.convert_layout(cosine, P, assert_trivial=True))
    return x * cosine - y * sine, x * sine + y * cosine


@gluon.jit
def finish_rows(x, y, half, out_ptr, gate_ptr, residual_ptr, norm_q_ptr, norm_k_ptr, rotary_ptr, M, N, stride_out,
                rows_per_gate, tile_m, tile_n, EPILOGUE: gl.constexpr, T: gl.constexpr, OUT: gl.constexpr,
                P: gl.constexpr):  # fmt: skip
    """Epilogue and store of two registers, rows r + 8 * half: one half at a time keeps its loads in registers."""
    m16: gl.constexpr = x.shape[0]
    n8: gl.constexpr = x.shape[1]
    M16: gl.constexpr = P.size_per_thread[0]
    N8: gl.constexpr = P.size_per_thread[1]
    WARPS_M: gl.constexpr = P.warps_per_cta[0]
    WARPS_N: gl.constexpr = P.warps_per_cta[1]
    Q: gl.constexpr = gl.BlockedLayout([M16, N8, 1, 2], [1, 1, 32, 1], [WARPS_M, WARPS_N, 1, 1], [3, 2, 0, 1])
    Q16: gl.constexpr = gl.BlockedLayout([M16, N8 // 2, 1, 2], [1, 1, 32, 1], [WARPS_M, WARPS_N, 1, 1], [3, 2, 0, 1])
    R: gl.constexpr = gl.BlockedLayout([M16, 1, 1, 1], [1, 1, 8, 4], [WARPS_M, WARPS_N, 1, 1], [3, 2, 0, 1])
    ROWS: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(1, R))
    if EPILOGUE == GELU:
        x, y = gelu_tanh(x), gelu_tanh(y)
    elif EPILOGUE != NONE:
        lane = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, P)))[None, None, :]
        # Opaque to the compiler, as tile_m is (gemm_int4.py): what depends on it is not kept through the main loop.
        lane = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [lane], dtype=gl.int32, is_pure=False, pack=1)
        row = (tile_m + gl.arange(0, m16, gl.SliceLayout(1, gl.SliceLayout(2, P)))[:, None, None]) * 16 + lane // 4
        row = gl.minimum(row + 8 * half, M - 1)  # rows beyond M repeat the last one: they are not stored
        n8_tile = gl.arange(0, n8, gl.SliceLayout(0, gl.SliceLayout(2, P)))[None, :, None]
        if EPILOGUE == GATE_RESIDUAL:
            gate_ptr += tile_n * 8
            residual_ptr += tile_n * 8
            x, y = _gate_residual(x, y, row, lane, n8_tile, gate_ptr, residual_ptr, N, rows_per_gate, T)
        else:
            third = tile_n * 16 // (N // 3)
            norm_ptr = norm_q_ptr
            if third == 1:
                norm_ptr = norm_k_ptr
            x, y = _norm_rope(x, y, row, n8_tile * 8 + lane % 4 * 2, norm_ptr, rotary_ptr, third == 2, P, ROWS, Q)
    _store_rows(out_ptr, x, y, half, M, stride_out, tile_m, tile_n, OUT, Q if OUT == FP32 else Q16)


@gluon.jit
def _store_rows(out_ptr, x, y, half, M, stride_out, tile_m, tile_n, OUT: gl.constexpr, Q: gl.constexpr):
    """Store registers x, y [m16, n8, 32] (columns 2c, 2c + 1) of rows r + 8 * half; full 32-byte sectors per row.

    stride_out: elements of a row of out.
    """
    m16: gl.constexpr = x.shape[0]
    n8: gl.constexpr = x.shape[1]
    if OUT == FP32:
        words: gl.constexpr = n8
        z = gl.convert_layout(gl.join(x, y), Q, assert_trivial=True)  # [m16, n8, 32, 2]
    else:
        words: gl.constexpr = n8 // 2
        pair = gl.permute(gl.reshape(pack_pair(x, y, OUT, True), [m16, words, 2, 32]), [0, 1, 3, 2])
        even, odd = gl.split(gl.convert_layout(pair, Q, assert_trivial=True))  # n8 tiles [m16, n16, 32]
        even = gl.convert_layout(even, gl.SliceLayout(3, Q), assert_trivial=True)
        odd = gl.convert_layout(odd, gl.SliceLayout(3, Q), assert_trivial=True)
        lane3 = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, Q))))[None, None, :]
        even, odd = _exchange(even, odd, lane3 & 1)
        z = gl.convert_layout(gl.join(even, odd), Q, assert_trivial=True)  # [m16, n16, 32, 2] words
    lane = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, Q))))[None, None, :, None]
    tile = gl.arange(0, m16, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, Q))))[:, None, None, None]
    group = gl.arange(0, words, gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, Q))))[None, :, None, None]
    element = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, Q))))[None, None, None, :]
    row = (tile_m + tile) * 16 + lane // 4 + 8 * half
    if OUT == FP32:
        out_ptr += tile_n * 16
        row_ptr = out_ptr + row.to(gl.int64) * stride_out + lane % 4 * 2
    else:
        # Lanes 0 and 2 of four hold words 0-3 of 8, the even n8 tile; lanes 1 and 3 words 4-7, the odd one.
        out_ptr += tile_n * 8
        row_ptr = out_ptr + row.to(gl.int64) * (stride_out // 2) + (lane % 4 // 2 * 2 + lane % 2 * 4)
    gl.store(row_ptr + (group * 8 + element), z, mask=row < M)


@dataclass(frozen=True)
class After:
    """What a GEMM does to its result y [M, N] before it is rounded and written: one of these or none of them.

    gelu: GELU(y) · gate T [B, N], B divides M, and residual T [M, N]: residual + gate * y · norm_q, norm_k [128] and
    rotary float32 [M, 64, 2] (sine, cosine): RMSNorm and RoPE on heads of 128 in the first two thirds of the columns.
    """

    gelu: bool = False
    gate: Tensor | None = None
    residual: Tensor | None = None
    norm_q: Tensor | None = None
    norm_k: Tensor | None = None
    rotary: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """As the kernel takes them: pairs of 16-bit floats are int32 words."""
        gate, residual = (None if x is None else x.view(torch.int32) for x in (self.gate, self.residual))
        return gate, residual, self.norm_q, self.norm_k, self.rotary

    @property
    def name(self) -> str:
        """Which of this file's kinds it is."""
        if self.gelu:
            return "GELU"
        if self.gate is not None:
            return "GATE_RESIDUAL"
        return "NONE" if self.rotary is None else "NORM_ROPE"

    def check(self, m: int, n: int, dtype: torch.dtype) -> None:
        """Raise ValueError unless the parts fit each other and a result of M x N from operands of type T."""
        gated = (self.gate is not None, self.residual is not None)
        rotated = (self.norm_q is not None, self.norm_k is not None, self.rotary is not None)
        if len(set(gated)) > 1 or len(set(rotated)) > 1 or self.gelu + gated[0] + rotated[0] > 1:
            raise ValueError("after: expected gelu, or gate and residual, or norm_q, norm_k and rotary")
        if gated[0]:
            if m % self.gate.shape[0]:
                raise ValueError(f"gate has {self.gate.shape[0]} rows, expected a divisor of {m}")
            require("gate", self.gate, (self.gate.shape[0], n), dtype)
            require("residual", self.residual, (m, n), dtype)
        if rotated[0]:
            if n % 384:
                raise ValueError(f"N is {n}, expected three times a number of heads of 128")
            require("norm_q", self.norm_q, (128,), self.norm_q.dtype)
            require("norm_k", self.norm_k, (128,), self.norm_k.dtype)
            require("rotary", self.rotary, (m, 64, 2), torch.float32)


def require(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raise ValueError unless an operand has this shape and type and is contiguous."""
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, expected {dtype} {shape}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} is not contiguous, expected a contiguous tensor")
