"""Quantized weights that go to the GPU and back without dynamic VRAM, where core and comfy_kitchen would copy too much.

To the GPU for one use: they wait for each inner tensor, of which only one is pinned, and send all but the codes twice.
Back to the CPU: they copy a weight that lies in the file already, and then keep the copy in RAM. Weights do not change.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import comfy.memory_management
import comfy.model_management
import comfy.utils
import torch
from comfy_kitchen.tensor.base import QuantizedTensor
from torch import Tensor, nn

_RAM_LEFT = 2 * 2**30  # bytes that copies in pinned memory leave to others
_PAGE = 4096  # of RAM, or a multiple of it


def inner_tensors(weight: QuantizedTensor) -> dict[str, Tensor]:
    """Everything that a weight consists of, by attribute."""
    return {name: getattr(weight, name) for name in weight.__tensor_flatten__()[0]}


class Staged:
    """A copy of a weight in one piece of pinned memory: a GPU fetches it by itself, while it computes."""

    def __init__(self, weight: QuantizedTensor, buffer: Tensor):
        self.weight, self.buffer = weight, buffer
        comfy.memory_management.interpret_gathered_like([weight], buffer)[0].copy_(weight)
        weakref.finalize(self, _unpin, buffer).atexit = False

    @classmethod
    def of(cls, weight: QuantizedTensor) -> Staged | None:
        """None where nothing is pinned or RAM is short."""
        size = -(-comfy.memory_management.vram_aligned_size(weight) // _PAGE) * _PAGE
        if comfy.model_management.get_free_memory(torch.device("cpu")) < size + _RAM_LEFT:
            return None
        with torch.inference_mode(False):
            memory = torch.empty(size + _PAGE, dtype=torch.uint8)
        buffer = memory[-memory.data_ptr() % _PAGE :][:size]  # pages of its own
        return cls(weight, buffer) if comfy.model_management.pin_memory(buffer) else None


def _unpin(buffer: Tensor) -> None:
    comfy.model_management.synchronize()  # a GPU may still be fetching it
    comfy.model_management.unpin_memory(buffer)


@contextlib.contextmanager
def brought(
    weight: QuantizedTensor, bias: Tensor | None, staged: Staged | None, device: torch.device
) -> Iterator[tuple[QuantizedTensor, Tensor | None]]:
    """(weight, bias) on ``device`` for as long as the context lasts, copied on one of core's streams for that."""
    management = comfy.model_management
    non_blocking = device.type != "cpu" and management.device_supports_non_blocking(device)
    stream = management.get_offload_stream(device)
    with contextlib.nullcontext() if stream is None else stream.as_context(stream):
        if staged is not None and staged.weight is weight:
            gathered = staged.buffer.to(device, non_blocking=non_blocking)
            weight = comfy.memory_management.interpret_gathered_like([weight], gathered)[0]
        else:
            there = {name: t.to(device, non_blocking=non_blocking) for name, t in inner_tensors(weight).items()}
            weight = QuantizedTensor.__tensor_unflatten__(there, weight.__tensor_flatten__()[1], None, None)
        bias = None if bias is None else bias.to(device, non_blocking=non_blocking)
    management.sync_stream(device, stream)
    try:
        yield weight, bias
    finally:
        if stream is not None:  # which frees what was brought when it is used no more
            stream.wait_stream(management.current_stream(device))


class Origin:
    """A weight where it came from, the CPU, while it is on a GPU."""

    def __init__(self) -> None:
        self._now: nn.Parameter | None = None
        self._before: nn.Parameter | None = None

    def moved(self, parameter: nn.Parameter, fn: Callable[[Any], Any]) -> Any:
        """fn(parameter), or the parameter as it was before if that is where ``fn`` would move it."""
        if parameter is self._now:
            probe = fn(torch.empty(0, dtype=parameter.dtype, device=parameter.device))
            if probe.device == self._before.device and probe.dtype == self._before.dtype:
                return self._before
        return fn(parameter)

    def remember(self, now: nn.Parameter, before: nn.Parameter) -> None:
        """That ``now`` has taken the place of ``before``."""
        # Without mapped files what is kept would be RAM.
        leaves = before.device.type == "cpu" and now.device.type != "cpu" and not comfy.utils.DISABLE_MMAP
        self._now, self._before = (now, before) if leaves else (None, None)
