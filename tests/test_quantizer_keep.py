"""Linears that the quantizer leaves in 16 bits: the file, loading, computing, saving and converting it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import flux_models
import pytest
import torch
from files import Metadata, Tensors, changed, read_all
from quantizer_models import save_source
from test_compatibility_saving import save
from test_quantizer_calibrated import folder, model, quantize  # noqa: F401  the fixtures of a MODEL and its output

from svdq.cli.convert import convert
from svdq.cli.inspect import inspect
from svdq.cli.quantize import quantize as quantize_file
from svdq.loaders import CheckpointError, PlainLayer, open_checkpoint

KEPT = ("double_blocks.0.img_mlp.2", "double_blocks.0.txt_mod.lin", "single_blocks.0.linear2")
PATTERNS = ("double_blocks.*.img_mlp.2", "*.txt_mod.lin", "single_blocks.?.linear2")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("files")
    paths = {name: place / f"{name}.safetensors" for name in ("source", "kept", "plain")}
    save_source(paths["source"])
    for name, patterns in (("kept", PATTERNS), ("plain", ())):
        quantize_file(paths["source"], paths[name], 16, device="cpu", iterations=1, keep_16bit=patterns)
    return paths


def test_the_file(files: dict[str, Path]) -> None:
    source, kept, plain = (read_all(files[name])[0] for name in ("source", "kept", "plain"))
    checkpoint = open_checkpoint(files["kept"])
    assert checkpoint.plain_linears == KEPT and open_checkpoint(files["plain"]).plain_linears == ()
    assert checkpoint.layer_names == open_checkpoint(files["plain"]).layer_names
    for name in KEPT:
        layer = checkpoint.layer(name)
        assert isinstance(layer, PlainLayer)
        for leaf in ("weight", "bias"):
            assert torch.equal(getattr(layer, leaf), source[f"{name}.{leaf}"])
            assert torch.equal(kept.pop(f"{name}.{leaf}"), source[f"{name}.{leaf}"])
    gone = {key for key in plain if key not in kept}
    stored = ("transformer_blocks.0.mlp_fc2", "transformer_blocks.0.norm1_context.linear",
              "single_transformer_blocks.0.out_proj", "single_transformer_blocks.0.mlp_fc2")  # fmt: skip
    assert {key.rpartition(".")[0] for key in gone} == set(stored)
    assert kept.keys() <= plain.keys() and all(torch.equal(kept[key], plain[key]) for key in kept)
    counts = inspect(files["kept"])[0]["layers"], inspect(files["plain"])[0]["layers"]
    assert counts[0]["plain"] == counts[1]["plain"] + 3 and counts[0]["w4a4"] == counts[1]["w4a4"] - 2


@pytest.mark.comfy
@pytest.mark.usefixtures("comfy")
def test_it_computes_and_is_saved(files: dict[str, Path], tmp_path: Path) -> None:
    from svdq.model import load_flux

    def run(path: Path) -> torch.Tensor:
        patcher = load_flux(str(path), "16bit")
        return flux_models.forward(patcher, flux_models.inputs(open_checkpoint(files["kept"])))

    out = run(files["kept"])
    dense = flux_models.forward(
        flux_models.load_dense(files["kept"]), flux_models.inputs(open_checkpoint(files["kept"]))
    )
    assert flux_models.relative(out, dense) < 1e-2 < flux_models.relative(run(files["plain"]), dense)
    saved = save(load_flux(str(files["kept"]), "16bit"), tmp_path)
    assert open_checkpoint(saved).plain_linears == KEPT
    assert torch.equal(run(saved), out)


@pytest.mark.comfy
@pytest.mark.usefixtures("comfy")
def test_a_lora_on_a_kept_layer(files: dict[str, Path]) -> None:
    """As on any 16-bit layer."""
    import comfy.sd

    from svdq.model import load_flux

    generator = torch.Generator().manual_seed(0)
    hidden = open_checkpoint(files["kept"]).config.hidden_size
    lora = {
        f"diffusion_model.{name}.lora_{side}.weight": torch.randn(*shape, generator=generator) * 0.1
        for name in (KEPT[0], "double_blocks.0.img_mlp.0")
        for side, shape in (
            ("down", (4, hidden if name.endswith("0") else 4 * hidden)),
            ("up", (4 * hidden if name.endswith("0") else hidden, 4)),
        )
    }
    arguments = flux_models.inputs(open_checkpoint(files["kept"]))
    ours, dense = load_flux(str(files["kept"]), "16bit"), flux_models.load_dense(files["kept"])
    plain = flux_models.forward(dense, arguments)
    found, expected = (
        flux_models.forward(comfy.sd.load_lora_for_models(one, None, lora, 1.0, 0)[0], arguments)
        for one in (ours, dense)
    )
    assert flux_models.relative(found, expected) < 1e-2 < flux_models.relative(plain, expected)


@pytest.mark.parametrize("to", ["comfy-svdquant", "comfy"])
def test_converting(to: str, files: dict[str, Path], tmp_path: Path) -> None:
    source = read_all(files["source"])[0]
    convert(files["kept"], tmp_path / "made.safetensors", to)
    tensors = read_all(tmp_path / "made.safetensors")[0]
    for name in KEPT:
        key = next(key for key in tensors if key.endswith(f"{name}.weight"))
        assert torch.equal(tensors[key], source[f"{name}.weight"])
    if to == "comfy-svdquant":
        convert(tmp_path / "made.safetensors", tmp_path / "again.safetensors", "nunchaku")
        again, kept = read_all(tmp_path / "again.safetensors")[0], read_all(files["kept"])[0]
        assert again.keys() == kept.keys() and open_checkpoint(tmp_path / "again.safetensors").plain_linears == KEPT
        # Zero points have another form there (docs/convert.md).
        assert all(torch.equal(again[key], kept[key]) for key in kept if not key.endswith(".wzeros"))


def test_calibrated_with_gptq(model: Any, folder: Path) -> None:  # noqa: F811
    out = quantize(model, gptq=True, keep_16bit="  ".join(PATTERNS))
    assert open_checkpoint(out).plain_linears == KEPT
    other = quantize(model, gptq=True, filename="other")
    kept, plain = read_all(out)[0], read_all(other)[0]
    assert all(torch.equal(kept[key], plain[key]) for key in kept if key in plain)


@pytest.mark.parametrize(
    ("patterns", "match"),
    [
        (("*.txt_mod.lin", "double_blocks.7.*"), "to keep in 16 bits: found double_blocks.7.*, expected ComfyUI's"),
        (("*.query_norm",), "found *.query_norm, expected ComfyUI's name of a linear"),
        (("*",), "expected at least one of double_blocks to quantize"),
        (("single_blocks.*",), "expected at least one of single_blocks to quantize"),
    ],
)
def test_patterns_that_cannot_be(patterns: tuple[str, ...], match: str, files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        quantize_file(files["source"], tmp_path / "out.safetensors", 16, device="cpu", keep_16bit=patterns)
    assert match in str(error.value) and str(tmp_path / "out.safetensors") in str(error.value)
    assert list(tmp_path.iterdir()) == []


def both(tensors: Tensors, metadata: Metadata) -> None:
    tensors["double_blocks.0.img_mlp.0.weight"] = torch.zeros(512, 128, dtype=torch.bfloat16)
    tensors["double_blocks.0.img_mlp.0.bias"] = torch.zeros(512, dtype=torch.bfloat16)


def no_bias(tensors: Tensors, metadata: Metadata) -> None:
    del tensors[f"{KEPT[0]}.bias"]


def other_shape(tensors: Tensors, metadata: Metadata) -> None:
    tensors[f"{KEPT[0]}.weight"] = torch.zeros(128, 128, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (both, "transformer_blocks.0.mlp_fc1"),
        (no_bias, f"{KEPT[0]}.bias: found 1 of"),
        (other_shape, f"{KEPT[0]}.weight: found shape [128, 128], expected [128, 512]"),
    ],
)
def test_broken_files(change: Callable, match: str, files: dict[str, Path]) -> None:
    path = changed(files["kept"], change)
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(path)
    assert match in str(error.value)
