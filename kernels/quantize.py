"""One pass over an activation: smooth, quantize to INT4 per token and group of 64, and project down (low-rank branch).

    codes, ascales = quantize(x / smooth_factor),  lora_act = x @ proj_down^T        (contract: int4.py)

Memory-bound: x is read once, everything else is an eighth of it. Factors are read in the order of the checkpoint file
(layout.py); codes and scales are written in that of the INT4 GEMM (act_layout.py). Sums have a fixed order: K may be
cut into pieces whose partial products a second, small kernel adds up; there are no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import act_layout
from .int4 import GROUP, RANK_MULTIPLE, SHIFT, SIGNED_MAX, UNSIGNED_MAX, PackedW4A4

MAX_RANK = 256
_ROUND = tl.constexpr(12582912.0)  # 3 * 2^22: adding it rounds a small float32 to an integer, ties to even
_LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def _load_down(proj_down_ptr, k0, R, GROUPS: tl.constexpr, RANKS: tl.constexpr):
    """Channels from k0 of the low-rank down projection as [GROUPS * 64, RANKS * 16] in natural order, 0 beyond R."""
    tile_k = tl.arange(0, GROUPS * 4)
    tile_r = tl.arange(0, RANKS)
    inside = tl.arange(0, 256)
    tile = (k0 // 16 + tile_k)[:, None] * (R // 16) + tile_r[None, :]
    mask = (tile_r < R // 16)[None, :, None]
    flat = tl.load(proj_down_ptr + tile[:, :, None] * 256 + inside[None, None, :], mask=mask, other=0.0)
    # axes: k/16, r/16, r%8, k%8/2, r/8%2, k/8%2, k%2
    tiles = tl.reshape(flat, [GROUPS * 4, RANKS, 8, 4, 2, 2, 2])
    return tl.reshape(tl.permute(tiles, [0, 5, 3, 6, 1, 4, 2]), [GROUPS * 64, RANKS * 16])


@triton.jit
def _quantize_kernel(
    x_ptr, smooth_ptr, proj_down_ptr, codes_ptr, ascales_ptr, lora_act_ptr,
    M, K, R, stride_xm, groups_per_piece,
    TOP: tl.constexpr, SHIFT_BY: tl.constexpr, LOW_RANK: tl.constexpr,
    BLOCK_M: tl.constexpr, GROUPS: tl.constexpr, RANKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows, one piece of K, GROUPS groups at a time; groups_per_piece and K / 64 are multiples of GROUPS.

    RANKS: r16 tiles, a power of two · TOP: 7 or 15 · SHIFT_BY: 0 or the GELU shift.
    """
    pid_m = tl.program_id(0)
    piece = tl.program_id(1)
    all_groups = K // 64
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    x_row_ptr = x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm
    offs_g = tl.arange(0, GROUPS)
    offs_k = tl.arange(0, GROUPS * 64)
    # position of channel k in a packed vector
    packed_k = offs_k // 16 * 16 + offs_k % 8 // 2 * 4 + offs_k // 8 % 2 * 2 + offs_k % 2
    scale_row = offs_m // 64 * (all_groups * 64) + offs_m % 8 * 8 + offs_m // 16 % 4 * 2 + offs_m // 8 % 2
    tile_m = pid_m * (BLOCK_M // 16) + tl.arange(0, BLOCK_M // 16)
    code_row = tile_m // 4 * (all_groups * 512) + tile_m % 4 * 128
    code_offset = code_row[:, None, None] + (offs_g * 512)[None, :, None] + tl.arange(0, 128)[None, None, :]
    mask_tile = (tile_m * 16 < (M + 63) // 64 * 64)[:, None, None]
    shifts = 4 * tl.arange(0, 8)

    acc = tl.zeros([BLOCK_M, RANKS * 16], dtype=tl.float32)
    first = piece * groups_per_piece
    last = tl.minimum(first + groups_per_piece, all_groups)
    for g in tl.range(first, last, GROUPS, num_stages=STAGES):
        x = tl.load(x_row_ptr + (g * 64 + offs_k)[None, :], mask=mask_m[:, None], other=0.0)  # [BLOCK_M, GROUPS * 64]
        if LOW_RANK:
            acc = tl.dot(x, _load_down(proj_down_ptr, g * 64, R, GROUPS, RANKS), acc)
        # A reciprocal for each channel instead of a division for every element: at most one float32 step apart, of
        # which the rounding to 16 bits leaves a trace in 1 of 10,000 elements.
        inverse = 1.0 / tl.load(smooth_ptr + g * 64 + packed_k).to(tl.float32)
        shifted = x.to(tl.float32)
        if SHIFT_BY != 0.0:
            shifted = (shifted + SHIFT_BY).to(x.dtype).to(tl.float32)
        v = (shifted * inverse[None, :]).to(x.dtype).to(tl.float32)
        v = tl.reshape(v, [BLOCK_M, GROUPS, 64])
        scale = tl.max(tl.abs(v), axis=2) * (1.0 / TOP)  # [BLOCK_M, GROUPS]
        # Finite, so that a group of zeros gives zeros. Codes need no clamping: |v| / scale is TOP at most.
        inverse_scale = tl.minimum(1.0 / scale, _LARGEST)
        scaled = v * inverse_scale[:, :, None]
        code = (scaled + _ROUND).to(tl.int32, bitcast=True)  # the code in the last bits, two's complement
        nibbles = tl.reshape(code & 15, [BLOCK_M, GROUPS * 8, 8]) << shifts[None, None, :]
        word = tl.sum(nibbles, axis=2)  # nibbles do not overlap
        # axes: m/16, m/8%2, m%8, group, k/32, k/8%4 -> kernel order: m/16, group, m%8, k/8%4, k/32, m/8%2
        word = tl.permute(tl.reshape(word, [BLOCK_M // 16, 2, 8, GROUPS, 2, 4]), [0, 3, 2, 5, 4, 1])
        tl.store(codes_ptr + g * 512 + code_offset, tl.reshape(word, [BLOCK_M // 16, GROUPS, 128]), mask=mask_tile)
        tl.store(
            ascales_ptr + scale_row[:, None] + (g + offs_g)[None, :] * 64,
            scale.to(ascales_ptr.dtype.element_ty),
            mask=mask_m[:, None],
        )
    if LOW_RANK:
        offs_r = tl.arange(0, RANKS * 16)
        out = (piece * M + offs_m).to(tl.int64)[:, None] * R + offs_r[None, :]
        tl.store(lora_act_ptr + out, acc, mask=mask_m[:, None] & (offs_r < R)[None, :])


@triton.jit
def _sum_pieces_kernel(pieces_ptr, sum_ptr, count, SIZE, BLOCK: tl.constexpr):
    """sum[i] = pieces[0, i] + pieces[1, i] + ..., in that order."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < SIZE
    total = tl.load(pieces_ptr + offs, mask=mask)
    for _ in range(1, count):
        pieces_ptr += SIZE
        total += tl.load(pieces_ptr + offs, mask=mask)
    tl.store(sum_ptr + offs, total, mask=mask)


def quantize_act(
    x: Tensor, weight: PackedW4A4, block_m: int = 64, pieces: int | None = None, warps: int = 4, stages: int = 1,
    step: int = 2,
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`kernels.reference.quantize_act`, for the input of the layer ``weight``.

    x: T [M, K], bf16 or fp16, rows contiguous · weight: gives smooth_factor, proj_down (file order) and act_unsigned ·
    block_m, pieces, warps, stages, step (groups at a time): for benchmarks. Returns codes int32 [B, G, 512] and ascales
    T [B, G, 64] in the order of act_layout.py, and lora_act float32 [M, R]. K is a multiple of 128, R of 16 up to 256.
    Same bits on every run.
    """
    m, k = x.shape
    rank = weight.rank
    if k != weight.k or x.stride(1) != 1:
        raise ValueError(f"x is {list(x.shape)}, strides {x.stride()}; expected [M, {weight.k}] with contiguous rows")
    if x.dtype not in (torch.bfloat16, torch.float16) or weight.smooth_factor.dtype != x.dtype:
        raise ValueError(f"x is {x.dtype} and smooth_factor {weight.smooth_factor.dtype}, expected bf16 or fp16 twice")
    if rank % RANK_MULTIPLE or rank > MAX_RANK:
        raise ValueError(f"rank is {rank}, expected a multiple of {RANK_MULTIPLE} up to {MAX_RANK}")
    groups = k // GROUP
    blocks = act_layout.blocks_of(m)
    codes = torch.empty(blocks, groups, act_layout.WORDS, dtype=torch.int32, device=x.device)
    ascales = torch.empty(blocks, groups, act_layout.BLOCK_M, dtype=x.dtype, device=x.device)
    lora_act = torch.empty(m, rank, dtype=torch.float32, device=x.device)
    if m == 0:
        return codes, ascales, lora_act
    row_blocks = triton.cdiv(m, block_m)
    step = step if groups % step == 0 else 2
    per_piece = step * triton.cdiv(groups, step * (pieces or choose_pieces(row_blocks, groups)))
    pieces = triton.cdiv(groups, per_piece)
    partial = lora_act if pieces == 1 or rank == 0 else lora_act.new_empty(pieces, m, rank)
    # Triton launches on the current device, whatever the tensors are on.
    with torch.cuda.device_of(x):
        _quantize_kernel[(row_blocks, pieces)](
            x_ptr=x,
            smooth_ptr=weight.smooth_factor,
            proj_down_ptr=weight.proj_down if rank else x,
            codes_ptr=codes,
            ascales_ptr=ascales,
            lora_act_ptr=partial if rank else x,
            M=m,
            K=k,
            R=rank,
            stride_xm=x.stride(0),
            groups_per_piece=per_piece,
            TOP=UNSIGNED_MAX if weight.act_unsigned else SIGNED_MAX,
            SHIFT_BY=SHIFT if weight.act_unsigned else 0.0,
            LOW_RANK=rank > 0,
            BLOCK_M=block_m,
            GROUPS=step,
            RANKS=triton.next_power_of_2(max(rank // 16, 1)),
            STAGES=stages,
            num_warps=warps,
        )
        if partial is not lora_act:
            block = 1024
            _sum_pieces_kernel[(triton.cdiv(m * rank, block),)](
                pieces_ptr=partial, sum_ptr=lora_act, count=pieces, SIZE=m * rank, BLOCK=block
            )
    return codes, ascales, lora_act


def choose_pieces(row_blocks: int, groups: int, wanted_blocks: int = 512, least_groups: int = 12) -> int:
    """Pieces to cut K into: enough thread blocks to fill a large GPU, each with at least ``least_groups`` groups."""
    return max(1, min(-(-wanted_blocks // row_blocks), groups // least_groups))
