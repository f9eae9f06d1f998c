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

from .flux import fused_blocks, give_back
from .kept_weights import KeptWeights
from .lora import refuse_damaged
from .offload import Staged
from .ops import QuantizedLinear, is_quantized
from .saving import SaveMixin
from .slots import PatchSlots

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


class _KeptMixin:
    """Counts the INT8 copies of kept_weights.py as a part of the model, the first to go when VRAM is short."""

    _loads = False  # while core compares the model's size with what it loads

    def _kept(self) -> tuple[KeptWeights, list] | tuple[None, list]:
        blocks = fused_blocks(self.model.diffusion_model)
        return (blocks[0].kept, blocks) if blocks else (None, blocks)

    def model_size(self) -> int:
        kept, blocks = self._kept()
        return super().model_size() + (0 if kept is None or self._loads else kept.counted(blocks))

    def loaded_size(self) -> int:
        kept, _ = self._kept()
        return super().loaded_size() + (0 if kept is None else kept.held)

    def partially_unload(self, device_to: Any, memory_to_free: float = 0, force_patch_weights: bool = False) -> Any:
        kept, _ = self._kept()
        freed = 0 if kept is None else kept.free(memory_to_free)
        if freed and freed >= memory_to_free:
            return freed
        return freed + super().partially_unload(device_to, memory_to_free - freed, force_patch_weights)

    def _clear_graphs(self) -> int:
        """Give up the CUDA graphs, which the next passes make anew; returns bytes."""
        blocks = fused_blocks(self.model.diffusion_model)
        return blocks[0].graphs.clear() if blocks else 0

    def _decide(self) -> None:
        """Whether copies are kept, by the VRAM that is free once all weights are in it."""
        kept, blocks = self._kept()
        if kept is None:
            return
        if not kept.decided:
            missing = super().model_size() - super().loaded_size()
            free = comfy.model_management.get_free_memory(self.load_device) - max(0, missing)
            kept.decide(blocks, self.load_device, int(free), self.is_dynamic())
        kept.prioritize()


class _LoraMixin:
    """Takes no LoRA that would make every picture black."""

    def add_patches(self, patches: dict, *args: Any, **kwargs: Any) -> list:
        refuse_damaged(patches)
        return super().add_patches(patches, *args, **kwargs)

    def add_hook_patches(self, hook: Any, patches: dict, *args: Any, **kwargs: Any) -> list:
        refuse_damaged(patches)
        return super().add_hook_patches(hook, patches, *args, **kwargs)


class _DenseMixin:
    """Gives nodes that look at patched parameters those of the dense model: ComfyUI's Extract and Save Lora does."""

    def model_state_dict(self, filter_prefix: str | None = None) -> dict[str, Any]:
        found = super().model_state_dict(filter_prefix)
        # What core itself measures and saves is the whole, as stored.
        return found if filter_prefix is None else _DenseStates(found, self)

    def _dense(self, key: str, device: torch.device | None) -> torch.Tensor:
        """A parameter that a Linear patches itself: dense, patched, float32."""
        name, _, leaf = key.rpartition(".")
        module = comfy.utils.get_attr(self.model, name)
        return module.patched(leaf, self.patches.get(key, ()), key, device or module.weight.device)


class _DenseStates(dict):
    """A state dict whose parameters that Linears patch themselves are made dense, and patched, when they are asked for:
    all together they would take 24 GB."""

    def __init__(self, states: dict[str, Any], patcher: _DenseMixin):
        super().__init__(states)
        self._patcher = patcher

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        patcher = self._patcher
        return value if slots_of(patcher.model, key) is None else patcher._dense(key, patcher.load_device)


