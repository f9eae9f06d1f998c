"""The counters that kernels share between calls: which call gets which."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

CPU = torch.device("cpu")


@pytest.fixture
def get(monkeypatch: pytest.MonkeyPatch):
    """arrivals for a kernel and a stream, as in a call or while a graph is captured."""
    from svdq.kernels import arrivals

    arrivals._zeros.cache_clear()

    def get(stream: int = 7, capturing: bool = False, kernel: str = "a kernel", count: int = 3) -> torch.Tensor:
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=stream))
        return arrivals.arrivals(kernel, CPU, count)

    yield get
    arrivals._zeros.cache_clear()


def test_one_set_for_each_stream_and_kernel(get) -> None:
    first = get()
    assert first.tolist() == [0, 0, 0] and first.dtype == torch.int32
    assert get() is first
    others = [get(stream=0), get(stream=8), get(kernel="another"), get(count=4)]
    assert len({id(tensor) for tensor in (first, *others)}) == 5


def test_graphs_have_a_set_that_a_call_before_has_made(get) -> None:
    with pytest.raises(RuntimeError, match="a kernel: call it once before it is captured"):
        get(capturing=True)
    eager = get()
    graph = get(capturing=True)
    assert graph is not eager and get(stream=8, capturing=True) is graph
