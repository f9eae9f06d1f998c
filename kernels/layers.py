"""What a FLUX block is made of, on quantized weights: one interface, INT4 and INT8 arithmetic behind it.

A block quantizes an input once (``quantize``), multiplies it with a layer (``multiply``, or ``multiply_sum`` for two
inputs), and lets the GEMM do what follows (epilogue.After). Importing this imports Triton.

Vocabulary: part, one PackedW4A4 of a layer in file order · T the 16-bit type of its scales.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .ahead import compile_once, name_functions
from .epilogue import After
from .gemm_int4 import gemm_w4a4
from .gemm_int8 import gemm_w8a8
from .gemm_quantize import gemm_gelu_quantize
from .gemv import MAX_ROWS, gemv_w4a16
from .int4 import MAX_RANK, W8A8, PackedAWQ, PackedW4A4
from .kept_int8 import factor_bytes, factors_of, keep, kept_bytes, weight_of
from .layout import concat_lowrank
from .lora_rows import add_lora
from .quantize import Modulation, quantize_act
from .quantize_int8 import quantize_act_int8
from .weights_int8 import W8


class Layers(ABC):
    """Layers in one kind of arithmetic."""

    after = After
    modulation = Modulation
    device_type = "cuda"
    max_rank: int | None = None  # of a low-rank branch
    max_awq_rows = MAX_ROWS  # of linear_awq

    def compile_once(self, key: Hashable, compute: Callable[[], object]) -> None:
        """Compile what ``compute`` will start, side by side, if ``key`` is new; see :func:`kernels.ahead.compile_once`.
        It stands for everything that chooses between forms of kernels but the arithmetic."""
        compile_once((type(self).__name__, key), compute)

    @abstractmethod
    def quantize(self, x: Tensor, part: PackedW4A4, modulation: Modulation | None = None) -> Any:
        """x T [M, K], rows contiguous, modulated if so asked, as the input of ``part``."""

    def quantize_for(self, x: Tensor, parts: tuple[PackedW4A4, ...], modulation: Modulation | None = None) -> tuple:
        """x as the input of each of ``parts``; made once if their smooth_factor is the same tensor."""
        alike = all(part.smooth_factor is parts[0].smooth_factor and not part.act_unsigned for part in parts)
        if alike and (self.max_rank is None or sum(part.rank for part in parts) <= self.max_rank):
            return self._quantize_once(x, parts, modulation)
        return tuple(self.quantize(x, part, modulation) for part in parts)

    @abstractmethod
    def _quantize_once(self, x: Tensor, parts: tuple[PackedW4A4, ...], modulation: Modulation | None) -> tuple:
        """One set of codes with the low-rank branches of all ``parts``."""

    @abstractmethod
    def multiply(
        self, x: Any, part: PackedW4A4, bias: Tensor | None, after: After | None = None, out: Tensor | None = None
    ) -> Tensor:
        """T [M, N] = after(x @ part + bias); x: what ``quantize`` returned for this part · out: where to write it."""

    @abstractmethod
    def multiply_sum(
        self,
        first: Any,
        first_part: PackedW4A4,
        second: Any,
        second_part: PackedW4A4,
        bias: Tensor | None,
        after: After | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """after(first @ first_part + second @ second_part + bias); with gate and residual it may be rounded twice."""

    @abstractmethod
    def gelu_input(self, x: Any, part: PackedW4A4, bias: Tensor | None, following: PackedW4A4) -> Any:
        """GELU(x @ part + bias) as the input of the layer ``following``."""

    def kept_bytes(self, part: PackedW4A4) -> int:
        """Bytes of memory in which ``keep`` puts what kernels otherwise make of a part each time, or 0."""
        return 0

    def factor_bytes(self, part: PackedW4A4) -> int:
        """Bytes of memory that ``keep`` needs besides for a part that LoRAs have added to."""
        return 0

    def keep(
        self, part: PackedW4A4, stored: PackedW4A4, memory: Tensor, fill: bool, lora_memory: Tensor
    ) -> PackedW4A4:
        """``part`` as other methods take it, faster, with the same results; see :func:`kernels.kept_int8.keep`."""
        return part

    def linear_parts_w4a4(self, x: Tensor, parts: tuple[PackedW4A4, ...], axis: int, bias: Tensor | None) -> Tensor:
        """A whole linear on x T [M, K], as :func:`kernels.reference.linear_parts_w4a4`; bias [N] or None (the stored).

        axis 0: outputs side by side in one tensor; axis 1: two inputs side by side, summed before anything is rounded.
        """
        if axis == 0:
            y = torch.empty(x.shape[0], sum(part.n for part in parts), dtype=x.dtype, device=x.device)
            start = 0
            for part in parts:
                stop = start + part.n
                part_bias = None if bias is None else bias[start:stop]
                self.multiply(self.quantize(x, part), part, part_bias, out=y[:, start:stop])
                start = stop
            return y
        first, second = parts
        head, tail = self.quantize(x[:, : first.k], first), self.quantize(x[:, first.k :], second)
        return self.multiply_sum(head, first, tail, second, bias)

    def linear_awq(
        self, x: Tensor, weight: PackedAWQ, bias: Tensor | None, lora: tuple[Tensor, Tensor] | None = None
    ) -> Tensor | None:
        """A modulation layer on x T [M, K], as :func:`kernels.gemv.gemv_w4a16`; None where that does not apply.

        lora: (down T [R, K], up T [N, R]), whose product with x is added.
        """
        if not 1 <= x.shape[0] <= MAX_ROWS or x.dtype != weight.wscales.dtype:
            return None
        y = gemv_w4a16(x, weight, bias)
        return y if lora is None else add_lora(y, x, *lora)

    def linear_w8a8(
        self, x: Tensor, weight: W8A8, bias: Tensor | None, lora: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """A linear in INT8 on x T [M, K], as :func:`kernels.reference.linear_w8a8`, whatever the other layers are in:
        every GPU that has INT4 tensor cores has those for INT8."""
        codes, scales, lora_act = quantize_act_int8(x, weight, x.new_empty(0, weight.k))
        signed = W8(weight.q, weight.wscales, weight.wscales.view(torch.int32))  # sums are for unsigned codes
        y = gemm_w8a8(codes, scales, lora_act, signed, x.new_empty(weight.n, 0), bias)
        return y if lora is None else add_lora(y, x, *lora)


class Int4Layers(Layers):
    """INT4 activations, the arithmetic of int4.py."""

    max_rank = MAX_RANK

    def quantize(self, x, part, modulation=None):
        return quantize_act(x, part, modulation)

    def _quantize_once(self, x, parts, modulation):
        all_ranks = replace(parts[0], proj_down=concat_lowrank(*(part.proj_down for part in parts)))
        codes, ascales, lora_act = quantize_act(x, all_ranks, modulation)
        return tuple((codes, ascales, ranks) for ranks in _split(lora_act, parts))

    def multiply(self, x, part, bias, after=None, out=None):
        return gemm_w4a4(*x, part, bias, after=after, out=out)

    def multiply_sum(self, first, first_part, second, second_part, bias, after=None, out=None):
        return gemm_w4a4(*first, first_part, bias, after=after, out=out, second=(*second, second_part))

    def gelu_input(self, x, part, bias, following):
        return gemm_gelu_quantize(*x, part, following, bias)


@dataclass(frozen=True)
class Int8Input:
    """codes int8 [M, K], scales float32 [M], lora_act T [M, R], and the layer's proj_up T [N, R] in natural order."""

    codes: Tensor
    scales: Tensor
    lora_act: Tensor
    proj_up: Tensor


