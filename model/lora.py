"""Patches that ComfyUI's stock nodes leave on a weight, applied beside a quantized weight instead of to it.

A plain LoRA becomes extra low-rank columns: ``y += (x @ down^T) @ up^T``, exact and without requantizing anything. For
kernels they are columns of the layer's own low-rank branch, which then has a larger rank.
Everything else (LoHa, LoKr, DoRA, full differences, merges) goes to ComfyUI's own arithmetic on the dequantized weight.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.lora
import comfy.model_management
import torch
from comfy.weight_adapter import LoRAAdapter
from comfy.weight_adapter.base import WeightAdapterBase
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..kernels.int4 import RANK_MULTIPLE, PackedW4A4
from ..kernels.layout import lowrank_up_view, pack_lowrank_up, replace_lowrank

log = logging.getLogger(__name__)

Patch = tuple[float, Any, float, tuple[int, int, int] | None, Any]
"""(strength, value, strength of the weight, offset (axis, start, length), function), as ModelPatcher keeps patches."""

_FIRST_NOT_FINITE = {  # (integers of the same size, the least positive one that is the bits of infinity or NaN)
    torch.float64: (torch.int64, 0x7FF0000000000000),
    torch.float32: (torch.int32, 0x7F800000),
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float16: (torch.int16, 0x7C00),
    torch.float8_e4m3fn: (torch.int8, 0x7F),
    torch.float8_e5m2: (torch.int8, 0x7C),
}

_finite = WeakTensorKeyDictionary()  # tensors of LoRA files that were found finite: their versions, where they have one


def refuse_damaged(patches: Mapping[Any, Any]) -> None:
    """Raise ValueError, one line, if a LoRA file's ``patches``, as ModelPatcher.add_patches takes them, are not finite.

    ComfyUI would add them, and make black pictures without a word. Of a full-size FLUX LoRA of rank 16 this reads 77
    million values: 15 ms, once: ComfyUI's loaders keep the file's tensors, and add them again for each strength.
    """
    damaged = [key for key, value in patches.items() if not all(map(_is_finite, _values_of(value)))]
    if damaged:
        key = damaged[0] if isinstance(damaged[0], str) else damaged[0][0]
        raise ValueError(
            f"LoRA, {key}: found NaN or infinite values (in {len(damaged)} of {len(patches)} weights that it changes), "
            "expected finite ones. The file is damaged or its training failed. Download it again, or use another one."
        )


def _values_of(value: Any) -> Iterator[Tensor | float]:
    """What a LoRA file says of one weight; nothing of merged models, which have other forms and are large."""
    if isinstance(value, WeightAdapterBase):
        values = value.weights
    else:
        values = value[1] if isinstance(value, tuple) and value[0] in ("diff", "set") else ()
    return (found for found in values if isinstance(found, Tensor | float))


def _is_finite(value: Tensor | float) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if not value.is_floating_point() or not value.numel():
        return True
    version = None if value.is_inference() else value._version
    if value in _finite and _finite[value] == version:
        return True
    finite = _looks_finite(value)
    if finite:
        _finite[value] = version
    return finite


def _looks_finite(value: Tensor) -> bool:
    known = _FIRST_NOT_FINITE.get(value.dtype)
    if known is None or value.device.type != "cpu":
        return bool(value.float().isfinite().all())
    # Two maxima of the bits, by NumPy: torch's many threads can take a hundred times as long where there are fewer
    # cores than it sees, as in containers.
    signed, first = known
    bits = value.detach().view(signed).numpy()
    return bits.max() < first and bits.view(f"u{bits.itemsize}").max() < first + (1 << 8 * bits.itemsize - 1)


def has_effect(patch: Patch) -> bool:
    """Whether a patch changes a weight: a merge at a ratio of 1 and a LoRA at strength 0 do not, and would keep a layer
    from its kernels."""
    strength, value, strength_model, _, function = patch
    if strength_model != 1.0:
        return True
    if isinstance(value, LoRAAdapter) and value.weights[5] is None and not len(value.weights[1]):
        return False  # of rank 0
    if strength != 0.0 or function is not None:
        return True
    if isinstance(value, WeightAdapterBase):
        return isinstance(value, LoRAAdapter) and value.weights[5] is not None  # it makes the weight larger
    if isinstance(value, list) or len(value) == 1:
        return False
    kind, content = value
    return kind != "model_as_lora" and (kind != "diff" or len(content) > 1)


def is_plain(patch: Patch, shape: tuple[int, int]) -> bool:
    """Whether a patch is a LoRA that low-rank columns express exactly, for a weight of ``shape`` [N, K]."""
    _, value, strength_model, _, function = patch
    if not isinstance(value, LoRAAdapter) or strength_model != 1.0 or function is not None:
        return False
    up, down, _, mid, dora_scale, reshape = value.weights
    simple = mid is None and dora_scale is None and reshape is None and up.ndim == 2 and down.ndim == 2
    return simple and up.shape[1] == down.shape[0] and (up.shape[0], down.shape[1]) == _patched_shape(patch, shape)


def _patched_shape(patch: Patch, shape: tuple[int, int]) -> tuple[int, int]:
    """The shape of the part of a weight that a patch is for."""
    offset = patch[3]
    if offset is None:
        return shape
    return (offset[2], shape[1]) if offset[0] == 0 else (shape[0], offset[2])


def rank_of(patch: Patch) -> int:
    """Low-rank columns that a plain patch needs."""
    return patch[1].weights[1].shape[0]


def originals(patches: Sequence[Patch], value: Tensor, key: str) -> dict[str, Any]:
    """Options of ``comfy.lora.calculate_weight`` for patches on ``value`` that are another model's parameter: what they
    add is its distance to this one."""
    models = any(isinstance(patch[1], tuple) and patch[1][0] == "model_as_lora" for patch in patches)
    return {"original_weights": {key: [(value.clone(),)]}} if models else {}


def apply(patches: Sequence[Patch], value: Tensor, key: str) -> Tensor:
    """The dense parameter ``value``, which may be changed in place, with ``patches`` by ComfyUI's own arithmetic."""
    return comfy.lora.calculate_weight(patches, value, key, **originals(patches, value, key))


