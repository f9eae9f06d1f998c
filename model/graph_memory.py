"""Memory for the temporaries of CUDA graphs, with ComfyUI's default allocator.

ComfyUI has torch allocate with cudaMallocAsync. What that gives out during a capture belongs to the graph: it is not
there afterwards, and Triton refuses it. So a capture takes its temporaries from a buffer that was there before. Their
sizes and lifetimes are those of the calls before, which ran without a graph: the same computation asks for the same
tensors in the same order, from its second call on.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = "cuda"
_ALIGN = 512  # bytes; torch's own
_EMPTY = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
_FIRST_ONLY = "scaled_dot_product"  # what else attention returns is for training


def needed() -> bool:
    """Whether captures must not allocate."""
    return torch.cuda.get_allocator_backend() == "cudaMallocAsync"


class Changed(RuntimeError):
    """A computation has not asked for the same tensors as the time before."""


@dataclass
class Plan:
    """Where the temporaries of a computation go, in the order in which it asks for them; sizes in bytes."""

    sizes: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    total: int = 0


class Watch(TorchDispatchMode):
    """While it is on, notes which new CUDA tensors there are and how long they live."""

    def __init__(self) -> None:
        super().__init__()
        self.plan = Plan()
        self._alive: list[tuple[StorageWeakRef, int, int]] = []  # (storage, first byte, the one behind its last)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in _new(func, args, kwargs, out):
            self._place(tensor.untyped_storage())
        return out

    def _place(self, storage: torch.UntypedStorage) -> None:
        """The first gap between those that are alive."""
        self._alive = [entry for entry in self._alive if not entry[0].expired()]
        size = -(-storage.nbytes() // _ALIGN) * _ALIGN
        offset = 0
        for _, first, last in self._alive:
            if first - offset >= size:
                break
            offset = last
        self._alive.append((StorageWeakRef(storage), offset, offset + size))
        self._alive.sort(key=lambda entry: entry[1])
        self.plan.sizes.append(storage.nbytes())
        self.plan.offsets.append(offset)
        self.plan.total = max(self.plan.total, offset + size)


class Use(TorchDispatchMode):
    """While it is on, puts new CUDA tensors where a plan says. memory: uint8, at least plan.total."""

    def __init__(self, plan: Plan, memory: Tensor) -> None:
        super().__init__()
        self._plan, self._memory, self._next = plan, memory, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket.__name__ in _EMPTY:
            like = func(*args, **kwargs | {"device": "meta"})
            if like.numel() and _on_gpu(args, kwargs):
                return self._take(like)
            return func(*args, **kwargs)
        out = func(*args, **kwargs)
        moved = {id(tensor): self._take(tensor).copy_(tensor) for tensor in _new(func, args, kwargs, out)}
        return tree_map_only(Tensor, lambda tensor: moved.get(id(tensor), tensor), out) if moved else out

    def _take(self, like: Tensor) -> Tensor:
        """A tensor of like's shape, strides and type."""
        nbytes = like.untyped_storage().nbytes()
        if self._next >= len(self._plan.sizes) or self._plan.sizes[self._next] != nbytes:
            raise Changed(f"temporary {self._next} has {nbytes} bytes, not as many as without a graph")
        offset = self._plan.offsets[self._next]
        self._next += 1
        words = self._memory[offset : offset + nbytes].view(like.dtype)
        return words.as_strided(like.shape, like.stride(), words.storage_offset())


def _new(func: Any, args: tuple, kwargs: dict | None, out: Any) -> list[Tensor]:
    """The tensors in ``out`` on DEVICE with memory of their own; without those that nobody uses."""
    tensors = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
    if _FIRST_ONLY in func.overloadpacket.__name__:
        tensors = tensors[:1]
    tensors = [tensor for tensor in tensors if tensor.device.type == DEVICE and tensor.untyped_storage().nbytes()]
    if not tensors:
        return []
    given = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
    old = {tensor.untyped_storage().data_ptr() for tensor in given}
    return [tensor for tensor in tensors if tensor.untyped_storage().data_ptr() not in old]


def _on_gpu(args: tuple, kwargs: dict) -> bool:
    """Whether one of _EMPTY would put its tensor on DEVICE."""
    device = kwargs.get("device")
    if device is None:
        return isinstance(args[0], Tensor) and args[0].device.type == DEVICE
    return torch.device(device).type == DEVICE
