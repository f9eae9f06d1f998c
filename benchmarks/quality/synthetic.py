"""One double and one single block of FLUX.1-dev's sizes with random weights, whose values are spread like trained ones.

Weights have heavy tails (Student's t with 4 degrees of freedom), columns of log-normal size and a decaying low-rank
part. Modulations make some channels much larger than others, always the same ones, as in trained transformers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...loaders.weights import FluxConfig
from ...quantizer.source import stock_shapes

FULL_SIZE = FluxConfig(3072, 1, 1, 64, 64, 4096, 768, guidance_embed=True)
_LOW_RANK, _LOW_RANK_PART = 64, 0.6
_COLUMN_SIGMA = 0.4  # of the logarithm of a weight column's size
_CHANNEL_SIGMA = 0.5  # the same of an activation channel
_OUTLIERS, _OUTLIER_GAIN = 0.01, 8.0
_GATE = 0.3


def state_dict(config: FluxConfig, device: torch.device | str = "cpu", seed: int = 0) -> dict[str, Tensor]:
    """bf16 tensors under ComfyUI's names, on ``device``. Another kind of device draws other numbers."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    tensors = {}
    for name, shape in stock_shapes(config).items():
        if name.endswith("_norm.weight"):
            tensor = 1.25 + 0.1 * normal(*shape)
        elif len(shape) == 1:
            tensor = 0.02 * normal(*shape)
        else:
            tensor = _matrix(*shape, normal)
        if name.endswith(".lin.weight"):
            tensor *= 0.2
        elif name.endswith(".lin.bias"):
            tensor = _modulation(tensor.reshape(-1, 3, config.hidden_size), normal).reshape(-1)
        tensors[name] = tensor.to(torch.bfloat16)
    return tensors


def _matrix(n: int, k: int, normal) -> Tensor:
    spread = (sum(normal(n, k).square() for _ in range(4)) / 4).sqrt()
    rank = min(_LOW_RANK, n, k)
    decay = torch.arange(1, rank + 1, device=spread.device) ** -0.7
    low_rank = normal(n, rank) * decay @ normal(rank, k)
    return (normal(n, k) / spread + _LOW_RANK_PART * low_rank) * (_COLUMN_SIGMA * normal(k)).exp() / k**0.5


def _modulation(bias: Tensor, normal) -> Tensor:
    """bias: [1 or 2, 3, hidden] as shift, scale, gate; the model multiplies by 1 + scale."""
    gain = (_CHANNEL_SIGMA * normal(len(bias), bias.shape[2])).exp()
    gain[:, normal(bias.shape[2]).topk(max(1, round(_OUTLIERS * bias.shape[2]))).indices] *= _OUTLIER_GAIN
    bias[:, 1] = gain - 1
    bias[:, 2] += _GATE
    return bias
