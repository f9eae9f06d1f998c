"""Calibrated quantization through ComfyUI's own sampler, as the node SVDQ Quantize does it, on a tiny FLUX model."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import quantizer_models
import torch
from checks import assert_same, golden_path, relative_error
from files import read_all
from quantizer_models import conditioning, load_dense, outlier_model
from test_quantizer_solve import one_thread  # noqa: F401 (a fixture)

from svdq.loaders import CheckpointError, open_checkpoint
from svdq.quantizer import activations, convert, job, smooth, solve
from svdq.quantizer.activations import InputStatistics
from svdq.quantizer.report import report_path

pytestmark = pytest.mark.comfy

WIDGETS = {
    "filename": "out", "folder": "output", "rank": 16, "gptq": False, "width": 128, "height": 128, "steps": 4,
    "calibration_seed": 0, "overwrite": False, "iterations": 2, "dtype": "bf16", "target_error": 0.0,
}  # fmt: skip
FAST = {"iterations": 1, "steps": 2, "width": 64, "height": 64}


@pytest.fixture(scope="module")
def model(comfy: ModuleType) -> Any:
    return load_dense(outlier_model())


@pytest.fixture
def folder(comfy: ModuleType, tmp_path: Path) -> Iterator[Path]:
    """Takes the place of ComfyUI's output folder."""
    import folder_paths

    before = folder_paths.get_output_directory()
    folder_paths.set_output_directory(str(tmp_path))
    yield tmp_path
    folder_paths.set_output_directory(before)


def quantize(model: Any, prompts: list | None = None, **widgets: Any) -> Path:
    """The node, called as ComfyUI calls it; the file that it wrote."""
    from svdq.nodes import SVDQFluxQuantize

    inputs = {"model": model, "conditioning": prompts or conditioning()} | WIDGETS | widgets
    with torch.inference_mode():
        output = SVDQFluxQuantize.execute(**{name: [value] for name, value in inputs.items()})
    return Path(output.args[0])


def report(path: Path) -> dict[str, Any]:
    return json.loads(report_path(path).read_text(encoding="utf-8"))


def sample(model: Any, seed: int = 100, steps: int = 1, count: int = 1) -> torch.Tensor:
    """Other prompts and noise than those of the calibration."""
    import comfy.sample

    (prompt,) = conditioning(1, seed)
    latent = torch.zeros(count, 16, 16, 16)
    noise = comfy.sample.prepare_noise(latent, seed)
    return comfy.sample.sample(
        model, noise, steps, 1.0, "euler", "simple", [prompt], [prompt], latent, disable_pbar=True, seed=seed
    )


def observed(model: Any, prompts: list, seed: int = 0, size: int = 128, steps: int = 4) -> dict[str, InputStatistics]:
    """Statistics of all inputs of quantized layers."""
    from svdq.nodes.graph_model import FluxCalibration, GraphModel

    graph = GraphModel(model)
    names = [name for unit in convert.units_of(graph.config) for name in convert.input_sections(unit, graph.shapes)]
    return activations.collect(FluxCalibration(model, prompts, size, size, steps, seed), names, lambda *_: None)


# ---- quality


