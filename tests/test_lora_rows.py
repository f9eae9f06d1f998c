"""LoRA on few rows against float64, and from run to run."""

from __future__ import annotations

import pytest
import torch
from checks import OUTPUT_ROUNDING, relative_error


def factors(m: int, n: int, k: int, rank: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """y, x, down, up."""
    generator = torch.Generator().manual_seed(m * n + k + rank)
    shapes = ((m, n), (m, k), (rank, k), (n, rank))
    scales = (1.0, 1.0, k**-0.5, 0.5)
    return tuple((torch.randn(*s, generator=generator) * c).to(dtype) for s, c in zip(shapes, scales, strict=True))


def exact(y: torch.Tensor, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return y.double() + x.double() @ down.double().t() @ up.double().t()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("n", "k", "rank"), [(18432, 3072, 16), (9216, 3072, 4), (192, 64, 1), (1337, 1500, 100)])
@pytest.mark.parametrize("m", [1, 3, 8])
def test_distance_to_float64(m: int, n: int, k: int, rank: int, dtype: torch.dtype) -> None:
    from svdq.kernels.lora_rows import add_lora

    y, *others = factors(m, n, k, rank, dtype)
    found = add_lora(y.cuda(), *(tensor.cuda() for tensor in others))
    assert relative_error(found.cpu(), exact(y, *others)) < OUTPUT_ROUNDING[dtype]
    assert torch.equal(found, add_lora(y.cuda(), *(tensor.cuda() for tensor in others))), "two runs differ"


@pytest.mark.gpu
def test_rows_apart_and_in_place() -> None:
    from svdq.kernels.lora_rows import add_lora

    y, x, down, up = (tensor.cuda() for tensor in factors(2, 256, 128, 16, torch.bfloat16))
    wide_x, wide_y = torch.zeros(2, 200, dtype=x.dtype, device="cuda"), torch.full((2, 300), 7.0).cuda().to(y.dtype)
    wide_x[:, :128], wide_y[:, :256] = x, y
    found = add_lora(wide_y[:, :256], wide_x[:, :128], down, up)
    assert found.data_ptr() == wide_y.data_ptr() and (wide_y[:, 256:] == 7).all()
    assert torch.equal(found, add_lora(y, x, down, up))


@pytest.mark.parametrize("wrong", ["y", "x", "down", "up"])
def test_shapes_are_checked(wrong: str) -> None:
    pytest.importorskip("triton")
    from svdq.kernels.lora_rows import add_lora

    operands = dict(zip(("y", "x", "down", "up"), factors(2, 64, 32, 4, torch.bfloat16), strict=True))
    operands[wrong] = operands[wrong][:, 1:]
    with pytest.raises(ValueError, match="expected"):
        add_lora(**operands)


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90"])
def test_they_compile_without_spills(arch: str) -> None:
    pytest.importorskip("triton")
    from svdq.benchmarks.sass import lora_rows_figures

    for kernel in ("down", "up"):
        figures = lora_rows_figures(kernel, arch)
        assert figures.spill_bytes == 0 and figures.registers <= 128
