"""quantizer/solve.py on weights with heavy tails: each part against the exact or the simpler way."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from checks import assert_close, assert_same, relative_error
from torch import Tensor

from svdq.kernels import reference
from svdq.kernels.int4 import SHIFT
from svdq.quantizer import measure, solve
from svdq.quantizer.solve import Recipe

N, K = 256, 512
ONES = torch.ones(K, dtype=torch.bfloat16)


def heavy_tailed(n: int = N, k: int = K, seed: int = 0) -> Tensor:
    """float32 [n, k]: Student's t with 4 degrees of freedom, columns of different size, a decaying low-rank part."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    noise = normal(n, k) / (torch.stack([normal(n, k) for _ in range(4)]).square().sum(dim=0) / 4).sqrt()
    low_rank = normal(n, 64) * torch.arange(1, 65) ** -0.7 @ normal(64, k)
    return (noise + 0.6 * low_rank) * (0.4 * normal(k)).exp() / k**0.5


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Layers are too small for more. Bytes depend on the number: they are those of a subprocess with one, too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def weight() -> Tensor:
    return heavy_tailed()


def sqnr(weight: Tensor, quantized: solve.W4A4) -> float:
    return -10 * math.log10(solve.ratio(reference.dequantize_w4a4(quantized)[0] - weight, weight))


def dense(q: Tensor, wscales: Tensor) -> Tensor:
    return q.float() * wscales.float().repeat_interleave(64, dim=1)


# ---- smoothing


def test_smooth_factor_by_hand() -> None:
    weight_span, act_span = torch.tensor([1.0, 4.0, 16.0]), torch.tensor([16.0, 4.0, 1.0])
    assert_close(solve.smooth_factor(weight_span, beta=0.5), torch.tensor([2.0, 1.0, 0.5]), rms=1e-6)
    assert_close(solve.smooth_factor(weight_span, act_span, 0.5, 0.5), torch.tensor([4.0, 1.0, 0.25]), rms=1e-6)
    assert solve.smooth_factor(weight_span, dtype=torch.float16).dtype == torch.float16


def test_smooth_factor_of_channels_that_carry_nothing() -> None:
    weight_span = torch.tensor([0.0, 1.0, 1.0, float("inf")])
    assert solve.smooth_factor(weight_span).tolist() == [1, 1, 1, 1]
    assert solve.smooth_factor(torch.zeros(4)).tolist() == [1, 1, 1, 1]
    extreme = solve.smooth_factor(torch.tensor([1e-30, 1.0, 1e30]), beta=1.0)
    assert extreme.tolist() == [64, 1, 1 / 64]


def test_the_search_finds_the_exponents_with_the_smallest_output_error(weight: Tensor) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(128, K, generator=generator)
    x[:, ::37] *= 12
    x, recipe = x.to(torch.bfloat16), Recipe(rank=16, iterations=1)
    act_span, weight_span = x.float().abs().amax(dim=0), solve.channel_span([weight])
    seen: list[float] = []

    def error(smooth: Tensor) -> float:
        seen.append(solve.output_error(weight, solve.quantize_w4a4(weight, smooth, recipe), x))
        return seen[-1]

    grid = [(0.0, 0.0), (0.0, 0.3), (0.5, 0.0), (0.5, 0.3)]
    smooth, exponents = solve.search_smooth(grid, lambda a, b: solve.smooth_factor(weight_span, act_span, a, b), error)
    assert exponents == grid[seen.index(min(seen))] and exponents[0] == 0.5
    assert_same(smooth, solve.smooth_factor(weight_span, act_span, *exponents))
    assert min(seen) < 0.25 * seen[0], "measured: 0.18"
    with pytest.raises(ValueError, match="no exponents"):
        solve.search_smooth([], lambda a, b: ONES, error)


# ---- branch


@pytest.mark.parametrize("rank", [16, 64])
def test_randomized_svd_is_nearly_the_exact_one(rank: int, weight: Tensor) -> None:
    smooth = solve.smooth_factor(solve.channel_span([weight]))
    smoothed = weight * smooth.float()
    errors = []
    for exact in (True, False):
        up, down = solve.low_rank(smoothed, rank, smooth, torch.float32, exact=exact)
        assert up.shape == (N, rank) and down.shape == (rank, K)
        errors.append(relative_error(up @ (down * smooth.float()), smoothed))
    assert errors[0] <= errors[1] + 1e-6 and errors[1] < 1.001 * errors[0], "measured: 1.0004"


def test_branch_is_a_function_of_its_arguments(weight: Tensor) -> None:
    first = solve.low_rank(weight, 16, ONES)
    torch.manual_seed(123)
    for got, expected in zip(solve.low_rank(weight, 16, ONES), first, strict=True):
        assert_same(got, expected)
    assert not torch.equal(solve.low_rank(weight, 16, ONES, seed=1)[1], first[1])


