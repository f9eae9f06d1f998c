"""Linears that the quantizer makes INT8 instead of four bits: the file, loading, computing, saving, converting it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flux_models
import pytest
import torch
from files import Metadata, Tensors, changed, read_all
from quantizer_models import save_source
from safetensors.torch import save_file
from test_compatibility_saving import save
from test_quantizer_calibrated import folder, model, quantize  # noqa: F401  the fixtures of a MODEL and its output

from svdq.cli.convert import Lora, convert
from svdq.cli.dequantize import effective
from svdq.cli.inspect import inspect
from svdq.cli.quantize import quantize as quantize_file
from svdq.kernels import layout
from svdq.loaders import CheckpointError, Int8Linear, open_checkpoint
from svdq.quantizer.report import report_path

# A linear behind a GELU, a modulation layer, and a linear that is two stored layers in other files.
KEPT = ("double_blocks.0.img_mlp.2", "double_blocks.0.txt_mod.lin", "single_blocks.0.linear2")
PATTERNS = ("double_blocks.*.img_mlp.2", "*.txt_mod.lin", "single_blocks.?.linear2")
PLAIN = "double_blocks.0.img_attn.proj"
LEAVES = {"weight": torch.int8, "weight_scale": torch.float32, "weight_smooth": torch.bfloat16, "bias": torch.bfloat16}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("files")
    paths = {name: place / f"{name}.safetensors" for name in ("source", "kept", "plain")}
    save_source(paths["source"])
    for name, int8, plain in (("kept", PATTERNS, (PLAIN,)), ("plain", (), ())):
        quantize_file(paths["source"], paths[name], 16, device="cpu", iterations=1, keep_int8=int8, keep_16bit=plain)
    return paths


def decibel(found: torch.Tensor, expected: torch.Tensor) -> float:
    return -20 * torch.tensor(flux_models.relative(found, expected)).log10().item()


def make_lora(path: Path, names: tuple[str, ...], rank: int = 4) -> dict[str, torch.Tensor]:
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name in names:
        n, k = open_checkpoint(path).layer(name).shape
        tensors[f"diffusion_model.{name}.lora_down.weight"] = torch.randn(rank, k, generator=generator) * k**-0.5
        tensors[f"diffusion_model.{name}.lora_up.weight"] = torch.randn(n, rank, generator=generator) * 0.1
    return tensors


def test_the_file(files: dict[str, Path]) -> None:
    source, kept, plain = (read_all(files[name])[0] for name in ("source", "kept", "plain"))
    checkpoint = open_checkpoint(files["kept"])
    assert checkpoint.int8_linears == KEPT and checkpoint.plain_linears == (PLAIN,)
    assert open_checkpoint(files["plain"]).int8_linears == ()
    assert checkpoint.layer_names == open_checkpoint(files["plain"]).layer_names
    for name in KEPT:
        layer = checkpoint.layer(name)
        assert isinstance(layer, Int8Linear) and layer.lora is None
        tensors = {leaf: kept.pop(f"{name}.{leaf}") for leaf in LEAVES}
        assert {leaf: tensor.dtype for leaf, tensor in tensors.items()} == LEAVES
        weight, bias = effective(layer, torch.float32)
        assert decibel(weight, source[f"{name}.weight"]) > 30
        assert torch.equal(bias, source[f"{name}.bias"].float()) and torch.equal(layer.bias, source[f"{name}.bias"])
        smooth = layout.unpack_vector(tensors["weight_smooth"]).double()
        exact = tensors["weight"].double() * tensors["weight_scale"].double()[:, None] / smooth
        assert flux_models.relative(weight, exact) < 1e-6 and tensors["weight"].abs().amax() == 127
    for leaf in ("weight", "bias"):
        assert torch.equal(kept.pop(f"{PLAIN}.{leaf}"), source[f"{PLAIN}.{leaf}"])
    gone = {key.rpartition(".")[0] for key in plain if key not in kept}
    assert gone == {
        "transformer_blocks.0.mlp_fc2", "transformer_blocks.0.norm1_context.linear", "transformer_blocks.0.out_proj",
        "single_transformer_blocks.0.out_proj", "single_transformer_blocks.0.mlp_fc2",
    }  # fmt: skip
    # The two attention outputs of a double block share their smoothing: one of them decides it alone now.
    alone = "transformer_blocks.0.out_proj_context."
    assert kept.keys() <= plain.keys()
    assert all(torch.equal(kept[key], plain[key]) for key in kept if not key.startswith(alone))


def test_what_is_said_of_it(files: dict[str, Path]) -> None:
    facts, other = (inspect(files[name])[0] for name in ("kept", "plain"))
    assert facts["layers"]["int8"] == 3 and "int8" not in other["layers"] and "int8" not in other["bytes"]
    tensors = read_all(files["kept"])[0]
    assert facts["bytes"]["int8"] == sum(tensors[f"{name}.{leaf}"].nbytes for name in KEPT for leaf in LEAVES)
    report, without = (json.loads(report_path(files[name]).read_text()) for name in ("kept", "plain"))
    assert report["settings"]["keep_int8"] == list(PATTERNS) and "keep_int8" not in without["settings"]
    assert "w8a8" not in without["summary"] and report["summary"]["w8a8"]["layers"] == 3
    found = {fact["layer"]: fact for fact in report["layers"] if fact["kind"] == "w8a8"}
    assert tuple(found) == KEPT
    four_bits = report["summary"]["w4a4"]
    for name, fact in found.items():
        assert fact["weight_sqnr_db"] > 30 and fact["output_sqnr_db"] > four_bits["output_sqnr_db"]["mean"] + 8, name
        assert fact["bytes"] == sum(tensors[f"{name}.{leaf}"].nbytes for leaf in LEAVES)
    page, other_page = (report_path(files[name], "html").read_text() for name in ("kept", "plain"))
    assert "</span>int8" in page and "int8 layers" in page and "int8" not in other_page


@pytest.mark.comfy
@pytest.mark.usefixtures("comfy")
def test_it_computes_and_is_saved(files: dict[str, Path], tmp_path: Path) -> None:
    from svdq.model import load_flux

    arguments = flux_models.inputs(open_checkpoint(files["kept"]))

    def run(path: Path) -> torch.Tensor:
        return flux_models.forward(load_flux(str(path), "16bit"), arguments)

    out, dense = run(files["kept"]), flux_models.forward(flux_models.load_dense(files["kept"]), arguments)
    assert flux_models.relative(out, dense) < 1e-2 < flux_models.relative(run(files["plain"]), dense)
    patcher = load_flux(str(files["kept"]), "16bit")
    saved = save(patcher, tmp_path)
    assert patcher.model_size() == pytest.approx(saved.stat().st_size, rel=0.05)
    again, checkpoint = open_checkpoint(saved), open_checkpoint(files["kept"])
    assert again.int8_linears == KEPT and again.plain_linears == (PLAIN,) and again.dtype == torch.bfloat16
    for name in KEPT:
        layers = [one.layer(name) for one in (again, checkpoint)]
        for a, b in zip(*((*vars(one.weight).values(), one.bias) for one in layers), strict=True):
            assert torch.equal(a, b) and a.dtype == b.dtype
    tensors = read_all(saved)[0]
    for name in KEPT:
        (described,) = (bytes(v) for key, v in tensors.items() if key.endswith(f".{name}.comfy_quant"))
        assert json.loads(described) == {"format": "svdq_int8", "shape": list(checkpoint.layer(name).shape)}
    assert torch.equal(run(saved), out)
    (key,) = (key for key in tensors if key.endswith(f".{KEPT[0]}.comfy_quant"))
    text = b'{"format": "svdq_int4", "shape": [128, 512]}'
    layer, _, leaf = key.rpartition(".")
    broken = change(leaf, torch.frombuffer(bytearray(text), dtype=torch.uint8), layer)
    with pytest.raises(CheckpointError, match=r'svdq_int4.*expected {"format": "svdq_int8", "shape": .128, 512.}'):
        open_checkpoint(changed(saved, broken))


@pytest.mark.comfy
@pytest.mark.usefixtures("comfy")
def test_its_arithmetic(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where activations are quantized, such a layer's are in INT8: nearer to the original than in four bits."""
    from svdq.model import load_flux

    monkeypatch.setenv("SVDQ_BACKEND", "int4-reference")
    source = read_all(files["source"])[0]
    int8, int4 = (load_flux(str(files[name])).model.diffusion_model for name in ("kept", "plain"))
    for name in (KEPT[0], KEPT[2]):
        weight, bias = (source[f"{name}.{leaf}"].float() for leaf in ("weight", "bias"))
        x = torch.randn(40, weight.shape[1], generator=torch.Generator().manual_seed(1)).bfloat16()
        x[:, -512:] = torch.nn.functional.gelu(x[:, -512:].float(), approximate="tanh")
        exact = torch.nn.functional.linear(x.float(), weight, bias)
        with torch.inference_mode():
            found = [decibel(flux.get_submodule(name)(x.float()), exact) for flux in (int8, int4)]
        assert found[0] > found[1] + 8 and found[0] > 28, (name, found)
    monkeypatch.setenv("SVDQ_BACKEND", "16bit")
    in_16_bits = load_flux(str(files["kept"])).model.diffusion_model.get_submodule(KEPT[2])
    with torch.inference_mode():
        assert decibel(in_16_bits(x.float()), exact) > found[0] + 1, "activations are not rounded there"


