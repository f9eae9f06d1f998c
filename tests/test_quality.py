"""``bench quality``: each simulated format against a formula of its own, figures against known values, and the command
on a tiny random model."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from conftest import find_comfyui
from PIL import Image
from quantizer_models import save_source
from safetensors.torch import load_file
from torch import Tensor

from svdq.benchmarks.quality import baselines, claims, metrics, report, synthetic
from svdq.benchmarks.quality.configurations import CONFIGURATIONS, choose
from svdq.cli import RESTARTED, ROOT, bench_quality, main
from svdq.kernels.int4 import SHIFT, W4A4
from svdq.loaders.weights import FluxConfig
from svdq.quantizer.source import stock_shapes


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative_db(got: Tensor, exact: Tensor) -> float:
    error, signal = ((values.double() ** 2).sum().item() for values in (got - exact, exact))
    return 10 * math.log10(signal / error)


# ---- formats


def test_nf4_takes_the_nearest_value_of_its_grid() -> None:
    weight = gaussian(8, 128)
    weight[3, :64] = 0
    for row, got in zip(weight.reshape(-1, 64), baselines.nf4(weight).reshape(-1, 64), strict=True):
        grid = torch.tensor(baselines.NF4_GRID) * row.abs().max()
        nearest = grid[(row[:, None] - grid).abs().argmin(dim=1)]
        assert torch.equal(got, nearest)


def test_nf4_grid_is_made_of_gaussian_quantiles() -> None:
    """The paper's construction: 8 positive, 7 negative quantiles and 0, over the largest."""
    normal, offset = torch.distributions.Normal(0.0, 1.0), 0.9677083
    positive = normal.icdf(torch.linspace(offset, 0.5, 9)[:-1])
    negative = -normal.icdf(torch.linspace(offset, 0.5, 8)[:-1])
    grid = torch.cat([positive, negative, torch.zeros(1)]).sort().values
    assert torch.allclose(grid / grid.max(), torch.tensor(baselines.NF4_GRID), atol=2e-4)


def test_q4_0_is_ggml_s() -> None:
    """One value after the other, as quantize_row_q4_0_ref has it."""
    weight = gaussian(4, 64, seed=1)
    weight[2, 32:] = 0
    got = baselines.q4_0(weight).reshape(-1, 32)
    for block, values in zip(weight.reshape(-1, 32).numpy(), got.numpy(), strict=True):
        largest = max(block, key=abs)
        d = np.float32(largest / np.float32(-8))
        inverse = np.float32(1 / d) if d else np.float32(0)
        codes = [min(15, int(np.float32(x * inverse) + np.float32(8.5))) - 8 for x in block]
        assert values.tolist() == [code * np.float32(np.float16(d)) for code in codes]


def test_int8_rows() -> None:
    weight = gaussian(16, 256, seed=2)
    weight[5] = 0
    got = baselines.int8_rows(weight)
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    assert ((got - weight).abs() <= scale * 0.5001).all() and (got[5] == 0).all()
    codes = (got / scale)[weight.any(dim=1)]
    assert torch.allclose(codes, codes.round(), atol=1e-3) and codes.abs().max().round() == 127


def test_fp8_keeps_the_largest_value_and_three_bits() -> None:
    weight = gaussian(64, 64, seed=3)
    got = baselines.fp8_tensor(weight)
    scale = weight.abs().max() / 448
    codes = got / scale
    assert torch.equal(codes, codes.to(torch.float8_e4m3fn).float())
    assert torch.isclose(got.abs().max(), weight.abs().max())
    normal = weight.abs() > scale * 2**-6
    assert ((got - weight).abs()[normal] <= weight.abs()[normal] * (2**-4 + 1e-6)).all()
    assert (baselines.fp8_tensor(torch.zeros(4, 4)) == 0).all()


def test_each_picture_has_its_own_fp8_scale() -> None:
    x = gaussian(2, 8, 64)
    x[1] *= 1000
    assert torch.equal(baselines.fp8_pictures(x)[0], baselines.fp8_tensor(x[0]))
    assert not torch.equal(baselines.fp8_tensor(x)[0], baselines.fp8_tensor(x[0]))


def test_naive_codes_are_rounded_to_nearest_of_amax() -> None:
    weight = gaussian(8, 128, seed=4).bfloat16()
    weight[1] = 0
    got = baselines.naive_w4a4(weight, act_unsigned=False)
    for row, group in ((0, 0), (7, 1), (1, 0)):
        values = weight[row, 64 * group : 64 * group + 64].float()
        step = (values.abs().max() / 7).bfloat16().float()
        expected = (values / step).round().clamp(-8, 7) if step else torch.zeros(64)
        assert torch.equal(got.q[row, 64 * group : 64 * group + 64].float(), expected)
    assert got.proj_up.shape == (8, 0) and (got.smooth_factor == 1).all() and (got.wscales[1] == 1).all()


