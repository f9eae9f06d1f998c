"""``quantize`` on tiny FLUX models: what it writes, and that it goes on where it stopped."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from checks import assert_same, golden_path, relative_error
from conftest import ROOT
from files import Tensors, read_all, tiny
from quantizer_models import FAST, REPORTED, dense_model
from safetensors.torch import save_file
from test_quantizer_solve import one_thread  # noqa: F401 (a fixture)

from svdq import cli
from svdq.cli.dequantize import dequantize, effective
from svdq.cli.quantize import quantize
from svdq.kernels.int4 import SHIFT
from svdq.loaders import AWQLinear, CheckpointError, PlainLayer, W4A4Linear, open_checkpoint
from svdq.loaders.weights import FluxConfig
from svdq.quantizer import convert, job, measure, report, solve
from svdq.quantizer.report import report_path


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "tiny.safetensors"
    save_file(dense_model(), path)
    return path


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``source`` quantized without interruption."""
    out = tmp_path_factory.mktemp("made") / "out.safetensors"
    quantize(source, out, **FAST)
    return out


def sqnr(got: torch.Tensor, expected: torch.Tensor) -> float:
    return -20 * math.log10(relative_error(got, expected))


# ---- what is written


def test_file_is_laid_out_like_the_golden_one(made: Path) -> None:
    golden, golden_metadata = read_all(golden_path("svdq-int4_r16-tinyflux.safetensors"))
    tensors, metadata = read_all(made)
    assert {name: (t.dtype, t.shape if "text_embedder.linear_1" not in name else 0) for name, t in tensors.items()} == {
        name: (t.dtype, t.shape if "text_embedder.linear_1" not in name else 0) for name, t in golden.items()
    }
    assert set(golden_metadata) == set(metadata) - {"svdq.source", "svdq.quantizer"}
    assert json.loads(metadata["quantization_config"]) == json.loads(golden_metadata["quantization_config"])
    assert metadata["model_class"] == golden_metadata["model_class"]
    made_with = json.loads(metadata["svdq.quantizer"])
    assert (made_with["calibration"], made_with["rank"], made_with["iterations"]) == ("none", 16, 1)
    assert metadata["svdq.source"] == "tiny.safetensors"


def test_dequantized_model_is_near_the_source(source: Path, made: Path) -> None:
    original, checkpoint = read_all(source)[0], open_checkpoint(made)
    assert checkpoint.rank == 16 and checkpoint.config.hidden_size == 128
    found: dict[type, list[float]] = {}
    for name, layer in checkpoint.layers():
        weight, bias = effective(layer, torch.float32)
        if isinstance(layer, PlainLayer):
            assert_same(layer.weight, original[f"{name}.weight"], name)
            assert bias is None or torch.equal(bias, original[f"{name}.bias"].float()), name
            continue
        found.setdefault(type(layer), []).append(sqnr(weight, original[f"{name}.weight"]))
        # What a bias loses: its own rounding beside the +1 of a modulation or the shift of a GELU.
        assert (bias - original[f"{name}.bias"].float()).abs().max() < 5e-3, name
    assert min(found[W4A4Linear]) > 18.5, found[W4A4Linear]
    assert min(found[AWQLinear]) > 18.5, found[AWQLinear]


def test_a_quantized_model_quantized_again(tmp_path: Path) -> None:
    """Its weights are on a grid with a low-rank part, so most of them are found again."""
    first, dense, second = tiny(tmp_path, rank=16), tmp_path / "dense.safetensors", tmp_path / "second.safetensors"
    dequantize(first, dense)
    quantize(dense, second, rank=32, iterations=2, device="cpu")
    again = open_checkpoint(second)
    for name, layer in open_checkpoint(first).layers():
        if not isinstance(layer, PlainLayer):
            distance = sqnr(effective(again.layer(name), torch.float32)[0], effective(layer, torch.float32)[0])
            assert distance > (22 if isinstance(layer, AWQLinear) else 21), name