class Int8Layers(Layers):
    """INT8 activations with one scale per token; weights are expanded to INT8 just before each product, or kept so."""

    def quantize(self, x, part, modulation=None):
        proj_down, proj_up = factors_of(part)
        scale, shift = (None, None) if modulation is None else (modulation.scale, modulation.shift)
        return Int8Input(*quantize_act_int8(x, part, proj_down, scale, shift), proj_up)

    def _quantize_once(self, x, parts, modulation):
        downs, ups = zip(*(factors_of(part) for part in parts), strict=True)
        scale, shift = (None, None) if modulation is None else (modulation.scale, modulation.shift)
        alike = all(part.rank == parts[0].rank for part in parts)
        layers = len(parts) if alike else 1
        codes, scales, lora_act = quantize_act_int8(x, parts[0], torch.cat(downs), scale, shift, layers)
        ranks = lora_act.unbind(0) if layers > 1 else _split(lora_act, parts)
        return tuple(Int8Input(codes, scales, *rest) for rest in zip(ranks, ups, strict=True))

    def multiply(self, x, part, bias, after=None, out=None):
        weight = weight_of(part)
        return gemm_w8a8(x.codes, x.scales, x.lora_act, weight, x.proj_up, bias, after=after, out=out)

    def multiply_sum(self, first, first_part, second, second_part, bias, after=None, out=None):
        if after is not None and after.gate is not None:
            # Two products with twice the tile are faster than one with two accumulators, for one more rounding.
            y = self.multiply(first, first_part, bias, after, out)
            return self.multiply(second, second_part, None, After(gate=after.gate, residual=y), y)
        lora_act = torch.cat((first.lora_act, second.lora_act), dim=1)
        proj_up = torch.cat((first.proj_up, second.proj_up), dim=1)
        weight, weight2 = weight_of(first_part), weight_of(second_part)
        return gemm_w8a8(
            first.codes, first.scales, lora_act, weight, proj_up, bias, after=after, out=out,
            second=(second.codes, second.scales, weight2),
        )  # fmt: skip

    def gelu_input(self, x, part, bias, following):
        return self.quantize(self.multiply(x, part, bias, After(gelu=True)), following)

    def kept_bytes(self, part):
        return kept_bytes(part)

    def factor_bytes(self, part):
        return factor_bytes(part)

    def keep(self, part, stored, memory, fill, lora_memory):
        return keep(part, stored, memory, fill, lora_memory)


def _split(lora_act: Tensor, parts: tuple[PackedW4A4, ...]) -> tuple[Tensor, ...]:
    """The columns of each part, contiguous."""
    return tuple(ranks.contiguous() for ranks in lora_act.split([part.rank for part in parts], dim=1))


INT4, INT8 = Int4Layers(), Int8Layers()

name_functions(__package__)
