"""How far a quantized layer is from the original: signal-to-noise ratios of weight and output."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from ..kernels import reference
from ..kernels.int4 import AWQ, W4A4, W8A8
from .solve import output_error, ratio

FIRST_BIN, BINS = -12, 20  # of histograms, in powers of two
_SAMPLED = 1 << 20
_TOKENS = 64
_OUTLIERS = 0.01  # share of the channels
_OUTLIER_GAIN = 8.0
_CHANNEL_SIGMA = 0.5  # of the logarithm of a channel's standard deviation


def probe(k: int, dtype: torch.dtype, name: str, act_unsigned: bool = False) -> Tensor:
    """T [64, k]: random activations for the layer ``name``, always the same, on the CPU.

    Gaussian with log-normal standard deviations, one channel in a hundred 8 times as large, as the inputs of
    transformers have them; behind a GELU if ``act_unsigned``.
    """
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little")
    generator = torch.Generator().manual_seed(seed)
    gain = torch.exp(_CHANNEL_SIGMA * torch.randn(k, generator=generator))
    gain[torch.randperm(k, generator=generator)[: max(1, round(_OUTLIERS * k))]] *= _OUTLIER_GAIN
    x = (torch.randn(_TOKENS, k, generator=generator) * gain).to(dtype)
    return reference.gelu(x) if act_unsigned else x


def w4a4_quality(weight: Tensor, quantized: W4A4, name: str, rows: Tensor | None = None) -> dict[str, object]:
    """``weight_sqnr_db`` of the dequantized weight and ``output_sqnr_db`` of the output in W4A4 arithmetic.

    weight: [N, K], the original · quantized: natural order · name: of the layer, chooses the :func:`probe` · rows:
    T [M, K], real activations: adds ``calibration_sqnr_db``, of the output for these. None stands for an exact result.
    """
    x = probe(weight.shape[1], quantized.proj_down.dtype, name, quantized.act_unsigned).to(weight.device)
    dense, _ = reference.dequantize_w4a4(quantized)
    quality: dict[str, object] = {
        "weight_sqnr_db": decibel(ratio(dense - weight.float(), weight)),
        "output_sqnr_db": decibel(output_error(weight, quantized, x)),
    }
    quality["weight_histogram"] = histogram(weight)
    if rows is not None:
        quality["activation_histogram"] = histogram(rows)
        quality["calibration_sqnr_db"] = decibel(output_error(weight, quantized, rows.to(x.dtype)))
    return quality


def w8a8_quality(weight: Tensor, quantized: W8A8, name: str, rows: Tensor | None = None) -> dict[str, object]:
    """As :func:`w4a4_quality`, without histograms, for a layer in W8A8 arithmetic."""
    x = probe(weight.shape[1], quantized.smooth_factor.dtype, name).to(weight.device)
    dense = reference.dequantize_w8a8(quantized)
    quality: dict[str, object] = {
        "weight_sqnr_db": decibel(ratio(dense - weight.float(), weight)),
        "output_sqnr_db": decibel(output_error(weight, quantized, x)),
    }
    if rows is not None:
        quality["calibration_sqnr_db"] = decibel(output_error(weight, quantized, rows.to(x.dtype)))
    return quality


def awq_quality(weight: Tensor, quantized: AWQ, name: str, rows: Tensor | None = None) -> dict[str, float | None]:
    """As :func:`w4a4_quality`, for a modulation layer: 16-bit activations."""
    dtype = quantized.wscales.dtype

    def output(x: Tensor) -> float | None:
        exact = x.float() @ weight.float().t()
        return decibel(ratio(reference.gemv_w4a16(x, quantized).float() - exact, exact))

    quality = {
        "weight_sqnr_db": decibel(ratio(reference.dequantize_awq(quantized) - weight.float(), weight)),
        "output_sqnr_db": output(probe(weight.shape[1], dtype, name).to(weight.device)),
    }
    if rows is not None:
        quality["calibration_sqnr_db"] = output(rows.to(dtype))
    return quality


def histogram(values: Tensor) -> list[int]:
    """Values by magnitude, as counts of a million: ``result[i]`` have log2(|value| / root mean square) in
    [i + FIRST_BIN, i + FIRST_BIN + 1), the outermost ones everything beyond, zeros not at all. Of a sample, where there
    are many values."""
    flat = values.reshape(-1)
    flat = flat[:: -(-flat.numel() // _SAMPLED)].float().abs()
    magnitude = (flat / flat.square().mean().sqrt()).log2()
    bins = magnitude[magnitude.isfinite()].floor().clamp(FIRST_BIN, FIRST_BIN + BINS - 1) - FIRST_BIN
    counts = torch.bincount(bins.long().cpu(), minlength=BINS)
    return (counts * 1_000_000 / max(1, flat.numel())).round().long().tolist()


def decibel(error: float) -> float | None:
    """Relative squared error as a signal-to-noise ratio in dB, two decimals; None for no error."""
    return None if error == 0 else round(-10 * math.log10(error), 2)
