"""``custom_operations`` for ComfyUI's model classes: stock layers, except that a Linear may hold a quantized weight.

The places where this reaches below ComfyUI's public API are the properties ``*_function`` and ``*_lowvram_function`` of
weight and bias and, in patcher.py, the class of the patcher. They exist because core would otherwise apply a LoRA by
requantizing the weight, or replace it by a dense one, and take a stored bias for that of the dense layer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import comfy.ops
import torch
from comfy_kitchen.tensor.base import QuantizedTensor
from torch import Tensor, nn

from ..kernels import Backend
from ..kernels.int4 import RANK_MULTIPLE, PackedW4A4
from . import lora
from .held import NO_PATCHES, Held, Made, SortedPatches, in_place, writable
from .layout_svdq import (
    STATE_SUFFIXES,
    SVDQAwqLayout,
    SVDQInt4Layout,
    SVDQInt8Layout,
    branchless,
    compute_type,
    dequantize,
    linear_branchless,
    packed_parts,
    smooths_alike,
)
from .offload import Origin, Staged, brought
from .slots import Functions, PatchSlots, resident, unpin

_QUANTIZED = tuple(layout.__name__ for layout in (SVDQInt4Layout, SVDQAwqLayout, SVDQInt8Layout))


def is_quantized(weight: Any) -> bool:
    """Whether a weight is one of this pack's quantized tensors."""
    return isinstance(weight, QuantizedTensor) and weight._layout_cls in _QUANTIZED


