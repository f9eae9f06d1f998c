"""Patches that ComfyUI's stock nodes leave on a weight, applied beside a quantized weight instead of to it.

A plain LoRA becomes extra low-rank columns: ``y += (x @ down^T) @ up^T``, exact and without requantizing anything.
Everything else (LoHa, LoKr, DoRA, full differences, merges) goes to ComfyUI's own arithmetic on the dequantized weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import torch
from comfy.weight_adapter import LoRAAdapter
from torch import Tensor

Patch = tuple[float, Any, float, tuple[int, int, int] | None, Any]
"""(strength, value, strength of the weight, offset (axis, start, length), function), as ModelPatcher keeps patches."""


def is_plain(patch: Patch) -> bool:
    """Whether a patch is a LoRA that low-rank columns express exactly."""
    _, value, strength_model, _, function = patch
    if not isinstance(value, LoRAAdapter) or strength_model != 1.0 or function is not None:
        return False
    up, down, _, mid, dora_scale, reshape = value.weights
    return mid is None and dora_scale is None and reshape is None and up.ndim == 2 and down.ndim == 2


@dataclass(frozen=True)
class Columns:
    """Low-rank columns for one linear, on its device: down [R, K], up [N, R].

    ``sources`` keeps alive the objects whose ids are in ``key``.
    """

    key: tuple
    down: Tensor
    up: Tensor
    sources: tuple[Any, ...]

    def apply(self, x: Tensor, y: Tensor) -> Tensor:
        """y + (x @ down^T) @ up^T; x [..., K], y [..., N]."""
        return y + torch.nn.functional.linear(torch.nn.functional.linear(x, self.down), self.up)


def build_columns(
    patches: Sequence[Patch], shape: tuple[int, int], device: torch.device, dtype: torch.dtype, cached: Columns | None
) -> Columns:
    """Columns of plain LoRA ``patches`` for a weight of ``shape`` [N, K]; ``cached`` is returned if it is the same."""
    key = (device, dtype, tuple((id(value), strength, offset) for strength, value, _, offset, _ in patches))
    if cached is not None and cached.key == key:
        return cached
    n, k = shape
    downs, ups = [], []
    for strength, value, _, offset, _ in patches:
        up, down, alpha, *_ = value.weights
        scale = strength * (alpha / down.shape[0] if alpha is not None else 1.0)
        up = comfy.model_management.cast_to_device(up, device, torch.float32) * scale
        down = comfy.model_management.cast_to_device(down, device, torch.float32)
        if offset is not None:
            axis, start, length = offset
            if axis == 0:
                up = _embed(up, 0, start, length, n)
            else:
                down = _embed(down, 1, start, length, k)
        downs.append(down.to(dtype))
        ups.append(up.to(dtype))
    sources = tuple(value for _, value, *_ in patches)
    return Columns(key, torch.cat(downs, dim=0), torch.cat(ups, dim=1), sources)


def _embed(tensor: Tensor, axis: int, start: int, length: int, size: int) -> Tensor:
    shape = list(tensor.shape)
    shape[axis] = size
    whole = tensor.new_zeros(shape)
    whole.narrow(axis, start, length).copy_(tensor)
    return whole