def test_order_of_formats_on_gaussian_weights() -> None:
    """What is known of them: two more bits are about 12 dB, NF4 is better than an even grid of its scale."""
    weight = gaussian(256, 1024, seed=5)
    naive = baselines.naive_w4a4(weight, act_unsigned=False)
    values = naive.q.float().reshape(256, 16, 64) * naive.wscales.float()[..., None]
    found = {
        name: relative_db(quantize(weight), weight)
        for name, quantize in {
            "int8": baselines.int8_rows, "fp8": baselines.fp8_tensor, "nf4": baselines.nf4, "awq": baselines.awq
        }.items()
    } | {"naive": relative_db(values.reshape(256, 1024), weight)}  # fmt: skip
    assert found["int8"] > found["fp8"] + 6 and found["fp8"] > found["nf4"] + 8
    assert found["nf4"] > found["naive"] + 1 and found["awq"] > found["naive"] + 1, found


@pytest.mark.parametrize("name", baselines.BASELINES)
def test_a_simulated_linear_is_near_the_dense_one(name: str) -> None:
    """All formats, with a bias; the second half of the input comes out of a GELU."""
    weight, bias = (gaussian(128, 256, seed=6) / 16).bfloat16(), gaussian(128, seed=7).bfloat16()
    sections = ((slice(0, 128), False), (slice(128, 256), True))
    module = baselines.BASELINES[name].make(baselines.Layer(weight, bias, sections))
    x = gaussian(3, 20, 256, seed=8)
    x[..., 128:] = torch.nn.functional.gelu(x[..., 128:] * 2, approximate="tanh")
    exact = torch.nn.functional.linear(x, weight.float(), bias.float())
    got = module(x)
    assert got.shape == exact.shape and got.dtype == x.dtype
    least = {"fp8-weights": 31, "fp8": 27, "int8": 34, "nf4": 20, "q4-0": 20, "naive": 14}[name]
    assert relative_db(got - bias.float(), exact - bias.float()) > least
    assert relative_db(module.dense.float(), weight.float()) > 18


def test_w4a4_arithmetic_of_the_naive_linear() -> None:
    """By the formulas of int4.py: an unsigned part with its shift."""
    weight = (gaussian(8, 64, seed=9) / 8).bfloat16()
    layer = baselines.Layer(weight, None, ((slice(0, 64), True),))
    x = torch.nn.functional.gelu(gaussian(5, 64, seed=10) * 2, approximate="tanh").bfloat16()
    stored = baselines.naive_w4a4(weight, act_unsigned=True)
    residual = stored.q.double() * stored.wscales.double()
    shifted = (x + SHIFT).float()
    step = shifted.amax(dim=1, keepdim=True) * np.float32(1 / 15)
    values = (shifted * step.reciprocal()).round().clamp(0, 15).double() * step.bfloat16().double()
    expected = (values - SHIFT) @ residual.t()
    got = baselines.BASELINES["naive"].make(layer)(x[None].float())[0]
    assert torch.allclose(got.double(), expected, atol=1e-5)


# ---- figures


def test_psnr_of_known_noise() -> None:
    original = torch.rand(3, 3, 16, 16)
    noisy = torch.stack([original[0], original[1] + 0.1, original[2]])
    noisy[2, :, ::2] += 0.2  # of half of the pixels
    expected = torch.tensor([metrics.CEILING_DB, 20.0, 10 * math.log10(1 / 0.02)], dtype=torch.float64)
    assert torch.allclose(metrics.psnr(noisy, original), expected, atol=1e-4)


def test_ssim_is_one_for_identical_pictures_and_that_of_the_paper_else() -> None:
    generator = torch.Generator().manual_seed(0)
    original = torch.rand(2, 3, 20, 24, generator=generator)
    noisy = (original + 0.2 * torch.randn(2, 3, 20, 24, generator=generator)).clamp(0, 1)
    assert torch.allclose(metrics.ssim(original, original), torch.ones(2, dtype=torch.float64), atol=1e-9)
    assert torch.equal(metrics.ssim(torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16)), torch.ones(1).double())
    got = metrics.ssim(noisy, original)
    expected = [
        np.mean([_ssim(a, b) for a, b in zip(x, y, strict=True)])
        for x, y in zip(noisy.double().numpy(), original.double().numpy(), strict=True)
    ]
    assert got.tolist() == pytest.approx(expected, abs=1e-6)


