"""One pass over an activation for the INT8 mode: (LayerNorm + modulation,) smooth, quantize per token, project down.

    x' = LayerNorm(x) * (1 + scale) + shift, or x
    codes, scales = quantize(x' / smooth_factor),  lora_act = T(x' @ proj_down^T)

Contract: ``reference.quantize_act_int8``. Memory-bound, and a token has one scale: its codes are known when all of it
has been seen. So a block keeps its rows in shared memory, and x is read once. proj_down is read by every block: the
more rows a block has, the less. Where the rows' whole length does not fit, blocks side by side take slices of it, and
tell each other sums and largest values. Sums have a fixed order: same bits on every run.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from .arrivals import arrivals
from .device import FMA, describe, multiprocessors
from .epilogue import EPS, require
from .gluon_compat import async_copy, barrier, gl, gluon
from .int4 import RANK_MULTIPLE, PackedW4A4
from .quantize_block import smooth_words
from .quantize_int8_block import (
    add_statistics,
    column_factors,
    copy_step,
    keep_low_rank,
    larger_words,
    largest_of_row,
    load_factors,
    load_step,
    low_rank_of_warps,
    low_rank_total,
    normalize,
    not_negative,
    power_of_2,
    project,
    row_layout,
    row_scale,
    rows_of_slices,
    rows_of_warps,
    shared_buffers,
    store_codes,
    store_low_rank,
    store_step,
    sum_low_rank,
    tile_offsets,
    word_layout,
)

RANKS = 64  # low-rank columns of one launch, at most: what low_rank_of_warps takes
MAX_BLOCKS = 16384  # of those whose slices tell each other something
_AHEAD = 4  # steps whose copies are under way
_SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}  # of a block, at most
_OTHER_SHARED_BYTES = 99 * 1024


@dataclass(frozen=True)
class Cut:
    """How the work is cut: a block has ``tiles`` times 8 rows and ``part`` (0, 1, 2, 4) more, and one of ``slices``
    slices of K, which it goes through in steps of 32 columns for each warp."""

    tiles: int
    part: int
    slices: int = 1
    warps: int = 8

    @property
    def rows(self) -> int:
        return 8 * self.tiles + self.part

    def steps(self, k: int) -> int:
        """Of a slice; an even number (and not 2, at which Triton 3.6 fails)."""
        return 2 * max(2, triton.cdiv(k, 64 * self.warps * self.slices))

    def constants(self, k: int) -> dict[str, int]:
        """Of the kernel."""
        steps = self.steps(k)
        return {
            "TILES": self.tiles,
            "PART": self.part,
            "WARPS": self.warps,
            "SLICES": self.slices,
            "STEPS": steps,
            "AHEAD": _AHEAD,
            "EXACT": steps * self.slices * self.warps * 32 == k,
        }

    def shared_bytes(self, k: int, ranks: int) -> int:
        """Shared memory of a block, for ``ranks`` r16 tiles."""
        steps, ranks = self.steps(k), triton.next_power_of_2(ranks) if ranks else 0
        units = max(steps, ranks) * self.tiles * 8
        if self.part:
            units += max(steps * self.part, ranks * 8)
        return self.warps * (64 * units + 8 * self.rows) + 64


@gluon.jit
def _compute(step, factors, buffers, sums, largest, norm, NORM: gl.constexpr, UNSIGNED: gl.constexpr,
             CODES: gl.constexpr, T: gl.constexpr, XORSIGN: gl.constexpr, RT: gl.constexpr,
             WARPS: gl.constexpr):  # fmt: skip
    """One step of all tiles: low-rank sums and largest magnitudes so far; smoothed values take the place of x."""
    smooth, scale, shift, down = factors
    tiles = load_step(buffers, step, WARPS)
    factor0, factor1, gain, offset = column_factors(smooth, scale, shift, T, NORM)
    new_tiles, new_sums, new_largest = (), (), ()
    for t in gl.static_range(len(buffers)):
        x = tiles[t]
        if NORM:
            x = normalize(x, gain, offset, norm[2 * t], norm[2 * t + 1], T)
        if RT > 0:
            new_sums += project(x, down, sums, 4 * RT * t, RT, T)
        if CODES:
            x = smooth_words(x, factor0, factor1, UNSIGNED, T)
            new_largest += (larger_words(largest[t], x, T, XORSIGN),)
            if UNSIGNED:
                x = not_negative(x, T)
            new_tiles += (x,)
    if CODES:
        store_step(buffers, step, new_tiles)
        largest = new_largest
    return new_sums, largest


@gluon.jit(do_not_specialize=["rows_per_batch", "blocks_per_batch"])
def quantize_int8_kernel(
    x_ptr, smooth_ptr, proj_down_ptr, scale_ptr, shift_ptr, codes_ptr, scales_ptr, lora_act_ptr,
    parts_ptr, low_rank_ptr, arrived_ptr,
    K, stride_x, first_rank, part_ranks, part_stride, stride_modulation, rows_per_batch, blocks_per_batch,
    NORM: gl.constexpr, UNSIGNED: gl.constexpr, CODES: gl.constexpr, T: gl.constexpr, XORSIGN: gl.constexpr,
    RT: gl.constexpr, TILES: gl.constexpr, PART: gl.constexpr, WARPS: gl.constexpr, SLICES: gl.constexpr,
    STEPS: gl.constexpr, AHEAD: gl.constexpr, EXACT: gl.constexpr,
):  # fmt: skip
    """One block, or one slice of it.

    Pointers are to int32 words of pairs or of four codes but scales_ptr (float32), lora_act_ptr (T), parts_ptr (float32
    [blocks, 3, SLICES, tiles, 8]) and low_rank_ptr (float32 [blocks, SLICES, tiles, power of 2, 128]) · stride_x,
    stride_modulation: in words · first_rank, part_ranks, part_stride: see store_low_rank · CODES: False for low-rank
    columns alone · RT: r16 tiles of proj_down, up to 4 · STEPS: of a slice, even · EXACT: whether all slices have that
    many.
    """
    Q: gl.constexpr = word_layout(WARPS)
    ALL: gl.constexpr = TILES + (1 if PART > 0 else 0)
    SPAN: gl.constexpr = 16 * WARPS  # words of a step
    KEPT: gl.constexpr = power_of_2(RT) * 128  # low-rank sums of a tile
    block = gl.program_id(0) // SLICES
    slice = gl.program_id(0) % SLICES
    batch = block // blocks_per_batch
    first = batch * rows_per_batch + block % blocks_per_batch * (8 * TILES + PART)
    last = (batch + 1) * rows_per_batch
    start = slice * (STEPS * SPAN)
    stop = gl.minimum(start + STEPS * SPAN, K // 2)
    ptrs = (smooth_ptr, scale_ptr + batch * stride_modulation, shift_ptr + batch * stride_modulation, proj_down_ptr)
    arrived_ptr += block
    places = first_rank, part_ranks, part_stride
    parts_ptr += block * (3 * SLICES * ALL * 8)
    low_rank_ptr += (block * SLICES).to(gl.int64) * (ALL * KEPT)

    buffers, of_rows = shared_buffers(RT, TILES, PART, WARPS, STEPS)
    offsets = ()
    for t in gl.static_range(ALL):
        offsets += (tile_offsets(t, first, last, start, stride_x, 8 if t < TILES else PART, WARPS),)
    for step in gl.static_range(AHEAD):
        copy_step(buffers, step, x_ptr, offsets, start, stop, STEPS, WARPS)

    norm = ()
    if NORM:
        sums = ()
        for t in gl.static_range(ALL):
            zero = gl.zeros([WARPS, 8 if t < TILES else PART, 4, 4], gl.float32, Q)
            sums += (zero, zero)
        for step in range(0, STEPS):
            async_copy.wait_group(AHEAD - 1)
            tiles = load_step(buffers, step, WARPS)
            new = ()
            for t in gl.static_range(ALL):
                new += add_statistics(tiles[t], sums[2 * t], sums[2 * t + 1], T)
            sums = new
            copy_step(buffers, step + AHEAD, x_ptr, offsets, start, stop, STEPS, WARPS)
        rows = ()
        for i in gl.static_range(2 * ALL):
            rows += (gl.sum(gl.sum(sums[i], axis=3), axis=2),)
        rows = rows_of_warps(rows, of_rows, False)
        if SLICES > 1:
            rows = rows_of_slices(rows, parts_ptr, slice, arrived_ptr, SLICES, False, SLICES, WARPS)
        for t in gl.static_range(ALL):
            mean = rows[2 * t] / K
            rstd = gl.rsqrt(gl.maximum(rows[2 * t + 1] / K - mean * mean, 0.0) + EPS)
            norm += (rstd, -mean * rstd)

    largest = ()
    sums = ()
    for t in gl.static_range(ALL):
        largest += (gl.zeros([WARPS, 8 if t < TILES else PART, 4], gl.int32, gl.SliceLayout(3, Q)),)
    for _ in gl.static_range(4 * RT * ALL):
        sums += (gl.zeros([WARPS, 8, 4], gl.float32, gl.SliceLayout(3, Q)),)
    # Two steps' factors are in registers, each loaded while the other's are in use.
    a = load_factors(ptrs, 0, start, stop, K, NORM, T, RT, WARPS, STEPS, EXACT)
    b = load_factors(ptrs, 1, start, stop, K, NORM, T, RT, WARPS, STEPS, EXACT)
    for step in range(0, STEPS, 2):
        if not NORM:
            async_copy.wait_group(AHEAD - 1)
        sums, largest = _compute(step, a, buffers, sums, largest, norm, NORM, UNSIGNED, CODES, T, XORSIGN, RT, WARPS)
        a = load_factors(ptrs, step + 2, start, stop, K, NORM, T, RT, WARPS, STEPS, EXACT)
        if not NORM:
            copy_step(buffers, step + AHEAD, x_ptr, offsets, start, stop, STEPS, WARPS)
            async_copy.wait_group(AHEAD - 1)
        odd = step + 1
        sums, largest = _compute(odd, b, buffers, sums, largest, norm, NORM, UNSIGNED, CODES, T, XORSIGN, RT, WARPS)
        b = load_factors(ptrs, step + 3, start, stop, K, NORM, T, RT, WARPS, STEPS, EXACT)
        if not NORM:
            copy_step(buffers, odd + AHEAD, x_ptr, offsets, start, stop, STEPS, WARPS)

    if CODES:
        rows, of_largest = (), ()
        for t in gl.static_range(ALL):
            rows += (largest_of_row(largest[t], T),)
            of_largest += (of_rows[2 * t],)
        rows = rows_of_warps(rows, of_largest, True)
        if SLICES > 1:
            target: gl.constexpr = 2 * SLICES if NORM else SLICES
            ptr = parts_ptr + 2 * SLICES * ALL * 8
            rows = rows_of_slices(rows, ptr, slice, arrived_ptr, target, True, SLICES, WARPS)
        inverse = ()
        for t in gl.static_range(ALL):
            scale, inverse_t = row_scale(rows[t], UNSIGNED)
            inverse += (inverse_t,)
            row = first + t * 8 + gl.arange(0, 8 if t < TILES else PART, row_layout(WARPS))
            gl.store(scales_ptr + row, scale, mask=(row < last) & (slice == 0))
        for step in range(0, STEPS):
            tiles = load_step(buffers, step, WARPS)
            word = start + step * SPAN
            for t in gl.static_range(ALL):
                store_codes(codes_ptr, tiles[t], inverse[t], first + t * 8, last, word, stop, K, UNSIGNED, T, EXACT)

    if RT > 0:
        barrier()  # all warps have read their words
        for t in gl.static_range(ALL):
            low_rank_of_warps(sums, buffers[t], 4 * RT * t, RT)
        barrier()
        for t in gl.static_range(ALL):
            total = low_rank_total(buffers[t], RT, WARPS)
            if SLICES == 1:
                store_low_rank(lora_act_ptr, total, first + t * 8, last, places, 8 if t < TILES else PART, RT)
            else:
                keep_low_rank(low_rank_ptr + (slice * ALL + t) * KEPT, total)
    if SLICES > 1:
        # The last of a block's slices adds up what all have left, and sets their counter back.
        barrier()
        before: gl.constexpr = ((1 if NORM else 0) + (1 if CODES else 0)) * SLICES
        if gl.atomic_add(arrived_ptr, 1, sem="acq_rel") == before + SLICES - 1:
            for t in gl.static_range(ALL if RT > 0 else 0):
                of_all = sum_low_rank(low_rank_ptr + t * KEPT, ALL * KEPT, SLICES, RT, WARPS)
                store_low_rank(lora_act_ptr, of_all, first + t * 8, last, places, 8 if t < TILES else PART, RT)
            gl.store(arrived_ptr, 0)


def quantize_act_int8(
    x: Tensor,
    weight: PackedW4A4,
    proj_down: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    layers: int = 1,
    cut: Cut | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`kernels.reference.quantize_act_int8`, for the input of the layer ``weight``.

    x: T [M, K], bf16 or fp16, rows contiguous · weight: gives smooth_factor (file order) and act_unsigned · proj_down:
    T, nominal [R, K], in operand order (low_rank.py) · scale, shift: T [B, K], B divides M: LayerNorm and modulation in
    front, or None · layers: how many of the same rank, one below the other, proj_down is of · cut: for tests and
    benchmarks. Returns codes int8 [M, K], scales float32 [M] and lora_act T [M, R], or [layers, M, R / layers].
    Same bits on every run.
    """
    m, k = x.shape
    rank = proj_down.shape[0]
    if k != weight.k or x.stride(1) != 1 or x.stride(0) % 8:
        raise ValueError(f"x is {list(x.shape)}, strides {x.stride()}; expected [M, {weight.k}] with contiguous rows")
    if x.dtype not in (torch.bfloat16, torch.float16) or weight.smooth_factor.dtype != x.dtype:
        raise ValueError(f"x is {x.dtype} and smooth_factor {weight.smooth_factor.dtype}, expected bf16 or fp16 twice")
    if rank % (layers * RANK_MULTIPLE):
        raise ValueError(f"rank is {rank}, expected a multiple of {layers} times {RANK_MULTIPLE}")
    require("proj_down", proj_down, (rank, k), x.dtype)
    codes = torch.empty(m, k, dtype=torch.int8, device=x.device)
    scales = torch.empty(m, dtype=torch.float32, device=x.device)
    lora_act = torch.empty(layers, m, rank // layers, dtype=x.dtype, device=x.device)
    lora_act = lora_act[0] if layers == 1 else lora_act
    if m == 0:
        return codes, scales, lora_act
    batches = 1
    if scale is not None:
        for name, tensor in (("scale", scale), ("shift", shift)):
            if tensor.ndim != 2 or tensor.shape[1] != k or m % tensor.shape[0] or tensor.stride(1) != 1:
                raise ValueError(f"{name} is {list(tensor.shape)}, expected [B, {k}], B a divisor of {m}")
        if scale.shape != shift.shape or scale.stride() != shift.stride():
            scale, shift = scale.contiguous(), shift.contiguous()
        batches = scale.shape[0]
    rows = m // batches
    # More low-rank columns than fit beside each other: 96 as 48 and 48, which is faster than 64 and 32.
    ranks = triton.cdiv(rank // 16, max(1, triton.cdiv(rank, RANKS)))  # of a launch
    architecture = describe(x.device).architecture
    if cut is None:
        cut = choose_cut(rows, batches, k, ranks, multiprocessors(x.device), architecture)
    blocks_per_batch, tiles = triton.cdiv(rows, cut.rows), cut.tiles + (cut.part > 0)
    blocks = batches * blocks_per_batch
    words = codes.view(torch.int32)
    parts = low_rank = scales
    arrived = words
    # Triton launches on the current device, whatever the tensors are on.
    with torch.cuda.device_of(x):
        if cut.slices > 1:
            parts = scales.new_empty(blocks * cut.slices, 3 * tiles * 8)
            low_rank = scales.new_empty(blocks * cut.slices, triton.next_power_of_2(max(1, ranks)) * tiles * 128)
            if blocks <= MAX_BLOCKS:
                arrived = arrivals("quantize_act_int8", x.device, MAX_BLOCKS)
            else:
                arrived = torch.zeros_like(scales, dtype=torch.int32)
        for r in range(0, max(rank, 1), max(16 * ranks, 1)):
            quantize_int8_kernel[(blocks * cut.slices,)](
                x.view(torch.int32),
                weight.smooth_factor.view(torch.int32),
                proj_down[r:].view(torch.int32) if rank else words,
                words if scale is None else scale.view(torch.int32),
                words if shift is None else shift.view(torch.int32),
                words,
                scales,
                lora_act if rank else scales,
                parts,
                low_rank,
                arrived,
                k,
                x.stride(0) // 2,
                r,
                rank // layers,
                m * rank // layers,
                0 if scale is None else scale.stride(0) // 2,
                rows,
                blocks_per_batch,
                NORM=scale is not None,
                UNSIGNED=weight.act_unsigned,
                CODES=r == 0,
                T=0 if x.dtype == torch.bfloat16 else 1,
                XORSIGN=x.dtype == torch.bfloat16 and architecture != "sm_80",
                RT=min(ranks, (rank - r) // 16),
                **cut.constants(k),
                num_warps=cut.warps,
                **FMA,
            )
    return codes, scales, lora_act


@functools.cache
def choose_cut(rows: int, batches: int, k: int, ranks: int, multiprocessors: int, architecture: str) -> Cut:
    """A cut for ``batches`` times ``rows`` rows and ``ranks`` r16 tiles: the fastest by a rough model, in microseconds.

    One block at a time on a multiprocessor. It takes a time of its own (with an exchange, if there are slices), one for
    its columns (proj_down, latencies), and one for its elements: fitted to an H200.
    """
    shared = _SHARED_BYTES.get(architecture, _OTHER_SHARED_BYTES)
    best, least = None, 0.0
    for slices in (1, 2, 3, 4, 6, 8, 12, 16):
        for tiles, part in ((0, 4), (1, 0), (1, 4), (2, 0), (3, 0), (4, 0), (4, 4)):
            cut = Cut(tiles, part, slices)
            # Slices wait for each other: all of a block's have to run at the same time.
            if slices > multiprocessors or cut.shared_bytes(k, ranks) > shared:
                continue
            waves = triton.cdiv(batches * triton.cdiv(rows, cut.rows) * slices, multiprocessors)
            columns = cut.steps(k) * 32 * cut.warps
            time = waves * (4 + 3 * (slices > 1) + columns * (1.5e-3 + 1.1e-4 * cut.rows))
            if best is None or time < least:
                best, least = cut, time
    if best is None:
        raise ValueError(f"K is {k}: too long for this GPU")
    return best
