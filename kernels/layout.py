"""File order <-> natural order of every packed tensor, as pack/unpack pairs.

"File order" is the byte order of an SVDQuant INT4 checkpoint: the order in which the lanes of a warp read the
operands of ``mma.sync.m16n8k64``. The stored *shapes* are nominal; only dtype, element count and flat order count.
"Natural order" is plain row-major with the shapes that each docstring gives. All functions are views, permutations and
bit operations: they run on any device, on meta tensors and under ``torch.compile``, and are exact in both directions.

Vocabulary: N output features, K input features, G = K / 64 scale groups, R rank; integer division throughout.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE_N = 128  # rows of one weight tile; a packed W4A4 tensor may be cut at multiples of it
TILE_K = 128  # the original engine unrolls K by two groups of 64


def unpack_qweight(qweight: Tensor) -> Tensor:
    """W4A4 codes from file order (int8, N * K / 2 bytes, nominal [N, K / 2]) to int8 [N, K] in -8..7.

    word = ((((n/128 * (K/64) + k/64) * 8 + n/16%8) * 8 + n%8) * 4 + k/8%4) * 4 + n/8%2 * 2 + k/32%2 holds eight
    consecutive k of one n, low nibble first.
    """
    n, k = qweight.shape[0], qweight.shape[1] * 2
    # axes: n/128, k/64, n/16%8, n%8, k/8%4, n/8%2, k/32%2, byte of the word
    packed = qweight.view(torch.int8).reshape(n // TILE_N, k // 64, 8, 8, 4, 2, 2, 4)
    # An arithmetic shift right sign-extends the nibble that was shifted to the top.
    low = (packed << 4) >> 4
    high = packed >> 4
    # The eight codes of a word stay together: moved as one int64 they move several times faster.
    words = torch.stack((low, high), dim=-1).flatten(-2).view(torch.int64).squeeze(-1)
    return words.permute(0, 2, 5, 3, 1, 6, 4).reshape(n, k // 8).view(torch.int8)


def pack_qweight(codes: Tensor) -> Tensor:
    """Inverse of :func:`unpack_qweight`: int8 [N, K] in -8..7 to file order, int8 [N, K / 2]."""
    n, k = codes.shape
    _require_multiple("N", n, TILE_N)
    _require_multiple("K", k, TILE_K)
    # axes: n/128, n/16%8, n/8%2, n%8, k/64, k/32%2, k/8%4, byte of the word, nibble of the byte
    nibbles = codes.to(torch.int8).reshape(n // TILE_N, 8, 2, 8, k // 64, 2, 4, 4, 2)
    nibbles = nibbles.permute(0, 4, 1, 3, 6, 2, 5, 7, 8)
    packed = (nibbles[..., 0] & 0x0F) | (nibbles[..., 1] << 4)
    return packed.reshape(n, k // 2)


def unpack_vector(vector: Tensor) -> Tensor:
    """A packed vector (bias, smoothing) from file order to natural order, [N] to [N]; N is a multiple of 128.

    Position inside a block of 16: n%8/2 * 4 + n/8%2 * 2 + n%2.
    """
    return vector.reshape(-1, 4, 2, 2).permute(0, 2, 1, 3).reshape(-1)


def pack_vector(vector: Tensor) -> Tensor:
    """Inverse of :func:`unpack_vector`."""
    _require_multiple("length", vector.numel(), TILE_N)
    return vector.reshape(-1, 2, 4, 2).permute(0, 2, 1, 3).reshape(-1)


def unpack_wscales(wscales: Tensor) -> Tensor:
    """Group scales from file order (nominal [G, N]) to natural order [N, G].

    The buffer is [N / 128, G, 128] with each run of 128 ordered as in :func:`unpack_vector`.
    """
    g, n = wscales.shape
    blocks = wscales.reshape(n // TILE_N, g, 8, 4, 2, 2)
    return blocks.permute(0, 2, 4, 3, 5, 1).reshape(n, g)


def pack_wscales(wscales: Tensor) -> Tensor:
    """Inverse of :func:`unpack_wscales`: [N, G] to file order, nominal [G, N]."""
    n, g = wscales.shape
    _require_multiple("N", n, TILE_N)
    blocks = wscales.reshape(n // TILE_N, 8, 2, 4, 2, g)
    return blocks.permute(0, 5, 1, 3, 2, 4).reshape(g, n)


def unpack_lowrank_down(proj_down: Tensor) -> Tensor:
    """Low-rank down projection from file order (nominal [K, R]) to natural order [R, K].

    flat = (k/16 * (R/16) + r/16) * 256 + r%8 * 32 + k%8/2 * 8 + r/8%2 * 4 + k/8%2 * 2 + k%2: in ``down`` the rank plays
    the "n" role of the MMA.
    """
    k, r = proj_down.shape
    # axes: k/16, r/16, r%8, k%8/2, r/8%2, k/8%2, k%2
    tiles = proj_down.reshape(k // 16, r // 16, 8, 4, 2, 2, 2)
    return tiles.permute(1, 4, 2, 0, 5, 3, 6).reshape(r, k)


def pack_lowrank_down(proj_down: Tensor) -> Tensor:
    """Inverse of :func:`unpack_lowrank_down`: [R, K] to file order, nominal [K, R]."""
    r, k = proj_down.shape
    _require_multiple("rank", r, 16)
    _require_multiple("K", k, 16)
    # axes: r/16, r/8%2, r%8, k/16, k/8%2, k%8/2, k%2
    tiles = proj_down.reshape(r // 16, 2, 8, k // 16, 2, 4, 2)
    return tiles.permute(3, 0, 2, 5, 1, 4, 6).reshape(k, r)


def unpack_lowrank_up(proj_up: Tensor) -> Tensor:
    """Low-rank up projection from file order to natural order, [N, R] to [N, R].

    flat = (n/16 * (R/16) + r/16) * 256 + n%8 * 32 + r%8/2 * 8 + n/8%2 * 4 + r/8%2 * 2 + r%2: in ``up`` the output
    channel plays the "n" role of the MMA.
    """
    n, r = proj_up.shape
    # axes: n/16, r/16, n%8, r%8/2, n/8%2, r/8%2, r%2
    tiles = proj_up.reshape(n // 16, r // 16, 8, 4, 2, 2, 2)
    return tiles.permute(0, 4, 2, 1, 5, 3, 6).reshape(n, r)


def pack_lowrank_up(proj_up: Tensor) -> Tensor:
    """Inverse of :func:`unpack_lowrank_up`."""
    n, r = proj_up.shape
    _require_multiple("N", n, 16)
    _require_multiple("rank", r, 16)
    # axes: n/16, n/8%2, n%8, r/16, r/8%2, r%8/2, r%2
    tiles = proj_up.reshape(n // 16, 2, 8, r // 16, 2, 4, 2)
    return tiles.permute(0, 3, 2, 5, 1, 4, 6).reshape(n, r)


def unpack_awq(qweight: Tensor) -> Tensor:
    """AWQ codes from file order (int32, nominal [N / 4, K / 2]) to uint8 [N, K] in 0..15.

    word = n/4 * (K/2) + k/64 * 32 + n%4 * 8 + k%64/32 * 4 + k%8/2, bit = 16 * (k%2) + 4 * (k%32/8).
    """
    n, k = qweight.shape[0] * 4, qweight.shape[1] * 2
    # axes: n/4, k/64, n%4, k/32%2, k%8/2, k%2, k/16%2; the last two are the bytes of the word
    packed = qweight.contiguous().view(torch.uint8).reshape(n // 4, k // 64, 4, 2, 4, 2, 2)
    codes = torch.stack((packed & 0x0F, packed >> 4), dim=-1)  # + k/8%2
    return codes.permute(0, 2, 1, 3, 6, 7, 4, 5).reshape(n, k)


def pack_awq(codes: Tensor) -> Tensor:
    """Inverse of :func:`unpack_awq`: [N, K] in 0..15 to file order, int32 [N / 4, K / 2]."""
    n, k = codes.shape
    _require_multiple("N", n, 4)
    _require_multiple("K", k, 64)
    # axes: n/4, n%4, k/64, k/32%2, k/8%4, k%8/2, k%2
    nibbles = codes.to(torch.int64).reshape(n // 4, 4, k // 64, 2, 4, 4, 2).permute(0, 2, 1, 3, 5, 6, 4)
    shifts = torch.tensor([[0, 4, 8, 12], [16, 20, 24, 28]], dtype=torch.int64, device=codes.device)
    words = (nibbles << shifts).sum(dim=(-2, -1))
    words = torch.where(words >= 2**31, words - 2**32, words)  # two's complement of the top nibble
    return words.to(torch.int32).reshape(n // 4, k // 2)


def deinterleave_rows(stored: Tensor, splits: int) -> Tensor:
    """Row order of an adaLN modulation layer from the file to BFL's: stored row j * S + i is row i * H + j.

    Works on the first axis of a tensor of any rank; ``splits`` is S, the number of chunks (6 or 3).
    """
    rows = stored.shape[0]
    return stored.reshape(rows // splits, splits, *stored.shape[1:]).transpose(0, 1).reshape(stored.shape)


def interleave_rows(rows_in_order: Tensor, splits: int) -> Tensor:
    """Inverse of :func:`deinterleave_rows`."""
    rows = rows_in_order.shape[0]
    shape = rows_in_order.shape
    return rows_in_order.reshape(splits, rows // splits, *shape[1:]).transpose(0, 1).reshape(shape)


def _require_multiple(name: str, value: int, factor: int) -> None:
    if value % factor:
        raise ValueError(f"{name} is {value}, but the packed layout needs a multiple of {factor}")


def concat_lowrank(*factors: Tensor) -> Tensor:
    """Packed low-rank factors [rows, R_i] of the same rows side by side, [rows, sum of R_i], packed (copies)."""
    rows = factors[0].shape[0]
    tiles = [factor.reshape(rows // 16, factor.shape[1] // 16, 256) for factor in factors]  # by rows, then by ranks
    return torch.cat(tiles, dim=1).reshape(rows, sum(factor.shape[1] for factor in factors))


def lowrank_up_view(proj_up: Tensor, first: int, ranks: int) -> Tensor | None:
    """A view of columns of a packed proj_up [N, R] in natural order, [N / 16, 2, 8, ...]; their product is ``ranks``.

    Only for columns that fill tiles, or are 2, 4 or 8 of one and start at a multiple of that; None for others.
    """
    n, r = proj_up.shape
    whole = proj_up.view(n // 16, r // 16, 8, 4, 2, 2, 2).permute(0, 4, 2, 1, 5, 3, 6)
    tile, start = divmod(first, 16)
    if ranks % 16 == 0:
        return whole[:, :, :, tile : tile + ranks // 16] if start == 0 else None
    if ranks not in (2, 4, 8) or start % ranks:
        return None
    half = whole[:, :, :, tile, start // 8]
    return half[..., start % 8 // 2 : (start % 8 + ranks) // 2, :]


def replace_lowrank(whole: Tensor, start: int, factor: Tensor) -> None:
    """Replace the ranks from ``start`` on of a packed low-rank factor [rows, R], in place, by those of ``factor``
    [rows, R - start], packed: the inverse of taking it apart where :func:`concat_lowrank` put it together."""
    rows, ranks = factor.shape
    tiles = whole.view(rows // 16, whole.shape[1] // 16, 256)
    tiles[:, start // 16 :].copy_(factor.reshape(rows // 16, ranks // 16, 256))
