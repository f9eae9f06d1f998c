"""CUDA graphs of blocks: Python takes longer to start the 15 to 40 kernels of a block than a fast GPU to run them.

A graph belongs to one block, one set of shapes and one place of the weights; when ComfyUI moves weights, a LoRA brings
others or the size of the picture changes, the block runs without a graph once and gets a new one at the next call. All
graphs of a model share their inputs (a block works in place on the tensors that the block before it left) and the
memory of their temporaries, which is planned here where the allocator cannot do it (graph_memory.py).
"""

from __future__ import annotations

import contextlib
import functools
import logging
import traceback
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import graph_memory

log = logging.getLogger(__name__)

LEAST_MEMORY = 20 * 2**30  # bytes of a GPU that has room for the temporaries of graphs beside everything else
SHAPES = 2  # sets of shapes that are kept
PLACES = 2  # of the weights, for each block: with a LoRA and without
TRIES = 4  # to find the same temporaries in two calls one after the other: the first of all makes more
_UNFIT = object()  # in place of a graph that cannot be captured


@dataclass
class _Seen:
    """A block that has run without a graph. plan: of its temporaries, if they have to be planned · ready: whether a
    graph can be captured."""

    plan: graph_memory.Plan | None
    times: int
    ready: bool


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    memory: Tensor | None  # of its temporaries, if it does not have its own


@dataclass
class _Shapes:
    """One set of shapes: the tensors that its graphs read and write, and the memory of their temporaries."""

    inputs: tuple[Tensor, ...] = ()
    rotary: Any = None  # a weak reference to what was copied last
    pool: Any = None
    memory: Tensor | None = None
    graphs: weakref.WeakKeyDictionary = field(default_factory=weakref.WeakKeyDictionary)  # block: {weights: graph}


class BlockGraphs:
    """The graphs of one model."""

    def __init__(self) -> None:
        self._shapes: dict[tuple, _Shapes] = {}

    def __deepcopy__(self, memo: dict) -> BlockGraphs:
        return BlockGraphs()

    def run(
        self, block: Any, weights: tuple, compute: Callable[..., None], tensors: tuple[Tensor, ...], streams: int
    ) -> tuple[Tensor, ...]:
        """compute(*tensors), which works in place on the first ``streams`` of them; returns those.

        weights: addresses of everything else that compute reads, and ranks. With a graph, what is returned are the
        graph's tensors.
        """
        device = tensors[0].device
        if torch.cuda.is_current_stream_capturing() or not _has_room(device.index):
            compute(*tensors)
            return tensors[:streams]
        key = (device, streams, *((tensor.dtype, tensor.shape) for tensor in tensors))
        shapes = self._shapes.get(key)
        if shapes is None:
            while len(self._shapes) >= 2 * SHAPES:  # double and single blocks have different ones
                del self._shapes[next(iter(self._shapes))]
            shapes = self._shapes[key] = _Shapes()
        graphs = shapes.graphs.setdefault(block, {})
        if weights not in graphs:
            while len(graphs) >= PLACES:
                del graphs[next(iter(graphs))]
            # The first time compiles kernels, which a capture must not do.
            graphs[weights] = _watched(compute, tensors, None)
            return tensors[:streams]
        found = graphs[weights] = graphs.pop(weights)  # the last one used comes last
        if isinstance(found, _Seen) and not found.ready:
            graphs[weights] = _watched(compute, tensors, found)
            return tensors[:streams]
        if found is _UNFIT:
            compute(*tensors)
            return tensors[:streams]
        statics = self._statics(shapes, tensors, streams)
        if isinstance(found, _Seen):
            found = graphs[weights] = self._capture(shapes, compute, statics, found.plan)
        if found is _UNFIT:
            compute(*statics)
        else:
            found.graph.replay()
        return statics[:streams]

    def _statics(self, shapes: _Shapes, tensors: tuple[Tensor, ...], streams: int) -> tuple[Tensor, ...]:
        """The graphs' inputs with the values of ``tensors``."""
        if not shapes.inputs:
            with torch.inference_mode(False):  # or they could not be written to outside of inference mode
                shapes.inputs = tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in tensors)
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
        self, shapes: _Shapes, compute: Callable[..., None], statics: tuple[Tensor, ...], plan: graph_memory.Plan | None
    ) -> Any:
        """A _Captured of compute(*statics), which does not run here; _UNFIT where it cannot be captured."""
        if plan is None:
            shapes.pool = shapes.pool or torch.cuda.graph_pool_handle()
            memory, place, pool = None, contextlib.nullcontext(), (shapes.pool,)
        else:
            if shapes.memory is None or shapes.memory.numel() < plan.total:
                with torch.inference_mode(False):
                    shapes.memory = torch.empty(plan.total, dtype=torch.uint8, device=statics[0].device)
            # Graphs that allocate nothing have nothing to share.
            memory, place, pool = shapes.memory, graph_memory.Use(plan, shapes.memory), ()
        # Not torch.cuda.graph(), which collects garbage and empties caches each time.
        current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
        stream.wait_stream(current)
        graph = torch.cuda.CUDAGraph()
        found: Any = _Captured(graph, memory)
        with torch.cuda.stream(stream):
            try:
                graph.capture_begin(*pool, capture_error_mode="thread_local")
                with place:
                    compute(*statics)
            except Exception as error:
                log.warning("SVDQ FLUX: a block runs without a CUDA graph: %s", error)
                found = _UNFIT
                # What was allocated for the graph has to go before it ends.
                traceback.clear_frames(error.__traceback__)
                with contextlib.suppress(RuntimeError):  # of a capture that is broken already
                    graph.capture_end()
            else:
                graph.capture_end()
        current.wait_stream(stream)
        return found

    def count(self) -> int:
        """Graphs that there are."""
        places = (graphs for shapes in self._shapes.values() for graphs in shapes.graphs.values())
        return sum(isinstance(found, _Captured) for graphs in places for found in graphs.values())

    def clear(self) -> None:
        """Give up all graphs and their memory."""
        self._shapes.clear()


def _watched(compute: Callable[..., None], tensors: tuple[Tensor, ...], before: _Seen | None) -> Any:
    """compute(*tensors), without a graph. before: what was seen the time before."""
    if not graph_memory.needed():
        compute(*tensors)
        return _Seen(None, 1, True)
    with graph_memory.Watch() as watch:
        compute(*tensors)
    if before is None:
        return _Seen(watch.plan, 1, False)
    same = watch.plan == before.plan
    return _Seen(watch.plan, before.times + 1, same) if same or before.times < TRIES else _UNFIT


@functools.cache
def _has_room(index: int | None) -> bool:
    return torch.cuda.get_device_properties(index).total_memory >= LEAST_MEMORY
