"""Layouts for ``QuantizedTensor``: an SVDQuant linear, an AWQ modulation linear or an INT8 linear as ONE weight each.

ComfyUI pages, offloads, sizes and patches what it finds as ``weight`` and ``bias``, so everything a quantized linear
consists of is an inner tensor of one ``QuantizedTensor``. Inner tensors keep the file's byte order (kernels/layout.py):
nothing is repacked at load. Logical shape, row order and name are those of the stock dense weight.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import torch
from comfy_kitchen.tensor.base import BaseLayoutParams, QuantizedLayout, QuantizedTensor, register_layout_class
from torch import Tensor

from ..kernels import reference
from ..kernels.int4 import W8A8, PackedAWQ, PackedW4A4
from ..loaders.saved import SVDQ_AWQ, SVDQ_INT4, SVDQ_INT8
from ..loaders.weights import AWQLinear, Int8Linear, W4A4Linear

_NO_QUANTIZE = "SVDQuant weights cannot be requantized from a dense tensor on the fly: quantize the model anew"


class _SharedParams(BaseLayoutParams):
    """Params whose tensors are never changed in place, so that copies may share them.

    ``QuantizedTensor`` clones its params in every ``detach()``, which ``state_dict()`` and ``nn.Parameter`` call: with
    the inherited ``clone`` each of them would copy scales, low-rank factors and the whole second part.
    """

    def _tensor_fields(self) -> list[str]:
        return [name for name in _field_names(type(self)) if isinstance(getattr(self, name), Tensor)]

    def clone(self) -> _SharedParams:
        return dataclasses.replace(self)


@functools.cache
def _field_names(params: type[_SharedParams]) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(params))


@dataclass(frozen=True)
class SVDQParams(_SharedParams):
    """Fields beside ``_qdata`` (nominal shapes as in kernels.int4.PackedW4A4, file order).

    scale, smooth, down, up belong to ``_qdata``: the only part, or the second and larger one (fc1, fc2) of a linear
    with two. head_*: the first part (qkv, attention output), or None. axis: 0 the parts' outputs side by side, 1 their
    inputs. unsigned: ``_qdata``'s part takes unsigned activation codes; a first part never does.
    """

    smooth: Tensor = None
    down: Tensor = None
    up: Tensor = None
    head_qdata: Tensor | None = None
    head_scale: Tensor | None = None
    head_smooth: Tensor | None = None
    head_down: Tensor | None = None
    head_up: Tensor | None = None
    axis: int = 0
    unsigned: bool = False


@dataclass(frozen=True)
class AWQParams(_SharedParams):
    """scale, zeros: [at least G, N] · splits: interleaved adaLN chunks, as in kernels.int4.PackedAWQ."""

    zeros: Tensor = None
    splits: int = 1


@dataclass(frozen=True)
class Int8Params(_SharedParams):
    """scale, smooth: wscales and smooth_factor of kernels.int4.W8A8."""

    smooth: Tensor = None


class _Layout(QuantizedLayout):
    """What the layouts have in common; ``format`` names them in a saved file's ``comfy_quant``."""

    format: str

    @classmethod
    def quantize(cls, tensor: Tensor, **kwargs: Any) -> tuple[Tensor, Any]:
        raise NotImplementedError(_NO_QUANTIZE)

    @classmethod
    def get_plain_tensors(cls, qtensor: QuantizedTensor) -> tuple[Tensor, ...]:
        return tuple(cls.state_dict_tensors(qtensor._qdata, qtensor._params).values())

    @classmethod
    def state_dict_tensors(cls, qdata: Tensor, params: _SharedParams) -> dict[str, Tensor]:
        return {"": qdata} | {f"_{name}": getattr(params, name) for name in params._tensor_fields()}

    @classmethod
    def describe(cls, params: _SharedParams) -> dict[str, Any]:
        """The fields that are not tensors, for ``comfy_quant``."""
        raise NotImplementedError


class SVDQInt4Layout(_Layout):
    """W4A4 codes with group scales, smoothing and a 16-bit low-rank branch; one part or two."""

    Params = SVDQParams
    format = SVDQ_INT4

    @classmethod
    def dequantize(cls, qdata: Tensor, params: SVDQParams) -> Tensor:
        return reference.dequantize_parts(packed_parts(qdata, params), params.axis, params.orig_dtype)[0]

    @classmethod
    def describe(cls, params: SVDQParams) -> dict[str, Any]:
        fields = {"axis": params.axis, "unsigned": params.unsigned, "shape": list(params.orig_shape)}
        return {"format": cls.format} | fields


class SVDQAwqLayout(_Layout):
    """AWQ W4A16 codes with scales and zero points; rows interleaved in the bytes, in stock order outside."""

    Params = AWQParams
    format = SVDQ_AWQ

    @classmethod
    def dequantize(cls, qdata: Tensor, params: AWQParams) -> Tensor:
        return reference.dequantize_packed_awq(packed_awq(qdata, params), params.orig_dtype)

    @classmethod
    def describe(cls, params: AWQParams) -> dict[str, Any]:
        return {"format": cls.format, "splits": params.splits, "shape": list(params.orig_shape)}


