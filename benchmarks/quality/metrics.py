"""How far pictures, latents and outputs of layers are from the original's: values per prompt, means, intervals.

LPIPS is not among them: its weights have to be downloaded, and this runs without a network.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CEILING_DB = 100.0  # of an identical result, so that means stay finite
DRAWS = 2000  # of the bootstrap
LEVEL = 0.95
_SEED = 0
_WINDOW = 11  # pixels of SSIM's Gaussian window, sigma 1.5: Wang et al. 2004


def decibel(signal: Tensor, error: Tensor) -> Tensor:
    """10 log10(signal / error), elementwise, at most CEILING_DB; signal, error: sums or means of squares."""
    value = 10 * (signal.double() / error.double()).log10()
    # 0 / 0 is a result that is right, too.
    return value.nan_to_num(nan=CEILING_DB, posinf=CEILING_DB, neginf=-CEILING_DB).clamp(-CEILING_DB, CEILING_DB)


def psnr(images: Tensor, originals: Tensor) -> Tensor:
    """float64 [B], in dB. images, originals: [B, C, H, W] in 0..1."""
    error = (images.double() - originals.double()).square().flatten(1).mean(dim=1)
    return decibel(torch.ones_like(error), error)


def ssim(images: Tensor, originals: Tensor) -> Tensor:
    """float64 [B], structural similarity: mean over colours and windows. As :func:`psnr`; sides of at least 11 pixels.

    The window is Wang et al.'s (2004), as scikit-image's with ``gaussian_weights=True``; kornia comes with ComfyUI.
    """
    from kornia.metrics import ssim as similarity

    maps = similarity(images.double(), originals.double(), _WINDOW, max_val=1.0, eps=0.0, padding="valid")
    return maps.flatten(1).mean(dim=1)


def sqnr(values: Tensor, originals: Tensor) -> Tensor:
    """float64 [B], in dB: squared norm of the original over that of the difference. Both [B, ...]."""
    exact = originals.double().flatten(1)
    return decibel(exact.square().sum(dim=1), (values.double().flatten(1) - exact).square().sum(dim=1))


@dataclass(frozen=True)
class Interval:
    """A mean over prompts with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    def verdict(self, margin: float = 0.0) -> str:
        """Of the claim that the mean is larger than ``margin``."""
        if self.low > margin:
            return "holds"
        return "does not hold" if self.high < margin else "within the interval"


def interval(values: Tensor, draws: int = DRAWS) -> Interval:
    """Percentile bootstrap of the mean of ``values`` [P] over prompts; NaN stands for a prompt that does not count.

    Of the difference of two configurations, prompt by prompt, it is a paired one.
    """
    values = values.double().cpu()
    values = values[~values.isnan()]
    if not len(values):
        return Interval(*3 * [float("nan")])
    generator = torch.Generator().manual_seed(_SEED)
    chosen = torch.randint(len(values), (draws, len(values)), generator=generator)
    tails = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    low, high = values[chosen].mean(dim=1).quantile(tails).tolist()
    return Interval(values.mean().item(), low, high)
