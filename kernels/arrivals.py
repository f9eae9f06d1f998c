"""Counters for thread blocks of one launch that wait for each other, or of which the last one to come does the rest."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def arrivals(kernel: str, device: torch.device, count: int) -> Tensor:
    """int32 [count], 0 before and after every call of ``kernel``, which sets back what it counts.

    One set for each stream, and one for all CUDA graphs of a device: graphs that contain the kernel cannot run side by
    side. A cache on a function that is not pure: zeroing counters in every call would be a kernel of its own. Raises
    RuntimeError where the first call of all is captured in a graph.
    """
    of_graphs = _zeros(kernel, device, count, 0)
    if torch.cuda.is_current_stream_capturing():
        return of_graphs
    return _zeros(kernel, device, count, torch.cuda.current_stream(device).cuda_stream + 1)


@functools.cache
def _zeros(kernel: str, device: torch.device, count: int, key: int) -> Tensor:
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"{kernel}: call it once before it is captured in a CUDA graph")
    return torch.zeros(count, dtype=torch.int32, device=device)
