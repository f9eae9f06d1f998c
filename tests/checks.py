"""How close is close enough: one place for tolerances, and for the golden data that lies outside the repository."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import GOLDEN
from safetensors.torch import load_file
from torch import Tensor

# Relative Frobenius distance of a correctly rounded result from the exact one, with a little room.
OUTPUT_ROUNDING = {torch.bfloat16: 2e-3, torch.float16: 2.5e-4, torch.float32: 1e-6}


def load_golden(name: str) -> dict[str, Tensor]:
    """The tensors of a golden file; skips the test where the golden data is not beside the clone."""
    return load_file(golden_path(name))


def golden_path(name: str) -> Path:
    """Path of a golden file; skips the test where the golden data is not beside the clone."""
    if not (GOLDEN / name).is_file():
        pytest.skip(f"golden data is not there: {Path('..') / 'shared' / 'golden' / name}")
    return GOLDEN / name


def golden_names(pattern: str) -> list[str]:
    """Golden files that match ``pattern``, for parametrize; one placeholder that will be skipped if there are none."""
    return sorted(str(path.relative_to(GOLDEN)) for path in GOLDEN.glob(pattern)) or [pattern]


def assert_same(got: Tensor, expected: Tensor, what: str = "tensor") -> None:
    """Same dtype, shape and bits."""
    assert got.dtype == expected.dtype, f"{what}: dtype {got.dtype}, expected {expected.dtype}"
    assert got.shape == expected.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    if got.numel():
        differing = (_bytes(got) != _bytes(expected)).sum().item()
        assert differing == 0, f"{what}: {differing} of {got.nbytes} bytes differ"


def assert_codes_close(got: Tensor, expected: Tensor, share: float = 1e-3) -> None:
    """INT4 codes: differ by at most 1, in at most ``share`` of the elements (rounding ties)."""
    distance = (got.int() - expected.int()).abs()
    assert distance.max() <= 1, f"codes differ by up to {distance.max()}"
    differing = (distance > 0).float().mean().item()
    assert differing <= share, f"{differing:.3%} of the codes differ, at most {share:.3%} may"


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of ``expected``; checks that everything is finite."""
    assert got.isfinite().all(), "the result is not finite"
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def assert_close(got: Tensor, expected: Tensor, rms: float = 4e-3, peak: float | None = 2e-2, what: str = "") -> None:
    """Relative RMS error at most ``rms``; no element off by more than ``peak`` times the larger of it and the RMS."""
    error = relative_error(got, expected)
    assert error <= rms, f"{what} relative RMS error {error:.3e}, at most {rms:.1e} is allowed"
    if peak is not None:
        expected = expected.double()
        scale = expected.abs().clamp_min(expected.square().mean().sqrt())
        worst = ((got.double() - expected).abs() / scale).max().item()
        assert worst <= peak, f"{what} largest relative error {worst:.3e}, at most {peak:.1e} is allowed"


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
