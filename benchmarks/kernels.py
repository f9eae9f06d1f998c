"""Rows of ``bench kernels``: every linear of FLUX.1 on every GPU of the INT4 path, from machine code and a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import triton

from svdq.benchmarks import sass
from svdq.benchmarks.predict import GPUS, Gpu, predict_gemm
from svdq.kernels.tiles import Tile, choose_tile

HIDDEN = 3072
TOKENS = (4608, 4096, 512)  # 1024 x 1024 pixels with 512 text tokens: all, image, text
RANK = 32


@dataclass(frozen=True)
class Op:
    """A GEMM of a FLUX block. name: what runs · linear: where · n, k · unsigned: u4 activations · epilogue: of
    kernels.epilogue.KINDS."""

    name: str
    linear: str
    n: int
    k: int
    unsigned: bool = False
    epilogue: str = "NONE"


OPS = (
    Op("gemm_int4", "qkv", 3 * HIDDEN, HIDDEN),
    Op("gemm_int4", "proj", HIDDEN, HIDDEN),
    Op("gemm_int4", "fc1", 4 * HIDDEN, HIDDEN),
    Op("gemm_int4_u4", "fc2", HIDDEN, 4 * HIDDEN, unsigned=True),
    Op("gemm_int4+norm_rope", "qkv", 3 * HIDDEN, HIDDEN, epilogue="NORM_ROPE"),
    Op("gemm_int4+gate_residual", "proj", HIDDEN, HIDDEN, epilogue="GATE_RESIDUAL"),
    Op("gemm_int4+gelu", "fc1", 4 * HIDDEN, HIDDEN, epilogue="GELU"),
    Op("gemm_int4_u4+gate_residual", "fc2", HIDDEN, 4 * HIDDEN, unsigned=True, epilogue="GATE_RESIDUAL"),
)


@dataclass(frozen=True)
class Row:
    """One row: static figures of the machine code as in sass.Figures, and the model's prediction.

    tile: block_m x block_n · predicted_us, predicted_tops: 2 * M * N * K operations over the predicted time · limit:
    what the model says it is bound by · ceiling_tops: of the INT4 tensor cores at boost clock.
    """

    op: str
    linear: str
    arch: str
    gpu: str
    m: int
    n: int
    k: int
    rank: int
    tile: str
    instructions_per_mma: float
    registers: int
    spill_bytes: int
    shared_bytes: int
    epilogue_instructions: int
    predicted_us: float
    predicted_tops: float
    limit: str
    ceiling_tops: float
    triton: str


def static_rows(progress: Callable[[str], None] = lambda text: None) -> Iterator[dict]:
    """All rows as dictionaries; needs no GPU. Compiles about 30 kernels, which Triton caches on disk."""
    figures: dict[tuple, sass.Figures] = {}
    for gpu in GPUS:
        for op in OPS:
            for m in TOKENS:
                tile = choose_tile(m, op.n, gpu.arch, epilogue=op.epilogue)
                key = (tile, gpu.arch, op.unsigned, op.epilogue)
                if key not in figures:
                    progress(f"{gpu.arch} {op.name} {tile.block_m} x {tile.block_n}")
                    figures[key] = sass.gemm_int4_figures(
                        tile, gpu.arch, act_unsigned=op.unsigned, after=op.epilogue
                    )
                for rank in (0, RANK):
                    yield asdict(_row(gpu, op, m, rank, tile, figures[key]))


def _row(gpu: Gpu, op: Op, m: int, rank: int, tile: Tile, f: sass.Figures) -> Row:
    prediction = predict_gemm(gpu, tile, m, op.n, op.k, rank, f.instructions_per_mma, f.epilogue_instructions)
    operations = 2 * m * op.n * op.k
    return Row(
        op=op.name,
        linear=op.linear,
        arch=gpu.arch,
        gpu=gpu.name,
        m=m,
        n=op.n,
        k=op.k,
        rank=rank,
        tile=f"{tile.block_m}x{tile.block_n}",
        instructions_per_mma=round(f.instructions_per_mma, 2),
        registers=f.registers,
        spill_bytes=f.spill_bytes,
        shared_bytes=f.shared_bytes,
        epilogue_instructions=f.epilogue_instructions,
        predicted_us=round(prediction.seconds * 1e6, 1),
        predicted_tops=round(operations / prediction.seconds / 1e12, 1),
        limit=prediction.limit,
        ceiling_tops=round(gpu.int4_ops / 1e12, 1),
        triton=triton.__version__,
    )