def test_rank_larger_than_the_layer_allows(weight: Tensor) -> None:
    with pytest.raises(ValueError, match="rank 272 is larger than a weight of 256 x 512 allows"):
        solve.low_rank(weight, 272, ONES)
    up, down = solve.low_rank(weight, N, ONES, torch.float32)
    assert_close(up @ down, weight, rms=1e-5)


# ---- codes


def test_scale_search_beats_the_largest_magnitude(weight: Tensor) -> None:
    scale = (weight.reshape(N, -1, 64).abs().amax(dim=-1) / 7).to(torch.bfloat16)
    plain = (weight / scale.float().repeat_interleave(64, dim=1)).round().clamp(-7, 7)
    q, wscales = solve.round_int4(weight)
    assert q.dtype == torch.int8 and wscales.dtype == torch.bfloat16 and wscales.min() > 0
    assert q.min() == -8 and q.max() == 7
    before, after = relative_error(dense(plain, scale), weight), relative_error(dense(q, wscales), weight)
    assert after < 0.92 * before, "measured: 0.89"
    fine = solve.round_int4(weight, ratios=tuple(1 - 0.01 * step for step in range(50)))
    assert after < 1.01 * relative_error(dense(*fine), weight), "a coarse grid will do"


def test_importance_is_heeded(weight: Tensor) -> None:
    importance = torch.ones(K)
    importance[::8] = 100
    with_it, without = (solve.round_int4(weight, importance=i) for i in (importance, None))
    errors = [((dense(*codes) - weight).square().sum(dim=0) @ importance).item() for codes in (with_it, without)]
    assert errors[0] < 0.7 * errors[1], "measured: 0.59"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_groups_without_anything_to_represent(dtype: torch.dtype) -> None:
    residual = torch.zeros(4, 128)
    residual[1, :64] = 1e-30
    residual[2, 5] = -3.0
    q, wscales = solve.round_int4(residual, dtype)
    assert wscales.isfinite().all() and wscales[0].tolist() == [1, 1]
    assert q[0].eq(0).all() and dense(q, wscales)[2, 5] == -3
    awq = solve.quantize_awq(torch.full((4, 128), 0.25), dtype)
    assert reference.dequantize_awq(awq).eq(0.25).all() and awq.code.eq(0).all()


def test_gptq_is_better_for_correlated_inputs(weight: Tensor) -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2048, 64, generator=generator) @ torch.randn(64, K, generator=generator) / 8
    x = x + 0.3 * torch.randn(2048, K, generator=generator)
    hessian = x.t() @ x
    rounded, fed_back = solve.round_int4(weight), solve.gptq(weight, hessian)
    errors = [relative_error(x @ dense(*codes).t(), x @ weight.t()) for codes in (fed_back, rounded)]
    assert errors[0] < 0.5 * errors[1], "measured: 0.42"
    # For inputs that are not correlated there is nothing to feed back.
    plain = solve.gptq(weight, torch.eye(K))
    assert_same(plain[0], rounded[0])
    quantized = [
        solve.quantize_w4a4(weight, ONES, Recipe(rank=16, iterations=2), hessian=h, act_square=hessian.diagonal())
        for h in (hessian, None)
    ]
    outputs = [solve.output_error(weight, q, x.to(torch.bfloat16)) for q in quantized]
    assert outputs[0] < 0.7 * outputs[1], "measured: 0.52, with activation rounding"


def test_gptq_with_dead_channels_and_with_no_hessian_at_all(weight: Tensor) -> None:
    hessian = torch.eye(K)
    hessian[3, 3] = 0
    q, wscales = solve.gptq(weight, hessian)
    assert relative_error(dense(q, wscales), weight) < 0.2
    with pytest.raises(ValueError, match="not positive definite"):
        solve.gptq(weight, torch.ones(K, K) - 2 * torch.eye(K) + 1)


# ---- layers


def test_more_rank_is_better_and_any_rank_beats_rounding(weight: Tensor) -> None:
    found = {rank: sqnr(weight, solve.quantize_w4a4(weight, ONES, Recipe(rank, iterations=2))) for rank in
             (0, 16, 32, 64, 128)}  # fmt: skip
    values = list(found.values())
    assert all(better > worse + 0.5 for worse, better in pairwise(values)), found


def test_rounds_help_and_the_best_is_kept(weight: Tensor) -> None:
    found = [sqnr(weight, solve.quantize_w4a4(weight, ONES, Recipe(32, iterations=i))) for i in (1, 2, 4, 8)]
    assert found == sorted(found) and found[3] > found[0] + 0.5, found