class QuantizedLinear(comfy.ops.manual_cast.Linear):
    """A stock Linear whose weight may be a ``QuantizedTensor`` of layout_svdq.py; otherwise it is the stock class.

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
        self._functions = {name: Functions(self, name) for name in self.slots}
        self._made = Made()
        self._origin = Origin()
        self.staged: Staged | None = None  # set by patcher.py
        self._one_input = False  # whether both parts of the weight smooth their common input alike

    # ---- what core sets on modules

    def owns(self, name: str) -> bool:
        """Whether patches on the parameter ``name`` are this Linear's to apply."""
        weight = self.weight
        if not is_quantized(weight):
            return False
        return name == "weight" or (name == "bias" and getattr(weight._params, "unsigned", False))

    def is_changed(self) -> bool:
        """Whether core has to change the weight or the bias before they are used."""
        functions, slots = self._functions, self.slots
        return bool(
            functions["weight"]
            or functions["bias"]
            or (slots["weight"].dynamic is not None and not self.owns("weight"))
            or (slots["bias"].dynamic is not None and not self.owns("bias"))
        )

    @property
    def weight_function(self) -> Functions:
        return self._functions["weight"]

    @weight_function.setter
    def weight_function(self, functions: Any) -> None:
        self._set_functions("weight", functions)

    @property
    def bias_function(self) -> Functions:
        return self._functions["bias"]

    @bias_function.setter
    def bias_function(self, functions: Any) -> None:
        self._set_functions("bias", functions)

    def _set_functions(self, name: str, functions: Any) -> None:
        self.slots[name].partial = None
        self._functions[name] = Functions(self, name, functions)

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
        description, known = self.weight.layout_cls.describe(self.weight._params), self._made.comfy_quant
        if known is None or known[0] != description:  # a change of a LoRA's strength asks for the state dict twice
            tensor = torch.frombuffer(bytearray(json.dumps(description).encode()), dtype=torch.uint8)
            self._made.comfy_quant = known = (description, tensor)
        return known[1]

    def convert_weight(self, weight: Tensor, inplace: bool = False, **kwargs: Any) -> Tensor:
        """Core's way to a dense weight, for merges and exports."""
        return weight.dequantize() if isinstance(weight, QuantizedTensor) else weight

    def convert_bias(self, bias: Tensor, inplace: bool = False, **kwargs: Any) -> Tensor:
        """The bias of the dense layer, for merges and exports."""
        if not self.owns("bias"):
            return bias
        shift = dequantize(self.weight, self.weight.dtype)[1]
        return bias.float() + shift.to(bias.device)

    def patched(self, name: str, patches: Sequence[lora.Patch], key: str, device: torch.device) -> Tensor:
        """The dense parameter ``name`` with ``patches``, as core knows them under ``key``: float32, on ``device``."""
        if name == "weight":
            dense = dequantize(self.weight.to(device), torch.float32)[0]
        else:
            dense = self.convert_bias(self.bias).to(device, torch.float32, copy=True)
        return lora.apply(patches, dense, key)

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedLinear:
        for name, parameter in self._parameters.items():
            moved = None if parameter is None else self._origin.moved(parameter, fn)
            if moved is not parameter:
                self._made.held = None  # or the weight would stay where it was, too
                inner = moved._qdata if isinstance(moved, QuantizedTensor) else moved
                # ComfyUI loads in inference mode and may unload outside of it, where such tensors are no parameters.
                with torch.inference_mode(inner.is_inference()):
                    self._parameters[name] = nn.Parameter(moved, requires_grad=False)
                if is_quantized(moved):
                    self._origin.remember(self._parameters[name], parameter)
        return self

    def free(self) -> None:
        """Give up what was made of the weight and its patches on a device."""
        self._made.free()

    # ---- patches

    def _patches(self, name: str) -> list[lora.Patch]:
        """The patches on ``name`` that can be applied."""
        shape = (self.out_features, self.in_features) if name == "weight" else (self.out_features,)
        return self._trials[name].usable(self.slots[name].active(), self.slots[name].key, shape)

    def _sort_patches(self) -> SortedPatches:
        """The patches on the weight, by who applies them."""
        slots, known = self.slots["weight"], self._made.sorted
        if slots.empty:
            if known is not NO_PATCHES:
                for name in self.slots:
                    self._patches(name)  # forgets what it knew of others
                self._made.sorted = NO_PATCHES
            return NO_PATCHES
        active = slots.active()
        if known is not None and len(active) == len(known.active) and all(map(operator.is_, active, known.active)):
            return known
        patches, shape = self._patches("weight"), (self.out_features, self.in_features)
        rest = [patch for patch in patches if not lora.is_plain(patch, shape)]
        if rest:
            # Their order among plain LoRAs can matter (a merge scales what came before): core does all of them. Which
            # of them fit is found out when they are applied.
            self._made.sorted = None
            return SortedPatches(active, [], patches)
        self._made.sorted = SortedPatches(active, patches, [])
        return self._made.sorted

    def _split_patches(self, x: Tensor) -> tuple[lora.Columns | None, list[lora.Patch]]:
        patches, made = self._sort_patches(), self._made
        columns = made.columns
        if not patches.plain:
            columns = None
        elif made.columns_of is not patches or columns.down.device != x.device or columns.down.dtype != x.dtype:
            shape = (self.out_features, self.in_features)
            columns = lora.build_columns(patches.plain, shape, x.device, x.dtype, columns)
        made.columns_of, made.columns = patches, columns
        return columns, patches.rest

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
        pins: list[Any] = []
        there = resident(self, x.device, pins)  # what core would find out in ten times as long
        if there is not None:
            try:
                yield there
            finally:
                unpin(pins)
            return
        unpin(pins)
        if not hasattr(self, "_v") and not self.is_changed():
            with brought(self.weight, self.bias, self.staged, x.device) as there:
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

    def has_plain_patches(self) -> bool:
        """Whether there are no patches but LoRAs that columns express."""
        return (self.slots["bias"].empty or not self._patches("bias")) and not self._sort_patches().rest

    def plain(self, dtype: torch.dtype) -> bool:
        """Whether fused kernels can take this linear with activations of ``dtype``: SVDQuant, no patches but plain
        LoRAs, no functions of other packs, and nobody in the place of ``forward`` (ComfyUI's bypass LoRA)."""
        weight = self.weight
        if not is_quantized(weight) or weight._layout_cls != SVDQInt4Layout.__name__:
            return False
        patches = self._sort_patches()
        return (
            weight._params.scale.dtype == dtype
            and not (self._functions["weight"] or self._functions["bias"])
            and getattr(self.forward, "__func__", None) is QuantizedLinear.forward
            and not (self._forward_hooks or self._forward_pre_hooks)
            and (self.slots["bias"].empty or not self._patches("bias"))
            and not patches.rest
            and (not patches.plain or self._has_room(sum(map(lora.rank_of, patches.plain))))
        )

    def _has_room(self, ranks: int) -> bool:
        """Whether the kernels' low-rank branch takes so many more ranks."""
        params, limit = self.weight._params, self.backend.layers.max_rank
        rank = max(factor.shape[1] for factor in (params.down, params.head_down) if factor is not None)
        return limit is None or rank + -(-ranks // RANK_MULTIPLE) * RANK_MULTIPLE <= limit

    def _kernels_take(self, columns: lora.Columns, x: Tensor) -> bool:
        """Whether kernels add ``columns`` to their product with x: in a low-rank branch, or beside few rows."""
        if not self.backend.kernels:
            return False
        if self.weight._layout_cls == SVDQInt4Layout.__name__:
            return self._has_room(len(columns.down))
        return x[..., 0].numel() <= self.backend.layers.max_awq_rows

    def parts(self, weight: QuantizedTensor, x: Tensor) -> tuple[PackedW4A4, ...]:
        """The parts of a linear that is ``plain``, LoRAs included, for activations like x; weight: from on_device.

        Parts with one smooth_factor between them, the same tensor, can share a quantized input.
        """
        parts = packed_parts(weight._qdata, weight._params)
        if self._one_input:
            parts = (parts[0], dataclasses.replace(parts[1], smooth_factor=parts[0].smooth_factor))
        return self._with_columns(parts, self._split_patches(x)[0])

    def stored_parts(self) -> tuple[PackedW4A4, ...]:
        """The parts without LoRAs, where the weight is stored; none if it is no SVDQuant weight."""
        weight = self.weight
        if not is_quantized(weight) or weight._layout_cls != SVDQInt4Layout.__name__:
            return ()
        return packed_parts(weight._qdata, weight._params)

    def hold(self, weight: QuantizedTensor, bias: Tensor | None, x: Tensor) -> Held:
        """:meth:`parts` of a weight that stays on x's device, and its bias: the same object until something changes."""
        held, columns = self._made.held, self._split_patches(x)[0]
        if held is None or held.weight is not weight or held.bias is not bias or held.columns is not columns:
            self._made.held = held = Held(weight, bias, columns, self.parts(weight, x))
        return held

    def _with_columns(self, parts: tuple[PackedW4A4, ...], columns: lora.Columns | None) -> tuple[PackedW4A4, ...]:
        if columns is None:
            self._made.extended = None
            return parts
        known, axis = self._made.extended, self.weight._params.axis
        if known is None or known[0] is not columns:
            # In the place of another strength's or LoRA's: CUDA graphs that read them stay right.
            if known is not None and known[0].key == columns.key and all(writable(f[1]) for f in known[1] if f):
                factors = known[1]
                lora.change_strengths(parts, axis, columns, [None if f is None else f[1] for f in factors])
            else:
                # None: the layer's own, wherever core has put them by then.
                factors = [
                    None if part is own else (part.proj_down, part.proj_up)
                    for part, own in zip(lora.extend_parts(parts, axis, columns), parts, strict=True)
                ]
                factors = factors if known is None else in_place(known[1], factors)
            self._made.extended = known = (columns, factors)
        return tuple(
            part if factors is None else dataclasses.replace(part, proj_down=factors[0], proj_up=factors[1])
            for part, factors in zip(parts, known[1], strict=True)
        )

    def factors(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """(down [R, K], up [N, R]) of the plain LoRAs on a weight, for activations like x; None if there are none.

        Those of another strength or LoRA are where the ones before were, if they fit.
        """
        columns = self._split_patches(x)[0]
        if columns is None:
            self._made.factors = None
            return None
        return self._kept_factors(columns)

    def _kept_factors(self, columns: lora.Columns) -> tuple[Tensor, Tensor]:
        known = self._made.factors
        if known is None or known[0] is not columns:
            new = [(columns.down, columns.scaled_up())]
            if known is not None:
                new = in_place([known[1]], new)
            self._made.factors = known = (columns, new[0])
        return known[1]

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        columns, rest = self._split_patches(x)
        # A bias that is not owned has its patches applied already, by core.
        bias_patches = self._patches("bias") if self.owns("bias") else []
        y = None
        as_stored = isinstance(weight, QuantizedTensor) and not rest and not bias_patches
        if as_stored and self.backend.precision != "16bit":
            inside = columns is not None and self._kernels_take(columns, x)
            y = self._quantized(x, weight, bias, columns if inside else None)
            if inside and y is not None:
                return y
        if y is None:
            dense, bias = self._dense(x, weight, bias, rest, bias_patches)
            y = nn.functional.linear(x, dense, None if bias is None else bias.to(x.dtype))
        return y if columns is None else columns.apply(x, y)

    def _quantized(
        self, x: Tensor, weight: QuantizedTensor, bias: Tensor | None, columns: lora.Columns | None
    ) -> Tensor | None:
        """The linear with quantized activations, or None where it has to be dequantized. columns: for kernels, see
        :meth:`_kernels_take`."""
        # That is defined in the file's 16-bit type; float32 activations (CPU) are rounded to it.
        rows = x.reshape(-1, x.shape[-1]).to(compute_type(weight))
        compute = self.backend.layers
        if weight._layout_cls == SVDQInt4Layout.__name__:
            parts = self._with_columns(packed_parts(weight._qdata, weight._params), columns)
            y = compute.linear_parts_w4a4(rows, parts, weight._params.axis, bias)
        else:
            lora_factors = None if columns is None else self._kept_factors(columns)
            y = linear_branchless(compute, rows, branchless(weight), bias, lora_factors)
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
        options |= lora.originals(patches, value, key)
        return self._trials[name].apply(patches, value, key, **options)


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
