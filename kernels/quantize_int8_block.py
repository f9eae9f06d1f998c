"""One block of rows on its way to INT8: the device functions behind ``quantize_int8.py``.

A tensor of words is [warps, rows, 4, 4]: lane 4 * r + c of a warp has 16 bytes of row r, columns 8c to 8c + 7 of the
warp's 32. Those are the B operands of two 16-bit MMAs as they are, if proj_down, the A operand, has its columns in the
same order (low_rank.py). An MMA's result is sums of 16 ranks by 8 rows.

A tile is 8 rows, or the last one of a block 1, 2 or 4 (ROWS), which lanes then have several times over.

Smoothing in bf16 is that of ``quantize_block.py``: times the sum of two bf16 factors, which gives the rounded quotient.
"""

from __future__ import annotations

from .act_codes import reciprocal
from .epilogue import BF16, pack_pair, unpack_pair
from .gluon_compat import async_copy, async_load, barrier, gl, gluon, store_as, view_as
from .int4_block import mma_16bit
from .quantize_block import index_along, lane_words, reciprocal_words

_LARGEST = gl.constexpr(3.4028234663852886e38)


@gluon.constexpr_function
def word_layout(WARPS):
    """[warps, rows, 4, 4 words]."""
    return gl.BlockedLayout([1, 1, 1, 4], [1, 8, 4, 1], [WARPS, 1, 1, 1], [3, 2, 1, 0])


@gluon.constexpr_function
def row_layout(WARPS):
    """One value per row, [rows]."""
    return gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, word_layout(WARPS))))


@gluon.constexpr_function
def _parts_layout(WARPS, parts):
    """[parts, rows], all parts of a row in one thread, so that its value can become one of row_layout."""
    L = gl.BlockedLayout([parts, 1, 1, 1], [1, 8, 4, 1], [1, 1, 1, WARPS], [3, 2, 1, 0])
    return gl.SliceLayout(2, gl.SliceLayout(3, L))


@gluon.constexpr_function
def power_of_2(n):
    """The next one; 0 for 0."""
    return 1 << (n - 1).bit_length() if n else 0


@gluon.jit
def split_words(x):
    """The four words of each lane, the last axis."""
    return lane_words(x, gl.SliceLayout(3, word_layout(x.shape[0])))


