"""AWQ W4A16 GEMV against float64, against the original kernel's outputs, and from run to run."""

from __future__ import annotations

import pytest
import torch
from checks import OUTPUT_ROUNDING, load_golden, relative_error

from svdq.kernels.int4 import AWQ, PackedAWQ

pytestmark = pytest.mark.gpu

HALF = (torch.bfloat16, torch.float16)


def random_layer(n: int, k: int, dtype: torch.dtype) -> AWQ:
    generator = torch.Generator().manual_seed(n + k)
    scales = (torch.rand(n, k // 64, generator=generator) * 0.02 + 0.001).to(dtype)
    codes = torch.randint(0, 16, (n, k), generator=generator, dtype=torch.uint8)
    return AWQ(codes, scales, (-7 * scales.float()).to(dtype))


def exact(x: torch.Tensor, layer: AWQ) -> torch.Tensor:
    scales, zeros = (t.double().repeat_interleave(64, 1) for t in (layer.wscales, layer.wzeros))
    return x.double() @ (layer.code.double() * scales + zeros).t()


def to_gpu(weight: PackedAWQ) -> PackedAWQ:
    return PackedAWQ(weight.qweight.cuda(), weight.wscales.cuda(), weight.wzeros.cuda(), weight.splits)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(("n", "k", "splits"), [(18432, 3072, 6), (9216, 3072, 3), (192, 64, 6), (132, 320, 3)])
@pytest.mark.parametrize("m", [1, 2, 3, 8])
def test_distance_to_float64(m: int, n: int, k: int, splits: int, dtype: torch.dtype) -> None:
    from svdq.kernels.gemv import gemv_w4a16

    layer = random_layer(n, k, dtype)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype)
    bias = torch.randn(n, generator=torch.Generator().manual_seed(9))
    weight = to_gpu(layer.pack(splits))
    y = gemv_w4a16(x.cuda(), weight, bias.cuda())
    assert relative_error(y.cpu(), exact(x, layer) + bias.double()) < OUTPUT_ROUNDING[dtype]
    assert torch.equal(y, gemv_w4a16(x.cuda(), weight, bias.cuda())), "two runs differ"


@pytest.mark.parametrize("name", ["bf16_awq_gemv_n512_k256", "bf16_awq_gemv_n64_k3072", "fp16_awq_gemv_n64_k3072"])
def test_nearer_to_float64_than_the_original_kernel(name: str) -> None:
    from svdq.kernels.gemv import gemv_w4a16

    data = load_golden(f"kernels/{name}.safetensors")
    weight = PackedAWQ(data["in.packed.wgt"], data["in.packed.wscales"], data["in.packed.wzeros"], splits=1)
    inputs = [key for key in data if key.startswith("in.x_")]
    assert inputs
    for key in inputs:
        x, theirs = data[key], data[key.replace("in.x", "out.out")]
        expected = exact(x, weight.unpack())
        error = relative_error(gemv_w4a16(x.cuda(), to_gpu(weight)).cpu(), expected)
        assert error < OUTPUT_ROUNDING[x.dtype]
        assert error < relative_error(theirs, expected)


def test_shapes_are_checked() -> None:
    from svdq.kernels.gemv import gemv_w4a16

    weight = to_gpu(random_layer(192, 64, torch.bfloat16).pack(6))
    with pytest.raises(ValueError, match="9 rows"):
        gemv_w4a16(torch.zeros(9, 64, dtype=torch.bfloat16, device="cuda"), weight)
    with pytest.raises(ValueError, match="expected"):
        gemv_w4a16(torch.zeros(1, 128, dtype=torch.bfloat16, device="cuda"), weight)
