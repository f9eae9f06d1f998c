"""Tile choice of the INT8 GEMM and the Hopper kernel's list of work: pure functions. No autotune, no device query."""

from __future__ import annotations

import functools
from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """block_m x block_n outputs of a program, block_k columns of K at a time, ``stages`` of them in shared memory ·
    tma: operands are loaded by the bulk tensor copy engine, and each multiprocessor has one program, which takes block
    after block · flatten: whether the compiler makes one loop of blocks and columns."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    tma: bool = False
    group_m: int = 8
    flatten: bool = False


# Largest first; the last one is for few rows. A second input needs a second set of accumulators: no 128 x 256.
TILES = {
    "sm_90": (
        Tile(128, 256, 128, 8, 3, tma=True),
        Tile(128, 128, 128, 8, 4, tma=True),
        Tile(64, 128, 128, 4, 4, tma=True),
    ),
    "sm_80": (Tile(128, 128, 64, 8, 4), Tile(64, 128, 64, 4, 4)),
    "hip": (Tile(128, 128, 64, 8, 2), Tile(64, 128, 64, 4, 2)),
    "other": (Tile(128, 128, 64, 8, 3), Tile(64, 128, 64, 4, 3)),
}


def choose_tile(m: int, n: int, architecture: str, second: bool = False, epilogue: str = "NONE") -> Tile:
    """The tile of the plain Triton kernel: a reviewed table, no autotune. second: whether there is a second input."""
    tiles = TILES.get(architecture, TILES["other"])
    if architecture == "sm_90" and (second or epilogue in ("GATE_RESIDUAL", "NORM_ROPE")):
        tiles = tiles[1:]  # these epilogues spill the registers of 128 x 256
    if m <= 64 or -(-m // 128) * -(-n // 128) <= 96:
        return tiles[-1]
    return tiles[0]


@dataclass(frozen=True)
class HopperTile:
    """What the Hopper kernel is compiled for; its blocks have 128 x 128 outputs and steps of 128 columns of K.

    stages: buffers of the ring · group_m: row blocks before the next column block · join: what pieces cost, in steps;
    see plan_items · producer_warps: one of them loads; four are a warpgroup of their own · registers: of a multiplying
    and of a loading thread. Filled in for each call: ranks, boxes: see low_rank_boxes · second, unsigned, unsigned2,
    epilogue: as in gemm_w8a8 · one_gate: whether the gate has one row.
    """

    stages: int = 5
    group_m: int = 8
    join: int = 25
    producer_warps: int = 4
    registers: tuple[int, int] = (240, 24)
    ranks: int = 32
    boxes: int = 1
    second: bool = False
    unsigned: bool = False
    unsigned2: bool = False
    epilogue: int = 0
    one_gate: bool = False


# For all sizes: blocks of 128 x 256 that two warpgroups share do less in shared memory, but cannot hide their epilogue;
# blocks of 64 x 128 are no faster for few rows. Without pieces: NO_PIECES.
HOPPER = HopperTile()
NO_PIECES = HopperTile(join=10**6)
BLOCK = 128
MOST_PIECES = 8


def low_rank_boxes(rank: int) -> tuple[int, int]:
    """How the Hopper kernel copies the low-rank branch: columns of a box, and boxes at a time.

    A box has a power of two of columns. Rank 48, that of most files with a LoRA of rank 16, is three of 16; from 64 on
    boxes have 64, and what the last one has too many is zero.
    """
    if rank == 48:
        return 16, 3
    return (min(64, 1 << (rank - 1).bit_length()), 1) if rank else (0, 0)


@dataclass(frozen=True)
class Plan:
    """Items of one GEMM: ``whole`` blocks, then the rest of them in ``pieces`` each, on ``grid`` multiprocessors."""

    whole: int
    pieces: int
    items: int
    grid: int

    @property
    def split_blocks(self) -> int:
        """Blocks that are cut into pieces."""
        return (self.items - self.whole) // self.pieces if self.pieces > 1 else 0

    def partial_elements(self, second: bool) -> int:
        """32-bit values that wait in memory: of the first of two inputs, or of the pieces."""
        return (self.grid * 2 if second else self.split_blocks * self.pieces) * BLOCK * BLOCK


@functools.lru_cache(maxsize=256)
def plan_items(m: int, n: int, steps: int, tile: HopperTile, multiprocessors: int) -> Plan:
    """Cut the blocks of the last wave, or of the last two, along K where that ends earlier.

    steps: of K. An item is taken to last as long as its steps, and ``tile.join`` longer if it is a piece, whose sums
    have to meet those of the others in memory.
    """
    blocks = -(-m // BLOCK) * -(-n // BLOCK)
    best, least = Plan(blocks, 1, blocks, min(blocks, multiprocessors)), -(-blocks // multiprocessors) * steps
    for left in (blocks % multiprocessors, blocks % multiprocessors + multiprocessors):
        if not 0 < left <= blocks:
            continue
        for pieces in range(2, min(MOST_PIECES, steps) + 1):
            items = blocks - left + left * pieces
            time = (blocks - left) // multiprocessors * steps
            time += -(-left * pieces // multiprocessors) * (-(-steps // pieces) + tile.join)
            if time < least:
                best, least = Plan(blocks - left, pieces, items, min(items, multiprocessors)), time
    return best
