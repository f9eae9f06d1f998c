"""Tile choice of the INT4 GEMM: a pure function of shape, architecture and output. No autotune, no device query.

The figures behind the choice: a warp of 64 x 64 outputs has the leanest main loop (11.4 to 11.9 instructions per MMA,
13.1 for 32 x 64) but takes all 255 registers of its threads, so 8 such warps fill a multiprocessor. One block of 8
warps reads a quarter less from L2 than two of 4; two of 4 fill the last wave better and wait for each other less.
"""

from __future__ import annotations

from dataclasses import dataclass

GROUP_BYTES_PER_ROW = 34  # one row or column of one scale group: 32 bytes of codes, 2 of scale

# Shared memory in bytes that one block may use, and that a multiprocessor has for all its blocks.
SHARED_PER_BLOCK = {"sm_80": 163 * 1024, "sm_86": 99 * 1024, "sm_89": 99 * 1024, "sm_90": 227 * 1024}
SHARED_PER_SM = {"sm_80": 164 * 1024, "sm_86": 100 * 1024, "sm_89": 100 * 1024, "sm_90": 228 * 1024}
SHARED_RESERVED = 1024  # taken by the system for each block
REGISTERS_PER_SM = 65536
# Registers a thread needs at most, by its number of float32 accumulators (tests/test_gemm_int4.py keeps them true).
REGISTERS = {128: 255, 64: 168}
BLOCKS_WANTED = 96  # about one block per multiprocessor: with fewer a smaller tile is taken


@dataclass(frozen=True)
class Tile:
    """block_m x block_n outputs per block, computed by warps_m x warps_n warps · stages of 128 columns of K in shared
    memory, all but one of them under way · group_m row blocks are visited before the next column block."""

    block_m: int
    block_n: int
    warps_m: int
    warps_n: int
    stages: int
    group_m: int = 8

    @property
    def warps(self) -> int:
        return self.warps_m * self.warps_n

    @property
    def m16_per_warp(self) -> int:
        return self.block_m // 16 // self.warps_m

    @property
    def n8_per_warp(self) -> int:
        return self.block_n // 8 // self.warps_n

    @property
    def constants(self) -> dict[str, int]:
        """The kernels' compile-time arguments that say how a block is cut."""
        return {
            "M16": self.m16_per_warp,
            "N8": self.n8_per_warp,
            "WARPS_M": self.warps_m,
            "WARPS_N": self.warps_n,
            "STAGES": self.stages,
            "GROUP_M": self.group_m,
        }

    @property
    def accumulators(self) -> int:
        """float32 accumulator registers of one thread."""
        return self.m16_per_warp * self.n8_per_warp * 4

    @property
    def shared_bytes(self) -> int:
        """Bytes of shared memory: per stage, two groups of codes and scales of every row and column."""
        return self.stages * 2 * (self.block_m + self.block_n) * GROUP_BYTES_PER_ROW

    def blocks(self, m: int, n: int) -> int:
        """Blocks of a GEMM with M x N outputs."""
        return -(-m // self.block_m) * (n // self.block_n)

    def blocks_per_sm(self, arch: str) -> int:
        """Blocks that fit a multiprocessor side by side, by shared memory and by registers."""
        by_shared = SHARED_PER_SM[arch] // (self.shared_bytes + SHARED_RESERVED)
        registers = -(-REGISTERS[self.accumulators] // 8) * 8  # handed out by eights
        return min(by_shared, REGISTERS_PER_SM // (registers * 32 * self.warps))

    def problem(self, n: int, arch: str) -> str | None:
        """Why this tile cannot compute N columns on ``arch``, or None."""
        if self.block_m % 64 or self.m16_per_warp not in (2, 4) or self.block_m % (16 * self.warps_m):
            return f"{self}: a block takes whole blocks of 64 rows, a warp 32 or 64 rows"
        if self.block_n % 128 or self.n8_per_warp not in (4, 8, 16) or self.block_n % (8 * self.warps_n):
            return f"{self}: a block takes whole tiles of 128 columns, a warp 32, 64 or 128 columns"
        if self.accumulators not in REGISTERS:
            return f"{self}: {self.accumulators} accumulators a thread, expected one of {sorted(REGISTERS)}"
        if self.stages < 2:
            return f"{self}: at least 2 stages are needed, one to compute and one to load"
        if n % self.block_n:
            return f"{self}: N is {n}, not a multiple of {self.block_n}"
        if self.shared_bytes > SHARED_PER_BLOCK[arch]:
            return f"{self}: {self.shared_bytes} bytes of shared memory, {arch} has {SHARED_PER_BLOCK[arch]}"
        return None


# Largest first. sm_90 only emulates INT4: it runs the tiles of sm_86, for tests.
_SM86 = (
    Tile(256, 128, 4, 2, stages=3),  # 77 KB, one block per multiprocessor
    Tile(128, 128, 2, 2, stages=2),  # 34 KB, two
    Tile(64, 128, 2, 2, stages=3),  # 38 KB, two: warps of 32 x 64, for little work
)
_SM80 = (
    Tile(256, 128, 4, 2, stages=4),  # 102 KB, one block per multiprocessor
    Tile(128, 128, 2, 2, stages=4),  # 68 KB, two
    Tile(64, 128, 2, 2, stages=3),  # 38 KB, three
)
TILES = {"sm_80": _SM80, "sm_86": _SM86, "sm_89": _SM86, "sm_90": _SM86}


def choose_tile(m: int, n: int, arch: str, out_bits: int = 16, epilogue: str = "NONE") -> Tile:
    """The largest tile that gives M x N outputs enough blocks to fill a GPU, or the smallest one.

    epilogue: a name of ``epilogue.KINDS``, or GELU_QUANTIZE (gemm_quantize.py). Raises ValueError for an ``arch``
    without a table.
    """
    if arch not in TILES:
        raise ValueError(f"no INT4 tiles for {arch}, expected one of {', '.join(TILES)}")
    if out_bits == 32:
        return TILES[arch][-1]  # the stores of larger warps spill registers
    # With a GELU behind it the main loop of the largest tile spills registers.
    tiles = TILES[arch][1:] if epilogue.startswith("GELU") else TILES[arch]
    return next((tile for tile in tiles if tile.blocks(m, n) >= BLOCKS_WANTED), tiles[-1])
