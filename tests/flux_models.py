"""Small FLUX models for tests: a quantized one, its dense twin, and one forward pass through either."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from svdq.cli.dequantize import effective
from svdq.loaders import Checkpoint, open_checkpoint
from svdq.loaders.weights import on_device


def dense_state_dict(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """The equivalent dense model under stock names: what `dequantize` writes, as a dictionary.

    Dequantized on ``device``: the low-rank product is summed in another order on a GPU than on a CPU, which moves a few
    weights by one bit.
    """
    sd: dict[str, Tensor] = {}
    for name, layer in checkpoint.layers():
        weight, bias = effective(on_device(layer, device), dtype)
        sd[f"{name}.weight"] = weight.cpu()
        if bias is not None:
            sd[f"{name}.bias"] = bias.cpu()
    return sd


def load_dense(path: Path):
    """The dense twin of a checkpoint as a stock MODEL, in the type that this device computes in."""
    import comfy.model_management as management
    import comfy.sd

    checkpoint, device = open_checkpoint(path), management.get_torch_device()
    dtype = torch.float32 if device.type == "cpu" else checkpoint.dtype
    return comfy.sd.load_diffusion_model_state_dict(
        dense_state_dict(checkpoint, dtype, device), model_options={"dtype": dtype}
    )


def inputs(
    checkpoint: Checkpoint, size: int = 16, tokens: int = 20, batch: int = 2, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Seeded inputs of one forward pass; ``size`` in latent pixels, ``dtype`` of all but the timestep."""
    generator = torch.Generator().manual_seed(1234)
    config = checkpoint.config

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "x": draw(batch, config.in_channels // 4, size, size).to(dtype),
        "timestep": torch.linspace(0.9, 0.3, batch),
        "context": draw(batch, tokens, config.context_in_dim).to(dtype),
        "y": draw(batch, config.vec_in_dim).to(dtype),
        "guidance": torch.full((batch,), 3.5, dtype=dtype),
    }


def forward(patcher, arguments: dict[str, Tensor], load: bool = True) -> Tensor:
    """One forward pass through a MODEL's Flux as ComfyUI runs it. Returns float32 on the CPU."""
    import comfy.model_management as management

    if load:
        management.load_models_gpu([patcher])
    device, dtype = patcher.load_device, patcher.model.manual_cast_dtype or patcher.model_dtype()
    arguments = {name: value.to(device, dtype if name != "timestep" else None) for name, value in arguments.items()}
    x, timestep = arguments.pop("x"), arguments.pop("timestep")
    with torch.inference_mode():
        if device.type == "cuda":
            # The first pass of a process differs from all later ones in the last bits of core's attention.
            patcher.model.diffusion_model(x, timestep, **arguments)
        return patcher.model.diffusion_model(x, timestep, **arguments).float().cpu()


def relative(value: Tensor, reference_value: Tensor) -> float:
    """Relative L2 distance."""
    difference = (value.double() - reference_value.double()).norm()
    return (difference / reference_value.double().norm()).item()


def rms_relative(values: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Root mean square of relative distances. One output says little of rounding: how far it carries differs by a
    tenth."""
    pairs = zip(values, expected, strict=True)
    return torch.tensor([relative(a, b) for a, b in pairs]).square().mean().sqrt().item()
