"""Natural order <-> kernel order of quantized activations, as pack/unpack pairs.

"Kernel order" is what the INT4 GEMM reads and the quantize kernel writes: the operand order of ``mma.sync.m16n8k64``,
in blocks of 64 tokens by one group of 64 columns, so that a block's codes are 2 KB and its scales 128 B in a row and
a lane reads its part of an m16 tile with one 16-byte load. It differs from the original engine's order (blocks of 256
tokens). Rows beyond M up to the next multiple of 64 may hold anything: they reach no valid row.

Vocabulary: M tokens, K input features, G = K / 64 groups, B = ceil(M / 64) blocks; T the 16-bit compute type.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_M = 64  # tokens of one block
BLOCK_K = 64  # columns of one block: one scale group
WORDS = BLOCK_M * BLOCK_K // 8  # int32 words of one block


def blocks_of(m: int) -> int:
    """Number of blocks that hold ``m`` tokens."""
    return (m + BLOCK_M - 1) // BLOCK_M


def pack_act(codes: Tensor) -> Tensor:
    """Activation codes int8 [M, K] (-8..7 or 0..15) to kernel order, int32 [B, G, 512]; padding rows are 0.

    Inside a block, word = (m/16 * 32 + m%8 * 4 + k/8%4) * 4 + k/32 * 2 + m/8%2 holds eight consecutive k of one m, low
    nibble first.
    """
    k = codes.shape[1]
    if k % BLOCK_K:
        raise ValueError(f"K is {k}, but the packed layout needs a multiple of {BLOCK_K}")
    padded = _pad_rows(codes.to(torch.int8))
    # axes: m/64, m/16%4, m/8%2, m%8, k/64, k/32%2, k/8%4, byte of the word, nibble of the byte
    nibbles = padded.reshape(-1, 4, 2, 8, k // BLOCK_K, 2, 4, 4, 2).permute(0, 4, 1, 3, 6, 5, 2, 7, 8)
    packed = (nibbles[..., 0] & 0x0F) | (nibbles[..., 1] << 4)
    return packed.contiguous().view(torch.int32).reshape(-1, k // BLOCK_K, WORDS)


def unpack_act(packed: Tensor, m: int, act_unsigned: bool = False) -> Tensor:
    """Inverse of :func:`pack_act`: the first ``m`` rows as int8 [M, K]."""
    groups = packed.shape[1]
    # axes: m/64, k/64, m/16%4, m%8, k/8%4, k/32%2, m/8%2, byte of the word
    packed = packed.contiguous().view(torch.int8).reshape(-1, groups, 4, 8, 4, 2, 2, 4)
    low, high = packed & 0x0F, (packed >> 4) & 0x0F
    nibbles = torch.stack((low, high), dim=-1).permute(0, 2, 6, 3, 1, 5, 4, 7, 8)
    codes = nibbles.reshape(-1, groups * BLOCK_K)[:m]
    return codes if act_unsigned else (codes ^ 8) - 8


def pack_ascales(ascales: Tensor) -> Tensor:
    """Activation scales T [M, G] to kernel order, T [B, G, 64]; padding rows are 0.

    Position inside a block: m%8 * 8 + m/16%4 * 2 + m/8%2.
    """
    groups = ascales.shape[1]
    blocks = _pad_rows(ascales).reshape(-1, 4, 2, 8, groups)
    return blocks.permute(0, 4, 3, 1, 2).reshape(-1, groups, BLOCK_M)


def unpack_ascales(packed: Tensor, m: int) -> Tensor:
    """Inverse of :func:`pack_ascales`: the first ``m`` rows as T [M, G]."""
    groups = packed.shape[1]
    blocks = packed.reshape(-1, groups, 8, 4, 2).permute(0, 3, 4, 2, 1)
    return blocks.reshape(-1, groups)[:m]


def _pad_rows(x: Tensor) -> Tensor:
    missing = blocks_of(x.shape[0]) * BLOCK_M - x.shape[0]
    return torch.nn.functional.pad(x, (0, 0, 0, missing)) if missing else x
