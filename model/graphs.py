"""CUDA graphs of blocks: Python takes longer to start the 15 to 40 kernels of a block than a fast GPU to run them.

A graph belongs to one block, one set of shapes and one place of the weights; when ComfyUI moves weights, a LoRA brings
others or the size of the picture changes, the block gets a new one. The first few blocks of a kind run without one, to
compile kernels and to see what they ask for; all others are recorded when they are first called. All
graphs of a model share their inputs (a block works in place on the tensors that the block before it left) and the
memory of their temporaries, which is planned here where the allocator cannot do it (graph_memory.py). That memory takes
the place of what a pass allocates without graphs; it is the first to be given back when another model needs some.

Attention that is not ours to choose (a mask, another pack's, a flag of ComfyUI) is called each time, between a graph of
what comes before it and one of the rest.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import os
import threading
import traceback
import weakref
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import graph_memory

log = logging.getLogger(__name__)

VARIABLE = "SVDQ_CUDA_GRAPHS"  # 0: blocks run without
LEAST_FREE = 512 * 2**20  # bytes of VRAM for what the driver allocates for a graph
SHAPES = 2  # sets of shapes that are kept
PLACES = 2  # of the weights, for each block: with a LoRA and without
TRIES = 4  # to find the same temporaries in two calls one after the other: the first of all makes more
_ONE_CAPTURE = threading.Lock()  # at a time, which is what cudaMallocAsync allows: ComfyUI has a thread for each GPU
_UNFIT = object()  # in place of a graph that cannot be captured
Attend = Callable[[Tensor], Tensor]  # T [B, L, H * D] of q, k, v T [B, L, 3, H, D]


@dataclass
class _Seen:
    """A block that has run without a graph. plan: of its temporaries, if they have to be planned · ready: whether a
    graph can be captured."""

    plan: graph_memory.Plan | None
    times: int
    ready: bool


@dataclass
class _Captured:
    """graphs: one, or those before and behind the attention · memory: of their temporaries, if it is not their own ·
    attention: what lies between two graphs, q, k, v and the result."""

    graphs: list[torch.cuda.CUDAGraph]
    memory: Tensor | None
    attention: tuple[Tensor, Tensor] | None = None

    def replay(self, attend: Attend) -> None:
        self.graphs[0].replay()
        if self.attention is not None:
            qkv, out = self.attention
            out.copy_(attend(qkv))
            self.graphs[1].replay()


@dataclass
class _Shapes:
    """One set of shapes: the tensors that its graphs read and write, and the memory of their temporaries."""

    inputs: tuple[Tensor, ...] = ()
    rotary: Any = None  # a weak reference to what was copied last
    pool: Any = None
    memory: Tensor | None = None
    graphs: weakref.WeakKeyDictionary = field(default_factory=weakref.WeakKeyDictionary)  # block: {weights: graph}
    kinds: dict[tuple[bool, Hashable], _Seen | None] = field(default_factory=dict)  # what was seen last of each


class BlockGraphs:
    """The graphs of one model."""

    def __init__(self) -> None:
        self._shapes: dict[tuple, _Shapes] = {}
        self._broken = False  # a capture has failed; with cudaMallocAsync others would, too

    def __deepcopy__(self, memo: dict) -> BlockGraphs:
        return BlockGraphs()

    def run(
        self, block: Any, kind: Hashable, weights: tuple, compute: Callable[..., None], attend: Attend, apart: bool,
        tensors: tuple[Tensor, ...], streams: int,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """compute(attend, *tensors), which works in place on the first ``streams`` of the tensors; returns those.

        kind: of the block; all of one kind start the same kernels · weights: addresses of everything else that compute
        reads, and ranks · apart: ``attend`` is not to be a part of a graph. With a graph, what is returned are the
        graph's tensors.
        """
        device = tensors[0].device
        if device.index is not None and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):  # or a capture would record the other one's stream: nothing
                return self.run(block, kind, weights, compute, attend, apart, tensors, streams)
        if torch.cuda.is_current_stream_capturing() or self._broken or not enabled():
            compute(attend, *tensors)
            return tensors[:streams]
        weights = (apart, *weights)
        key = (device, streams, *((tensor.dtype, tensor.shape) for tensor in tensors))
        shapes = self._shapes.get(key)
        if shapes is None:
            while len(self._shapes) >= 2 * SHAPES:  # double and single blocks have different ones
                del self._shapes[next(iter(self._shapes))]
            shapes = self._shapes[key] = _Shapes()
        graphs = shapes.graphs.setdefault(block, {})
        found = graphs.pop(weights, None)
        if found is None or (isinstance(found, _Seen) and not found.ready):
            known = shapes.kinds.get((apart, kind))
            if known is None or not known.ready:
                # The first time compiles kernels, which a capture must not do.
                found = _watched(compute, attend, apart, tensors, known)
                shapes.kinds[apart, kind] = found if isinstance(found, _Seen) else None
                _keep(graphs, weights, found)
                return tensors[:streams]
            found = known
        _keep(graphs, weights, found)  # the last one used comes last
        if isinstance(found, _Seen) and torch.cuda.mem_get_info(device)[0] < LEAST_FREE:
            compute(attend, *tensors)
            return tensors[:streams]
        statics = None if found is _UNFIT else self._statics(shapes, tensors, streams)
        if statics is not None and isinstance(found, _Seen):
            found = graphs[weights] = self._capture(shapes, compute, attend, apart, statics, found.plan)
        if statics is None or found is _UNFIT:
            graphs[weights] = _UNFIT
            compute(attend, *tensors)
            return tensors[:streams]
        found.replay(attend)
        return statics[:streams]

    def _statics(self, shapes: _Shapes, tensors: tuple[Tensor, ...], streams: int) -> tuple[Tensor, ...] | None:
        """The graphs' inputs with the values of ``tensors``; None if there is no memory for them."""
        if not shapes.inputs:
            try:
                with torch.inference_mode(False):  # or they could not be written to outside of inference mode
                    shapes.inputs = tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in tensors)
            except torch.OutOfMemoryError:
                return None
        for i, (tensor, static) in enumerate(zip(tensors, shapes.inputs, strict=True)):
            if tensor is static:
                continue
            if i == streams:  # sines and cosines: the same for all blocks of a forward pass
                if shapes.rotary is not None and shapes.rotary() is tensor:
                    continue
                shapes.rotary = weakref.ref(tensor)
            static.copy_(tensor)
        return shapes.inputs

    def _capture(
        self, shapes: _Shapes, compute: Callable[..., None], attend: Attend, apart: bool, statics: tuple[Tensor, ...],
        plan: graph_memory.Plan | None,
    ) -> Any:  # fmt: skip
        """A _Captured of compute(attend, *statics), which does not run here; _UNFIT where it cannot be captured."""
        if plan is None:
            shapes.pool = shapes.pool or torch.cuda.graph_pool_handle()
            memory, place, pool = None, contextlib.nullcontext(), shapes.pool
        else:
            if shapes.memory is None or shapes.memory.numel() < plan.total:
                try:
                    with torch.inference_mode(False):
                        shapes.memory = torch.empty(plan.total, dtype=torch.uint8, device=statics[0].device)
                except torch.OutOfMemoryError:
                    log.info("SVDQ FLUX: no VRAM for the CUDA graph of a block, which takes %d bytes", plan.total)
                    return _UNFIT
            place, pool, memory = graph_memory.Use(plan, shapes.memory), None, shapes.memory
        # Not torch.cuda.graph(), which collects garbage and empties caches each time.
        current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
        stream.wait_stream(current)
        captured = _Captured([], memory)

        def begin() -> None:
            captured.graphs.append(torch.cuda.CUDAGraph())
            captured.graphs[-1].capture_begin(pool, capture_error_mode="thread_local")

        def divide(qkv: Tensor) -> Tensor:
            captured.attention = qkv, graph_memory.attention_result(qkv)
            captured.graphs[-1].capture_end()
            begin()
            return captured.attention[1]

        found: Any = captured
        with _ONE_CAPTURE, torch.cuda.stream(stream), _no_garbage_collection():
            try:
                if plan is not None:
                    pool, *_ = _pool_of_nothing(statics[0].device)
                begin()
                with place:
                    compute(divide if apart else attend, *statics)
                captured.graphs[-1].capture_end()
            except Exception as error:
                log.warning("SVDQ FLUX: a block runs without a CUDA graph, slower, with the same result: %s", error)
                # A block that is not of its kind is found out before anything is allocated.
                changed = isinstance(error, graph_memory.Changed)
                found, self._broken = _UNFIT, graph_memory.needed() and not changed
                # What was allocated for the graph has to go before it ends.
                traceback.clear_frames(error.__traceback__)
                if captured.graphs:
                    with contextlib.suppress(RuntimeError):  # of a capture that is broken already, or has ended
                        captured.graphs[-1].capture_end()
                    # Where that fails, the allocator goes on as if the capture did, and frees nothing any more.
                    with contextlib.suppress(RuntimeError):
                        torch._C._cuda_endAllocateToPool(statics[0].device.index, pool)
        current.wait_stream(stream)
        return found

    def count(self) -> int:
        """Graphs that there are."""
        places = (graphs for shapes in self._shapes.values() for graphs in shapes.graphs.values())
        return sum(isinstance(found, _Captured) for graphs in places for found in graphs.values())

    @property
    def held(self) -> int:
        """Bytes of VRAM that they take, without what torch's allocator keeps for them."""
        tensors = [t for shapes in self._shapes.values() for t in (*shapes.inputs, shapes.memory) if t is not None]
        return sum(tensor.nbytes for tensor in tensors)

    def clear(self) -> int:
        """Give up all graphs and their memory; returns what was ``held``."""
        held = self.held
        self._shapes.clear()
        return held