def test_layers_that_share_an_input_share_the_smoothing(made: Path) -> None:
    tensors = read_all(made)[0]
    for one, other in (
        ("single_transformer_blocks.0.qkv_proj", "single_transformer_blocks.0.mlp_fc1"),
        ("transformer_blocks.0.out_proj", "transformer_blocks.0.out_proj_context"),
    ):
        assert_same(tensors[f"{one}.smooth"], tensors[f"{other}.smooth"])
        assert tensors[f"{one}.smooth"].float().std() > 0.05
    assert not torch.equal(
        tensors["transformer_blocks.0.qkv_proj.smooth"], tensors["transformer_blocks.0.qkv_proj_context.smooth"]
    )
    assert_same(tensors["transformer_blocks.0.mlp_fc2.smooth_orig"], tensors["transformer_blocks.0.mlp_fc2.smooth"])
    assert tensors["single_transformer_blocks.0.out_proj.bias"].eq(0).all()


def test_unsigned_layers_and_their_bias(source: Path, made: Path) -> None:
    bias = read_all(source)[0]["double_blocks.0.img_mlp.2.bias"].float()
    layer = open_checkpoint(made).layer("double_blocks.0.img_mlp.2")
    weight = layer.parts[0].unpack()
    main = weight.q.float() * weight.wscales.float().repeat_interleave(64, dim=1) / weight.smooth_factor.float()
    assert weight.act_unsigned
    torch.testing.assert_close(layer.bias, (bias - SHIFT * main.sum(dim=1)).to(torch.bfloat16), atol=2e-3, rtol=0)


def test_report(made: Path) -> None:
    found = json.loads(report_path(made).read_text())
    assert found["bytes"] == made.stat().st_size and found["source"] == "tiny.safetensors"
    layers = {layer["name"]: layer for layer in found["layers"]}
    stored = {name.rpartition(".")[0] for name in read_all(made)[0] if name.endswith(".qweight")}
    assert set(layers) == stored and found["summary"]["w4a4"]["layers"] == 12
    for layer in layers.values():
        assert layer["weight_sqnr_db"] > 18 and layer["seconds"] >= 0 and layer["bytes"] > 0
        assert layer["output_sqnr_db"] > (12 if layer["kind"] == "w4a4" else 16), layer
    assert layers["single_transformer_blocks.0.mlp_fc2"]["shape"] == [128, 512]
    assert layers["single_transformer_blocks.0.mlp_fc2"]["layer"] == "single_blocks.0.linear2"


def test_report_says_what_the_file_holds(source: Path, made: Path) -> None:
    found = json.loads(report_path(made).read_text())
    original = read_all(source)[0]
    for layer in found["layers"]:
        if not layer["layer"].startswith("single_blocks.0.linear"):
            weight = effective(open_checkpoint(made).layer(layer["layer"]), torch.float32)[0]
            expected = sqnr(weight, original[f"{layer['layer']}.weight"].float())
            assert layer["weight_sqnr_db"] == pytest.approx(expected, abs=0.02), layer["name"]


def test_page(made: Path) -> None:
    """Well-formed, with a dot for each layer in each plot, and nothing that is fetched or run"""
    page = report_path(made, "html").read_text(encoding="utf-8")
    found = json.loads(report_path(made).read_text())
    for layer in found["layers"]:
        assert page.count(f"<title>{layer['name']}: ") == 2  # weights and random activations
    assert page.count("<svg") == page.count("</svg>") == 3
    assert not re.search(r"<script|<link|<img|https?:|url\(|@import", page)
    for svg in re.findall(r"<svg.*?</svg>", page):
        ElementTree.fromstring(svg)
    worst = min(found["layers"], key=lambda layer: layer["output_sqnr_db"])
    assert f"<tr><td>{worst['name']}<td>" in page.partition("worst layers")[2][:500]
    assert "nan" not in page.lower()
    hostile = report.as_html({**found, "file": "<script>", "source": "a&b<", "layers": found["layers"][:1]})
    assert "<script>" not in hostile and "a&amp;b&lt;" in hostile


def test_exact_layers_are_in_the_page(made: Path) -> None:
    found = json.loads(report_path(made).read_text())
    for layer in found["layers"]:
        layer |= {"weight_sqnr_db": None, "output_sqnr_db": None}
    assert report.as_html(found).count("<svg") == 1


