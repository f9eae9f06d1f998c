"""The INT8 GEMM of ``gemm_int8.py`` for Hopper (sm_90), in Gluon: warp specialized, persistent.

One warp loads (TMA) and two warpgroups multiply (wgmma), out of one ring of buffers in shared memory. A step of the
ring is 128 bytes of K of TM rows and TN columns. The two take turns: each works on items of its own, with all of the
tensor cores to itself while the other one does what follows its sums. The next one's main loop begins when the one
before it has seen all of its steps. (A warpgroup that looked at the ring more than a round ahead would take the phase
of an earlier round for its own.)

What follows: the integer sums become float32 values, the low-rank branch joins them as a 16-bit product, then bias,
epilogue and rounding. The operands of the low-rank branch come early, into the buffers that the results leave by.

Work is a list of items. Most are whole blocks. The last blocks (``whole`` and beyond) may be cut along K into
``pieces`` items: each leaves its integer sums in ``partial``, and whoever comes last adds them up and finishes the
block. Integer sums are exact, so that their order does not matter.

With a second input, K has two parts whose integer sums have different scales: the values of the first part wait in
``partial`` while the second one is summed. There are no pieces then.
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

from .ahead import name_functions
from .epilogue import EPS, GATE_RESIDUAL, GELU, HEAD, NORM_ROPE
from .gluon_compat import barrier

TM = gl.constexpr(128)  # outputs of a block: 128 registers of each thread of a warpgroup
TN = gl.constexpr(128)
BK = gl.constexpr(128)  # columns of K in a step of the ring
HALF = gl.constexpr(64)  # columns of a block that are staged at a time: 128 bytes, as the copy engine swizzles


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
    bias_size: Any


class Matrices(NamedTuple):
    """Tensor descriptors. beside: the residual, or sines and cosines as [M, 128]."""

    a: Any
    w: Any
    a2: Any
    w2: Any
    lora_act: Any
    proj_up: Any
    beside: Any
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
    norm_q: Any
    norm_k: Any


class Ring(NamedTuple):
    """Buffers and barriers: a, w: operands · full, empty: of each buffer · turn, extra: of each warpgroup."""

    a: Any
    w: Any
    full: Any
    empty: Any
    turn: Any
    extra: Any


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
    if item >= sizes.whole:
        block = sizes.whole + (item - sizes.whole) // sizes.pieces
        piece = (item - sizes.whole) % sizes.pieces
        count = sizes.pieces
        first = steps * piece // count
        last = steps * (piece + 1) // count
    in_group = C.group_m * ((sizes.N + TN - 1) // TN)
    first_m = block // in_group * C.group_m
    group_m = gl.minimum((sizes.M + TM - 1) // TM - first_m, C.group_m)
    row = (first_m + block % in_group % group_m) * TM
    return row, block % in_group // group_m * TN, block, first, last, piece, count


# ---- the warp that loads


@gluon.jit
def _load(a_desc, w_desc, row, column, k, bar, a, w, C: gl.constexpr):
    mbarrier.expect(bar, (TM + TN) * BK)
    tma.async_copy_global_to_shared(a_desc, [row, k], bar, a)
    tma.async_copy_global_to_shared(w_desc, [column, k], bar, w)


@gluon.jit
def _producer(matrices, ring, sizes, C: gl.constexpr):
    slot = 0
    phase = 1
    for item in range(gl.program_id(0), sizes.items, gl.num_programs(0)):
        row, column, _block, first, last, _piece, _count = _locate(item, sizes, C)
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


# ---- the warpgroups that multiply


@gluon.jit
def _sum_products(steps, slot, phase, ring, C: gl.constexpr):
    """The integer sum of the next steps, whose last product is still under way, and where the ring stands then."""
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    acc = gl.zeros([TM, TN], gl.int32, L)
    for step in range(steps):
        mbarrier.wait(ring.full.index(slot), phase)
        w = ring.w.index(slot).permute((1, 0))
        acc = warpgroup_mma(ring.a.index(slot), w, acc, use_acc=step > 0, is_async=True)
        acc = warpgroup_mma_wait(1, deps=[acc])
        mbarrier.arrive(ring.empty.index(_before(slot, C.stages)), count=1, pred=step > 0)
        slot, phase = _advance(slot, phase, C.stages)
    return acc, slot, phase


@gluon.jit
def _finish_sum(acc, slot, steps, ring, C: gl.constexpr):
    """Wait for the last product and hand its buffer back. slot: where the ring stands after it."""
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(ring.empty.index(_before(slot, C.stages)), count=1, pred=steps > 0)
    return acc


@gluon.jit
def _to_values(acc, row, column, vectors, sizes, UNSIGNED: gl.constexpr):
    """Integer sums over all of K, times their scales."""
    L: gl.constexpr = acc.type.layout
    F: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    offs_m = row + gl.arange(0, TM, gl.SliceLayout(1, L))
    offs_n = column + gl.arange(0, TN, gl.SliceLayout(0, L))
    scales = gl.load(vectors.scales + offs_m, mask=offs_m < sizes.M, other=0.0)
    wscales = gl.load(vectors.wscales + offs_n)
    if UNSIGNED:
        acc += (gl.load(vectors.sums + offs_n) * 128)[None, :]
    return gl.convert_layout(acc.to(gl.float32) * scales[:, None] * wscales[None, :], F, assert_trivial=True)


@gluon.jit
def _low_rank_buffers(matrices, stage, BOX: gl.constexpr, W: gl.constexpr, C: gl.constexpr):
    """Both operands of C.ranks columns of the low-rank branch, in the place of this warpgroup's results."""
    RANKS: gl.constexpr = C.ranks
    T: gl.constexpr = matrices.lora_act.dtype
    BOXES: gl.constexpr = HALF // RANKS  # for which there is room
    WIDE: gl.constexpr = gl.NVMMASharedLayout(RANKS * 2, 16, 2)
    both = stage._reinterpret(T, [2 * BOXES, TM + TN, RANKS], WIDE).index(W * BOXES + BOX)
    return both.slice(0, TM), both.slice(TM, TN)


