"""The contract of SVDQuant INT4: shapes, codes, formulas. Every other file points here.

Vocabulary (the field's names, the same in every file)
    M tokens, N output features, K input features, G = K / 64 groups, R rank of the low-rank branch
    qweight         4-bit residual weight codes            smooth_factor  [K], the activation is DIVIDED by it
    wscales         one scale per row and group of 64      proj_down      low-rank down projection, D
    ascales         one scale per token and group of 64    proj_up        low-rank up projection, U
    lora_act        x @ D^T, [M, R]                         act_unsigned   activation codes are 0..15, see below

What a W4A4 layer means (SVDQuant, arXiv 2411.05007)::

    W_eff[n, k] = q[n, k] * wscales[n, k / 64] / smooth_factor[k] + sum_r U[n, r] * D[r, k]

What it computes: the low-rank branch sees the raw activation, the 4-bit branch the smoothed and quantized one::

    y = quantize(x / smooth_factor) @ (q * wscales)^T + bias + (x @ D^T) @ U^T

Activation codes, per token and group of 64 columns, T = the 16-bit compute type (see reference.quantize_act)
    signed      scale = amax / 7,  codes -7..7 (the field can hold -8; it is never emitted)
    unsigned    scale = amax / 15, codes 0..15: layers behind a GELU. Its output is above -0.17, so SHIFT is added
                before smoothing and nothing is negative. The stored bias of such a layer already holds the
                correction: used as an ordinary dense layer on unshifted input, the bias is
                bias + SHIFT * sum_k q * wscales / smooth_factor  (low-rank part not included).

Weight codes -8..7 (two's complement nibbles), group 64 along K. Modulation layers are AWQ W4A16 instead:
``w = code * wscale + wzero`` with codes 0..15 and 16-bit activations.

A layer that a person excepts from four bits may be W8A8: ``W_eff[n, k] = q[n, k] * wscales[n] / smooth_factor[k]`` with
q -127..127, signed activation codes -127..127 with one scale per token (reference.quantize_act_int8), no branch.

Byte order: ``layout.py``. Packed classes hold the bytes as the file has them; ``unpack()`` gives natural order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor
from torch.nn.functional import pad

from . import layout

GROUP = 64
SHIFT = 0.171875  # 11/64: exact in bf16 and fp16, just above -min(gelu_tanh) = 0.16997
SIGNED_MAX = 7
UNSIGNED_MAX = 15
RANK_MULTIPLE = 16
MAX_RANK = 256  # of a low-rank branch that the INT4 kernels take


@dataclass(frozen=True)
class W4A4:
    """One W4A4 weight in natural order.

    q: int8 [N, K] in -8..7 · wscales: T [N, G] · smooth_factor: T [K] · proj_down: T [R, K] · proj_up: T [N, R] ·
    act_unsigned: whether the layer takes unsigned activation codes (and the GELU shift).
    """

    q: Tensor
    wscales: Tensor
    smooth_factor: Tensor
    proj_down: Tensor
    proj_up: Tensor
    act_unsigned: bool = False

    def pack(self) -> PackedW4A4:
        """The same weight in file order. N and K must be multiples of 128, R of 16."""
        return PackedW4A4(
            qweight=layout.pack_qweight(self.q),
            wscales=layout.pack_wscales(self.wscales),
            smooth_factor=layout.pack_vector(self.smooth_factor),
            proj_down=layout.pack_lowrank_down(self.proj_down),
            proj_up=layout.pack_lowrank_up(self.proj_up),
            act_unsigned=self.act_unsigned,
        )


@dataclass(frozen=True)
class PackedW4A4:
    """One W4A4 weight as the file stores it; shapes are nominal, bytes in tile order.

    qweight: int8 [N, K / 2] · wscales: T [G, N] · smooth_factor: T [K] · proj_down: T [K, R] · proj_up: T [N, R].
    """

    qweight: Tensor
    wscales: Tensor
    smooth_factor: Tensor
    proj_down: Tensor
    proj_up: Tensor
    act_unsigned: bool = False

    @property
    def n(self) -> int:
        return self.qweight.shape[0]

    @property
    def k(self) -> int:
        return self.qweight.shape[1] * 2

    @property
    def rank(self) -> int:
        return self.proj_down.shape[1]

    def rows(self, start: int, stop: int) -> PackedW4A4:
        """Output rows start..stop (multiples of 128) as a packed weight that shares this one's memory."""
        tiles = self.wscales.reshape(self.n // layout.TILE_N, -1)
        tiles = tiles[start // layout.TILE_N : stop // layout.TILE_N]
        return PackedW4A4(
            qweight=self.qweight[start:stop],
            wscales=tiles.reshape(self.k // GROUP, stop - start),
            smooth_factor=self.smooth_factor,
            proj_down=self.proj_down,
            proj_up=self.proj_up[start:stop],
            act_unsigned=self.act_unsigned,
        )

    def extended(self, down: Tensor, up: Tensor) -> PackedW4A4:
        """The same weight with r more columns in its low-rank branch, and zeros up to the next valid rank.

        down: [r, K] · up: [N, r], natural order, any float dtype; rounded to T.
        """
        missing = -len(down) % RANK_MULTIPLE
        down = pad(down, (0, 0, 0, missing)).to(self.proj_down.dtype)
        up = pad(up, (0, missing)).to(self.proj_up.dtype)
        return replace(
            self,
            proj_down=layout.concat_lowrank(self.proj_down, layout.pack_lowrank_down(down)),
            proj_up=layout.concat_lowrank(self.proj_up, layout.pack_lowrank_up(up)),
        )

    def map(self, function: Callable[[Tensor], Tensor]) -> PackedW4A4:
        """The same weight with function(tensor) in the place of every tensor."""
        tensors = (self.qweight, self.wscales, self.smooth_factor, self.proj_down, self.proj_up)
        return PackedW4A4(*map(function, tensors), act_unsigned=self.act_unsigned)

    def unpack(self) -> W4A4:
        """The same weight in natural order (copies)."""
        return W4A4(
            q=layout.unpack_qweight(self.qweight),
            wscales=layout.unpack_wscales(self.wscales),
            smooth_factor=layout.unpack_vector(self.smooth_factor),
            proj_down=layout.unpack_lowrank_down(self.proj_down),
            proj_up=layout.unpack_lowrank_up(self.proj_up),
            act_unsigned=self.act_unsigned,
        )


@dataclass(frozen=True)
class AWQ:
    """One AWQ W4A16 weight in natural order and BFL's row order.

    code: uint8 [N, K] in 0..15 · wscales, wzeros: T [N, G] · ``w = code * wscale + wzero`` (the scaled, negative zero).
    """

    code: Tensor
    wscales: Tensor
    wzeros: Tensor

    def pack(self, splits: int) -> PackedAWQ:
        """The same weight in file order, rows interleaved by ``splits``."""
        return PackedAWQ(
            qweight=layout.pack_awq(layout.interleave_rows(self.code, splits)),
            wscales=layout.interleave_rows(self.wscales, splits).t().contiguous(),
            wzeros=layout.interleave_rows(self.wzeros, splits).t().contiguous(),
            splits=splits,
        )


@dataclass(frozen=True)
class PackedAWQ:
    """One AWQ W4A16 weight as the file stores it.

    qweight: int32 [N / 4, K / 2] · wscales, wzeros: T [at least G, N], row-major, rows beyond G are padding ·
    splits: number of adaLN chunks whose rows are interleaved (6 for double blocks, 3 for single ones).
    """

    qweight: Tensor
    wscales: Tensor
    wzeros: Tensor
    splits: int

    @property
    def n(self) -> int:
        return self.qweight.shape[0] * 4

    @property
    def k(self) -> int:
        return self.qweight.shape[1] * 2

    def unpack(self) -> AWQ:
        """The same weight in natural order, rows in BFL's order (copies)."""
        groups = self.k // GROUP
        return AWQ(
            code=layout.deinterleave_rows(layout.unpack_awq(self.qweight), self.splits),
            wscales=layout.deinterleave_rows(self.wscales[:groups].t(), self.splits),
            wzeros=layout.deinterleave_rows(self.wzeros[:groups].t(), self.splits),
        )


@dataclass(frozen=True)
class W8A8:
    """One INT8 weight of a layer that is not in four bits, as the file stores it.

    q: int8 [N, K] · wscales: float32 [N], both in natural order and BFL's row order · smooth_factor: T [K], file order.
    """

    q: Tensor
    wscales: Tensor
    smooth_factor: Tensor

    act_unsigned = False  # ever

    @property
    def n(self) -> int:
        return self.q.shape[0]

    @property
    def k(self) -> int:
        return self.q.shape[1]
