"""kernels/feedback.py against quantizer/solve.py's own arithmetic, in Triton's interpreter and on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checks import relative_error
from torch import Tensor

from svdq.quantizer import solve

INTERPRETED = """
import contextlib, sys
sys.path.insert(0, sys.argv[1])
import conftest  # makes the clone importable as svdq
import torch
torch.cuda.device_of = lambda tensor: contextlib.nullcontext()
from svdq.kernels.feedback import round_group
from svdq.quantizer import solve
from test_feedback import codes_of, problem

# Not bf16: the interpreter truncates to it.
for n, k, awq in ((40, 256, False), (16, 64, False), (40, 192, True)):
    weight, hessian = problem(n, k)
    found = []
    for kernel in (None, round_group):
        solve._kernel = lambda device: kernel
        found.append(codes_of(weight, hessian, torch.float16, awq))
    assert all(torch.equal(a, b) for a, b in zip(*found)), (n, k, awq)
print("equal")
"""


def problem(n: int, k: int) -> tuple[Tensor, Tensor]:
    """(weight float32 [n, k] with a group of zeros, hessian [k, k] of correlated inputs; a channel and a group of them
    were never active)."""
    generator = torch.Generator().manual_seed(n + k)
    weight = torch.randn(n, k, generator=generator) * (0.4 * torch.randn(k, generator=generator)).exp()
    weight[3, :64] = 0
    x = torch.randn(2048, 32, generator=generator) @ torch.randn(32, k, generator=generator) / 6
    x = x + 0.3 * torch.randn(2048, k, generator=generator)
    x[:, 7] = 0
    x[:, 128:192] = 0
    return weight, x.t() @ x


def codes_of(weight: Tensor, hessian: Tensor, dtype: torch.dtype, awq: bool) -> tuple[Tensor, ...]:
    if awq:
        found = solve.quantize_awq(weight, dtype, hessian=hessian)
        return found.code, found.wscales, found.wzeros
    return solve.gptq(weight, hessian, dtype)


def check_against_torch(n: int, k: int, dtype: torch.dtype, awq: bool) -> None:
    """On the GPU. Sums in another order can move a code, and those behind it, to the other side of a tie."""
    weight, hessian = (tensor.cuda() for tensor in problem(n, k))
    found, kernel = codes_of(weight, hessian, dtype, awq), solve._kernel
    try:
        solve._kernel = lambda device: None
        expected = codes_of(weight, hessian, dtype, awq)
    finally:
        solve._kernel = kernel
    assert (found[0] != expected[0]).float().mean() < 0.01
    assert relative_error(found[1].float().cpu(), expected[1].float().cpu()) < 1e-2
    assert all(torch.equal(a, b) for a, b in zip(found, codes_of(weight, hessian, dtype, awq), strict=True))


def test_the_same_bits_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    arguments = [sys.executable, "-c", INTERPRETED, str(Path(__file__).parent)]
    done = subprocess.run(arguments, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.stdout.endswith("equal\n"), done.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.parametrize("awq", [False, True], ids=["int4", "awq"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("n", "k"), [(40, 256), (3072, 3072), (768, 12288)])
def test_against_torch(n: int, k: int, dtype: torch.dtype, awq: bool) -> None:
    check_against_torch(n, k, dtype, awq)


@pytest.mark.gpu
def test_output_error() -> None:
    """A whole layer with the kernel is as good as one without."""
    weight, hessian = (tensor.cuda() for tensor in problem(1536, 1024))
    smooth, kernel, errors = torch.ones(1024, dtype=torch.bfloat16, device="cuda"), solve._kernel, []
    try:
        for choice in (kernel, lambda device: None):
            solve._kernel = choice
            made = solve.quantize_w4a4(weight, smooth, solve.Recipe(rank=16, iterations=2), hessian=hessian)
            missed = solve.reference.dequantize_w4a4(made)[0].float() - weight
            errors.append((missed * (missed @ hessian)).sum().item())
    finally:
        solve._kernel = kernel
    assert abs(errors[0] / errors[1] - 1) < 0.01, errors


@pytest.mark.parametrize("wrong", range(6))
def test_operands_are_checked(wrong: int) -> None:
    pytest.importorskip("triton")
    from svdq.kernels.feedback import round_group

    shapes = [(32, 128), (128, 128), (32, 128), (32, 2), (32, 2)]
    start = 0
    if wrong < len(shapes):
        shapes[wrong] = (shapes[wrong][0], shapes[wrong][1] + 64)
    else:
        start = 32
    work, inverse, codes, scales, zeros = (torch.zeros(*shape) for shape in shapes)
    with pytest.raises(ValueError, match="expected contiguous"):
        round_group(work, start, inverse, codes, scales, zeros, -8, 7)


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90"])
@pytest.mark.parametrize("steps", [0, len(solve.RATIOS)])
def test_it_compiles_without_spills(arch: str, steps: int) -> None:
    pytest.importorskip("triton")
    from svdq.benchmarks.sass import feedback_figures

    assert feedback_figures(arch, steps).spill_bytes == 0
