"""Whole layers on the INT4 kernels against the same layers in PyTorch."""

from __future__ import annotations

import pytest
import torch
from checks import relative_error

from svdq.kernels import Backend, reference
from svdq.kernels.int4 import AWQ, W4A4, PackedW4A4

pytestmark = pytest.mark.gpu

DEVICE = "cuda"


def layer(n: int, k: int, rank: int, dtype: torch.dtype, unsigned: bool = False) -> PackedW4A4:
    generator = torch.Generator().manual_seed(n + k + rank)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    weight = W4A4(
        q=torch.randint(-8, 8, (n, k), generator=generator).to(torch.int8),
        wscales=(torch.rand(n, k // 64, generator=generator) * 0.02 + 0.001).to(dtype),
        smooth_factor=normal(k).mul_(0.3).exp_().to(dtype),
        proj_down=(normal(rank, k) * k**-0.5).to(dtype),
        proj_up=(normal(n, rank) * 0.3).to(dtype),
        act_unsigned=unsigned,
    ).pack()
    fields = {name: value.to(DEVICE) for name, value in vars(weight).items() if isinstance(value, torch.Tensor)}
    return PackedW4A4(**fields, act_unsigned=unsigned)


@pytest.mark.parametrize("m", [1, 70, 4608])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("axis", [0, 1])
def test_linear(axis: int, dtype: torch.dtype, m: int) -> None:
    """One part, and two side by side: qkv and fc1 of one input, or attention output and fc2 summed.

    The yardstick is the INT4 quantization itself. Kernels and PyTorch round to codes at different sides now and then: a
    tenth of its error apart at most, and equally far from the layer with unquantized activations.
    """
    from svdq.kernels.linear import linear_parts_w4a4

    if axis == 0:
        parts = (layer(384, 256, 32, dtype), layer(512, 256, 16, dtype))
    else:
        parts = (layer(256, 256, 32, dtype), layer(256, 1024, 16, dtype, unsigned=True))
    k = 256 if axis == 0 else 1280
    generator = torch.Generator().manual_seed(m)
    x = torch.randn(m, k, generator=generator).to(dtype)
    if axis == 1:
        x[:, 256:] = reference.gelu(x[:, 256:])
    bias = torch.randn(896 if axis == 0 else 256, generator=generator).to(dtype)
    x, bias = x.to(DEVICE), bias.to(DEVICE)
    cases = [(parts, bias), (parts, None)]
    if axis == 0:
        cases.append((parts[:1], bias[:384]))
    for chosen, b in cases:
        y = linear_parts_w4a4(x, chosen, axis, b)
        expected = reference.linear_parts_w4a4(x, chosen, axis, b)
        assert y.dtype == dtype and y.shape == expected.shape
        dense, shift = reference.dequantize_parts(chosen, axis, torch.float32)
        exact = x[:, : dense.shape[1]].double() @ dense.double().t() + (0 if shift is None else shift.double())
        exact = exact if b is None else exact + b.double()
        error = relative_error(expected, exact)
        assert relative_error(y, expected) <= 0.1 * error
        assert relative_error(y, exact) <= 1.03 * error
        assert torch.equal(y, linear_parts_w4a4(x, chosen, axis, b)), "two runs differ"


def test_modulation_layers() -> None:
    from svdq.kernels.linear import linear_awq

    generator = torch.Generator().manual_seed(0)
    scales = (torch.rand(384, 4, generator=generator) * 0.02).bfloat16()
    awq = AWQ(torch.randint(0, 16, (384, 256), generator=generator).to(torch.uint8), scales, scales * -8)
    packed = awq.pack(3)
    packed = type(packed)(packed.qweight.to(DEVICE), packed.wscales.to(DEVICE), packed.wzeros.to(DEVICE), 3)
    x = torch.randn(9, 256, generator=generator).bfloat16().to(DEVICE)
    y = linear_awq(x[:2], packed, None)
    assert relative_error(y.cpu(), x[:2].double().cpu() @ reference.dequantize_awq(awq).double().t()) <= 3e-3
    assert linear_awq(x, packed, None) is None
    assert linear_awq(x[:2].half(), packed, None) is None


def test_the_backend_is_this_module() -> None:
    from svdq.kernels import linear

    assert Backend("int4", True, "", kernels=True).load() is linear
    assert Backend("int4", True, "").load() is reference
