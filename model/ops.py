"""``custom_operations`` for ComfyUI's model classes: stock layers, except that a Linear may hold a quantized weight.

The places where this reaches below ComfyUI's public API are the properties ``*_function`` and ``*_lowvram_function`` of
weight and bias and, in patcher.py, the class of the patcher. They exist because core would otherwise apply a LoRA by
requantizing the weight, or replace it by a dense one, and take a stored bias for that of the dense layer.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import comfy.ops
import comfy_aimdo.model_vbar
import torch
from comfy_kitchen.tensor.base import QuantizedTensor
from torch import Tensor, nn

from ..kernels import Backend
from ..kernels.int4 import RANK_MULTIPLE, PackedW4A4
from . import lora
from .layout_svdq import (
    STATE_SUFFIXES,
    SVDQAwqLayout,
    SVDQInt4Layout,
    dequantize,
    packed_awq,
    packed_parts,
    smooths_alike,
)

_QUANTIZED = (SVDQInt4Layout.__name__, SVDQAwqLayout.__name__)


def is_quantized(weight: Any) -> bool:
    """Whether a weight is one of this pack's quantized tensors."""
    return isinstance(weight, QuantizedTensor) and weight._layout_cls in _QUANTIZED


@contextlib.contextmanager
def resident(module: nn.Module, device: torch.device) -> Iterator[tuple[Tensor, Tensor | None] | None]:
    """(weight, bias) of one of core's modules if they are on ``device`` and stay there, not moved for as long as the
    context lasts. None if core has to bring or to change them.

    Core brings weights through buffers of which there are one or two: what ``cast_bias_weight`` returned for one module
    is overwritten by the next but one, at the latest. Only resident weights can be held beside each other.
    """
    slots = ("weight_function", "bias_function", "weight_lowvram_function", "bias_lowvram_function")
    if any(getattr(module, slot, None) for slot in slots):
        yield None
    elif module.weight.device == device:
        bias = module.bias
        yield (module.weight, bias) if bias is None or bias.device == device else None
    elif hasattr(module, "_v") and device.type != "cpu":
        # Dynamic VRAM: a fault pins the module's place and tells whether the values in it are still those of last time.
        signature = comfy_aimdo.model_vbar.vbar_fault(module._v)
        if signature is None:
            yield None
            return
        try:
            loaded = comfy_aimdo.model_vbar.vbar_signature_compare(signature, module._v_signature)
            yield (module._v_weight, module._v_bias) if loaded else None
        finally:
            comfy_aimdo.model_vbar.vbar_unpin(module._v)
    else:
        yield None


@dataclass
class PatchSlots:
    """Where core and patcher.py leave the patches of one parameter that the Linear applies itself.

    dynamic: in dynamic VRAM mode · partial: for modules that stay off the GPU · resident: for modules that are loaded
    completely (set by patcher.py) · hooks: of hooks that are on (set by patcher.py).
    """

    dynamic: Any = None
    partial: Any = None
    resident: Any = None
    hooks: list[lora.Patch] = field(default_factory=list)

    @property
    def holder(self) -> Any:
        """The LowVramPatch that counts; a module is loaded in one way at a time, and partial wins while it changes."""
        return self.dynamic or self.partial or self.resident

    @property
    def key(self) -> str:
        return self.holder.key if self.holder is not None else "hook"

    def active(self) -> list[lora.Patch]:
        """All patches, in the order in which core would apply them."""
        return [*(self.holder.patches.get(self.holder.key, ()) if self.holder is not None else ()), *self.hooks]


class _Functions(list):
    """A Linear's ``weight_function`` or ``bias_function`` list that keeps low-VRAM patches in the Linear's slots.

    A function in this list makes core dequantize the weight before every use. Wrappers of other packs keep that
    meaning; the patches that core puts here for partially loaded models are LoRAs, which the Linear applies itself.
    """

    def __init__(self, module: QuantizedLinear, name: str, functions: Any = ()):
        super().__init__()
        # Weak, or weights would keep their memory until the garbage collector comes.
        self._module, self._name = weakref.ref(module), name
        self.extend(functions)

    def __deepcopy__(self, memo: dict) -> _Functions:
        module = self._module()
        copied = _Functions(memo.get(id(module), module), self._name)
        list.extend(copied, (copy.deepcopy(function, memo) for function in self))
        return copied

    def append(self, function: Any) -> None:
        module = self._module()
        if getattr(function, "is_lowvram_patch", False) and module.owns(self._name):
            module.slots[self._name].partial = function
        else:
            super().append(function)

    def extend(self, functions: Any) -> None:
        for function in functions:
            self.append(function)


