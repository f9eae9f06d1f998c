"""fc1 to fc2 without 16-bit activations in memory: INT4 GEMM, GELU, and all that the next layer needs of the result.

    y = gemm_w4a4(...),  x = T(GELU(y)),  codes, ascales, lora_act = quantize_act(x, next layer)     (contract: int4.py)

The main loop is that of ``int4_block.py``. Its accumulators, rounded to pairs of 16 bits, already are A operands of the
16-bit MMA that projects them down for the next layer, and the four lanes of a row hold whole scale groups of it.

lora_act sums over all of the next layer's channels, of which a block of outputs has 128: a thread block takes several
of them one after the other and adds up its own part in global memory, and a second, small kernel adds those of all
thread blocks. The order is fixed; there are no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import act_layout
from .act_codes import quantize_group, round_pair, store_rows
from .device import FMA, describe
from .epilogue import gelu_tanh, pack_pair, require, unpack_pair
from .gemm_int4 import TYPES, check_operand, pointers
from .gluon_compat import barrier, gl, gluon
from .int4 import GROUP, RANK_MULTIPLE, SHIFT, PackedW4A4
from .int4_block import block_place, mma_16bit, multiply_block, opaque, shared_buffers
from .tiles import Tile, choose_tile

_SHIFT = gl.constexpr(SHIFT)


@gluon.jit
def _smoothed(pair, inverse_x, inverse_y, T: gl.constexpr):
    """T(T(x + SHIFT) / smooth) of a pair of 16-bit floats, as two float32."""
    x, y = unpack_pair(pair, T)
    x, y = round_pair(x + _SHIFT, y + _SHIFT, T)
    return round_pair(x * inverse_x, y * inverse_y, T)


@gluon.jit
def _k16_tiles(pair, P4: gl.constexpr):
    """Pairs [m16, warps * 8 n8 tiles, 32] as the low and the high k8 registers of a warp's four k16 tiles."""
    m16: gl.constexpr = pair.shape[0]
    warps: gl.constexpr = pair.shape[1] // 8
    L: gl.constexpr = gl.SliceLayout(2, P4)
    x = gl.permute(gl.reshape(pair, [m16, warps, 2, 2, 2, 32]), [0, 1, 5, 2, 3, 4])
    low, high = gl.split(x)
    low02, low13 = gl.split(low)
    low0, low2 = gl.split(low02)
    low1, low3 = gl.split(low13)
    high02, high13 = gl.split(high)
    high0, high2 = gl.split(high02)
    high1, high3 = gl.split(high13)
    low = (_expand(low0, L), _expand(low1, L), _expand(low2, L), _expand(low3, L))
    return low, (_expand(high0, L), _expand(high1, L), _expand(high2, L), _expand(high3, L))


@gluon.jit
def _expand(x, L: gl.constexpr):
    return gl.expand_dims(gl.convert_layout(x, L, assert_trivial=True), 2)


@gluon.jit
def _project_down(pair0, pair1, proj_down_ptr, partial_ptr, again, M, R, tile_m, tile_n,
                  T: gl.constexpr, P: gl.constexpr):  # fmt: skip
    """partial [M, R] (+)= x @ proj_down^T over the block's channels, x the pairs of rows r and r + 8."""
    m16: gl.constexpr = pair0.shape[0]
    M16: gl.constexpr = P.size_per_thread[0]
    WM: gl.constexpr = P.warps_per_cta[0]
    WN: gl.constexpr = P.warps_per_cta[1]
    P4: gl.constexpr = gl.BlockedLayout([M16, 1, 2, 1], [1, 1, 1, 32], [WM, WN, 1, 1], [3, 2, 0, 1])
    LB: gl.constexpr = gl.SliceLayout(0, gl.BlockedLayout([1, 1, 1, 4], [1, 1, 32, 1], [WM, WN, 1, 1], [3, 2, 0, 1]))
    OUT: gl.constexpr = gl.BlockedLayout([M16, 1, 2, 1, 2], [1, 1, 1, 32, 1], [WM, WN, 1, 1, 1], [4, 3, 2, 0, 1])
    L: gl.constexpr = gl.SliceLayout(1, OUT)  # [m16, 2, 32, 2]
    low0, high0 = _k16_tiles(pair0, P4)
    low1, high1 = _k16_tiles(pair1, P4)
    warp = gl.arange(0, WN, gl.SliceLayout(1, gl.SliceLayout(2, LB)))[:, None, None]
    lane = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(2, LB)))[None, :, None]
    word = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, LB)))[None, None, :]
    down = (tile_n + warp * 4) * (R * 8) + lane * 4 + word  # [warps, 32, 4] pairs of the warp's first k16 tile
    row = tile_m + gl.arange(0, m16, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, L))))[:, None, None, None]
    n8 = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, L))))[None, :, None, None]
    lane = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, L))))[None, None, :, None]
    odd = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, L))))[None, None, None, :]
    row = row * 16 + lane // 4
    out = row.to(gl.int64) * R + (n8 * 8 + lane % 4 * 2 + odd)
    for _ in range(0, R, 16):
        zero = gl.zeros([m16, WN, 2, 32], gl.float32, P4)
        c0, c1, c2, c3 = zero, zero, zero, zero
        for j in gl.static_range(4):
            b0, b1 = _fragments_down(gl.load(proj_down_ptr + down + j * (R * 8)), P4)
            c0, c1, c2, c3 = mma_16bit(low0[j], low1[j], high0[j], high1[j], b0, b1, c0, c1, c2, c3, T)
        top = gl.convert_layout(gl.join(gl.sum(c0, axis=1), gl.sum(c1, axis=1)), L, assert_trivial=True)
        bottom = gl.convert_layout(gl.join(gl.sum(c2, axis=1), gl.sum(c3, axis=1)), L, assert_trivial=True)
        top += gl.load(partial_ptr + out, mask=(row < M) & again, other=0.0)
        bottom += gl.load(partial_ptr + 8 * R + out, mask=(row + 8 < M) & again, other=0.0)
        gl.store(partial_ptr + out, top, mask=row < M)
        gl.store(partial_ptr + 8 * R + out, bottom, mask=row + 8 < M)
        proj_down_ptr += 128
        partial_ptr += 16


