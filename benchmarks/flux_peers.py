"""Other ways to run the same FLUX inside ComfyUI's ``Flux``, for ``flux.py``: each replaces the linears of the blocks.

The weights are those of the SVDQuant file, dequantized to bf16, so that every row computes the same model.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Make = Callable[[Tensor, Tensor | None], nn.Module]


@dataclass(frozen=True)
class Peer:
    """label: for a table · linear: returns what makes a linear of dense weight and bias, or None for our own model ·
    weights: what our own model keeps in VRAM, as load_flux takes it · compiled: whether it goes through torch.compile,
    others block by block · cudnn: attention by cuDNN's kernel · rank0: our model without its low-rank branches, for
    what these cost (its output is wrong) · lora: whether changes of a LoRA are measured too · needs: a package ·
    kernels: whether it needs those of comfy_kitchen for CUDA, without which it takes several times as long."""

    label: str
    linear: Callable[[], Make] | None = None
    weights: str = "int4"
    compiled: bool = False
    cudnn: bool = False
    rank0: bool = False
    lora: bool = False
    needs: str | None = None
    kernels: bool = False


def _bf16() -> Make:
    import comfy.ops

    def make(weight: Tensor, bias: Tensor | None) -> nn.Module:
        n, k = weight.shape
        # A CPU computes in float32.
        operations = comfy.ops.manual_cast if weight.device.type == "cpu" else comfy.ops.disable_weight_init
        linear = operations.Linear(k, n, bias=bias is not None, device="meta", dtype=weight.dtype)
        return _filled(linear, weight, bias)

    return make


def _filled(linear: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    # A class of parameters of a package's own stays as it is.
    linear.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def _comfyui(layout: str, described: dict[str, Any], **options: Any) -> Callable[[], Make]:
    """ComfyUI's own format ``described``, quantized by its own layout class and loaded as from a checkpoint."""

    def linear() -> Make:
        import comfy.ops
        from comfy.quant_ops import QuantizedTensor

        operations = comfy.ops.mixed_precision_ops({}, torch.bfloat16)
        marker = torch.tensor(list(json.dumps(described).encode()), dtype=torch.uint8)

        def make(weight: Tensor, bias: Tensor | None) -> nn.Module:
            state = QuantizedTensor.from_float(weight, layout, **options).state_dict("weight")
            state |= {"comfy_quant": marker} | ({} if bias is None else {"bias": bias})
            n, k = weight.shape
            module = operations.Linear(k, n, bias=bias is not None, device=weight.device, dtype=weight.dtype)
            missing = module.load_state_dict(state, strict=False)
            if missing.missing_keys or missing.unexpected_keys:
                raise RuntimeError(f"{layout} does not load: {missing}")
            return module

        return make

    return linear


def _nf4() -> Make:
    bnb = importlib.import_module("bitsandbytes")

    def make(weight: Tensor, bias: Tensor | None) -> nn.Module:
        n, k = weight.shape
        options = {"compute_dtype": weight.dtype, "quant_type": "nf4", "device": "meta"}
        module = bnb.nn.Linear4bit(k, n, bias=bias is not None, **options)
        quantized = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=module).to(weight.device)
        return _filled(module, quantized, bias)

    return make


_FP8 = _comfyui("TensorCoreFP8E4M3Layout", {"format": "float8_e4m3fn"}, scale="recalculate")
_ROTATED = {"convrot": True, "convrot_groupsize": 256}

PEERS = {
    "bf16": Peer("ComfyUI bf16", _bf16),
    "ours": Peer("this pack"),
    "ours-int8": Peer("this pack, INT8 weights kept", weights="int8"),
    "ours-lora": Peer("this pack, LoRA", lora=True),
    "ours-int8-lora": Peer("this pack, INT8 weights kept, LoRA", weights="int8", lora=True),
    "ours-rank0": Peer("this pack without the low-rank branch", rank0=True),
    "bf16-cudnn": Peer("ComfyUI bf16, cuDNN attention", _bf16, cudnn=True),
    "fp8": Peer("ComfyUI fp8, scaled", _FP8),
    "int8": Peer(
        "ComfyUI int8, rotated",
        _comfyui("TensorWiseINT8Layout", {"format": "int8_tensorwise", **_ROTATED}, per_channel=True, **_ROTATED),
        kernels=True,
    ),
    "int4": Peer(
        "ComfyUI convrot W4A4",
        _comfyui(
            "TensorCoreConvRotW4A4Layout",
            {"format": "convrot_w4a4", "convrot_groupsize": 256, "linear_dtype": "int4"},
            linear_dtype="int4",
        ),
        kernels=True,
    ),
    "nf4": Peer("bitsandbytes NF4", _nf4, needs="bitsandbytes"),
    "bf16-compile": Peer("ComfyUI bf16, torch.compile", _bf16, compiled=True),
    "ours-compile": Peer("this pack, torch.compile", compiled=True),
    "fp8-compile": Peer("ComfyUI fp8, torch.compile", _FP8, compiled=True),
}