class QuantizedLinear(comfy.ops.manual_cast.Linear):
    """A stock Linear whose weight may be an SVDQuant or AWQ ``QuantizedTensor``; otherwise it is the stock class.

    The bias is the stored one: for layers with unsigned activations it contains the shift correction (kernels/int4.py).
    Patches are meant for the weight and bias of the dense layer, so the Linear ``owns`` those of a quantized weight and
    of such a bias: core leaves them in ``slots`` instead of applying them.
    """

    backend: Backend  # set by make_operations

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        # Not the parent's: it would allocate the dense weight (24 GB of commit charge for FLUX on Windows).
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        self.weight = None
        self.bias = None
        self.comfy_need_lazy_init_bias = bias
        self.weight_comfy_model_dtype = dtype
        self.bias_comfy_model_dtype = dtype
        self.slots = {"weight": PatchSlots(), "bias": PatchSlots()}
        self._trials = {name: lora.Trials() for name in self.slots}
        self._functions = {name: _Functions(self, name) for name in self.slots}
        self._columns: lora.Columns | None = None
        self._extended: tuple[lora.Columns, _Factors] | None = None
        self._one_input = False  # whether both parts of the weight smooth their common input alike

    # ---- what core sets on modules

    def owns(self, name: str) -> bool:
        """Whether patches on the parameter ``name`` are this Linear's to apply."""
        if not is_quantized(self.weight):
            return False
        return name == "weight" or (name == "bias" and getattr(self.weight._params, "unsigned", False))

    @property
    def weight_function(self) -> _Functions:
        return self._functions["weight"]

    @weight_function.setter
    def weight_function(self, functions: Any) -> None:
        self._set_functions("weight", functions)

    @property
    def bias_function(self) -> _Functions:
        return self._functions["bias"]

    @bias_function.setter
    def bias_function(self, functions: Any) -> None:
        self._set_functions("bias", functions)

    def _set_functions(self, name: str, functions: Any) -> None:
        self.slots[name].partial = None
        self._functions[name] = _Functions(self, name, functions)

    @property
    def weight_lowvram_function(self) -> Any:
        return None if self.owns("weight") else self.slots["weight"].dynamic

    @weight_lowvram_function.setter
    def weight_lowvram_function(self, patch: Any) -> None:
        self.slots["weight"].dynamic = patch

    @property
    def bias_lowvram_function(self) -> Any:
        return None if self.owns("bias") else self.slots["bias"].dynamic

    @bias_lowvram_function.setter
    def bias_lowvram_function(self, patch: Any) -> None:
        self.slots["bias"].dynamic = patch

    # ---- state

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        """Takes a QuantizedTensor or a plain tensor as ``weight``. Quantized weights stay views of the mapped file."""
        assign = local_metadata.get("assign_to_params_buffers", False)
        for name in ("weight", "bias"):
            value = state_dict.get(prefix + name)
            if value is None:
                if name == "weight" or self.comfy_need_lazy_init_bias:
                    missing_keys.append(prefix + name)
                continue
            if is_quantized(value):
                # Core casts a module's parameters to these types when it moves them; ours keep the file's.
                self.weight_comfy_model_dtype = self.bias_comfy_model_dtype = None
                self._one_input = smooths_alike(value)
            elif not assign:
                value = value.clone()
            setattr(self, name, nn.Parameter(value, requires_grad=False))
        known = (prefix + "weight", prefix + "bias")
        unexpected_keys.extend(key for key in state_dict if key.startswith(prefix) and key not in known)

    def state_dict(self, *args: Any, destination: dict | None = None, prefix: str = "", **kwargs: Any) -> dict:
        """Every inner tensor under a key of its own, as they are: core sums their sizes and looks for ``weight``."""
        if not is_quantized(self.weight):
            return super().state_dict(*args, destination=destination, prefix=prefix, **kwargs)
        destination = {} if destination is None else destination
        destination.update(self.weight.state_dict(prefix + "weight"))
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias
        destination[prefix + "comfy_quant"] = self.comfy_quant
        return destination

    @property
    def comfy_quant(self) -> Tensor:
        """JSON of the weight's non-tensor fields as uint8, ComfyUI's convention for a quantized layer."""
        description = self.weight.layout_cls.describe(self.weight._params)
        return torch.tensor(list(json.dumps(description).encode()), dtype=torch.uint8)

    def convert_weight(self, weight: Tensor, inplace: bool = False, **kwargs: Any) -> Tensor:
        """Core's way to a dense weight, for merges and exports."""
        return weight.dequantize() if isinstance(weight, QuantizedTensor) else weight

    def convert_bias(self, bias: Tensor, inplace: bool = False, **kwargs: Any) -> Tensor:
        """The bias of the dense layer, for merges and exports."""
        if not self.owns("bias"):
            return bias
        shift = dequantize(self.weight, self.weight.dtype)[1]
        return bias.float() + shift.to(bias.device)

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedLinear:
        for name, parameter in self._parameters.items():
            if parameter is not None:
                moved = fn(parameter)
                inner = moved._qdata if isinstance(moved, QuantizedTensor) else moved
                # ComfyUI loads in inference mode and may unload outside of it, where such tensors are no parameters.
                with torch.inference_mode(inner.is_inference()):
                    self._parameters[name] = nn.Parameter(moved, requires_grad=False)
        return self

    # ---- patches

    def _patches(self, name: str) -> list[lora.Patch]:
        """The patches on ``name`` that can be applied."""
        shape = (self.out_features, self.in_features) if name == "weight" else (self.out_features,)
        return self._trials[name].usable(self.slots[name].active(), self.slots[name].key, shape)

    def _split_patches(self, x: Tensor) -> tuple[lora.Columns | None, list[lora.Patch]]:
        patches, shape = self._patches("weight"), (self.out_features, self.in_features)
        rest = [patch for patch in patches if not lora.is_plain(patch, shape)]
        plain = [patch for patch in patches if patch[0] != 0.0]
        if rest:
            # Their order among plain LoRAs can matter (a merge scales what came before): core does all of them.
            plain, rest = [], patches
        if plain:
            self._columns = lora.build_columns(plain, shape, x.device, x.dtype, self._columns)
        else:
            self._columns = None
        return self._columns, rest

    # ---- forward

    def forward(self, x: Tensor) -> Tensor:
        if not is_quantized(self.weight):
            return super().forward(x)
        with self.on_device(x) as (weight, bias):
            return self._linear(x, weight, bias)

    @contextlib.contextmanager
    def on_device(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
        """(weight, bias) where x is, for as long as the context lasts; core moves and frees them."""
        comfy.ops.run_every_op()
        with resident(self, x.device) as there:  # what core would find out in ten times as long
            if there is not None:
                yield there
                return
        weight, bias, stream = comfy.ops.cast_bias_weight(
            self,
            input=None,
            dtype=self.weight.dtype,
            device=x.device,
            bias_dtype=self.bias.dtype if self.bias is not None else None,
            offloadable=True,
        )
        try:
            yield weight, bias
        finally:
            comfy.ops.uncast_bias_weight(self, weight, bias, stream)

    def plain(self, dtype: torch.dtype) -> bool:
        """Whether fused kernels can take this linear with activations of ``dtype``: SVDQuant, no patches but plain
        LoRAs, no functions of other packs, and nobody in the place of ``forward`` (ComfyUI's bypass LoRA)."""
        if not is_quantized(self.weight) or self.weight._layout_cls != SVDQInt4Layout.__name__:
            return False
        patches, shape = self._patches("weight"), (self.out_features, self.in_features)
        return (
            self.weight._params.scale.dtype == dtype
            and not any(self._functions.values())
            and getattr(self.forward, "__func__", None) is QuantizedLinear.forward
            and not (self._forward_hooks or self._forward_pre_hooks)
            and not self._patches("bias")
            and all(lora.is_plain(patch, shape) for patch in patches)
            and (not patches or self._has_room(sum(lora.rank_of(patch) for patch in patches)))
        )

    def _has_room(self, ranks: int) -> bool:
        """Whether the kernels' low-rank branch takes so many more ranks."""
        params, limit = self.weight._params, self.backend.layers.max_rank
        rank = max(factor.shape[1] for factor in (params.down, params.head_down) if factor is not None)
        return limit is None or rank + -(-ranks // RANK_MULTIPLE) * RANK_MULTIPLE <= limit

    def parts(self, weight: QuantizedTensor, x: Tensor) -> tuple[PackedW4A4, ...]:
        """The parts of a linear that is ``plain``, LoRAs included, for activations like x; weight: from on_device.

        Parts with one smooth_factor between them, the same tensor, can share a quantized input.
        """
        parts = packed_parts(weight._qdata, weight._params)
        if self._one_input:
            parts = (parts[0], dataclasses.replace(parts[1], smooth_factor=parts[0].smooth_factor))
        return self._with_columns(parts, self._split_patches(x)[0])

    def _with_columns(self, parts: tuple[PackedW4A4, ...], columns: lora.Columns | None) -> tuple[PackedW4A4, ...]:
        if columns is None:
            self._extended = None
            return parts
        if self._extended is None or self._extended[0] is not columns:
            extended = lora.extend_parts(parts, self.weight._params.axis, columns)
            # None: the layer's own, wherever core has put them by then.
            factors = [
                None if part is own else (part.proj_down, part.proj_up)
                for part, own in zip(extended, parts, strict=True)
            ]
            # In the place of another strength's: CUDA graphs that read them stay right.
            self._extended = (columns, factors if self._extended is None else _in_place(self._extended[1], factors))
        return tuple(
            part if factors is None else dataclasses.replace(part, proj_down=factors[0], proj_up=factors[1])
            for part, factors in zip(parts, self._extended[1], strict=True)
        )

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        columns, rest = self._split_patches(x)
        # A bias that is not owned has its patches applied already, by core.
        bias_patches = self._patches("bias") if self.owns("bias") else []
        y = None
        svdq = self.weight._layout_cls == SVDQInt4Layout.__name__
        as_stored = isinstance(weight, QuantizedTensor) and not rest and not bias_patches
        if as_stored and self.backend.precision != "16bit":
            inside = svdq and self.backend.kernels and columns is not None and self._has_room(len(columns.down))
            y = self._quantized(x, weight, bias, columns if inside else None)
            if inside:
                return y
        if y is None:
            dense, bias = self._dense(x, weight, bias, rest, bias_patches)
            y = nn.functional.linear(x, dense, None if bias is None else bias.to(x.dtype))
        return y if columns is None else columns.apply(x, y)

    def _quantized(
        self, x: Tensor, weight: QuantizedTensor, bias: Tensor | None, columns: lora.Columns | None
    ) -> Tensor | None:
        """The linear with quantized activations, or None where it has to be dequantized. columns: for kernels, in the
        low-rank branch of an SVDQuant linear."""
        # That is defined in the file's 16-bit type; float32 activations (CPU) are rounded to it.
        rows = x.reshape(-1, x.shape[-1]).to(weight._params.scale.dtype)
        compute = self.backend.layers
        if weight._layout_cls == SVDQInt4Layout.__name__:
            parts = self._with_columns(packed_parts(weight._qdata, weight._params), columns)
            y = compute.linear_parts_w4a4(rows, parts, weight._params.axis, bias)
        else:
            y = compute.linear_awq(rows, packed_awq(weight._qdata, weight._params), bias)
        return None if y is None else y.to(x.dtype).reshape(*x.shape[:-1], y.shape[-1])

    def _dense(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, rest: list[lora.Patch], bias_patches: list[lora.Patch]
    ) -> tuple[Tensor, Tensor | None]:
        """The dense weight in x's type and the dense bias, with ``rest`` and ``bias_patches`` applied."""
        # Core hands back a dequantized tensor if another pack wrapped the weight, or for a CPU copy in dynamic mode;
        # the shift term then still has to come from the quantized weight.
        quantized = weight if isinstance(weight, QuantizedTensor) else self.weight
        dense, shift = dequantize(quantized, x.dtype)
        if quantized is not weight:
            dense = weight.to(x.dtype)
        if rest:
            dense = self._patched("weight", rest, dense, intermediate_dtype=dense.dtype)
        if shift is not None:
            shift = shift.to(x.device)
            bias = shift if bias is None else bias.float() + shift
        if bias_patches:
            bias = self._patched("bias", bias_patches, bias)
        return dense, bias

    def _patched(self, name: str, patches: list[lora.Patch], value: Tensor, **options: Any) -> Tensor:
        """The dense parameter ``name`` with patches; ``value`` may be changed in place."""
        key = self.slots[name].key
        if any(isinstance(patch[1], tuple) and patch[1][0] == "model_as_lora" for patch in patches):
            # Such a patch is another model's parameter: the patch is its distance to this one.
            options["original_weights"] = {key: [(value.clone(),)]}
        return self._trials[name].apply(patches, value, key, **options)


_Factors = list[tuple[Tensor, Tensor] | None]


def _in_place(old: _Factors, new: _Factors) -> _Factors:
    """The values of ``new``, in the memory of ``old`` where they fit."""

    def replaced(a: Tensor, b: Tensor) -> Tensor:
        fits = a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
        if fits and (torch.is_inference_mode_enabled() or not a.is_inference()):
            return a.copy_(b)
        return b

    return [
        b if a is None or b is None else (replaced(a[0], b[0]), replaced(a[1], b[1]))
        for a, b in zip(old, new, strict=True)
    ]


def _inner_tensor(suffix: str) -> property:
    field = suffix.removeprefix("weight_")

    def get(self: QuantizedLinear) -> Tensor:
        if not is_quantized(self.weight):
            raise AttributeError(f"{suffix}: this layer is not quantized")
        return getattr(self.weight._params, field)

    return property(get, doc=f"The inner tensor {field} of the quantized weight.")


# Core looks up every key of a state dict as an attribute of its module (merges, hooks).
for _suffix in STATE_SUFFIXES:
    setattr(QuantizedLinear, _suffix, _inner_tensor(_suffix))


def make_operations(backend: Backend) -> type[comfy.ops.manual_cast]:
    """The ``custom_operations`` class whose linears compute as ``backend`` says."""

    class SVDQOperations(comfy.ops.manual_cast):
        class Linear(QuantizedLinear):
            pass

    SVDQOperations.Linear.backend = backend
    return SVDQOperations