def test_histogram() -> None:
    assert measure.histogram(torch.zeros(4, 4)) == [0] * measure.BINS
    counts = measure.histogram(torch.tensor([1.0, -1.0, 1.0, 1e-9, 0.0]))
    rms = -measure.FIRST_BIN  # 1 is above the root mean square of these by 0.37 powers of two
    assert counts[rms] == 600_000 and counts[0] == 200_000 and sum(counts) == 800_000
    big = measure.histogram(torch.randn(3000, 1000, generator=torch.Generator().manual_seed(0)))
    assert sum(big) == pytest.approx(1_000_000, abs=20) and max(big) == big[rms - 1]


def test_more_rank_is_nearer(source: Path, made: Path, tmp_path: Path) -> None:
    means = [json.loads(report_path(made).read_text())["summary"]["w4a4"]["weight_sqnr_db"]["mean"]]
    for rank in (32, 64):
        found = quantize(source, tmp_path / str(rank), **{**FAST, "rank": rank}).report
        means.append(found["summary"]["w4a4"]["weight_sqnr_db"]["mean"])
    assert means[1] > means[0] + 1 and means[2] > means[1] + 1, means


def test_fp16(source: Path, tmp_path: Path) -> None:
    quantize(source, tmp_path / "out", **FAST, dtype="fp16")
    checkpoint = open_checkpoint(tmp_path / "out")
    assert checkpoint.dtype == torch.float16
    name = "double_blocks.0.img_attn.qkv"
    weight = effective(checkpoint.layer(name), torch.float32)[0]
    assert sqnr(weight, read_all(source)[0][f"{name}.weight"]) > 18.5


# ---- sources


def to_diffusers(tensors: Tensors) -> Tensors:
    """Written down independently of quantizer/source.py."""
    result = {}
    outer = {
        "img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": "norm_out.linear", "time_in.in_layer": "timestep_embedder.linear_1",
        "time_in.out_layer": "timestep_embedder.linear_2", "vector_in.in_layer": "text_embedder.linear_1",
        "vector_in.out_layer": "text_embedder.linear_2", "guidance_in.in_layer": "guidance_embedder.linear_1",
        "guidance_in.out_layer": "guidance_embedder.linear_2",
    }  # fmt: skip
    inner = {
        "img_attn.proj": "attn.to_out.0", "txt_attn.proj": "attn.to_add_out", "img_mlp.0": "ff.net.0.proj",
        "img_mlp.2": "ff.net.2", "txt_mlp.0": "ff_context.net.0.proj", "txt_mlp.2": "ff_context.net.2",
        "img_mod.lin": "norm1.linear", "txt_mod.lin": "norm1_context.linear", "modulation.lin": "norm.linear",
        "img_attn.norm.query_norm": "attn.norm_q", "img_attn.norm.key_norm": "attn.norm_k",
        "txt_attn.norm.query_norm": "attn.norm_added_q", "txt_attn.norm.key_norm": "attn.norm_added_k",
        "norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k", "linear2": "proj_out",
    }  # fmt: skip
    for key, tensor in tensors.items():
        name, _, leaf = key.rpartition(".")
        if name in outer:
            halves = tensor.chunk(2)[::-1] if "adaLN" in name else (tensor,)
            embedder = "time_text_embed." if "embedder.linear" in outer[name] else ""
            result[f"{embedder}{outer[name]}.{leaf}"] = torch.cat(halves)
            continue
        kind, index, layer = name.split(".", 2)
        prefix = f"{'transformer' if kind == 'double_blocks' else 'single_transformer'}_blocks.{index}."
        h = 128
        if layer in ("img_attn.qkv", "txt_attn.qkv"):
            names = ("to_q", "to_k", "to_v") if layer.startswith("img") else ("add_q_proj", "add_k_proj", "add_v_proj")
            for part, rows in zip(names, tensor.split(h), strict=True):
                result[f"{prefix}attn.{part}.{leaf}"] = rows.clone()
        elif layer == "linear1":
            parts = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
            for part, rows in zip(parts, tensor.split([h, h, h, 4 * h]), strict=True):
                result[f"{prefix}{part}.{leaf}"] = rows.clone()
        else:
            result[f"{prefix}{inner[layer]}.{leaf}"] = tensor
    return result


