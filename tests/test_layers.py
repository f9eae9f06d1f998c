"""Whole layers on kernels against the same layers in PyTorch."""

from __future__ import annotations

from dataclasses import replace

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

    return W4A4(
        q=torch.randint(-8, 8, (n, k), generator=generator).to(torch.int8),
        wscales=(torch.rand(n, k // 64, generator=generator) * 0.02 + 0.001).to(dtype),
        smooth_factor=normal(k).mul_(0.3).exp_().to(dtype),
        proj_down=(normal(rank, k) * k**-0.5).to(dtype),
        proj_up=(normal(n, rank) * 0.3).to(dtype),
        act_unsigned=unsigned,
    ).pack().map(lambda tensor: tensor.to(DEVICE))  # fmt: skip


@pytest.mark.parametrize("m", [1, 70, 4608])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("axis", [0, 1])
def test_linear(axis: int, dtype: torch.dtype, m: int) -> None:
    """One part, and two side by side: qkv and fc1 of one input, or attention output and fc2 summed.

    The yardstick is the INT4 quantization itself, whose error is step / sqrt(12). Kernels and PyTorch may round 0.1 %
    of the codes, and of a few codes three, to different sides, a step apart: sqrt(12 * 0.1 %) = 11 % of that error,
    and there is output rounding.
    """
    from svdq.kernels.layers import INT4

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
        y = INT4.linear_parts_w4a4(x, chosen, axis, b)
        expected = reference.linear_parts_w4a4(x, chosen, axis, b)
        assert y.dtype == dtype and y.shape == expected.shape
        dense, shift = reference.dequantize_parts(chosen, axis, torch.float32)
        exact = x[:, : dense.shape[1]].double() @ dense.double().t() + (0 if shift is None else shift.double())
        exact = exact if b is None else exact + b.double()
        error = relative_error(expected, exact)
        assert relative_error(y, expected) <= (0.04 + (12 * (1e-3 + 3 / x.numel())) ** 0.5) * error
        if m > 1000:  # enough rows for the differences to cancel out
            assert relative_error(y, exact) <= 1.03 * error
        assert torch.equal(y, INT4.linear_parts_w4a4(x, chosen, axis, b)), "two runs differ"


@pytest.mark.parametrize("rank", [16, 32, 80])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [1, 70, 1000])
def test_int8_layers(m: int, dtype: torch.dtype, rank: int) -> None:
    """As the reference's INT8 arithmetic, and much nearer to unquantized activations than INT4."""
    from svdq.kernels.layers import INT4, INT8

    generator = torch.Generator().manual_seed(m)
    for unsigned in (False, True):
        part = layer(256, 640, rank, dtype, unsigned)
        x = torch.randn(m, 640, generator=generator).to(dtype)
        x = (reference.gelu(x) if unsigned else x).to(DEVICE)
        bias = torch.randn(256, generator=generator).to(dtype).to(DEVICE)
        y = INT8.linear_parts_w4a4(x, (part,), 0, bias)
        natural = part.unpack()
        codes, scales, lora_act = reference.quantize_act_int8(x, natural.smooth_factor, natural.proj_down, unsigned)
        q, wscales, _ = reference.expand_w4_to_int8(natural)
        expected = reference.gemm_w8a8(
            codes, scales, lora_act, q, wscales, natural.proj_up, bias, act_unsigned=unsigned
        )
        assert relative_error(y, expected) <= {torch.bfloat16: 4e-3, torch.float16: 6e-4}[dtype]
        dense, shift = reference.dequantize_w4a4(natural)
        exact = x.double() @ dense.double().t() + bias.double() + (0 if shift is None else shift.double())
        int4 = relative_error(INT4.linear_parts_w4a4(x, (part,), 0, bias), exact)
        assert relative_error(y, exact) <= 0.35 * int4
        assert torch.equal(y, INT8.linear_parts_w4a4(x, (part,), 0, bias)), "two runs differ"


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("ranks", [(32, 32), (16, 80), (160, 112)])
@pytest.mark.parametrize("kind", ["INT4", "INT8"])
def test_one_input_for_two_layers(kind: str, ranks: tuple[int, int], norm: bool) -> None:
    """What each gets by itself, but for the order of the low-rank sums; made apart beyond the largest rank."""
    from svdq.kernels import layers

    compute, dtype, k = getattr(layers, kind), torch.bfloat16, 1152
    parts = [layer(n, k, rank, dtype) for n, rank in zip((384, 256), ranks, strict=True)]
    parts[1] = replace(parts[1], smooth_factor=parts[0].smooth_factor)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(200, k, generator=generator).to(dtype).to(DEVICE)
    scale, shift = (torch.randn(1, k, generator=generator).to(dtype).to(DEVICE) for _ in range(2))
    modulation = layers.Modulation(scale, shift) if norm else None
    together = compute.quantize_for(x, tuple(parts), modulation)
    codes = [found.codes if kind == "INT8" else found[0] for found in together]
    assert (codes[0] is codes[1]) == (compute.max_rank is None or sum(ranks) <= compute.max_rank)
    for part, found in zip(parts, together, strict=True):
        alone = compute.quantize(x, part, modulation)
        first = (found.codes, alone.codes) if kind == "INT8" else (found[0], alone[0])
        assert torch.equal(*first)
        assert relative_error(compute.multiply(found, part, None), compute.multiply(alone, part, None)) <= 1e-3


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", ["INT4", "INT8"])
def test_fused_steps_are_the_plain_ones(kind: str, batch: int) -> None:
    """Modulation in front, and every epilogue behind a product, against the same steps one after the other."""
    from svdq.kernels import layers

    compute, dtype, m, k = getattr(layers, kind), torch.bfloat16, 90, 256
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)

    x, scale, shift = normal(m, k) * 3 + 1, normal(batch, k) * 0.3, normal(batch, k)
    part, bias = layer(768, k, 32, dtype), normal(768)
    modulation = layers.Modulation(scale, shift)
    plain = reference.layer_norm_modulate(x, scale, shift)
    y = compute.multiply(compute.quantize(plain, part), part, bias)
    assert relative_error(compute.multiply(compute.quantize(x, part, modulation), part, bias), y) <= 6e-3

    source = compute.quantize(x, part)
    y = compute.multiply(source, part, bias).double()
    residual, gate = normal(m, 768), normal(batch, 768)
    expected = residual.double() + gate.double().repeat_interleave(m // batch, dim=0) * y
    out = residual.clone()
    compute.multiply(source, part, bias, layers.After(gate=gate, residual=out), out=out)
    assert relative_error(out, expected) <= 4e-3, "in place"

    fc2 = layer(128, 768, 16, dtype, unsigned=True)
    hidden = compute.multiply(source, part, bias, layers.After(gelu=True))
    assert relative_error(hidden, torch.nn.functional.gelu(y, approximate="tanh")) <= 4e-3
    expected = compute.multiply(compute.quantize(hidden, fc2), fc2, None)
    assert relative_error(compute.multiply(compute.gelu_input(source, part, bias, fc2), fc2, None), expected) <= 2e-2

    out_part = layer(128, k, 32, dtype)
    head, tail = compute.quantize(x, out_part), compute.quantize(hidden, fc2)
    expected = compute.multiply(head, out_part, None).double() + compute.multiply(tail, fc2, None).double()
    assert relative_error(compute.multiply_sum(head, out_part, tail, fc2, None), expected) <= 4e-3


def test_modulation_layers() -> None:
    from svdq.kernels.layers import INT4

    generator = torch.Generator().manual_seed(0)
    scales = (torch.rand(384, 4, generator=generator) * 0.02).bfloat16()
    awq = AWQ(torch.randint(0, 16, (384, 256), generator=generator).to(torch.uint8), scales, scales * -8)
    packed = awq.pack(3)
    packed = type(packed)(packed.qweight.to(DEVICE), packed.wscales.to(DEVICE), packed.wzeros.to(DEVICE), 3)
    x = torch.randn(9, 256, generator=generator).bfloat16().to(DEVICE)
    y = INT4.linear_awq(x[:2], packed, None)
    assert relative_error(y.cpu(), x[:2].double().cpu() @ reference.dequantize_awq(awq).double().t()) <= 3e-3
    assert INT4.linear_awq(x, packed, None) is None
    assert INT4.linear_awq(x[:2].half(), packed, None) is None


def test_a_backend_leads_to_its_layers() -> None:
    from svdq.kernels import layers

    assert Backend("int4", True, "", kernels=True).layers is layers.INT4
    assert Backend("int8", True, "", kernels=True).layers is layers.INT8
    assert Backend("int4", True, "").layers is reference
