"""One pass over an activation: smooth, quantize to INT4 per token and group of 64, and project down (low-rank branch).

    codes, ascales = quantize(x / smooth_factor),  lora_act = x @ proj_down^T        (contract: int4.py)

Memory-bound: x is read once, everything else is an eighth of it. What is done to stay so: few instructions per element
(``quantize_block.py``; counted by benchmarks/sass.py), two groups under way in each warp while one is computed, the
layer's factors copied to shared memory while the ones before are used, and blocks of rows by pieces of K that make one
wave of thread blocks. The block that is last to finish a row block adds up the low-rank sums of its pieces, in a fixed
order: same bits on every run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import act_layout
from .act_codes import quantize_words, store_rows
from .arrivals import arrivals
from .device import FMA, describe, multiprocessors
from .epilogue import require
from .gemm_int4 import TYPES
from .gluon_compat import async_copy, barrier, gl, gluon
from .int4 import GROUP, MAX_RANK, RANK_MULTIPLE, PackedW4A4
from .quantize_block import (
    copy_down,
    index_along,
    load_factors,
    load_group,
    project_and_smooth,
    store_factors,
    sum_layout,
    tile_layout,
    word_layout,
)

MAX_ROW_BLOCKS = 4096  # of those whose pieces are added up
NORM_EPS = 1e-6


@dataclass(frozen=True)
class Modulation:
    """x becomes T(LayerNorm(x) * (1 + scale) + shift) first: no affine part, eps 1e-6, in float32, rounded once.

    scale, shift: T [B, K], for batches of M / B rows.
    """

    scale: Tensor
    shift: Tensor


@dataclass(frozen=True)
class Cut:
    """How the work is cut: a block has warps_m m16 tiles of rows by warps_k groups of 64 columns side by side and takes
    one of ``pieces`` pieces of K · staged: groups whose factors are copied to shared memory at a time, an even multiple
    of warps_k. All but pieces are powers of two; warps_k divides K / 64."""

    warps_m: int
    warps_k: int
    pieces: int
    staged: int = 8

    def buffers(self, ranks: int) -> int:
        """2 if proj_down of two times ``staged`` groups fits into 64 KB: then it is copied ahead of its use."""
        return 2 if self.staged * ranks <= 16 else 1


@gluon.jit
def _finish(sums, lora_act_ptr, pieces_ptr, arrived_ptr, M, R, tile_m, piece, C: gl.constexpr,
            PIECES: gl.constexpr):  # fmt: skip
    """Write the block's low-rank sums, or those of all pieces if it is the last of them."""
    WM: gl.constexpr = C.warps_per_cta[0]
    RT: gl.constexpr = C.size_per_thread[2]
    L: gl.constexpr = gl.SliceLayout(
        1, gl.BlockedLayout([1, 1, RT, 1, 8], [1, 1, 1, 32, 1], [WM, C.warps_per_cta[1], 1, 1, 1], [4, 3, 2, 0, 1])
    )
    low, high = sums
    even = gl.join(gl.join(_add(low[0]), _add(high[0])), gl.join(_add(low[2]), _add(high[2])))
    odd = gl.join(gl.join(_add(low[1]), _add(high[1])), gl.join(_add(low[3]), _add(high[3])))
    total = gl.convert_layout(gl.reshape(gl.join(even, odd), [WM, RT, 32, 8]), L, assert_trivial=True)
    # eight sums of a lane: row half, rank half, odd row
    tile, r16 = tile_m + index_along(L, 4, 0, WM), index_along(L, 4, 1, RT)
    lane, i = index_along(L, 4, 2, 32), index_along(L, 4, 3, 8)
    row = tile * 16 + lane % 4 * 2 + (i // 4 * 8 + i % 2)
    out_ptr = lora_act_ptr + row.to(gl.int64) * R + (r16 * 16 + lane // 4 + i // 2 % 2 * 8)
    inside = (row < M) & (r16 * 16 < R)
    if PIECES == 1:
        gl.store(out_ptr, total, mask=inside)
    else:
        arrived_ptr += tile_m // WM
        pieces_ptr += ((tile.to(gl.int64) * RT + r16) * 32 + lane) * 8 + i
        size = gl.num_programs(0).to(gl.int64) * (WM * RT * 256)
        gl.store(pieces_ptr + piece * size, total)
        barrier()
        count = gl.num_programs(1)
        if gl.atomic_add(arrived_ptr, 1, sem="acq_rel") == count - 1:
            total = gl.load(pieces_ptr, cache_modifier=".cg")
            for other in gl.static_range(1, PIECES):
                total += gl.load(pieces_ptr + other * size, mask=other < count, other=0.0, cache_modifier=".cg")
            gl.store(out_ptr, total, mask=inside)
            gl.store(arrived_ptr, 0)


@gluon.jit
def _add(x):
    """Sum over the warps that share rows."""
    return gl.sum(x, axis=1)


@gluon.jit(do_not_specialize=["M", "row_blocks", "groups_per_piece", "rows_per_batch"])
def quantize_kernel(
    x_ptr, smooth_ptr, proj_down_ptr, codes_ptr, ascales_ptr, lora_act_ptr, pieces_ptr, arrived_ptr,
    statistics_ptr, scale_ptr, shift_ptr,
    M, K, R, stride_x, row_blocks, groups_per_piece, rows_per_batch,
    UNSIGNED: gl.constexpr, T: gl.constexpr, XORSIGN: gl.constexpr, RT: gl.constexpr, NORM: gl.constexpr,
    WM: gl.constexpr, WK: gl.constexpr, SLAB: gl.constexpr, BUFFERS: gl.constexpr, PIECES: gl.constexpr,
):  # fmt: skip
    """WM m16 tiles of rows, one piece of K; WK groups at a time, of SLAB times as many staged.

    Pairs of 16-bit floats are int32 words, which stride_x counts · pieces_ptr: float32 [pieces, m16 tiles, RT, 32, 8] ·
    statistics_ptr: float32 [M, 2] · RT: r16 tiles, a power of two, or 0 · NORM: 0, 1, or 2 if 16 rows may be of two
    batches · BUFFERS: of proj_down, 1 or 2 · PIECES: at most so many, a power of two.
    """
    P: gl.constexpr = tile_layout(WM, WK)
    V: gl.constexpr = word_layout(WM, WK)
    C: gl.constexpr = sum_layout(WM, WK, RT)
    tile_m = gl.program_id(0) * WM
    piece = gl.program_id(1)
    first = piece * groups_per_piece
    last = gl.minimum(first + groups_per_piece, K // 64)
    steps = (last - first) // WK

    lane = index_along(V, 4, 2, 32)
    column = (first + index_along(V, 4, 1, WK)) * 32 + lane % 4 * 4 + index_along(V, 4, 3, 4)
    row = (tile_m + index_along(V, 4, 0, WM)) * 16 + lane // 4
    row0, row8 = gl.minimum(row, M - 1), gl.minimum(row + 8, M - 1)  # rows beyond M repeat the last one
    offsets = (row0.to(gl.int64) * stride_x + column, row8.to(gl.int64) * stride_x + column)
    a = load_group(x_ptr, offsets, 0, WK)
    b = load_group(x_ptr, offsets, gl.minimum(1, steps - 1), WK)
    norm = (row0, row8)
    if NORM > 0:
        of_low = gl.load(statistics_ptr + row0 * 2), gl.load(statistics_ptr + row0 * 2 + 1)
        of_high = gl.load(statistics_ptr + row8 * 2), gl.load(statistics_ptr + row8 * 2 + 1)
        of_batch = (row0 // rows_per_batch * (K // 2) + column, row8 // rows_per_batch * (K // 2) + column)
        norm = (scale_ptr, shift_ptr, of_batch, of_low, of_high)

    s_factors = gl.allocate_shared_memory(gl.int32, [SLAB * 4, WK, 4, 4], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))
    shared = (s_factors, s_factors)
    factors = load_factors(smooth_ptr, first, last, SLAB, WM, WK)
    if RT > 0:
        s_down = gl.allocate_shared_memory(
            gl.int32, [BUFFERS * SLAB * 4, WK, RT, 32, 4], gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0])
        )
        shared = (s_factors, s_down)
        if BUFFERS == 2:
            copy_down(proj_down_ptr, s_down, 0, first, last, R, SLAB, BUFFERS, WM, WK, RT)
    RANK_TILES: gl.constexpr = RT if RT > 0 else 1
    zero = gl.zeros([WM, WK, RANK_TILES, 32], gl.float32, C)
    sums = ((zero, zero, zero, zero), (zero, zero, zero, zero))
    for start in range(0, steps, SLAB):
        group = first + start * WK
        buffer = start // SLAB % BUFFERS
        if RT > 0 and BUFFERS == 2:
            async_copy.wait_group(0)
        barrier()
        store_factors(factors, s_factors, T, SLAB, WK)
        factors = load_factors(smooth_ptr, group + SLAB * WK, last, SLAB, WM, WK)
        if RT > 0 and BUFFERS == 1:
            copy_down(proj_down_ptr, s_down, 0, group, last, R, SLAB, BUFFERS, WM, WK, RT)
            async_copy.wait_group(0)
        elif RT > 0 and start + SLAB < steps:
            copy_down(proj_down_ptr, s_down, 1 - buffer, group + SLAB * WK, last, R, SLAB, BUFFERS, WM, WK, RT)
        barrier()
        stop = gl.minimum(start + SLAB, steps)
        # Two groups are under way while one is computed, in two sets of registers.
        for step in range(start, stop, 2):
            slots = step - start, buffer * SLAB + step - start
            v, sums = project_and_smooth(a, step, slots, norm, shared, sums, UNSIGNED, T, NORM, WM, WK, RT)
            a = load_group(x_ptr, offsets, gl.minimum(step + 2, steps - 1), WK)
            group = first + step * WK
            codes = quantize_words(v, UNSIGNED, T, XORSIGN)
            store_rows(codes_ptr, ascales_ptr, codes[0], codes[1], tile_m, group, K // 64, row_blocks, T, P)
            if step + 1 < stop:
                slots = slots[0] + 1, slots[1] + 1
                v, sums = project_and_smooth(b, step + 1, slots, norm, shared, sums, UNSIGNED, T, NORM, WM, WK, RT)
                b = load_group(x_ptr, offsets, gl.minimum(step + 3, steps - 1), WK)
                codes = quantize_words(v, UNSIGNED, T, XORSIGN)
                store_rows(codes_ptr, ascales_ptr, codes[0], codes[1], tile_m, group + WK, K // 64, row_blocks, T, P)
    if RT > 0:
        _finish(sums, lora_act_ptr, pieces_ptr, arrived_ptr, M, R, tile_m, piece, C, PIECES)


@triton.jit
def statistics_kernel(x_ptr, statistics_ptr, K, stride_x, EPS: tl.constexpr, BLOCK_K: tl.constexpr):
    """1 / deviation and mean / deviation of a row, float32."""
    row = tl.program_id(0)
    k = tl.arange(0, BLOCK_K)
    x = tl.load(x_ptr + row.to(tl.int64) * stride_x + k, mask=k < K, other=0.0).to(tl.float32)
    mean = tl.sum(x) / K
    away = tl.where(k < K, x - mean, 0.0)
    inverse = 1.0 / tl.sqrt_rn(tl.sum(away * away) / K + EPS)
    tl.store(statistics_ptr + row * 2, inverse)
    tl.store(statistics_ptr + row * 2 + 1, mean * inverse)


def quantize_act(
    x: Tensor, weight: PackedW4A4, norm: Modulation | None = None, cut: Cut | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`kernels.reference.quantize_act`, for the input of the layer ``weight``.

    x: T [M, K], bf16 or fp16, rows contiguous · weight: gives smooth_factor, proj_down (file order) and act_unsigned ·
    norm: what is done to x before · cut: for tests and benchmarks. Returns codes int32 [B, G, 512] and ascales
    T [B, G, 64] in the order of act_layout.py, and lora_act float32 [M, R]. K is a multiple of 128, R of 16 up to 256.
    Same bits on every run. Raises ValueError where operands do not fit each other.
    """
    m, k = x.shape
    rank, dtype = weight.rank, x.dtype
    if k != weight.k or x.stride(1) != 1:
        raise ValueError(f"x is {list(x.shape)}, strides {x.stride()}; expected [M, {weight.k}] with contiguous rows")
    if dtype not in (torch.bfloat16, torch.float16) or weight.smooth_factor.dtype != dtype:
        raise ValueError(f"x is {dtype} and smooth_factor {weight.smooth_factor.dtype}, expected bf16 or fp16 twice")
    if rank % RANK_MULTIPLE or rank > MAX_RANK:
        raise ValueError(f"rank is {rank}, expected a multiple of {RANK_MULTIPLE} up to {MAX_RANK}")
    if norm is not None:
        batches = norm.scale.shape[0]
        if batches == 0 or m % batches:
            raise ValueError(f"norm has {batches} batches, expected a divisor of {m}")
        require("scale", norm.scale, (batches, k), dtype)
        require("shift", norm.shift, (batches, k), dtype)
    groups, blocks = k // GROUP, act_layout.blocks_of(m)
    codes = torch.empty(blocks, groups, act_layout.WORDS, dtype=torch.int32, device=x.device)
    ascales = torch.empty(blocks, groups, act_layout.BLOCK_M, dtype=dtype, device=x.device)
    lora_act = torch.empty(m, rank, dtype=torch.float32, device=x.device)
    if m == 0:
        return codes, ascales, lora_act
    if x.storage_offset() % 2 or x.stride(0) % 2:
        x = x.clone(memory_format=torch.contiguous_format)  # pairs are read as words
    ranks = triton.next_power_of_2(rank // 16) if rank else 0
    cut = cut or choose_cut(blocks * 4, groups, ranks, multiprocessors(x.device))
    warps, row_blocks = cut.warps_m * cut.warps_k, triton.cdiv(blocks * 4, cut.warps_m)
    per_piece = cut.warps_k * triton.cdiv(groups, cut.warps_k * cut.pieces)
    pieces = triton.cdiv(groups, per_piece)
    ascales_words, mixed = ascales.view(torch.int32), 0
    parts = arrived = statistics = scale = shift = ascales_words
    # Triton launches on the current device, whatever the tensors are on.
    with torch.cuda.device_of(x):
        if norm is not None:
            scale, shift = norm.scale.view(torch.int32), norm.shift.view(torch.int32)
            statistics = torch.empty(m, 2, dtype=torch.float32, device=x.device)
            statistics_kernel[(m,)](x, statistics, k, x.stride(0), EPS=NORM_EPS, BLOCK_K=triton.next_power_of_2(k))
            mixed = 1 if len(norm.scale) == 1 or m // len(norm.scale) % 16 == 0 else 2
        if rank and pieces > 1:
            parts = lora_act.new_empty(pieces, row_blocks * cut.warps_m, ranks, 256)
            arrived = arrivals("quantize_act", x.device, MAX_ROW_BLOCKS)
        quantize_kernel[(row_blocks, pieces)](
            x.view(torch.int32),
            weight.smooth_factor.view(torch.int32),
            weight.proj_down.view(torch.int32) if rank else codes,
            codes,
            ascales_words,
            lora_act,
            parts,
            arrived,
            statistics,
            scale,
            shift,
            m,
            k,
            rank,
            x.stride(0) // 2,
            blocks,
            per_piece,
            m // len(norm.scale) if norm is not None else m,
            UNSIGNED=weight.act_unsigned,
            T=TYPES[dtype],
            XORSIGN=dtype == torch.bfloat16 and describe(x.device).architecture != "sm_80",
            RT=ranks,
            NORM=mixed,
            WM=cut.warps_m,
            WK=cut.warps_k,
            SLAB=cut.staged // cut.warps_k,
            BUFFERS=cut.buffers(ranks),
            PIECES=triton.next_power_of_2(pieces) if rank else 1,
            num_warps=warps,
            **FMA,
            maxnreg=128 if ranks <= 2 else None,  # room for 16 warps on a multiprocessor
        )
    return codes, ascales, lora_act


def choose_cut(row_tiles: int, groups: int, ranks: int, multiprocessors: int) -> Cut:
    """A cut for ``row_tiles`` m16 tiles, ``groups`` groups and ``ranks`` r16 tiles that fills a GPU once.

    Blocks of 8 warps, two of them on a multiprocessor (one from rank 48 on, by registers), or twice as many of 4 warps
    where rows are few. Warps side by side in K would share less of proj_down, whose copying is what they wait for.
    """
    wanted = multiprocessors * (2 if ranks <= 2 else 1)
    most = min(16, groups)  # pieces
    warps_m = 8 if row_tiles >= 8 and -(-row_tiles // 8) * most >= wanted else 4
    row_blocks = -(-row_tiles // warps_m)
    pieces = 1 if row_blocks > MAX_ROW_BLOCKS else min(most, max(1, wanted * 8 // warps_m // row_blocks))
    return Cut(warps_m, 1, pieces, max(2, 8 // max(ranks, 2)))  # 33 KB of shared memory, 64 KB from rank 80 on