@pytest.mark.comfy
@pytest.mark.usefixtures("comfy")
@pytest.mark.parametrize("backend", ["16bit", "int4-reference"])
def test_loras(backend: str, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain and other ones, on weights and biases; without them, the same bits as before; saved with the model."""
    import comfy.sd

    from svdq.model import load_flux

    monkeypatch.setenv("SVDQ_BACKEND", backend)
    lora = make_lora(files["kept"], KEPT)
    n, k = open_checkpoint(files["kept"]).layer(KEPT[0]).shape
    generator = torch.Generator().manual_seed(1)
    other = {f"diffusion_model.{KEPT[0]}.diff": torch.randn(n, k, generator=generator) * 0.02,
             f"diffusion_model.{KEPT[0]}.diff_b": torch.randn(n, generator=generator) * 0.1}  # fmt: skip
    arguments = flux_models.inputs(open_checkpoint(files["kept"]))
    ours = load_flux(str(files["kept"]))
    before = flux_models.forward(ours, arguments)
    dense = flux_models.load_dense(files["kept"])
    unchanged = flux_models.forward(dense, arguments)
    yardstick = flux_models.relative(before, unchanged)
    strength = 1.0 if backend == "16bit" else 5.0  # much more than what INT4 activations change
    for added in (lora, other):
        found, expected = (
            flux_models.forward(comfy.sd.load_lora_for_models(one, None, added, strength, 0)[0], arguments)
            for one in (ours, dense)
        )
        assert flux_models.relative(found, expected) < 1.2 * yardstick + 1e-2
        assert flux_models.relative(found, expected) < 0.5 * flux_models.relative(unchanged, expected)
        assert torch.equal(flux_models.forward(ours, arguments), before)
    if backend == "16bit":
        with_it = comfy.sd.load_lora_for_models(ours, None, lora, 0.7, 0)[0]
        expected = flux_models.forward(with_it, arguments)
        saved = save(with_it, tmp_path)
        assert all(open_checkpoint(saved).layer(name).lora is not None for name in KEPT)
        assert flux_models.relative(flux_models.forward(load_flux(str(saved)), arguments), expected) < 1e-3
        assert flux_models.relative(before, expected) > 1e-2
        # Where there is no place for the LoRA, these layers get 16 bits.
        result = convert(saved, tmp_path / "again.safetensors", "nunchaku")
        assert tuple(result.dense) == KEPT
        again = open_checkpoint(tmp_path / "again.safetensors")
        assert again.int8_linears == () and set(again.plain_linears) == {*KEPT, PLAIN}
        weight = effective(open_checkpoint(saved).layer(KEPT[1]), torch.float32)[0]
        assert torch.equal(again.layer(KEPT[1]).weight, weight.bfloat16())


@pytest.mark.comfy
@pytest.mark.usefixtures("comfy")
def test_a_merge(files: dict[str, Path]) -> None:
    """ModelMergeSimple of a dense model and this one, and the other way round: as with the dense twin."""
    from comfy_extras.nodes_model_merging import ModelMergeSimple

    from svdq.model import load_flux

    arguments = flux_models.inputs(open_checkpoint(files["kept"]))
    ours, twin, other = (load_flux(str(files["kept"]), "16bit"), flux_models.load_dense(files["kept"]),
                         flux_models.load_dense(files["plain"]))  # fmt: skip
    for pairs in (((other, ours), (other, twin)), ((ours, other), (twin, other))):
        found, expected = (
            flux_models.forward(ModelMergeSimple().merge(first, second, ratio=0.3)[0], arguments)
            for first, second in pairs
        )
        assert flux_models.relative(found, expected) < 1e-2


@pytest.mark.parametrize("to", ["comfy-svdquant", "comfy", "nunchaku"])
def test_converting(to: str, files: dict[str, Path], tmp_path: Path) -> None:
    checkpoint, out = open_checkpoint(files["kept"]), tmp_path / "made.safetensors"
    lora = make_lora(files["kept"], (KEPT[0], "double_blocks.0.img_mlp.0"))
    save_file(lora, tmp_path / "lora.safetensors")
    loras = [Lora(str(tmp_path / "lora.safetensors"), 1.0)] if to == "nunchaku" else []
    result = convert(files["kept"], out, to, loras)
    tensors = read_all(out)[0]
    weights = {name: effective(checkpoint.layer(name), torch.float32) for name in KEPT}
    if to == "comfy":
        assert result.dense == ()
        for name in KEPT:
            assert json.loads(bytes(tensors[f"{name}.comfy_quant"]))["format"] == "int8_tensorwise"
        return
    dense = KEPT if to == "comfy-svdquant" else KEPT[:1]
    assert tuple(result.dense) == dense
    for name in dense:
        weight = weights[name][0]
        if loras:
            down, up = (lora[f"diffusion_model.{name}.lora_{side}.weight"] for side in ("down", "up"))
            weight = weight + up @ down
        assert flux_models.relative(tensors[f"{name}.weight"], weight) < 3e-3
        assert torch.equal(tensors[f"{name}.bias"], checkpoint.layer(name).bias)
    again = open_checkpoint(out)
    assert again.int8_linears == tuple(name for name in KEPT if name not in dense)
    kept = read_all(files["kept"])[0]
    for name in again.int8_linears:
        assert all(torch.equal(tensors[f"{name}.{leaf}"], kept[f"{name}.{leaf}"]) for leaf in LEAVES)
    if to == "comfy-svdquant":
        convert(out, tmp_path / "back.safetensors", "nunchaku")
        assert set(open_checkpoint(tmp_path / "back.safetensors").plain_linears) == {*KEPT, PLAIN}


@pytest.mark.comfy
@pytest.mark.usefixtures("comfy")
def test_a_saved_model_is_converted_back(files: dict[str, Path], tmp_path: Path) -> None:
    from svdq.model import load_flux

    convert(save(load_flux(str(files["kept"]), "16bit"), tmp_path), tmp_path / "again.safetensors", "nunchaku")
    again, kept = read_all(tmp_path / "again.safetensors")[0], read_all(files["kept"])[0]
    assert again.keys() == kept.keys() and all(torch.equal(again[key], kept[key]) for key in kept)


@pytest.mark.comfy
def test_calibrated_with_gptq(model: Any, folder: Path) -> None:  # noqa: F811
    out = quantize(model, gptq=True, keep_int8="  ".join(PATTERNS))
    assert open_checkpoint(out).int8_linears == KEPT
    other = quantize(model, gptq=True, filename="other")
    kept, plain = read_all(out)[0], read_all(other)[0]
    assert all(torch.equal(kept[key], plain[key]) for key in kept if key in plain)
    report = json.loads(report_path(out).read_text())
    summary = report["summary"]
    assert summary["w8a8"]["calibration_sqnr_db"]["mean"] > summary["w4a4"]["calibration_sqnr_db"]["mean"] + 8
    found = {fact["layer"]: fact for fact in report["layers"] if fact["kind"] == "w8a8"}
    assert all("smooth_alpha" in fact for fact in found.values())
    in_four_bits = {fact["layer"]: fact for fact in json.loads(report_path(other).read_text())["layers"]}
    assert found[KEPT[0]]["calibration_sqnr_db"] > in_four_bits[KEPT[0]]["calibration_sqnr_db"] + 8


@pytest.mark.parametrize(
    ("keep_int8", "keep_16bit", "match"),
    [
        (("*.txt_mod.lin", "double_blocks.7.*"), (), "in int8: found double_blocks.7.*, expected ComfyUI's name"),
        (("*.query_norm",), (), "layers to keep in int8: found *.query_norm, expected ComfyUI's name of a linear"),
        (("*",), (), "expected at least one of double_blocks to quantize"),
        (("single_blocks.*.linear1",), ("*.linear2",), "expected at least one of single_blocks to quantize"),
        (("*.img_mlp.?",), ("*_attn.*", "*_mlp.2"),
         "found double_blocks.0.img_mlp.2, which *_mlp.2 (16 bits) and *.img_mlp.? (int8) fit, expected every layer"),
    ],
)  # fmt: skip
def test_patterns_that_cannot_be(
    keep_int8: tuple[str, ...], keep_16bit: tuple[str, ...], match: str, files: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError) as error:
        quantize_file(files["source"], tmp_path / "out.safetensors", 16, device="cpu",
                      keep_16bit=keep_16bit, keep_int8=keep_int8)  # fmt: skip
    assert match in str(error.value) and str(tmp_path / "out.safetensors") in str(error.value)
    assert list(tmp_path.iterdir()) == []


def change(leaf: str, tensor: torch.Tensor | None, name: str = KEPT[0]) -> Callable[[Tensors, Metadata], None]:
    def apply(tensors: Tensors, metadata: Metadata) -> None:
        tensors.pop(f"{name}.{leaf}")
        if tensor is not None:
            tensors[f"{name}.{leaf}"] = tensor

    return apply


def both(tensors: Tensors, metadata: Metadata) -> None:
    name = "double_blocks.0.img_mlp.0"
    tensors |= {
        f"{name}.weight": torch.zeros(512, 128, dtype=torch.int8),
        f"{name}.weight_scale": torch.ones(512),
        f"{name}.weight_smooth": torch.ones(128).bfloat16(),
        f"{name}.bias": torch.zeros(512).bfloat16(),
    }


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (change("weight", torch.zeros(128, 512).bfloat16()), f"{KEPT[0]}.weight: found dtype BF16, expected I8"),
        (change("weight", torch.zeros(128, 256).char()), "weight: found shape [128, 256], expected [128, 512]"),
        (change("weight_scale", None), f"{KEPT[0]}.weight_scale: found 1 of"),
        (change("weight_scale", torch.ones(128).bfloat16()), "weight_scale: found dtype BF16, expected F32"),
        (change("weight_scale", torch.ones(1)), f"{KEPT[0]}.weight_scale: found shape [1], expected [128]"),
        (change("weight_smooth", None), f"{KEPT[0]}.weight_smooth: found 1 of"),
        (change("weight_smooth", torch.ones(128).bfloat16()), "weight_smooth: found shape [128], expected [512]"),
        (change("weight_smooth", torch.ones(512)), "weight_smooth: found dtype F32, expected BF16 or F16"),
        (change("bias", None, KEPT[1]), f"{KEPT[1]}.bias: found 1 of"),
        (both, "transformer_blocks.0.mlp_fc1"),
    ],
)
def test_broken_files(change: Callable, match: str, files: dict[str, Path]) -> None:
    path = changed(files["kept"], change)
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(path)
    assert match in str(error.value)
