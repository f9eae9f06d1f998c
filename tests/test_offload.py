"""Weights on their way to a GPU and back, on a CPU: the device "meta" takes what comes and gives nothing back."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from svdq.cli.synth import synth

pytestmark = pytest.mark.comfy


class Copies(TorchDispatchMode):
    """Notes the bytes of every copy to another device."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and out.device != args[0].device:
            self.bytes.append(args[0].nbytes)
        return out


@pytest.fixture
def linear(comfy, tmp_path: Path):
    """A single block's linear1: two parts, everything that a quantized weight can consist of."""
    from svdq.model import load_flux

    synth(tmp_path / "dev.safetensors", scale="tiny")
    patcher = load_flux(str(tmp_path / "dev.safetensors"))
    return patcher.model.diffusion_model.single_blocks[0].linear1


def to_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """What ``module.to("cpu")`` applies to parameters, but that "meta" can give back what is empty."""
    return tensor.to("cpu") if tensor.numel() else torch.empty_like(tensor, device="cpu")


def test_everything_is_sent_once(linear) -> None:
    from svdq.model.offload import inner_tensors

    inside = inner_tensors(linear.weight)
    assert len(inside) == 10 and sum(t.nbytes for t in inside.values()) > 200_000
    x = torch.empty(1, 4, linear.in_features, device="meta")
    with Copies() as copies, linear.on_device(x) as (weight, bias):
        there = inner_tensors(weight)
        assert there.keys() == inside.keys() and bias.shape == linear.bias.shape
        assert all((t.device.type, t.shape, t.dtype) == ("meta", inside[name].shape, inside[name].dtype)
                   for name, t in there.items())  # fmt: skip
        assert weight._params.axis == linear.weight._params.axis and weight.shape == linear.weight.shape
    assert sorted(copies.bytes) == sorted([linear.bias.nbytes, *(t.nbytes for t in inside.values())])
    assert linear.weight.device.type == "cpu"


@pytest.fixture
def pinned(comfy, monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """Address and size of what is pinned now, as far as ComfyUI knows: there is no GPU to pin anything for."""
    import comfy.model_management as management

    memory: dict[int, int] = {}

    def pin(tensor: torch.Tensor) -> bool:
        memory[tensor.data_ptr()] = tensor.nbytes
        return True

    monkeypatch.setattr(management, "pin_memory", pin)
    monkeypatch.setattr(management, "unpin_memory", lambda tensor: memory.pop(tensor.data_ptr()))
    return memory


def test_staged(linear, pinned: dict[int, int]) -> None:
    """A staged weight is sent in one piece, and has every bit of the weight."""
    from svdq.model.offload import Staged, brought, inner_tensors

    linear.staged = Staged.of(linear.weight)
    ((place, size),) = pinned.items()
    assert place % 4096 == size % 4096 == 0
    x = torch.empty(1, 4, linear.in_features, device="meta")
    with Copies() as copies, linear.on_device(x):
        pass
    assert sorted(copies.bytes) == sorted([size, linear.bias.nbytes])
    with brought(linear.weight, None, linear.staged, torch.device("cpu")) as (weight, _):
        there, inside = inner_tensors(weight), inner_tensors(linear.weight)
        assert there.keys() == inside.keys() and all(torch.equal(there[name], inside[name]) for name in inside)
        assert weight._qdata.data_ptr() >= place and weight._params.axis == linear.weight._params.axis
    linear.weight = torch.nn.Parameter(linear.weight.detach(), requires_grad=False)
    with Copies() as copies, linear.on_device(x):
        assert len(copies.bytes) > 2, "of another weight"
    del weight, there
    linear.staged = None
    assert not pinned


def test_staged_weights_of_a_model(comfy, tmp_path: Path, pinned: dict[int, int]) -> None:
    """Those that stay off the GPU, and as long as they do; other patchers come and go."""
    from svdq.model import load_flux
    from svdq.model.patcher import quantized_modules

    synth(tmp_path / "dev.safetensors", scale="tiny")
    patcher = load_flux(str(tmp_path / "dev.safetensors"))

    def staged(patcher) -> int:
        return sum(module.staged is not None for module in quantized_modules(patcher.model))

    layers = len(quantized_modules(patcher.model))
    patcher.partially_load(patcher.load_device, extra_memory=patcher.model_size() // 2)
    offloaded = staged(patcher)
    assert 0 < offloaded < layers
    clone = patcher.clone()
    del clone
    gc.collect()
    assert staged(patcher) == offloaded
    patcher.partially_unload(patcher.offload_device, patcher.model_size())
    assert staged(patcher) == layers
    patcher.partially_load(patcher.load_device, extra_memory=2 * patcher.model_size())
    assert staged(patcher) == 0
    patcher.partially_unload(patcher.offload_device, patcher.model_size() // 2)
    assert staged(patcher) > 0
    patcher.detach()
    assert staged(patcher) == 0
    patcher.partially_load(patcher.load_device, extra_memory=patcher.model_size() // 2)
    sizes = {module.staged.buffer.nbytes for module in quantized_modules(patcher.model) if module.staged is not None}
    assert sizes <= set(pinned.values())
    del patcher
    gc.collect()
    assert not sizes & set(pinned.values()), "freed with the model"


def test_back_where_it_was(linear) -> None:
    """A weight that comes back is the one of the file, not a copy: from "meta" there could not be one."""
    from svdq.model.offload import inner_tensors

    linear.bias = None
    places = {name: tensor.data_ptr() for name, tensor in inner_tensors(linear.weight).items()}
    for _ in range(2):
        linear.to("meta")
        assert linear.weight.device.type == "meta"
        linear.to(torch.device("meta"))
        linear._apply(to_cpu)
        assert {name: tensor.data_ptr() for name, tensor in inner_tensors(linear.weight).items()} == places


def test_another_weight_does_not_come_back(linear) -> None:
    linear.bias = None
    linear.to("meta")
    linear.weight = torch.nn.Parameter(linear.weight.detach(), requires_grad=False)
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        linear._apply(to_cpu)


def test_without_mapped_files_nothing_is_kept(linear, monkeypatch: pytest.MonkeyPatch) -> None:
    import comfy.utils

    monkeypatch.setattr(comfy.utils, "DISABLE_MMAP", True)
    linear.bias = None
    linear.to("meta")
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        linear._apply(to_cpu)