class Trials:
    """Which patches of one parameter can be applied.

    ComfyUI leaves out those that cannot and names them in the log, each time. Here a patch is named once, and left out
    from then on, so that it does not keep a layer from its kernels.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[Any, bool]] = {}  # id of a patch's value: (the value, whether it can be applied)

    def usable(self, patches: list[Patch], key: str, shape: tuple[int, ...]) -> list[Patch]:
        """Those ``patches`` of a parameter of ``shape`` that have an effect and are not known not to fit; forgets all
        others."""
        patches = [patch for patch in patches if has_effect(patch)]
        if not patches:
            self._known.clear()
            return patches
        self._known = {id(p[1]): self._known[id(p[1])] for p in patches if id(p[1]) in self._known}
        for patch in patches:
            value = patch[1]
            if id(value) not in self._known and isinstance(value, LoRAAdapter) and len(shape) == 2:
                # Found out here, so that the first pass has the same numbers as all later ones.
                up, down, _, mid, _, reshape = value.weights
                found, expected = (up.shape[0], down[0].numel()), _patched_shape(patch, shape)
                if mid is None and reshape is None and found[0] * found[1] != expected[0] * expected[1]:
                    log.error("ERROR lora %s: it is for a weight of %d x %d, not %d x %d", key, *found, *expected)
                    self._known[id(value)] = value, False
        return [patch for patch in patches if self._known.get(id(patch[1]), (None, True))[1]]

    def apply(self, patches: Sequence[Patch], weight: Tensor, key: str, **options: Any) -> Tensor:
        """``weight``, which may be changed in place, with ``patches`` by ComfyUI's own arithmetic."""
        for patch in patches:
            value = patch[1]
            if id(value) in self._known:
                weight = comfy.lora.calculate_weight([patch], weight, key, **options)
                continue
            with _complaints(key) as complaints:
                weight = comfy.lora.calculate_weight([patch], weight, key, **options)
            self._known[id(value)] = value, not complaints
        return weight


