"""Other ways to quantize the layers that our format quantizes, simulated on the 16-bit model: BASELINES, by name.

Weights become what the format can represent, in float32 or in T, the model's 16-bit type; where activations are
quantized, too, the linear does that to its input. Everything between is exact, so a row shows what the numbers of a
format cost, not what a kernel adds. Sums are float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...kernels import reference
from ...kernels.int4 import GROUP, SIGNED_MAX, W4A4
from ...quantizer import solve

# bitsandbytes' NF4: quantiles of a Gaussian, as in its documentation and in QLoRA (arXiv 2305.14314, appendix E).
NF4_GRID = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
Q4_0_GROUP = 32
FP8 = torch.float8_e4m3fn
_FP8_MAX = 448.0


# ---- weights: [N, K] -> what is left of it, in its own type


def awq(weight: Tensor) -> Tensor:
    """Modulation layers of our format."""
    quantized = solve.quantize_awq(weight, weight.dtype)
    return reference.dequantize_awq(quantized, weight.dtype)


def nf4(weight: Tensor) -> Tensor:
    """NF4 with one float32 scale, the largest magnitude, for each group of 64 (no double quantization)."""
    groups = weight.float().reshape(-1, GROUP)
    scale = groups.abs().amax(dim=1, keepdim=True)
    grid = torch.tensor(NF4_GRID, device=weight.device)
    middles = (grid[1:] + grid[:-1]) / 2
    return _like(grid[torch.bucketize((groups / scale).nan_to_num(nan=0.0), middles)] * scale, weight)


def q4_0(weight: Tensor) -> Tensor:
    """GGUF's Q4_0: groups of 32, codes -8..7 times an fp16 scale of which the value of largest magnitude is -8."""
    groups = weight.float().reshape(-1, Q4_0_GROUP)
    largest = groups.gather(1, groups.abs().argmax(dim=1, keepdim=True))
    scale = largest / -8
    codes = ((groups / scale).nan_to_num(nan=0.0) + 8.5).floor().clamp(0, 15) - 8
    return _like(codes * scale.half().float(), weight)


def int8_rows(weight: Tensor) -> Tensor:
    """INT8 codes -127..127, one scale per row (output channel, or token of an activation). [..., K] float32."""
    values = weight.float()
    scale = values.abs().amax(dim=-1, keepdim=True) / 127
    return (values / scale).nan_to_num(nan=0.0).round() * scale


def fp8_tensor(weight: Tensor) -> Tensor:
    """fp8 e4m3 with one scale for all of it, as ComfyUI's scaled fp8 layout has it. float32, any shape."""
    values = weight.float()
    scale = (values.abs().amax() / _FP8_MAX).clamp_min(torch.finfo(torch.float32).tiny)
    return (values / scale).clamp(-_FP8_MAX, _FP8_MAX).to(FP8).float() * scale


def fp8_pictures(x: Tensor) -> Tensor:
    """:func:`fp8_tensor` of the activation [B, ..., K], each picture of the batch by itself: people make one."""
    return torch.stack([fp8_tensor(one) for one in x])


def naive_w4a4(weight: Tensor, act_unsigned: bool) -> W4A4:
    """The codes of our format without anything that SVDQuant does: scale amax / 7 for each row and group of 64."""
    n, k = weight.shape
    wscales = (weight.float().reshape(n, -1, GROUP).abs().amax(dim=-1) / SIGNED_MAX).to(weight.dtype)
    wscales = wscales.masked_fill(wscales == 0, 1.0)
    q = (weight.float().reshape(n, -1, GROUP) / wscales.float()[..., None]).round().clamp(-SIGNED_MAX - 1, SIGNED_MAX)
    smooth, down, up = weight.new_ones(k), weight.new_empty(0, k), weight.new_empty(n, 0)
    return W4A4(q.to(torch.int8).reshape(n, k), wscales, smooth, down, up, act_unsigned)


def _like(values: Tensor, weight: Tensor) -> Tensor:
    return values.reshape(weight.shape).to(weight.dtype)


# ---- linears