def _ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al. 2004: a Gaussian window of 11 x 11 pixels, sigma 1.5, one after the other."""
    axis = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window = np.outer(axis, axis) / axis.sum() ** 2
    found = []
    for top in range(a.shape[0] - 10):
        for left in range(a.shape[1] - 10):
            x, y = (image[top : top + 11, left : left + 11] for image in (a, b))
            mx, my = (window * x).sum(), (window * y).sum()
            vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
            covariance = (window * (x - mx) * (y - my)).sum()
            c1, c2 = 0.01**2, 0.03**2
            found.append((2 * mx * my + c1) * (2 * covariance + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return float(np.mean(found))


def test_sqnr() -> None:
    original = gaussian(3, 4, 5)
    values = torch.stack([original[0], 1.1 * original[1], torch.zeros(4, 5)])
    assert metrics.sqnr(values, original).tolist() == pytest.approx([metrics.CEILING_DB, 20.0, 0.0], abs=1e-4)
    assert metrics.sqnr(torch.ones(1, 2), torch.zeros(1, 2)).item() == -metrics.CEILING_DB


def test_intervals_cover_the_mean_as_often_as_they_say() -> None:
    covered = 0
    for seed in range(400):
        found = metrics.interval(gaussian(64, seed=seed).exp(), draws=500)  # skewed
        covered += found.low <= math.exp(0.5) <= found.high
    assert 0.88 < covered / 400 < 0.97


def test_interval() -> None:
    values = gaussian(256, seed=1) * 2 + 10
    found = metrics.interval(values)
    assert found.mean == pytest.approx(values.mean().item())
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * values.std().item() / 16, rel=0.1)
    assert metrics.interval(values) == found, "the same resamples each time"
    with_gaps = torch.cat([values, torch.full((50,), math.nan)])
    assert metrics.interval(with_gaps) == found
    assert math.isnan(metrics.interval(torch.full((3,), math.nan)).mean)


def test_paired_differences_do_not_see_what_prompts_have_in_common() -> None:
    prompts = 10 * gaussian(64, seed=2)
    better, worse = prompts + 0.5 + 0.1 * gaussian(64, seed=3), prompts
    found = metrics.interval(better - worse)
    assert found.verdict() == "holds" and found.low == pytest.approx(0.5, abs=0.1)
    assert metrics.interval(better).low < metrics.interval(worse).high, "which unpaired intervals do not tell apart"
    assert metrics.interval(worse - better).verdict() == "does not hold"
    assert found.verdict(margin=0.5) == "within the interval" and found.verdict(margin=1.0) == "does not hold"


# ---- claims, tables, pictures


class Found:
    """As measure.Measured."""

    def __init__(self, level: float, pictures: int = 0) -> None:
        self.values = {name: level + 0.1 * gaussian(32, seed=1) for name in claims.CHECKED}
        self.values |= {"ssim": torch.full((32,), 0.9), "word": torch.tensor([1.0, 0.0, math.nan, 1.0] * 8)}
        self.layer_db = {"double_blocks.0.img_attn.qkv": level, "double_blocks.1.img_attn.qkv": level + 2}
        self.weight_db = dict.fromkeys(self.layer_db, 20.0)
        self.pictures = torch.rand(pictures, 3, 128, 128) if pictures else None
        self.bits, self.seconds = 4.5, 1.0


LEVELS = {"r32": 20.0, "naive": 18.0, "smooth": 18.5, "r16": 19.0, "r32-int8": 20.0, "nf4": 20.5}


def results() -> dict[str, Any]:
    found = {name: Found(level) for name, level in LEVELS.items()}
    about = {"device": "CPU", "torch": "2", "prompts": 32, "calibration_prompts": 8, "size": 128, "steps": 4,
             "iterations": 2, "seconds": 3.0}  # fmt: skip
    model = {"name": "m.safetensors", "hidden_size": 128, "blocks": [2, 4], "parameters": 2_400_000}
    return report.result({**about, "model": model}, CONFIGURATIONS, found)


def test_claims_are_judged_by_their_margin_and_left_out_without_figures() -> None:
    checks = {f"{row['better']} {row['worse']}": row["differences"]["psnr_db"] for row in results()["checks"]}
    assert {name: found["verdict"] for name, found in checks.items()} == {
        "r32 naive": "does not hold",  # 2 dB, not 3
        "smooth naive": "holds",
        "r32 smooth": "holds",
        "r32 r16": "holds",
        "r32-int8 r32": "within the interval",
        "r16 nf4": "does not hold",
        "r32 nf4": "does not hold",
    }


def test_every_claim_is_about_configurations_that_exist() -> None:
    assert {name for claim in claims.CLAIMS for name in (claim.better, claim.worse)} <= set(CONFIGURATIONS)
    assert set(choose(None, gpu=True)) == set(CONFIGURATIONS)
    assert set(CONFIGURATIONS) - set(choose(None, gpu=False)) == {"r32-int4-kernels", "r32-int8-kernels"}
    assert list(choose(["r32", "nf4"], gpu=False)) == ["nf4", "r32"]


def test_tables() -> None:
    found = results()
    json.dumps(found, allow_nan=False)
    lines = report.console(found).splitlines()
    column = lines[0].index("numbers")
    assert all(line[column : column + 3] == "W4A" for line in lines[1 : 1 + len(LEVELS)]), "aligned"
    text = report.document({"date": "2026-01-01", "pictures": found, "full_size": found})
    assert text.startswith(report.BEGIN) and text.endswith(report.END)
    (row,) = [line for line in text.splitlines() if line.startswith("| SVDQuant rank 16 | W4A4")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[2] == "4.50" and cells[3].startswith("19.0 (18.9 to 19.") and cells[4] == "0.900"
    assert cells[7].startswith("67 ("), "two of three words, prompts without one left out"
    for header, rule in pairwise(line for line in text.splitlines() if line.startswith("|")):
        if rule.startswith("|---"):
            assert header.count("|") == rule.count("|")
    assert "| SVDQuant rank 16 | 20.0 | 20.0 | 19.0 | double_blocks.0.img_attn.qkv 19.0 |" in text


def test_text_around_the_generated_part_stays() -> None:
    text = f"# Quality\n\nmine\n\n{report.BEGIN}\nold\n{report.END}\n\nmine, too\n"
    assert report.replaced(text, f"{report.BEGIN}\nnew\n{report.END}") == text.replace("old", "new")
    for broken in ("no marks", report.BEGIN, f"{report.END} {report.BEGIN}"):
        with pytest.raises(ValueError, match="between which"):
            report.replaced(broken, "")
    assert report.BEGIN in bench_quality.DOCUMENT.read_text(encoding="utf-8")


def test_sheet_is_small_and_labelled(tmp_path: Path) -> None:
    from svdq.benchmarks.quality import sheet

    found = {name: Found(20, pictures=8) for name in sheet.SHOWN if name != "naive"}  # noise: the worst for JPEG
    found["original"].pictures[:] = torch.tensor([1.0, 0.0, 0.0])[:, None, None]
    labels = {name: configuration.label for name, configuration in CONFIGURATIONS.items()}
    texts = [f"prompt {index}" for index in range(8)]
    sheet.save(tmp_path / "sheet.jpg", labels, texts, found)
    assert (tmp_path / "sheet.jpg").stat().st_size <= sheet.MOST_BYTES
    with Image.open(tmp_path / "sheet.jpg") as page:
        pixels = np.asarray(page.convert("RGB")).astype(int)
    # Of the first eight prompts two have no word, and three of the others are shown.
    head = pixels.shape[0] - 5 * 146 + 4
    assert pixels.shape[1] == len(found) * 132 - 4
    assert abs(pixels[head + 22 : head + 134, 8:120] - [255, 0, 0]).max() < 40, "the first column is the original"
    assert all((pixels[:head, 132 * i : 132 * i + 128] < 100).any() for i in range(len(found))), "labels"
    assert sheet._chosen(8, torch.tensor([1, 0, 1, 0, math.nan, 1, 0, math.nan])) == [0, 1, 2, 4, 7]
    assert sheet._chosen(2, None) == [0, 1]


def test_random_weights_have_heavy_tails_and_outlier_channels() -> None:
    config = FluxConfig(256, 1, 1, 64, 64, 64, 32, guidance_embed=True)
    state = synthetic.state_dict(config)
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == stock_shapes(config)
    assert all(tensor.dtype == torch.bfloat16 and tensor.isfinite().all() for tensor in state.values())
    weight = state["double_blocks.0.img_mlp.0.weight"].float()
    assert ((weight / weight.std()) ** 4).mean() > 5, "3 for a Gaussian"
    gain = 1 + state["single_blocks.0.modulation.lin.bias"].float().reshape(3, -1)[1]
    assert gain.min() > 0 and gain.max() > 6 * gain.median()
    assert torch.equal(synthetic.state_dict(config)["img_in.weight"], state["img_in.weight"])


# ---- with ComfyUI


@pytest.mark.comfy
@pytest.mark.parametrize("axis", [0, 1])
def test_int8_reference_linear(comfy: ModuleType, axis: int) -> None:
    """Near the dense layer, nearer than INT4 activations; outputs of axis 1 are summed."""
    from svdq.benchmarks.quality.models import Int8Reference
    from svdq.kernels import reference
    from svdq.quantizer import solve

    weights = [gaussian(128, 256, seed=seed) / 16 for seed in (1, 2)]
    unsigned = (False, axis == 1)
    parts: list[W4A4] = [
        solve.quantize_w4a4(weight, torch.ones(256).bfloat16(), solve.Recipe(rank=16, iterations=1), flag)
        for weight, flag in zip(weights, unsigned, strict=True)
    ]
    dense, shift = reference.dequantize_parts(tuple(part.pack() for part in parts), axis, torch.float32)
    assert (shift is not None) == (axis == 1)
    x = gaussian(40, 256 * (1 + axis), seed=3)
    x[:, 256:] = torch.nn.functional.gelu(x[:, 256:], approximate="tanh")
    x = x.bfloat16()
    bias = gaussian(len(dense), seed=4)
    exact = x.float() @ dense.t() + bias + (0 if shift is None else shift)
    packed = tuple(part.pack() for part in parts)
    both = (Int8Reference().layers, reference)
    int8, int4 = (relative_db(layers.linear_parts_w4a4(x, packed, axis, bias).float(), exact) for layers in both)
    assert int8 > 35 and int8 > int4 + 12, (int8, int4)


@pytest.fixture
def command(comfy: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv(RESTARTED, "1")
    monkeypatch.setenv("COMFYUI_PATH", str(find_comfyui()))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    path = save_source(tmp_path / "source.safetensors")
    return ["bench", "quality", "--model", str(path), "--prompts", "6"]


@pytest.mark.comfy
@pytest.mark.slow
def test_command_on_a_tiny_random_model(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    names = ["16bit", "fp8", "nf4", "naive", "smooth", "r32", "r32-int8", "r32-16bit"]
    assert main([*command, "--rows", ",".join(names), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["pictures"]
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == ["original", *names]
    figures = {"psnr_db", "ssim", "latent_sqnr_db", "layer_sqnr_db"}
    assert all(set(row["figures"]) == figures for row in found["rows"][1:])
    assert rows["original"]["bits"] == 32 and not rows["original"]["figures"]
    layers = {name: rows[name]["figures"]["layer_sqnr_db"]["mean"] for name in names}
    order = ["naive", "smooth", "r32", "r32-int8", "r32-16bit", "16bit"]
    assert all(layers[worse] < layers[better] for worse, better in pairwise(order)), layers
    assert layers["naive"] + 1 < layers["nf4"] < layers["fp8"], layers
    latents = {name: rows[name]["figures"]["latent_sqnr_db"]["mean"] for name in names}
    assert latents["naive"] < latents["r32"] < latents["r32-int8"] + 0.5, latents
    assert latents["naive"] < latents["nf4"] < latents["fp8"] < 60, latents
    assert rows["naive"]["bits"] == 4.25 and 4.25 < rows["smooth"]["bits"] < 5 < rows["r32"]["bits"]
    assert [check["better"] for check in found["checks"]] == ["r32", "smooth", "r32", "r32-int8", "r32"]
    assert rows["naive"]["worst_layer"][1] == min(rows["naive"]["layer_kinds"].values()), "one block of each kind"


@pytest.mark.comfy
@pytest.mark.slow
def test_pictures_of_the_trained_model_are_read(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "quality", "--prompts", "6", "--rows", "int8,naive", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["pictures"]
    original, int8, naive = (row["figures"] for row in found["rows"])
    assert min(original[name]["mean"] for name in ("letters", "colour")) > 0.7, original
    assert int8["letters"]["mean"] >= naive["letters"]["mean"] - 0.1
    assert int8["psnr_db"]["low"] > naive["psnr_db"]["high"] + 6
    model = ROOT / "assets" / "demo-flux-bf16.safetensors"
    parameters = sum(tensor.numel() for tensor in load_file(str(model)).values())
    assert found["about"]["model"] == {
        "name": model.name, "hidden_size": 128, "blocks": [1, 6], "parameters": parameters
    }  # fmt: skip


@pytest.mark.comfy
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rows", "r32,gguf"], "--rows gguf is not known; choose from 16bit,"),
        (["--save"], "--save writes docs/quality.md"),
        (["--static"], "--static is for kernels"),
        (["--model", "absent.safetensors"], "absent.safetensors does not exist; check the path"),
    ],
)
def test_refused(command: list[str], options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, *options]) == 2
    assert message in capsys.readouterr().err
