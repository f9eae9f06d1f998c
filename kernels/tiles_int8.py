"""Tile choice of the INT8 GEMM and the Hopper kernel's list of work: pure functions. No autotune, no device query."""

from __future__ import annotations

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
    """What the kernel is compiled for.

    rows x tn outputs of a block, tm x tn of a warpgroup · stages: buffers of the ring · ranks: columns of the low-rank
    branch in a step, 0 for none · second, unsigned, unsigned2, bias, epilogue: as in gemm_w8a8 · one_gate: whether the
    gate has one row · split: whether there are pieces, of least_steps each · skew: see above · group_m: row blocks
    before the next column block · producer_warps: one of them loads; four are a warpgroup of their own · registers: of
    a multiplying and of a loading thread · probe: 1 or 2 to leave out all loads, or those of the weights, and see what
    they cost; results are then wrong.
    """

    rows: int = 128
    tm: int = 64
    tn: int = 256
    stages: int = 4
    ranks: int = 32
    second: bool = False
    unsigned: bool = False
    unsigned2: bool = False
    bias: bool = True
    epilogue: int = 0
    one_gate: bool = False
    split: bool = False
    skew: int = 2
    group_m: int = 8
    least_steps: int = 6
    producer_warps: int = 4
    registers: tuple[int, int] = (240, 24)
    probe: int = 0


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

    def least_steps(self, steps: int) -> int:
        """Steps of the shortest item."""
        return steps // self.pieces

    def partial_elements(self, tile: HopperTile) -> int:
        """float32 values that wait in memory: first those of the first input, then those of the pieces."""
        first_input = self.grid * 2 * tile.tm * tile.tn if tile.second else 0
        return first_input + self.split_blocks * self.pieces * tile.rows * tile.tn


def plan_items(m: int, n: int, steps: int, tile: HopperTile, multiprocessors: int) -> Plan:
    """Cut the blocks of the last wave along K where that fills more multiprocessors. steps: of K, 128 columns each."""
    blocks = -(-m // tile.rows) * -(-n // tile.tn)
    left = blocks % multiprocessors
    pieces = min(multiprocessors // left, steps // tile.least_steps) if left else 1
    if pieces < 2:
        return Plan(blocks, 1, blocks, min(blocks, multiprocessors))
    items = blocks - left + left * pieces
    return Plan(blocks - left, pieces, items, min(items, multiprocessors))
