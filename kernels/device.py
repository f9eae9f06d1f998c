"""What a compute device is, as far as the choice of arithmetic goes. No device is queried at import."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

INT4_CAPABILITIES = ((8, 0), (8, 6), (8, 9))  # GPUs whose tensor cores multiply INT4, and that have bf16
FMA = {"enable_fp_fusion": True}  # of every launch: Triton 3.9 announces that it will not be the default
INT8_CAPABILITY = (8, 0)  # the first whose tensor cores multiply INT8 and that has bf16


@dataclass(frozen=True)
class Device:
    """kind: "cuda", "hip", "cpu", "mps", ... · name: the product's name · capability: CUDA compute capability or None ·
    memory: bytes of device memory or None."""

    kind: str
    name: str
    capability: tuple[int, int] | None = None
    memory: int | None = None

    @property
    def architecture(self) -> str:
        """"sm_86" and the like; the kind where there is no compute capability."""
        return self.kind if self.capability is None else f"sm_{self.capability[0]}{self.capability[1]}"


def describe(device: torch.device | str) -> Device:
    """Facts about a torch device."""
    device = torch.device(device)
    if device.type == "cuda" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(device)
        if torch.version.hip is not None:
            return Device("hip", properties.name, memory=properties.total_memory)
        return Device("cuda", properties.name, (properties.major, properties.minor), properties.total_memory)
    return Device(device.type, device.type.upper())


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device."""
    return torch.cuda.get_device_properties(device).multi_processor_count
