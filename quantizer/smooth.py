"""The smoothing of layers that share an input: from the weights alone, or searched on activations."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..kernels.int4 import SHIFT, W4A4, W8A8
from . import solve
from .activations import InputStatistics
from .solve import Recipe

# Exponents that are tried: weights alone decide at alpha 0, activations alone at beta 0.
ALPHAS = (0.0, 0.2, 0.35, 0.5, 0.65, 0.8)
BETAS = (0.0, 0.3, 0.6)
RANKS = (16, 32, 48, 64, 96, 128)  # that are tried where an error is given instead
_SEARCH_OUTPUTS = 1024  # of a layer, at most, that are computed for each pair of exponents


@dataclass(frozen=True)
class Member:
    """One of the layers: weight [N, K], any float dtype · unsigned: behind a GELU · statistics: of its input."""

    weight: Tensor
    unsigned: bool
    statistics: InputStatistics | None = None

    @property
    def rows(self) -> Tensor | None:
        return None if self.statistics is None else self.statistics.rows

    @property
    def act_square(self) -> Tensor | None:
        """float32 [K]: importance of each channel; None where all count alike."""
        return None if self.statistics is None else self.statistics.importance


@dataclass(frozen=True)
class Smoothing:
    """smooth: T [K] · facts: for the report."""

    smooth: Tensor
    facts: dict[str, object] = field(default_factory=dict)

    def quantize(self, member: Member, recipe: Recipe, moments: Tensor | None = None) -> W4A4:
        """moments: [K, K], second moments of the raw input, for error feedback. Raises as solve.quantize_w4a4 does."""
        hessian = None
        if moments is not None and moments.diagonal().any():
            values = self.smooth.float()
            hessian = moments / values / values[:, None]
        return solve.quantize_w4a4(member.weight, self.smooth, recipe, member.unsigned, member.act_square, hessian)

    def quantize_int8(self, member: Member) -> W8A8:
        return solve.quantize_w8a8(member.weight, self.smooth)

    def quantize_for(
        self, member: Member, recipe: Recipe, rows: Tensor, moments: Tensor | None = None
    ) -> tuple[W4A4, dict[str, object]]:
        """(:meth:`quantize`, facts) with the smallest rank whose output error for ``rows`` T [M, K] is within
        ``recipe.target_error`` (relative, root mean square); the largest rank allowed where none is."""
        ranks = [rank for rank in RANKS if rank < recipe.rank] + [recipe.rank]
        found: dict[int, tuple[W4A4, float]] = {}

        def fits(rank: int) -> bool:
            quantized = self.quantize(member, replace(recipe, rank=rank), moments)
            found[rank] = quantized, solve.output_error(member.weight, quantized, rows) ** 0.5
            return found[rank][1] <= recipe.target_error

        # More rank, less error: the first that fits is found by halving. All tries above it have fitted.
        index = bisect.bisect_left(ranks, True, hi=len(ranks) - 1, key=fits)
        if ranks[index] not in found:
            fits(ranks[index])
        quantized, error = found[ranks[index]]
        return quantized, {"rank": ranks[index], "target_met": error <= recipe.target_error}


def find_smooth(members: Sequence[Member], recipe: Recipe, int8: bool = False) -> Smoothing:
    """The smoothing that ``members``, which read the same channels, have in common.

    With statistics, the exponents are those with the smallest sum of relative output errors in W4A4 arithmetic after
    one round, or in W8A8 (``int8``). Without, or where all activations are 0, weights alone decide.
    """
    weight_span = solve.channel_span([member.weight for member in members])
    known = [member.statistics for member in members if member.statistics is not None]
    if not known or not any(statistics.amax.any() for statistics in known):
        return Smoothing(solve.smooth_factor(weight_span, dtype=recipe.dtype))
    # What is divided by the smoothing is the input + SHIFT behind a GELU, whose least value is above -SHIFT.
    spans = [_span(member) for member in members if member.statistics is not None]
    act_span = torch.stack(spans).amax(dim=0)
    quick = replace(recipe, iterations=1)
    samples = [_sample(member) for member in members]

    def make(alpha: float, beta: float) -> Tensor:
        return solve.smooth_factor(weight_span, act_span, alpha, beta, recipe.dtype)

    def error(smooth: Tensor) -> float:
        tried, total = Smoothing(smooth), 0.0
        for sample in samples:
            try:
                quantized = tried.quantize_int8(sample) if int8 else tried.quantize(sample, quick)
            except solve.OutOfRange:
                return math.inf
            total += solve.output_error(sample.weight, quantized, sample.rows.to(recipe.dtype))
        return math.inf if math.isnan(total) else total

    candidates = [(alpha, beta) for alpha in ALPHAS for beta in BETAS]
    smooth, (alpha, beta) = solve.search_smooth(candidates, make, error)
    return Smoothing(smooth, {"smooth_alpha": alpha, "smooth_beta": beta})


def _span(member: Member) -> Tensor:
    statistics = member.statistics
    if not member.unsigned:
        return statistics.amax
    # Of h + SHIFT, for h between -SHIFT and amax; |h| is the larger of the two at most.
    return statistics.amax + SHIFT


def _sample(member: Member) -> Member:
    """Some outputs of the layer, evenly spread; not fewer than a rank may have."""
    step = -(-len(member.weight) // _SEARCH_OUTPUTS)
    return replace(member, weight=member.weight[::step])