class SVDQModelPatcher(_KeptMixin, _LoraMixin, _DenseMixin, SaveMixin, comfy.model_patcher.ModelPatcher):
    """The patcher without dynamic VRAM."""

    _dying = False  # while Python deletes the patcher
    _stays = False  # while patches change on a model that is and will be on the GPU as a whole

    def partially_load(self, device_to: Any, extra_memory: float = 0, force_patch_weights: bool = False) -> Any:
        self._loads = True
        try:
            loaded = self._partially_load(device_to, extra_memory, force_patch_weights)
        finally:
            self._loads = False
        if self.model.model_loaded_weight_memory > 0 and not self.model.model_lowvram:
            self._decide()
        return loaded

    def partially_unload(self, device_to: Any, memory_to_free: float = 0, force_patch_weights: bool = False) -> Any:
        freed = self._clear_graphs() if memory_to_free > 0 else 0
        if freed and freed >= memory_to_free:
            return freed
        return freed + super().partially_unload(device_to, memory_to_free - freed, force_patch_weights)

    def _partially_load(self, device_to: Any, extra_memory: float, force_patch_weights: bool) -> Any:
        # Core takes the whole model off the GPU and brings it back to give weights other patches (1253). Ours do not
        # change with their patches, and CUDA graphs know where they are.
        used = self.model.model_loaded_weight_memory
        loaded = used > 0 and not self.model.model_lowvram and self.model.device == device_to
        changed = not force_patch_weights and self._change_patches(device_to)
        self._stays = loaded and used + extra_memory > self.model_size()
        uuid = self.model.current_weight_patches_uuid
        if uuid is not None and (uuid != self.patches_uuid or force_patch_weights) and not self._stays:
            # Core takes all weights off the GPU and asks nobody for the copies and the graphs that go with them.
            give_back(self.model.diffusion_model)
        try:
            result = super().partially_load(device_to, extra_memory, force_patch_weights)
        finally:
            self._stays = False
        if changed and loaded:  # for core it was loaded all the time
            for callback in self.get_all_callbacks(CallbacksMP.ON_LOAD):
                callback(self, device_to, used + extra_memory, force_patch_weights, True)
        return result

    def _change_patches(self, device_to: Any) -> bool:
        """Give a loaded model this patcher's patches instead of those that it has; whether that was all there is to do.

        It is where nothing else was or has to be patched than what Linears apply themselves; a few milliseconds, while
        core goes through the whole model, and through the bus if that is partly offloaded.
        """
        model, uuid = self.model, self.model.current_weight_patches_uuid
        if uuid in (None, self.patches_uuid) or not model.model_loaded_weight_memory or model.device != device_to:
            return False
        if self.backup or self.weight_wrapper_patches or self.force_cast_weights:
            return False
        modules = dict(model.named_modules())
        owners = {
            f"{name}.{leaf}": (module, leaf)
            for name, module in modules.items()
            if isinstance(module, QuantizedLinear)
            for leaf in module.slots
            if module.owns(leaf)
        }
        others = ("weight_function", "bias_function", "comfy_force_cast_weights")
        if not owners.keys() >= self.patches.keys() or any(
            getattr(module, name, None) for module in modules.values() for name in others
        ):
            return False
        with self.use_ejected():
            self.unpatch_hooks()
        offloaded = 0
        for key, (module, leaf) in owners.items():
            slots = module.slots[leaf]
            slots.partial = slots.resident = None
            if key not in self.patches:
                continue
            patch = comfy.model_patcher.LowVramPatch(key, self.patches)
            if getattr(module, "comfy_patched_weights", False):  # core's sign for a module that is loaded
                slots.resident = patch
            else:
                slots.partial = patch
                offloaded += 1
        model.lowvram_patch_counter = offloaded
        model.current_weight_patches_uuid = self.patches_uuid
        return True

    def patch_weight_to_device(
        self, key: str, device_to: Any = None, inplace_update: bool = False, return_weight: bool = False, **kwargs: Any
    ) -> Any:
        slots = slots_of(self.model, key)
        if slots is None:
            return super().patch_weight_to_device(key, device_to, inplace_update, return_weight, **kwargs)
        if return_weight:
            return self._dense(key, device_to)
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

    # ---- weights that stay off the GPU

    def pin_weight_to_device(self, key: str) -> None:
        module = self._staging(key)
        if module is None:
            super().pin_weight_to_device(key)
        elif module.staged is None:
            module.staged = Staged.of(module.weight)
            if module.staged is not None:
                self.pinned.add(key)

    def unpin_weight(self, key: str) -> None:
        module = self._staging(key)
        if module is None:
            super().unpin_weight(key)
        elif not self._dying:  # other clones have the same model, and Staged gives back what it has by itself
            module.staged = None
            self.pinned.discard(key)

    def _staging(self, key: str) -> QuantizedLinear | None:
        """The Linear of the parameter ``key`` if that is a quantized weight."""
        name, _, leaf = key.rpartition(".")
        module = comfy.utils.get_attr(self.model, name) if name and leaf == "weight" else None
        return module if isinstance(module, QuantizedLinear) and is_quantized(module.weight) else None

    def __del__(self) -> None:
        self._dying = True
        super().__del__()

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