@gluon.jit
def _eight_rows(x):
    """[warps, ROWS, 4] as [warps, 8, 4], the rows again and again, as the lanes have them."""
    WARPS: gl.constexpr = x.shape[0]
    ROWS: gl.constexpr = x.shape[1]
    if ROWS == 8:
        return x
    else:
        L: gl.constexpr = gl.BlockedLayout([1, 1, 1, 1], [1, 8 // ROWS, ROWS, 4], [WARPS, 1, 1, 1], [3, 2, 1, 0])
        x = gl.expand_dims(gl.convert_layout(x, gl.SliceLayout(1, L), assert_trivial=True), 1)
        x = gl.reshape(x.broadcast_to([WARPS, 8 // ROWS, ROWS, 4]), [WARPS, 8, 4])
        return gl.convert_layout(x, gl.SliceLayout(3, word_layout(WARPS)), assert_trivial=True)


@gluon.jit
def tile_offsets(tile, first, last, start, stride_x, ROWS: gl.constexpr, WARPS: gl.constexpr):
    """Where a tile's first words are; rows from ``last`` on repeat the one before."""
    Q: gl.constexpr = word_layout(WARPS)
    row = gl.minimum(first + tile * 8 + index_along(Q, 4, 1, ROWS), last - 1)
    return row.to(gl.int64) * stride_x + (start + _word(Q))


@gluon.jit
def _word(Q: gl.constexpr):
    """A word's number in the words of all warps."""
    return index_along(Q, 4, 0, Q.warps_per_cta[0]) * 16 + index_along(Q, 4, 2, 4) * 4 + index_along(Q, 4, 3, 4)


@gluon.jit
def shared_buffers(RT: gl.constexpr, TILES: gl.constexpr, PART: gl.constexpr, WARPS: gl.constexpr,
                   STEPS: gl.constexpr):  # fmt: skip
    """For each tile, words of x [steps, warps, rows, 4, 4], with room for low-rank sums when these are done; and two
    times float32 [warps, rows]. Each is a buffer of its own because the compiler puts a barrier between two accesses to
    one."""
    words, floats = (), ()
    for _ in gl.static_range(TILES):
        words += (_word_buffer(STEPS, power_of_2(RT), 8, WARPS),)
        floats += (_float_buffer(8, WARPS), _float_buffer(8, WARPS))
    if PART > 0:
        words += (_word_buffer(STEPS, power_of_2(RT) * 8 // PART, PART, WARPS),)
        floats += (_float_buffer(PART, WARPS), _float_buffer(PART, WARPS))
    return words, floats


@gluon.jit
def _word_buffer(STEPS: gl.constexpr, LEAST: gl.constexpr, ROWS: gl.constexpr, WARPS: gl.constexpr):
    size: gl.constexpr = STEPS if STEPS > LEAST else LEAST
    layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0])
    return gl.allocate_shared_memory(gl.int32, [size, WARPS, ROWS, 4, 4], layout)


@gluon.jit
def _float_buffer(ROWS: gl.constexpr, WARPS: gl.constexpr):
    layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0, 1])  # those of all warps side by side
    return gl.allocate_shared_memory(gl.float32, [WARPS, ROWS], layout)


@gluon.jit
def copy_step(buffers, step, x_ptr, offsets, start, stop, STEPS: gl.constexpr, WARPS: gl.constexpr):
    """Start the copies of 32 columns per warp of all tiles into shared memory, or nothing beyond the last step; columns
    from ``stop`` on become 0."""
    if step < STEPS:
        inside = start + step * (16 * WARPS) + _word(word_layout(WARPS)) < stop
        for t in gl.static_range(len(buffers)):
            async_load(buffers[t].index(step), x_ptr + offsets[t] + step * (16 * WARPS), mask=inside)
    async_copy.commit_group()


@gluon.jit
def load_step(buffers, step, WARPS: gl.constexpr):
    """All tiles' words of one step from shared memory."""
    tiles = ()
    for t in gl.static_range(len(buffers)):
        tiles += (buffers[t].index(step).load(word_layout(WARPS)),)
    return tiles


@gluon.jit
def store_step(buffers, step, tiles):
    """Into the places that :func:`load_step` reads."""
    for t in gl.static_range(len(buffers)):
        buffers[t].index(step).store(tiles[t])


@gluon.jit
def _pair_of_lane(c):
    """Which of its four pairs a lane takes: r % 4. The compiler believes that lanes with the same c have the same."""
    return gl.inline_asm_elementwise(
        "{\n.reg .b32 lane;\nmov.u32 lane, %laneid;\nbfe.u32 $0, lane, 2, 2;\n}",
        "=r,r",
        [c],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _of_all_lanes(x, c):
    """What lanes c, 4 + c, 8 + c and 12 + c have, in every lane: [warps, 1, 4] to [warps, 1, 4, 4]."""
    x0, x1, x2, x3 = gl.inline_asm_elementwise(
        "{\n.reg .b32 l;\nshfl.sync.idx.b32 $0, $4, $5, 31, -1;\nadd.s32 l, $5, 4;\n"
        "shfl.sync.idx.b32 $1, $4, l, 31, -1;\nadd.s32 l, $5, 8;\nshfl.sync.idx.b32 $2, $4, l, 31, -1;\n"
        "add.s32 l, $5, 12;\nshfl.sync.idx.b32 $3, $4, l, 31, -1;\n}",
        "=&r,=&r,=&r,=&r,r,r",
        [x, c],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32),
        is_pure=True,
        pack=1,
    )
    WARPS: gl.constexpr = x.shape[0]
    words = gl.reshape(gl.join(gl.join(x0, x2), gl.join(x1, x3)), [WARPS, 1, 4, 4])
    return gl.convert_layout(words, word_layout(WARPS), assert_trivial=True)


@gluon.jit
def load_factors(ptrs, step, start, stop, K, NORM: gl.constexpr, T: gl.constexpr, RT: gl.constexpr,
                 WARPS: gl.constexpr, STEPS: gl.constexpr, EXACT: gl.constexpr):  # fmt: skip
    """What a step needs besides x: a word of smooth_factor, the modulation's scale and shift, and proj_down; beyond
    the last step something or other."""
    smooth_ptr, scale_ptr, shift_ptr, down_ptr = ptrs
    Q: gl.constexpr = word_layout(WARPS)
    U: gl.constexpr = gl.SliceLayout(3, Q)
    V: gl.constexpr = gl.SliceLayout(1, Q)  # [warps, 4, 4]: of columns
    first = start + (gl.minimum(step, STEPS - 1) if EXACT else step) * (16 * WARPS)
    c = index_along(U, 3, 2, 4)
    i = _pair_of_lane(c)
    word = first + index_along(U, 3, 0, WARPS) * 16
    # a pair's place in a packed vector: k/16, k%8/2, k/8%2; 1 / infinity is what columns from ``stop`` on get
    infinity: gl.constexpr = 0x7F807F80 if T == BF16 else 0x7C007C00
    smooth_ptr += word + (c // 2 * 8 + i * 2 + c % 2)
    smooth = gl.load(smooth_ptr) if EXACT else gl.load(smooth_ptr, mask=word + c * 4 + i < stop, other=infinity)
    scale, shift = smooth, smooth
    if NORM:
        word = first + index_along(V, 3, 0, WARPS) * 16 + index_along(V, 3, 1, 4) * 4 + index_along(V, 3, 2, 4)
        scale, shift = _load(scale_ptr + word, word, stop, EXACT), _load(shift_ptr + word, word, stop, EXACT)
    down = ()
    column = first + index_along(Q, 4, 0, WARPS) * 16
    lane = index_along(Q, 4, 1, 8) * 4 + index_along(Q, 4, 2, 4)
    down_ptr += column * 16 + (lane * 4 + index_along(Q, 4, 3, 4))
    for i in gl.static_range(2 * RT):
        down += (_load(down_ptr + i // 2 * (K * 8) + i % 2 * 128, column, stop, EXACT),)
    return smooth, scale, shift, down


@gluon.jit
def _load(ptr, column, stop, EXACT: gl.constexpr):
    return gl.load(ptr) if EXACT else gl.load(ptr, mask=column < stop, other=0)


@gluon.jit
def column_factors(smooth, scale, shift, T: gl.constexpr, NORM: gl.constexpr):
    """(first, second): 1 / smooth_factor as :func:`reciprocal_words`. (gain pair, shift pair): float32 of the
    modulation."""
    low, high = unpack_pair(smooth, T)
    first, second = reciprocal_words(reciprocal(low), reciprocal(high), T)
    U: gl.constexpr = smooth.type.layout
    c = index_along(U, 3, 2, 4)
    first, second = _of_all_lanes(first, c), _of_all_lanes(second, c)
    gain, offset = (first, second), (first, second)
    if NORM:
        gain_low, gain_high = unpack_pair(scale, T)
        shift_low, shift_high = unpack_pair(shift, T)
        gain = (gl.expand_dims(gain_low + 1.0, 1), gl.expand_dims(gain_high + 1.0, 1))
        offset = (gl.expand_dims(shift_low, 1), gl.expand_dims(shift_high, 1))
    return first, second, gain, offset


@gluon.jit
def add_statistics(x, sums, squares, T: gl.constexpr):
    """sums + x, squares + x^2 of words."""
    low, high = unpack_pair(x, T)
    return sums + (low + high), gl.fma(low, low, gl.fma(high, high, squares))


@gluon.jit
def normalize(x, gain, offset, rstd, minus_mean, T: gl.constexpr):
    """T((x * rstd + minus_mean) * gain + offset) of words; rstd, minus_mean (mean times -rstd): [rows]."""
    low, high = unpack_pair(x, T)
    a = gl.expand_dims(gl.expand_dims(gl.expand_dims(rstd, 0), 2), 3)
    b = gl.expand_dims(gl.expand_dims(gl.expand_dims(minus_mean, 0), 2), 3)
    low = gl.fma(gl.fma(low, a, b), gain[0], offset[0])
    high = gl.fma(gl.fma(high, a, b), gain[1], offset[1])
    return pack_pair(low, high, T, False)


@gluon.jit
def not_negative(x, T: gl.constexpr):
    """max(x, 0) of words."""
    kind: gl.constexpr = "bf16x2" if T == BF16 else "f16x2"
    asm: gl.constexpr = "{\n.reg .b32 zero;\nmov.b32 zero, 0;\nmax." + kind + " $0, $1, zero;\n}"
    return gl.inline_asm_elementwise(asm, "=r,r", [x], dtype=gl.int32, is_pure=True, pack=1)


@gluon.constexpr_function
def _largest_asm(T, XORSIGN):
    """PTX: the larger magnitudes of pairs. max.xorsign.abs has the sign of a product and needs sm_86."""
    kind = "f16x2" if T else "bf16x2"
    maximum = f"max.xorsign.abs.{kind}" if XORSIGN else f"max.{kind}"
    clear = "mov.b32 {}, {};" if XORSIGN else "abs.f16x2 {}, {};" if T else "and.b32 {}, {}, 0x7FFF7FFF;"
    lines = [clear.format(f"w{i}", f"${i + 2}") for i in range(4)]
    lines += [f"{maximum} w0, w0, w1;", f"{maximum} w2, w2, w3;", f"{maximum} w0, w0, w2;", f"{maximum} $0, $1, w0;"]
    return "{\n.reg .b32 w<4>;\n" + "\n".join(lines) + "\n}"


@gluon.jit
def larger_words(largest, x, T: gl.constexpr, XORSIGN: gl.constexpr):
    """Larger magnitudes of words [warps, rows, 4] and of four words each of x; signs are arbitrary."""
    w0, w1, w2, w3 = split_words(x)
    return gl.inline_asm_elementwise(
        _largest_asm(T, XORSIGN), "=r,r,r,r,r,r", [largest, w0, w1, w2, w3], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def largest_of_row(x, T: gl.constexpr):
    """Words [warps, rows, 4] to the largest magnitude of each warp's part of a row, float32 [warps, rows]."""
    low, high = unpack_pair(x, T)
    return gl.max(gl.maximum(gl.abs(low), gl.abs(high)), axis=2)


@gluon.jit
def project(x, down, sums, FIRST: gl.constexpr, RT: gl.constexpr, T: gl.constexpr):
    """The tile's four registers for each of RT m16 tiles of ranks, from sums[FIRST] on, plus proj_down @ x^T."""
    w0, w1, w2, w3 = split_words(x)
    w0, w1, w2, w3 = _eight_rows(w0), _eight_rows(w1), _eight_rows(w2), _eight_rows(w3)
    new = ()
    for m in gl.static_range(RT):
        a0, a1, a2, a3 = split_words(down[2 * m])
        c0, c1, c2, c3 = sums[FIRST + 4 * m], sums[FIRST + 4 * m + 1], sums[FIRST + 4 * m + 2], sums[FIRST + 4 * m + 3]
        c0, c1, c2, c3 = mma_16bit(a0, a1, a2, a3, w0, w1, c0, c1, c2, c3, T)
        a0, a1, a2, a3 = split_words(down[2 * m + 1])
        new += mma_16bit(a0, a1, a2, a3, w2, w3, c0, c1, c2, c3, T)
    return new


@gluon.jit
def rows_of_warps(values, memory, MAX: gl.constexpr):
    """Sum or maximum over warps: values [warps, rows] to [rows]. memory: at least as many buffers of that shape."""
    WARPS: gl.constexpr = values[0].shape[0]
    for i in gl.static_range(len(values)):
        memory[i].store(values[i])
    rows = ()
    for i in gl.static_range(len(values)):
        rows += (_row(memory[i].load(_parts_layout(WARPS, WARPS)), MAX, WARPS),)
    return rows


@gluon.jit
def _row(x, MAX: gl.constexpr, WARPS: gl.constexpr):
    """[parts, rows] to [rows]."""
    x = gl.max(x, axis=0) if MAX else gl.sum(x, axis=0)
    return gl.convert_layout(x, row_layout(WARPS), assert_trivial=True)


@gluon.jit
def rows_of_slices(rows, ptr, slice, arrived_ptr, target, MAX: gl.constexpr, SLICES: gl.constexpr,
                   WARPS: gl.constexpr):  # fmt: skip
    """Sum or maximum over the blocks that share rows, all of which get it. ptr: float32 [SLICES, len(rows), 8]."""
    COUNT: gl.constexpr = len(rows)
    L: gl.constexpr = _parts_layout(WARPS, power_of_2(SLICES))
    for i in gl.static_range(COUNT):
        row = gl.arange(0, rows[i].shape[0], row_layout(WARPS))
        gl.store(ptr + (slice * COUNT + i) * 8 + row, rows[i])
    barrier()
    seen = gl.atomic_add(arrived_ptr, 1, sem="acq_rel") + 1
    while seen < target:
        seen = gl.atomic_add(arrived_ptr, 0, sem="acquire")
    barrier()
    part = index_along(L, 2, 0, power_of_2(SLICES))
    totals = ()
    for i in gl.static_range(COUNT):
        place = (part * COUNT + i) * 8 + index_along(L, 2, 1, rows[i].shape[0])
        x = gl.load(ptr + place, mask=(part < SLICES) & (place >= 0), other=0.0, cache_modifier=".cg")
        totals += (_row(x, MAX, WARPS),)
    return totals


@gluon.jit
def row_scale(largest, UNSIGNED: gl.constexpr):
    """(scale, 1 / scale); the inverse is finite, so that a token of zeros gives zeros."""
    scale = largest * (1.0 / (255 if UNSIGNED else 127))
    inverse = gl.inline_asm_elementwise("rcp.rn.f32 $0, $1;", "=f,f", [scale], dtype=gl.float32, is_pure=True, pack=1)
    return scale, gl.minimum(inverse, _LARGEST)


@gluon.constexpr_function
def _code_asm(UNSIGNED, T):
    """PTX: two words of pairs times $3 as a word of four codes. 3 * 2^22, added, rounds to an integer, ties to even."""
    lines = []
    for i in range(2):
        x, y = f"f{2 * i}", f"f{2 * i + 1}"
        if T:
            lines += [f"mov.b32 {{l, h}}, ${i + 1};", f"cvt.f32.f16 {x}, l;", f"cvt.f32.f16 {y}, h;"]
        else:
            lines += [f"shl.b32 a, ${i + 1}, 16;", f"and.b32 b, ${i + 1}, 0xFFFF0000;"]
            lines += [f"mov.b32 {x}, a;", f"mov.b32 {y}, b;"]
    for i in range(4):
        lines += [f"fma.rn.f32 f{i}, f{i}, $3, 12582912.0;", f"mov.b32 u{i}, f{i};"]
    lines += ["prmt.b32 u0, u0, u1, 0x0040;", "prmt.b32 u2, u2, u3, 0x0040;", "prmt.b32 u0, u0, u2, 0x5410;"]
    lines.append("xor.b32 $0, u0, 0x80808080;" if UNSIGNED else "mov.b32 $0, u0;")
    return "{\n.reg .b16 l, h;\n.reg .b32 a, b, u<4>;\n.reg .f32 f<4>;\n" + "\n".join(lines) + "\n}"


@gluon.jit
def store_codes(codes_ptr, x, inverse, row0, last, word, stop, K, UNSIGNED: gl.constexpr, T: gl.constexpr,
                EXACT: gl.constexpr):  # fmt: skip
    """int8 codes of words x = rint(v / scale) to codes_ptr, words of four codes [M, K / 4]; rows before ``last`` from
    row0 on, and columns before ``stop`` (in words of x) from ``word`` on."""
    WARPS: gl.constexpr = x.shape[0]
    P: gl.constexpr = gl.BlockedLayout([1, 1, 1, 2], [1, 8, 4, 1], [WARPS, 1, 1, 1], [3, 2, 1, 0])
    w0, w1, w2, w3 = split_words(x)
    a = gl.expand_dims(gl.expand_dims(inverse, 0), 2)
    asm: gl.constexpr = _code_asm(UNSIGNED, T)
    low = gl.inline_asm_elementwise(asm, "=r,r,r,f", [w0, w1, a], dtype=gl.int32, is_pure=True, pack=1)
    high = gl.inline_asm_elementwise(asm, "=r,r,r,f", [w2, w3, a], dtype=gl.int32, is_pure=True, pack=1)
    codes = gl.convert_layout(gl.join(low, high), P, assert_trivial=True)
    row = row0 + index_along(P, 4, 1, x.shape[1])
    column = word // 2 + index_along(P, 4, 0, WARPS) * 8 + index_along(P, 4, 2, 4) * 2 + index_along(P, 4, 3, 2)
    inside = row < last if EXACT else (row < last) & (column < stop // 2)
    gl.store(codes_ptr + row.to(gl.int64) * (K // 4) + column, codes, mask=inside)


@gluon.jit
def _low_rank_words(sums, at: gl.constexpr):
    even, odd = gl.join(sums[at], sums[at + 2]), gl.join(sums[at + 1], sums[at + 3])
    return gl.reshape(gl.join(even, odd), [even.shape[0], 8, 4, 4])


@gluon.constexpr_function
def _low_rank_layout():
    return gl.SwizzledSharedLayout(1, 1, 1, [4, 3, 2, 1, 0])


@gluon.jit
def low_rank_of_warps(sums, memory, FIRST: gl.constexpr, RT: gl.constexpr):
    """Put a tile's 4 * RT registers, from sums[FIRST] on, into its words' place, [next power of 2, warps, 8, 4, 4]."""
    WARPS: gl.constexpr = sums[0].shape[0]
    words = _low_rank_words(sums, FIRST)
    if RT == 1:
        words = gl.reshape(words, [1, WARPS, 8, 4, 4])
    else:
        words = gl.join(words, _low_rank_words(sums, FIRST + 4))
        if RT > 2:
            more = gl.join(_low_rank_words(sums, FIRST + 8), _low_rank_words(sums, FIRST + 4 * RT - 4))
            words = gl.reshape(gl.permute(gl.join(words, more), [0, 1, 2, 3, 5, 4]), [WARPS, 8, 4, 4, 4])
        words = gl.permute(words, [4, 0, 1, 2, 3])
    store_as(memory, words.to(gl.int32, bitcast=True), _low_rank_layout())


@gluon.constexpr_function
def _total_layout(RT, WARPS):
    """A tile's sums [next power of 2, warps, 8 ranks, 4 row pairs, 4 registers], those of all warps in one thread."""
    m = min(power_of_2(RT), WARPS)
    return gl.BlockedLayout([1, WARPS, 1, 1, 1], [1, 1, 2, 4, 4], [m, 1, WARPS // m, 1, 1], [4, 3, 2, 1, 0])


@gluon.jit
def low_rank_total(memory, RT: gl.constexpr, WARPS: gl.constexpr):
    """Sum over warps of what :func:`low_rank_of_warps` stored, float32 [next power of 2, 8, 4, 4]."""
    words = view_as(memory, gl.int32, [power_of_2(RT), WARPS, 8, 4, 4], _low_rank_layout())
    return gl.sum(words.load(_total_layout(RT, WARPS)).to(gl.float32, bitcast=True), axis=1)


@gluon.jit
def _low_rank_place(L: gl.constexpr, COUNT: gl.constexpr):
    place = index_along(L, 4, 0, COUNT) * 128 + index_along(L, 4, 1, 8) * 16
    return place + index_along(L, 4, 2, 4) * 4 + index_along(L, 4, 3, 4)


@gluon.jit
def keep_low_rank(ptr, total):
    """Sums of one slice, for :func:`sum_low_rank`."""
    L: gl.constexpr = total.type.layout
    gl.store(ptr + _low_rank_place(L, total.shape[0]), total)


@gluon.jit
def sum_low_rank(ptr, stride, SLICES: gl.constexpr, RT: gl.constexpr, WARPS: gl.constexpr):
    """Over slices, ``stride`` from each other."""
    ptr += _low_rank_place(gl.SliceLayout(1, _total_layout(RT, WARPS)), power_of_2(RT))
    total = gl.load(ptr, cache_modifier=".cg")
    for slice in range(1, SLICES):
        total += gl.load(ptr + slice * stride, cache_modifier=".cg")
    return total


@gluon.jit
def store_low_rank(lora_act_ptr, total, row0, last, places, ROWS: gl.constexpr, RT: gl.constexpr):
    """T of a tile's sums to lora_act T [parts, M, part_ranks]. places: (first column of all parts, part_ranks, distance
    of the parts)."""
    L: gl.constexpr = total.type.layout
    first_rank, part_ranks, part_stride = places
    register = index_along(L, 4, 3, 4)
    row = index_along(L, 4, 2, 4) * 2 + register % 2
    rank = index_along(L, 4, 0, total.shape[0]) * 16 + index_along(L, 4, 1, 8) + register // 2 * 8
    inside = (row0 + row < last) & (row < ROWS) & (rank < RT * 16)
    part = (first_rank + rank) // part_ranks
    out_ptr = lora_act_ptr + part.to(gl.int64) * part_stride + (row0 + row).to(gl.int64) * part_ranks
    out_ptr += first_rank + rank - part * part_ranks
    gl.store(out_ptr, total.to(lora_act_ptr.dtype.element_ty), mask=inside)
