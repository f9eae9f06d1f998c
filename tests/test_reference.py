"""The PyTorch reference against the original engine's kernels (golden data), float64, and hand-computed cases.

The original accumulates over groups in 16 bits; the reference accumulates exactly and rounds once. So codes and scales
agree to the bit, outputs to the distance that the golden data's README gives for such an implementation.
"""

from __future__ import annotations

import pytest
import torch
from checks import (
    OUTPUT_ROUNDING,
    assert_close,
    assert_codes_close,
    assert_same,
    golden_names,
    load_golden,
    relative_error,
)
from torch import Tensor

from svdq.kernels import layout, reference
from svdq.kernels.int4 import AWQ, GROUP, SHIFT, W4A4, PackedAWQ, PackedW4A4

BF16, FP16 = torch.bfloat16, torch.float16
# Largest measured distance to the recorded outputs, per type, plus a fifth.
TO_RECORDED = {BF16: 5e-3, FP16: 6e-4}
TO_RECORDED_MLP = {BF16: 1.8e-2, FP16: 8.5e-3}


def _random(seed: int, *shape: int, scale: float = 1.0, dtype: torch.dtype = BF16) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def _weight(n: int, k: int, rank: int, dtype: torch.dtype = BF16, act_unsigned: bool = False) -> W4A4:
    q = torch.randint(-8, 8, (n, k), generator=torch.Generator().manual_seed(n + k), dtype=torch.int8)
    return W4A4(
        q=q,
        wscales=_random(1, n, k // GROUP, scale=0.01, dtype=dtype).abs() + 0.005,
        smooth_factor=_random(2, k, scale=0.3, dtype=torch.float32).exp().to(dtype),
        proj_down=_random(3, rank, k, scale=k**-0.5, dtype=dtype),
        proj_up=_random(4, n, rank, scale=0.3, dtype=dtype),
        act_unsigned=act_unsigned,
    )


def _exact_gemm(codes: Tensor, ascales: Tensor, lora_act: Tensor, weight: W4A4, bias: Tensor | None) -> Tensor:
    activation = codes.double() * ascales.double().repeat_interleave(GROUP, 1)
    residual = weight.q.double() * weight.wscales.double().repeat_interleave(GROUP, 1)
    y = activation @ residual.t() + lora_act.to(ascales.dtype).double() @ weight.proj_up.double().t()
    return y if bias is None else y + bias.double()


# ---- the original engine's kernels


def _logical(tensors: dict[str, Tensor], suffix: str = "", act_unsigned: bool = False) -> W4A4:
    """The weight of a golden/kernels file; without activation-side tensors smoothing is 1 and the down projection 0."""
    wgt = tensors[f"in.logical.wgt{suffix}"]
    up = tensors.get(f"in.logical.lora_up{suffix}", torch.zeros(wgt.shape[0], 0, dtype=BF16))
    ones, zeros = torch.ones(wgt.shape[1]), torch.zeros(up.shape[1], wgt.shape[1])
    return W4A4(
        q=wgt,
        wscales=tensors[f"in.logical.wscales{suffix}"],
        smooth_factor=tensors.get(f"in.logical.smooth{suffix}", ones),
        proj_down=tensors.get(f"in.logical.lora_down{suffix}", zeros),
        proj_up=up,
        act_unsigned=act_unsigned,
    )


def _glu(x: Tensor) -> Tensor:
    value, gate = x[:, 0::2], x[:, 1::2]
    return value * (gate.float() * gate.float().sigmoid()).to(x.dtype)


@pytest.mark.parametrize(
    "name", [n for p in ("quant", "linear", "mlp") for n in golden_names(f"kernels/*_{p}_*.safetensors")]
)
def test_quantize_act_as_the_original_does(name: str) -> None:
    tensors = load_golden(name)
    x = _glu(tensors["in.x"]) if "_glu_" in name else tensors["in.x"]
    down = tensors["in.logical.lora_down"]
    codes, ascales, lora_act = reference.quantize_act(x, tensors["in.logical.smooth"], down)
    assert_same(ascales, tensors["out.logical.ascales"], "ascales")
    # One row is about 1e-38: the original's reciprocal takes its subnormal scale for zero.
    normal = (ascales == 0) | (ascales.float() >= torch.finfo(torch.float32).tiny)
    normal = normal.repeat_interleave(GROUP, 1)
    # Fast division and reciprocal can move a value across a rounding tie.
    assert_codes_close(codes[normal], tensors["out.logical.act"][normal], share=5e-4)
    usable = x.float().abs().amax(dim=1) < 1e4  # one row is about 1e30, where float32 sums are anything
    assert relative_error(lora_act[usable], tensors["out.logical.lora_act"][usable]) < 1e-6
    assert_same(layout.unpack_lowrank_down(tensors["in.packed.lora_down"]), down, "lora_down")


@pytest.mark.parametrize("name", golden_names("kernels/*_gemm_*.safetensors"))
def test_gemm_as_the_original_does(name: str) -> None:
    tensors = load_golden(name)
    dtype, m = tensors["out.out"].dtype, tensors["in.logical.act"].shape[0]
    weight, bias = _logical(tensors), tensors.get("in.logical.bias")
    lora_act = tensors.get("in.logical.lora_act_in", torch.zeros(m, 0))
    if lora_act.shape[1]:
        lora_act = lora_act * tensors["in.lora_scales"].repeat_interleave(16)
    codes, ascales = tensors["in.logical.act"], tensors["in.logical.ascales"]
    out = reference.gemm_w4a4(codes, ascales, lora_act, weight, bias)
    exact = _exact_gemm(codes, ascales, lora_act, weight, bias)
    if dtype == FP16:
        exact = exact.clamp(-65504, 65504)
        assert out.abs().max() <= 65504
    assert_close(out, exact, rms=OUTPUT_ROUNDING[dtype], peak=None)
    recorded = tensors["out.out"]
    if "_clamp" in name:
        # The original overflows while it accumulates; what it then clamps is not what the exact sum gives.
        fits = recorded.abs() < 65504
        assert (~fits).sum() == 2
        out, recorded = out[fits], recorded[fits]
    assert_close(out, recorded, rms=TO_RECORDED[dtype], peak=None)


@pytest.mark.parametrize("name", golden_names("kernels/*_linear_*.safetensors"))
def test_linear_as_the_original_does(name: str) -> None:
    tensors = load_golden(name)
    assert torch.equal(tensors["in.lora_scales"], torch.ones_like(tensors["in.lora_scales"]))
    packed = PackedW4A4(
        *(tensors[f"in.packed.{leaf}"] for leaf in ("wgt", "wscales", "smooth", "lora_down", "lora_up"))
    )
    out = reference.linear_parts_w4a4(tensors["in.x"], (packed,), 0, tensors["in.logical.bias"])
    recorded = tensors["out.out"].float()
    assert_close(out, recorded, rms=TO_RECORDED[out.dtype], peak=None)
    assert (out.float() - recorded).abs().max() <= 1.3e-2 * recorded.abs().max()


@pytest.mark.parametrize("name", golden_names("kernels/*_mlp_*.safetensors"))
def test_mlp_as_the_original_does(name: str) -> None:
    tensors = load_golden(name)
    first, second = _logical(tensors), _logical(tensors, "2", act_unsigned=True)
    hidden = reference.gelu(reference.linear_w4a4(tensors["in.x"], first, tensors["in.logical.bias"]))
    assert_close(hidden, tensors["out.hidden"], rms=TO_RECORDED[hidden.dtype], peak=None, what="hidden")

    codes, ascales, lora_act = reference.quantize_act(
        tensors["out.hidden"], second.smooth_factor, second.proj_down, act_unsigned=True
    )
    assert_same(ascales, tensors["out.logical.ascales2"], "ascales2")
    assert_codes_close(codes, tensors["out.logical.act2"], share=1e-4)
    assert codes.min() >= 0 and codes.max() == 15
    assert relative_error(lora_act, tensors["out.logical.lora_act2"]) < 1e-6
    out = reference.gemm_w4a4(tensors["out.logical.act2"], ascales, lora_act, second, tensors["in.logical.bias2"])
    assert_close(out, tensors["out.out"], rms=TO_RECORDED[out.dtype], peak=None, what="second gemm")

    out = reference.linear_w4a4(hidden, second, tensors["in.logical.bias2"])
    assert_close(out, tensors["out.out"], rms=TO_RECORDED_MLP[out.dtype], peak=None, what="whole MLP")


@pytest.mark.parametrize("name", golden_names("kernels/*_qkv_rope_*.safetensors"))
def test_qkv_norm_and_rope_as_the_original_does(name: str) -> None:
    tensors = load_golden(name)
    recorded = tensors["out.out"]
    lora_act = tensors["in.logical.lora_act_in"] * tensors["in.lora_scales"].repeat_interleave(16)
    codes, ascales = tensors["in.logical.act"], tensors["in.logical.ascales"]
    qkv = reference.gemm_w4a4(codes, ascales, lora_act, _logical(tensors), tensors["in.logical.bias"])
    q, k, v = qkv.reshape(qkv.shape[0], 3, -1, 128).unbind(1)
    rotary = tensors["in.logical.rotary_emb"]
    rotated = [reference.rms_norm_rope(t, tensors[f"in.norm_{leaf}"], rotary) for t, leaf in ((q, "q"), (k, "k"))]
    thirds = recorded.reshape(q.shape[0], 3, -1, 128).unbind(1)
    for got, expected, leaf in zip((*rotated, v), thirds, "qkv", strict=True):
        assert_close(got, expected, rms=TO_RECORDED[got.dtype], peak=None, what=leaf)


@pytest.mark.parametrize("name", golden_names("kernels/*_awq_*.safetensors"))
def test_awq_as_the_original_does(name: str) -> None:
    tensors = load_golden(name)
    weight = AWQ(*(tensors[f"in.logical.{leaf}"] for leaf in ("code", "wscales", "wzeros")))
    for key in (key for key in tensors if key.startswith("in.x_m")):
        x, recorded = tensors[key], tensors[key.replace("in.x", "out.out")]
        out = reference.gemv_w4a16(x, weight)
        assert_close(out, recorded, rms=TO_RECORDED[x.dtype], peak=None)
        # The weight itself is one rounding; the product is summed exactly and rounded once.
        exact = x.double() @ reference.dequantize_awq(weight, x.dtype).double().t()
        assert_close(out, exact, rms=OUTPUT_ROUNDING[x.dtype], peak=None)


# ---- dense layers of the converter's golden files


@pytest.mark.parametrize("name", golden_names("layer_int4_*.safetensors"))
def test_dense_layer_of_the_converter(name: str) -> None:
    tensors = load_golden(name)
    logical = {key.removeprefix("logical."): tensors[key] for key in tensors if key.startswith("logical.")}
    leaves = ("q", "wscales", "smooth", "lora_down", "lora_up")
    weight = W4A4(*(logical[f] for f in leaves), act_unsigned="unsigned" in name)
    dense, shift_term = reference.dequantize_w4a4(weight)
    residual = logical["q"].double() * logical["wscales"].double().repeat_interleave(GROUP, 1)
    residual = residual / logical["smooth"].double()
    assert_close(dense, residual + logical["lora_up"].double() @ logical["lora_down"].double(), rms=1e-6, peak=1e-5)
    bias = logical["bias_stored"].float()
    if shift_term is not None:
        assert "unsigned" in name
        bias = bias + shift_term
    assert (bias - logical["bias_effective"]).abs().max() <= 1e-6


@pytest.mark.parametrize("name", ["int4_128x256_r16_fp16", "int4_128x256_r20_unsigned_shift", "int4_256x256_r32"])
def test_layer_of_the_converter_with_int4_activations(name: str) -> None:
    layer, run = load_golden(f"layer_{name}.safetensors"), load_golden("emulated_engine_arithmetic.safetensors")
    leaves = ("q", "wscales", "smooth", "lora_down", "lora_up")
    weight = W4A4(*(layer[f"logical.{leaf}"] for leaf in leaves), act_unsigned="unsigned" in name)
    x, bias = run[f"{name}.x"], layer["logical.bias_stored"]
    codes, ascales, lora_act = reference.quantize_act(x, weight.smooth_factor, weight.proj_down, weight.act_unsigned)
    assert_codes_close(codes, run[f"{name}.act_codes"])
    assert_same(ascales, run[f"{name}.act_scales"], "ascales")
    assert_close(lora_act, run[f"{name}.lora_act"], rms=1e-6, peak=None)
    out = reference.linear_w4a4(x, weight, bias)
    for emulation in ("y_accum_fp32", "y_accum_half"):  # both round more than once
        assert_close(out, run[f"{name}.{emulation}"], rms=TO_RECORDED[x.dtype], peak=None, what=emulation)


@pytest.mark.parametrize("name", golden_names("awq_*.safetensors"))
def test_dense_rows_of_a_modulation_layer(name: str) -> None:
    tensors = load_golden(name)
    splits = int(name.rpartition("_s")[2].partition(".")[0])
    packed = PackedAWQ(*(tensors[f"packed.{leaf}"] for leaf in ("qweight", "wscales", "wzeros")), splits)
    stored = layout.interleave_rows(reference.dequantize_packed_awq(packed, torch.float32), splits)
    rows = tensors["sample.stored_rows"].long()
    assert (stored[rows] - tensors["sample.weight_of_stored_rows"]).abs().max() <= 1e-7


# ---- cases that need no golden data


def test_quantize_act_by_hand() -> None:
    x = torch.zeros(5, GROUP, dtype=BF16)
    x[1] = torch.arange(GROUP) % 15 - 7  # scale 1: codes are the values
    x[2, 5] = -3.0
    x[3] = 2.0
    x[4, :4] = torch.tensor([7.0, 2.5, -3.5, 0.5])  # ties go to even
    smooth, down = torch.ones(GROUP, dtype=BF16), torch.ones(1, GROUP, dtype=BF16)
    codes, ascales, lora_act = reference.quantize_act(x, smooth, down)
    assert codes.dtype == torch.int8 and ascales.dtype == BF16 and lora_act.dtype == torch.float32
    assert not codes[0].any() and ascales[0] == 0
    assert torch.equal(codes[1].float(), x[1].float()) and ascales[1] == 1
    assert codes[2, 5] == -7 and codes[2].abs().sum() == 7
    assert (codes[3] == 7).all() and ascales[3] == torch.tensor(2 / 7).to(BF16)
    assert codes[4, :4].tolist() == [7, 2, -4, 0]
    assert torch.equal(lora_act[:, 0], x.float().sum(1))


def test_quantize_act_unsigned_by_hand() -> None:
    x = torch.zeros(2, GROUP, dtype=BF16)
    x[0] = -SHIFT
    x[1, 0], x[1, 1] = 15 - SHIFT, 4 - SHIFT
    down = torch.eye(16, GROUP, dtype=BF16)
    codes, ascales, lora_act = reference.quantize_act(x, torch.ones(GROUP, dtype=BF16), down, act_unsigned=True)
    assert not codes[0].any() and ascales[0] == 0
    assert codes[1, :3].tolist() == [15, 4, 0] and ascales[1] == 1
    assert torch.equal(lora_act, x.float()[:, :16]), "the low-rank branch sees the unshifted input"


def test_smoothing_divides_and_low_rank_sees_the_raw_input() -> None:
    x, smooth = _random(0, 3, 128), torch.full((128,), 4.0, dtype=BF16)
    down = _random(1, 16, 128)
    plain = reference.quantize_act(x, torch.ones_like(smooth), down)
    smoothed = reference.quantize_act(x, smooth, down)
    assert_same(smoothed[0], plain[0])
    assert_same(smoothed[1], plain[1] / 4)
    assert_same(smoothed[2], plain[2])


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(
    "m, n, k, rank", [(1, 128, 128, 16), (63, 384, 256, 32), (77, 128, 640, 128), (5, 128, 128, 0)]
)
def test_gemm_against_float64(dtype: torch.dtype, m: int, n: int, k: int, rank: int) -> None:
    weight, bias, x = _weight(n, k, rank, dtype), _random(7, n, dtype=dtype), _random(8, m, k, dtype=dtype)
    quantized = reference.quantize_act(x, weight.smooth_factor, weight.proj_down)
    exact = _exact_gemm(*quantized, weight, bias)
    assert_close(reference.linear_w4a4(x, weight, bias), exact, rms=OUTPUT_ROUNDING[dtype], peak=6e-3)
    assert_close(reference.linear_w4a4(x, weight, bias, torch.float32), exact, rms=2e-6, peak=1e-4)


@pytest.mark.parametrize("act_unsigned", [False, True])
def test_w4a4_means_its_dense_layer(act_unsigned: bool) -> None:
    """With int4 activations the output is that of the dense layer but for activation rounding."""
    weight = _weight(128, 512, 32, act_unsigned=act_unsigned)
    x, bias = _random(5, 64, 512), _random(6, 128)
    if act_unsigned:
        x = reference.gelu(x)
    dense, shift_term = reference.dequantize_w4a4(weight)
    effective = bias.float() + (shift_term if act_unsigned else 0)
    assert (shift_term is not None) == act_unsigned
    expected = torch.nn.functional.linear(x.float(), dense, effective)
    error = relative_error(reference.linear_w4a4(x, weight, bias), expected)
    assert error < 0.12, f"{error:.3f}"
    if act_unsigned:
        wrong = torch.nn.functional.linear(x.float(), dense, bias.float())
        assert relative_error(reference.linear_w4a4(x, weight, bias), wrong) > 2 * error


def test_no_rows() -> None:
    weight = _weight(128, 128, 16)
    assert reference.linear_w4a4(_random(0, 0, 128), weight).shape == (0, 128)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("rows_at_a_time", [128, 16 * 1024 * 1024])
def test_parts(axis: int, rows_at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_ROW_ELEMENTS", rows_at_a_time)
    sizes = ((384, 128), (512, 128)) if axis == 0 else ((256, 128), (256, 512))
    parts = tuple(_weight(n, k, 16, act_unsigned=axis == 1 and i == 1) for i, (n, k) in enumerate(sizes))
    packed = tuple(part.pack() for part in parts)
    dense, shift_term = reference.dequantize_parts(packed, axis, torch.float32)
    each = [reference.dequantize_w4a4(part) for part in parts]
    assert_close(dense, torch.cat([weight for weight, _ in each], dim=axis), rms=1e-6, peak=1e-4)

    n, k = dense.shape
    x, bias = _random(0, 9, k), _random(1, n)
    out = reference.linear_parts_w4a4(x, packed, axis, bias)
    if axis == 0:
        assert shift_term is None
        expected = [reference.linear_w4a4(x, part, b) for part, b in zip(parts, bias.split([384, 512]), strict=True)]
        assert_same(out, torch.cat(expected, dim=1))
    else:
        assert_close(shift_term, each[1][1], rms=1e-6, peak=1e-4)
        inputs = x.split([128, 512], dim=1)
        expected = [reference.linear_w4a4(h, p, out_dtype=torch.float32) for h, p in zip(inputs, parts, strict=True)]
        assert_close(out, sum(expected) + bias.float(), rms=OUTPUT_ROUNDING[BF16], peak=6e-3)


def test_rms_norm_rope_by_hand() -> None:
    x = torch.zeros(2, 1, 128, dtype=BF16)
    x[:, 0, 0] = 3.0
    angle = torch.tensor([0.0, torch.pi / 2])
    rotary = torch.stack((angle.sin(), angle.cos()), dim=1)[:, None, :].expand(2, 64, 2)
    out = reference.rms_norm_rope(x, torch.full((128,), 2.0, dtype=BF16), rotary)
    size = 2 * 3 / (9 / 128) ** 0.5 / 3  # norm weight 2, root mean square of the head 3 / sqrt(128)
    expected = torch.zeros(2, 1, 128)
    expected[0, 0, 0] = expected[1, 0, 1] = 3 * size
    assert_close(out, expected, rms=OUTPUT_ROUNDING[BF16], peak=None)
