"""INT4 checkpoint weights to INT8, one scale per output channel: what ``gemm_int8.py`` multiplies.

Contract: ``reference.expand_w4_to_int8``, bit for bit. Memory-bound: 1.5 bytes per weight. A block has 4, 8 or 16 rows
(those of 2, 4 or 8 values of n % 8, which lie side by side in the file) and all of K. A lane's 16 bytes are eight codes
each of rows n and n + 8 in both halves of a group; they go out as 8 bytes each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from .device import FMA
from .epilogue import require
from .gluon_compat import barrier, gl, gluon, store_as
from .int4 import GROUP, PackedW4A4
from .quantize_block import index_along

SHAPE = (4, 4, 2)  # the fastest of benchmarks/int8_memory_variants.py on an H200, for every layer


@dataclass(frozen=True)
class W8:
    """One INT8 weight: q int8 [N, K], row-major · scales float32 [N] · sums int32 [N]: of q along K · act_unsigned: as
    in int4.py; the activation codes it takes are then those of an unsigned layer."""

    q: Tensor
    scales: Tensor
    sums: Tensor
    act_unsigned: bool = False

    @property
    def n(self) -> int:
        return self.q.shape[0]

    @property
    def k(self) -> int:
        return self.q.shape[1]


@gluon.constexpr_function
def _code_asm():
    """PTX: a word of eight codes times $3, rounded to integers, as two words of four bytes.

    Codes + 8 become floats 2^23 + 8 + code through their bytes. 3 * 2^22 in the FMA rounds the exact product once, ties
    to even, and leaves the integer in the last byte.
    """
    lines = ["and.b32 e, $2, 0x0F0F0F0F;", "xor.b32 e, e, 0x08080808;", "shr.u32 o, $2, 4;"]
    lines += ["and.b32 o, o, 0x0F0F0F0F;", "xor.b32 o, o, 0x08080808;"]
    for i in range(8):
        lines += [f"prmt.b32 u{i}, {'eo'[i % 2]}, 0x4B000000, 0x744{i // 2};", f"mov.b32 f{i}, u{i};"]
        lines += [f"sub.rn.f32 f{i}, f{i}, 8388616.0;", f"fma.rn.f32 f{i}, f{i}, $3, 12582912.0;"]
        lines += [f"mov.b32 u{i}, f{i};"]
    for i in range(2):
        lines += [f"prmt.b32 e, u{4 * i}, u{4 * i + 1}, 0x0040;", f"prmt.b32 o, u{4 * i + 2}, u{4 * i + 3}, 0x0040;"]
        lines += [f"prmt.b32 ${i}, e, o, 0x5410;"]
    return "{\n.reg .b32 e, o, u<8>;\n.reg .f32 f<8>;\n" + "\n".join(lines) + "\n}"


@gluon.jit
def _add_bytes(total, words):
    """total + the four signed bytes of each word."""
    return gl.inline_asm_elementwise(
        "dp4a.s32.s32 $0, $2, 0x01010101, $1;", "=r,r,r", [total, words], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def _load(words_ptr, place, step, G, BATCH: gl.constexpr, L: gl.constexpr):
    """The words of BATCH steps from ``step`` on."""
    GROUPS: gl.constexpr = L.threads_per_warp[0] * L.warps_per_cta[0]
    words = ()
    for i in gl.static_range(BATCH):
        g = (step + i) * GROUPS + index_along(L, 4, 0, GROUPS)
        words += (gl.load(words_ptr + (step + i) * (GROUPS * 1024) + place, mask=g < G, other=0),)
    return words


@gluon.jit
def _row_of_block(i, half, NR: gl.constexpr):
    """Row of the i-th of the block's n % 8, and of n / 8 % 2."""
    pid = gl.program_id(0)
    return pid // (8 // NR) * 16 + pid % (8 // NR) * NR + i + half * 8


