"""The INT8 GEMM of ``gemm_int8.py`` for Hopper (sm_90), in Gluon: warp specialized, persistent.

One warp loads (TMA) and two warpgroups multiply (wgmma), each with an accumulator of its own, out of one ring of
buffers in shared memory. A step of the ring is 128 bytes of K of ROWS rows and TN columns; the low-rank branch is one
or more further steps of the same ring, 16-bit, into the same registers after they were converted to float32. While one
warpgroup converts and stores, the other one has the tensor cores for itself:

    ROWS = 2 * TM   both work on one block, TM rows each, and share its columns. The first is SKEW steps ahead, so
                    that they do not come to their epilogues together.
    ROWS = TM       each works on blocks of its own: one's epilogue is under the other's main loop, which begins when
                    the first has seen all of its steps. (A warpgroup that looked at the ring more than a round ahead
                    would take the phase of an earlier round for its own.)

Work is a list of items. Most are whole blocks. The blocks of the last, incomplete wave (``whole`` and beyond) may be
cut along K into ``pieces`` items: each leaves float32 values in ``partial``, and whoever comes last adds them up, in
order, and finishes the block. The last piece brings the low-rank branch.

With a second input, K has two parts whose integer sums have different scales: the values of the first part wait in
``partial`` while the second one is summed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .epilogue import EPS, GATE_RESIDUAL, GELU, HEAD, NORM_ROPE
from .gluon_compat import barrier

BK = gl.constexpr(128)  # columns of K in a step of the ring
_BLOCK = gl.constexpr(128)  # N is a multiple of it


class Sizes(NamedTuple):
    """As the kernel takes them."""

    M: Any
    N: Any
    steps1: Any
    steps2: Any
    R: Any
    whole: Any
    pieces: Any
    items: Any
    rows_per_gate: Any


class Matrices(NamedTuple):
    """Tensor descriptors."""

    a: Any
    w: Any
    a2: Any
    w2: Any
    lora_act: Any
    proj_up: Any
    out: Any


class Vectors(NamedTuple):
    """Pointers of one input."""

    scales: Any
    wscales: Any
    sums: Any


class After(NamedTuple):
    """Pointers of what follows the sums."""

    bias: Any
    gate: Any
    residual: Any
    norm_q: Any
    norm_k: Any
    rotary: Any


class Ring(NamedTuple):
    """Buffers and barriers: a, w: operands · full, empty: of each buffer · order: of the two warpgroups."""

    a: Any
    w: Any
    full: Any
    empty: Any
    order: Any


@gluon.jit
def _advance(slot, phase, STAGES: gl.constexpr):
    """The next buffer of the ring, and the phase of its barriers."""
    slot += 1
    wrap = slot == STAGES
    return gl.where(wrap, 0, slot), gl.where(wrap, phase ^ 1, phase)


@gluon.jit
def _before(slot, STAGES: gl.constexpr):
    """The buffer before this one. (A variable that follows ``slot`` from the same start would not be carried by a loop:
    the compiler takes two names of one value for one that does not change.)"""
    return gl.where(slot == 0, STAGES - 1, slot - 1)


@gluon.jit
def _locate(item, sizes, C: gl.constexpr):
    """(row, column, number of the block, first and last step of K, number of the piece, pieces of the block)."""
    steps = sizes.steps1 + sizes.steps2
    block = item
    first = 0
    last = steps
    piece = 0
    count = 1
    if C.split:  # noqa: SIM102
        if item >= sizes.whole:  # not one condition: C.split is known to the compiler
            block = sizes.whole + (item - sizes.whole) // sizes.pieces
            piece = (item - sizes.whole) % sizes.pieces
            count = sizes.pieces
            first = steps * piece // count
            last = steps * (piece + 1) // count
    in_group = C.group_m * ((sizes.N + C.tn - 1) // C.tn)
    first_m = block // in_group * C.group_m
    group_m = gl.minimum((sizes.M + C.rows - 1) // C.rows - first_m, C.group_m)
    row = (first_m + block % in_group % group_m) * C.rows
    return row, block % in_group // group_m * C.tn, block, first, last, piece, count


# ---- the warp that loads


@gluon.jit
def _load(a_desc, w_desc, row, column, k, bar, a, w, C: gl.constexpr):
    if C.probe == 1:
        mbarrier.arrive(bar, count=1)
    elif C.probe == 2:
        mbarrier.expect(bar, C.rows * BK)
        tma.async_copy_global_to_shared(a_desc, [row, k], bar, a)
    else:
        mbarrier.expect(bar, (C.rows + C.tn) * BK)
        tma.async_copy_global_to_shared(a_desc, [row, k], bar, a)
        tma.async_copy_global_to_shared(w_desc, [column, k], bar, w)


@gluon.jit
def _producer(matrices, ring, sizes, C: gl.constexpr):
    ROWS: gl.constexpr = C.rows
    TN: gl.constexpr = C.tn
    RANKS: gl.constexpr = C.ranks
    T: gl.constexpr = matrices.lora_act.dtype
    slot = 0
    phase = 1
    for item in range(gl.program_id(0), sizes.items, gl.num_programs(0)):
        row, column, _block, first, last, piece, count = _locate(item, sizes, C)
        for step in range(first, last):
            mbarrier.wait(ring.empty.index(slot), phase)
            bar = ring.full.index(slot)
            a = ring.a.index(slot)
            w = ring.w.index(slot)
            if C.second:
                if step < sizes.steps1:
                    _load(matrices.a, matrices.w, row, column, step * BK, bar, a, w, C)
                else:
                    _load(matrices.a2, matrices.w2, row, column, (step - sizes.steps1) * BK, bar, a, w, C)
            else:
                _load(matrices.a, matrices.w, row, column, step * BK, bar, a, w, C)
            slot, phase = _advance(slot, phase, C.stages)
        if RANKS > 0:
            WIDE: gl.constexpr = gl.NVMMASharedLayout(RANKS * 2, 16, 2)
            if piece == count - 1:
                for rank in range(0, sizes.R, RANKS):
                    mbarrier.wait(ring.empty.index(slot), phase)
                    bar = ring.full.index(slot)
                    mbarrier.expect(bar, (ROWS + TN) * RANKS * 2)
                    act = ring.a.index(slot)._reinterpret(T, [ROWS, RANKS], WIDE)
                    up = ring.w.index(slot)._reinterpret(T, [TN, RANKS], WIDE)
                    tma.async_copy_global_to_shared(matrices.lora_act, [row, rank], bar, act)
                    tma.async_copy_global_to_shared(matrices.proj_up, [column, rank], bar, up)
                    slot, phase = _advance(slot, phase, C.stages)


# ---- the warpgroups that multiply


@gluon.jit
def _sum_products(first, last, slot, phase, turn, ring, W: gl.constexpr, C: gl.constexpr):
    """The integer sum of steps first..last, whose last product is still under way, and where the ring stands then.

    turn: steps that this warpgroup has begun, counted from 1.
    """
    TM: gl.constexpr = C.tm
    TN: gl.constexpr = C.tn
    SHARED: gl.constexpr = C.rows != TM
    PART: gl.constexpr = W * TM if SHARED else 0
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    acc = gl.zeros([TM, TN], gl.int32, L)
    for step in range(first, last):
        mbarrier.wait(ring.full.index(slot), phase)
        a = ring.a.index(slot).slice(PART, TM)
        acc = warpgroup_mma(a, ring.w.index(slot).permute((1, 0)), acc, use_acc=step > first, is_async=True)
        acc = warpgroup_mma_wait(1, deps=[acc])
        mbarrier.arrive(ring.empty.index(_before(slot, C.stages)), count=1, pred=step > first)
        if SHARED and C.skew > 0 and W == 0:
            mbarrier.arrive(ring.order.index(1), count=1, pred=turn == C.skew)
            turn += 1
        slot, phase = _advance(slot, phase, C.stages)
    return acc, slot, phase, turn


@gluon.jit
def _to_values(acc, slot, first, last, begin, row, column, vectors, sizes, ring, UNSIGNED: gl.constexpr,
               C: gl.constexpr):  # fmt: skip
    """Wait for the integer sum of steps first..last, hand its last buffer back, and multiply by the scales.

    slot: where the ring stands after it · begin: where this input's steps begin; the piece that has it brings the
    correction for unsigned codes.
    """
    L: gl.constexpr = acc.type.layout
    F: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    offs_m = row + gl.arange(0, acc.shape[0], gl.SliceLayout(1, L))
    offs_n = column + gl.arange(0, acc.shape[1], gl.SliceLayout(0, L))
    scales = gl.load(vectors.scales + offs_m, mask=offs_m < sizes.M, other=0.0)
    wscales = gl.load(vectors.wscales + offs_n, mask=offs_n < sizes.N, other=0.0)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(ring.empty.index(_before(slot, C.stages)), count=1, pred=first < last)
    if UNSIGNED:
        weight = gl.where(first == begin, gl.where(first < last, 128, 0), 0)
        acc += (gl.load(vectors.sums + offs_n, mask=offs_n < sizes.N, other=0) * weight)[None, :]
    return gl.convert_layout(acc.to(gl.float32) * scales[:, None] * wscales[None, :], F, assert_trivial=True)


@gluon.jit
def _consumer(matrices, vectors, vectors2, after, partial_ptr, counter_ptr, ring, stage, sizes,
              W: gl.constexpr, C: gl.constexpr):  # fmt: skip
    TM: gl.constexpr = C.tm
    TN: gl.constexpr = C.tn
    ROWS: gl.constexpr = C.rows
    RANKS: gl.constexpr = C.ranks
    SHARED: gl.constexpr = ROWS != TM
    PART: gl.constexpr = W * TM if SHARED else 0
    F: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    T: gl.constexpr = matrices.lora_act.dtype
    programs = gl.num_programs(0)
    place = gl.arange(0, TM, gl.SliceLayout(1, F))[:, None] * TN + gl.arange(0, TN, gl.SliceLayout(0, F))[None, :]
    rank_steps = 0
    if RANKS > 0:
        rank_steps = (sizes.R + RANKS - 1) // RANKS
    slot = 0
    phase = 0
    turn = 1
    start = gl.program_id(0)
    every = programs
    order_phase = 1 - W
    if not SHARED:
        start += W * programs
        every = 2 * programs
    elif C.skew > 0 and W == 1:
        mbarrier.wait(ring.order.index(1), 0)
    for item in range(start, sizes.items, every):
        if not SHARED:
            if W == 1:
                slot, phase = _skip(item - programs, slot, phase, rank_steps, sizes, C)
            mbarrier.wait(ring.order.index(W), order_phase)
            order_phase ^= 1
        row, column, block, first, last, piece, count = _locate(item, sizes, C)
        row += PART
        begin = first
        if C.second:
            begin = gl.maximum(first, sizes.steps1)
            # The values of the first input are this thread's own: it stores and loads them itself.
            mine = partial_ptr + (gl.program_id(0) * 2 + W).to(gl.int64) * (TM * TN) + place
            if first < sizes.steps1:
                head = gl.minimum(last, sizes.steps1)
                acc, slot, phase, turn = _sum_products(first, head, slot, phase, turn, ring, W, C)
                x = _to_values(acc, slot, first, head, 0, row, column, vectors, sizes, ring, C.unsigned, C)
                gl.store(mine, x)
        acc, slot, phase, turn = _sum_products(begin, last, slot, phase, turn, ring, W, C)
        if not SHARED:
            _hand_over(ring, slot, phase, rank_steps, piece == count - 1, W)
        if C.second:
            x = _to_values(acc, slot, begin, last, sizes.steps1, row, column, vectors2, sizes, ring, C.unsigned2, C)
            if first < sizes.steps1:
                x += gl.load(mine)
        else:
            x = _to_values(acc, slot, begin, last, 0, row, column, vectors, sizes, ring, C.unsigned, C)
        if RANKS > 0:
            WIDE: gl.constexpr = gl.NVMMASharedLayout(RANKS * 2, 16, 2)
            if piece == count - 1:
                for i in range(rank_steps):
                    mbarrier.wait(ring.full.index(slot), phase)
                    if not SHARED:
                        mbarrier.arrive(ring.order.index(1 - W), count=1, pred=(i > 0) & (i == rank_steps - 1))
                    act = ring.a.index(slot)._reinterpret(T, [ROWS, RANKS], WIDE).slice(PART, TM)
                    up = ring.w.index(slot)._reinterpret(T, [TN, RANKS], WIDE)
                    x = warpgroup_mma(act, up.permute((1, 0)), x)
                    mbarrier.arrive(ring.empty.index(slot), count=1)
                    slot, phase = _advance(slot, phase, C.stages)
        finish = True
        if C.split:  # noqa: SIM102
            if count > 1:
                pieces_ptr = partial_ptr + PART * TN
                if C.second:
                    pieces_ptr += programs.to(gl.int64) * (2 * TM * TN)
                pieces_ptr += (item - piece - sizes.whole).to(gl.int64) * (ROWS * TN)
                gl.store(pieces_ptr + piece * (ROWS * TN) + place, x)
                barrier()
                counter = counter_ptr + (block - sizes.whole) * 2
                if SHARED:
                    counter += W
                finish = gl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == count - 1
                if finish:
                    x = gl.load(pieces_ptr + place, cache_modifier=".cg")
                    for i in range(1, count):
                        x += gl.load(pieces_ptr + i * (ROWS * TN) + place, cache_modifier=".cg")
        if finish:
            if TN == 256:
                left, right = _halves(x, F)
                _finish(left, row, column, matrices.out, stage, after, sizes, W, C)
                _finish(right, row, column + 128, matrices.out, stage, after, sizes, W, C)
            else:
                _finish(x, row, column, matrices.out, stage, after, sizes, W, C)
        if not SHARED and W == 0:
            slot, phase = _skip(item + programs, slot, phase, rank_steps, sizes, C)
    tma.store_wait(0)


@gluon.jit
def _hand_over(ring, slot, phase, rank_steps, is_last, W: gl.constexpr):
    """Let the other warpgroup begin, unless there is more than one low-rank step to be seen before."""
    if is_last:
        if rank_steps > 0:
            mbarrier.wait(ring.full.index(slot), phase)
        mbarrier.arrive(ring.order.index(1 - W), count=1, pred=rank_steps < 2)
    else:
        mbarrier.arrive(ring.order.index(1 - W), count=1)


@gluon.jit
def _skip(item, slot, phase, rank_steps, sizes, C: gl.constexpr):
    """Where the ring stands after another warpgroup's item."""
    _row, _column, _block, first, last, piece, count = _locate(item, sizes, C)
    slot += last - first
    if piece == count - 1:
        slot += rank_steps
    return slot % C.stages, phase ^ (slot // C.stages & 1)


# ---- after the sums


@gluon.jit
def _halves(x, L: gl.constexpr):
    """The left and right half of the columns; no data moves."""
    HALF: gl.constexpr = x.shape[1] // 2
    left, right = gl.split(gl.permute(gl.reshape(x, [x.shape[0], 2, HALF]), [0, 2, 1]))
    return gl.convert_layout(left, L, assert_trivial=True), gl.convert_layout(right, L, assert_trivial=True)


@gluon.jit
def _gelu(x, APPROXIMATE: gl.constexpr):
    """GELU, tanh approximation; with the hardware's tanh (error 2^-11) where the result has 8 bits anyway."""
    u = x * (0.7978845608028654 + 0.035677408136300125 * x * x)
    if APPROXIMATE:
        t = gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [u], dtype=gl.float32, is_pure=True, pack=1)
        return x * 0.5 * t + x * 0.5
    else:
        return x / (1.0 + gl.exp2(u * -2.8853900817779268))