class SVDQModelPatcherDynamic(_KeptMixin, _LoraMixin, _DenseMixin, SaveMixin, comfy.model_patcher.ModelPatcherDynamic):
    """The patcher with dynamic VRAM."""

    def partially_load(self, *args: Any, **kwargs: Any) -> Any:
        self._decide()  # before core gives the model's own pages a priority above all others
        return super().partially_load(*args, **kwargs)

    def partially_unload(self, device_to: Any, memory_to_free: float = 0, force_patch_weights: bool = False) -> Any:
        freed = super().partially_unload(device_to, memory_to_free, force_patch_weights)
        # Not before: pages come back to where graphs know them.
        return freed if freed >= memory_to_free else freed + self._clear_graphs()

    def load(self, *args: Any, dirty: bool = False, **kwargs: Any) -> None:
        # Core forgets what is in VRAM when patches change, because it patches weights there (1886). Ours are as stored,
        # and would be sent again in vain. A bias that core patches shares its weight's place.
        modules = [m for m in quantized_modules(self.model) if dirty and m.bias_lowvram_function is None]
        there = [(module, getattr(module, "_v_signature", None)) for module in modules]
        small = {key: (kept.weight, comfy.utils.get_attr(self.model, key)) for key, kept in self.backup.items()}
        super().load(*args, dirty=dirty, **kwargs)
        for module, signature in there:
            if module.bias_lowvram_function is None and hasattr(module, "_v"):
                module._v_signature = signature
        self._put_back(small)

    def _put_back(self, before: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Give small parameters, which core copies to the GPU in every load, the memory that they had: CUDA graphs
        know it.

        before: {key: (as stored, on the GPU)} of the last load.
        """
        for key, (stored, old) in before.items():
            new = comfy.utils.get_attr(self.model, key)
            if key not in self.backup or new is old or not type(new.data) is type(old.data) is torch.Tensor:
                continue
            if old.data_ptr() == stored.data_ptr() or old.device != new.device:
                continue
            if (new.dtype, new.shape, new.stride()) == (old.dtype, old.shape, old.stride()):
                with torch.inference_mode():
                    old.copy_(new)  # there may be other patches on it
                comfy.utils.set_attr(self.model, key, old)

    def patch_weight_to_device(
        self, key: str, device_to: Any = None, inplace_update: bool = False, return_weight: bool = False, **kwargs: Any
    ) -> Any:
        slots = slots_of(self.model, key)
        if slots is None:
            return super().patch_weight_to_device(key, device_to, inplace_update, return_weight, **kwargs)
        if return_weight:
            return self._dense(key, device_to)
        parameter = comfy.utils.get_attr(self.model, key)
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
    patcher.add_callback_with_key(CallbacksMP.ON_CLONE, _CALLBACK_KEY, _adopt_clone)
    return patcher


def _adopt_clone(patcher: comfy.model_patcher.ModelPatcher, clone: comfy.model_patcher.ModelPatcher) -> None:
    _change_class(clone)
    clone.size = patcher.size  # core has given it the size with INT8 copies


def _change_class(patcher: comfy.model_patcher.ModelPatcher) -> None:
    patcher.__class__ = _OURS.get(type(patcher), type(patcher))