@gluon.jit
def expand_kernel(
    words_ptr, wscales_ptr, q_ptr, scales_ptr, sums_ptr, G,
    SUMS: gl.constexpr, NR: gl.constexpr, WARPS: gl.constexpr, BATCH: gl.constexpr, STEPS: gl.constexpr,
):  # fmt: skip
    """2 * NR rows; 8 / NR groups of each warp in a step, BATCH steps loaded at a time. words_ptr, q_ptr: int32 words ·
    STEPS: a power of two, enough for G groups."""
    # groups, n%8, k/8%4, and n/8%2, k/32%2: 16 bytes
    L: gl.constexpr = gl.BlockedLayout([1, 1, 1, 4], [8 // NR, NR, 4, 1], [WARPS, 1, 1, 1], [3, 2, 1, 0])
    GROUPS: gl.constexpr = 8 // NR * WARPS
    tile, part = gl.program_id(0) // (8 // NR), gl.program_id(0) % (8 // NR)
    words_ptr += tile // 8 * (G * 1024) + tile % 8 * 128 + part * (NR * 16)
    place = index_along(L, 4, 0, GROUPS) * 1024 + index_along(L, 4, 1, NR) * 16
    place += index_along(L, 4, 2, 4) * 4 + index_along(L, 4, 3, 4)
    following = _load(words_ptr, place, 0, G, BATCH, L)

    # The rows' group scales; groups, n%8/2, n/8%2, n%2 as in the file: [N / 128, G, 128]
    S: gl.constexpr = gl.BlockedLayout([1, NR // 2, 2, 2], [32, 1, 1, 1], [WARPS, 1, 1, 1], [3, 2, 1, 0])
    g = index_along(S, 4, 0, STEPS * GROUPS)
    of_group = index_along(S, 4, 1, NR // 2) * 4 + index_along(S, 4, 2, 2) * 2 + index_along(S, 4, 3, 2)
    wscales_ptr += tile // 8 * (G * 128) + tile % 8 * 16 + part * (NR * 2)
    wscales = gl.load(wscales_ptr + (g * 128 + of_group), mask=g < G, other=0.0).to(gl.float32)
    scales = gl.max(gl.abs(wscales), axis=0) * 0.0625
    i, half = index_along(gl.SliceLayout(0, S), 3, 0, NR // 2) * 2, index_along(gl.SliceLayout(0, S), 3, 1, 2)
    i += index_along(gl.SliceLayout(0, S), 3, 2, 2)
    gl.store(scales_ptr + _row_of_block(i, half, NR), scales)
    inverse = gl.inline_asm_elementwise("rcp.rn.f32 $0, $1;", "=f,f", [scales], dtype=gl.float32, is_pure=True, pack=1)
    inverse = gl.where(scales > 0.0, inverse, 0.0)
    ratios = wscales * gl.expand_dims(inverse, 0)  # at most 16
    ratios = gl.reshape(gl.permute(ratios, [0, 2, 1, 3]), [STEPS, GROUPS, 2, NR])
    ratios = gl.reshape(gl.permute(ratios, [0, 2, 1, 3]), [STEPS * 2, GROUPS, NR])
    s_ratios = gl.allocate_shared_memory(gl.float32, [STEPS * 2, GROUPS, NR], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    store_as(s_ratios, ratios, gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))
    barrier()

    # Where a lane's codes go: groups, n%8, k/8%4, two words
    OUT: gl.constexpr = gl.BlockedLayout([1, 1, 1, 2], [8 // NR, NR, 4, 1], [WARPS, 1, 1, 1], [3, 2, 1, 0])
    out_group = index_along(OUT, 4, 0, GROUPS)
    out_row = _row_of_block(index_along(OUT, 4, 1, NR), 0, NR)
    q_ptr += out_row.to(gl.int64) * (G * 16)
    q_ptr += out_group * 16 + index_along(OUT, 4, 2, 4) * 2 + index_along(OUT, 4, 3, 2)
    W: gl.constexpr = gl.SliceLayout(3, L)
    sums0 = gl.zeros([GROUPS, NR, 4], gl.int32, W)
    sums1 = sums0
    for step in range(0, (G + GROUPS - 1) // GROUPS, BATCH):
        words = following
        following = _load(words_ptr, place, step + BATCH, G, BATCH, L)
        for b in gl.static_range(BATCH):
            k0, k1 = gl.split(gl.reshape(words[b], [GROUPS, NR, 4, 2, 2]))
            of_step = q_ptr + (step + b) * (GROUPS * 16)
            inside = (step + b) * GROUPS + out_group < G
            slot = gl.minimum(step + b, STEPS - 1) * 2
            sums0, sums1 = _expand(k0, s_ratios, slot, of_step, inside, G, sums0, sums1, SUMS, W, OUT)
            sums0, sums1 = _expand(k1, s_ratios, slot, of_step + 8, inside, G, sums0, sums1, SUMS, W, OUT)
    if SUMS:
        sums0, sums1 = gl.sum(gl.sum(sums0, axis=2), axis=0), gl.sum(gl.sum(sums1, axis=2), axis=0)
        i = gl.arange(0, NR, gl.SliceLayout(0, gl.SliceLayout(2, W)))
        gl.store(sums_ptr + _row_of_block(i, 0, NR), sums0)
        gl.store(sums_ptr + _row_of_block(i, 1, NR), sums1)


@gluon.jit
def _expand(words, s_ratios, slot, q_ptr, inside, G, sums0, sums1, SUMS: gl.constexpr, W: gl.constexpr,
            OUT: gl.constexpr):  # fmt: skip
    """Write one half of each group: words [.., 2] of rows n and n + 8."""
    w0, w1 = gl.split(words)
    codes0 = _codes(gl.convert_layout(w0, W, assert_trivial=True), s_ratios.index(slot), W)
    codes1 = _codes(gl.convert_layout(w1, W, assert_trivial=True), s_ratios.index(slot + 1), W)
    gl.store(q_ptr, gl.convert_layout(gl.join(codes0[0], codes0[1]), OUT, assert_trivial=True), mask=inside)
    gl.store(q_ptr + G * 128, gl.convert_layout(gl.join(codes1[0], codes1[1]), OUT, assert_trivial=True), mask=inside)
    if SUMS:
        sums0 = _add_bytes(_add_bytes(sums0, codes0[0]), codes0[1])
        sums1 = _add_bytes(_add_bytes(sums1, codes1[0]), codes1[1])
    return sums0, sums1


@gluon.jit
def _codes(words, ratios, W: gl.constexpr):
    ratio = gl.expand_dims(ratios.load(gl.SliceLayout(2, W)), 2)
    return gl.inline_asm_elementwise(
        _code_asm(), "=r,=r,r,f", [words, ratio], dtype=(gl.int32, gl.int32), is_pure=True, pack=1
    )


def expand_w4_to_int8(weight: PackedW4A4, out: W8 | None = None, shape: tuple[int, int, int] = SHAPE) -> W8:
    """As :func:`kernels.reference.expand_w4_to_int8`, from file order to natural row-major.

    out: what to write to, or None · shape: (rows of a block: 4, 8 or 16; warps; steps loaded at a time), for
    benchmarks. ``sums`` is filled only where the layer takes unsigned activation codes.
    """
    n, k = weight.n, weight.k
    if out is None:
        device = weight.qweight.device
        q = torch.empty(n, k, dtype=torch.int8, device=device)
        scales = torch.empty(n, dtype=torch.float32, device=device)
        sums = torch.empty(n, dtype=torch.int32, device=device) if weight.act_unsigned else scales.view(torch.int32)
        out = W8(q, scales, sums, weight.act_unsigned)
    require("out.q", out.q, (n, k), torch.int8)
    require("out.scales", out.scales, (n,), torch.float32)
    require("out.sums", out.sums, (n,), torch.int32)
    rows, warps, batch = shape
    with torch.cuda.device_of(out.q):
        expand_kernel[(n // rows,)](
            words_ptr=weight.qweight.view(torch.int32),
            wscales_ptr=weight.wscales,
            q_ptr=out.q.view(torch.int32),
            scales_ptr=out.scales,
            sums_ptr=out.sums,
            G=k // GROUP,
            SUMS=weight.act_unsigned,
            NR=rows // 2,
            WARPS=warps,
            BATCH=batch,
            STEPS=triton.next_power_of_2(triton.cdiv(k // GROUP, 16 // rows * warps)),
            num_warps=warps,
            **FMA,
        )
    return out
