"""One block of an INT4 product on tensor cores: the device functions behind ``gemm_int4.py`` and ``gemm_quantize.py``.

    c[m, n] = sum_g ascales[m, g] * wscales[n, g] * dot(codes[m, g], q[n, g]) + lora_act[m] . proj_up[n] + bias[n]

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

from .epilogue import BF16, pack_pair, unpack_pair
from .gluon_compat import async_copy, async_load, barrier, gl, gluon

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
            a0,
            a1,
            a2,
            a3,
            b0,
            b1,
            sa_lo,
            sa_hi,
            off_lo,
            off_hi,
            sw_lo,
            sw_hi,
            c0,
            c1,
            c2,
            c3,
            magic[0],
            magic[1],
            magic[2],
            magic[3],
        ],
        dtype=(gl.float32, gl.float32, gl.float32, gl.float32),
        is_pure=True,
        pack=1,
    )


@gluon.jit
def mma_16bit(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3, T: gl.constexpr):
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
def fragments_b(x, P: gl.constexpr):
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
    b0, b1 = fragments_b(xb, P)
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
def _source(act_ptr, ascales_ptr, qweight_ptr, wscales_ptr, K, row_blocks, pid_m, tile_n,
            m16: gl.constexpr, n16: gl.constexpr, warps: gl.constexpr):  # fmt: skip
    """Where a block's codes and scales come from: (base pointers of its first group, offsets of a thread's 16 bytes).

    Blocks of 64 rows beyond the last repeat it: their rows are not stored. A thread's rows of one operand are in one
    block of 64 rows, so that one address and constants reach them all.
    """
    m64: gl.constexpr = m16 // 4
    COPY: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 32, 1], [warps, 1, 1], [2, 1, 0])
    COPY_A: gl.constexpr = gl.BlockedLayout([m16 // warps, 1, 4], [1, 32, 1], [warps, 1, 1], [2, 1, 0])
    COPY_SA: gl.constexpr = gl.BlockedLayout([1, 1, 4], [4, 8, 1], [warps, 1, 1], [2, 1, 0])
    COPY_SW: gl.constexpr = gl.BlockedLayout([1, 4], [16, 2], [warps, 1], [1, 0])
    groups = K // 64
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
    first_tile = (tile_n // 8 * groups).to(gl.int64)
    bases = (act_ptr, qweight_ptr + first_tile * 1024, ascales_ptr, wscales_ptr + first_tile * 64)
    return bases, (o_act, o_weight, o_ascales, o_wscales)


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
def _first_stages(buffers, bases, offsets, K, STAGES: gl.constexpr):
    """Start the copies of all stages but one."""
    for stage in gl.static_range(STAGES - 1):
        _copy_stage(buffers, 2 * stage, bases, offsets, stage * 128 < K)
        bases = _next_stage(bases)
    return bases


@gluon.jit
def _main_loop(buffers, bases, offsets, c0, c1, c2, c3, magic, K,
               ACT_UNSIGNED: gl.constexpr, T: gl.constexpr, P: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """c += codes @ q^T with scales, over all of K, behind ``_first_stages``."""
    M16: gl.constexpr = P.size_per_thread[0]
    N8: gl.constexpr = P.size_per_thread[1]
    WM: gl.constexpr = P.warps_per_cta[0]
    WN: gl.constexpr = P.warps_per_cta[1]
    FRAG_A: gl.constexpr = gl.BlockedLayout([M16, 1, 1, 4], [1, 1, 32, 1], [WM, WN, 1, 1], [3, 2, 0, 1])
    FRAG_B: gl.constexpr = gl.BlockedLayout([1, N8 // 2, 1, 4], [1, 1, 32, 1], [WM, WN, 1, 1], [3, 2, 0, 1])
    FRAG_SA: gl.constexpr = gl.BlockedLayout(
        [1, 1, 1, 1, M16], [1, 1, 8, 4, 1], [WM * M16 // 4, WN, 1, 1, 4 // M16], [4, 3, 2, 0, 1]
    )
    FRAG_SW: gl.constexpr = gl.BlockedLayout([1, N8 // 2, 1, 2], [1, 1, 8, 4], [WM, WN, 1, 1], [3, 2, 0, 1])
    LA: gl.constexpr = gl.SliceLayout(1, FRAG_A)  # [m16, 32, 4]
    LB: gl.constexpr = gl.SliceLayout(0, FRAG_B)  # [n16, 32, 4]
    LSA: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(1, FRAG_SA))  # [m64, 8, 4]
    LSW: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(0, FRAG_SW))  # [n16, 8]
    slot = 0
    fill = 2 * (STAGES - 1)
    for k in range(0, K, 128):
        async_copy.wait_group(STAGES - 2)
        barrier()
        _copy_stage(buffers, fill, bases, offsets, k + 128 * (STAGES - 1) < K)
        bases = _next_stage(bases)
        for g in gl.static_range(2):
            xa = buffers[0].index(slot + g).load(LA)
            xb = buffers[1].index(slot + g).load(LB)
            xsa = buffers[2].index(slot + g).load(LSA)
            xsw = buffers[3].index(slot + g).load(LSW)
            c0, c1, c2, c3 = _accumulate(xa, xb, xsa, xsw, c0, c1, c2, c3, magic, ACT_UNSIGNED, T, P)
        slot = gl.where(slot == 2 * (STAGES - 1), 0, slot + 2)
        fill = gl.where(fill == 2 * (STAGES - 1), 0, fill + 2)
    async_copy.wait_group(0)
    return c0, c1, c2, c3


@gluon.jit
def _add_low_rank(lora_act_ptr, proj_up_ptr, c0, c1, c2, c3, M, R, tile_m, tile_n,
                  T: gl.constexpr, P: gl.constexpr):  # fmt: skip
    """c += T(lora_act) @ proj_up^T for the m16 tiles from tile_m and the n16 tiles from tile_n."""
    m16: gl.constexpr = c0.shape[0]
    n16: gl.constexpr = c0.shape[1] // 2
    M16: gl.constexpr = P.size_per_thread[0]
    N8: gl.constexpr = P.size_per_thread[1]
    WM: gl.constexpr = P.warps_per_cta[0]
    WN: gl.constexpr = P.warps_per_cta[1]
    PAIR_A: gl.constexpr = gl.BlockedLayout([M16, 1, 1, 2], [1, 1, 32, 1], [WM, WN, 1, 1], [3, 2, 0, 1])
    FRAG_B: gl.constexpr = gl.BlockedLayout([1, N8 // 2, 1, 4], [1, 1, 32, 1], [WM, WN, 1, 1], [3, 2, 0, 1])
    LA: gl.constexpr = gl.SliceLayout(1, PAIR_A)  # [m16, 32, 2]
    LB: gl.constexpr = gl.SliceLayout(0, FRAG_B)  # [n16, 32, 4]
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
        b0, b1 = fragments_b(gl.load(proj_up_ptr + up), P)
        c0, c1, c2, c3 = mma_16bit(x0, x1, x2, x3, b0, b1, c0, c1, c2, c3, T)
        lora_act_ptr += 16
        proj_up_ptr += 128
    return c0, c1, c2, c3


@gluon.jit
def _pair_register(x, T: gl.constexpr, P: gl.constexpr):
    """float32 [m16, 32, 2] as one register of pairs [m16, 1, 32]."""
    low, high = gl.split(x)
    pair = pack_pair(low, high, T, False)
    return gl.expand_dims(gl.convert_layout(pair, gl.SliceLayout(1, P), assert_trivial=True), 1)


@gluon.jit
def shared_buffers(m16: gl.constexpr, n16: gl.constexpr, STAGES: gl.constexpr):
    SHARED: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    SHARED_SW: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    s_act = gl.allocate_shared_memory(gl.int32, [2 * STAGES, m16, 32, 4], SHARED)
    s_weight = gl.allocate_shared_memory(gl.int32, [2 * STAGES, n16, 32, 4], SHARED)
    s_ascales = gl.allocate_shared_memory(gl.int32, [2 * STAGES, m16 // 4, 8, 4], SHARED)
    s_wscales = gl.allocate_shared_memory(gl.int32, [2 * STAGES, n16, 8], SHARED_SW)
    return s_act, s_weight, s_ascales, s_wscales


@gluon.jit
def _add_bias(bias_ptr, bias_size, tile_n, c0, c1, c2, c3, P: gl.constexpr):
    n8: gl.constexpr = c0.shape[1]
    column = gl.arange(0, n8, gl.SliceLayout(0, gl.SliceLayout(2, P)))[None, :, None] * 8
    column += gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, P)))[None, None, :] % 4 * 2
    bias_ptr += tile_n * 16
    bias0 = gl.load(bias_ptr + column, mask=column < bias_size, other=0.0).to(gl.float32)
    bias1 = gl.load(bias_ptr + column + 1, mask=column < bias_size, other=0.0).to(gl.float32)
    return c0 + bias0, c1 + bias1, c2 + bias0, c3 + bias1


@gluon.jit
def block_place(pid, blocks_n, row_blocks, m16: gl.constexpr, GROUP_M: gl.constexpr):
    """(row, column) of block ``pid``: blocks go down GROUP_M row blocks before they take the next column block."""
    blocks_m = (row_blocks + m16 // 4 - 1) // (m16 // 4)
    in_group = GROUP_M * blocks_n
    first_m = pid // in_group * GROUP_M
    group_m = gl.minimum(blocks_m - first_m, GROUP_M)
    return first_m + pid % in_group % group_m, pid % in_group // group_m


@gluon.jit
def opaque(x):
    """x, of which the compiler knows nothing: it does not compute what depends on x before x is needed."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def multiply_block(first, second, bias_ptr, bias_size, M, N, row_blocks, pid_m, pid_n, buffers,
                   ACT_UNSIGNED: gl.constexpr, ACT2_UNSIGNED: gl.constexpr, PARTS: gl.constexpr,
                   T: gl.constexpr, P: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """Accumulators c0..c3 of block (pid_m, pid_n).

    first, and second if there are two PARTS: (codes, ascales, qweight, wscales, lora_act, proj_up, K, R); pointers to
    int32 words, lora_act to float32 · P: the accumulators' layout.
    """
    m16: gl.constexpr = P.size_per_thread[0] * P.warps_per_cta[0]
    n8: gl.constexpr = P.size_per_thread[1] * P.warps_per_cta[1]
    n16: gl.constexpr = n8 // 2
    warps: gl.constexpr = P.warps_per_cta[0] * P.warps_per_cta[1]
    act_ptr, ascales_ptr, qweight_ptr, wscales_ptr, lora_act_ptr, proj_up_ptr, K, R = first
    tile_m, tile_n = pid_m * m16, pid_n * n16
    bases, offsets = _source(
        act_ptr, ascales_ptr, qweight_ptr, wscales_ptr, K, row_blocks, pid_m, tile_n, m16, n16, warps
    )
    bases = _first_stages(buffers, bases, offsets, K, STAGES)

    # The low-rank branch and the bias start the accumulators while the first copies are under way. Low-rank first: the
    # addition of the bias frees the main loop from the registers that the 16-bit MMA needs side by side.
    zero = gl.zeros([m16, n8, 32], gl.float32, P)
    c0, c1, c2, c3 = _add_low_rank(lora_act_ptr, proj_up_ptr, zero, zero, zero, zero, M, R, tile_m, tile_n, T, P)
    if PARTS == 2:
        act2_ptr, ascales2_ptr, qweight2_ptr, wscales2_ptr, lora_act2_ptr, proj_up2_ptr, K2, R2 = second
        c0, c1, c2, c3 = _add_low_rank(lora_act2_ptr, proj_up2_ptr, c0, c1, c2, c3, M, R2, tile_m, tile_n, T, P)
    c0, c1, c2, c3 = _add_bias(bias_ptr, bias_size, tile_n, c0, c1, c2, c3, P)

    # Four equal words for the MMA's accumulator operand that the compiler cannot know to be equal (or constant): it
    # keeps them in four registers instead of making them anew.
    magic = ((M >> 31) + MAGIC, (N >> 31) + MAGIC, (K >> 31) + MAGIC, (row_blocks >> 31) + MAGIC)
    c0, c1, c2, c3 = _main_loop(buffers, bases, offsets, c0, c1, c2, c3, magic, K, ACT_UNSIGNED, T, P, STAGES)
    if PARTS == 2:
        barrier()  # all warps have read the last stages of the first part
        bases, offsets = _source(
            act2_ptr, ascales2_ptr, qweight2_ptr, wscales2_ptr, K2, row_blocks, pid_m, tile_n, m16, n16, warps
        )
        bases = _first_stages(buffers, bases, offsets, K2, STAGES)
        c0, c1, c2, c3 = _main_loop(buffers, bases, offsets, c0, c1, c2, c3, magic, K2, ACT2_UNSIGNED, T, P, STAGES)
    return c0, c1, c2, c3
