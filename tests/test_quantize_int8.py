"""The quantize kernel of the INT8 mode: against the reference on a GPU, and its registers without one."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from checks import relative_error
from test_layers import layer

from svdq.kernels import reference

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def check(m: int, k: int, rank: int, unsigned: bool, batches: int, dtype: torch.dtype, cut=None, negative=False):
    """Compare with the reference, and with a second run; batches: of the norm, 0: none."""
    from svdq.kernels.low_rank import natural_factors
    from svdq.kernels.quantize_int8 import quantize_act_int8

    part = layer(128, k, rank, dtype, unsigned)
    natural = part.unpack()
    generator = torch.Generator().manual_seed(m)
    x = (torch.randn(m, k, generator=generator) * 3 + 1).to(dtype)
    if m > 1:
        x[m // 2] = 0
    x[:, 5] *= 30
    x = (reference.gelu(x) if unsigned and not negative else x).cuda()
    modulation, plain = (), x
    if batches:
        modulation = tuple(torch.randn(batches, k, generator=generator).to(dtype).cuda() for _ in range(2))
        plain = reference.layer_norm_modulate(x, *modulation)
    proj_down, _ = natural_factors(part)
    codes, scales, lora_act = quantize_act_int8(x, part, proj_down, *modulation, cut=cut)
    expected = reference.quantize_act_int8(plain, natural.smooth_factor, natural.proj_down, unsigned)
    distance = (codes.int() - expected[0].int()).abs()
    assert distance.max() <= (2 if batches else 1)  # behind a norm, T(x') may be the neighbour, and its code with it
    assert (distance > 0).float().mean() <= 2e-3
    assert relative_error(scales, expected[1].double()) <= (1e-3 if batches else 1e-5)
    if rank:
        assert relative_error(lora_act, expected[2].double()) <= {torch.bfloat16: 2e-3, torch.float16: 3e-4}[dtype]
    again = quantize_act_int8(x, part, proj_down, *modulation, cut=cut)
    assert all(torch.equal(a, b) for a, b in zip(again, (codes, scales, lora_act), strict=True)), "two runs differ"


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize(
    ("m", "k", "rank", "unsigned", "batches"),
    [(35, 384, 48, False, 0), (20, 256, 32, True, 0), (5, 640, 0, False, 1), (1100, 3072, 80, False, 1),
     (63, 1280, 16, False, 3), (1, 12288, 32, True, 0), (4608, 3072, 32, False, 0), (4608, 3072, 64, False, 1),
     (4608, 12288, 32, True, 0), (300, 12288, 16, False, 2), (512, 3072, 32, False, 1), (77, 15360, 128, False, 0),
     (4608, 3072, 96, False, 1), (70, 640, 144, False, 2)],
)  # fmt: skip
def test_against_the_reference(m, k, rank, unsigned, batches, dtype) -> None:
    check(m, k, rank, unsigned, batches, dtype)


@pytest.mark.gpu
@DTYPES
def test_unsigned_inputs_below_the_shift_saturate(dtype: torch.dtype) -> None:
    check(40, 640, 32, True, 0, dtype, negative=True)


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("cut", [(4, 4, 2), (1, 2, 1, 4), (0, 1, 3, 4), (3, 0, 1, 16), (2, 4, 5)], ids=str)
def test_cuts(cut: tuple[int, ...], dtype: torch.dtype) -> None:
    from svdq.kernels.quantize_int8 import Cut

    check(201, 1152, 32, True, 0, dtype, Cut(*cut))
    check(201, 1152, 48, False, 3, dtype, Cut(*cut))


@pytest.mark.gpu
@pytest.mark.parametrize(("layers", "rank", "m"), [(2, 32, 4608), (2, 48, 300), (3, 16, 77), (3, 48, 5), (2, 0, 40)])
def test_columns_of_several_layers(layers: int, rank: int, m: int) -> None:
    """Apart from each other, and the same as side by side."""
    from svdq.kernels.low_rank import natural_factors
    from svdq.kernels.quantize_int8 import quantize_act_int8

    part = layer(128, 1152, layers * rank, torch.bfloat16, False)
    proj_down, _ = natural_factors(part)
    x = torch.randn(m, 1152, generator=torch.Generator().manual_seed(m)).bfloat16().cuda()
    *beside, lora_act = quantize_act_int8(x, part, proj_down)
    *apart, found = quantize_act_int8(x, part, proj_down, layers=layers)
    assert found.shape == (layers, m, rank)
    assert all(torch.equal(a, b) for a, b in zip(apart, beside, strict=True))
    assert torch.equal(torch.cat(found.unbind(0), dim=1), lora_act)


@pytest.mark.gpu
def test_columns_that_layers_cannot_share() -> None:
    from svdq.kernels.quantize_int8 import quantize_act_int8

    part, x = layer(128, 384, 48, torch.bfloat16, False), torch.zeros(4, 384, dtype=torch.bfloat16, device="cuda")
    with pytest.raises(ValueError, match="rank is 48, expected a multiple of 2 times 16"):
        quantize_act_int8(x, part, torch.zeros(48, 384, dtype=torch.bfloat16, device="cuda"), layers=2)


@pytest.mark.gpu
@DTYPES
def test_factors(dtype: torch.dtype) -> None:
    from svdq.kernels.low_rank import natural_factors

    parts = [layer(256, 1152, rank, dtype, False) for rank in (48, 32)]
    (down, up), (more, _) = (natural_factors(part) for part in parts)
    naturals = [part.unpack() for part in parts]
    assert torch.equal(up, naturals[0].proj_up)
    natural = torch.cat([n.proj_down for n in naturals])
    # axes: r/16, r/8%2, r%8, k/32, k%32/8, k%8/4, k%4/2, k%2
    operands = natural.reshape(5, 2, 8, 36, 4, 2, 2, 2).permute(0, 3, 5, 2, 4, 6, 1, 7)
    assert torch.equal(torch.cat((down, more)), operands.reshape(80, 1152))


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90"])
@pytest.mark.parametrize(("k", "rank", "norm"), [(3072, 32, False), (3072, 64, True), (12288, 32, False)])
def test_no_spills(arch: str, k: int, rank: int, norm: bool) -> None:
    pytest.importorskip("triton")
    from svdq.benchmarks.sass import quantize_int8_figures

    figures = quantize_int8_figures(arch, act_unsigned=k == 12288, norm=norm, k=k, rank=rank)
    assert figures.mmas > 0 and figures.spill_bytes == 0


# Norm, unsigned, rank, whether there are codes: not in the second launch for a rank above 64.
KINDS = (
    (False, False, 32, True), (True, False, 64, True), (False, True, 16, True), (True, True, 48, True),
    (False, False, 0, True), (True, False, 48, False), (False, True, 64, True), (True, False, 0, True),
)  # fmt: skip


def test_whatever_is_chosen_compiles() -> None:
    """All cuts for many shapes, each of them as one of KINDS."""
    pytest.importorskip("triton")
    from svdq.benchmarks.sass import MULTIPROCESSORS, quantize_int8_figures
    from svdq.kernels.quantize_int8 import choose_cut

    limits = {"sm_80": 163, "sm_90": 227}
    seen: dict[tuple, tuple] = {}
    for arch in limits:
        for k in (128, 192, 256, 384, 512, 640, 1024, 1280, 3072, 12288, 15360):
            if arch == "sm_80" and k not in (384, 1024, 3072, 12288):
                continue
            for m in (1, 20, 77, 512, 1536, 4608):
                norm, unsigned, rank, codes = KINDS[len(seen) % len(KINDS)]
                cut = choose_cut(m, 1, k, rank // 16, MULTIPROCESSORS[arch], arch)
                seen.setdefault(tuple(cut.constants(k).values()), (cut, arch, unsigned, norm, m, k, rank, codes))

    def compiled(case: tuple) -> None:
        cut, arch, unsigned, norm, m, k, rank, codes = case
        figures = quantize_int8_figures(arch, "bf16", unsigned, norm, m, k, rank, codes)
        assert figures.loop_spills == 0, (arch, k, m)
        assert figures.shared_bytes <= cut.shared_bytes(k, rank // 16) <= limits[arch] * 1024, (arch, k, m)

    with ThreadPoolExecutor(os.cpu_count()) as executor:  # LLVM and ptxas let other threads run
        assert len(list(executor.map(compiled, seen.values()))) == len(seen) > 20