@gluon.jit
def _fragments_down(x, P4: gl.constexpr):
    """Words [warps, 32, 4] of a k16 x r16 tile as the two registers [1, warps, 2, 32] of two B operands."""
    L: gl.constexpr = gl.SliceLayout(0, P4)
    x0, x1 = gl.split(gl.reshape(x, [x.shape[0], 32, 2, 2]))
    x0 = gl.convert_layout(gl.permute(x0, [0, 2, 1]), L, assert_trivial=True)
    x1 = gl.convert_layout(gl.permute(x1, [0, 2, 1]), L, assert_trivial=True)
    return gl.expand_dims(x0, 0), gl.expand_dims(x1, 0)


@gluon.jit(do_not_specialize=["M", "row_blocks", "bias_size", "rounds"])
def gemm_gelu_quantize_kernel(
    act_ptr, ascales_ptr, qweight_ptr, wscales_ptr, lora_act_ptr, proj_up_ptr, bias_ptr,
    smooth_ptr, proj_down_ptr, codes_ptr, next_ascales_ptr, partial_ptr,
    M, N, K, R, NEXT_R, row_blocks, bias_size, rounds,
    ACT_UNSIGNED: gl.constexpr, T: gl.constexpr,
    M16: gl.constexpr, N8: gl.constexpr, WARPS_M: gl.constexpr, WARPS_N: gl.constexpr, STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
):  # fmt: skip
    """``rounds`` blocks of outputs side by side. All pointers are to int32 words (pairs of 16-bit floats), but
    lora_act_ptr and partial_ptr [thread blocks per row, M, NEXT_R] to float32 and bias_ptr."""
    gl.static_assert(N8 == 8, "a warp is one group wide")
    m16: gl.constexpr = M16 * WARPS_M
    n16: gl.constexpr = N8 * WARPS_N // 2
    P: gl.constexpr = gl.BlockedLayout([M16, N8, 1], [1, 1, 32], [WARPS_M, WARPS_N, 1], [2, 0, 1])
    pid_m, chunk = block_place(gl.program_id(0), N // (n16 * 16) // rounds, row_blocks, m16, GROUP_M)
    operand = (act_ptr, ascales_ptr, qweight_ptr, wscales_ptr, lora_act_ptr, proj_up_ptr, K, R)
    buffers = shared_buffers(m16, n16, STAGES)
    partial_ptr += chunk.to(gl.int64) * M * NEXT_R
    for i in range(rounds):
        pid_n = chunk * rounds + i
        barrier()  # all warps have read the buffers of the round before
        c0, c1, c2, c3 = multiply_block(operand, operand, bias_ptr, bias_size, M, N, row_blocks, pid_m, pid_n, buffers,
                                        ACT_UNSIGNED, False, 1, T, P, STAGES)  # fmt: skip
        tile_m, tile_n = opaque(pid_m * m16), opaque(pid_n * n16)
        pair0 = pack_pair(gelu_tanh(c0), gelu_tanh(c1), T, True)
        pair1 = pack_pair(gelu_tanh(c2), gelu_tanh(c3), T, True)
        # Word of a channel pair in a packed vector: k / 16 * 8 + k % 8 / 2 * 2 + k / 8 % 2.
        tile = gl.arange(0, n16 * 2, gl.SliceLayout(0, gl.SliceLayout(2, P)))[None, :, None]
        lane = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, P)))[None, None, :]
        smooth = gl.load(smooth_ptr + tile_n * 8 + (tile // 2 * 8 + lane % 4 * 2 + tile % 2))
        smooth_x, smooth_y = unpack_pair(smooth, T)
        smooth_x, smooth_y = 1.0 / smooth_x, 1.0 / smooth_y
        x, y = _smoothed(pair0, smooth_x, smooth_y, T)
        low = quantize_group(x, y, True, P)
        x, y = _smoothed(pair1, smooth_x, smooth_y, T)
        high = quantize_group(x, y, True, P)
        store_rows(codes_ptr, next_ascales_ptr, low, high, tile_m, tile_n // 4, N // 64, row_blocks, T, P)
        _project_down(pair0, pair1, proj_down_ptr, partial_ptr, i > 0, M, NEXT_R, tile_m, tile_n, T, P)


@triton.jit
def _sum_parts_kernel(parts_ptr, sum_ptr, count, SIZE, BLOCK: tl.constexpr):
    """sum[i] = parts[0, i] + parts[1, i] + ..., in that order."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < SIZE
    total = tl.load(parts_ptr + offs, mask=mask)
    for _ in range(1, count):
        parts_ptr += SIZE
        total += tl.load(parts_ptr + offs, mask=mask)
    tl.store(sum_ptr + offs, total, mask=mask)


def gemm_gelu_quantize(
    codes: Tensor,
    ascales: Tensor,
    lora_act: Tensor,
    weight: PackedW4A4,
    following: PackedW4A4,
    bias: Tensor | None = None,
    tile: Tile | None = None,
    rounds: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A layer, GELU, and the quantized input of the next layer.

    codes, ascales, lora_act, weight, bias: as for :func:`kernels.gemm_int4.gemm_w4a4` · following: the next layer, with
    ``act_unsigned``: gives smooth_factor and proj_down; its K is weight's N · tile, rounds (blocks of columns that a
    thread block takes): for tests and benchmarks. Returns what :func:`kernels.quantize.quantize_act` returns for the
    GELU's output, rounded to T. Same bits on every run. Raises ValueError where operands do not fit each other.
    """
    m, n, dtype, rank = lora_act.shape[0], weight.n, ascales.dtype, following.rank
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"ascales is {dtype}, expected torch.bfloat16 or torch.float16")
    check_operand(codes, ascales, lora_act, weight, m, n, dtype)
    if bias is not None:
        require("bias", bias, (n,), bias.dtype)
    if not following.act_unsigned or following.k != n or rank % RANK_MULTIPLE:
        found = f"K {following.k}, R {rank}, act_unsigned {following.act_unsigned}"
        raise ValueError(f"the next layer has {found}; expected {n}, a multiple of {RANK_MULTIPLE}, True")
    require("smooth_factor", following.smooth_factor, (n,), dtype)
    require("proj_down", following.proj_down, (n, rank), dtype)
    blocks, groups = act_layout.blocks_of(m), n // GROUP
    next_codes = torch.empty(blocks, groups, act_layout.WORDS, dtype=torch.int32, device=codes.device)
    next_ascales = torch.empty(blocks, groups, act_layout.BLOCK_M, dtype=dtype, device=codes.device)
    next_lora_act = torch.empty(m, rank, dtype=torch.float32, device=codes.device)
    if m == 0:
        return next_codes, next_ascales, next_lora_act
    tile = tile or choose_tile(m, n, describe(codes.device).architecture, epilogue="GELU_QUANTIZE")
    rounds = rounds or choose_rounds(n // tile.block_n)
    chunks = n // tile.block_n // rounds
    parts = next_lora_act.new_empty(chunks, m, rank) if chunks > 1 else next_lora_act
    words = next_ascales.view(torch.int32)
    with torch.cuda.device_of(codes):
        gemm_gelu_quantize_kernel[(-(-blocks * act_layout.BLOCK_M // tile.block_m) * chunks,)](
            *pointers(codes, ascales, lora_act, weight),
            words if bias is None else bias,
            following.smooth_factor.view(torch.int32),
            following.proj_down.view(torch.int32) if rank else words,
            next_codes,
            words,
            parts if rank else words.view(torch.float32),
            m,
            n,
            weight.k,
            weight.rank,
            rank,
            blocks,
            0 if bias is None else n,
            rounds,
            ACT_UNSIGNED=weight.act_unsigned,
            T=TYPES[dtype],
            **tile.constants,
            num_warps=tile.warps,
            **FMA,
        )
        if chunks > 1 and rank:
            block = 1024
            _sum_parts_kernel[(triton.cdiv(m * rank, block),)](parts, next_lora_act, chunks, m * rank, BLOCK=block)
    return next_codes, next_ascales, next_lora_act


def choose_rounds(blocks_n: int, most: int = 4) -> int:
    """Blocks of columns that one thread block takes: more leave fewer partial sums, but fill a GPU less well."""
    return max(rounds for rounds in range(1, most + 1) if blocks_n % rounds == 0)
