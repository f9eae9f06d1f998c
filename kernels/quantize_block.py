"""One group of an activation after the other: the device functions behind ``quantize.py``.

Lane 4 * r + c of a warp loads 16 bytes of row r, and of row r + 8: columns 8c to 8c + 7 of one half of a group, 32 + 8c
to 32 + 8c + 7 of the other. Those are

  - eight codes that make a whole word of the INT4 GEMM's operand (act_layout.py), with a row's group in four lanes;
  - B operands of 16-bit MMAs as they are, if the columns of proj_down, the A operand, are in the same order. It gets
    into that order, and smooth_factor becomes its reciprocal, on the way from the checkpoint file's order to shared
    memory. An MMA's result is sums of 16 ranks by 8 rows.

Smoothing in bf16 multiplies pairs by the sum of two bf16 factors, the smaller one first. The error, 2^-17 at most, is
smaller than the distance of a quotient of two bf16 numbers from the nearest point where rounding changes (2^-17 at
least): the result is that of the division. In fp16 it multiplies by a float32 reciprocal.

Tensors are [m16 tiles, groups side by side, 32 lanes] in the layouts of act_codes.py, with a last axis of four words
where lanes load or store 16 bytes.
"""

from __future__ import annotations

from .act_codes import group_layout
from .epilogue import BF16, pack_pair, unpack_pair
from .gluon_compat import async_copy, async_load, gl, gluon, store_as, view_as
from .int4 import SHIFT
from .int4_block import mma_16bit

_SHIFT = gl.constexpr(SHIFT)


@gluon.constexpr_function
def _alone(L, rank, axis):
    """Layout of one axis of a tensor with layout L."""
    for i in reversed(range(rank)):
        if i != axis:
            L = gl.SliceLayout(i, L)
    return L


@gluon.jit
def index_along(L: gl.constexpr, rank: gl.constexpr, axis: gl.constexpr, size: gl.constexpr):
    """0, 1, .. along one axis of a tensor with layout L, the other axes being 1."""
    x = gl.arange(0, size, _alone(L, rank, axis))
    for i in gl.static_range(rank):
        if i != axis:
            x = gl.expand_dims(x, i)
    return x


@gluon.jit
def lane_words(x, L: gl.constexpr):
    """The four words of each lane, the last axis, as four tensors in layout L."""
    even, odd = gl.split(gl.reshape(x, [x.shape[0], x.shape[1], x.shape[2], 2, 2]))
    w0, w2 = gl.split(even)
    w1, w3 = gl.split(odd)
    return (gl.convert_layout(w0, L, assert_trivial=True), gl.convert_layout(w1, L, assert_trivial=True),
            gl.convert_layout(w2, L, assert_trivial=True), gl.convert_layout(w3, L, assert_trivial=True))  # fmt: skip


@gluon.constexpr_function
def tile_layout(WM, WK):
    """Layout P of act_codes.py, of which a warp has one m16 tile and one group."""
    return gl.BlockedLayout([1, 8, 1], [1, 1, 32], [WM, WK, 1], [2, 0, 1])


@gluon.constexpr_function
def word_layout(WM, WK):
    """[m16 tiles, groups, 32 lanes, 4 words]."""
    return gl.BlockedLayout([1, 1, 1, 4], [1, 1, 32, 1], [WM, WK, 1, 1], [3, 2, 0, 1])


@gluon.constexpr_function
def sum_layout(WM, WK, RT):
    """Low-rank sums [m16 tiles, groups, r16 tiles, 32 lanes]."""
    return gl.BlockedLayout([1, 1, max(RT, 1), 1], [1, 1, 1, 32], [WM, WK, 1, 1], [3, 2, 0, 1])


@gluon.jit
def load_group(ptr, offsets, step, WK: gl.constexpr, BOTH: gl.constexpr = True):
    """Words of columns 8c.. and 32 + 8c.. of a group, of rows r, and of rows r + 8 if BOTH, or rows r again."""
    ptr += step * (WK * 32)
    low0, low1 = gl.load(ptr + offsets[0]), gl.load(ptr + 16 + offsets[0])
    if BOTH:
        high0, high1 = gl.load(ptr + offsets[1]), gl.load(ptr + 16 + offsets[1])
    else:
        high0, high1 = low0, low1
    return low0, low1, high0, high1


