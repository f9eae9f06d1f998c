"""fc1 + GELU + quantization for fc2 in one kernel, against the chain of the reference and the original's outputs."""

from __future__ import annotations

import pytest
import torch
from checks import assert_codes_close, relative_error
from test_gemm_int4 import DEVICE, exact, on_gpu, problem
from test_quantize import random_layer

from svdq.kernels import act_layout, reference, tiles
from svdq.kernels.int4 import W4A4


def following(k: int, rank: int, dtype: torch.dtype) -> W4A4:
    """The next layer."""
    return random_layer(k, rank, dtype, unsigned=True)


def run(operands, after: W4A4, **options) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The kernel on natural operands; what it returns, packed, on the GPU."""
    from svdq.kernels.gemm_quantize import gemm_gelu_quantize

    codes, ascales, lora_act, weight, bias = operands
    return gemm_gelu_quantize(
        act_layout.pack_act(codes).to(DEVICE),
        act_layout.pack_ascales(ascales).to(DEVICE),
        lora_act.to(DEVICE),
        on_gpu(weight.pack()),
        on_gpu(after.pack()),
        None if bias is None else bias.to(DEVICE),
        **options,
    )


def valid(result, m: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The rows up to M in natural order on the CPU."""
    codes, ascales, lora_act = (tensor.cpu() for tensor in result)
    return act_layout.unpack_act(codes, m, True), act_layout.unpack_ascales(ascales, m), lora_act


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("m", "n", "k", "rank", "next_rank"),
    [(1, 128, 128, 16, 16), (63, 256, 256, 0, 0), (130, 384, 256, 32, 48), (300, 1536, 384, 16, 32),
     (1000, 512, 256, 16, 128)],
)  # fmt: skip
def test_as_the_reference(m: int, n: int, k: int, rank: int, next_rank: int, dtype: torch.dtype) -> None:
    operands = problem(m, n, k, rank, dtype)
    # Values of about one, where GELU is curved.
    operands[3].wscales.div_(10), operands[3].proj_up.div_(10), operands[4].div_(10)
    after = following(n, next_rank, dtype)
    x = torch.nn.functional.gelu(exact(*operands), approximate="tanh").to(dtype)
    expected = reference.quantize_act(x, after.smooth_factor, after.proj_down, True)
    result = run(operands, after)
    codes, ascales, lora_act = valid(result, m)
    # A sum in another order may round to the other side, and take a group's scale or a code with it.
    assert_codes_close(codes, expected[0], share=5e-3)
    assert relative_error(ascales, expected[1].double()) <= {torch.bfloat16: 1e-3, torch.float16: 2e-4}[dtype]
    if next_rank:
        assert relative_error(lora_act, expected[2].double()) <= {torch.bfloat16: 1e-3, torch.float16: 2e-4}[dtype]
    again = run(operands, after)
    assert all(torch.equal(a, b) for a, b in zip(valid(again, m), (codes, ascales, lora_act), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("rounds", [1, 2, 3])
@pytest.mark.parametrize("tile", tiles.TILES["sm_86"][1:])
def test_every_tile_and_cut(tile: tiles.Tile, rounds: int) -> None:
    """Codes and scales do not depend on the cut; lora_act only in the order of its sum."""
    m = 200
    operands, after = problem(m, 768, 256, 16, torch.bfloat16), following(768, 32, torch.bfloat16)
    expected = valid(run(operands, after), m)
    actual = valid(run(operands, after, tile=tile, rounds=rounds), m)
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])
    assert relative_error(actual[2], expected[2].double()) <= 1e-5


@pytest.mark.gpu
def test_a_next_layer_that_does_not_fit_is_refused() -> None:
    operands = problem(64, 256, 128, 16, torch.bfloat16)
    with pytest.raises(ValueError, match=r"the next layer has K 128, .* expected 256"):
        run(operands, following(128, 16, torch.bfloat16))
    with pytest.raises(ValueError, match=r"smooth_factor is torch.float16 .* expected torch.bfloat16"):
        run(operands, following(256, 16, torch.float16))


@pytest.mark.parametrize(("arch", "limit"), [("sm_80", 16), ("sm_86", 12.5), ("sm_89", 12.5)])
def test_main_loop_stays_lean(arch: str, limit: float) -> None:
    """On sm_80 the eight multiply-adds of an MMA take 16 cycles: instructions up to there cost nothing."""
    triton = pytest.importorskip("triton")
    from svdq.benchmarks.sass import gemm_gelu_quantize_figures

    tile = tiles.choose_tile(4608, 12288, arch, epilogue="GELU_QUANTIZE")
    figures = gemm_gelu_quantize_figures(tile, arch)
    if triton.__version__ == "3.6.0":
        assert figures.instructions_per_mma <= limit
        assert figures.loop_spills <= figures.mmas // 16
