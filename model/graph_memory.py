"""Memory for the temporaries of CUDA graphs, with ComfyUI's default allocator.

ComfyUI has torch allocate with cudaMallocAsync. What that gives out during a capture belongs to the graph: it is not
there afterwards, Triton refuses it, and giving it back later can end the process. So a capture allocates nothing, but
takes its temporaries from a buffer that was there before. What they are like and how long they live is known from the
calls before, which ran without a graph: from its second call on, a computation consists of the same operators.

Attention allocates by itself, and cannot be told where its result is to go. It stays outside.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

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


@dataclass(frozen=True)
class Made:
    """A new tensor: what it is like, bytes of its memory, and where that goes in the memory of all temporaries."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    size: int
    offset: int


@dataclass
class Plan:
    """Operators of a computation in their order, each with the CUDA tensors that it makes, and bytes of all."""

    operators: list[tuple[Any, tuple[Made, ...]]] = field(default_factory=list)
    total: int = 0


class _Operators(TorchDispatchMode):
    """Gives ``_call`` the operators that make tensors, not those that are made of others."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if _is_composite(func):
            with self:
                return func.decompose(*args, **(kwargs or {}))
        if _makes_nothing(func):
            return func(*args, **(kwargs or {}))
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
        self.plan.operators.append((func, tuple(self._place(tensor) for tensor in _new(args, kwargs, out))))
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

    def _place(self, tensor: Tensor) -> Made:
        """The first gap between those that are alive."""
        self._alive = [entry for entry in self._alive if not entry[0].expired()]
        storage = tensor.untyped_storage()
        size = -(-storage.nbytes() // _ALIGN) * _ALIGN
        offset = 0
        for _, first, last in self._alive:
            if first - offset >= size:
                break
            offset = last
        self._alive.append((StorageWeakRef(storage), offset, offset + size))
        self._alive.sort(key=lambda entry: entry[1])
        self.plan.total = max(self.plan.total, offset + size)
        return Made(tuple(tensor.shape), tensor.stride(), tensor.dtype, storage.nbytes(), offset)


class Use(_Operators):
    """While it is on, puts new CUDA tensors where a plan says. memory: uint8, at least plan.total."""

    def __init__(self, plan: Plan, memory: Tensor) -> None:
        super().__init__()
        self._operators, self._memory, self._next = plan.operators, memory, 0

    def _call(self, func: Any, args: tuple, kwargs: dict) -> Any:
        number = self._next
        expected, made = self._operators[number] if number < len(self._operators) else ("none", ())
        if func is not expected:
            raise Changed(f"operator {number} is {func}; without a graph it was {expected}")
        self._next += 1
        if not made:
            return func(*args, **kwargs)
        name, into = func.overloadpacket.__name__, _writing(func)
        out = self._tensor(made[0])
        if name in _COPY:
            return out.copy_(args[0])
        if name in _ZERO:
            out.zero_()
        elif name not in _EMPTY:
            if into is None or len(made) > 1:
                raise Changed(f"{func} cannot write to memory that is there")
            options = {name: value for name, value in kwargs.items() if name not in _OF_RESULT}
            out = into(*args, **options, out=out)
        shape = _shape_asked(name, args) or out.shape
        if tuple(shape) != made[0].shape or tuple(out.shape) != made[0].shape:
            raise Changed(f"temporary of {func} is {tuple(shape)}; without a graph it was {made[0].shape}")
        return out

    def _tensor(self, made: Made) -> Tensor:
        words = self._memory[made.offset : made.offset + made.size].view(made.dtype)
        return words.as_strided(made.shape, made.stride, words.storage_offset())


def _new(args: tuple, kwargs: dict, out: Any) -> list[Tensor]:
    """The tensors in ``out`` on DEVICE with memory of their own."""
    found = [tensor for tensor in _tensors(out) if tensor.device.type == DEVICE and tensor.untyped_storage().nbytes()]
    if not found:
        return found
    old = {tensor.untyped_storage()._cdata for part in (args, kwargs) for tensor in _tensors(part)}
    return [tensor for tensor in found if tensor.untyped_storage()._cdata not in old]


def _tensors(tree: Any) -> Iterator[Tensor]:
    """Those of an operator's arguments or results."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, list | tuple | dict):
        for part in tree.values() if isinstance(tree, dict) else tree:
            yield from _tensors(part)


def _shape_asked(name: str, args: tuple) -> tuple[int, ...] | None:
    """The shape that an operator is asked for, if it is."""
    if name in ("empty", "empty_strided"):
        return tuple(args[0])
    if name in ("new_empty", "new_empty_strided", "new_zeros"):
        return tuple(args[1])
    return tuple(args[0].shape) if name in ("empty_like", "zeros_like") else None


@functools.cache
def _is_composite(func: Any) -> bool:
    return func.has_kernel_for_dispatch_key(_COMPOSITE)


@functools.cache
def _makes_nothing(func: Any) -> bool:
    return func.is_view or func._schema.is_mutable


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