@gluon.jit
def load_factors(smooth_ptr, group, last, SLAB: gl.constexpr, WM: gl.constexpr, WK: gl.constexpr):
    """Words of smooth_factor of SLAB * WK groups from ``group``, for :func:`store_factors`."""
    L: gl.constexpr = gl.BlockedLayout([1, 1, 2], [8, 4, 1], [WM * WK, 1, 1], [2, 1, 0])
    # a pair's place in a packed vector: k/16, k%8/2, k/8%2
    k16 = index_along(L, 3, 0, SLAB * WK * 4)
    place = group * 32 + k16 * 8 + index_along(L, 3, 1, 4) * 2 + index_along(L, 3, 2, 2)
    return gl.load(smooth_ptr + place, mask=group + k16 // 4 < last, other=0)


@gluon.jit
def reciprocal_words(low, high, T: gl.constexpr):
    """Two words for the float32 reciprocals of two channels: what :func:`smooth_words` multiplies by. bf16: pairs of
    larger, and of smaller summands; fp16: as they are."""
    if T == BF16:
        first = pack_pair(low, high, T, False)
        first_low, first_high = unpack_pair(first, T)
        second = pack_pair(low - first_low, high - first_high, T, False)
    else:
        first, second = low.to(gl.int32, bitcast=True), high.to(gl.int32, bitcast=True)
    return first, second


@gluon.jit
def store_factors(words, s_factors, T: gl.constexpr, SLAB: gl.constexpr, WK: gl.constexpr):
    """1 / smooth_factor as :func:`reciprocal_words`, one half of a group after the other."""
    low, high = unpack_pair(words, T)
    first, second = reciprocal_words(1.0 / low, 1.0 / high, T)
    # axes: step, warp, k/32, k/16%2, k%8/2, k/8%2, part
    words = gl.reshape(gl.join(first, second), [SLAB, WK, 2, 2, 4, 2, 2])
    words = gl.reshape(gl.permute(words, [0, 6, 2, 1, 3, 5, 4]), [SLAB * 4, WK, 4, 4])
    store_as(s_factors, words, gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0]))


