"""Timing on this machine's GPU: CUDA graphs of calls whose operands are not in the L2 cache, and cold compilation."""

from __future__ import annotations

import math
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch

from svdq.benchmarks.predict import GPUS
from svdq.kernels.device import INT4_CAPABILITIES, describe
from svdq.kernels.tiles import TILES

T = TypeVar("T")
L2_TIMES = 3  # operands that take turns are this many times as large as the L2 cache


@dataclass(frozen=True)
class Card:
    """The GPU that is measured. device: torch's name for it · arch: "sm_86" · l2_bytes · int4_tops: what its INT4
    tensor cores can do at boost clock, None where it has none · emulated: whether its INT4 GEMM runs without them."""

    name: str
    arch: str
    l2_bytes: int
    int4_tops: float | None
    device: str = "cuda"

    @property
    def emulated(self) -> bool:
        return self.int4_tops is None

    @property
    def has_gemm(self) -> bool:
        """Whether the INT4 GEMM runs at all."""
        return self.arch in TILES


def this_card() -> Card:
    """The current CUDA device."""
    device, properties = describe("cuda"), torch.cuda.get_device_properties("cuda")
    tops = None
    if device.capability in INT4_CAPABILITIES:
        rates = next(gpu for gpu in GPUS if gpu.arch == device.architecture)
        rates = replace(rates, sms=properties.multi_processor_count, ghz=properties.clock_rate / 1e6)
        tops = rates.int4_ops / 1e12
    return Card(device.name, device.architecture, properties.L2_cache_size, tops)


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call: median, and the values that 10 and 90 % of the samples are below. A sample is a whole
    graph of calls, divided by their number."""

    us: float
    low_us: float
    high_us: float
    samples: int


def rotating(make: Callable[[], T], nbytes: int, card: Card) -> list[T]:
    """As many sets of operands of ``nbytes`` each as it takes for each to leave the L2 cache before its next turn."""
    return [make() for _ in range(max(2, math.ceil(L2_TIMES * card.l2_bytes / nbytes)))]


def time_calls(calls: Sequence[Callable[[], object]], seconds: float = 0.3) -> Timing:
    """Time of one of ``calls``, which do the same on different operands, measured for about ``seconds``."""
    for call in calls:  # compiles
        call()
    graph = _captured(calls, 1)
    once = min(_milliseconds(graph, 3))
    rounds = max(1, math.ceil(2.0 / once))  # a graph of 2 ms: its start, some microseconds, does not count
    if rounds > 1:
        graph = _captured(calls, rounds)
    replays = min(200, max(10, math.ceil(seconds * 1e3 / (once * rounds))))
    samples = [ms * 1e3 / (rounds * len(calls)) for ms in _milliseconds(graph, replays)]
    tenths = statistics.quantiles(samples, n=10)
    return Timing(statistics.median(samples), tenths[0], tenths[-1], len(samples))


def _captured(calls: Sequence[Callable[[], object]], rounds: int) -> torch.cuda.CUDAGraph:
    """A graph of all ``calls``, ``rounds`` times over."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            results = [call() for call in calls]  # all alive: results do not share memory, which would stay in L2
    del results
    return graph


def _milliseconds(graph: torch.cuda.CUDAGraph, times: int) -> list[float]:
    """GPU time of each of ``times`` runs, after one that does not count."""
    graph.replay()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(times)]
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    synchronize()
    return [start.elapsed_time(end) for start, end in events]


def synchronize() -> None:
    """Wait for the GPU."""
    torch.cuda.synchronize()


def copy_gbs(card: Card) -> float:
    """GB/s, read and written, of a kernel that reads one tensor and writes another of the same size.

    Not ``copy_``: in a graph the copy engine does it, at two thirds of the speed that kernels reach on an H200.
    """
    nbytes = max(512 * 2**20, 4 * card.l2_bytes)
    source = torch.randn(nbytes // 4, device=card.device)
    target = torch.empty_like(source)
    return 2 * nbytes / time_calls([lambda: torch.neg(source, out=target)]).us / 1e3


@contextmanager
def empty_triton_cache() -> Iterator[Path]:
    """Triton finds nothing compiled, as on a machine that never ran it. What this process has loaded stays loaded."""
    name = "TRITON_CACHE_DIR"
    before = os.environ.get(name)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[name] = folder
        try:
            yield Path(folder)
        finally:
            del os.environ[name]
            if before is not None:
                os.environ[name] = before
