"""Rows of ``bench kernels``: every linear of FLUX.1, measured on this machine's GPU, or for every GPU of the INT4 path
from machine code and a model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial

import torch
import triton
from torch import Tensor

from svdq.benchmarks import measure, sass
from svdq.benchmarks.measure import Card, Timing
from svdq.benchmarks.predict import GPUS, Gpu, predict_gemm
from svdq.kernels.epilogue import After
from svdq.kernels.gemm_int4 import gemm_w4a4
from svdq.kernels.gemm_quantize import gemm_gelu_quantize
from svdq.kernels.gemv import gemv_w4a16
from svdq.kernels.int4 import GROUP, PackedAWQ, PackedW4A4
from svdq.kernels.quantize import quantize_act
from svdq.kernels.tiles import Tile, choose_tile

HIDDEN = 3072
TOKENS = (4608, 4096, 512)  # 1024 x 1024 pixels with 512 text tokens: all, image, text
EMULATED_TOKENS = (512,)
RANK = 32
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Op:
    """A GEMM of a FLUX block. name: what runs · linear: where · n, k · unsigned: u4 activations · epilogue: of
    kernels.epilogue.KINDS, or GELU_QUANTIZE (kernels/gemm_quantize.py) · second_k: K of a second, unsigned input."""

    name: str
    linear: str
    n: int
    k: int
    unsigned: bool = False
    epilogue: str = "NONE"
    second_k: int = 0


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
MEASURED_OPS = (
    *OPS,
    Op("gemm_int4_two_inputs+gate_residual", "linear2", HIDDEN, HIDDEN, epilogue="GATE_RESIDUAL", second_k=4 * HIDDEN),
    Op("gemm_int4+gelu_quantize", "fc1", 4 * HIDDEN, HIDDEN, epilogue="GELU_QUANTIZE"),
)
QUANTIZE_INPUTS = (("qkv", HIDDEN, False), ("fc2", 4 * HIDDEN, True))  # linear, K, unsigned
MODULATION = (6 * HIDDEN, HIDDEN)  # N, K of a double block's
MODULATION_ROWS = (1, 2, 8)


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


@dataclass(frozen=True)
class Measured:
    """One measured row: times of one call as in measure.Timing, and what that is of the ceiling.

    value, unit: TOPS of 2 * M * N * K operations, GB/s read and written, or a number of kernels · ceiling: the value
    that cannot be passed, None for emulated arithmetic · ceiling_of: whose it is · percent: value of ceiling.
    """

    op: str
    linear: str
    arch: str
    gpu: str
    m: int
    n: int | None
    k: int
    rank: int | None
    tile: str
    emulated: bool
    us: float
    low_us: float
    high_us: float
    samples: int
    value: float
    unit: str
    ceiling: float | None
    ceiling_of: str
    percent: float | None
    triton: str


def measured_rows(card: Card, progress: Callable[[str], None] = lambda text: None) -> Iterator[dict]:
    """All rows as dictionaries. The first is how long a FLUX step takes to compile: nothing may have run before."""
    progress("compiling")
    yield asdict(_compile_row(card))
    progress("copy bandwidth")
    copy = measure.copy_gbs(card)
    for linear, k, unsigned in QUANTIZE_INPUTS:
        for rank in (0, RANK):
            progress(f"quantize {linear} rank {rank}")
            yield asdict(_quantize_row(card, linear, k, unsigned, rank, copy))
    for m in MODULATION_ROWS:
        progress(f"gemv {m}")
        yield asdict(_gemv_row(card, m, copy))
    for op in MEASURED_OPS if card.has_gemm else ():
        for m in EMULATED_TOKENS if card.emulated else TOKENS:
            for rank in (RANK,) if card.emulated else (0, RANK):
                progress(f"{op.name} {m} x {op.n} x {op.k} rank {rank}")
                yield asdict(_gemm_row(card, op, m, rank))


def _measured(card: Card, op: str, linear: str, m: int, n: int | None, k: int, rank: int | None, timing: Timing,
              value: float, unit: str, ceiling: float | None, ceiling_of: str, tile: str = "",
              emulated: bool = False) -> Measured:  # fmt: skip
    return Measured(
        op=op,
        linear=linear,
        arch=card.arch,
        gpu=card.name,
        m=m,
        n=n,
        k=k,
        rank=rank,
        tile=tile,
        emulated=emulated,
        us=round(timing.us, 2),
        low_us=round(timing.low_us, 2),
        high_us=round(timing.high_us, 2),
        samples=timing.samples,
        value=round(value, 1),
        unit=unit,
        ceiling=None if ceiling is None else round(ceiling, 1),
        ceiling_of=ceiling_of,
        percent=None if ceiling is None else round(100 * value / ceiling, 1),
        triton=triton.__version__,
    )


def _gemm_row(card: Card, op: Op, m: int, rank: int) -> Measured:
    k = op.k + op.second_k
    read = (m + op.n) * k // 2  # codes; the rest is a tenth of it
    timing = measure.time_calls(measure.rotating(lambda: _gemm_call(card, op, m, rank), read, card))
    tile = choose_tile(m, op.n, card.arch, epilogue=op.epilogue)
    return _measured(
        card, op.name, op.linear, m, op.n, k, rank, timing, 2e-6 * m * op.n * k / timing.us, "TOPS",
        card.int4_tops, "no INT4 tensor cores" if card.emulated else "INT4 tensor cores at boost clock",
        f"{tile.block_m}x{tile.block_n}", card.emulated,
    )  # fmt: skip


def _gemm_call(card: Card, op: Op, m: int, rank: int) -> Callable[[], object]:
    """The GEMM on operands of its own."""

    def operand(k: int, unsigned: bool) -> tuple:
        weight = _weight(card, op.n, k, rank, unsigned)
        return *quantize_act(_input(card, m, k, unsigned), weight), weight

    first, bias = operand(op.k, op.unsigned), _bias(card, op.n)
    if op.epilogue == "GELU_QUANTIZE":
        return partial(gemm_gelu_quantize, *first, _weight(card, 128, op.n, rank, True), bias)
    second = operand(op.second_k, True) if op.second_k else None
    return partial(gemm_w4a4, *first, bias, after=_after(card, op, m), second=second)


def _quantize_row(card: Card, linear: str, k: int, unsigned: bool, rank: int, copy_gbs: float) -> Measured:
    m = TOKENS[0]
    weight = _weight(card, 128, k, rank, unsigned)
    inputs = measure.rotating(lambda: _input(card, m, k, unsigned), 2 * m * k, card)
    timing = measure.time_calls([lambda x=x: quantize_act(x, weight) for x in inputs])
    outputs = quantize_act(inputs[0], weight)
    moved = _nbytes(inputs[0], weight.smooth_factor, weight.proj_down, *outputs)
    op = "quantize_u4" if unsigned else "quantize_s4"
    return _measured(card, op, linear, m, None, k, rank, timing, moved / timing.us / 1e3, "GB/s", copy_gbs, "copy")


def _gemv_row(card: Card, m: int, copy_gbs: float) -> Measured:
    n, k = MODULATION
    x, bias = _input(card, m, k), _bias(card, n)
    weights = measure.rotating(lambda: _awq_weight(card, n, k), n * k // 2, card)
    timing = measure.time_calls([lambda w=w: gemv_w4a16(x, w, bias) for w in weights])
    weight = weights[0]
    moved = _nbytes(x, weight.qweight, weight.wscales, weight.wzeros, bias) + m * n * x.element_size()
    return _measured(
        card, "gemv", "modulation", m, n, k, None, timing, moved / timing.us / 1e3, "GB/s", copy_gbs, "copy"
    )


def _compile_row(card: Card) -> Measured:
    """Wall time of the first call of every kernel of a FLUX step with fused epilogues, with an empty Triton cache.

    Making the operands is part of it and takes less than a second.
    """
    fused = [op for op in MEASURED_OPS if op.epilogue not in ("NONE", "GELU")] if card.has_gemm else []
    measure.synchronize()
    with measure.empty_triton_cache() as cache:
        start = time.perf_counter()
        for op in fused:
            for m in TOKENS:
                _gemm_call(card, op, m, RANK)()
        n, k = MODULATION
        gemv_w4a16(_input(card, 1, k), _awq_weight(card, n, k), _bias(card, n))
        measure.synchronize()
        us = (time.perf_counter() - start) * 1e6
        kernels = sum(1 for _ in cache.rglob("*.cubin"))
    return _measured(
        card, "compile all", "a whole step", TOKENS[0], None, HIDDEN, RANK, Timing(us, us, us, 1), kernels, "kernels",
        None, "", emulated=card.emulated,
    )  # fmt: skip


def _weight(card: Card, n: int, k: int, rank: int, unsigned: bool = False) -> PackedW4A4:
    """Random values of the size that a layer has, in no particular order."""
    return PackedW4A4(
        qweight=torch.randint(-128, 128, (n, k // 2), dtype=torch.int8, device=card.device),
        wscales=_uniform(card, k // GROUP, n) * 0.02 + 0.001,
        smooth_factor=_uniform(card, k) + 0.5,
        proj_down=_normal(card, k, rank) * k**-0.5,
        proj_up=_normal(card, n, rank) * 0.3,
        act_unsigned=unsigned,
    )


def _awq_weight(card: Card, n: int, k: int) -> PackedAWQ:
    codes = torch.randint(-(2**31), 2**31, (n // 4, k // 2), dtype=torch.int32, device=card.device)
    return PackedAWQ(codes, _uniform(card, k // GROUP, n) * 0.02, _uniform(card, k // GROUP, n) * -0.1, splits=6)


def _input(card: Card, m: int, k: int, unsigned: bool = False) -> Tensor:
    x = _normal(card, m, k)
    return torch.nn.functional.gelu(x, approximate="tanh") if unsigned else x


def _bias(card: Card, n: int) -> Tensor:
    return _normal(card, n)


def _after(card: Card, op: Op, m: int) -> After:
    if op.epilogue == "GATE_RESIDUAL":
        return After(gate=_normal(card, 1, op.n), residual=_normal(card, m, op.n))
    if op.epilogue == "NORM_ROPE":
        norm = _uniform(card, 128) + 0.5
        return After(norm_q=norm, norm_k=norm, rotary=_uniform(card, m, 64, 2).float())
    return After(gelu=op.epilogue == "GELU")


def _normal(card: Card, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=DTYPE, device=card.device)


def _uniform(card: Card, *shape: int) -> Tensor:
    return torch.rand(*shape, dtype=DTYPE, device=card.device)


def _nbytes(*tensors: Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)
