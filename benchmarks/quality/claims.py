"""The order that is expected of configurations, and whether it is found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .metrics import interval


@dataclass(frozen=True)
class Claim:
    """That the configuration ``better`` is better than ``worse``, by ``margin`` dB."""

    text: str
    better: str
    worse: str
    margin: float = 0.0


FAR = 3.0  # dB
CLAIMS = (
    Claim("SVDQuant rank 32 is far better than naive W4A4 (3 dB)", "r32", "naive", FAR),
    Claim("the smoothing alone is better than naive W4A4", "smooth", "naive"),
    Claim("the branch helps: rank 32 is better than smoothing alone", "r32", "smooth"),
    Claim("rank 32 is better than rank 16", "r32", "r16"),
    Claim("rank 64 is better than rank 32", "r64", "r32"),
    Claim("GPTQ is better than rounding to nearest", "r32-gptq", "r32"),
    Claim("calibrated is better than weights alone", "r32", "r32-free"),
    Claim("int8 mode of a file is better than its int4 mode", "r32-int8", "r32"),
    Claim("SVDQuant rank 16, int4, is better than NF4", "r16", "nf4"),
    Claim("SVDQuant rank 32, int4, is better than NF4", "r32", "nf4"),
    Claim("SVDQuant rank 32 with GPTQ, int8, is better than NF4", "r32-gptq-int8", "nf4"),
)
CHECKED = ("latent_sqnr_db", "psnr_db", "layer_sqnr_db")


def check(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The fields of each claim about configurations that are in ``found`` (name -> measure.Measured), and its
    ``differences``: figure -> mean, low and high of better - worse, prompt by prompt, and the verdict."""
    rows = []
    for claim in CLAIMS:
        if claim.better not in found or claim.worse not in found:
            continue
        better, worse = found[claim.better].values, found[claim.worse].values
        differences = {}
        for figure in CHECKED:
            if figure in better:
                difference = interval(better[figure] - worse[figure])
                differences[figure] = {**asdict(difference), "verdict": difference.verdict(claim.margin)}
        rows.append({**asdict(claim), "differences": differences})
    return rows