@contextlib.contextmanager
def _complaints(key: str) -> Iterator[list[str]]:
    """What this thread logs about ``key`` as a warning or an error."""
    messages, thread = [], threading.get_ident()

    def listen(record: logging.LogRecord) -> bool:
        if record.levelno >= logging.WARNING and record.thread == thread and key in record.getMessage():
            messages.append(record.getMessage())
        return True

    root = logging.getLogger()
    root.addFilter(listen)
    try:
        yield messages
    finally:
        root.removeFilter(listen)


@dataclass(frozen=True, eq=False)
class Columns:
    """Low-rank columns for one linear, on its device: down [R, K] and up [N, R].

    key: what they are made of, but for the strengths · scales: what the ups of the patches are multiplied by ·
    ups: of each patch, as in its file · spans: (rank, offset) of each patch; its columns are zero outside of offset
    (axis, start, length), which is None if there is none · n: N · sources: keeps the objects alive whose ids are in
    ``key``.
    """

    key: tuple
    scales: tuple[float, ...]
    down: Tensor
    ups: tuple[Tensor, ...]
    spans: tuple[tuple[int, tuple[int, int, int] | None], ...]
    n: int
    sources: tuple[Any, ...] = ()

    @functools.cached_property
    def up(self) -> Tensor:
        """In the type of ``down``; kept, unlike :meth:`scaled_up`."""
        return self.scaled_up()

    def scaled_up(self) -> Tensor:
        """``up``, made anew."""
        scaled = []
        for up, scale, (_, offset) in zip(self.ups, self.scales, self.spans, strict=True):
            up = (up.float() * scale).to(self.down.dtype)
            if offset is not None and offset[0] == 0:
                up = _embed(up, 0, *offset[1:], self.n)
            scaled.append(up)
        return scaled[0].contiguous() if len(scaled) == 1 else torch.cat(scaled, dim=1)

    def used(self, axis: int, start: int, stop: int) -> list[slice]:
        """The columns that are not zero in rows (axis 0) or inputs (axis 1) from start to stop; no GPU is asked."""
        slices, first = [], 0
        for rank, offset in self.spans:
            if _touches(offset, axis, start, stop):
                if slices and slices[-1].stop == first:
                    slices[-1] = slice(slices[-1].start, first + rank)
                else:
                    slices.append(slice(first, first + rank))
            first += rank
        return slices

    def apply(self, x: Tensor, y: Tensor) -> Tensor:
        """y + (x @ down^T) @ up^T; x [..., K], y [..., N]."""
        return y + torch.nn.functional.linear(torch.nn.functional.linear(x, self.down), self.up)


def build_columns(
    patches: Sequence[Patch], shape: tuple[int, int], device: torch.device, dtype: torch.dtype, cached: Columns | None
) -> Columns:
    """Columns of plain LoRA ``patches`` for a weight of ``shape`` [N, K]; ``cached`` is returned if it is the same, and
    what is on the device is used again if only strengths are others."""
    factors = [value.weights for _, value, *_ in patches]
    scales = tuple(
        patch[0] * (alpha / down.shape[0] if alpha is not None else 1.0)
        for patch, (_, down, alpha, *_) in zip(patches, factors, strict=True)
    )
    # Of the tensors: ComfyUI makes new adapters of a LoRA for each strength.
    parts = zip(factors, patches, strict=True)
    key = (device, dtype, tuple((id(up), id(down), patch[3]) for (up, down, *_), patch in parts))
    if cached is not None and cached.key == key:
        return cached if cached.scales == scales else dataclasses.replace(cached, scales=scales)
    n, k = shape
    downs, ups = [], []
    for patch, (up, down, *_) in zip(patches, factors, strict=True):
        offset = patch[3]
        down = comfy.model_management.cast_to_device(down, device, torch.float32)
        if offset is not None and offset[0] == 1:
            down = _embed(down, 1, *offset[1:], k)
        downs.append(down.to(dtype))
        ups.append(comfy.model_management.cast_to_device(up, device, up.dtype))
    spans = tuple((down.shape[0], patch[3]) for down, patch in zip(downs, patches, strict=True))
    # Copied even if there is one: the bits of a product on a CPU depend on where in a file a tensor lies.
    return Columns(key, scales, torch.cat(downs, dim=0), tuple(ups), spans, n, tuple(factors))


