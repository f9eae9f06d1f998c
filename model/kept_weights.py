"""INT8 copies of 4-bit weights, kept in VRAM where there is room: they need not be made before every product.

A copy takes a byte for each element, beside the 4-bit weight. That one stays: LoRAs that are no columns, saving, and
whatever looks inside a block need it. Copies are made when a block first runs. ComfyUI counts them as a part of the
model (patcher.py) and takes them first.

With dynamic VRAM they are pages of comfy-aimdo with a lower priority than the model's, which it takes when torch or a
weight needs VRAM; a block whose pages are gone expands its weights as if there were none. Otherwise they are torch's
memory, which ``partially_unload`` and ``detach`` of the patcher return.
"""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management
import comfy_aimdo.model_vbar
import comfy_aimdo.torch
import torch
from torch import Tensor, nn

from .graphs import BlockGraphs
from .held import Held

log = logging.getLogger(__name__)

WEIGHTS = ("auto", "int4", "int8")
_ALIGNMENT = 512  # bytes, of a block's memory in a vbar


@dataclass(eq=False)
class _Memory:
    """A block's copies: where each part's are, and of which weights they are."""

    slices: dict[str, list[slice]]  # linear: of each part
    bytes: Tensor | None = None  # uint8
    page: Any = None  # of a vbar, or None
    signature: Any = None  # of the page, when it was written
    state: object = field(default_factory=object)  # another one whenever everything in it was lost
    linears: dict[str, tuple[Any, Any]] = field(default_factory=dict)  # weak references to the weight and its Held
    loras: dict[str, Tensor] = field(default_factory=dict)  # linear: torch's memory for factors that LoRAs added to


