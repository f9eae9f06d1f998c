"""INT4 GEMM + low-rank up + bias on INT4 tensor cores (sm_80, 86, 89; emulated, slowly, on sm_90), in Gluon.

    out[m, n] = sum_g ascales[m, g] * wscales[n, g] * dot(codes[m, g], q[n, g]) + lora_act[m] . proj_up[n] + bias[n]

Contract: ``int4.py``; weights in the order of the checkpoint file (``layout.py``), activations in that of
``act_layout.py``. Everything is in the operand order of ``mma.sync.m16n8k64`` already, so shared memory is a plain
queue: 16-byte copies in, conflict-free reads out, no transposes.

One MMA covers exactly one scale group. Its accumulator starts at 0x4B400000, so the int32 result, read as a float, is
f = 12582912 + dot. Two FMAs then finish an output: u = fma(f, a, -12582912 * a) = dot * a is exact (dot has 13 bits, a
bf16 or fp16 scale 11), acc = fma(u, w, acc) rounds once, in float32. The offset is folded into the activation's scale:
a warp has few rows and many columns, and pays one multiplication per row.

Accumulators are tensors [m16 tiles, n8 tiles, 32 lanes], one for each of the four output registers of an MMA: register
i of lane 4 * r + c is row r + 8 * (i / 2), column 2 * c + i % 2 of its tile.

Measured by benchmarks/sass.py, kept by tests/test_gemm_int4.py: the main loop of a 64 x 64 warp takes 11.4 to 11.9
instructions per MMA, 9 of which are the MMA and its FMAs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import act_layout
from .device import describe
from .epilogue import BF16, KINDS, After, finish_rows, pack_pair, require, unpack_pair
from .gluon_compat import async_copy, async_load, barrier, gl, gluon
from .int4 import GROUP, RANK_MULTIPLE, PackedW4A4
from .tiles import Tile, choose_tile

_TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}

MAGIC = gl.constexpr(0x4B400000)  # the float 12582912 = 3 * 2^22, whose last bit is worth 1
MINUS_MAGIC_FLOAT = gl.constexpr(-12582912.0)


@gluon.jit
def _mma_scale(a0, a1, a2, a3, b0, b1, sa_lo, sa_hi, off_lo, off_hi, sw_lo, sw_hi, c0, c1, c2, c3, magic,
               ACT_UNSIGNED: gl.constexpr):  # fmt: skip
    """One INT4 MMA and its eight FMAs; in one piece, so that no compiler version pulls them apart or contracts them."""
    act: gl.constexpr = "u4" if ACT_UNSIGNED else "s4"
    asm: gl.constexpr = (
        "{\n.reg .b32 d0, d1, d2, d3;\n.reg .f32 f0, f1, f2, f3;\n"
        "mma.sync.aligned.m16n8k64.row.col.s32." + act + ".s4.s32 "
        "{d0, d1, d2, d3}, {$4, $5, $6, $7}, {$8, $9}, {$20, $21, $22, $23};\n"
        "mov.b32 f0, d0;\nmov.b32 f1, d1;\nmov.b32 f2, d2;\nmov.b32 f3, d3;\n"
        "fma.rn.f32 f0, f0, $10, $12;\nfma.rn.f32 f1, f1, $10, $12;\n"
        "fma.rn.f32 f2, f2, $11, $13;\nfma.rn.f32 f3, f3, $11, $13;\n"
        "fma.rn.f32 $0, f0, $14, $16;\nfma.rn.f32 $1, f1, $15, $17;\n"
        "fma.rn.f32 $2, f2, $14, $18;\nfma.rn.f32 $3, f3, $15, $19;\n}"
    )
    return gl.inline_asm_elementwise(
        asm,
        "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f,f,f,f,f,f,f,r,r,r,r",
        [
            a0, a1, a2, a3, b0, b1, sa_lo, sa_hi, off_lo, off_hi, sw_lo, sw_hi, c0, c1, c2, c3,
            magic[0], magic[1], magic[2], magic[3],
        ],
        dtype=(gl.float32, gl.float32, gl.float32, gl.float32),
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _mma_16bit(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3, T: gl.constexpr):
    """One m16n8k16 MMA on pairs of bf16 or fp16, accumulating in float32."""
    kind: gl.constexpr = "bf16" if T == BF16 else "f16"
    return gl.inline_asm_elementwise(
        "mma.sync.aligned.m16n8k16.row.col.f32." + kind + "." + kind + ".f32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
        "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
        [a0, a1, a2, a3, b0, b1, c0, c1, c2, c3],
        dtype=(gl.float32, gl.float32, gl.float32, gl.float32),
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _fragments_a(x, P: gl.constexpr):
    """Words [m16, 32, 4] of an A operand as its four registers [m16, 1, 32]."""
    L: gl.constexpr = gl.SliceLayout(1, P)
    even, odd = gl.split(gl.reshape(x, [x.shape[0], 32, 2, 2]))
    x0, x2 = gl.split(even)
    x1, x3 = gl.split(odd)
    x0 = gl.expand_dims(gl.convert_layout(x0, L, assert_trivial=True), 1)
    x1 = gl.expand_dims(gl.convert_layout(x1, L, assert_trivial=True), 1)
    x2 = gl.expand_dims(gl.convert_layout(x2, L, assert_trivial=True), 1)
    x3 = gl.expand_dims(gl.convert_layout(x3, L, assert_trivial=True), 1)
    return x0, x1, x2, x3


@gluon.jit
def _fragments_b(x, P: gl.constexpr):
    """Words [n16, 32, 4] of two B operands side by side as two registers [1, n8, 32]."""
    L: gl.constexpr = gl.SliceLayout(0, P)
    n8: gl.constexpr = x.shape[0] * 2
    x0, x1 = gl.split(gl.reshape(x, [x.shape[0], 32, 2, 2]))
    x0 = gl.convert_layout(gl.reshape(gl.permute(x0, [0, 2, 1]), [n8, 32]), L, assert_trivial=True)
    x1 = gl.convert_layout(gl.reshape(gl.permute(x1, [0, 2, 1]), [n8, 32]), L, assert_trivial=True)
    return gl.expand_dims(x0, 0), gl.expand_dims(x1, 0)


@gluon.jit
def _accumulate(xa, xb, xsa, xsw, c0, c1, c2, c3, magic,
                ACT_UNSIGNED: gl.constexpr, T: gl.constexpr, P: gl.constexpr):  # fmt: skip
    """One group of 64 columns: codes xa [m16, 32, 4], xb [n16, 32, 4], scale pairs xsa [m64, 8, 4], xsw [n16, 8]."""
    m16: gl.constexpr = xa.shape[0]
    n16: gl.constexpr = xb.shape[0]
    a0, a1, a2, a3 = _fragments_a(xa, P)
    b0, b1 = _fragments_b(xb, P)
    sa = gl.expand_dims(xsa, 2).broadcast_to([m16 // 4, 8, 4, 4])  # lanes 4r..4r+3 share the scales of a row
    sa = gl.reshape(gl.permute(sa, [0, 3, 1, 2]), [m16, 32])
    sa = gl.expand_dims(gl.convert_layout(sa, gl.SliceLayout(1, P), assert_trivial=True), 1)
    sw = gl.expand_dims(xsw, 1).broadcast_to([n16, 8, 8])  # lanes c, c+4, .. share the scales of a column pair
    sw = gl.permute(gl.reshape(sw, [n16, 8, 4, 2]), [0, 3, 1, 2])
    sw = gl.reshape(sw, [n16 * 2, 32])
    sw = gl.expand_dims(gl.convert_layout(sw, gl.SliceLayout(0, P), assert_trivial=True), 0)
    sa_lo, sa_hi = unpack_pair(sa, T)
    sw_lo, sw_hi = unpack_pair(sw, T)
    return _mma_scale(
        a0, a1, a2, a3, b0, b1, sa_lo, sa_hi, sa_lo * MINUS_MAGIC_FLOAT, sa_hi * MINUS_MAGIC_FLOAT, sw_lo, sw_hi,
        c0, c1, c2, c3, magic, ACT_UNSIGNED,
    )  # fmt: skip


@gluon.jit
def _copy_stage(buffers, slot, bases, offsets, valid):
    """Start the copies of 128 columns, two groups, into slots ``slot`` and ``slot + 1``."""
    for g in gl.static_range(2):
        async_load(buffers[0].index(slot + g), bases[0] + offsets[0] + g * 512, mask=valid)
        async_load(buffers[1].index(slot + g), bases[1] + offsets[1] + g * 1024, mask=valid)
        async_load(buffers[2].index(slot + g), bases[2] + offsets[2] + g * 32, mask=valid)
        async_load(buffers[3].index(slot + g), bases[3] + offsets[3] + g * 64, mask=valid)
    async_copy.commit_group()


@gluon.jit
def _next_stage(bases):
    return bases[0] + 1024, bases[1] + 2048, bases[2] + 64, bases[3] + 128


@gluon.jit
def _add_low_rank(lora_act_ptr, proj_up_ptr, c0, c1, c2, c3, M, R, tile_m, tile_n,
                  T: gl.constexpr, P: gl.constexpr, LA: gl.constexpr, LB: gl.constexpr):  # fmt: skip
    """c += T(lora_act) @ proj_up^T for the m16 tiles from tile_m and the n16 tiles from tile_n."""
    m16: gl.constexpr = c0.shape[0]
    n16: gl.constexpr = c0.shape[1] // 2
    lane = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(2, LA)))[None, :, None]
    row = (tile_m + gl.arange(0, m16, gl.SliceLayout(1, gl.SliceLayout(2, LA)))[:, None, None]) * 16 + lane // 4
    column = lane % 4 * 2 + gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, LA)))[None, None, :]
    # Rows beyond M repeat the last one: they are not stored.
    row_lo = gl.minimum(row, M - 1) * R + column  # [m16, 32, 2]
    row_hi = gl.minimum(row + 8, M - 1) * R + column
    lane = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(2, LB)))[None, :, None]
    word = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, LB)))[None, None, :]
    tile = tile_n + gl.arange(0, n16, gl.SliceLayout(1, gl.SliceLayout(2, LB)))[:, None, None]
    up = tile * (R * 8) + lane * 4 + word  # [n16, 32, 4] pairs
    for _ in range(0, R, 16):
        x0 = _pair_register(gl.load(lora_act_ptr + row_lo), T, P)
        x1 = _pair_register(gl.load(lora_act_ptr + row_hi), T, P)
        x2 = _pair_register(gl.load(lora_act_ptr + 8 + row_lo), T, P)
        x3 = _pair_register(gl.load(lora_act_ptr + 8 + row_hi), T, P)
        b0, b1 = _fragments_b(gl.load(proj_up_ptr + up), P)
        c0, c1, c2, c3 = _mma_16bit(x0, x1, x2, x3, b0, b1, c0, c1, c2, c3, T)
        lora_act_ptr += 16
        proj_up_ptr += 128
    return c0, c1, c2, c3


@gluon.jit
def _pair_register(x, T: gl.constexpr, P: gl.constexpr):
    """float32 [m16, 32, 2] as one register of pairs [m16, 1, 32]."""
    low, high = gl.split(x)
    pair = pack_pair(low, high, T, False)
    return gl.expand_dims(gl.convert_layout(pair, gl.SliceLayout(1, P), assert_trivial=True), 1)


@gluon.jit(do_not_specialize=["M", "row_blocks", "bias_size", "rows_per_gate"])
def gemm_w4a4_kernel(
    act_ptr, ascales_ptr, qweight_ptr, wscales_ptr, lora_act_ptr, proj_up_ptr, bias_ptr, out_ptr,
    gate_ptr, residual_ptr, norm_q_ptr, norm_k_ptr, rotary_ptr,
    M, N, K, R, row_blocks, bias_size, rows_per_gate,
    ACT_UNSIGNED: gl.constexpr, T: gl.constexpr, OUT: gl.constexpr, EPILOGUE: gl.constexpr,
    M16: gl.constexpr, N8: gl.constexpr, WARPS_M: gl.constexpr, WARPS_N: gl.constexpr, STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
):  # fmt: skip
    """One block of outputs, M16 x N8 MMA tiles a warp. Codes, scales (pairs) and proj_up (pairs) are int32 words; so is
    a 16-bit out. A stage is two groups, 128 columns: K is a multiple of 128."""
    m16: gl.constexpr = M16 * WARPS_M
    n8: gl.constexpr = N8 * WARPS_N
    m64: gl.constexpr = m16 // 4
    n16: gl.constexpr = n8 // 2
    warps: gl.constexpr = WARPS_M * WARPS_N
    # Distributed layouts. The last two numbers of `order` put neighbouring warps along M.
    P: gl.constexpr = gl.BlockedLayout([M16, N8, 1], [1, 1, 32], [WARPS_M, WARPS_N, 1], [2, 0, 1])
    FRAG_A: gl.constexpr = gl.BlockedLayout([M16, 1, 1, 4], [1, 1, 32, 1], [WARPS_M, WARPS_N, 1, 1], [3, 2, 0, 1])
    FRAG_B: gl.constexpr = gl.BlockedLayout([1, N8 // 2, 1, 4], [1, 1, 32, 1], [WARPS_M, WARPS_N, 1, 1], [3, 2, 0, 1])
    PAIR_A: gl.constexpr = gl.BlockedLayout([M16, 1, 1, 2], [1, 1, 32, 1], [WARPS_M, WARPS_N, 1, 1], [3, 2, 0, 1])
    LA: gl.constexpr = gl.SliceLayout(1, FRAG_A)  # [m16, 32, 4]
    LB: gl.constexpr = gl.SliceLayout(0, FRAG_B)  # [n16, 32, 4]
    FRAG_SA: gl.constexpr = gl.BlockedLayout(
        [1, 1, 1, 1, M16], [1, 1, 8, 4, 1], [WARPS_M * M16 // 4, WARPS_N, 1, 1, 4 // M16], [4, 3, 2, 0, 1]
    )
    FRAG_SW: gl.constexpr = gl.BlockedLayout(
        [1, N8 // 2, 1, 2], [1, 1, 8, 4], [WARPS_M, WARPS_N, 1, 1], [3, 2, 0, 1]
    )
    LSA: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(1, FRAG_SA))  # [m64, 8, 4]
    LSW: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(0, FRAG_SW))  # [n16, 8]
    COPY: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 32, 1], [warps, 1, 1], [2, 1, 0])
    COPY_A: gl.constexpr = gl.BlockedLayout([m16 // warps, 1, 4], [1, 32, 1], [warps, 1, 1], [2, 1, 0])
    COPY_SA: gl.constexpr = gl.BlockedLayout([1, 1, 4], [4, 8, 1], [warps, 1, 1], [2, 1, 0])
    COPY_SW: gl.constexpr = gl.BlockedLayout([1, 4], [16, 2], [warps, 1], [1, 0])
    SHARED: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    SHARED_SW: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])

    # Blocks go down GROUP_M row blocks before they take the next column block.
    pid = gl.program_id(0)
    blocks_m = (row_blocks + m64 - 1) // m64
    in_group = GROUP_M * (N // (n8 * 8))
    first_m = pid // in_group * GROUP_M
    group_m = gl.minimum(blocks_m - first_m, GROUP_M)
    pid_m = first_m + pid % in_group % group_m
    pid_n = pid % in_group // group_m
    tile_m = pid_m * m16
    tile_n = pid_n * n16
    groups = K // 64

    # Source addresses of the copies. Blocks of 64 rows beyond the last repeat it: their rows are not stored.
    # A thread's rows of one operand are in one block of 64 rows, so that one address and constants reach them all.
    lane = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(2, COPY_A)))[None, :, None]
    word = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, COPY_A)))[None, None, :]
    i = gl.arange(0, m16, gl.SliceLayout(1, gl.SliceLayout(2, COPY_A)))[:, None, None]
    block = gl.minimum(pid_m * m64 + i // 4, row_blocks - 1)
    o_act = block * (groups * 512) + (i % 4 * 128 + lane * 4 + word)
    lane = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(2, COPY)))[None, :, None]
    word = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, COPY)))[None, None, :]
    i = gl.arange(0, n16, gl.SliceLayout(1, gl.SliceLayout(2, COPY)))[:, None, None]
    o_weight = i // 8 * (groups * 1024) + i % 8 * 128 + lane * 4 + word
    i = gl.arange(0, m64, gl.SliceLayout(1, gl.SliceLayout(2, COPY_SA)))[:, None, None]
    lane = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(2, COPY_SA)))[None, :, None]
    word = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, COPY_SA)))[None, None, :]
    block = gl.minimum(pid_m * m64 + i, row_blocks - 1)
    o_ascales = block * (groups * 32) + (lane * 4 + word)
    i = gl.arange(0, n16, gl.SliceLayout(1, COPY_SW))[:, None]
    word = gl.arange(0, 8, gl.SliceLayout(0, COPY_SW))[None, :]
    o_wscales = i // 8 * (groups * 64) + i % 8 * 8 + word

    s_act = gl.allocate_shared_memory(gl.int32, [2 * STAGES, m16, 32, 4], SHARED)
    s_weight = gl.allocate_shared_memory(gl.int32, [2 * STAGES, n16, 32, 4], SHARED)
    s_ascales = gl.allocate_shared_memory(gl.int32, [2 * STAGES, m64, 8, 4], SHARED)
    s_wscales = gl.allocate_shared_memory(gl.int32, [2 * STAGES, n16, 8], SHARED_SW)
    buffers = (s_act, s_weight, s_ascales, s_wscales)
    offsets = (o_act, o_weight, o_ascales, o_wscales)
    first_tile = (tile_n // 8 * groups).to(gl.int64)
    bases = (act_ptr, qweight_ptr + first_tile * 1024, ascales_ptr, wscales_ptr + first_tile * 64)
    for stage in gl.static_range(STAGES - 1):
        _copy_stage(buffers, 2 * stage, bases, offsets, stage * 128 < K)
        bases = _next_stage(bases)

    # The low-rank branch and the bias start the accumulators while the first copies are under way. Low-rank first: the
    # addition of the bias frees the main loop from the registers that the 16-bit MMA needs side by side.
    zero = gl.zeros([m16, n8, 32], gl.float32, P)
    LORA: gl.constexpr = gl.SliceLayout(1, PAIR_A)
    c0, c1, c2, c3 = _add_low_rank(
        lora_act_ptr, proj_up_ptr, zero, zero, zero, zero, M, R, tile_m, tile_n, T, P, LORA, LB
    )
    column = gl.arange(0, n8, gl.SliceLayout(0, gl.SliceLayout(2, P)))[None, :, None] * 8
    column += gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, P)))[None, None, :] % 4 * 2
    bias_ptr += tile_n * 16
    bias0 = gl.load(bias_ptr + column, mask=column < bias_size, other=0.0).to(gl.float32)
    bias1 = gl.load(bias_ptr + column + 1, mask=column < bias_size, other=0.0).to(gl.float32)
    c0, c1, c2, c3 = c0 + bias0, c1 + bias1, c2 + bias0, c3 + bias1

    # Four equal words for the MMA's accumulator operand that the compiler cannot know to be equal (or constant): it
    # keeps them in four registers instead of making them anew.
    magic = ((M >> 31) + MAGIC, (N >> 31) + MAGIC, (K >> 31) + MAGIC, (row_blocks >> 31) + MAGIC)
    slot = 0
    fill = 2 * (STAGES - 1)
    for k in range(0, K, 128):
        async_copy.wait_group(STAGES - 2)
        barrier()
        _copy_stage(buffers, fill, bases, offsets, k + 128 * (STAGES - 1) < K)
        bases = _next_stage(bases)
        for g in gl.static_range(2):
            xa = s_act.index(slot + g).load(LA)
            xb = s_weight.index(slot + g).load(LB)
            xsa = s_ascales.index(slot + g).load(LSA)
            xsw = s_wscales.index(slot + g).load(LSW)
            c0, c1, c2, c3 = _accumulate(xa, xb, xsa, xsw, c0, c1, c2, c3, magic, ACT_UNSIGNED, T, P)
        slot = gl.where(slot == 2 * (STAGES - 1), 0, slot + 2)
        fill = gl.where(fill == 2 * (STAGES - 1), 0, fill + 2)
    async_copy.wait_group(0)

    # Opaque to the compiler, which would compute addresses of the output before the main loop and keep them through it.
    tile_m = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [tile_m], dtype=gl.int32, is_pure=False, pack=1)
    finish_rows(c0, c1, 0, out_ptr, gate_ptr, residual_ptr, norm_q_ptr, norm_k_ptr, rotary_ptr, M, N, rows_per_gate,
                tile_m, tile_n, EPILOGUE, T, OUT, P)  # fmt: skip
    finish_rows(c2, c3, 1, out_ptr, gate_ptr, residual_ptr, norm_q_ptr, norm_k_ptr, rotary_ptr, M, N, rows_per_gate,
                tile_m, tile_n, EPILOGUE, T, OUT, P)  # fmt: skip


def gemm_w4a4(
    codes: Tensor,
    ascales: Tensor,
    lora_act: Tensor,
    weight: PackedW4A4,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    after: After | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """As :func:`kernels.reference.gemm_w4a4`, on packed operands of one GPU.

    codes: int32 [B, G, 512] and ascales: T [B, G, 64] in the order of ``act_layout.py``, B = ceil(M / 64) · lora_act:
    float32 [M, R], gives M · weight: in file order; its ``act_unsigned`` says how codes are read · bias: [N] in natural
    order, any float dtype, or None · after: what else is done before rounding · tile: for tests and benchmarks.
    Returns [M, N] in ``out_dtype``: bf16, fp16 or float32, default T; fp16 saturates at 65504. N and K are multiples of
    128, R of 16. Raises ValueError where operands do not fit each other.
    """
    m, rank = lora_act.shape
    n, k = weight.n, weight.k
    dtype = ascales.dtype
    out_dtype = out_dtype or dtype
    blocks = act_layout.blocks_of(m)
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"ascales is {dtype}, expected torch.bfloat16 or torch.float16")
    if out_dtype not in _TYPES:
        raise ValueError(f"out_dtype is {out_dtype}, expected torch.bfloat16, torch.float16 or torch.float32")
    if n % 128 or k % 128 or rank % RANK_MULTIPLE:
        raise ValueError(f"N, K, R are {n}, {k}, {rank}, expected multiples of 128, 128, {RANK_MULTIPLE}")
    require("codes", codes, (blocks, k // GROUP, act_layout.WORDS), torch.int32)
    require("ascales", ascales, (blocks, k // GROUP, act_layout.BLOCK_M), dtype)
    require("lora_act", lora_act, (m, rank), torch.float32)
    require("qweight", weight.qweight, (n, k // 2), torch.int8)
    require("wscales", weight.wscales, (k // GROUP, n), dtype)
    require("proj_up", weight.proj_up, (n, rank), dtype)
    if bias is not None:
        require("bias", bias, (n,), bias.dtype)
    after = after or After()
    after.check(m, n, dtype)
    out = torch.empty(m, n, dtype=out_dtype, device=codes.device)
    if m == 0:
        return out
    if tile is None:
        tile = choose_tile(m, n, describe(codes.device).architecture, out.element_size() * 8, after.name)
    grid = (-(-blocks * act_layout.BLOCK_M // tile.block_m) * (n // tile.block_n),)
    with torch.cuda.device_of(codes):
        gemm_w4a4_kernel[grid](
            codes,
            ascales.view(torch.int32),
            weight.qweight.view(torch.int32),
            weight.wscales.view(torch.int32),
            lora_act,
            weight.proj_up.view(torch.int32) if rank else codes,
            out if bias is None else bias,
            out if out_dtype == torch.float32 else out.view(torch.int32),
            *(out if tensor is None else tensor for tensor in after.tensors),
            m,
            n,
            k,
            rank,
            blocks,
            0 if bias is None else n,
            m // after.gate.shape[0] if after.gate is not None else 1,
            ACT_UNSIGNED=weight.act_unsigned,
            T=_TYPES[dtype],
            OUT=_TYPES[out_dtype],
            EPILOGUE=KINDS.index(after.name),
            M16=tile.m16_per_warp,
            N8=tile.n8_per_warp,
            WARPS_M=tile.warps_m,
            WARPS_N=tile.warps_n,
            STAGES=tile.stages,
            GROUP_M=tile.group_m,
            num_warps=tile.warps,
        )
    return out