@pytest.mark.parametrize("naming", ["original", "comfyui", "diffusers"])
def test_every_naming_gives_the_same_tensors(naming: str, made: Path, tmp_path: Path) -> None:
    tensors = dense_model()
    path = tmp_path / "model.safetensors"
    if naming == "diffusers":
        tensors = to_diffusers(tensors)
        path = tmp_path / "transformer"
        path.mkdir()
        names = sorted(tensors)
        for index, part in enumerate((names[::2], names[1::2])):
            save_file({name: tensors[name] for name in part}, path / f"model-{index}.safetensors")
    elif naming == "original":
        save_file({name.replace("_norm.weight", "_norm.scale"): t for name, t in tensors.items()}, path)
    else:
        tensors = {f"model.diffusion_model.{name}": t for name, t in tensors.items()}
        save_file(tensors | {"first_stage_model.decoder.conv_in.weight": torch.zeros(3)}, path)
    quantize(path, tmp_path / "out", **FAST)
    expected = read_all(made)[0]
    for name, tensor in read_all(tmp_path / "out")[0].items():
        assert_same(tensor, expected[name], name)


def test_float32_source_and_a_model_without_guidance(tmp_path: Path) -> None:
    tensors = {name: t.float() for name, t in dense_model().items() if not name.startswith("guidance_in")}
    save_file(tensors, tmp_path / "schnell.safetensors")
    quantize(tmp_path / "schnell.safetensors", tmp_path / "out.safetensors", **FAST)
    assert open_checkpoint(tmp_path / "out.safetensors").variant == "schnell"


# ---- going on


class Stop(Exception):
    pass