@pytest.fixture(scope="module")
def qualities(model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One file made from the weights alone, one calibrated, one with GPTQ, too."""
    import folder_paths

    from svdq.cli.quantize import quantize as quantize_file

    folder, before = tmp_path_factory.mktemp("qualities"), folder_paths.get_output_directory()
    folder_paths.set_output_directory(str(folder))
    source = quantizer_models.save_source(folder / "source.safetensors")
    quantize_file(source, folder / "none.safetensors", 16, device="cpu", iterations=2)
    paths = {"none": folder / "none.safetensors"}
    paths |= {"calibrated": quantize(model, filename="calibrated"), "gptq": quantize(model, filename="gptq", gptq=True)}
    folder_paths.set_output_directory(before)
    return paths


def test_calibrated_is_better_and_gptq_better_still(model: Any, qualities: dict[str, Path]) -> None:
    """Output errors of each layer for prompts, noise and noise levels that the calibration has not seen."""
    seen = observed(model, conditioning(8, seed=77), seed=55, steps=3)
    found = {name: _mean_output_sqnr(model, path, seen) for name, path in qualities.items()}
    assert found["calibrated"] > found["none"] + 3, f"measured: 18.3, 22.0, 23.0; now {found}"
    assert found["gptq"] > found["calibrated"] + 0.7, f"measured: 18.3, 22.0, 23.0; now {found}"


def _mean_output_sqnr(model: Any, path: Path, seen: dict[str, InputStatistics]) -> float:
    """In dB, over all parts of all W4A4 layers."""
    values = []
    checkpoint = open_checkpoint(path)
    for name, statistics in seen.items():
        weight = model.model.diffusion_model.get_submodule(name).weight.detach().float()
        row = column = 0
        layer = checkpoint.layer(name)
        for part in getattr(layer, "parts", ()):
            exact = weight[row : row + part.n, column : column + part.k]
            x = statistics.rows[:, column : column + part.k].bfloat16()
            values.append(-10 * math.log10(solve.output_error(exact, part.unpack(), x)))
            row, column = (row + part.n, column) if layer.axis == 0 else (row, column + part.k)
    return sum(values) / len(values)


def test_the_whole_model_is_nearer(model: Any, qualities: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from svdq.model import load_flux

    monkeypatch.setenv("SVDQ_BACKEND", "int4-reference")
    exact = sample(model, count=12)
    errors = {name: relative_error(sample(load_flux(str(path)), count=12), exact) for name, path in qualities.items()}
    assert errors["calibrated"] < 0.9 * errors["none"], errors
    assert errors["gptq"] < 0.9 * errors["none"], errors


# ---- what is written


def test_file_is_laid_out_like_the_golden_one(qualities: dict[str, Path]) -> None:
    golden, golden_metadata = read_all(golden_path("svdq-int4_r16-tinyflux.safetensors"))
    for name in ("calibrated", "gptq"):
        tensors, metadata = read_all(qualities[name])
        # The width of the pooled prompt is another one.
        expected = {key: (t.dtype, t.shape) for key, t in golden.items() if "text_embedder.linear_1" not in key}
        assert {key: (tensors[key].dtype, tensors[key].shape) for key in expected} == expected
        assert set(tensors) == set(golden) and set(golden_metadata) < set(metadata)
        made = json.loads(metadata["svdq.quantizer"])
        assert (made["calibration"], made["prompts"], made["steps"], made["size"]) == ("activations", 3, 4, [128, 128])
        assert made["gptq"] == (name == "gptq") and "conditioning" in made
    assert open_checkpoint(qualities["gptq"]).rank == 16


def test_report_says_how_activations_fared(qualities: dict[str, Path]) -> None:
    summaries = {name: report(path)["summary"]["w4a4"] for name, path in qualities.items()}
    assert summaries["none"]["calibration_sqnr_db"] is None
    means = [summaries[name]["calibration_sqnr_db"]["mean"] for name in ("calibrated", "gptq")]
    assert means[1] > means[0] > 20
    for layer in report(qualities["gptq"])["layers"]:
        if layer["kind"] == "w4a4":
            assert layer["smooth_alpha"] in smooth.ALPHAS and layer["smooth_beta"] in smooth.BETAS


def test_layers_that_share_an_input_share_the_smoothing(qualities: dict[str, Path]) -> None:
    tensors = read_all(qualities["gptq"])[0]
    for one, other in (
        ("single_transformer_blocks.0.qkv_proj", "single_transformer_blocks.0.mlp_fc1"),
        ("transformer_blocks.0.out_proj", "transformer_blocks.0.out_proj_context"),
    ):
        assert_same(tensors[f"{one}.smooth"], tensors[f"{other}.smooth"])
        assert tensors[f"{one}.smooth"].float().std() > 0.05


# ---- going on


class Stop(BaseException):
    pass


@pytest.mark.parametrize("gptq", [False, True])
def test_killed_anywhere_and_gone_on_with(
    gptq: bool, model: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes, also when second moments are collected for other units at a time"""
    from svdq.nodes.graph_model import FluxCalibration

    whole = quantize(model, filename="whole/out", gptq=gptq, **FAST)
    monkeypatch.setattr(FluxCalibration, "moment_bytes", 2 * 4 * 512 * 512)
    runs, real_run, real_convert = [], FluxCalibration.run, job.convert
    monkeypatch.setattr(FluxCalibration, "run", lambda self, step: (runs.append(1), real_run(self, step)))
    for allowed in (0, 2, 3):
        made = []

        def fail(*arguments: Any, made: list = made, allowed: int = allowed) -> Any:
            if len(made) == allowed:
                raise Stop
            made.append(1)
            return real_convert(*arguments)

        monkeypatch.setattr(job, "convert", fail)
        with pytest.raises(Stop):
            quantize(model, gptq=gptq, **FAST)
        assert not (folder / "out.safetensors").exists() and not list(folder.rglob("inputs"))
    monkeypatch.setattr(job, "convert", real_convert)
    out = quantize(model, gptq=gptq, **FAST)
    assert out.read_bytes() == whole.read_bytes()
    # Statistics once; second moments for one or two units at a time in each of the four tries.
    assert len(runs) == 1 if not gptq else len(runs) > 5, len(runs)
    names = ["out.safetensors", "out.safetensors.report.html", "out.safetensors.report.json"]
    assert sorted(os.listdir(folder)) == [*names, "whole"] and sorted(os.listdir(folder / "whole")) == names


def test_other_prompts_and_settings_do_not_mix(model: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = set()
    monkeypatch.setattr(job, "convert", lambda *_: (_ for _ in ()).throw(Stop))
    changes = ({}, {"gptq": True}, {"steps": 1}, {"width": 96}, {"calibration_seed": 1}, {"rank": 32})
    for change in (*changes, {"prompts": conditioning(3, 1)}, {"prompts": conditioning(2)}):
        with pytest.raises(Stop):
            quantize(model, **{**FAST, **change})
        folders |= set((folder / "out.safetensors.partial").iterdir())
    assert len(folders) == 8


def test_interrupt_stops_at_once_and_the_next_run_goes_on(model: Any, folder: Path) -> None:
    import comfy.model_management as management

    management.interrupt_current_processing()
    with pytest.raises(management.InterruptProcessingException):
        quantize(model, **FAST)
    assert os.listdir(folder) in ([], ["out.safetensors.partial"])
    assert quantize(model, **FAST).is_file()


# ---- activations


def test_watching_changes_nothing(model: Any) -> None:
    """Models in float32, too, whose activations are not copied by a conversion"""
    seen, flux = [], model.model.diffusion_model
    hook = flux.final_layer.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].clone()))
    for watched in (False, True):
        with activations._watching(flux, {"single_blocks.0.linear2": activations._Inputs(0)} if watched else {}):
            sample(model)
    hook.remove()
    assert torch.equal(*seen) and not any(module._forward_pre_hooks for module in flux.modules())


