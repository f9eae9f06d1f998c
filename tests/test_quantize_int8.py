"""The quantize kernel of the INT8 mode: against the reference on a GPU, and its registers without one."""

from __future__ import annotations

import pytest
import torch
from checks import relative_error
from test_layers import layer

from svdq.kernels import reference


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize(
    ("m", "k", "rank", "unsigned"),
    [(35, 384, 48, False), (20, 256, 32, True), (5, 640, 0, False), (1100, 3072, 80, False), (63, 1280, 16, False),
     (1, 12288, 32, True), (4608, 3072, 32, False)],
)  # fmt: skip
def test_against_the_reference(m: int, k: int, rank: int, unsigned: bool, norm: bool, dtype: torch.dtype) -> None:
    from svdq.kernels.low_rank import natural_factors
    from svdq.kernels.quantize_int8 import quantize_act_int8

    part = layer(128, k, rank, dtype, unsigned)
    natural = part.unpack()
    generator = torch.Generator().manual_seed(m)
    x = (torch.randn(m, k, generator=generator) * 3 + 1).to(dtype)
    if m > 1:
        x[m // 2] = 0
    x[:, 5] *= 30
    x = (reference.gelu(x) if unsigned else x).cuda()
    proj_down, proj_up = natural_factors(part)
    assert torch.equal(proj_down, natural.proj_down) and torch.equal(proj_up, natural.proj_up)
    modulation, plain = (), x
    if norm:
        modulation = tuple(torch.randn(1, k, generator=generator).to(dtype).cuda() for _ in range(2))
        plain = reference.layer_norm_modulate(x, *modulation)
    codes, scales, lora_act = quantize_act_int8(x, part, proj_down, *modulation)
    expected = reference.quantize_act_int8(plain, natural.smooth_factor, natural.proj_down, unsigned)
    distance = (codes.int() - expected[0].int()).abs()
    assert distance.max() <= (2 if norm else 1)  # behind a norm, T(x') may be the neighbour, and its code with it
    assert (distance > 0).float().mean() <= 2e-3
    assert relative_error(scales, expected[1].double()) <= (1e-3 if norm else 1e-5)
    if rank:
        assert relative_error(lora_act, expected[2].double()) <= {torch.bfloat16: 2e-3, torch.float16: 3e-4}[dtype]
    again = quantize_act_int8(x, part, proj_down, *modulation)
    assert all(torch.equal(a, b) for a, b in zip(again, (codes, scales, lora_act), strict=True)), "two runs differ"


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90"])
@pytest.mark.parametrize("norm", [False, True])
def test_two_blocks_fit_a_multiprocessor(arch: str, norm: bool) -> None:
    pytest.importorskip("triton")
    from svdq.benchmarks.sass import quantize_int8_figures

    for unsigned in (False, True):
        figures = quantize_int8_figures(arch, norm=norm, act_unsigned=unsigned)
        assert figures.registers <= 128
        assert figures.spill_bytes <= 24  # and none in a loop