class SVDQInt8Layout(_Layout):
    """INT8 codes with a scale per output channel and smoothing: a linear that is not in four bits."""

    Params = Int8Params
    format = SVDQ_INT8

    @classmethod
    def dequantize(cls, qdata: Tensor, params: Int8Params) -> Tensor:
        return reference.dequantize_w8a8(int8_weight(qdata, params), params.orig_dtype)

    @classmethod
    def describe(cls, params: Int8Params) -> dict[str, Any]:
        return {"format": cls.format, "shape": list(params.orig_shape)}


# Registration is by name and process-wide. A second copy of this pack replaces the first one's class by an equal one.
for _layout in (SVDQInt4Layout, SVDQAwqLayout, SVDQInt8Layout):
    register_layout_class(_layout.__name__, _layout)

# Every suffix that a quantized weight adds to a state dict key, for all layouts.
STATE_SUFFIXES = tuple(
    f"weight_{field.name}"
    for field in {f.name: f for p in (SVDQParams, AWQParams, Int8Params) for f in dataclasses.fields(p)}.values()
    if field.name not in ("orig_dtype", "orig_shape", "axis", "unsigned", "splits")
)


def packed_parts(qdata: Tensor, params: SVDQParams) -> tuple[PackedW4A4, ...]:
    """The parts of an SVDQuant weight in model order, sharing its memory."""
    last = PackedW4A4(qdata, params.scale, params.smooth, params.down, params.up, params.unsigned)
    if params.head_qdata is None:
        return (last,)
    head = PackedW4A4(params.head_qdata, params.head_scale, params.head_smooth, params.head_down, params.head_up)
    return head, last


def smooths_alike(weight: QuantizedTensor) -> bool:
    """Whether a weight's two parts take one input and smooth it by the same factors. Reads them."""
    params = weight._params
    if weight._layout_cls != SVDQInt4Layout.__name__ or params.head_qdata is None or params.axis != 0:
        return False
    return not params.unsigned and torch.equal(params.head_smooth, params.smooth)


def packed_awq(qdata: Tensor, params: AWQParams) -> PackedAWQ:
    """The AWQ weight behind a tensor, sharing its memory."""
    return PackedAWQ(qdata, params.scale, params.zeros, params.splits)


def int8_weight(qdata: Tensor, params: Int8Params) -> W8A8:
    """The INT8 weight behind a tensor, sharing its memory."""
    return W8A8(qdata, params.scale, params.smooth)


def branchless(weight: QuantizedTensor) -> PackedAWQ | W8A8:
    """The weight of a linear that has no low-rank branch, sharing its memory."""
    view = int8_weight if isinstance(weight._params, Int8Params) else packed_awq
    return view(weight._qdata, weight._params)


def linear_branchless(
    layers: Any, x: Tensor, weight: PackedAWQ | W8A8, bias: Tensor | None, lora: tuple[Tensor, Tensor] | None
) -> Tensor | None:
    """``layers``' linear with such a weight: see kernels.layers.Layers."""
    compute = layers.linear_w8a8 if isinstance(weight, W8A8) else layers.linear_awq
    return compute(x, weight, bias, lora)


def compute_type(weight: QuantizedTensor) -> torch.dtype:
    """The 16-bit type in which a weight takes its activations."""
    params = weight._params
    return (params.smooth if isinstance(params, Int8Params) else params.scale).dtype


def dequantize(weight: QuantizedTensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The dense weight in ``dtype``, rounded once, and the shift term as in kernels.reference.dequantize_w4a4."""
    if weight._layout_cls == SVDQInt4Layout.__name__:
        return reference.dequantize_parts(packed_parts(weight._qdata, weight._params), weight._params.axis, dtype)
    if weight._layout_cls == SVDQInt8Layout.__name__:
        return reference.dequantize_w8a8(int8_weight(weight._qdata, weight._params), dtype), None
    return reference.dequantize_packed_awq(packed_awq(weight._qdata, weight._params), dtype), None


def quantized_weight(layer: W4A4Linear | AWQLinear | Int8Linear, dtype: torch.dtype) -> QuantizedTensor:
    """One loader layer as a ``QuantizedTensor`` of logical type ``dtype``, without copying its bytes."""
    if isinstance(layer, Int8Linear):
        weight = layer.weight
        params = Int8Params(scale=weight.wscales, orig_dtype=dtype, orig_shape=layer.shape, smooth=weight.smooth_factor)
        return QuantizedTensor(weight.q, SVDQInt8Layout.__name__, params)
    if isinstance(layer, AWQLinear):
        weight = layer.weight
        params = AWQParams(
            scale=weight.wscales, orig_dtype=dtype, orig_shape=layer.shape, zeros=weight.wzeros, splits=weight.splits
        )
        return QuantizedTensor(weight.qweight, SVDQAwqLayout.__name__, params)
    *head, last = layer.parts
    if len(head) > 1 or any(part.act_unsigned for part in head):
        raise ValueError("a linear has at most two parts, and only the last may be unsigned")
    first = head[0] if head else None
    params = SVDQParams(
        scale=last.wscales,
        orig_dtype=dtype,
        orig_shape=layer.shape,
        smooth=last.smooth_factor,
        down=last.proj_down,
        up=last.proj_up,
        head_qdata=first.qweight if first else None,
        head_scale=first.wscales if first else None,
        head_smooth=first.smooth_factor if first else None,
        head_down=first.proj_down if first else None,
        head_up=first.proj_up if first else None,
        axis=layer.axis,
        unsigned=last.act_unsigned,
    )
    return QuantizedTensor(last.qweight, SVDQInt4Layout.__name__, params)
