"""Values in registers to INT4 activation codes and scales, in Gluon: what all kernels that quantize have in common.

Arithmetic as ``reference.quantize_act``: per row and group of 64, scale = amax / 7 or 15, code = rint(v / scale). Two
differences: 1 / scale is approximate (one float32 step), and a scale below 2^-126 counts as 2^-126 for the codes.

fma(v, 1 / scale, 2^23 + 8), read as an integer, holds code + 8 in its last bits. Eight of them times powers of 16 add
up to a word of nibbles in offset binary, modulo 2^32; one XOR makes them two's complement. The exponent bits of the
first three would be left in that sum: the constant of the fourth is larger by what cancels them.

Tensors are those of ``epilogue.py``: [m16 tiles, n8 tiles, 32 lanes] in the layout P of ``gemm_int4.py``, where lane
4 * r + c holds columns 2c, 2c + 1 of row r or of row r + 8. Results: [m16 tiles, groups, 32 lanes] in group_layout(P).
"""

from __future__ import annotations

from .epilogue import pack_pair, unpack_pair
from .gluon_compat import gl, gluon

_MAGIC = 8388608.0  # 2^23: the last bit of a float between it and twice it is worth 1
_CANCEL = 0x5000  # in the fourth nibble: (0x4B000000 * 0x11111111 + (_CANCEL << 12)) % 2^32 == 0
_LARGEST_INVERSE = gl.constexpr(2.0**126)