@gluon.jit
def copy_down(proj_down_ptr, s_down, buffer, group, last, R, SLAB: gl.constexpr, BUFFERS: gl.constexpr,
              WM: gl.constexpr, WK: gl.constexpr, RT: gl.constexpr):  # fmt: skip
    """Start the copy of proj_down of SLAB * WK groups from ``group`` to one of the buffers in ``s_down``: single words,
    so that they become A operands of MMAs whose B operands are words of x.

    One operation for all of them: between two to the same memory Triton puts a barrier.
    """
    L: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [WM * WK, 1], [1, 0])
    ROWS: gl.constexpr = SLAB * 4 * WK * RT
    target = view_as(s_down, gl.int32, [BUFFERS, ROWS, 128], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])).index(buffer)
    # a row: step, k/32%2, k%8/4, group side by side, r/16; a word in it: r%8, k/16%2, k/8%2, k%4/2, r/8%2
    row, i = gl.arange(0, ROWS, gl.SliceLayout(1, L))[:, None], gl.arange(0, 128, gl.SliceLayout(0, L))[None, :]
    # What is beyond the last group or rank is not used: the last one again.
    r16 = gl.minimum(row % RT, R // 16 - 1)
    step4 = row // (WK * RT)
    k16 = gl.minimum(group + step4 // 4 * WK + row // RT % WK, last - 1) * 4 + step4 // 2 % 2 * 2
    # a word's place in the file: k/16, r/16, r%8, k%8/4, k%4/2, r/8%2, k/8%2
    place = k16 * (R * 8) + r16 * 128 + step4 % 2 * 8
    i = i.to(gl.int64)  # so that distances which are constants become part of the instructions
    place = place.to(gl.int64) + (i // 8 % 2 * (R * 8) + i // 16 * 16 + i // 4 % 2 + i // 2 % 2 * 4 + i % 2 * 2)
    async_load(target, proj_down_ptr + place)
    async_copy.commit_group()


@gluon.jit
def _normalized(x, step, norm, T: gl.constexpr, NORM: gl.constexpr, WK: gl.constexpr):
    """T((x - mean) / deviation * (1 + scale) + shift) of a group; norm: pointers, their offsets, and statistics."""
    scale_ptr, shift_ptr, offsets, low, high = norm
    scale = load_group(scale_ptr, offsets, step, WK, NORM == 2)
    shift = load_group(shift_ptr, offsets, step, WK, NORM == 2)
    return (_normalize(x[0], scale[0], shift[0], low, T), _normalize(x[1], scale[1], shift[1], low, T),
            _normalize(x[2], scale[2], shift[2], high, T), _normalize(x[3], scale[3], shift[3], high, T))  # fmt: skip


@gluon.jit
def _normalize(x, scale, shift, statistics, T: gl.constexpr):
    low, high = unpack_pair(x, T)
    scale_low, scale_high = unpack_pair(scale, T)
    shift_low, shift_high = unpack_pair(shift, T)
    low = (low * statistics[0] - statistics[1]) * (1.0 + scale_low) + shift_low
    high = (high * statistics[0] - statistics[1]) * (1.0 + scale_high) + shift_high
    return pack_pair(low, high, T, False)


@gluon.jit
def _project(x, s_down, slot, sums, T: gl.constexpr, C: gl.constexpr):
    """sums += proj_down @ x^T for one group; sums: four registers for rows r, four for rows r + 8."""
    WM: gl.constexpr = C.warps_per_cta[0]
    WK: gl.constexpr = C.warps_per_cta[1]
    RT: gl.constexpr = C.size_per_thread[2]
    A: gl.constexpr = gl.BlockedLayout([1, 1, RT, 1, 4], [1, 1, 1, 32, 1], [WM, WK, 1, 1, 1], [4, 3, 2, 0, 1])
    low, high = sums
    for h in gl.static_range(2):
        x_low, x_high = lane_words(x[h], gl.SliceLayout(2, C)), lane_words(x[2 + h], gl.SliceLayout(2, C))
        for p in gl.static_range(2):
            a = lane_words(s_down.index(slot * 4 + h * 2 + p).load(gl.SliceLayout(0, A)), gl.SliceLayout(0, C))
            low = _multiply(a, x_low[2 * p], x_low[2 * p + 1], low, T)
            high = _multiply(a, x_high[2 * p], x_high[2 * p + 1], high, T)
    return low, high


@gluon.jit
def _multiply(a, b0, b1, c, T: gl.constexpr):
    b0, b1 = gl.expand_dims(b0, 2), gl.expand_dims(b1, 2)
    a0, a1 = gl.expand_dims(a[0], 0), gl.expand_dims(a[1], 0)
    a2, a3 = gl.expand_dims(a[2], 0), gl.expand_dims(a[3], 0)
    return mma_16bit(a0, a1, a2, a3, b0, b1, c[0], c[1], c[2], c[3], T)


@gluon.constexpr_function
def _smooth_asm(UNSIGNED):
    shift = "fma.rn.bf16x2 x, x, one, shift;\n" if UNSIGNED else ""
    return (
        "{\n.reg .b32 x, y, one, shift, zero;\nmov.b32 x, $1;\nmov.b32 one, 0x3F803F80;\nmov.b32 shift, 0x3E303E30;\n"
        f"mov.b32 zero, 0x80008000;\n{shift}fma.rn.bf16x2 y, x, $3, zero;\nfma.rn.bf16x2 $0, x, $2, y;\n}}"
    )


@gluon.jit
def smooth_words(x, first, second, UNSIGNED: gl.constexpr, T: gl.constexpr):
    """T(T(x + SHIFT) / smooth) of pairs; first, second: of :func:`reciprocal_words`."""
    if T == BF16:
        return gl.inline_asm_elementwise(
            _smooth_asm(UNSIGNED), "=r,r,r,r", [x, first, second], dtype=gl.int32, is_pure=True, pack=1
        )
    else:
        low, high = unpack_pair(x, T)
        if UNSIGNED:
            low, high = unpack_pair(pack_pair(low + _SHIFT, high + _SHIFT, T, False), T)
        return pack_pair(low * first.to(gl.float32, bitcast=True), high * second.to(gl.float32, bitcast=True), T, False)


@gluon.jit
def _factors(s_factors, i, V: gl.constexpr):
    """Words [groups, 4 lanes, 4] of every row, [m16, groups, 32, 4]."""
    WM: gl.constexpr = V.warps_per_cta[0]
    WK: gl.constexpr = V.warps_per_cta[1]
    L: gl.constexpr = gl.BlockedLayout([1, 1, 1, 1, 4], [1, 1, 8, 4, 1], [WM, WK, 1, 1, 1], [4, 3, 2, 0, 1])
    x = s_factors.index(i).load(gl.SliceLayout(0, gl.SliceLayout(2, L)))
    x = gl.expand_dims(gl.expand_dims(x, 0), 2).broadcast_to([WM, WK, 8, 4, 4])
    return gl.convert_layout(gl.reshape(x, [WM, WK, 32, 4]), V, assert_trivial=True)


@gluon.jit
def _smoothed(x, s_factors, slot, UNSIGNED: gl.constexpr, T: gl.constexpr, P: gl.constexpr, V: gl.constexpr):
    """A group's x, smoothed and rounded: eight words of rows r, eight of rows r + 8."""
    Q: gl.constexpr = group_layout(P)
    first0, first1 = _factors(s_factors, slot * 4, V), _factors(s_factors, slot * 4 + 1, V)
    second0, second1 = _factors(s_factors, slot * 4 + 2, V), _factors(s_factors, slot * 4 + 3, V)
    return (
        lane_words(smooth_words(x[0], first0, second0, UNSIGNED, T), Q),
        lane_words(smooth_words(x[1], first1, second1, UNSIGNED, T), Q),
        lane_words(smooth_words(x[2], first0, second0, UNSIGNED, T), Q),
        lane_words(smooth_words(x[3], first1, second1, UNSIGNED, T), Q),
    )


@gluon.jit
def project_and_smooth(x, step, slots, norm, shared, sums, UNSIGNED: gl.constexpr, T: gl.constexpr,
                       NORM: gl.constexpr, WM: gl.constexpr, WK: gl.constexpr, RT: gl.constexpr):  # fmt: skip
    """(a group smoothed, low-rank sums with its products): all that needs x itself. shared: factors and proj_down in
    shared memory · slots: the group's places in them."""
    if NORM > 0:
        x = _normalized(x, step, norm, T, NORM, WK)
    if RT > 0:
        sums = _project(x, shared[1], slots[1], sums, T, sum_layout(WM, WK, RT))
    return _smoothed(x, shared[0], slots[0], UNSIGNED, T, tile_layout(WM, WK), word_layout(WM, WK)), sums