@gluon.jit
def _load_low_rank(matrices, ring, stage, row, column, rank, W: gl.constexpr, C: gl.constexpr):
    """Columns from ``rank`` on."""
    BOXES: gl.constexpr = C.boxes
    bar = ring.extra.index(W)
    mbarrier.expect(bar, (TM + TN) * C.ranks * C.boxes * 2)
    for i in gl.static_range(BOXES):
        act, up = _low_rank_buffers(matrices, stage, i, W, C)
        tma.async_copy_global_to_shared(matrices.lora_act, [row, rank + i * C.ranks], bar, act)
        tma.async_copy_global_to_shared(matrices.proj_up, [column, rank + i * C.ranks], bar, up)


@gluon.jit
def _multiply_low_rank(x, matrices, stage, W: gl.constexpr, C: gl.constexpr):
    BOXES: gl.constexpr = C.boxes
    for i in gl.static_range(BOXES):
        act, up = _low_rank_buffers(matrices, stage, i, W, C)
        x = warpgroup_mma(act, up.permute((1, 0)), x, is_async=True)
    x = warpgroup_mma_wait(0, deps=[x])
    barrier()  # all warps have read the buffers before one of them writes
    return x


@gluon.jit
def _join(acc, partial_ptr, counter_ptr, item, block, piece, count, sizes):
    """(sums of all pieces, whether this one came last). Others leave theirs in memory; their result has no meaning."""
    SIZE: gl.constexpr = TM * TN
    L: gl.constexpr = acc.type.layout
    # The same values of the same threads, but with four of a thread side by side in memory and 512 bytes of a warp.
    B: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 32, 1], [1, 4, 1], [2, 1, 0])
    FOURS: gl.constexpr = SIZE // 512
    x = gl.reshape(acc, [TM // 64, 4, 2, 8, TN // 8, 4, 2])  # rows of 64, 16, 8, 1, columns of 8, 2, 1
    x = gl.reshape(gl.permute(x, [0, 4, 1, 3, 5, 2, 6]), [FOURS, 128, 4])
    x = gl.convert_layout(x, B, assert_trivial=True)
    offs = gl.arange(0, FOURS, gl.SliceLayout(1, gl.SliceLayout(2, B)))[:, None, None] * 512
    offs += gl.arange(0, 128, gl.SliceLayout(0, gl.SliceLayout(2, B)))[None, :, None] * 4
    offs += gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, B)))[None, None, :]
    pieces_ptr = partial_ptr + (item - piece - sizes.whole).to(gl.int64) * SIZE
    gl.store(pieces_ptr + piece * SIZE + offs, x)
    barrier()
    counter = counter_ptr + (block - sizes.whole)
    came_last = gl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == count - 1
    if came_last:
        gl.store(counter, 0)
        for i in range(1, count):
            x += gl.load(pieces_ptr + (piece + i) % count * SIZE + offs, cache_modifier=".cg")
    x = gl.permute(gl.reshape(x, [TM // 64, TN // 8, 4, 8, 4, 2, 2]), [0, 2, 5, 3, 1, 4, 6])
    return gl.convert_layout(gl.reshape(x, [TM, TN]), L, assert_trivial=True), came_last


@gluon.jit
def _consumer(matrices, vectors, vectors2, after, partial_ptr, counter_ptr, ring, stage, sizes,
              W: gl.constexpr, C: gl.constexpr):  # fmt: skip
    F: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    programs = gl.num_programs(0)
    slot = 0
    phase = 0
    turn_phase = 1 - W
    extra_phase = 0
    for item in range(gl.program_id(0) + W * programs, sizes.items, 2 * programs):
        row, column, block, first, last, piece, count = _locate(item, sizes, C)
        tma.store_wait(0)
        if C.ranks > 0:
            _load_low_rank(matrices, ring, stage, row, column, 0, W, C)
        if W == 1:
            slot, phase = _skip(item - programs, slot, phase, sizes, C)
        mbarrier.wait(ring.turn.index(W), turn_phase)
        turn_phase ^= 1
        steps = last - first
        if C.second:
            # The values of the first input are this thread's own: it stores and loads them itself.
            rows = gl.arange(0, TM, gl.SliceLayout(1, F))
            mine = partial_ptr + (gl.program_id(0) * 2 + W).to(gl.int64) * (TM * TN)
            mine += rows[:, None] * TN + gl.arange(0, TN, gl.SliceLayout(0, F))[None, :]
            acc, slot, phase = _sum_products(sizes.steps1, slot, phase, ring, C)
            acc = _finish_sum(acc, slot, sizes.steps1, ring, C)
            gl.store(mine, _to_values(acc, row, column, vectors, sizes, C.unsigned))
            steps = sizes.steps2
        acc, slot, phase = _sum_products(steps, slot, phase, ring, C)
        mbarrier.arrive(ring.turn.index(1 - W), count=1)
        acc = _finish_sum(acc, slot, steps, ring, C)
        came_last = True
        if not C.second:
            came_last = count == 1
            if count > 1:
                acc, came_last = _join(acc, partial_ptr, counter_ptr, item, block, piece, count, sizes)
        if C.ranks > 0:
            mbarrier.wait(ring.extra.index(W), extra_phase)
            extra_phase ^= 1
        if came_last:
            if C.second:
                x = _to_values(acc, row, column, vectors2, sizes, C.unsigned2) + gl.load(mine)
            else:
                x = _to_values(acc, row, column, vectors, sizes, C.unsigned)
            if C.ranks > 0:
                x = _multiply_low_rank(x, matrices, stage, W, C)
                if C.ranks == HALF:  # there may be more
                    for rank in range(HALF, sizes.R, HALF):
                        _load_low_rank(matrices, ring, stage, row, column, rank, W, C)
                        mbarrier.wait(ring.extra.index(W), extra_phase)
                        extra_phase ^= 1
                        x = _multiply_low_rank(x, matrices, stage, W, C)
            extra_phase = _finish(x, row, column, matrices, ring, extra_phase, stage, after, sizes, W, C)
        if W == 0:
            slot, phase = _skip(item + programs, slot, phase, sizes, C)
    tma.store_wait(0)


@gluon.jit
def _skip(item, slot, phase, sizes, C: gl.constexpr):
    """Where the ring stands after another warpgroup's item."""
    _row, _column, _block, first, last, _piece, _count = _locate(item, sizes, C)
    slot += last - first
    return slot % C.stages, phase ^ (slot // C.stages & 1)


# ---- after the sums


@gluon.jit
def _halves(x, L: gl.constexpr):
    """The left and right half of the columns; no data moves."""
    left, right = gl.split(gl.permute(gl.reshape(x, [TM, 2, HALF]), [0, 2, 1]))
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
def _norm_rope(x, norm_ptr, rotary, ring, phase, stage, row, W: gl.constexpr):
    """RMSNorm and RoPE of one head, x [TM, 128], as two halves; rotary: sine and cosine of pair p at 2p and 2p + 1."""
    L: gl.constexpr = x.type.layout
    F64: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    _load_rotary(rotary, ring, stage, row, 0, W)
    inverse = gl.rsqrt(gl.sum(x * x, axis=1) * (1.0 / HEAD) + EPS)
    x = x * (inverse[:, None] * gl.load(norm_ptr + gl.arange(0, 128, gl.SliceLayout(0, L))).to(gl.float32)[None, :])
    left, right = _halves(x, F64)
    mbarrier.wait(ring.extra.index(W), phase)
    left = _rotate(left, stage, W)
    barrier()  # all have read the first half
    _load_rotary(rotary, ring, stage, row, HALF, W)
    mbarrier.wait(ring.extra.index(W), phase ^ 1)
    right = _rotate(right, stage, W)
    barrier()
    return left, right


@gluon.jit
def _rotary_buffer(stage, W: gl.constexpr):
    """All of this warpgroup's results' place."""
    return stage.index(W)._reinterpret(gl.float32, [TM, HALF], gl.NVMMASharedLayout(128, 32, 2))


@gluon.jit
def _load_rotary(rotary, ring, stage, row, column, W: gl.constexpr):
    bar = ring.extra.index(W)
    mbarrier.expect(bar, TM * HALF * 4)
    tma.async_copy_global_to_shared(rotary, [row, column], bar, _rotary_buffer(stage, W))


@gluon.jit
def _rotate(x, stage, W: gl.constexpr):
    """RoPE of x [TM, 64] with the sines and cosines in shared memory."""
    L: gl.constexpr = x.type.layout
    sine, cosine = gl.split(gl.reshape(_rotary_buffer(stage, W).load(L), [TM, HALF // 2, 2]))
    even, odd = gl.split(gl.reshape(x, [TM, HALF // 2, 2]))
    y = gl.reshape(gl.join(even * cosine - odd * sine, even * sine + odd * cosine), [TM, HALF])
    return gl.convert_layout(y, L, assert_trivial=True)


@gluon.jit
def _finish(x, row, column, matrices, ring, extra_phase, stage, after, sizes, W: gl.constexpr, C: gl.constexpr):
    """Bias, epilogue and store of x, float32 [TM, 128]; the phase of ``ring.extra``. What lies beyond M is computed but
    not stored."""
    T: gl.constexpr = matrices.out.dtype
    F: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    F64: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    if C.epilogue == GATE_RESIDUAL:
        mbarrier.expect(ring.extra.index(W), TM * TN * 2)
        for i in gl.static_range(2):
            buffer = stage.index(W).slice(i * TM, TM)
            tma.async_copy_global_to_shared(matrices.beside, [row, column + i * HALF], ring.extra.index(W), buffer)
    offs_n = column + gl.arange(0, TN, gl.SliceLayout(0, F))
    x += gl.load(after.bias + offs_n, mask=offs_n < sizes.bias_size, other=0.0).to(gl.float32)[None, :]
    if C.epilogue == GELU:
        x = _gelu(x, gl.bfloat16 == T)
    elif C.epilogue == GATE_RESIDUAL:
        if C.one_gate:
            x *= gl.load(after.gate + offs_n).to(gl.float32)[None, :]
        else:
            offs_m = gl.minimum(row + gl.arange(0, TM, gl.SliceLayout(1, F)), sizes.M - 1)
            gate = gl.load(after.gate + (offs_m // sizes.rows_per_gate * sizes.N)[:, None] + offs_n[None, :])
            x *= gate.to(gl.float32)
    left, right = _halves(x, F64)
    if C.epilogue == NORM_ROPE:
        third = column // (sizes.N // 3)
        if third < 2:
            norm_ptr = after.norm_q
            if third == 1:
                norm_ptr = after.norm_k
            left, right = _norm_rope(x, norm_ptr, matrices.beside, ring, extra_phase, stage, row, W)
    elif C.epilogue == GATE_RESIDUAL:
        mbarrier.wait(ring.extra.index(W), extra_phase)
        extra_phase ^= 1
    halves = (left, right)
    for i in gl.static_range(2):
        buffer = stage.index(W).slice(i * TM, TM)
        y = halves[i]
        if C.epilogue == GATE_RESIDUAL:
            y += buffer.load(F64).to(gl.float32)
        if gl.float16 == T:
            y = gl.minimum(gl.maximum(y, -65504.0), 65504.0)
        buffer.store(y.to(T))
        fence_async_shared()
        tma.async_copy_shared_to_global(matrices.out, [row, column + i * HALF], buffer)
    return extra_phase


@gluon.jit(do_not_specialize=["M", "steps1", "steps2", "R", "whole", "pieces", "items", "rows_per_gate", "bias_size"])
def gemm_w8a8_hopper_kernel(
    a_desc, w_desc, a2_desc, w2_desc, lora_desc, up_desc, beside_desc, out_desc,
    scales_ptr, wscales_ptr, sums_ptr, scales2_ptr, wscales2_ptr, sums2_ptr,
    bias_ptr, gate_ptr, norm_q_ptr, norm_k_ptr, partial_ptr, counter_ptr,
    M, N, steps1, steps2, R, whole, pieces, items, rows_per_gate, bias_size, C: gl.constexpr,
):  # fmt: skip
    """steps1, steps2: K and K2 over 128 · items: whole blocks and pieces · bias_size: N, or 0 for no bias ·
    C: a HopperTile (tiles_int8.py)."""
    STAGES: gl.constexpr = C.stages
    ring_a = gl.allocate_shared_memory(gl.int8, [STAGES, TM, BK], gl.NVMMASharedLayout(128, 8, 2))
    ring_w = gl.allocate_shared_memory(gl.int8, [STAGES, TN, BK], gl.NVMMASharedLayout(128, 8, 2))
    stage = gl.allocate_shared_memory(out_desc.dtype, [2, 2 * TM, HALF], gl.NVMMASharedLayout(128, 16, 2))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    extra = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(turn.index(i), count=1)
        mbarrier.init(extra.index(i), count=1)
    fence_async_shared()
    ring = Ring(ring_a, ring_w, full, empty, turn, extra)
    matrices = Matrices(a_desc, w_desc, a2_desc, w2_desc, lora_desc, up_desc, beside_desc, out_desc)
    vectors = Vectors(scales_ptr, wscales_ptr, sums_ptr)
    vectors2 = Vectors(scales2_ptr, wscales2_ptr, sums2_ptr)
    after = After(bias_ptr, gate_ptr, norm_q_ptr, norm_k_ptr)
    sizes = Sizes(M, N, steps1, steps2, R, whole, pieces, items, rows_per_gate, bias_size)
    gl.warp_specialize(
        [
            (_consumer, (matrices, vectors, vectors2, after, partial_ptr, counter_ptr, ring, stage, sizes, 0, C)),
            (_consumer, (matrices, vectors, vectors2, after, partial_ptr, counter_ptr, ring, stage, sizes, 1, C)),
            (_producer, (matrices, ring, sizes, C)),
        ],
        [4, C.producer_warps],
        C.registers,
    )


name_functions(__package__)  # again: layers.py is there before this file
