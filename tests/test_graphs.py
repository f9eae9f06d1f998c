"""When blocks are recorded as CUDA graphs and what is replayed: on the CPU, with operators in the place of kernels."""

from __future__ import annotations

import contextlib
import gc
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.comfy

HEADS, SIZE = 2, 4


class Graph(TorchDispatchMode):
    """A torch.cuda.CUDAGraph whose replay computes every recorded operator again, into the tensors of the capture.

    What is computed while it records is undone, as a capture computes nothing.
    """

    made = 0
    pools: ClassVar[set[Any]] = set()

    def __init__(self) -> None:
        super().__init__()
        self._operators: list[tuple[Any, tuple, dict, Any]] = []
        Graph.made += 1

    def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
        assert not gc.isenabled(), "it could free what a capture must not"
        Graph.pools.add(pool)
        self.__enter__()

    def capture_end(self) -> None:
        self.__exit__(None, None, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        before = args[0].clone() if func._schema.is_mutable else None
        out = func(*args, **(kwargs or {}))
        self._operators.append((func, args, kwargs or {}, out))
        if before is not None:
            args[0].copy_(before)
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self._operators:
            new = func(*args, **kwargs)
            if isinstance(out, Tensor) and not func._schema.is_mutable and not func.is_view:
                out.copy_(new)


@pytest.fixture
def graphs(comfy, monkeypatch: pytest.MonkeyPatch):
    """model.graphs with torch.cuda on the CPU and an allocator that captures must not use."""
    from svdq.model import graph_memory, graphs

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {
        "is_current_stream_capturing": lambda: False,
        "current_stream": lambda: stream,
        "Stream": lambda: stream,
        "stream": lambda of: contextlib.nullcontext(),
        "CUDAGraph": Graph,
        "graph_pool_handle": lambda: (0, Graph.made),
        "get_allocator_backend": lambda: "cudaMallocAsync",
        "mem_get_info": lambda device: (8 * 2**30, 24 * 2**30),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(graph_memory, "DEVICE", "cpu")
    graphs.enabled.cache_clear()
    graphs._pool_of_nothing.cache_clear()
    with graphs._no_garbage_collection():
        graphs._pool_of_nothing(torch.device("cpu"))
    Graph.made = 0
    yield graphs
    graphs.enabled.cache_clear()
    graphs._pool_of_nothing.cache_clear()
    Graph.pools.clear()


class Block:
    """x += its attention, of heads that ``weight`` makes, times what was made before it."""

    def __init__(self, weight: float, kind: str = ""):
        self.weight, self.kind = weight, kind

    def compute(self, attend: Any, x: Tensor) -> None:
        qkv = x.new_empty(1, len(x), 3, HEADS, SIZE)
        qkv.copy_(x.view(1, len(x), 1, HEADS, SIZE) * self.weight)
        factor = x * 0.5
        attention = attend(qkv)
        x.add_(attention[0] * factor)


def add_up(qkv: Tensor) -> Tensor:
    return (qkv[:, :, 0] + 2 * qkv[:, :, 1] + 3 * qkv[:, :, 2]).flatten(2)


def passes(graphs: Any, held: Any, blocks: list[Block], x: Tensor, attends: list, apart: bool) -> list[Tensor]:
    """Results of one pass through all blocks for each of ``attends``."""
    results = []
    with torch.inference_mode():
        for attend in attends:
            stream = x.clone()
            for block in blocks:
                (stream,) = held.run(block, block.kind, (block.weight,), block.compute, attend, apart, (stream,), 1)
            results.append(stream.clone())
    return results


def expected_of(blocks: list[Block], x: Tensor, attends: list) -> list[Tensor]:
    results = []
    for attend in attends:
        stream = x.clone()
        for block in blocks:
            block.compute(attend, stream)
        results.append(stream)
    return results


def some(rows: int = 5) -> Tensor:
    return torch.randn(rows, HEADS * SIZE, generator=torch.Generator().manual_seed(rows))


@pytest.mark.parametrize("apart", [False, True])
def test_a_replay_computes_the_same(graphs, apart: bool) -> None:
    held, blocks, x = graphs.BlockGraphs(), [Block(0.5), Block(0.25)], some()
    found = passes(graphs, held, blocks, x, [add_up] * 5, apart)
    assert all(torch.equal(a, b) for a, b in zip(found, expected_of(blocks, x, [add_up] * 5), strict=True))
    assert held.count() == len(blocks) and Graph.made == len(blocks) * (1 + apart)
    assert gc.isenabled()
    assert held.held > 0 and held.clear() > 0
    assert held.count() == held.held == 0


def test_all_graphs_are_in_one_pool(graphs) -> None:
    """torch keeps RAM for each one that there has been: 2.5 MB for every model that is loaded, were it one a graph."""
    for _ in range(2):
        held, blocks = graphs.BlockGraphs(), [Block(0.5), Block(0.25)]
        passes(graphs, held, blocks, some(), [add_up] * 5, apart=True)
        assert held.count() == len(blocks)
    assert len(Graph.pools) == 1


def test_attention_of_others_is_called_each_time(graphs) -> None:
    """With its own arguments, and not while anything is recorded."""
    held, blocks, x, seen = graphs.BlockGraphs(), [Block(0.5), Block(0.25)], some(), []

    def attention(number: int) -> Any:
        def attend(qkv: Tensor) -> Tensor:
            seen.append(number)
            inside = torch.ones(100 * number + 1).sum()  # not a temporary of the block
            return add_up(qkv) * number + 0 * inside

        return attend

    attends = [attention(number) for number in range(6)]
    found = passes(graphs, held, blocks, x, attends, apart=True)
    assert seen == [number for number in range(6) for _ in blocks]
    assert all(torch.equal(a, b) for a, b in zip(found, expected_of(blocks, x, attends), strict=True))
    assert held.count() == len(blocks)


def test_both_kinds_of_attention_in_turns(graphs) -> None:
    held, blocks, x = graphs.BlockGraphs(), [Block(0.5)], some()
    (right,) = expected_of(blocks, x, [add_up])
    for apart in (False, True) * 5:
        assert torch.equal(passes(graphs, held, blocks, x, [add_up], apart)[0], right)
    assert held.count() == 2 and Graph.made == 3


def test_threads_record_one_after_the_other(graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    """ComfyUI's MultiGPU nodes have one for each GPU, and the allocator allows one capture at a time."""
    under_way, begin, end = [], Graph.capture_begin, Graph.capture_end

    def capture_begin(self: Graph, pool: Any, capture_error_mode: str) -> None:
        under_way.append(self)
        time.sleep(0.02)
        assert len(under_way) == 1, "Only one capture at a time is allowed in a process"
        begin(self, pool, capture_error_mode)

    def capture_end(self: Graph) -> None:
        end(self)
        under_way.remove(self)

    monkeypatch.setattr(Graph, "capture_begin", capture_begin)
    monkeypatch.setattr(Graph, "capture_end", capture_end)
    models = [(graphs.BlockGraphs(), [Block(0.1 * n), Block(0.2 * n)], some(n)) for n in range(1, 5)]
    with ThreadPoolExecutor(len(models)) as threads:
        running = [threads.submit(passes, graphs, *model, [add_up] * 5, True) for model in models]
        found = [one.result() for one in running]
    for (held, blocks, x), results in zip(models, found, strict=True):
        assert held.count() == len(blocks)
        right = expected_of(blocks, x, [add_up] * 5)
        assert all(torch.equal(a, b) for a, b in zip(results, right, strict=True))
    assert gc.isenabled()


def test_a_model_on_another_gpu_than_the_current_one(graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs with its own as the current one, whose stream a capture is of."""
    current, seen = [0], []

    class Elsewhere(Tensor):
        device = torch.device("cuda", 1)

    @contextlib.contextmanager
    def device(of: torch.device):
        before, current[0] = current[0], of.index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setenv("SVDQ_CUDA_GRAPHS", "0")
    x = some().as_subclass(Elsewhere)
    run = graphs.BlockGraphs().run
    run(Block(1.0), "", (), lambda attend, x: seen.append(current[0]), add_up, False, (x,), 1)
    assert seen == [1] and current == [0]


def test_blocks_of_a_kind_are_recorded_in_the_first_pass(graphs) -> None:
    """All but those that are watched: two that ask for the same."""
    held, x = graphs.BlockGraphs(), some()
    blocks = [Block(0.1 * number, kind) for number in range(1, 6) for kind in ("double", "single")]
    attends = [add_up] * 4
    right = expected_of(blocks, x, attends)
    (first,) = passes(graphs, held, blocks, x, attends[:1], apart=False)
    assert torch.equal(first, right[0]) and held.count() == Graph.made == len(blocks) - 4
    found = passes(graphs, held, blocks, x, attends[1:], apart=False)
    assert all(torch.equal(a, b) for a, b in zip(found, right[1:], strict=True))
    assert held.count() == Graph.made == len(blocks)


class OtherBlock(Block):
    """Starts another kernel than its kind."""

    def compute(self, attend: Any, x: Tensor) -> None:
        super().compute(attend, x)
        x.add_(torch.tanh(x) * self.weight)


def test_a_block_that_is_not_of_its_kind_runs_without(
    graphs, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *which: None)
    held, x = graphs.BlockGraphs(), some()
    blocks = [Block(0.1), Block(0.2), Block(0.3), OtherBlock(0.4), Block(0.5)]
    found = passes(graphs, held, blocks, x, [add_up] * 4, apart=False)
    assert all(torch.equal(a, b) for a, b in zip(found, expected_of(blocks, x, [add_up] * 4), strict=True))
    assert held.count() == len(blocks) - 1 and len(caplog.records) == 1
    assert "without a graph it was" in caplog.text


def test_weights_elsewhere_need_a_new_graph(graphs) -> None:
    held, block, x = graphs.BlockGraphs(), Block(0.5), some()
    passes(graphs, held, [block], x, [add_up] * 4, False)
    for weight in (0.75, 0.5, 0.75, 0.25):  # PLACES of them are kept
        block.weight = weight
        found = passes(graphs, held, [block], x, [add_up] * 4, False)
        assert all(torch.equal(a, b) for a, b in zip(found, expected_of([block], x, [add_up] * 4), strict=True))
    assert Graph.made == 3 and held.count() == 2


def test_temporaries_that_change_are_not_recorded(graphs) -> None:
    held, block, x, sizes = graphs.BlockGraphs(), Block(0.5), some(), iter(range(1, 99))

    def attend(qkv: Tensor) -> Tensor:
        return add_up(qkv) + 0 * torch.ones(512 * next(sizes)).sum()

    found = passes(graphs, held, [block], x, [attend] * 8, False)
    assert all(torch.equal(a, b) for a, b in zip(found, expected_of([block], x, [attend] * 8), strict=True))
    assert held.count() == Graph.made == 0


def test_what_cannot_be_captured_runs_without(
    graphs, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, block, x, calls, ended = graphs.BlockGraphs(), Block(0.5), some(), [], []
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *which: ended.append(which))

    def attend(qkv: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("operation not permitted when stream is capturing")
        return add_up(qkv)

    found = passes(graphs, held, [block], x, [attend] * 5, False)
    assert all(torch.equal(a, b) for a, b in zip(found, expected_of([block], x, [add_up] * 5), strict=True))
    assert held.count() == 0 and "not permitted" in caplog.text
    assert ended == [(None, (0, 0))], "the allocator's side of the capture"
    other = Block(0.25)
    passes(graphs, held, [other], x, [add_up] * 5, False)
    assert held.count() == 0 and len(caplog.records) == 1, "the allocator would refuse all others"


def test_no_pool_for_a_graph(graphs, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing has begun that would have to end."""

    def refuse(device: torch.device) -> Any:
        raise RuntimeError("no pool")

    held, block, x = graphs.BlockGraphs(), Block(0.5), some()
    with monkeypatch.context() as patch:
        patch.setattr(graphs, "_pool_of_nothing", refuse)
        found = passes(graphs, held, [block], x, [add_up] * 5, False)
    assert all(torch.equal(a, b) for a, b in zip(found, expected_of([block], x, [add_up] * 5), strict=True))
    assert held.count() == 0 and "no pool" in caplog.text


@pytest.mark.parametrize("name", ["inputs", "memory"])
def test_no_memory_for_a_graph(graphs, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    held, block, x, empty = graphs.BlockGraphs(), Block(0.5), some(), torch.empty

    def refuse(*size: Any, **options: Any) -> Tensor:
        if (options.get("dtype") == torch.uint8) == (name == "memory"):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return empty(*size, **options)

    monkeypatch.setattr(torch, "empty", refuse)
    found = passes(graphs, held, [block], x, [add_up] * 5, False)
    monkeypatch.undo()
    assert all(torch.equal(a, b) for a, b in zip(found, expected_of([block], x, [add_up] * 5), strict=True))
    assert held.count() == 0


def test_a_computation_out_of_memory_says_so(graphs) -> None:
    def attend(qkv: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    held, blocks, x = graphs.BlockGraphs(), [Block(0.5)], some()
    for attends in ([attend], [add_up] * 4 + [attend], [add_up] * 4):
        with contextlib.ExitStack() as stack:
            if attends[-1] is attend:
                stack.enter_context(pytest.raises(torch.OutOfMemoryError))
            found = passes(graphs, held, blocks, x, attends, apart=True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected_of(blocks, x, attends), strict=True))


@pytest.mark.parametrize(("variable", "expected"), [("", 1), ("1", 1), ("0", 0)])
def test_the_environment_switches_them_off(
    graphs, monkeypatch: pytest.MonkeyPatch, variable: str, expected: int
) -> None:
    monkeypatch.setenv("SVDQ_CUDA_GRAPHS", variable)
    held, blocks, x = graphs.BlockGraphs(), [Block(0.5)], some()
    found = passes(graphs, held, blocks, x, [add_up] * 5, False)
    assert all(torch.equal(a, b) for a, b in zip(found, expected_of(blocks, x, [add_up] * 5), strict=True))
    assert held.count() == expected and (held.held > 0) == (expected > 0)


def test_they_wait_for_room(graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    held, blocks, x, free = graphs.BlockGraphs(), [Block(0.5)], some(), [2**20]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0], 24 * 2**30))
    for now, count in ((2**20, 0), (2**30, 1), (2**20, 1)):
        free[0] = now
        found = passes(graphs, held, blocks, x, [add_up] * 4, True)
        assert all(torch.equal(a, b) for a, b in zip(found, expected_of(blocks, x, [add_up] * 4), strict=True))
        assert held.count() == count
