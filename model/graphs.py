"""CUDA graphs of blocks: Python takes longer to start the 15 to 40 kernels of a block than a fast GPU to run them.

A graph belongs to one block, one set of shapes and one place of the weights; when ComfyUI moves weights, a LoRA brings
others or the size of the picture changes, the block runs without a graph once and gets a new one at the next call. All
graphs of a model share their inputs (a block works in place on the tensors that the block before it left) and the
memory of their temporaries.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

LEAST_MEMORY = 20 * 2**30  # bytes of a GPU that has room for the temporaries of graphs beside everything else
SHAPES = 2  # sets of shapes that are kept
PLACES = 2  # of the weights, for each block: with a LoRA and without
_UNFIT = object()  # in place of a graph that cannot be captured


@dataclass
class _Shapes:
    """One set of shapes: the tensors that its graphs read and write, and the memory of their temporaries."""

    inputs: tuple[Tensor, ...] = ()
    rotary: Any = None  # a weak reference to what was copied last
    pool: Any = None
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
            graphs[weights] = None
            compute(*tensors)
            return tensors[:streams]
        graph = graphs[weights] = graphs.pop(weights)  # the last one used comes last
        if graph is _UNFIT:
            compute(*tensors)
            return tensors[:streams]
        statics = self._statics(shapes, tensors, streams)
        if graph is None:
            graph = graphs[weights] = self._capture(shapes, compute, statics)
        if graph is _UNFIT:
            compute(*statics)
        else:
            graph.replay()
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

    def _capture(self, shapes: _Shapes, compute: Callable[..., None], statics: tuple[Tensor, ...]) -> Any:
        """A graph of compute(*statics), which does not run here; _UNFIT where it cannot be captured."""
        if shapes.pool is None:
            shapes.pool = torch.cuda.graph_pool_handle()
        # Not torch.cuda.graph(), which collects garbage and empties caches each time.
        current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
        stream.wait_stream(current)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            graph.capture_begin(pool=shapes.pool, capture_error_mode="thread_local")
            try:
                compute(*statics)
            except Exception as error:
                log.warning("SVDQ FLUX: a block runs without a CUDA graph: %s", error)
                with contextlib.suppress(RuntimeError):  # of a capture that is broken already
                    graph.capture_end()
                graph = _UNFIT
            else:
                graph.capture_end()
        current.wait_stream(stream)
        return graph

    def count(self) -> int:
        """Graphs that there are."""
        places = (graphs for shapes in self._shapes.values() for graphs in shapes.graphs.values())
        return sum(graph is not None and graph is not _UNFIT for graphs in places for graph in graphs.values())

    def clear(self) -> None:
        """Give up all graphs and their memory."""
        self._shapes.clear()


@functools.cache
def _has_room(index: int | None) -> bool:
    return torch.cuda.get_device_properties(index).total_memory >= LEAST_MEMORY
