"""What real blocks ask of torch while a CUDA graph captures them: on the CPU, with kernels that are not started."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_memory_modes import write_lora
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from svdq.loaders import open_checkpoint

pytestmark = pytest.mark.comfy

TOKENS, SIDE = 40, 12  # of text; of the image
PASSES = 4  # the first makes counters and the like


@pytest.fixture
def on_cpu(comfy, monkeypatch: pytest.MonkeyPatch):
    """Kernels and graphs believe in a GPU of the architecture that is asked for, and no kernel is started."""
    jit = pytest.importorskip("triton.runtime.jit")
    from svdq.kernels import ahead, layers
    from svdq.kernels.device import Device
    from svdq.model import graph_memory

    started: list[str] = []

    def run(self, *_, warmup: bool, **__) -> None:
        started.append(("compiled " if warmup else "") + self.__name__)

    monkeypatch.setattr(jit.JITFunction, "run", run)
    monkeypatch.setattr(ahead, "_seen", set())
    monkeypatch.setattr(graph_memory, "DEVICE", "cpu")
    monkeypatch.setattr(layers.Layers, "device_type", "cpu")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: SimpleNamespace(cuda_stream=0))

    def of(major: int, minor: int) -> list[str]:
        device = Device("cuda", "a GPU", (major, minor), 24 * 2**30)
        for name, module in list(sys.modules.items()):
            if name.startswith("svdq.kernels."):
                for attribute, value in (("describe", device), ("multiprocessors", 132)):
                    if hasattr(module, attribute) and name != "svdq.kernels.device":
                        monkeypatch.setattr(module, attribute, lambda _, value=value: value)
        return started

    return of


class Graphs:
    """In the place of BlockGraphs: runs a block as often as a capture takes, then with a capture's memory."""

    def __init__(self) -> None:
        self.runs = 0

    def run(
        self, block: Any, kind: tuple, weights: tuple, compute: Any, attend: Any, apart: bool, tensors: tuple,
        streams: int,
    ) -> tuple:  # fmt: skip
        from svdq.model import graph_memory

        plans = []
        for _ in range(PASSES):
            with graph_memory.Watch() as watch:
                compute(watch.unseen(zeros), *tensors)
            plans.append(watch.plan)
        assert plans[-1] == plans[-2] and plans[-1].total > 0, type(block).__name__
        memory = torch.zeros(plans[-1].total, dtype=torch.uint8)
        statics = tuple(tensor.clone() for tensor in tensors)
        record = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        with record, graph_memory.Use(plans[-1], memory):
            compute(graph_memory.attention_result, *statics)
        allocated = sum(max(0, event.nbytes()) for event in record.profiler.kineto_results.events())
        assert allocated == 0, f"{type(block).__name__} allocates {allocated} bytes"
        self.runs += 1
        return tensors[:streams]

    def clear(self) -> int:
        return 0


def zeros(qkv: Tensor) -> Tensor:
    batch, length, _, heads, size = qkv.shape
    return qkv.new_zeros(batch, length, heads * size)


ARCHITECTURES = {"int4": (8, 9), "int8": (9, 0), "int8, other GPUs": (12, 0)}


@pytest.mark.parametrize("loras", [0, 2])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("weights", ["int4", "int8"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_capture_allocates_nothing(
    name: str, weights: str, batch: int, loras: int, tiny: Path, on_cpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.model_management as management
    import comfy.sd
    import comfy.utils

    from svdq.kernels import layers
    from svdq.model import flux as model_flux
    from svdq.model import load_flux
    from svdq.model.ops import QuantizedLinear

    if name == "int4" and weights == "int8":
        pytest.skip("only INT8 products have weights to keep")
    started = on_cpu(*ARCHITECTURES[name])
    monkeypatch.setattr(QuantizedLinear, "_has_room", lambda self, ranks: True)
    patcher = load_flux(str(tiny), "16bit")
    diffusion_model = patcher.model.diffusion_model
    arithmetic = layers.INT4 if name == "int4" else layers.INT8
    model_flux.fuse_blocks(diffusion_model, SimpleNamespace(kernels=True, layers=arithmetic), weights)
    graphs, blocks = Graphs(), model_flux.fused_blocks(diffusion_model)
    for block in blocks:
        block.graphs = block.kept._graphs = graphs
    if loras:
        write_lora(tmp_path / "lora.safetensors", open_checkpoint(tiny).config)
        lora = comfy.utils.load_torch_file(str(tmp_path / "lora.safetensors"))
        lora = {key: value for key, value in lora.items() if not key.endswith("diff_b")}
        for strength in range(1, loras + 1):
            patcher = comfy.sd.load_lora_for_models(patcher, None, lora, float(strength), 0)[0]
    management.load_models_gpu([patcher])
    if weights == "int8":
        blocks[0].kept.decide(blocks, torch.device("cpu"), 10**12, False)
    hidden, length = diffusion_model.hidden_size, TOKENS + SIDE * SIDE
    options = {"dtype": torch.bfloat16}
    img, txt = torch.randn(batch, SIDE * SIDE, hidden, **options), torch.randn(batch, TOKENS, hidden, **options)
    vec, pe = torch.randn(batch, hidden, **options), torch.randn(1, 1, length, 64, 2, 2)
    with torch.inference_mode():
        for block in diffusion_model.double_blocks:
            block(img, txt, vec, pe, transformer_options={})
        for block in diffusion_model.single_blocks:
            block(torch.cat((txt, img), 1), vec, pe, transformer_options={})
    assert graphs.runs == len(blocks)
    kernels = {kernel for kernel in started if not kernel.startswith("compiled")}
    assert {"gemv_kernel", "quantize_kernel" if name == "int4" else "quantize_int8_kernel"} <= kernels
    assert ("lora_up_kernel" in kernels) == (loras > 0), "the LoRA has a modulation layer"
    # Compiled before they start, once for each kind of block; what kept weights are made with starts before that.
    ahead = {f"compiled {kernel}" for kernel in kernels}
    ahead -= {"compiled expand_kernel", "compiled _factors_kernel"} if weights == "int8" else set()
    assert ahead <= set(started)
    assert all(started.index(kernel) < started.index(kernel.removeprefix("compiled ")) for kernel in ahead)
    launches = sum(kernel.startswith("compiled") for kernel in started)
    assert 0 < launches * (PASSES + 1) <= len(started) - launches