@gluon.constexpr_function
def group_layout(P):
    """Layout of one value per row and group, [m16 tiles, groups, 32 lanes], that belongs to P."""
    m16, n8, _ = P.size_per_thread
    return gl.BlockedLayout([m16, n8 // 8, 1], [1, 1, 32], P.warps_per_cta, P.order)


@gluon.constexpr_function
def _words_layout(P):
    """Layout of four words in a row for each value in group_layout."""
    m16, n8, _ = P.size_per_thread
    return gl.BlockedLayout([m16, n8 // 8, 1, 4], [1, 1, 32, 1], [*P.warps_per_cta, 1], [3, *P.order])


@gluon.jit
def round_pair(x, y, T: gl.constexpr):
    """Two float32 rounded to T."""
    return unpack_pair(pack_pair(x, y, T, False), T)


@gluon.jit
def larger(a, b):
    """max(|a|, |b|) in one instruction: not a NaN if one of them is none. Written out, |a| becomes one of its own."""
    asm: gl.constexpr = "{\n.reg .f32 a, b;\nabs.f32 a, $1;\nabs.f32 b, $2;\nmax.f32 $0, a, b;\n}"
    return gl.inline_asm_elementwise(asm, "=f,f,f", [a, b], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def largest_of_lanes(x):
    """Maximum of a float32 over lanes 4r..4r+3."""
    return gl.inline_asm_elementwise(
        "{\n.reg .f32 s;\nshfl.sync.bfly.b32 s, $1, 1, 31, -1;\nmax.f32 $0, $1, s;\n"
        "shfl.sync.bfly.b32 s, $0, 2, 31, -1;\nmax.f32 $0, $0, s;\n}",
        "=&f,f",
        [x],
        dtype=gl.float32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def reciprocal(x):
    """1 / x of a float32, one unit in the last place off at most."""
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def group_scale(largest, UNSIGNED: gl.constexpr):
    """(scale, 1 / scale) from a group's largest magnitude. The inverse is finite: a group of zeros gives zeros."""
    scale = largest * (1.0 / (15 if UNSIGNED else 7))
    return scale, gl.minimum(reciprocal(scale), _LARGEST_INVERSE)


@gluon.constexpr_function
def _code_word_asm(UNSIGNED):
    """PTX of :func:`code_word`: in one piece, because compilers rearrange the sum into a longer one."""
    magic = [_MAGIC + (0 if UNSIGNED else 8) + (_CANCEL if i == 3 else 0) for i in range(8)]
    lines = [f"fma.rn.f32 f{i}, ${i + 1}, $9, {magic[i]:.1f};" for i in range(8)]
    lines += [f"mov.b32 u{i}, f{i};" for i in range(8)]
    for step in (1, 2, 4):
        lines += [f"mad.lo.s32 u{i}, u{i + step}, {16**step}, u{i};" for i in range(0, 8, 2 * step)]
    lines.append("mov.b32 $0, u0;" if UNSIGNED else "xor.b32 $0, u0, 0x88888888;")
    return "{\n.reg .f32 f<8>;\n.reg .b32 u<8>;\n" + "\n".join(lines) + "\n}"


@gluon.jit
def code_word(x0, x1, x2, x3, x4, x5, x6, x7, inverse, UNSIGNED: gl.constexpr):
    """The codes of eight values as the nibbles of a word, the first lowest."""
    return gl.inline_asm_elementwise(
        _code_word_asm(UNSIGNED),
        "=r,f,f,f,f,f,f,f,f,f",
        [x0, x1, x2, x3, x4, x5, x6, x7, inverse],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _transpose_bytes(x, select1, select2):
    """Byte j of lane c of four to byte c of lane j."""
    return gl.inline_asm_elementwise(
        "{\n.reg .b32 s;\nshfl.sync.bfly.b32 s, $1, 1, 31, -1;\nprmt.b32 $0, $1, s, $2;\n"
        "shfl.sync.bfly.b32 s, $0, 2, 31, -1;\nprmt.b32 $0, $0, s, $3;\n}",
        "=&r,r,r,r",
        [x, select1, select2],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _tiles(x, P: gl.constexpr):
    """Words [m16, n8, 32] as eight tensors [m16, groups, 32]: the n8 tiles of a group."""
    Q: gl.constexpr = group_layout(P)
    x = gl.permute(gl.reshape(x, [x.shape[0], x.shape[1] // 8, 2, 2, 2, 32]), [0, 1, 5, 2, 3, 4])
    even, odd = gl.split(x)
    x0, x2 = gl.split(even)
    x1, x3 = gl.split(odd)
    x0, x4 = gl.split(x0)
    x1, x5 = gl.split(x1)
    x2, x6 = gl.split(x2)
    x3, x7 = gl.split(x3)
    return (
        gl.convert_layout(x0, Q, assert_trivial=True), gl.convert_layout(x1, Q, assert_trivial=True),
        gl.convert_layout(x2, Q, assert_trivial=True), gl.convert_layout(x3, Q, assert_trivial=True),
        gl.convert_layout(x4, Q, assert_trivial=True), gl.convert_layout(x5, Q, assert_trivial=True),
        gl.convert_layout(x6, Q, assert_trivial=True), gl.convert_layout(x7, Q, assert_trivial=True),
    )  # fmt: skip


@gluon.jit
def quantize_group(x, y, UNSIGNED: gl.constexpr, P: gl.constexpr):
    """Codes and scales of one row half: x, y float32 [m16, n8, 32], columns 2c and 2c + 1, smoothed and rounded to T.

    A warp's n8 tiles are whole groups: P has a multiple of 8 of them per thread. Returns (word0, word1, scale), each
    [m16, n8 / 8, 32]: word_h has the codes of the row's columns 32h + 8c to 32h + 8c + 7 of the group, low nibble
    first; scale is float32, not rounded to T, the same in the four lanes of a row.
    """
    x0, x1, x2, x3, x4, x5, x6, x7 = _tiles(x, P)
    y0, y1, y2, y3, y4, y5, y6, y7 = _tiles(y, P)
    a = larger(larger(larger(x0, x1), larger(x2, x3)), larger(larger(x4, x5), larger(x6, x7)))
    b = larger(larger(larger(y0, y1), larger(y2, y3)), larger(larger(y4, y5), larger(y6, y7)))
    scale, inverse = group_scale(largest_of_lanes(larger(a, b)), UNSIGNED)
    # A lane has the byte of columns 2c, 2c + 1 of every tile; a word is the four bytes of one tile.
    lane = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, group_layout(P))))[None, None, :]
    select1 = gl.where(lane % 2 == 0, 0x6240, 0x3715)
    select2 = gl.where(lane % 4 < 2, 0x5410, 0x3276)
    word0 = code_word(x0, y0, x1, y1, x2, y2, x3, y3, inverse, UNSIGNED)
    word1 = code_word(x4, y4, x5, y5, x6, y6, x7, y7, inverse, UNSIGNED)
    return _transpose_bytes(word0, select1, select2), _transpose_bytes(word1, select1, select2), scale


@gluon.constexpr_function
def _largest_asm(T, XORSIGN):
    """PTX: the largest magnitudes of eight pairs, and for the other row; then over both halves and a row's four lanes.

    max.xorsign.abs has the sign of a product and needs sm_86; abs.f16x2 costs nothing, abs.bf16x2 would.
    """
    kind = "f16x2" if T else "bf16x2"
    maximum = f"max.xorsign.abs.{kind}" if XORSIGN else f"max.{kind}"
    clear = "mov.b32 {}, {};" if XORSIGN else "abs.f16x2 {}, {};" if T else "and.b32 {}, {}, 0x7FFF7FFF;"
    lines = [clear.format(f"w{i}", f"${i + 2}") for i in range(16)]
    for step in (1, 2, 4):
        lines += [f"{maximum} w{i}, w{i}, w{i + step};" for i in range(0, 16, 2 * step)]
    lines += ["prmt.b32 a, w0, w8, 0x5410;", "prmt.b32 b, w0, w8, 0x7632;", f"{maximum} a, a, b;"]
    for lane in (1, 2):
        lines += [f"shfl.sync.bfly.b32 b, a, {lane}, 31, -1;", f"{maximum} a, a, b;"]
    if T:
        lines += ["mov.b32 {l, h}, a;", "cvt.f32.f16 x, l;", "cvt.f32.f16 y, h;"]
    else:
        lines += ["shl.b32 b, a, 16;", "and.b32 a, a, 0xFFFF0000;", "mov.b32 x, b;", "mov.b32 y, a;"]
    lines += ["abs.f32 $0, x;", "abs.f32 $1, y;"]
    return "{\n.reg .b32 w<16>, a, b;\n.reg .b16 l, h;\n.reg .f32 x, y;\n" + "\n".join(lines) + "\n}"


@gluon.jit
def quantize_words(v, UNSIGNED: gl.constexpr, T: gl.constexpr, XORSIGN: gl.constexpr):
    """As :func:`quantize_group`, of both rows of a lane that holds columns 8c to 8c + 7 of both halves of a group.

    v: four times four words of two values, smoothed and rounded to T, in group_layout: of row r and columns 8c.., row r
    and 32 + 8c.., and the same of row r + 8 · XORSIGN: whether the GPU is sm_86 or later. Returns (word0, word1, scale)
    of rows r, and of rows r + 8.
    """
    v0, v1, v2, v3 = v
    largest0, largest1 = gl.inline_asm_elementwise(
        _largest_asm(T, XORSIGN),
        "=f,=f,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
        [
            v0[0],
            v0[1],
            v0[2],
            v0[3],
            v1[0],
            v1[1],
            v1[2],
            v1[3],
            v2[0],
            v2[1],
            v2[2],
            v2[3],
            v3[0],
            v3[1],
            v3[2],
            v3[3],
        ],
        dtype=(gl.float32, gl.float32),
        is_pure=False,
        pack=1,
    )
    scale0, inverse0 = group_scale(largest0, UNSIGNED)
    scale1, inverse1 = group_scale(largest1, UNSIGNED)
    low = (_word_of_pairs(v0, inverse0, UNSIGNED, T), _word_of_pairs(v1, inverse0, UNSIGNED, T), scale0)
    high = (_word_of_pairs(v2, inverse1, UNSIGNED, T), _word_of_pairs(v3, inverse1, UNSIGNED, T), scale1)
    return low, high


@gluon.jit
def _word_of_pairs(v, inverse, UNSIGNED: gl.constexpr, T: gl.constexpr):
    x0, x1 = unpack_pair(v[0], T)
    x2, x3 = unpack_pair(v[1], T)
    x4, x5 = unpack_pair(v[2], T)
    x6, x7 = unpack_pair(v[3], T)
    return code_word(x0, x1, x2, x3, x4, x5, x6, x7, inverse, UNSIGNED)


@gluon.jit
def store_rows(codes_ptr, ascales_ptr, low, high, tile_m, group, groups, row_blocks, T: gl.constexpr,
               P: gl.constexpr):  # fmt: skip
    """Write what :func:`quantize_group` returned for rows r (low) and r + 8 (high), in the order of act_layout.py.

    codes_ptr: int32 [B, G, 512] · ascales_ptr: int32, pairs of scales of T [B, G, 64] · tile_m: first m16 tile ·
    group: first group · groups: G · row_blocks: B; tiles beyond it are not written.
    """
    V: gl.constexpr = _words_layout(P)
    Q: gl.constexpr = gl.SliceLayout(3, V)
    m16: gl.constexpr = low[0].shape[0]
    count: gl.constexpr = low[0].shape[1]
    tile = tile_m + gl.arange(0, m16, gl.SliceLayout(1, gl.SliceLayout(2, Q)))[:, None, None]
    lane = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, Q)))[None, None, :]
    block = tile // 4 * groups + group + gl.arange(0, count, gl.SliceLayout(0, gl.SliceLayout(2, Q)))[None, :, None]
    inside = tile < row_blocks * 4
    words = gl.join(gl.join(low[0], low[1]), gl.join(high[0], high[1]))  # axes: .., k/32, m/8%2
    words = gl.convert_layout(gl.reshape(words, [m16, count, 32, 4]), V, assert_trivial=True)
    word_ptr = codes_ptr + block.to(gl.int64) * 512 + (tile % 4 * 128 + lane * 4)
    word = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, V))))[None, None, None, :]
    gl.store(gl.expand_dims(word_ptr, 3) + word, words, mask=gl.expand_dims(inside, 3))
    scales = gl.convert_layout(pack_pair(low[2], high[2], T, False), Q, assert_trivial=True)
    scale_ptr = ascales_ptr + block.to(gl.int64) * 32 + (lane // 4 * 4 + tile % 4)
    gl.store(scale_ptr, scales, mask=inside & (lane % 4 == 0))