def extend_parts(parts: tuple[PackedW4A4, ...], axis: int, columns: Columns) -> tuple[PackedW4A4, ...]:
    """The parts of a linear (see layout_svdq.py) with ``columns`` in their low-rank branches, ranks padded by zeros."""
    return tuple(part if up is None else part.extended(down, up) for part, down, up in _by_part(parts, axis, columns))


def change_strengths(
    parts: tuple[PackedW4A4, ...], axis: int, columns: Columns, proj_ups: Sequence[Tensor | None]
) -> None:
    """Make ``proj_ups``, of parts that :func:`extend_parts` has given columns of other strengths, those of ``columns``.

    In place; None for a part that has none of the columns.
    """
    direct = _in_place(parts, axis, columns, proj_ups)
    if direct is not None:  # a fifth of the time
        for place, up, scale in direct:
            torch.mul(up, scale, out=place)  # in float32, and rounded once, as in scaled_up
        return
    for (part, _, up), proj_up in zip(_by_part(parts, axis, columns), proj_ups, strict=True):
        if up is not None:
            replace_lowrank(proj_up, part.rank, pack_lowrank_up(up.to(proj_up.dtype)))


def _in_place(
    parts: tuple[PackedW4A4, ...], axis: int, columns: Columns, proj_ups: Sequence[Tensor | None]
) -> list[tuple[Tensor, Tensor, float]] | None:
    """(place in a part's proj_up, what goes there, by what it is multiplied) of all patches; None if one of them does
    not lie in it as it is."""
    found, start = [], 0
    for part, proj_up in zip(parts, proj_ups, strict=True):
        size, origin = (part.n, start) if axis == 0 else (part.k, 0)
        first = part.rank
        for up, scale, (rank, offset) in zip(columns.ups, columns.scales, columns.spans, strict=True):
            if not _touches(offset, axis, start, start + size):
                continue
            place = lowrank_up_view(proj_up, first, rank)
            base = offset[1] if offset is not None and offset[0] == 0 else 0  # row of the weight that up begins with
            low, high = max(base, origin), min(base + len(up), origin + part.n)
            if place is None or up.dtype not in (proj_up.dtype, torch.float32) or any((low % 16, high % 16)):
                return None
            place = place[(low - origin) // 16 : (high - origin) // 16]
            found.append((place, up[low - base : high - base].reshape(place.shape), scale))
            first += rank
        start += size
    return found


def _touches(offset: tuple[int, int, int] | None, axis: int, start: int, stop: int) -> bool:
    """Whether a patch with this offset changes rows (axis 0) or inputs (axis 1) from start to stop."""
    return offset is None or offset[0] != axis or (offset[1] < stop and start < offset[1] + offset[2])


def _by_part(
    parts: tuple[PackedW4A4, ...], axis: int, columns: Columns
) -> Iterator[tuple[PackedW4A4, Tensor | None, Tensor | None]]:
    """(part, down [R, K], up [N, R]) of those columns that are not zero in a part, R padded by zeros; or None."""
    start, whole = 0, columns.scaled_up()
    for part in parts:
        size = part.n if axis == 0 else part.k
        used = columns.used(axis, start, start + size)
        if not used:
            yield part, None, None
        else:
            down = columns.down if axis == 0 else columns.down[:, start : start + size]
            up = whole[start : start + size] if axis == 0 else whole
            if len(used) > 1 or used[0] != slice(0, len(down)):
                down, up = torch.cat([down[s] for s in used]), torch.cat([up[:, s] for s in used], dim=1)
            missing = -len(down) % RANK_MULTIPLE
            if missing:
                down = torch.nn.functional.pad(down, (0, 0, 0, missing))
                up = torch.nn.functional.pad(up, (0, missing))
            yield part, down, up
        start += size


def _embed(tensor: Tensor, axis: int, start: int, length: int, size: int) -> Tensor:
    shape = list(tensor.shape)
    shape[axis] = size
    whole = tensor.new_zeros(shape)
    whole.narrow(axis, start, length).copy_(tensor)
    return whole