@pytest.mark.parametrize("waiting", [activations._WAITING, 100])
def test_statistics_and_moments_of_known_inputs(waiting: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "_WAITING", waiting)
    generator = torch.Generator().manual_seed(0)
    calls = [torch.randn(2, tokens, 6, generator=generator) for tokens in (50, 300, 100)]
    module = torch.nn.Linear(6, 3)
    flux = torch.nn.ModuleDict({"one": module})
    calibration = SimpleNamespace(
        flux=flux,
        device=torch.device("cpu"),
        make_room=lambda nbytes: None,
        run=lambda on_step: [module(x) for x in calls],
    )
    x = torch.cat([call.reshape(-1, 6) for call in calls])
    found = activations.collect(calibration, ["one"], print)["one"]
    assert torch.equal(found.amax, x.abs().amax(dim=0))
    torch.testing.assert_close(found.square, x.square().mean(dim=0))
    assert len(found.rows) == activations.ROWS
    positions = [(x == row).all(dim=1).nonzero().item() for row in found.rows]
    assert positions == sorted(set(positions)) and sum(100 <= p < 700 for p in positions) > 120, "an even choice"
    moments = activations.collect_moments(calibration, {"one": [slice(0, 2), slice(2, 6)]}, print)
    torch.testing.assert_close(moments["one", 2], x[:, 2:].t() @ x[:, 2:] / len(x))
    assert set(moments) == {("one", 0), ("one", 2)}


