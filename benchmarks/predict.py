"""Predicted time of the INT4 GEMM on GPUs that are not here: a small model, written out in docs/kernels.md.

The busiest multiprocessor's work is the sum of what its sub-cores must issue; L2 and device memory are two more limits;
the largest of the three is the prediction. It knows no latencies: it is a ceiling for a kernel that hides them.
"""

from __future__ import annotations

from dataclasses import dataclass

from svdq.kernels.tiles import GROUP_BYTES_PER_ROW, Tile

SUB_CORES = 4  # of a multiprocessor; each issues one instruction per cycle
MMA_OPS = 2 * 16 * 8 * 64  # operations of one m16n8k64
FMA_PER_MMA = 8  # float32: two for each of the four outputs a lane has


@dataclass(frozen=True)
class Gpu:
    """Rates from vendors' documents, per sub-core: cycles one instruction occupies its unit.

    sms · ghz: boost clock · mma_cycles: m16n8k64 s4 · hmma_cycles: m16n8k16 bf16, float32 sums · fma_cycles: a warp's
    float32 instruction · l2_gbs, dram_gbs: bandwidths; l2_gbs is an assumption (measurements by others vary).
    """

    name: str
    arch: str
    sms: int
    ghz: float
    mma_cycles: int
    hmma_cycles: int
    fma_cycles: int
    l2_gbs: float
    dram_gbs: float

    @property
    def int4_ops(self) -> float:
        """Operations per second of the INT4 tensor cores."""
        return MMA_OPS / self.mma_cycles * SUB_CORES * self.sms * self.ghz * 1e9


GPUS = (
    Gpu("A100", "sm_80", 108, 1.41, 8, 8, 2, 4500.0, 1555.0),
    Gpu("RTX 3090", "sm_86", 82, 1.695, 16, 32, 1, 2200.0, 936.0),
    Gpu("RTX 4090", "sm_89", 128, 2.52, 16, 32, 1, 5000.0, 1008.0),
)


@dataclass(frozen=True)
class Prediction:
    """seconds, and the seconds of each limit: issue and units of the busiest multiprocessor, L2, device memory."""

    sm: float
    l2: float
    dram: float

    @property
    def seconds(self) -> float:
        return max(self.sm, self.l2, self.dram)

    @property
    def limit(self) -> str:
        """Which of the three it is."""
        return max((self.sm, "multiprocessor"), (self.l2, "L2"), (self.dram, "device memory"))[1]


def predict_gemm(
    gpu: Gpu, tile: Tile, m: int, n: int, k: int, rank: int, instructions_per_mma: float, epilogue_instructions: int
) -> Prediction:
    """Predicted time of one GEMM of M x N x K with a low-rank branch; the last two arguments come from sass.py."""
    groups = k // 64
    tiles_per_block = tile.block_m // 16 * (tile.block_n // 8)
    mma_per_sub_core = tiles_per_block * groups / SUB_CORES
    cycle_per_mma = max(gpu.mma_cycles, instructions_per_mma, FMA_PER_MMA * gpu.fma_cycles)
    low_rank = tiles_per_block * (rank // 16) * gpu.hmma_cycles / SUB_CORES
    epilogue = epilogue_instructions * tile.warps / SUB_CORES
    cycles_per_block = mma_per_sub_core * cycle_per_mma + low_rank + epilogue
    resident = max(1, tile.blocks_per_sm(gpu.arch))
    # Blocks of one multiprocessor run side by side, `resident` at a time, and share its sub-cores.
    blocks_of_busiest = -(-tile.blocks(m, n) // (gpu.sms * resident)) * resident
    blocks_of_busiest = min(blocks_of_busiest, -(-tile.blocks(m, n) // gpu.sms))
    l2_bytes = tile.blocks(m, n) * groups * (tile.block_m + tile.block_n) * GROUP_BYTES_PER_ROW
    dram_bytes = (m + n) * groups * GROUP_BYTES_PER_ROW + 2 * m * n + (4 * m + 2 * n) * rank
    return Prediction(
        sm=blocks_of_busiest * cycles_per_block / (gpu.ghz * 1e9),
        l2=l2_bytes / (gpu.l2_gbs * 1e9),
        dram=dram_bytes / (gpu.dram_gbs * 1e9),
    )
