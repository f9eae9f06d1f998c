"""A latent autoencoder in the TAESD layout: 8 x 8 pixels become 16 numbers of about mean 0 and variance 1.

The modules are ComfyUI's. While it trains, latents are normalized by batch statistics, as a BatchNorm without weights
does; `finish` folds the running statistics into the encoder's last convolution. Noise is added to them, so that the
decoder forgives a transformer's small errors, and they pass the decoder's own limiter, 3 tanh(z / 3).
"""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...loaders.demo_assets import LATENT_CHANNELS, LATENT_SCALE, LATENT_SHIFT
from ...loaders.write import write_tensors

_NOISE = 0.25  # largest standard deviation of the noise on latents
_EDGES = 4.0  # how much more than a flat area a strong edge counts


class Autoencoder(nn.Module):
    """Pictures float32 [B, 3, H, W] in 0..1 <-> latents [B, 16, H/8, W/8] as the transformer sees them."""

    def __init__(self) -> None:
        super().__init__()
        from comfy.taesd.taesd import Decoder, Encoder

        self.encoder, self.decoder = Encoder(LATENT_CHANNELS), Decoder(LATENT_CHANNELS)
        self.normalize = nn.BatchNorm2d(LATENT_CHANNELS, affine=False, momentum=0.02)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # ComfyUI's are made without values
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if type(module).__name__ == "Block":  # begins as the identity
                nn.init.zeros_(module.conv[-1].weight)
        nn.init.normal_(self.decoder[-1].weight, std=0.02)
        nn.init.constant_(self.decoder[-1].bias, 0.5)

    def encode(self, pictures: Tensor) -> Tensor:
        return self.normalize(self.encoder(pictures))

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder(latents)

    def loss(self, pictures: Tensor) -> Tensor:
        """Absolute error, edges first: of the pixels, and of their differences to the right and below."""
        latents = self.encode(pictures)
        level = _NOISE * torch.rand(len(latents), 1, 1, 1, device=latents.device)
        decoded = self.decode(latents + level * torch.randn_like(latents)).float()
        across, down = _differences(pictures)
        strength = functional.pad(across, (0, 1)).abs() + functional.pad(down, (0, 0, 0, 1)).abs()
        strength = functional.max_pool2d(strength.mean(1, keepdim=True), 3, 1, 1).clamp(max=1)
        error = ((decoded - pictures).abs() * (1 + _EDGES * strength)).mean()
        for found, wanted in zip(_differences(decoded), (across, down), strict=True):
            error = error + 0.5 * (found - wanted).abs().mean()
        return error

    @torch.no_grad()
    def finish(self) -> None:
        """Put the normalization into the encoder; afterwards `encode` gives the same without it."""
        if isinstance(self.normalize, nn.Identity):
            return
        last, statistics = self.encoder[-1], self.normalize
        scale = (statistics.running_var + statistics.eps).rsqrt()
        last.weight *= scale[:, None, None, None]
        last.bias.sub_(statistics.running_mean).mul_(scale)
        self.normalize = nn.Identity()

    def state(self) -> dict[str, Tensor]:
        """Finished weights under the names of a TAESD file, fp16."""
        tensors = {f"taesd_encoder.{name}": tensor for name, tensor in self.encoder.state_dict().items()}
        tensors |= {f"taesd_decoder.{name}": tensor for name, tensor in self.decoder.state_dict().items()}
        tensors = {name: tensor.detach().half() for name, tensor in tensors.items()}
        return tensors | {"vae_scale": torch.tensor(LATENT_SCALE), "vae_shift": torch.tensor(LATENT_SHIFT)}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take finished weights from what `state` gave."""
        for part in ("encoder", "decoder"):
            prefix = f"taesd_{part}."
            stored = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            getattr(self, part).load_state_dict(stored)
        self.normalize = nn.Identity()

    def save(self, path: str | os.PathLike[str]) -> None:
        write_tensors(path, self.state(), {"format": "pt"}, force=True)


def crops(pictures: Tensor, size: int) -> Tensor:
    """One random square of ``size`` pixels from each picture, on the latents' grid: [B, 3, size, size]."""
    blocks = (pictures.shape[-1] - size) // 8 + 1
    corner = 8 * torch.randint(blocks, (2, len(pictures), 1), device=pictures.device)
    axis = torch.arange(size, device=pictures.device)
    rows, columns = corner[0] + axis, corner[1] + axis
    batch = torch.arange(len(pictures), device=pictures.device)[:, None, None]
    return pictures[batch, :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


def psnr(a: Tensor, b: Tensor) -> float:
    """Decibels, for values in 0..1."""
    return -10 * (a.float() - b.float()).square().mean().log10().item()


def _differences(pictures: Tensor) -> tuple[Tensor, Tensor]:
    return pictures[..., 1:] - pictures[..., :-1], pictures[..., 1:, :] - pictures[..., :-1, :]