def test_activations_that_are_not_finite_are_named() -> None:
    flux = torch.nn.ModuleDict({"one": torch.nn.Linear(2, 2), "idle": torch.nn.Linear(2, 2)})
    calibration = SimpleNamespace(flux=flux, run=lambda on_step: flux["one"](torch.tensor([[1.0, float("inf")]])))
    with pytest.raises(CheckpointError, match=r"^one: activations: found 1 of 2 channels NaN or infinite"):
        activations.collect(calibration, ["one"], print)
    with pytest.raises(CheckpointError, match=r"^idle: activations: found none"):
        activations.collect(calibration, ["idle"], print)


def test_channels_without_activations() -> None:
    """Nothing is known of the weights there, which are kept as well as the others"""
    weight = torch.randn(128, 256, generator=torch.Generator().manual_seed(0))
    for silent in (slice(0, 70), slice(0, 256)):
        rows = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
        rows[:, silent] = 0
        member = smooth.Member(weight, False, InputStatistics(rows.abs().amax(0), rows.square().mean(0), rows))
        recipe = solve.Recipe(16, iterations=1)
        quantized = smooth.find_smooth([member], recipe).quantize(member, recipe, rows.t() @ rows)
        dense = solve.reference.dequantize_w4a4(quantized)[0]
        assert relative_error(dense[:, silent], weight[:, silent]) < 0.3


# ---- the node


def test_loras_are_baked_in(model: Any, folder: Path, comfy: ModuleType) -> None:
    import comfy.sd

    name, generator = "double_blocks.0.img_mlp.0", torch.Generator().manual_seed(3)
    down, up = torch.randn(4, 128, generator=generator), torch.randn(512, 4, generator=generator)
    lora = {f"diffusion_model.{name}.lora_A.weight": down, f"diffusion_model.{name}.lora_B.weight": up}
    patched = comfy.sd.load_lora_for_models(model, None, lora, 0.5, 0)[0]
    out = quantize(patched, **FAST)
    layer = open_checkpoint(out).layer(name)
    expected = outlier_model()[f"{name}.weight"].float() + 0.5 * up @ down
    assert relative_error(solve.reference.dequantize_w4a4(layer.parts[0].unpack())[0], expected) < 0.1
    plain = quantize(model, filename="plain", **FAST)
    same = "transformer_blocks.0.norm1.linear.qweight"
    assert_same(read_all(out)[0][same], read_all(plain)[0][same])


def test_model_in_fp8(folder: Path, comfy: ModuleType) -> None:
    """As Load Diffusion Model makes it when asked for fp8: what is quantized are its fp8 values"""
    import comfy.sd

    tensors = outlier_model()
    fp8 = comfy.sd.load_diffusion_model_state_dict(
        {name: tensor.clone() for name, tensor in tensors.items()}, model_options={"dtype": torch.float8_e4m3fn}
    )
    name = "double_blocks.0.img_mlp.0"
    assert fp8.model.diffusion_model.get_submodule(name).weight.dtype == torch.float8_e4m3fn
    layer = open_checkpoint(quantize(fp8, **FAST)).layer(name)
    expected = tensors[f"{name}.weight"].to(torch.float8_e4m3fn).float()
    assert relative_error(solve.reference.dequantize_w4a4(layer.parts[0].unpack())[0], expected) < 0.2


