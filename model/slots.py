"""What core leaves on a module, patches and weights that it has moved, as quantized linears and blocks read it."""

from __future__ import annotations

import copy
import weakref
from dataclasses import dataclass, field
from typing import Any

import comfy_aimdo.model_vbar
import torch
from torch import Tensor, nn

from . import lora

_SLOTS = ("weight_function", "bias_function", "weight_lowvram_function", "bias_lowvram_function")


def resident(module: nn.Module, device: torch.device, pins: list[Any]) -> tuple[Tensor, Tensor | None] | None:
    """(weight, bias) of one of core's modules if they are on ``device``; None if core has to bring or to change them.

    They stay there, not moved, until :func:`unpin` gets what this adds to ``pins``. Core brings weights through buffers
    of which there are one or two: what ``cast_bias_weight`` returned for one module is overwritten by the next but one,
    at the latest. Only resident weights can be held beside each other.
    """
    state, parameters = module.__dict__, module._parameters
    is_changed = getattr(type(module), "is_changed", None)  # of our linears
    if any(map(state.get, _SLOTS)) if is_changed is None else is_changed(module):
        return None
    weight, bias = parameters["weight"], parameters.get("bias")
    if weight.device == device:
        return (weight, bias) if bias is None or bias.device == device else None
    place = state.get("_v")
    if place is None or device.type == "cpu":
        return None
    # Dynamic VRAM: a fault pins the module's place and tells whether the values in it are still those of last time.
    signature = comfy_aimdo.model_vbar.vbar_fault(place)
    if signature is None:
        return None
    pins.append(place)
    loaded = comfy_aimdo.model_vbar.vbar_signature_compare(signature, state["_v_signature"])
    return (state["_v_weight"], state["_v_bias"]) if loaded else None


def unpin(pins: list[Any]) -> None:
    """Let core move again what :func:`resident` has pinned."""
    while pins:
        comfy_aimdo.model_vbar.vbar_unpin(pins.pop())


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
    def empty(self) -> bool:
        return self.dynamic is None and self.partial is None and self.resident is None and not self.hooks

    @property
    def key(self) -> str:
        return self.holder.key if self.holder is not None else "hook"

    def active(self) -> list[lora.Patch]:
        """All patches, in the order in which core would apply them."""
        return [*(self.holder.patches.get(self.holder.key, ()) if self.holder is not None else ()), *self.hooks]


class Functions(list):
    """A Linear's ``weight_function`` or ``bias_function`` list that keeps low-VRAM patches in the Linear's slots.

    A function in this list makes core dequantize the weight before every use. Wrappers of other packs keep that
    meaning; the patches that core puts here for partially loaded models are LoRAs, which the Linear applies itself.
    """

    def __init__(self, module: Any, name: str, functions: Any = ()):
        super().__init__()
        # Weak, or weights would keep their memory until the garbage collector comes.
        self._module, self._name = weakref.ref(module), name
        self.extend(functions)

    def __deepcopy__(self, memo: dict) -> Functions:
        module = self._module()
        copied = Functions(memo.get(id(module), module), self._name)
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
