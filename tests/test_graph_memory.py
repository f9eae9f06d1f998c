"""Temporaries of a computation in memory that was there before: with CPU tensors in the place of CUDA's."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

pytestmark = pytest.mark.comfy


@pytest.fixture
def graph_memory(comfy, monkeypatch: pytest.MonkeyPatch):
    from svdq.model import graph_memory

    monkeypatch.setattr(graph_memory, "DEVICE", "cpu")
    return graph_memory


def compute(x: Tensor, y: Tensor) -> None:
    """In place; with every way in which blocks come by new tensors, and more."""
    first = torch.empty(4, 8)
    first.copy_(x)
    both = torch.cat((first, y), 1)
    del first
    doubled = x.new_empty(4, 8)
    doubled.copy_(both[:, :8] + both[:, :8])
    heads = both.view(1, 4, 2, 8).transpose(1, 2)
    attention = torch.nn.functional.silu(heads).transpose(1, 2).reshape(4, 16)
    turned = heads.transpose(2, 3).reshape(4, 16).float().to(torch.float64).chunk(2, dim=1)[1].contiguous()
    attention += torch.matmul(turned, turned.t()).sum(dim=1, keepdim=True).to(x.dtype)
    nothing = torch.empty(0)
    words = torch.empty_like(x, dtype=torch.int16).fill_(3)
    words += torch.zeros_like(words) + x.new_zeros(8, dtype=torch.int16)
    x.add_(doubled + attention[:, :8].contiguous() + nothing.sum(dim=0))
    y.mul_(words.float())


def sizes(plan) -> list[int]:
    """Bytes of each temporary."""
    return [made.size for _, all_made in plan.operators for made in all_made]


def arguments() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 8, generator=generator), torch.randn(4, 8, generator=generator)


@pytest.mark.parametrize("inference", [False, True])
def test_same_results_in_memory_that_was_there(graph_memory, inference: bool) -> None:
    with torch.inference_mode(inference):
        expected, watched, used = arguments(), arguments(), arguments()
        compute(*expected)
        with graph_memory.Watch() as watch:
            compute(*watched)
        plan = watch.plan
        with torch.inference_mode(False):
            memory = torch.zeros(plan.total, dtype=torch.uint8)
        with graph_memory.Use(plan, memory):
            compute(*used)
        for got in (watched, used):
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert memory.any(), "nothing was put there"
    assert plan.total < sum(-(-size // 512) * 512 for size in sizes(plan)), "memory is used again"


def test_nothing_is_allocated(graph_memory) -> None:
    """Not inside of operators either, by torch's own record of memory."""

    def allocated(mode) -> int:
        values = arguments()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record, mode:
            compute(*values)
        return sum(max(0, event.nbytes()) for event in record.profiler.kineto_results.events())

    with torch.inference_mode():
        watch = graph_memory.Watch()
        assert allocated(watch) >= sum(sizes(watch.plan)) > 0
        assert allocated(graph_memory.Use(watch.plan, torch.zeros(watch.plan.total, dtype=torch.uint8))) == 0


def test_what_allocates_by_itself_is_refused(graph_memory) -> None:
    def attend() -> Tensor:
        heads = torch.ones(1, 2, 4, 8)
        return torch.nn.functional.scaled_dot_product_attention(heads, heads, heads)

    with graph_memory.Watch() as watch:
        attend()
    memory = torch.zeros(watch.plan.total, dtype=torch.uint8)
    with pytest.raises(graph_memory.Changed, match=r"attention\S* cannot write"), graph_memory.Use(watch.plan, memory):
        attend()


def test_what_is_alive_does_not_overlap(graph_memory) -> None:
    def allocate() -> None:
        kept = [torch.empty(size) for size in (10, 300, 7)]
        for size in (200, 40, 500):
            del kept[0]
            kept.append(torch.empty(size))
            places = sorted((tensor.data_ptr(), tensor.data_ptr() + 4 * len(tensor)) for tensor in kept)
            assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(places))

    with graph_memory.Watch() as watch:
        allocate()
    with graph_memory.Use(watch.plan, torch.zeros(watch.plan.total, dtype=torch.uint8)):
        allocate()
    assert len(sizes(watch.plan)) == 6 and watch.plan.total == 3584, "the first gap that is large enough"


@pytest.mark.parametrize(
    "make", [lambda n: torch.empty(n), lambda n: torch.ones(3).new_zeros(n), lambda n: torch.zeros_like(torch.ones(n))]
)
def test_another_computation_is_noticed(graph_memory, make) -> None:
    with graph_memory.Watch() as watch:
        make(8).fill_(1)
    memory = torch.zeros(watch.plan.total, dtype=torch.uint8)
    changed = pytest.raises(graph_memory.Changed, match=r"is \(9,\); without a graph it was \(8,\)")
    with changed, graph_memory.Use(watch.plan, memory):
        make(9)
    changed = pytest.raises(graph_memory.Changed, match=r"\d is aten.eye.default; without a graph it was aten")
    with changed, graph_memory.Use(watch.plan, memory):
        torch.eye(8)
    changed = pytest.raises(graph_memory.Changed, match=r"\d is \S+; without a graph it was none")
    with changed, graph_memory.Use(watch.plan, memory):
        make(8).fill_(1)
        make(8)


def test_operators_on_other_shapes_are_noticed(graph_memory) -> None:
    def compute(*values: Tensor) -> Tensor:
        return torch.cat(values) * 2

    with graph_memory.Watch() as watch:
        compute(torch.ones(4), torch.ones(4))
    memory = torch.zeros(watch.plan.total, dtype=torch.uint8)
    for others in ((torch.ones(4),), (torch.ones(4), torch.ones(2))):
        changed = pytest.raises(graph_memory.Changed, match="without a graph it was")
        with changed, graph_memory.Use(watch.plan, memory):
            compute(*others)