def _keep(graphs: dict[tuple, Any], weights: tuple, found: Any) -> None:
    """As the one that was used last, of PLACES."""
    while len(graphs) >= PLACES:
        del graphs[next(iter(graphs))]
    graphs[weights] = found


@functools.cache
def _pool_of_nothing(device: torch.device) -> tuple[tuple[int, int], torch.cuda.CUDAGraph, Tensor]:
    """Of all graphs that allocate nothing, with a graph that stays in it, to be captured on the current stream.

    torch keeps 48 KB of RAM for each pool that there has been, and refuses a pool that no graph is in any more.
    """
    pool, graph, some = torch.cuda.graph_pool_handle(), torch.cuda.CUDAGraph(), torch.zeros(1, device=device)
    graph.capture_begin(pool, capture_error_mode="thread_local")
    try:
        some.zero_()
    finally:
        graph.capture_end()
    return pool, graph, some


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """What it would free, a model's memory say, a capture does not allow to be freed."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _watched(
    compute: Callable[..., None], attend: Attend, apart: bool, tensors: tuple[Tensor, ...], before: _Seen | None
) -> Any:
    """compute(attend, *tensors), without a graph. before: what was seen the time before."""
    if not (apart or graph_memory.needed()):
        compute(attend, *tensors)
        return _Seen(None, 1, True)
    with graph_memory.Watch() as watch:
        compute(watch.unseen(attend) if apart else attend, *tensors)
    if before is None:
        return _Seen(watch.plan, 1, False)
    same = watch.plan == before.plan
    return _Seen(watch.plan, before.times + 1, same) if same or before.times < TRIES else _UNFIT


@functools.cache
def enabled() -> bool:
    """What the environment says of graphs."""
    return os.environ.get(VARIABLE, "").strip() != "0"
