"""Memory for the temporaries of CUDA graphs, with ComfyUI's default allocator.

ComfyUI has torch allocate with cudaMallocAsync. What that gives out during a capture belongs to the graph: it is not
there afterwards, Triton refuses it, and giving it back later can end the process. So a capture allocates nothing, but
takes its temporaries from a buffer that was there before. Their sizes and lifetimes are those of the calls before,
which ran without a graph: the same computation asks for the same tensors in the same order, from its second call on.

Attention allocates by itself, and cannot be told where its result is to go. It stays outside.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = "cuda"
_ALIGN = 512  # bytes; torch's own
_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd  # made of others; inference mode does not take it apart
_COPY, _ZERO = ("clone", "_to_copy"), ("zeros_like", "new_zeros")  # whose forms with ``out`` are generated
_OF_RESULT = ("dtype", "layout", "device", "pin_memory")  # what the tensor to write to decides
_EMPTY = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


def needed() -> bool:
    """Whether captures must not allocate."""
    return torch.cuda.get_allocator_backend() == "cudaMallocAsync"


def attention_result(qkv: Tensor) -> Tensor:
    """Where the result of attention on q, k, v T [B, L, 3, H, D] goes: T [B, L, H * D]."""
    batch, length, _, heads, size = qkv.shape
    return qkv.new_empty(batch, length, heads * size)


class Changed(RuntimeError):
    """A computation has not asked for the same tensors as the time before."""


@dataclass
class Plan:
    """Where the temporaries of a computation go, in the order in which it asks for them; sizes in bytes."""

    sizes: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    total: int = 0


class _Operators(TorchDispatchMode):
    """Gives ``_call`` the operators of which others are made, and only these."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.has_kernel_for_dispatch_key(_COMPOSITE):
            with self:
                return func.decompose(*args, **(kwargs or {}))
        return self._call(func, args, kwargs or {})

    def _call(self, func: Any, args: tuple, kwargs: dict) -> Any:
        raise NotImplementedError


class Watch(_Operators):
    """While it is on, notes which new CUDA tensors there are and how long they live."""

    def __init__(self) -> None:
        super().__init__()
        self.plan = Plan()
        self._alive: list[tuple[StorageWeakRef, int, int]] = []  # (storage, first byte, the one behind its last)

    def _call(self, func: Any, args: tuple, kwargs: dict) -> Any:
        out = func(*args, **kwargs)
        for tensor in _new(args, kwargs, out):
            self._place(tensor.untyped_storage())
        return out

    def unseen(self, attend: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """``attend`` whose result is a temporary of the computation, but not what it makes inside."""

        def outside(qkv: Tensor) -> Tensor:
            out = attention_result(qkv)
            self.__exit__(None, None, None)
            try:
                out.copy_(attend(qkv))
            finally:
                self.__enter__()
            return out

        return outside

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


class Use(_Operators):
    """While it is on, puts new CUDA tensors where a plan says. memory: uint8, at least plan.total."""

    def __init__(self, plan: Plan, memory: Tensor) -> None:
        super().__init__()
        self._plan, self._memory, self._next = plan, memory, 0

    def _call(self, func: Any, args: tuple, kwargs: dict) -> Any:
        if func.overloadpacket.__name__ in _EMPTY:
            like = func(*args, **kwargs | {"device": "meta"})
            if like.numel() and _on_gpu(args, kwargs):
                return self._take(like)
            return func(*args, **kwargs)
        if func._schema.is_mutable or not any(tensor.device.type == DEVICE for tensor in _tensors((args, kwargs))):
            return func(*args, **kwargs)
        shapes = tree_map_only(Tensor, _shape_of, (args, kwargs))
        like = func(*shapes[0], **shapes[1])
        if not _new(*shapes, like, "meta"):  # views
            return func(*args, **kwargs)
        name, into = func.overloadpacket.__name__, _writing(func)
        if name in _COPY:
            return self._take(like).copy_(args[0])
        if name in _ZERO:
            return self._take(like).zero_()
        if into is None or not isinstance(like, Tensor):
            raise Changed(f"{func} cannot write to memory that is there")
        options = {name: value for name, value in kwargs.items() if name not in _OF_RESULT}
        return into(*args, **options, out=self._take(like))

    def _take(self, like: Tensor) -> Tensor:
        """A tensor of like's shape, strides and type."""
        nbytes = like.untyped_storage().nbytes()
        if self._next >= len(self._plan.sizes) or self._plan.sizes[self._next] != nbytes:
            raise Changed(f"temporary {self._next} has {nbytes} bytes, not as many as without a graph")
        offset = self._plan.offsets[self._next]
        self._next += 1
        words = self._memory[offset : offset + nbytes].view(like.dtype)
        return words.as_strided(like.shape, like.stride(), words.storage_offset())


def _new(args: tuple, kwargs: dict, out: Any, device: str = "") -> list[Tensor]:
    """The tensors in ``out`` on ``device`` (DEVICE) with memory of their own."""
    tensors = [tensor for tensor in _tensors(out) if tensor.device.type == (device or DEVICE)]
    old = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
    return [t for t in tensors if t.untyped_storage().nbytes() and t.untyped_storage()._cdata not in old]


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


@functools.cache
def _writing(func: Any) -> Any:
    """The form of an operator that writes its result to ``out``, or None. Not the generated ones, which allocate a
    result and copy it."""
    wanted = [(a.name, str(a.type)) for a in func._schema.arguments if a.name not in _OF_RESULT]
    for name in func.overloadpacket.overloads():
        form = getattr(func.overloadpacket, name)
        into = [argument.name for argument in form._schema.arguments if argument.is_out]
        others = [(a.name, str(a.type)) for a in form._schema.arguments if not a.is_out and a.name not in _OF_RESULT]
        if into == ["out"] and others == wanted and torch.Tag.generated not in form.tags:
            return form
    return None


def _shape_of(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _on_gpu(args: tuple, kwargs: dict) -> bool:
    """Whether one of _EMPTY would put its tensor on DEVICE."""
    device = kwargs.get("device")
    if device is None:
        return isinstance(args[0], Tensor) and args[0].device.type == DEVICE
    return torch.device(device).type == DEVICE