def kitchen() -> str:
    """The kernels that comfy_kitchen has here. Without those for CUDA, ComfyUI's own rows, bf16 too, take longer."""
    import comfy_kitchen

    return ", ".join(name for name, backend in comfy_kitchen.list_backends().items() if backend["available"])


def become(peer: Peer, flux: nn.Module) -> dict[str, Any]:
    """Change ``flux``, loaded by this pack in 16-bit mode on the GPU, into the peer; returns transformer_options."""
    from svdq.model.ops import QuantizedLinear, is_quantized

    if peer.linear is not None:
        make = peer.linear()
        for name, module in list(flux.named_modules()):
            if isinstance(module, QuantizedLinear) and is_quantized(module.weight):
                with torch.inference_mode(False), torch.no_grad():
                    dense, bias = module._dense(module.weight.new_empty(0), module.weight, module.bias, [], [])
                    new = make(dense, None if bias is None else bias.to(dense.dtype))
                parent, _, leaf = name.rpartition(".")
                setattr(flux.get_submodule(parent), leaf, new)
                module.weight = module.bias = None
    if peer.compiled and peer.linear is None:
        flux.compile()  # the whole model, as the node TorchCompileModel does; blocks are left out
    elif peer.compiled:
        # ComfyUI writes the block's number into the options: each block would be compiled anew.
        for block in (*flux.double_blocks, *flux.single_blocks):
            block.register_forward_pre_hook(
                lambda module, args, kwargs: (args, kwargs | {"transformer_options": {}}), with_kwargs=True
            )
            block.compile(dynamic=False)
    return {"optimized_attention_override": _cudnn_attention} if peer.cudnn else {}


def _cudnn_attention(
    function: Callable, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, **options: Any
) -> Tensor:
    """For q, k, v [B, H, L, D], as Flux gives them. Not by ``function``: ComfyUI has its own order of kernels."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if not options.get("skip_reshape") or options.get("skip_output_reshape"):
        raise ValueError(f"attention with {options}: expected heads apart before it and together behind it")
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).flatten(2)


def random_lora(flux: nn.Module, rank: int) -> dict[str, Tensor]:
    """A LoRA file's content in ComfyUI's own naming, on every quantized linear, on the CPU."""
    from svdq.model.ops import QuantizedLinear, is_quantized

    generator, lora = torch.Generator().manual_seed(0), {}
    for name, module in flux.named_modules():
        if isinstance(module, QuantizedLinear) and is_quantized(module.weight):
            shapes = {"down": (rank, module.in_features), "up": (module.out_features, rank)}
            for side, shape in shapes.items():
                factor = torch.randn(*shape, generator=generator, dtype=torch.float32) * 0.02
                lora[f"diffusion_model.{name}.lora_{side}.weight"] = factor.bfloat16()
    return lora


@contextmanager
def without_low_rank(peer: Peer) -> Iterator[None]:
    """For ``rank0``: the parts of every linear without their low-rank columns."""
    import dataclasses

    from svdq.model.ops import QuantizedLinear

    parts = QuantizedLinear.parts

    def cut(self: QuantizedLinear, weight: Any, x: Tensor) -> tuple:
        return tuple(
            dataclasses.replace(part, proj_down=part.proj_down[:, :0], proj_up=part.proj_up[:, :0])
            for part in parts(self, weight, x)
        )

    if peer.rank0:
        QuantizedLinear.parts = cut
    try:
        yield
    finally:
        QuantizedLinear.parts = parts
