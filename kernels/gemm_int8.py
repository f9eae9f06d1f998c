"""INT8 GEMM + low-rank up + bias: Hopper, and every GPU that has no INT4 tensor cores.

    out[m, n] = scales[m] * w.scales[n] * sum_k codes[m, k] * w.q[n, k] + lora_act[m] . proj_up[n] + bias[n]

Contract: ``reference.quantize_act_int8``, ``expand_w4_to_int8`` and ``gemm_w8a8``. Codes and weights are plain int8
matrices with K contiguous, as INT8 tensor cores want both operands. The integer sum is exact; what follows is float32
and is rounded once. Unsigned activation codes c stand for c + 128: 128 times a weight row's sum joins the integer sum.

Two kernels: the one here, in plain Triton, and ``gluon_hopper.py`` for sm_90 with the Triton it is written for. Weights
are made from the INT4 checkpoint by ``weights_int8.py``: for good, or into a scratch buffer just before each GEMM.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arrivals import arrivals
from .device import FMA, describe, multiprocessors
from .epilogue import KINDS, After, require
from .int4 import RANK_MULTIPLE
from .tiles_int8 import BLOCK, HOPPER, NO_PIECES, HopperTile, Tile, choose_tile, low_rank_boxes, plan_items
from .weights_int8 import W8

HEAD = tl.constexpr(128)
EPS = tl.constexpr(1e-6)
_GELU = tl.constexpr(1)  # numbers of epilogue.KINDS
_GATE_RESIDUAL = tl.constexpr(2)
_NORM_ROPE = tl.constexpr(3)

HOPPER_TRITON = "3.6."  # versions that compile gluon_hopper.py begin so: Gluon's names change from one to the next


# ---- the plain Triton kernel


@triton.jit
def _dot(a, w, row, column, M, N, K, TMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """sum_k a[row + i, k] * w[column + j, k] as int32 [BM, BN]; a, w: tensor descriptors or pointers."""
    acc = tl.zeros([BM, BN], dtype=tl.int32)
    if TMA:
        for k in range(0, K, BK):
            acc = tl.dot(a.load([row, k]), w.load([column, k]).T, acc, out_dtype=tl.int32)
    else:
        # Rows and columns beyond the last repeat it: they are not stored.
        offs_k = tl.arange(0, BK)
        offs_m = tl.minimum(row + tl.arange(0, BM), M - 1)
        offs_n = tl.minimum(column + tl.arange(0, BN), N - 1)
        a += offs_m.to(tl.int64)[:, None] * K + offs_k[None, :]
        w += offs_n.to(tl.int64)[None, :] * K + offs_k[:, None]
        for _ in range(0, K, BK):
            acc = tl.dot(tl.load(a), tl.load(w), acc, out_dtype=tl.int32)
            a += BK
            w += BK
    return acc


@triton.jit
def _scale(acc, scales_ptr, wscales_ptr, sums_ptr, offs_m, offs_n, M, N, UNSIGNED: tl.constexpr):
    """The integer sum as float32 values."""
    if UNSIGNED:
        acc += (tl.load(sums_ptr + offs_n, mask=offs_n < N, other=0) * 128)[None, :]
    scales = tl.load(scales_ptr + offs_m, mask=offs_m < M, other=0.0)
    wscales = tl.load(wscales_ptr + offs_n, mask=offs_n < N, other=0.0)
    return acc.to(tl.float32) * scales[:, None] * wscales[None, :]


@triton.jit
def _norm_rope(y, offs_m, column, norm_q_ptr, norm_k_ptr, rotary_ptr, M, N):
    """RMSNorm and RoPE of the heads of 128 that begin at ``column``; heads in the last third of N are left alone."""
    BM: tl.constexpr = y.shape[0]
    HEADS: tl.constexpr = y.shape[1] // HEAD
    third = (column // HEAD + tl.arange(0, HEADS)) // (N // (3 * HEAD))
    pair = tl.arange(0, HEAD // 2)
    even, odd = tl.split(tl.reshape(y, [BM, HEADS, HEAD // 2, 2]))
    inverse = tl.rsqrt(tl.sum(even * even + odd * odd, axis=2) * (1.0 / HEAD) + EPS)
    q0, q1 = tl.load(norm_q_ptr + 2 * pair), tl.load(norm_q_ptr + 2 * pair + 1)
    k0, k1 = tl.load(norm_k_ptr + 2 * pair), tl.load(norm_k_ptr + 2 * pair + 1)
    is_q = (third == 0)[:, None]
    plain = (third >= 2)[None, :, None]
    norm0 = tl.where(is_q, q0[None, :], k0[None, :]).to(tl.float32)
    norm1 = tl.where(is_q, q1[None, :], k1[None, :]).to(tl.float32)
    even = even * tl.where(plain, 1.0, inverse[:, :, None] * norm0[None, :, :])
    odd = odd * tl.where(plain, 1.0, inverse[:, :, None] * norm1[None, :, :])
    offs = tl.minimum(offs_m, M - 1)[:, None] * HEAD + 2 * pair[None, :]
    sine = tl.where(plain, 0.0, tl.load(rotary_ptr + offs)[:, None, :])
    cosine = tl.where(plain, 1.0, tl.load(rotary_ptr + offs + 1)[:, None, :])
    return tl.reshape(tl.join(even * cosine - odd * sine, even * sine + odd * cosine), [BM, HEADS * HEAD])


@triton.jit(do_not_specialize=["M", "rows_per_gate"])
def _gemm_w8a8_kernel(
    a, w, a2, w2, scales_ptr, wscales_ptr, sums_ptr, scales2_ptr, wscales2_ptr, sums2_ptr,
    lora_act_ptr, proj_up_ptr, bias_ptr, out_ptr, gate_ptr, residual_ptr, norm_q_ptr, norm_k_ptr, rotary_ptr,
    M, N, K, K2, R, stride_out, rows_per_gate,
    UNSIGNED: tl.constexpr, UNSIGNED2: tl.constexpr, SECOND: tl.constexpr, BIAS: tl.constexpr, EPILOGUE: tl.constexpr,
    ONE_GATE: tl.constexpr, RANKS: tl.constexpr, TMA: tl.constexpr, FLATTEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Blocks of BM x BN, one program after the other taking the next · RANKS: low-rank columns at a time."""
    blocks_m = tl.cdiv(M, BM)
    blocks_n = tl.cdiv(N, BN)
    in_group = GROUP_M * blocks_n
    for block in tl.range(tl.program_id(0), blocks_m * blocks_n, tl.num_programs(0), flatten=FLATTEN):
        # Down GROUP_M row blocks before the next column block.
        first_m = block // in_group * GROUP_M
        group_m = tl.minimum(blocks_m - first_m, GROUP_M)
        row = (first_m + block % in_group % group_m) * BM
        column = block % in_group // group_m * BN
        offs_m = row + tl.arange(0, BM)
        offs_n = column + tl.arange(0, BN)
        y = _scale(
            _dot(a, w, row, column, M, N, K, TMA, BM, BN, BK),
            scales_ptr, wscales_ptr, sums_ptr, offs_m, offs_n, M, N, UNSIGNED,
        )  # fmt: skip
        if SECOND:
            y += _scale(
                _dot(a2, w2, row, column, M, N, K2, TMA, BM, BN, BK),
                scales2_ptr, wscales2_ptr, sums2_ptr, offs_m, offs_n, M, N, UNSIGNED2,
            )  # fmt: skip
        last_m = tl.minimum(offs_m, M - 1).to(tl.int64)
        last_n = tl.minimum(offs_n, N - 1)
        if RANKS > 0:
            for r in range(0, R, RANKS):
                offs_r = r + tl.arange(0, RANKS)
                lora_act = tl.load(lora_act_ptr + last_m[:, None] * R + offs_r[None, :])
                proj_up = tl.load(proj_up_ptr + last_n[None, :] * R + offs_r[:, None])
                y = tl.dot(lora_act, proj_up, y)
        if BIAS:
            y += tl.load(bias_ptr + last_n).to(tl.float32)[None, :]
        if EPILOGUE == _GELU:
            u = y * (0.7978845608028654 + 0.035677408136300125 * y * y)
            y = y / (1.0 + tl.exp2(u * -2.8853900817779268))
        elif EPILOGUE == _GATE_RESIDUAL:
            if ONE_GATE:
                y *= tl.load(gate_ptr + last_n).to(tl.float32)[None, :]
            else:
                y *= tl.load(gate_ptr + (last_m // rows_per_gate)[:, None] * N + last_n[None, :]).to(tl.float32)
            y += tl.load(residual_ptr + last_m[:, None] * N + last_n[None, :]).to(tl.float32)
        elif EPILOGUE == _NORM_ROPE:
            y = _norm_rope(y, offs_m, column, norm_q_ptr, norm_k_ptr, rotary_ptr, M, N)
        if out_ptr.dtype.element_ty == tl.float16:
            y = tl.clamp(y, -65504.0, 65504.0)
        tl.store(
            out_ptr + offs_m.to(tl.int64)[:, None] * stride_out + offs_n[None, :],
            y.to(out_ptr.dtype.element_ty),
            mask=(offs_m < M)[:, None] & (offs_n < N)[None, :],
        )


@dataclass(frozen=True)
class _Call:
    """Checked operands of gemm_w8a8; first and second: codes, scales and weight."""

    first: tuple[Tensor, Tensor, W8]
    second: tuple[Tensor, Tensor, W8] | None
    lora_act: Tensor
    proj_up: Tensor
    bias: Tensor | None
    after: After
    out: Tensor

    @property
    def after_tensors(self) -> tuple[Tensor, ...]:
        """bias, gate, residual, norm_q, norm_k, rotary; the output stands for those that there are not."""
        after = self.after
        tensors = (self.bias, after.gate, after.residual, after.norm_q, after.norm_k, after.rotary)
        return tuple(self.out if tensor is None else tensor for tensor in tensors)

    @property
    def rows_per_gate(self) -> int:
        return 0 if self.after.gate is None else self.out.shape[0] // self.after.gate.shape[0]


def _run_triton(tile: Tile, call: _Call) -> None:
    """The plain Triton kernel."""
    (codes, scales, w), (codes2, scales2, w2) = call.first, call.second or call.first
    m, n = call.out.shape
    rank = call.proj_up.shape[1]
    matrices = (codes, w.q, codes2, w2.q)
    if tile.tma:
        from triton.tools.tensor_descriptor import TensorDescriptor

        a_block, w_block = [tile.block_m, tile.block_k], [tile.block_n, tile.block_k]
        matrices = tuple(
            TensorDescriptor.from_tensor(matrix, block)
            for matrix, block in zip(matrices, (a_block, w_block) * 2, strict=True)
        )
    blocks = -(-m // tile.block_m) * -(-n // tile.block_n)
    _gemm_w8a8_kernel[(min(blocks, multiprocessors(codes.device)) if tile.tma else blocks,)](
        *matrices,
        scales,
        w.scales,
        w.sums,
        scales2,
        w2.scales,
        w2.sums,
        call.lora_act if rank else call.out,
        call.proj_up if rank else call.out,
        *call.after_tensors[:1],
        call.out,
        *call.after_tensors[1:],
        m,
        n,
        w.k,
        w2.k,
        rank,
        call.out.stride(0),
        call.rows_per_gate,
        UNSIGNED=w.act_unsigned,
        UNSIGNED2=w2.act_unsigned,
        SECOND=call.second is not None,
        BIAS=call.bias is not None,
        EPILOGUE=KINDS.index(call.after.name),
        ONE_GATE=call.rows_per_gate == m,
        RANKS=next(r for r in (64, 32, 16) if rank % r == 0) if rank else 0,
        TMA=tile.tma,
        FLATTEN=tile.flatten,
        BM=tile.block_m,
        BN=tile.block_n,
        BK=tile.block_k,
        GROUP_M=tile.group_m,
        num_warps=tile.warps,
        **FMA,
        num_stages=tile.stages,
    )


def _run_hopper(tile: HopperTile, call: _Call) -> None:
    """The kernel of ``gluon_hopper.py``; of ``tile`` what depends on the operands is filled in here."""
    from . import gluon_hopper

    (codes, scales, w), (codes2, scales2, w2) = call.first, call.second or call.first
    m, n = call.out.shape
    rank = call.proj_up.shape[1]
    steps1, steps2 = w.k // 128, w2.k // 128 if call.second else 0
    # Sums of pieces that belong to inputs with different scales could not be added up.
    cut = NO_PIECES if call.second else tile
    plan = plan_items(m, n, steps1 + steps2, cut, multiprocessors(codes.device))
    ranks, boxes = low_rank_boxes(rank)
    tile = replace(
        tile,
        join=0,
        ranks=ranks,
        boxes=boxes,
        second=call.second is not None,
        unsigned=w.act_unsigned,
        unsigned2=w2.act_unsigned,
        epilogue=KINDS.index(call.after.name),
        one_gate=call.rows_per_gate == m,
    )
    counter = partial = arrivals("gemm_w8a8", codes.device, 4 * multiprocessors(codes.device))
    elements = plan.partial_elements(tile.second)
    if elements:
        partial = torch.empty(elements, dtype=torch.float32 if tile.second else torch.int32, device=codes.device)

    a, b = _describe_matrix(codes, 128), _describe_matrix(w.q, 128)
    a2, b2 = (_describe_matrix(codes2, 128), _describe_matrix(w2.q, 128)) if call.second else (a, b)
    lora, up = a, b
    if rank:
        lora, up = _describe_matrix(call.lora_act, ranks), _describe_matrix(call.proj_up, ranks)
    bias, gate, residual, norm_q, norm_k, rotary = call.after_tensors
    beside = residual if call.after.rotary is None else rotary.view(m, -1)
    gluon_hopper.gemm_w8a8_hopper_kernel[(plan.grid,)](
        a,
        b,
        a2,
        b2,
        lora,
        up,
        _describe_matrix(beside, 64),
        _describe_matrix(call.out, 64),
        scales,
        w.scales,
        w.sums,
        scales2,
        w2.scales,
        w2.sums,
        bias,
        gate,
        norm_q,
        norm_k,
        partial,
        counter,
        m,
        n,
        steps1,
        steps2,
        rank,
        plan.whole,
        plan.pieces,
        plan.items,
        call.rows_per_gate,
        0 if call.bias is None else n,
        C=tile,
        num_warps=4,
        **FMA,
    )


def _describe_matrix(matrix: Tensor, columns: int):
    """What the copy engine needs to know to load or store BLOCK rows and ``columns`` columns of a matrix."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    layout = _staged_layout(columns, matrix.element_size())
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [BLOCK, columns], layout)


@functools.cache
def _staged_layout(columns: int, width: int):
    from triton.experimental.gluon import language as gl

    return gl.NVMMASharedLayout(min(128, columns * width), width * 8, 2)


def takes_hopper(out: Tensor, dtype: torch.dtype, architecture: str) -> bool:
    """Whether the Hopper kernel can write ``out``. dtype: of the low-rank factors."""
    if architecture != "sm_90" or not triton.__version__.startswith(HOPPER_TRITON) or out.dtype != dtype:
        return False
    return out.data_ptr() % 16 == 0 and out.stride(0) * out.element_size() % 16 == 0  # as the copy engine wants it


# ---- whichever kernel


def gemm_w8a8(
    codes: Tensor,
    scales: Tensor,
    lora_act: Tensor,
    weight: W8,
    proj_up: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    after: After | None = None,
    out: Tensor | None = None,
    second: tuple[Tensor, Tensor, W8] | None = None,
    tile: Tile | HopperTile | None = None,
) -> Tensor:
    """As :func:`kernels.reference.gemm_w8a8`, on one GPU; what follows the GEMM as in ``epilogue.py``.

    codes: int8 [M, K] · scales: float32 [M] · lora_act: T or float32 [M, R], rounded to T · proj_up: T [N, R], natural
    order · bias: [N], any float dtype, or None · after: what else is done before rounding · out: [M, N] to write to, of
    which rows may be apart; its type is then out_dtype · second: codes [M, K2], scales [M] and weight [N, K2] of a
    second input whose product is added before anything is rounded; lora_act and proj_up then hold both low-rank
    branches side by side · tile: for tests and benchmarks; a HopperTile asks for the kernel of gluon_hopper.py, which
    writes T only. Returns [M, N] in ``out_dtype`` (bf16, fp16 or float32, default T); fp16 saturates at 65504. N, K and
    K2 are multiples of 128, R of 16. Raises ValueError where operands do not fit.
    """
    m, rank = lora_act.shape
    n = weight.n
    dtype = proj_up.dtype
    after = after or After()
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"proj_up is {dtype}, expected torch.bfloat16 or torch.float16")
    operands = ((codes, scales, weight), second or (codes, scales, weight))
    for part_codes, part_scales, part_weight in operands:
        k = part_weight.k
        if n % 128 or k % 128 or rank % RANK_MULTIPLE:
            raise ValueError(f"N, K, R are {n}, {k}, {rank}, expected multiples of 128, 128, {RANK_MULTIPLE}")
        require("codes", part_codes, (m, k), torch.int8)
        require("scales", part_scales, (m,), torch.float32)
        require("weight q", part_weight.q, (n, k), torch.int8)
        require("weight scales", part_weight.scales, (n,), torch.float32)
        require("weight sums", part_weight.sums, (n,), torch.int32)
    lora_act = lora_act.to(dtype)
    require("lora_act", lora_act, (m, rank), dtype)
    require("proj_up", proj_up, (n, rank), dtype)
    if bias is not None:
        require("bias", bias, (n,), bias.dtype)
    after.check(m, n, dtype)
    if out is None:
        out = torch.empty(m, n, dtype=out_dtype or dtype, device=codes.device)
    elif tuple(out.shape) != (m, n) or out.stride(1) != 1:
        raise ValueError(f"out is {list(out.shape)}, strides {out.stride()}, expected {[m, n]} with contiguous rows")
    if out.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"out is {out.dtype}, expected torch.bfloat16, torch.float16 or torch.float32")
    if m == 0:
        return out
    call = _Call((codes, scales, weight), second, lora_act, proj_up, bias, after, out)
    architecture = describe(codes.device).architecture
    with torch.cuda.device_of(codes):
        if tile is None:
            plain = choose_tile(m, n, architecture, second is not None, after.name)
            tile = HOPPER if takes_hopper(out, dtype, architecture) else plain
        _run_triton(tile, call) if isinstance(tile, Tile) else _run_hopper(tile, call)
    return out