def test_smoothing_helps_in_w4a4(weight: Tensor) -> None:
    smooth = solve.smooth_factor(solve.channel_span([weight]))
    x = torch.randn(128, K, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    errors = [solve.output_error(weight, solve.quantize_w4a4(weight, s, Recipe(iterations=1)), x) for s in
              (smooth, ONES)]  # fmt: skip
    assert errors[0] < errors[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_unsigned_layer_has_exactly_its_own_bias(dtype: torch.dtype, weight: Tensor) -> None:
    smooth = solve.smooth_factor(solve.channel_span([weight]), dtype=dtype)
    quantized = solve.quantize_w4a4(weight, smooth, Recipe(16, dtype, iterations=1), act_unsigned=True)
    bias = torch.linspace(-1, 1, N)
    stored = solve.shifted_bias(quantized, bias)
    main = dense(quantized.q, quantized.wscales) / smooth.float()
    assert_close(stored, bias - SHIFT * main.double().sum(dim=1), rms=1e-6)
    # An output for real inputs: the shift cancels, what is left is rounding.
    x = reference.gelu(torch.randn(256, K, generator=torch.Generator().manual_seed(0)).to(dtype))
    y = reference.linear_w4a4(x, quantized, stored, out_dtype=torch.float32)
    expected = x.float() @ weight.t() + bias
    assert relative_error(y, expected) < 0.12, "measured: 0.086"
    assert (y - expected).mean().abs() < 0.01 * expected.std()
    signed = solve.quantize_w4a4(weight, smooth, Recipe(16, dtype, iterations=1))
    assert_same(solve.shifted_bias(signed, bias), bias)


def test_values_that_do_not_fit_the_type(weight: Tensor) -> None:
    with pytest.raises(solve.OutOfRange, match="too large for"):
        solve.quantize_w4a4(weight * 1e6, ONES.half(), Recipe(dtype=torch.float16))


def test_zero_weight_and_zero_columns(weight: Tensor) -> None:
    some = weight.clone()
    some[:, :70] = 0
    for matrix in (some, torch.zeros(N, K)):
        smooth = solve.smooth_factor(solve.channel_span([matrix]))
        quantized = solve.quantize_w4a4(matrix, smooth, Recipe(16, iterations=2))
        assert solve.ratio(reference.dequantize_w4a4(quantized)[0] - matrix, matrix) < 0.02
    assert quantized.q.eq(0).all()


def test_awq_is_better_than_the_original_symmetric_rounding(weight: Tensor) -> None:
    shifted = weight + 0.5 * weight.std()
    awq = solve.quantize_awq(shifted)
    assert awq.code.dtype == torch.uint8 and awq.code.max() == 15
    scale = (shifted.reshape(N, -1, 64).abs().amax(dim=-1) / 7).to(torch.bfloat16)
    plain = (shifted / scale.float().repeat_interleave(64, dim=1)).round().clamp(-7, 7)
    errors = [relative_error(m, shifted) for m in (reference.dequantize_awq(awq), dense(plain, scale))]
    assert errors[0] < 0.75 * errors[1], "measured: 0.67"


def test_awq_for_known_activations(weight: Tensor) -> None:
    """Outputs for inputs that were not seen: as the inputs of modulations, they vary along few dimensions"""
    generator = torch.Generator().manual_seed(3)
    directions = torch.randn(24, K, generator=generator) * (0.5 * torch.randn(K, generator=generator)).exp()
    seen, unseen = (torch.nn.functional.silu(torch.randn(count, 24, generator=generator) @ directions / 2)
                    for count in (128, 256))  # fmt: skip
    square, moments = seen.square().mean(dim=0), seen.t() @ seen / len(seen)
    found = [
        -10 * math.log10(solve.ratio(unseen @ (reference.dequantize_awq(awq) - weight).t(), unseen @ weight.t()))
        for awq in (solve.quantize_awq(weight), solve.quantize_awq(weight, act_square=square),
                    solve.quantize_awq(weight, act_square=square, hessian=moments))
    ]  # fmt: skip
    assert found[1] > found[0] + 0.5 and found[2] > found[1] + 3, f"measured: 20.0, 20.7, 24.1; now {found}"


def test_probes_are_always_the_same() -> None:
    first = measure.probe(K, torch.bfloat16, "a")
    torch.manual_seed(9)
    assert_same(measure.probe(K, torch.bfloat16, "a"), first)
    assert not torch.equal(measure.probe(K, torch.bfloat16, "b"), first)
    assert measure.probe(K, torch.bfloat16, "a", act_unsigned=True).min() > -SHIFT
    assert measure.decibel(0.0) is None and measure.decibel(0.001) == 30
