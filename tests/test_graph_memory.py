"""Temporaries of a computation in memory that was there before: with CPU tensors in the place of CUDA's."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

pytestmark = pytest.mark.comfy


@pytest.fixture
def graph_memory(comfy, monkeypatch: pytest.MonkeyPatch):
    from svdq.model import graph_memory

    monkeypatch.setattr(graph_memory, "DEVICE", "cpu")
    return graph_memory


def compute(x: Tensor, y: Tensor) -> None:
    """In place; with every way in which blocks come by new tensors."""
    first = torch.empty(4, 8)
    first.copy_(x)
    both = torch.cat((first, y), 1)
    del first
    doubled = x.new_empty(4, 8)
    doubled.copy_(both[:, :8] * 2)
    heads = both.view(1, 4, 2, 8).transpose(1, 2)
    attention = scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).reshape(4, 16)
    nothing = torch.empty(0)
    words = torch.empty_like(x, dtype=torch.int16).fill_(3)
    x.add_(doubled + attention[:, :8].contiguous() + nothing.sum())
    y.mul_(words)


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
    assert plan.total < sum(-(-size // 512) * 512 for size in plan.sizes), "memory is used again"


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
    assert len(watch.plan.sizes) == 6 and watch.plan.total == 3584, "the first gap that is large enough"


def test_another_computation_is_noticed(graph_memory) -> None:
    with graph_memory.Watch() as watch:
        torch.empty(8).fill_(1)
    memory = torch.zeros(watch.plan.total, dtype=torch.uint8)
    with pytest.raises(graph_memory.Changed, match="temporary 0 has 36 bytes"), graph_memory.Use(watch.plan, memory):
        torch.empty(9)
    with pytest.raises(graph_memory.Changed, match="temporary 1"), graph_memory.Use(watch.plan, memory):
        torch.empty(8)
        torch.empty(8)
