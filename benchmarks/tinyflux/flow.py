"""The transformer: ComfyUI's Flux with small sizes, and flow matching as ComfyUI samples it.

x = (1 - sigma) * latents + sigma * noise, the model predicts noise - latents, its timestep is sigma. `velocity` walks
through the stock modules as `Flux.forward_orig` does, with what is constant taken out: positions are the same for all
pictures of a batch.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...loaders.demo_assets import DEMO_PROMPT_TOKENS, LATENT_CHANNELS, PROMPT_FEATURES, byte_features, pool_tokens

SIZES = {
    "hidden_size": 128, "num_heads": 1, "depth": 1, "depth_single_blocks": 6, "context_in_dim": PROMPT_FEATURES,
    "vec_in_dim": PROMPT_FEATURES,
}  # fmt: skip
_AS_FLUX_DEV = {
    "in_channels": LATENT_CHANNELS, "out_channels": LATENT_CHANNELS, "mlp_ratio": 4.0, "axes_dim": [16, 56, 56],
    "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": True, "txt_ids_dims": [],
}  # fmt: skip
SHIFT = math.exp(1.15)  # of sigmas, in ComfyUI's default for FLUX.1-dev
GUIDANCE = (1.0, 6.0)  # drawn at random while training, and without effect


class _LayerNorm(nn.LayerNorm):
    """Keeps a copy of its input for the backward pass: ComfyUI's blocks then add to the input in place."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clone())


class _Operations:
    Linear, RMSNorm, LayerNorm = nn.Linear, nn.RMSNorm, _LayerNorm


def make_model(**sizes: Any) -> nn.Module:
    """ComfyUI's Flux in float32, as training begins: gates and output are zero, every block is the identity."""
    import comfy.model_management
    from comfy.ldm.flux.model import Flux

    comfy.model_management.in_training = True  # rotary embedding in differentiable operations
    model = Flux(image_model="flux", dtype=torch.float32, operations=_Operations, **(_AS_FLUX_DEV | SIZES | sizes))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
            if name.endswith((".lin", "adaLN_modulation.1", "final_layer.linear")):
                nn.init.zeros_(module.weight)
        elif isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)
    return model


def positions(model: nn.Module, tokens: int, height: int, width: int, device: torch.device) -> Tensor:
    """Rotary embedding [1, 1, tokens + height * width, 64, 2, 2] of text, then of patches row by row."""
    ids = torch.zeros(1, tokens + height * width, 3, device=device)
    grid = torch.cartesian_prod(torch.arange(height, device=device), torch.arange(width, device=device))
    ids[0, tokens:, 1:] = grid.float()
    return model.pe_embedder(ids)


def _attention(original: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, **options: Any) -> Tensor:
    """Takes the place of ComfyUI's attention, which splits it up by the memory that is free."""
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def velocity(
    model: nn.Module, x: Tensor, sigma: Tensor, context: Tensor, pooled: Tensor, guidance: Tensor, pe: Tensor
) -> Tensor:
    """What the model predicts for latents ``x`` [B, 16, h, w]; sigma and guidance [B], pe of `positions`."""
    from comfy.ldm.flux.layers import timestep_embedding

    options = {"optimized_attention_override": _attention}
    batch, channels, height, width = x.shape
    patches = x.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5).flatten(3)
    img, txt = model.img_in(patches.flatten(1, 2)).float(), model.txt_in(context).float()
    vec = model.time_in(timestep_embedding(sigma, 256)) + model.guidance_in(timestep_embedding(guidance, 256))
    vec = vec + model.vector_in(pooled)
    for block in model.double_blocks:
        img, txt = block(img=img, txt=txt, vec=vec, pe=pe, transformer_options=options)
    both = torch.cat((txt, img), 1)
    for block in model.single_blocks:
        both = block(both, vec=vec, pe=pe, transformer_options=options)
    out = model.final_layer(both[:, txt.shape[1] :], vec)
    out = out.reshape(batch, height // 2, width // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return out.reshape(batch, channels, height, width)


def encode_prompts(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 [B, T, 5], zero behind the text -> context [B, T, 256], pooled [B, 256], as the demo prompt node's."""
    context = byte_features(numbers) * (numbers[..., :1] > 0)
    return context, pool_tokens(context)


def pack_numbers(rows: list[list[tuple[int, ...]]]) -> Tensor:
    """What `byte_numbers` gives for each of some prompts -> uint8 [B, T, 5]. ValueError for too long a prompt."""
    packed = torch.zeros(len(rows), DEMO_PROMPT_TOKENS, 5, dtype=torch.uint8)
    for index, row in enumerate(rows):
        if len(row) > DEMO_PROMPT_TOKENS:
            raise ValueError(f"a prompt has {len(row)} bytes, expected at most {DEMO_PROMPT_TOKENS}")
        packed[index, : len(row)] = torch.tensor(row, dtype=torch.uint8)
    return packed


def draw_sigmas(count: int, device: torch.device) -> Tensor:
    """Noise levels [B] to train on: logit-normal, one in five uniform, shifted as ComfyUI shifts those it samples."""
    t = torch.where(
        torch.rand(count, device=device) < 0.8,
        torch.randn(count, device=device).sigmoid(),
        torch.rand(count, device=device),
    )
    return SHIFT * t / (1 + (SHIFT - 1) * t)


def loss(
    model: nn.Module, latents: Tensor, weight: Tensor, numbers: Tensor, sigma: Tensor, noise: Tensor, guidance: Tensor,
    pe: Tensor,
) -> Tensor:
    """Mean square error of the velocity; weight [B, h, w] says how much each latent pixel counts."""
    context, pooled = encode_prompts(numbers)
    level = sigma[:, None, None, None]
    predicted = velocity(model, torch.lerp(latents, noise, level), sigma, context, pooled, guidance, pe)
    error = (predicted.float() - (noise - latents)).square().mean(1)
    return (error * weight).mean() / weight.mean()


@torch.inference_mode()
def sample(
    model: nn.Module, numbers: Tensor, noise: Tensor, pe: Tensor, steps: int = 20, guidance: float = 3.5
) -> Tensor:
    """Latents for prompts: Euler steps on the sigmas of ComfyUI's scheduler "simple"."""
    context, pooled = encode_prompts(numbers)
    t = torch.linspace(1, 0, steps + 1, device=noise.device)
    sigmas = SHIFT * t / (1 + (SHIFT - 1) * t)
    strength = torch.full((len(noise),), guidance, device=noise.device)
    x = noise
    for sigma, following in itertools.pairwise(sigmas):
        x = x + (following - sigma) * velocity(model, x, sigma.expand(len(x)), context, pooled, strength, pe).float()
    return x