class Simulated(nn.Module):
    """A linear with the values that a format has left over. weight: [N, K] · bias: [N] or None · quantize_input: of
    the activation [B, ..., K], or None: it stays as it is."""

    def __init__(self, weight: Tensor, bias: Tensor | None, quantize_input: Callable[[Tensor], Tensor] | None = None):
        super().__init__()
        self.dense, self.bias, self._quantize_input = weight, bias, quantize_input

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, ..., K] in the type in which the model computes. Returns that type."""
        if self._quantize_input is None:
            return functional.linear(x, self.dense.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        values = self._quantize_input(x)
        return functional.linear(values, self.dense.float(), _float(self.bias)).to(x.dtype)


class SimulatedW4A4(nn.Module):
    """W4A4 arithmetic of the reference. parts: (columns of the input, weight for them), outputs summed."""

    def __init__(self, parts: Sequence[tuple[slice, W4A4]], bias: Tensor | None):
        super().__init__()
        self._parts, self.bias = tuple(parts), _float(bias)
        dense = [reference.dequantize_w4a4(weight) for _, weight in parts]
        self.dense = torch.cat([values for values, _ in dense], dim=1)
        # What SHIFT adds to the input of an unsigned part, a file has in its bias.
        for _, shift in dense:
            if shift is not None:
                self.bias = -shift if self.bias is None else self.bias - shift

    def forward(self, x: Tensor) -> Tensor:
        """As :meth:`Simulated.forward`; activations are rounded to T first."""
        rows = x.reshape(-1, x.shape[-1])
        y = 0
        for columns, weight in self._parts:
            part = rows[:, columns].to(weight.smooth_factor.dtype)
            y = y + reference.linear_w4a4(part, weight, out_dtype=torch.float32)
        y = y if self.bias is None else y + self.bias
        return y.to(x.dtype).reshape(*x.shape[:-1], y.shape[-1])


def _float(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float()


# ---- the table


@dataclass(frozen=True)
class Layer:
    """A layer that our format quantizes. weight: [N, K] in T · bias: [N] or None · sections: columns of the input that
    are quantized apart, and whether they come out of a GELU; none for modulation layers."""

    weight: Tensor
    bias: Tensor | None
    sections: tuple[tuple[slice, bool], ...]


@dataclass(frozen=True)
class Baseline:
    """label: for tables · numbers: of weights and activations · bits: stored per weight, scales included · make: the
    linear that takes the place of a layer · modulation: the same for modulation layers."""

    label: str
    numbers: str
    bits: float
    make: Callable[[Layer], nn.Module]
    modulation: Callable[[Layer], nn.Module]


def _weights(
    quantize: Callable[[Tensor], Tensor], quantize_input: Callable[[Tensor], Tensor] | None = None
) -> Callable[[Layer], nn.Module]:
    return lambda layer: Simulated(quantize(layer.weight), layer.bias, quantize_input)


def _naive(layer: Layer) -> nn.Module:
    parts = [(columns, naive_w4a4(layer.weight[:, columns], unsigned)) for columns, unsigned in layer.sections]
    return SimulatedW4A4(parts, layer.bias)


_AWQ = _weights(awq)
_INT8 = _weights(int8_rows, int8_rows)
_FP8_WEIGHTS, _FP8 = _weights(fp8_tensor), _weights(fp8_tensor, fp8_pictures)

BASELINES = {
    "fp8-weights": Baseline("fp8 e4m3, scaled, weights only", "W8A16", 8.0, _FP8_WEIGHTS, _FP8_WEIGHTS),
    "fp8": Baseline("fp8 e4m3, scaled, one scale per tensor", "W8A8", 8.0, _FP8, _FP8),
    "int8": Baseline("int8, per channel and token", "W8A8", 8.0, _INT8, _INT8),
    "nf4": Baseline("NF4, group 64", "W4A16", 4 + 32 / GROUP, _weights(nf4), _AWQ),
    "q4-0": Baseline("GGUF Q4_0, group 32", "W4A16", 4 + 16 / Q4_0_GROUP, _weights(q4_0), _AWQ),
    "naive": Baseline("naive W4A4, group 64", "W4A4", 4 + 16 / GROUP, _naive, _AWQ),
}
