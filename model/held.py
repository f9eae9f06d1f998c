"""What a linear keeps of what it has made of its weight and its patches, in places that CUDA graphs know."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from comfy_kitchen.tensor.base import QuantizedTensor
from torch import Tensor

from ..kernels.int4 import PackedW4A4
from . import lora
from .layout_svdq import packed_parts

Factors = list[tuple[Tensor, Tensor] | None]
"""(proj_down, proj_up) of each part of a linear with LoRAs; None: the part's own, wherever core has put them."""


@dataclass(eq=False)
class Held:
    """A linear's weight for fused kernels, LoRAs included, where it is now.

    kept: its parts with what kept_weights.py keeps of them, made when its memory was in the state ``filled``.
    """

    weight: QuantizedTensor
    bias: Tensor | None
    columns: lora.Columns | None
    parts: tuple[PackedW4A4, ...]
    kept: tuple[PackedW4A4, ...] = ()
    filled: Any = None

    def stored_parts(self) -> tuple[PackedW4A4, ...]:
        """The parts without LoRAs."""
        return packed_parts(self.weight._qdata, self.weight._params)

    @functools.cached_property
    def places(self) -> tuple[int, ...]:
        """Where everything is that kernels read of the weight, and ranks, which LoRAs change."""
        found = [0 if self.bias is None else self.bias.data_ptr()]
        for part in self.parts:
            found += (part.qweight.data_ptr(), part.proj_down.data_ptr(), part.proj_up.data_ptr(), part.rank)
        return tuple(found)


@dataclass(frozen=True)
class SortedPatches:
    """The ``active`` patches on a weight: ``plain`` LoRAs, for columns, or ``rest``, all of them, for core."""

    active: list[lora.Patch]
    plain: list[lora.Patch]
    rest: list[lora.Patch]


NO_PATCHES = SortedPatches([], [], [])


@dataclass
class Made:
    """What a linear has made of its weight and its patches, until those are others.

    columns: of the patches ``columns_of`` · extended: low-rank factors of the weight's parts with ``columns`` ·
    factors: those of ``columns`` for a weight without a low-rank branch · comfy_quant: and what it says.
    Not attributes of the linear itself: nn.Module sets those twenty times as slowly.
    """

    sorted: SortedPatches | None = None
    columns_of: SortedPatches | None = None
    columns: lora.Columns | None = None
    held: Held | None = None
    extended: tuple[lora.Columns, Factors] | None = None
    factors: tuple[lora.Columns, tuple[Tensor, Tensor]] | None = None
    comfy_quant: tuple[dict[str, Any], Tensor] | None = None

    def free(self) -> None:
        """Give up what is on a device: a LoRA's factors take 0.6 GB at rank 16, and ComfyUI does not know of them."""
        self.columns_of = self.columns = self.held = self.extended = self.factors = None


def in_place(old: Factors, new: Factors) -> Factors:
    """The values of ``new``, in the memory of ``old`` where they fit."""

    def replaced(a: Tensor, b: Tensor) -> Tensor:
        fits = a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
        return a.copy_(b) if fits and writable(a) else b

    return [
        b if a is None or b is None else (replaced(a[0], b[0]), replaced(a[1], b[1]))
        for a, b in zip(old, new, strict=True)
    ]


def writable(tensor: Tensor) -> bool:
    """Whether a tensor can be changed in place here: one from inference mode only there."""
    return torch.is_inference_mode_enabled() or not tensor.is_inference()