@pytest.mark.parametrize("units", [0, 1, 5, 12])
def test_going_on_gives_the_same_bytes(
    units: int, source: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, seen = tmp_path / "out.safetensors", []

    def stop(done: int, total: int, name: str) -> None:
        seen.append(name)
        if len(seen) > units:
            raise Stop

    with pytest.raises(Stop):
        quantize(source, out, **FAST, progress=stop)
    assert os.listdir(tmp_path) == ["out.safetensors.partial"], "OUT is there complete or not at all"
    seen.clear()
    result = quantize(source, out, **FAST, progress=lambda done, total, name: seen.append(name))
    assert result.resumed == units and len(seen) == 13 - units + 1
    assert out.read_bytes() == made.read_bytes()
    assert sorted(os.listdir(tmp_path)) == REPORTED


def test_stopped_while_the_file_is_put_together(
    source: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(report, "write_reports", lambda *_: (_ for _ in ()).throw(Stop))
        with pytest.raises(Stop):
            quantize(source, out, **FAST)
    assert not out.exists()
    assert quantize(source, out, **FAST).resumed == 13 and out.read_bytes() == made.read_bytes()


def test_killed_for_good_and_damaged_units(source: Path, made: Path, tmp_path: Path) -> None:
    """A process that is killed cleans nothing up."""
    out = tmp_path / "out.safetensors"
    arguments = ["quantize", source, out, "--no-calibration", "--rank", 16, "--iterations", 1, "--device", "cpu"]
    command = [sys.executable, ROOT / "__main__.py", *arguments]
    environment = {**os.environ, cli.RESTARTED: "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([str(part) for part in command], env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("*.partial/*/[!.]*"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    units = sorted(tmp_path.glob("*.partial/*/[!.]*.safetensors"))
    assert not out.exists() and len(units) >= 3
    units[0].write_bytes(units[0].read_bytes()[:-100])
    (units[0].parent / ".whole.safetensors.1.part").write_bytes(b"left behind")
    result = quantize(source, out, **FAST)
    assert result.resumed in (len(units) - 1, len(units)) and out.read_bytes() == made.read_bytes()
    assert sorted(os.listdir(tmp_path)) == REPORTED


def test_other_settings_or_another_source_do_not_mix(source: Path, made: Path, tmp_path: Path) -> None:
    out, copy = tmp_path / "out.safetensors", shutil.copy(source, tmp_path / source.name)

    def stop(done: int, total: int, name: str) -> None:
        if done > total / 2:
            raise Stop

    for settings in ({"rank": 32}, {"seed": 1}, {"iterations": 2}, {"dtype": "fp16"}):
        with pytest.raises(Stop):
            quantize(copy, out, **{**FAST, **settings}, progress=stop)
    os.utime(copy, ns=(0, 0))
    with pytest.raises(Stop):
        quantize(copy, out, **FAST, progress=stop)
    os.utime(copy, ns=(1, 1))
    result = quantize(copy, out, **FAST)
    assert result.resumed == 0 and len(result.leftovers) == 5 and out.read_bytes() == made.read_bytes()


@pytest.mark.skipif(os.name != "posix", reason="locks")
@pytest.mark.parametrize("settings", [{}, {"seed": 1}])
def test_one_process_at_a_time(settings: dict[str, int], source: Path, made: Path, tmp_path: Path) -> None:
    out, refused = tmp_path / "out.safetensors", []

    def meanwhile(done: int, total: int, name: str) -> None:
        with pytest.raises(CheckpointError, match="file: found another process that is quantizing to it") as error:
            quantize(source, out, **FAST, **settings, force=True)
        refused.append(str(error.value))

    quantize(source, out, **FAST, progress=meanwhile)
    assert refused and refused[0].startswith(str(out)) and out.read_bytes() == made.read_bytes()
    assert sorted(os.listdir(tmp_path)) == REPORTED


def test_full_disk_keeps_what_is_done(
    source: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, saved = tmp_path / "out.safetensors", []
    save = job._save

    def fail(path: Path, *arguments: Any) -> None:
        if len(saved) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        saved.append(path)
        save(path, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(job, "_save", fail)
        with pytest.raises(CheckpointError, match=r"writing: found a full disk, .* Make room and run the same command"):
            quantize(source, out, **FAST)
    assert quantize(source, out, **FAST).resumed == 4 and out.read_bytes() == made.read_bytes()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1_000_000))
    with pytest.raises(CheckpointError, match=r"free disk space: found 1.0 MB, expected [1-9]\.\d MB"):
        quantize(source, tmp_path / "other", **FAST)


# ---- the command


def test_command(
    source: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "RESTARTED", "SVDQ_TEST_RESTARTED")

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setenv("SVDQ_TEST_RESTARTED", "1")
        code = cli.main([str(argument) for argument in ("quantize", *arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    out = tmp_path / "a b.safetensors"
    code, text, error = run(source.parent, out)
    assert (code, text) == (2, "") and "calibration needs one file" in error and "--no-calibration" in error
    code, text, error = run(source, out, "--no-calibration", "--gptq")
    assert (code, text) == (2, "") and "--gptq looks at activations" in error
    options = ("--no-calibration", "--rank", 16, "--iterations", 1, "--device", "cpu")
    code, text, error = run(source, out, *options)
    assert (code, error) == (0, "") and f"{out}: " in text and " dB" in text
    assert out.read_bytes() == made.read_bytes()
    code, text, error = run(source, out, *options)
    assert code == 2 and "--force" in error and error.count("\n") == 1


def test_defaults_of_command_and_recipe_are_the_same() -> None:
    from svdq.cli import quantize as command

    assert (solve.Recipe.rank, solve.Recipe.iterations) == (command.DEFAULT_RANK, command.DEFAULT_ITERATIONS)
    assert set(command.DTYPES) == set(job.DTYPES)


@pytest.mark.parametrize("hidden, rank", [(128, 16), (3072, 32)])
def test_units_cover_every_tensor_once(hidden: int, rank: int) -> None:
    config = FluxConfig(hidden, 19, 38, 64, 64, 4096, 768, guidance_embed=True)
    specs = convert.specs_of(config, rank, torch.bfloat16)
    names = [name for unit in convert.units_of(config) for name in convert.stored_names(unit, specs)]
    assert sorted(names) == sorted(specs) and len(names) == 2604
