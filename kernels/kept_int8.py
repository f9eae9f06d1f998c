"""What the INT8 kernels read of a 4-bit weight, made once and kept: for GPUs with room for it beside the weight.

Otherwise ``weights_int8.py`` and ``low_rank.py`` make it before every product, the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .int4 import PackedW4A4
from .low_rank import natural_factors
from .weights_int8 import W8, expand_w4_to_int8

_ALIGNMENT = 512  # bytes; the copy engine asks for 16


@dataclass(frozen=True)
class KeptW4A4(PackedW4A4):
    """A part with its INT8 weight, and its low-rank factors as ``natural_factors`` returns them."""

    w8: W8 | None = None
    factors: tuple[Tensor, Tensor] | None = None


_Contents = Sequence[tuple[torch.dtype, tuple[int, ...]]]


def _weight(part: PackedW4A4) -> _Contents:
    sums = (part.n if part.act_unsigned else 0,)
    return (torch.int8, (part.n, part.k)), (torch.float32, (part.n,)), (torch.int32, sums)


def _factors(part: PackedW4A4) -> _Contents:
    dtype = part.proj_down.dtype
    return (dtype, (part.rank, part.k)), (dtype, (part.n, part.rank))


def _bytes(contents: _Contents) -> int:
    sizes = (math.prod(shape) * dtype.itemsize for dtype, shape in contents)
    return sum(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes)


def _views(contents: _Contents, memory: Tensor) -> list[Tensor]:
    views, start = [], 0
    for dtype, shape in contents:
        size = math.prod(shape) * dtype.itemsize
        views.append(memory[start : start + size].view(dtype).view(shape))
        start += _bytes([(dtype, shape)])
    return views


def kept_bytes(part: PackedW4A4) -> int:
    """Bytes of memory that ``keep`` needs for a part without LoRAs."""
    return _bytes((*_weight(part), *_factors(part)))


def factor_bytes(part: PackedW4A4) -> int:
    """Bytes of memory that ``keep`` needs for the low-rank factors of a part with LoRAs."""
    return _bytes(_factors(part))


def kept_views(part: PackedW4A4, memory: Tensor) -> tuple[W8, tuple[Tensor, Tensor]]:
    """(INT8 weight, low-rank factors) of a part as views of memory uint8 [at least kept_bytes], whatever is in it."""
    q, scales, sums, down, up = _views((*_weight(part), *_factors(part)), memory)
    return W8(q, scales, sums if part.act_unsigned else scales.view(torch.int32), part.act_unsigned), (down, up)


def keep(part: PackedW4A4, stored: PackedW4A4, memory: Tensor, fill: bool, lora_memory: Tensor) -> KeptW4A4:
    """``part`` with its INT8 weight and low-rank factors in ``memory``.

    stored: the part without what LoRAs have added to its factors · fill: False if ``memory`` holds what an earlier call
    for this weight has put there · lora_memory: uint8 [factor_bytes] for factors that are not the stored ones.
    """
    w8, factors = kept_views(stored, memory)
    if fill:
        expand_w4_to_int8(stored, w8)
        natural_factors(stored, *factors)
    if part.proj_down is not stored.proj_down:
        factors = natural_factors(part, *_views(_factors(part), lora_memory))
    fields = (part.qweight, part.wscales, part.smooth_factor, part.proj_down, part.proj_up, part.act_unsigned)
    return KeptW4A4(*fields, w8, factors)


def weight_of(part: PackedW4A4) -> W8:
    """The INT8 weight of a part."""
    return part.w8 if isinstance(part, KeptW4A4) else expand_w4_to_int8(part)


def factors_of(part: PackedW4A4) -> tuple[Tensor, Tensor]:
    """The low-rank factors of a part as ``natural_factors`` returns them."""
    return part.factors if isinstance(part, KeptW4A4) else natural_factors(part)