@gluon.jit
def _norm_rope(x, offs_m, offs, norm_ptr, rotary_ptr, L: gl.constexpr):
    """RMSNorm and RoPE of one head, x [TM, 128]; rotary has sine and cosine of pair p at 2p and 2p + 1 of a row."""
    TM: gl.constexpr = x.shape[0]
    inverse = gl.rsqrt(gl.sum(x * x, axis=1) * (1.0 / HEAD) + EPS)
    x = x * (inverse[:, None] * gl.load(norm_ptr + offs).to(gl.float32)[None, :])
    sine, cosine = gl.split(gl.reshape(gl.load(rotary_ptr + offs_m[:, None] * HEAD + offs[None, :]), [TM, 64, 2]))
    even, odd = gl.split(gl.reshape(x, [TM, 64, 2]))
    y = gl.reshape(gl.join(even * cosine - odd * sine, even * sine + odd * cosine), [TM, 128])
    return gl.convert_layout(y, L, assert_trivial=True)


@gluon.jit
def _finish(x, row, column, out, stage, after, sizes, W: gl.constexpr, C: gl.constexpr):
    """Bias, epilogue and store of x, float32 [TM, 128]. What lies beyond M and N is computed but not stored."""
    TM: gl.constexpr = C.tm
    T: gl.constexpr = out.dtype
    F: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    F64: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    offs_m = gl.minimum(row + gl.arange(0, TM, gl.SliceLayout(1, F)), sizes.M - 1)
    offs = gl.arange(0, 128, gl.SliceLayout(0, F))
    offs_n = gl.minimum(column, sizes.N - _BLOCK) + offs
    if C.bias:
        x += gl.load(after.bias + offs_n).to(gl.float32)[None, :]
    if C.epilogue == GELU:
        x = _gelu(x, gl.bfloat16 == T)
    elif C.epilogue == GATE_RESIDUAL:
        residual = gl.load(after.residual + offs_m.to(gl.int64)[:, None] * sizes.N + offs_n[None, :])
        if C.one_gate:
            x *= gl.load(after.gate + offs_n).to(gl.float32)[None, :]
        else:
            gate = gl.load(after.gate + (offs_m // sizes.rows_per_gate * sizes.N)[:, None] + offs_n[None, :])
            x *= gate.to(gl.float32)
        x += residual.to(gl.float32)
    elif C.epilogue == NORM_ROPE:
        third = column // (sizes.N // 3)
        if third < 2:
            norm_ptr = after.norm_q
            if third == 1:
                norm_ptr = after.norm_k
            x = _norm_rope(x, offs_m, offs, norm_ptr, after.rotary, F)
    if gl.float16 == T:
        x = gl.minimum(gl.maximum(x, -65504.0), 65504.0)
    parts = _halves(x.to(T), F64)
    for i in gl.static_range(2):
        # Two buffers for each warpgroup: the store before the last one has read its buffer.
        tma.store_wait(1)
        stage.index(2 * W + i).store(parts[i])
        fence_async_shared()
        tma.async_copy_shared_to_global(out, [row, column + 64 * i], stage.index(2 * W + i))


@gluon.jit(do_not_specialize=["M", "steps1", "steps2", "R", "whole", "pieces", "items", "rows_per_gate"])
def gemm_w8a8_hopper_kernel(
    a_desc, w_desc, a2_desc, w2_desc, lora_desc, up_desc, out_desc,
    scales_ptr, wscales_ptr, sums_ptr, scales2_ptr, wscales2_ptr, sums2_ptr,
    bias_ptr, gate_ptr, residual_ptr, norm_q_ptr, norm_k_ptr, rotary_ptr, partial_ptr, counter_ptr,
    M, N, steps1, steps2, R, whole, pieces, items, rows_per_gate, C: gl.constexpr,
):  # fmt: skip
    """steps1, steps2: K and K2 over 128 · items: whole blocks and pieces · C: a HopperTile (tiles_int8.py)."""
    STAGES: gl.constexpr = C.stages
    ROWS: gl.constexpr = C.rows
    TM: gl.constexpr = C.tm
    TN: gl.constexpr = C.tn
    ring_a = gl.allocate_shared_memory(gl.int8, [STAGES, ROWS, BK], gl.NVMMASharedLayout(128, 8, 2))
    ring_w = gl.allocate_shared_memory(gl.int8, [STAGES, TN, BK], gl.NVMMASharedLayout(128, 8, 2))
    stage = gl.allocate_shared_memory(out_desc.dtype, [4, TM, 64], gl.NVMMASharedLayout(128, 16, 2))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    order = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=ROWS // TM)
    for i in gl.static_range(2):
        mbarrier.init(order.index(i), count=1)
    fence_async_shared()
    ring = Ring(ring_a, ring_w, full, empty, order)
    matrices = Matrices(a_desc, w_desc, a2_desc, w2_desc, lora_desc, up_desc, out_desc)
    vectors = Vectors(scales_ptr, wscales_ptr, sums_ptr)
    vectors2 = Vectors(scales2_ptr, wscales2_ptr, sums2_ptr)
    after = After(bias_ptr, gate_ptr, residual_ptr, norm_q_ptr, norm_k_ptr, rotary_ptr)
    sizes = Sizes(M, N, steps1, steps2, R, whole, pieces, items, rows_per_gate)
    gl.warp_specialize(
        [
            (_consumer, (matrices, vectors, vectors2, after, partial_ptr, counter_ptr, ring, stage, sizes, 0, C)),
            (_consumer, (matrices, vectors, vectors2, after, partial_ptr, counter_ptr, ring, stage, sizes, 1, C)),
            (_producer, (matrices, ring, sizes, C)),
        ],
        [4, C.producer_warps],
        C.registers,
    )
