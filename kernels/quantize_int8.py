"""One pass over an activation for the INT8 mode: (LayerNorm + modulation,) smooth, quantize per token, project down.

    x' = LayerNorm(x) * (1 + scale) + shift, or x
    codes, scales = quantize(x' / smooth_factor),  lora_act = T(x' @ proj_down^T)

Contract: ``reference.quantize_act_int8``. A token has one scale, so a thread block owns whole rows: 16 of them, the
rows of an MMA. It goes over them two or three times (statistics of the norm; largest value and low-rank branch; codes),
the later times from cache. Sums have a fixed order.

A tile is 16 rows by 512 columns, in words (pairs of 16-bit values): lane 4r + c of warp w has rows r and r + 8 and
eight columns from 256j + 32w + 8c, for j in 0, 1. Eight columns are one 16-byte load and the A operands of two MMAs:
the sum over k may run in any order if proj_down has the same, and its rows, in natural order, have eight columns
together too.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .act_codes import round_pair
from .epilogue import EPS, pack_pair, require, unpack_pair
from .gluon_compat import gl, gluon
from .int4 import RANK_MULTIPLE, SHIFT, PackedW4A4
from .int4_block import mma_16bit

WARPS = gl.constexpr(8)
WORDS = gl.constexpr(256)  # of a tile's row
RANKS = gl.constexpr(32)  # low-rank columns at a time
_MAGIC = gl.constexpr(12582912.0)  # 3 * 2^22: adding it rounds a small float32 to an integer, ties to even
_LARGEST = gl.constexpr(3.4028234663852886e38)

TILE = gl.constexpr(gl.BlockedLayout([1, 4], [8, 4], [1, 8], [1, 0]))  # words [16, 256]
CODES = gl.constexpr(gl.BlockedLayout([1, 2], [8, 4], [1, 8], [1, 0]))  # words of four codes [16, 128]
ACC = gl.constexpr(gl.BlockedLayout([1, 4, 1], [1, 1, 32], [8, 1, 1], [2, 1, 0]))  # [warps, n8 tiles, 32 lanes]
DOWN = gl.constexpr(gl.BlockedLayout([1, 4, 1, 4], [1, 1, 32, 1], [8, 1, 1, 1], [3, 2, 1, 0]))  # with 4 words


@gluon.jit
def _load_words(x_ptr, row, k, K, stride_xm):
    """Words [16, 256] of columns from k on, 0 beyond K. x_ptr: int32, stride_xm and K: elements."""
    word = gl.arange(0, WORDS, gl.SliceLayout(0, TILE))[None, :]
    place = row.to(gl.int64)[:, None] * (stride_xm // 2) + (k // 2 + word)
    inside = (word + k // 2 < K // 2) & gl.full_like(place, True, dtype=gl.int1)
    return gl.load(x_ptr + place, mask=inside, other=0)


@gluon.jit
def _load_vector(ptr, k, K, PACKED: gl.constexpr, T: gl.constexpr):
    """Columns from k on of a vector T [K] as two float32 [1, 256], 0 beyond K; PACKED: in file order (layout.py)."""
    word = gl.arange(0, WORDS, gl.SliceLayout(0, TILE))[None, :]
    place = word
    if PACKED:
        place = word // 8 * 8 + word % 4 * 2 + word // 4 % 2
    return unpack_pair(gl.load(ptr + (k // 2 + place), mask=word + k // 2 < K // 2, other=0), T)


@gluon.jit
def _modulated(words, mean, rstd, scale_ptr, shift_ptr, k, K, NORM: gl.constexpr, T: gl.constexpr):
    """Words of T(LayerNorm(x) * (1 + scale) + shift), or of x; 0 beyond K."""
    if NORM:
        x, y = unpack_pair(words, T)
        scale_x, scale_y = _load_vector(scale_ptr, k, K, False, T)
        shift_x, shift_y = _load_vector(shift_ptr, k, K, False, T)
        x = (x - mean[:, None]) * rstd[:, None] * (1.0 + scale_x) + shift_x
        y = (y - mean[:, None]) * rstd[:, None] * (1.0 + scale_y) + shift_y
        word = gl.arange(0, WORDS, gl.SliceLayout(0, TILE))[None, :]
        return gl.where(word + k // 2 < K // 2, pack_pair(x, y, T, False), 0)
    return words


@gluon.jit
def _smoothed(words, smooth_ptr, k, K, SHIFT_BY: gl.constexpr, T: gl.constexpr):
    """T(T(x + SHIFT) / smooth) as two float32; 0 beyond K."""
    x, y = unpack_pair(words, T)
    smooth_x, smooth_y = _load_vector(smooth_ptr, k, K, True, T)
    inverse_x = gl.where(smooth_x == 0.0, 0.0, 1.0 / smooth_x)
    inverse_y = gl.where(smooth_y == 0.0, 0.0, 1.0 / smooth_y)
    if SHIFT_BY != 0.0:
        x, y = round_pair(x + SHIFT_BY, y + SHIFT_BY, T)
    return round_pair(x * inverse_x, y * inverse_y, T)


@gluon.jit
def _fragments(words):
    """Words [16, 256] as A operands of 4 MMAs: four registers [warps, 32] for each (j, half of a lane's columns)."""
    L: gl.constexpr = gl.SliceLayout(1, ACC)
    # axes: half, r, j, w, c, m, s -> w, r, c, j, m, s, half
    x = gl.permute(gl.reshape(words, [2, 8, 2, 8, 4, 2, 2]), [3, 1, 4, 2, 5, 6, 0])
    top, bottom = gl.split(gl.reshape(x, [8, 32, 2, 2, 2, 2]))  # w, lane, j, m, s, half
    t0, t1 = gl.split(top)  # s
    b0, b1 = gl.split(bottom)
    return _four(t0, L), _four(b0, L), _four(t1, L), _four(b1, L)


@gluon.jit
def _four(x, L: gl.constexpr):
    """[8, 32, 2, 2] as four tensors [8, 1, 32] in the order of the last two axes."""
    x0, x1 = gl.split(x)
    x00, x10 = gl.split(x0)
    x01, x11 = gl.split(x1)
    return _one(x00, L), _one(x01, L), _one(x10, L), _one(x11, L)


@gluon.jit
def _one(x, L: gl.constexpr):
    return gl.expand_dims(gl.convert_layout(x, L, assert_trivial=True), 1)


@gluon.jit
def _project_down(words, down_ptr, k, K, r0, R, c0, c1, c2, c3, T: gl.constexpr):
    """c += x @ proj_down^T over a tile's columns, for RANKS low-rank columns from r0; down: int32 words of T [R, K]."""
    a0, a1, a2, a3 = _fragments(words)
    warp = gl.arange(0, 8, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, DOWN))))[:, None, None, None]
    n8 = gl.arange(0, RANKS // 8, gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, DOWN))))[None, :, None, None]
    lane = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, DOWN))))[None, None, :, None]
    word = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, DOWN))))[None, None, None, :]
    rank = r0 + n8 * 8 + lane // 4
    column = k // 2 + warp * 16 + lane % 4 * 4 + word
    for j in gl.static_range(2):
        at = column + j * 128
        down = gl.load(down_ptr + (rank * (K // 2) + at), mask=(rank < R) & (at < K // 2), other=0)
        x = gl.reshape(down, [8, RANKS // 8, 32, 2, 2])
        s0, s1 = gl.split(x)
        b00, b10 = gl.split(s0)
        b01, b11 = gl.split(s1)
        b00 = gl.convert_layout(b00, ACC, assert_trivial=True)
        b01 = gl.convert_layout(b01, ACC, assert_trivial=True)
        b10 = gl.convert_layout(b10, ACC, assert_trivial=True)
        b11 = gl.convert_layout(b11, ACC, assert_trivial=True)
        c0, c1, c2, c3 = mma_16bit(
            a0[2 * j], a1[2 * j], a2[2 * j], a3[2 * j], b00, b01, c0, c1, c2, c3, T
        )  # fmt: skip
        c0, c1, c2, c3 = mma_16bit(
            a0[2 * j + 1], a1[2 * j + 1], a2[2 * j + 1], a3[2 * j + 1], b10, b11, c0, c1, c2, c3, T
        )
    return c0, c1, c2, c3


@gluon.jit
def _store_low_rank(lora_act_ptr, c0, c1, c2, c3, pid, r0, M, R, T: gl.constexpr):
    """T of the warps' sums to lora_act T [M, R], int32 words."""
    L: gl.constexpr = gl.SliceLayout(0, ACC)  # [n8, 32]
    n8 = gl.arange(0, RANKS // 8, gl.SliceLayout(1, L))[:, None]
    lane = gl.arange(0, 32, gl.SliceLayout(0, L))[None, :]
    row = pid * 16 + lane // 4
    rank = r0 + n8 * 8 + lane % 4 * 2
    out = lora_act_ptr + row.to(gl.int64) * (R // 2) + rank // 2
    low = pack_pair(gl.sum(c0, axis=0), gl.sum(c1, axis=0), T, False)
    high = pack_pair(gl.sum(c2, axis=0), gl.sum(c3, axis=0), T, False)
    gl.store(out, low, mask=(row < M) & (rank < R))
    gl.store(out + 8 * (R // 2), high, mask=(row + 8 < M) & (rank < R))


@gluon.jit
def _pack_codes(x, y, SIGNED: gl.constexpr):
    """float32 codes + magic [16, 256] (even and odd columns) as words of four int8 [16, 128]."""
    x0, x1 = gl.split(gl.reshape(x.to(gl.int32, bitcast=True), [16, WORDS // 2, 2]))
    y0, y1 = gl.split(gl.reshape(y.to(gl.int32, bitcast=True), [16, WORDS // 2, 2]))
    flip: gl.constexpr = "" if SIGNED else "xor.b32 $0, $0, 0x80808080;\n"
    word = gl.inline_asm_elementwise(
        "{\n.reg .b32 a, b;\nprmt.b32 a, $1, $2, 0x0040;\nprmt.b32 b, $3, $4, 0x0040;\n"
        "prmt.b32 $0, a, b, 0x5410;\n" + flip + "}",
        "=r,r,r,r,r",
        [x0, y0, x1, y1],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )
    return gl.convert_layout(word, CODES, assert_trivial=True)


@gluon.jit(do_not_specialize=["M", "rows_per_modulation"])
def quantize_int8_kernel(
    x_ptr, smooth_ptr, proj_down_ptr, modulation_ptr, shift_ptr, codes_ptr, scales_ptr, lora_act_ptr,
    M, K, R, stride_xm, rows_per_modulation, stride_modulation,
    NORM: gl.constexpr, SHIFT_BY: gl.constexpr, T: gl.constexpr,
):  # fmt: skip
    """16 rows. All pointers but scales_ptr (float32) are to int32 words; strides count elements. With NORM,
    rows_per_modulation is a multiple of 16, or M."""
    pid = gl.program_id(0)
    row = pid * 16 + gl.arange(0, 16, gl.SliceLayout(1, TILE))
    inside = row < M
    row = gl.minimum(row, M - 1)
    mean = gl.zeros([16], gl.float32, gl.SliceLayout(1, TILE))
    rstd = mean
    if NORM:
        start = pid * 16 // rows_per_modulation * (stride_modulation // 2)
        modulation_ptr += start
        shift_ptr += start
        sums = gl.zeros([16, WORDS], gl.float32, TILE)
        squares = sums
        following = _load_words(x_ptr, row, 0, K, stride_xm)
        for k in range(0, K, 2 * WORDS):
            x, y = unpack_pair(following, T)
            following = _load_words(x_ptr, row, k + 2 * WORDS, K, stride_xm)
            sums += x + y
            squares += x * x + y * y
        mean = gl.sum(sums, axis=1) / K
        rstd = gl.rsqrt(gl.maximum(gl.sum(squares, axis=1) / K - mean * mean, 0.0) + EPS)

    largest = gl.zeros([16, WORDS], gl.float32, TILE)
    zero = gl.zeros([8, RANKS // 8, 32], gl.float32, ACC)
    c0, c1, c2, c3 = zero, zero, zero, zero
    following = _load_words(x_ptr, row, 0, K, stride_xm)
    for k in range(0, K, 2 * WORDS):
        words = following
        if not NORM:  # which has no registers left
            following = _load_words(x_ptr, row, k + 2 * WORDS, K, stride_xm)  # under way while these are computed
        words = _modulated(words, mean, rstd, modulation_ptr, shift_ptr, k, K, NORM, T)
        c0, c1, c2, c3 = _project_down(words, proj_down_ptr, k, K, 0, R, c0, c1, c2, c3, T)
        x, y = _smoothed(words, smooth_ptr, k, K, SHIFT_BY, T)
        largest = gl.maximum(largest, gl.maximum(gl.abs(x), gl.abs(y)))
        if NORM:
            following = _load_words(x_ptr, row, k + 2 * WORDS, K, stride_xm)
    _store_low_rank(lora_act_ptr, c0, c1, c2, c3, pid, 0, M, R, T)
    top: gl.constexpr = 127.0 if SHIFT_BY == 0.0 else 255.0
    scale = gl.max(largest, axis=1) * (1.0 / top)
    gl.store(scales_ptr + row, scale, mask=inside)
    inverse = gl.minimum(1.0 / scale, _LARGEST)  # finite, so that a token of zeros gives zeros

    word = gl.arange(0, WORDS // 2, gl.SliceLayout(0, CODES))[None, :]
    out_row = pid * 16 + gl.arange(0, 16, gl.SliceLayout(1, CODES))
    out = codes_ptr + out_row.to(gl.int64)[:, None] * (K // 4) + word
    following = _load_words(x_ptr, row, 0, K, stride_xm)
    for k in range(0, K, 2 * WORDS):
        words = following
        following = _load_words(x_ptr, row, k + 2 * WORDS, K, stride_xm)
        words = _modulated(words, mean, rstd, modulation_ptr, shift_ptr, k, K, NORM, T)
        x, y = _smoothed(words, smooth_ptr, k, K, SHIFT_BY, T)
        codes = _pack_codes(x * inverse[:, None] + _MAGIC, y * inverse[:, None] + _MAGIC, SHIFT_BY == 0.0)
        gl.store(out + k // 4, codes, mask=(out_row < M)[:, None] & (word + k // 4 < K // 4))

    for r0 in range(RANKS, R, RANKS):  # more low-rank columns than fit beside each other
        c0, c1, c2, c3 = zero, zero, zero, zero
        for k in range(0, K, 2 * WORDS):
            words = _load_words(x_ptr, row, k, K, stride_xm)
            words = _modulated(words, mean, rstd, modulation_ptr, shift_ptr, k, K, NORM, T)
            c0, c1, c2, c3 = _project_down(words, proj_down_ptr, k, K, r0, R, c0, c1, c2, c3, T)
        _store_low_rank(lora_act_ptr, c0, c1, c2, c3, pid, r0, M, R, T)


def quantize_act_int8(
    x: Tensor,
    weight: PackedW4A4,
    proj_down: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`kernels.reference.quantize_act_int8`, for the input of the layer ``weight``.

    x: T [M, K], bf16 or fp16, rows contiguous · weight: gives smooth_factor (file order) and act_unsigned · proj_down:
    T [R, K] in natural order · scale, shift: T [B, K], B divides M: LayerNorm and modulation in front, or None. Returns
    codes int8 [M, K], scales float32 [M] and lora_act T [M, R]. Same bits on every run.
    """
    m, k = x.shape
    rank = proj_down.shape[0]
    if k != weight.k or x.stride(1) != 1 or x.stride(0) % 8:
        raise ValueError(f"x is {list(x.shape)}, strides {x.stride()}; expected [M, {weight.k}] with contiguous rows")
    if x.dtype not in (torch.bfloat16, torch.float16) or weight.smooth_factor.dtype != x.dtype:
        raise ValueError(f"x is {x.dtype} and smooth_factor {weight.smooth_factor.dtype}, expected bf16 or fp16 twice")
    if rank % RANK_MULTIPLE:
        raise ValueError(f"rank is {rank}, expected a multiple of {RANK_MULTIPLE}")
    require("proj_down", proj_down, (rank, k), x.dtype)
    codes = torch.empty(m, k, dtype=torch.int8, device=x.device)
    scales = torch.empty(m, dtype=torch.float32, device=x.device)
    lora_act = torch.empty(m, rank, dtype=x.dtype, device=x.device)
    if m == 0:
        return codes, scales, lora_act
    rows = m
    if scale is not None:
        for name, tensor in (("scale", scale), ("shift", shift)):
            if tensor.ndim != 2 or tensor.shape[1] != k or m % tensor.shape[0] or tensor.stride(1) != 1:
                raise ValueError(f"{name} is {list(tensor.shape)}, expected [B, {k}], B a divisor of {m}")
        rows = m // scale.shape[0]
        if scale.shape[0] > 1 and rows % 16:  # a block of rows would need two modulations
            parts = [
                quantize_act_int8(x[i * rows : (i + 1) * rows], weight, proj_down, scale[i : i + 1], shift[i : i + 1])
                for i in range(scale.shape[0])
            ]
            return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))
    words = codes.view(torch.int32)
    # Triton launches on the current device, whatever the tensors are on.
    with torch.cuda.device_of(x):
        quantize_int8_kernel[(triton.cdiv(m, 16),)](
            x.view(torch.int32),
            weight.smooth_factor.view(torch.int32),
            proj_down.view(torch.int32) if rank else words,
            words if scale is None else scale.view(torch.int32),
            words if shift is None else shift.view(torch.int32),
            words,
            scales,
            lora_act.view(torch.int32) if rank else words,
            m,
            k,
            rank,
            x.stride(0),
            rows,
            0 if scale is None else scale.stride(0),
            NORM=scale is not None,
            SHIFT_BY=SHIFT if weight.act_unsigned else 0.0,
            T=0 if x.dtype == torch.bfloat16 else 1,
            num_warps=8,
            maxnreg=128,  # two blocks per multiprocessor
        )
    return codes, scales, lora_act
