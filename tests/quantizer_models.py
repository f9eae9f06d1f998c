"""Tiny FLUX models to quantize: with heavy-tailed weights; with outlier channels in activations, as trained ones have
them, and prompts for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from files import Tensors
from safetensors.torch import save_file
from test_quantizer_solve import heavy_tailed

from svdq.loaders.weights import FluxConfig
from svdq.quantizer.prompts import Prompt, write_prompts
from svdq.quantizer.source import stock_shapes

HIDDEN, CONTEXT, POOLED = 128, 64, 32
REPORTED = ["out.safetensors", "out.safetensors.report.html", "out.safetensors.report.json"]
FAST = {"iterations": 1, "rank": 16, "device": "cpu"}


def dense_model() -> Tensors:
    """A FLUX with heavy-tailed weights: hidden size 128, one double and one single block."""
    tensors = {}
    config = FluxConfig(HIDDEN, 1, 1, 64, 64, CONTEXT, POOLED, guidance_embed=True)
    for seed, (name, shape) in enumerate(stock_shapes(config).items()):
        tensor = heavy_tailed(*shape, seed) if len(shape) == 2 else 0.1 * heavy_tailed(1, shape[0], seed)[0]
        tensors[name] = tensor.to(torch.bfloat16)
    return tensors


def outlier_model() -> Tensors:
    """The same model with modulations that make some channels much larger than others, and always the
    same ones, whatever the prompt."""
    tensors = dense_model()
    generator = torch.Generator().manual_seed(5)
    for name, tensor in tensors.items():
        if name.endswith(".lin.weight"):
            tensor *= 0.2
        elif name.endswith(".lin.bias"):
            chunks = tensor.float().reshape(-1, 3, HIDDEN)
            gain = (1.2 * torch.randn(len(chunks), HIDDEN, generator=generator)).exp()
            gain[:, torch.randperm(HIDDEN, generator=generator)[:2]] *= 8
            chunks[:, 1] = gain - 1
            tensors[name] = chunks.reshape(-1).to(torch.bfloat16)
    return tensors


def prompts(count: int = 3, seed: int = 0) -> list[Prompt]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return [Prompt(draw(20, CONTEXT), draw(POOLED), 3.5 if index else None) for index in range(count)]


def conditioning(count: int = 3, seed: int = 0) -> list[list[Any]]:
    """The same as ComfyUI's CONDITIONING."""
    return [
        [p.context[None], {"pooled_output": p.pooled[None]} | ({} if p.guidance is None else {"guidance": p.guidance})]
        for p in prompts(count, seed)
    ]


def save_source(path: Path) -> Path:
    save_file(outlier_model(), path)
    return path


def save_prompts(path: Path) -> Path:
    write_prompts(path, prompts())
    return path


def load_dense(tensors: Tensors) -> Any:
    """As a MODEL that computes in float32."""
    import comfy.sd

    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    return comfy.sd.load_diffusion_model_state_dict(copies, model_options={"dtype": torch.float32})
