"""The fused quantize + low-rank-down kernel against the reference and the original kernel's outputs."""

from __future__ import annotations

import pytest
import torch
from checks import assert_codes_close, golden_names, load_golden, relative_error

from svdq.kernels import reference
from svdq.kernels.int4 import W4A4, PackedW4A4

pytestmark = pytest.mark.gpu

HALF = (torch.bfloat16, torch.float16)


def random_layer(k: int, rank: int, dtype: torch.dtype, unsigned: bool = False) -> W4A4:
    """A layer of which only the input side is used."""
    generator = torch.Generator().manual_seed(k + rank)
    return W4A4(
        q=torch.zeros(128, k, dtype=torch.int8),
        wscales=torch.ones(128, k // 64, dtype=dtype),
        smooth_factor=torch.randn(k, generator=generator).mul_(0.3).exp_().to(dtype),
        proj_down=(torch.randn(rank, k, generator=generator) * k**-0.5).to(dtype),
        proj_up=torch.zeros(128, rank, dtype=dtype),
        act_unsigned=unsigned,
    )


def to_gpu(weight: PackedW4A4) -> PackedW4A4:
    tensors = (weight.qweight, weight.wscales, weight.smooth_factor, weight.proj_down, weight.proj_up)
    return PackedW4A4(*(tensor.cuda() for tensor in tensors), weight.act_unsigned)


def run(x: torch.Tensor, layer: W4A4, **options: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The kernel's outputs in natural order on the CPU; checks that a second run gives the same bits."""
    from svdq.kernels.act_layout import unpack_act, unpack_ascales
    from svdq.kernels.quantize import quantize_act

    weight, m = to_gpu(layer.pack()), x.shape[0]
    codes, ascales, lora_act = quantize_act(x.cuda(), weight, **options)
    again = quantize_act(x.cuda(), weight, **options)
    natural = unpack_act(codes.cpu(), m, layer.act_unsigned), unpack_ascales(ascales.cpu(), m), lora_act.cpu()
    natural_again = unpack_act(again[0].cpu(), m, layer.act_unsigned), unpack_ascales(again[1].cpu(), m), again[2].cpu()
    assert all(torch.equal(a, b) for a, b in zip(natural, natural_again, strict=True)), "two runs differ"
    return natural


def check(x: torch.Tensor, layer: W4A4, **options: int) -> None:
    codes, ascales, lora_act = run(x, layer, **options)
    expected_codes, expected_ascales, _ = reference.quantize_act(
        x, layer.smooth_factor, layer.proj_down, layer.act_unsigned
    )
    assert_codes_close(codes, expected_codes)
    # one rounding of x / smooth to 16 bits may fall to the other side, and take the group's largest value with it
    steps = (ascales.view(torch.int16).int() - expected_ascales.view(torch.int16).int()).abs()
    assert steps.max() <= 1
    assert (steps > 0).float().mean() <= 1e-3
    if lora_act.numel():
        assert relative_error(lora_act, x.double() @ layer.proj_down.double().t()) < 1e-5


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("unsigned", [False, True], ids=["signed", "unsigned"])
@pytest.mark.parametrize(
    ("m", "k", "rank"),
    [(4608, 3072, 32), (512, 12288, 32), (1, 128, 16), (63, 256, 48), (4685, 384, 0), (300, 1024, 128), (64, 512, 256)],
)
def test_against_the_reference(m: int, k: int, rank: int, unsigned: bool, dtype: torch.dtype) -> None:
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)) * 2
    x[:, 7] *= 40  # an outlier channel
    x = reference.gelu(x.to(dtype)) if unsigned else x.to(dtype)
    if m > 1:
        x[m // 2] = 0
    check(x, random_layer(k, rank, dtype, unsigned))


@pytest.mark.parametrize("options", [{"block_m": 16}, {"block_m": 64}, {"pieces": 1}, {"pieces": 5}], ids=str)
def test_every_cut_of_the_work(options: dict[str, int]) -> None:
    x = torch.randn(200, 1024, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    check(x, random_layer(1024, 32, torch.bfloat16), **options)


def test_rows_that_are_not_adjacent() -> None:
    """The attention half of linear2's input is a slice of wider rows."""
    wide = torch.randn(100, 640, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    layer = random_layer(128, 16, torch.bfloat16)
    from svdq.kernels.quantize import quantize_act

    weight = to_gpu(layer.pack())
    sliced = quantize_act(wide.cuda()[:, 256:384], weight)
    adjacent = quantize_act(wide[:, 256:384].contiguous().cuda(), weight)
    assert torch.equal(sliced[2], adjacent[2])
    # blocks of 64 tokens, of which the second has 28 empty rows: compare what the rows hold
    from svdq.kernels.act_layout import unpack_act

    assert torch.equal(unpack_act(sliced[0].cpu(), 100), unpack_act(adjacent[0].cpu(), 100))


@pytest.mark.parametrize("name", [n for n in golden_names("kernels/*_quant_m*.safetensors") if "glu" not in n])
def test_against_the_original_kernel(name: str) -> None:
    data = load_golden(name)
    down = data["in.logical.lora_down"]
    rank, k = down.shape
    layer = random_layer(k, rank, down.dtype)
    layer = W4A4(layer.q, layer.wscales, data["in.logical.smooth"], down, layer.proj_up)
    codes, ascales, lora_act = run(data["in.x"], layer)
    assert torch.equal(ascales, data["out.logical.ascales"])
    # The original takes a subnormal scale for zero and saturates; ours divides by it.
    normal = ascales.float().repeat_interleave(64, dim=1).float() >= torch.finfo(torch.float32).tiny
    assert_codes_close(codes.masked_fill(~normal, 0), data["out.logical.act"].masked_fill(~normal, 0))
    expected = data["out.logical.lora_act"]
    normal = expected.abs().amax(dim=1) < 1e20  # without the rows of one huge value
    assert relative_error(lora_act[normal], expected[normal]) < 1e-5
