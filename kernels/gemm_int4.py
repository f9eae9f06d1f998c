"""INT4 GEMM + low-rank up + bias on INT4 tensor cores (sm_80, 86, 89; emulated, slowly, on sm_90), in Gluon.

Formula and main loop: ``int4_block.py``. What may follow in the same kernel: ``epilogue.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import act_layout
from .device import FMA, describe
from .epilogue import KINDS, After, finish_rows, require
from .gluon_compat import gl, gluon
from .int4 import GROUP, RANK_MULTIPLE, PackedW4A4
from .int4_block import block_place, multiply_block, opaque, shared_buffers
from .tiles import Tile, choose_tile

TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}  # as epilogue.BF16 and so on
Operand = tuple[Tensor, Tensor, Tensor, PackedW4A4]


@gluon.jit(do_not_specialize=["M", "row_blocks", "bias_size", "rows_per_gate"])
def gemm_w4a4_kernel(
    act_ptr, ascales_ptr, qweight_ptr, wscales_ptr, lora_act_ptr, proj_up_ptr,
    act2_ptr, ascales2_ptr, qweight2_ptr, wscales2_ptr, lora_act2_ptr, proj_up2_ptr,
    bias_ptr, out_ptr, gate_ptr, residual_ptr, norm_q_ptr, norm_k_ptr, rotary_ptr,
    M, N, K, R, K2, R2, stride_out, row_blocks, bias_size, rows_per_gate,
    ACT_UNSIGNED: gl.constexpr, ACT2_UNSIGNED: gl.constexpr, PARTS: gl.constexpr,
    T: gl.constexpr, OUT: gl.constexpr, EPILOGUE: gl.constexpr,
    M16: gl.constexpr, N8: gl.constexpr, WARPS_M: gl.constexpr, WARPS_N: gl.constexpr, STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
):  # fmt: skip
    """One block of outputs, M16 x N8 MMA tiles a warp; with two PARTS the sum of two products. Codes, scales (pairs)
    and proj_up (pairs) are int32 words; so is a 16-bit out; stride_out counts its elements. A stage is two groups, 128
    columns: K is a multiple of 128."""
    m16: gl.constexpr = M16 * WARPS_M
    n16: gl.constexpr = N8 * WARPS_N // 2
    # Distributed layout of the accumulators. The last two numbers of `order` put neighbouring warps along M.
    P: gl.constexpr = gl.BlockedLayout([M16, N8, 1], [1, 1, 32], [WARPS_M, WARPS_N, 1], [2, 0, 1])
    pid_m, pid_n = block_place(gl.program_id(0), N // (n16 * 16), row_blocks, m16, GROUP_M)
    first = (act_ptr, ascales_ptr, qweight_ptr, wscales_ptr, lora_act_ptr, proj_up_ptr, K, R)
    second = (act2_ptr, ascales2_ptr, qweight2_ptr, wscales2_ptr, lora_act2_ptr, proj_up2_ptr, K2, R2)
    buffers = shared_buffers(m16, n16, STAGES)
    c0, c1, c2, c3 = multiply_block(first, second, bias_ptr, bias_size, M, N, row_blocks, pid_m, pid_n, buffers,
                                    ACT_UNSIGNED, ACT2_UNSIGNED, PARTS, T, P, STAGES)  # fmt: skip
    tile_m = opaque(pid_m * m16)  # or addresses of the output would be kept through the main loop
    tile_n = pid_n * n16
    finish_rows(c0, c1, 0, out_ptr, gate_ptr, residual_ptr, norm_q_ptr, norm_k_ptr, rotary_ptr, M, N, stride_out,
                rows_per_gate, tile_m, tile_n, EPILOGUE, T, OUT, P)  # fmt: skip
    finish_rows(c2, c3, 1, out_ptr, gate_ptr, residual_ptr, norm_q_ptr, norm_k_ptr, rotary_ptr, M, N, stride_out,
                rows_per_gate, tile_m, tile_n, EPILOGUE, T, OUT, P)  # fmt: skip


def gemm_w4a4(
    codes: Tensor,
    ascales: Tensor,
    lora_act: Tensor,
    weight: PackedW4A4,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    after: After | None = None,
    tile: Tile | None = None,
    second: Operand | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """As :func:`kernels.reference.gemm_w4a4`, on packed operands of one GPU.

    codes: int32 [B, G, 512] and ascales: T [B, G, 64] in the order of ``act_layout.py``, B = ceil(M / 64) · lora_act:
    float32 [M, R], gives M · weight: in file order; its ``act_unsigned`` says how codes are read · bias: [N] in natural
    order, any float dtype, or None · after: what else is done before rounding · tile: for tests and benchmarks ·
    second: (codes, ascales, lora_act, weight) of a second input, with a K and R of its own, whose product is added
    before anything is rounded · out: where to write, [M, N] with contiguous rows and an even stride, may be a part of a
    wider tensor. Returns [M, N] in ``out_dtype``: bf16, fp16 or float32, default T; fp16 saturates at 65504. N and K
    are multiples of 128, R of 16. Raises ValueError where operands do not fit each other.
    """
    m, n, dtype = lora_act.shape[0], weight.n, ascales.dtype
    out_dtype = out_dtype or (dtype if out is None else out.dtype)
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"ascales is {dtype}, expected torch.bfloat16 or torch.float16")
    if out_dtype not in TYPES:
        raise ValueError(f"out_dtype is {out_dtype}, expected torch.bfloat16, torch.float16 or torch.float32")
    first = (codes, ascales, lora_act, weight)
    operands = (first,) if second is None else (first, second)
    for operand in operands:
        check_operand(*operand, m, n, dtype)
    if bias is not None:
        require("bias", bias, (n,), bias.dtype)
    after = after or After()
    after.check(m, n, dtype)
    if out is None:
        out = torch.empty(m, n, dtype=out_dtype, device=codes.device)
    elif out.shape != (m, n) or out.dtype != out_dtype or out.stride(1) != 1 or out.stride(0) % 2:
        found = f"{out.dtype} {tuple(out.shape)}, strides {out.stride()}"
        raise ValueError(f"out is {found}; expected {out_dtype} {(m, n)} with contiguous rows and an even stride")
    if m == 0:
        return out
    words = out if out_dtype == torch.float32 else out.view(torch.int32)
    if tile is None:
        tile = choose_tile(m, n, describe(codes.device).architecture, out.element_size() * 8, after.name)
    grid = (-(-codes.shape[0] * act_layout.BLOCK_M // tile.block_m) * (n // tile.block_n),)
    with torch.cuda.device_of(codes):
        gemm_w4a4_kernel[grid](
            *pointers(*operands[0]),
            *pointers(*operands[-1]),
            words if bias is None else bias,
            words,
            *(words if tensor is None else tensor for tensor in after.tensors),
            m,
            n,
            weight.k,
            weight.rank,
            operands[-1][3].k,
            operands[-1][3].rank,
            out.stride(0),
            codes.shape[0],
            0 if bias is None else n,
            m // after.gate.shape[0] if after.gate is not None else 1,
            ACT_UNSIGNED=weight.act_unsigned,
            ACT2_UNSIGNED=operands[-1][3].act_unsigned,
            PARTS=len(operands),
            T=TYPES[dtype],
            OUT=TYPES[out_dtype],
            EPILOGUE=KINDS.index(after.name),
            **tile.constants,
            num_warps=tile.warps,
            **FMA,
        )
    return out


def check_operand(
    codes: Tensor, ascales: Tensor, lora_act: Tensor, weight: PackedW4A4, m: int, n: int, dtype: torch.dtype
) -> None:
    k, rank, blocks = weight.k, weight.rank, act_layout.blocks_of(m)
    if n % 128 or k % 128 or rank % RANK_MULTIPLE:
        raise ValueError(f"N, K, R are {n}, {k}, {rank}, expected multiples of 128, 128, {RANK_MULTIPLE}")
    require("codes", codes, (blocks, k // GROUP, act_layout.WORDS), torch.int32)
    require("ascales", ascales, (blocks, k // GROUP, act_layout.BLOCK_M), dtype)
    require("lora_act", lora_act, (m, rank), torch.float32)
    require("qweight", weight.qweight, (n, k // 2), torch.int8)
    require("wscales", weight.wscales, (k // GROUP, n), dtype)
    require("proj_up", weight.proj_up, (n, rank), dtype)


def pointers(codes: Tensor, ascales: Tensor, lora_act: Tensor, weight: PackedW4A4) -> tuple[Tensor, ...]:
    """The operand as the kernel takes it. Any pointer stands for the empty factors of rank 0."""
    scales = (ascales.view(torch.int32), weight.wscales.view(torch.int32))
    low_rank = (lora_act, weight.proj_up.view(torch.int32)) if weight.rank else (scales[0].view(torch.float32), codes)
    return codes, scales[0], weight.qweight.view(torch.int32), scales[1], *low_rank
