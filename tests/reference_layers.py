"""What kernels/layers.py starts on a GPU, in PyTorch on a CPU: the same contracts, by kernels/reference.py. With it
models run the arithmetic of INT4 and INT8, fused or layer by layer, in 16 bits, where there is no GPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from svdq.kernels import layout, reference


def in_place_of_kernels(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """{precision: object of layers.py} whose kernels are those below.

    Skips without Triton, which layers.py imports, and where ComfyUI would put models on a GPU.
    """
    pytest.importorskip("triton")
    import comfy.model_management

    from svdq.kernels import layers

    if comfy.model_management.get_torch_device().type != "cpu":
        pytest.skip("stands in for a GPU where there is none")

    for function in (quantize_act, gemm_w4a4, gemm_gelu_quantize, quantize_act_int8, gemm_w8a8, weight_of, factors_of,
                     gemv_w4a16, add_lora):  # fmt: skip
        monkeypatch.setattr(layers, function.__name__, function)
    monkeypatch.setattr(layers.Layers, "device_type", "cpu")
    monkeypatch.setattr(layers.Layers, "compile_once", lambda self, key, compute: None)
    return {"int4": layers.INT4, "int8": layers.INT8}


def load(path: Path, layers: Any, fused: bool):
    """The MODEL of a checkpoint with ``layers``. CUDA graphs are left out."""
    from svdq.model import flux, load_flux
    from svdq.model.ops import QuantizedLinear

    patcher = load_flux(str(path), "16bit")
    backend = SimpleNamespace(precision="int4 or int8", kernels=True, layers=layers)
    diffusion_model = patcher.model.diffusion_model
    for module in diffusion_model.modules():
        if isinstance(module, QuantizedLinear):
            module.backend = backend
    if fused:
        flux.fuse_blocks(diffusion_model, backend)
        for block in flux.fused_blocks(diffusion_model):
            block.graphs = SimpleNamespace(run=_without_graph, clear=lambda: 0)
    return patcher


def _without_graph(block, kind, weights, compute, attend, apart, tensors, streams):
    compute(attend, *tensors)
    return tensors[:streams]


def quantize_act(x: Tensor, part, modulation=None) -> tuple[Tensor, Tensor, Tensor]:
    if modulation is not None:
        x = reference.layer_norm_modulate(x, modulation.scale, modulation.shift)
    smooth, down = layout.unpack_vector(part.smooth_factor), layout.unpack_lowrank_down(part.proj_down)
    return reference.quantize_act(x, smooth, down, part.act_unsigned)


def gemm_w4a4(codes, ascales, lora_act, part, bias=None, after=None, out=None, second=None) -> Tensor:
    products = [(codes, ascales, lora_act, part), *([second] if second else [])]
    y = sum(reference.gemm_w4a4(*x, p.unpack(), out_dtype=torch.float32) for *x, p in products)
    return _finish(y if bias is None else y + bias.float(), ascales.dtype, after, out)


def gemm_gelu_quantize(codes, ascales, lora_act, part, following, bias=None) -> tuple[Tensor, Tensor, Tensor]:
    return quantize_act(gemm_w4a4(codes, ascales, lora_act, part, bias, SimpleNamespace(gelu=True)), following)


def quantize_act_int8(x, weight, proj_down, scale=None, shift=None, layers=1) -> tuple[Tensor, Tensor, Tensor]:
    if scale is not None:
        x = reference.layer_norm_modulate(x, scale, shift)
    smooth = layout.unpack_vector(weight.smooth_factor)
    codes, scales, lora_act = reference.quantize_act_int8(x, smooth, proj_down, weight.act_unsigned)
    lora_act = lora_act.to(x.dtype)
    return codes, scales, lora_act if layers == 1 else torch.stack(lora_act.chunk(layers, dim=1))


def gemm_w8a8(codes, scales, lora_act, weight, proj_up, bias=None, after=None, out=None, second=None) -> Tensor:
    def product(codes, scales, weight, lora_act, proj_up):
        operands = (codes, scales, lora_act, weight.q, weight.scales, proj_up)
        return reference.gemm_w8a8(*operands, out_dtype=torch.float32, act_unsigned=weight.act_unsigned)

    y = product(codes, scales, weight, lora_act, proj_up)
    if second is not None:
        y = y + product(*second, lora_act[:, :0], proj_up[:, :0])
    return _finish(y if bias is None else y + bias.float(), proj_up.dtype, after, out)


def weight_of(part):
    from svdq.kernels.weights_int8 import W8

    return W8(*reference.expand_w4_to_int8(part.unpack()), part.act_unsigned)


def factors_of(part) -> tuple[Tensor, Tensor]:
    """In natural order, which is what quantize_act_int8 above takes."""
    return layout.unpack_lowrank_down(part.proj_down), layout.unpack_lowrank_up(part.proj_up)


def gemv_w4a16(x: Tensor, weight, bias: Tensor | None = None) -> Tensor:
    y = x.float() @ reference.dequantize_packed_awq(weight, torch.float32).t()
    return (y if bias is None else y + bias.float()).to(x.dtype)


def add_lora(y: Tensor, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    return (y.float() + (x.float() @ down.float().t()).to(x.dtype).float() @ up.float().t()).to(y.dtype)


def _finish(y: Tensor, dtype: torch.dtype, after: Any, out: Tensor | None) -> Tensor:
    """What follows a GEMM, in float32, as epilogue.After says it."""
    if getattr(after, "gelu", False):
        y = torch.nn.functional.gelu(y, approximate="tanh")
    elif getattr(after, "gate", None) is not None:
        y = after.residual.float() + after.gate.float().repeat_interleave(len(y) // len(after.gate), dim=0) * y
    elif getattr(after, "rotary", None) is not None:
        heads = y.reshape(len(y), 3, -1, 128)
        norms = (after.norm_q, after.norm_k)
        q, k = (reference.rms_norm_rope(heads[:, i], norm, after.rotary) for i, norm in enumerate(norms))
        y = torch.stack((q, k, heads[:, 2]), dim=1).reshape(y.shape)
    return y.to(dtype) if out is None else out.copy_(y)
