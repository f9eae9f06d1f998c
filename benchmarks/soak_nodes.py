"""Nodes that soak.py puts into ComfyUI: the bits of what a prompt computed, and what the server has in memory.

The server gets this file as a folder of custom_nodes, with process_memory.py beside it.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from .process_memory import STATUS, ram, tensors


class Record:
    """Hashes of a latent and of the images that it was decoded to, and whether both are finite."""

    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "test", "record", (), True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"latent": ("LATENT",), "images": ("IMAGE",)}}

    def record(self, latent: dict[str, torch.Tensor], images: torch.Tensor) -> dict[str, Any]:
        found = [tensor.float().cpu().contiguous() for tensor in (latent["samples"], images)]
        hashes = [hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for tensor in found]
        return {"ui": {"sha256": hashes, "finite": [bool(tensor.isfinite().all()) for tensor in found]}}


class Memory:
    """Bytes of the server's own in RAM (None where Linux's /proc is missing), and how many tensors it has."""

    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "test", "measure", (), True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"number": ("INT", {"default": 0})}}  # another each time, so that it runs each time

    def measure(self, number: int) -> dict[str, Any]:
        count = tensors()
        return {"ui": {"ram": [ram()[0] if STATUS.exists() else None], "tensors": [count]}}


NODE_CLASS_MAPPINGS = {"SoakRecord": Record, "SoakMemory": Memory}