class KeptWeights:
    """The copies of one model. choice: one of WEIGHTS."""

    def __init__(self, layers: Any, graphs: BlockGraphs, choice: str) -> None:
        self.choice = choice
        self._layers, self._graphs = layers, graphs
        self._memories: weakref.WeakKeyDictionary[nn.Module, _Memory] = weakref.WeakKeyDictionary()
        self._vbar: Any = None
        self._needed: int | None = None
        self._allowed: bool | None = None  # None: not decided

    def __deepcopy__(self, memo: dict) -> KeptWeights:
        return KeptWeights(self._layers, copy.deepcopy(self._graphs, memo), self.choice)

    # ---- what the patcher asks

    def needed(self, blocks: Sequence[nn.Module]) -> int:
        """Bytes for all linears of ``blocks`` (flux._Fused) that can be fused: one that has a linear in 16 bits or INT8
        runs layer by layer, and keeps nothing."""
        if self._needed is None:
            found = ([block.get_submodule(name).stored_parts() for name in block.linears] for block in blocks)
            parts = (part for linears in found if all(linears) for parts in linears for part in parts)
            self._needed = sum(map(self._layers.kept_bytes, parts))
        return self._needed

    @property
    def decided(self) -> bool:
        """Whether ``decide`` has been called since the model came."""
        return self._allowed is not None

    def decide(self, blocks: Sequence[nn.Module], device: torch.device, free: int, dynamic: bool) -> None:
        """Whether to keep copies until the model leaves the GPU. free: bytes of VRAM that are left beside the 4-bit
        weights.

        ``int8`` asks for room for the copies and for what ComfyUI leaves to inference, ``auto`` for twice the copies.
        """
        self._allowed = False
        if self.choice == "int4" or device.type != self._layers.device_type or not self.needed(blocks):
            return
        needed = self.needed(blocks)
        beside = needed if self.choice == "auto" else int(comfy.model_management.minimum_inference_memory())
        self._allowed = free >= needed + beside
        log.log(
            logging.WARNING if self.choice == "int8" and not self._allowed else logging.INFO,
            "SVDQ FLUX: %s, which takes %.2f GB and asks for %.2f GB beside it; %.2f GB of VRAM are free",
            "weights are kept in INT8 too" if self._allowed else "weights stay 4-bit and are not kept in INT8 too",
            needed / 1e9,
            beside / 1e9,
            free / 1e9,
        )
        if self._allowed and dynamic:
            self._vbar = comfy_aimdo.model_vbar.ModelVBAR(needed + _ALIGNMENT * len(blocks), device.index)

    def prioritize(self) -> None:
        """Dynamic VRAM: before other models' pages. The model's own are to come before them after this call."""
        if self._vbar is not None:
            self._vbar.prioritize()

    def counted(self, blocks: Sequence[nn.Module]) -> int:
        """Bytes that they add to the size of the model: those of ``int8`` before it is loaded, too, so that ComfyUI
        makes room."""
        wanted = self._allowed or (self._allowed is None and self.choice == "int8")
        return self.needed(blocks) if wanted else 0

    @property
    def held(self) -> int:
        """Bytes of VRAM that they take now."""
        if self._vbar is not None:
            return self._vbar.loaded_size()
        return sum(memory.bytes.nbytes for memory in self._memories.values())

    def free(self, size: float) -> int:
        """Give back at least ``size`` bytes, or all; returns how many. Without dynamic VRAM all of them, until the
        model is loaded anew."""
        if size <= 0:
            return 0
        if self._vbar is not None:
            return self._vbar.free_memory(min(size, self._vbar.max_size))
        freed = self.held
        if self._allowed:
            self.forget()
            self._allowed = False
            log.info("SVDQ FLUX: %.2f GB of INT8 weights are given back, weights stay 4-bit", freed / 1e9)
        return freed

    def forget(self) -> None:
        """Give back all of them, and what was decided."""
        if self._allowed:
            self._graphs.clear()  # they read the copies
            for memory in self._memories.values():
                for _, held in memory.linears.values():
                    if held() is not None:
                        held().kept, held().filled = (), None
        self._memories.clear()
        self._vbar = self._allowed = None

    # ---- what blocks ask

    def keep(
        self, block: nn.Module, linears: dict[str, Held], device: torch.device, pins: list[Any]
    ) -> tuple[int, ...]:
        """Fill in ``kept`` of all linears of a block; returns where the copies are, () if there are none.

        pins: as for :func:`slots.resident`.
        """
        if not self._allowed:
            return ()
        try:
            memory = self._memories.get(block) or self._allocate(block, linears, device)
            if memory.page is not None:
                signature = comfy_aimdo.model_vbar.vbar_fault(memory.page)
                if signature is None:
                    return ()
                pins.append(memory.page)
                if memory.bytes is None:
                    memory.bytes = comfy_aimdo.torch.aimdo_to_tensor(memory.page, device)
                if not comfy_aimdo.model_vbar.vbar_signature_compare(signature, memory.signature):
                    memory.signature, memory.state, memory.linears = signature, object(), {}
            for name, held in linears.items():
                if held.filled is not memory.state:
                    self._fill(memory, name, held)
        except torch.OutOfMemoryError:
            self.free(self._needed)
            return ()
        return memory.bytes.data_ptr(), *[tensor.data_ptr() for tensor in memory.loras.values()]

    def _fill(self, memory: _Memory, name: str, held: Held) -> None:
        known, stored = memory.linears.get(name), held.stored_parts()
        fill = known is None or known[0]() is not held.weight
        sizes = [
            0 if part.proj_down is own.proj_down else self._layers.factor_bytes(part)
            for part, own in zip(held.parts, stored, strict=True)
        ]
        lora = memory.loras.get(name)  # the same for another strength: CUDA graphs that read it stay right
        if not sum(sizes):
            memory.loras.pop(name, None)
            lora = memory.bytes[:0]
        elif lora is None or lora.nbytes != sum(sizes):
            lora = memory.loras[name] = _empty(sum(sizes), memory.bytes.device)
        held.kept = tuple(
            self._layers.keep(part, own, memory.bytes[where], fill, lora_memory)
            for part, own, where, lora_memory in zip(
                held.parts, stored, memory.slices[name], lora.split(sizes), strict=True
            )
        )
        held.filled = memory.state
        memory.linears[name] = weakref.ref(held.weight), weakref.ref(held)

    def _allocate(self, block: nn.Module, linears: dict[str, Held], device: torch.device) -> _Memory:
        """Memory for a block's copies."""
        slices: dict[str, list[slice]] = {}
        size = 0
        for name, held in linears.items():
            slices[name] = []
            for part in held.stored_parts():
                stop = size + self._layers.kept_bytes(part)
                slices[name].append(slice(size, stop))
                size = stop
        memory = _Memory(slices)
        if self._vbar is not None:
            memory.page = self._vbar.alloc(size)
        else:
            memory.bytes = _empty(size, device)
        self._memories[block] = memory
        return memory


def _empty(size: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # or it could not be written to outside of inference mode
        return torch.empty(size, dtype=torch.uint8, device=device)
