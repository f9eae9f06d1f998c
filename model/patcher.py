"""ModelPatcher subclasses that leave quantized weights as they are and tell the Linears about patches.

Core computes a patched weight by dequantizing, adding and writing back. These classes intercept exactly the methods
that would do that to a quantized weight; everything else is inherited. Line numbers in comments: ComfyUI 0.30.0.
"""

from __future__ import annotations

import collections
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.utils
import torch
from comfy.patcher_extension import CallbacksMP

from .ops import PatchSlots, QuantizedLinear, is_quantized
from .saving import SaveMixin

_CALLBACK_KEY = "svdq_flux"
_Backup = collections.namedtuple("_Backup", ["weight", "inplace_update"])


def slots_of(model: torch.nn.Module, key: str) -> PatchSlots | None:
    """Where the patches on the parameter ``key`` go if its Linear applies them itself; None if core does."""
    name, _, leaf = key.rpartition(".")
    module = comfy.utils.get_attr(model, name) if name else None
    return module.slots[leaf] if isinstance(module, QuantizedLinear) and module.owns(leaf) else None


def quantized_modules(model: torch.nn.Module) -> list[QuantizedLinear]:
    """All linears with a quantized weight."""
    return [m for m in model.modules() if isinstance(m, QuantizedLinear) and is_quantized(m.weight)]


class SVDQModelPatcher(SaveMixin, comfy.model_patcher.ModelPatcher):
    """The patcher without dynamic VRAM."""

    _stays = False  # while patches change on a model that is and will be on the GPU as a whole

    def partially_load(self, device_to: Any, extra_memory: float = 0, force_patch_weights: bool = False) -> Any:
        # Core takes the whole model off the GPU and brings it back to give weights other patches (1253). Ours do not
        # change with their patches, and CUDA graphs know where they are.
        used = self.model.model_loaded_weight_memory
        loaded = used > 0 and not self.model.model_lowvram and self.model.device == device_to
        self._stays = loaded and used + extra_memory > self.model_size()
        try:
            return super().partially_load(device_to, extra_memory, force_patch_weights)
        finally:
            self._stays = False

    def patch_weight_to_device(
        self, key: str, device_to: Any = None, inplace_update: bool = False, return_weight: bool = False, **kwargs: Any
    ) -> Any:
        slots = slots_of(self.model, key)
        if slots is None:
            return super().patch_weight_to_device(key, device_to, inplace_update, return_weight, **kwargs)
        if return_weight:
            return comfy.utils.get_attr(self.model, key)
        slots.resident = comfy.model_patcher.LowVramPatch(key, self.patches) if key in self.patches else None
        return None

    def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> None:
        super().unpatch_model(None if self._stays else device_to, unpatch_weights)
        if unpatch_weights:
            for module in quantized_modules(self.model):
                for slots in module.slots.values():
                    slots.resident = None

    def _load_list(self, *args: Any, **kwargs: Any) -> list[tuple]:
        # Core reserves room for a dense copy of every offloaded weight that is quantized or patched (957); a quantized
        # linear needs its own bytes only. An entry is (offload memory, module memory, name, module, parameters).
        return [
            (entry[1], *entry[1:]) if isinstance(entry[3], QuantizedLinear) and is_quantized(entry[3].weight) else entry
            for entry in super()._load_list(*args, **kwargs)
        ]

    # ---- hooks: the patch list takes the place of a patched weight

    def patch_hook_weight_to_device(
        self, hooks: Any, combined_patches: dict, key: str, original_weights: dict, memory_counter: Any
    ) -> None:
        slots = slots_of(self.model, key)
        if slots is None:
            super().patch_hook_weight_to_device(hooks, combined_patches, key, original_weights, memory_counter)
        elif key in combined_patches:
            slots.hooks = combined_patches[key]
            self.cached_hook_patches.setdefault(hooks, {})[key] = (combined_patches[key], None)

    def patch_cached_hook_weights(self, cached_weights: dict, key: str, memory_counter: Any) -> None:
        slots = slots_of(self.model, key)
        if slots is None:
            super().patch_cached_hook_weights(cached_weights, key, memory_counter)
        else:
            slots.hooks = cached_weights[key][0]

    def unpatch_hooks(self, whitelist_keys_set: set[str] | None = None) -> None:
        for name, module in self.model.named_modules():
            for leaf, slots in module.slots.items() if isinstance(module, QuantizedLinear) else ():
                if not whitelist_keys_set or f"{name}.{leaf}" in whitelist_keys_set:
                    slots.hooks = []
        super().unpatch_hooks(whitelist_keys_set)


class SVDQModelPatcherDynamic(SaveMixin, comfy.model_patcher.ModelPatcherDynamic):
    """The patcher with dynamic VRAM."""

    def patch_weight_to_device(
        self, key: str, device_to: Any = None, inplace_update: bool = False, return_weight: bool = False, **kwargs: Any
    ) -> Any:
        slots = slots_of(self.model, key)
        if slots is None:
            return super().patch_weight_to_device(key, device_to, inplace_update, return_weight, **kwargs)
        parameter = comfy.utils.get_attr(self.model, key)
        if return_weight:
            return parameter
        # Called for modules that core loads for good because they are tiny (1938): moved, not dequantized.
        if key not in self.backup:
            self.backup[key] = _Backup(parameter, False)
        comfy.utils.set_attr_param(self.model, key, parameter.to(device_to))
        slots.dynamic = comfy.model_patcher.LowVramPatch(key, self.patches) if key in self.patches else None
        return None


_OURS = {
    comfy.model_patcher.ModelPatcher: SVDQModelPatcher,
    comfy.model_patcher.ModelPatcherDynamic: SVDQModelPatcherDynamic,
}


def adopt(patcher: comfy.model_patcher.ModelPatcher) -> comfy.model_patcher.ModelPatcher:
    """Make a stock patcher one of ours, and every clone of it, also one that core builds as a plain ModelPatcher.

    Only exact stock classes change: another pack's subclass stays what it is.
    """
    _change_class(patcher)
    patcher.add_callback_with_key(CallbacksMP.ON_CLONE, _CALLBACK_KEY, lambda _, clone: _change_class(clone))
    return patcher


def _change_class(patcher: comfy.model_patcher.ModelPatcher) -> None:
    patcher.__class__ = _OURS.get(type(patcher), type(patcher))