def test_fingerprint_is_that_of_values(model: Any) -> None:
    import comfy.sd

    from svdq.nodes.graph_model import GraphModel

    def lora(seed: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        name = "diffusion_model.single_blocks.0.linear2.lora"
        down, up = torch.randn(4, 640, generator=generator), torch.randn(128, 4, generator=generator)
        return {f"{name}_A.weight": down, f"{name}_B.weight": up}

    def found(model: Any, *loras: tuple[int, float]) -> list[object]:
        for seed, strength in loras:
            model = comfy.sd.load_lora_for_models(model, None, lora(seed), strength, 0)[0]
        return GraphModel(model).fingerprint()

    different = [found(model), found(model, (0, 1.0)), found(model, (1, 1.0)), found(model, (0, 0.5))]
    assert len({str(value) for value in different}) == 4
    again = load_dense(outlier_model())
    assert found(again) == different[0] and found(again, (0, 1.0)) == different[1]


def test_what_is_no_source(model: Any, qualities: dict[str, Path], folder: Path) -> None:
    from svdq.model import load_flux

    with pytest.raises(CheckpointError, match=r"^MODEL: .*: found a model that is quantized already"):
        quantize(load_flux(str(qualities["none"]), "16bit"))
    broken = outlier_model()
    broken["double_blocks.0.img_mlp.2.weight"][3, 5] = float("nan")
    with pytest.raises(CheckpointError, match=r"img_mlp\.2\.weight: found 1 of 65536 values NaN"):
        quantize(load_dense(broken), **FAST)
    stranger = SimpleNamespace(model=SimpleNamespace(diffusion_model=torch.nn.Linear(1, 1)), load_device="cpu")
    with pytest.raises(CheckpointError, match="not FLUX"):
        quantize(stranger)
    with pytest.raises(ValueError, match="DualCLIPLoader"):
        quantize(model, [[torch.zeros(1, 2, 64), {}]])
    with pytest.raises(CheckpointError, match="rank: found 24"):
        quantize(model, rank=24)
    assert not list(folder.glob("*.safetensors"))


@pytest.mark.parametrize("name", ["", "../out", "a/../../out", "/tmp/out", "a\0b", "sub/"])
def test_names_that_lead_out_of_the_folder(name: str, model: Any, folder: Path) -> None:
    with pytest.raises(ValueError, match="is not a name inside the folder"):
        quantize(model, filename=name)


def test_an_existing_file_is_kept(model: Any, folder: Path) -> None:
    (folder / "out.safetensors").write_bytes(b"mine")
    with pytest.raises(ValueError, match="switch overwrite on"):
        quantize(model)
    assert (folder / "out.safetensors").read_bytes() == b"mine"
    assert quantize(model, overwrite=True, filename="out.safetensors", **FAST) == folder / "out.safetensors"
    assert open_checkpoint(folder / "out.safetensors").rank == 16


def test_lists_of_prompts_and_combined_ones_are_the_same(model: Any, folder: Path) -> None:
    from svdq.nodes import SVDQFluxQuantize

    combined = quantize(model, filename="combined/out", **FAST)
    widgets = {name: [value] for name, value in (WIDGETS | FAST).items()}
    SVDQFluxQuantize.execute(model=[model], conditioning=[[prompt] for prompt in conditioning()], **widgets)
    assert (folder / "out.safetensors").read_bytes() == combined.read_bytes()


def test_fp16_and_values_beyond_it(model: Any, folder: Path) -> None:
    out = quantize(model, dtype="fp16", gptq=True, **FAST)
    assert open_checkpoint(out).dtype == torch.float16
    assert report(out)["summary"]["w4a4"]["calibration_sqnr_db"]["min"] > 15
    tensors = outlier_model()
    tensors["double_blocks.0.img_mlp.0.weight"] *= 1e7
    with pytest.raises(CheckpointError, match=r"beyond the range of float16"):
        quantize(load_dense(tensors), filename="big", dtype="fp16", **FAST)


# ---- ranks


def test_rank_for_an_error(model: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer has the smallest rank with which it is within the error; loader and kernels take the mixture"""
    from svdq.model import load_flux

    target = 0.06
    out = quantize(model, target_error=target, rank=128, **FAST)
    layers = {layer["name"]: layer for layer in report(out)["layers"] if layer["kind"] == "w4a4"}
    tensors, _ = read_all(out)
    for name, layer in layers.items():
        assert tensors[f"{name}.lora_up"].shape[1] == layer["rank"]
    ranks = open_checkpoint(out).ranks
    assert len(ranks) > 2 and set(ranks) <= set(smooth.RANKS)
    for layer in layers.values():
        error = 10 ** (-layer["calibration_sqnr_db"] / 20)
        assert layer["target_met"] == (error <= target * 1.001), layer
        assert layer["target_met"] or layer["rank"] == 128
    monkeypatch.setenv("SVDQ_BACKEND", "int4-reference")
    assert relative_error(sample(load_flux(str(out))), sample(model)) < 0.3
    coarse = quantize(model, filename="coarse", target_error=0.5, rank=128, **FAST)
    assert open_checkpoint(coarse).ranks == {16: 12}
    with pytest.raises(CheckpointError, match=r"target error: found 1\.5, expected 0 to 0\.9"):
        quantize(model, filename="other", target_error=1.5)


def test_layers_of_their_own_rank_are_gone_on_with(model: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, real = quantize(model, filename="whole/out", target_error=0.08, rank=64, **FAST), job.convert
    made = []

    def fail(*arguments: Any) -> Any:
        if len(made) == 7:
            raise Stop
        made.append(1)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(job, "convert", fail)
        with pytest.raises(Stop):
            quantize(model, target_error=0.08, rank=64, **FAST)
    monkeypatch.setattr(job, "convert", lambda *arguments: (made.append(1), real(*arguments))[1])
    assert quantize(model, target_error=0.08, rank=64, **FAST).read_bytes() == whole.read_bytes()
    assert len(made) == 13


# ---- conditioning


def test_conditioning_is_saved_and_loaded(comfy: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import folder_paths

    from svdq.nodes import SVDQLoadConditioning, SVDQSaveConditioning

    given = conditioning(2)
    saved = [
        SVDQSaveConditioning.execute(conditioning=list_, filename_prefix=["sub/prompts"]).args[0]
        for list_ in ([given], [[prompt] for prompt in given])
    ]
    assert [Path(path).name for path in saved] == ["prompts_00001_.safetensors", "prompts_00002_.safetensors"]
    assert Path(saved[0]).read_bytes() == Path(saved[1]).read_bytes()
    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(folder / "sub"))
    name = Path(saved[0]).name
    assert name in SVDQLoadConditioning.GET_SCHEMA().inputs[0].options
    (found,) = SVDQLoadConditioning.execute(file=name).args
    for (text, extra), (expected, known) in zip(found, given, strict=True):
        assert torch.equal(text, expected) and extra.keys() == known.keys()
        assert torch.equal(extra["pooled_output"], known["pooled_output"])
    for outside in ("../sub/" + name, str(saved[0]), "none.safetensors", ""):
        with pytest.raises(CheckpointError, match="is not in ComfyUI's input folder"):
            SVDQLoadConditioning.execute(file=outside)
    (folder / "sub" / "other.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"other\.safetensors"):
        SVDQLoadConditioning.execute(file="other.safetensors")
    before = SVDQLoadConditioning.fingerprint_inputs(file=name)
    Path(saved[0]).write_bytes(b"changed")
    assert SVDQLoadConditioning.fingerprint_inputs(file=name) != before
