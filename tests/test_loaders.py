"""Checkpoints that can be read: golden file, every variant, both containers, both namings; lazily and exactly."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checks import assert_close, assert_same, golden_path, load_golden
from conftest import ROOT
from files import changed, read_all, save_as_comfyui, second_name, tiny, write_raw
from torch import Tensor

from svdq.cli.dequantize import effective
from svdq.cli.synth import VARIANTS, flux_config, synth
from svdq.kernels import layout
from svdq.loaders import AWQLinear, Checkpoint, PlainLayer, W4A4Linear, open_checkpoint
from svdq.loaders.safetensors_file import mapped_reader, read_header


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("dev"))


def _tensors(layer: W4A4Linear | AWQLinear | PlainLayer) -> list[Tensor]:
    """Everything a layer holds, in a fixed order."""
    weights = layer.parts if isinstance(layer, W4A4Linear) else [layer.weight]
    found = []
    for weight in weights:
        fields = [weight] if isinstance(weight, Tensor) else vars(weight).values()
        found += [value for value in fields if isinstance(value, Tensor)]
    return found if layer.bias is None else [*found, layer.bias]


def _assert_same_layers(one: Checkpoint, other: Checkpoint) -> None:
    assert one.layer_names == other.layer_names
    for name in one.layer_names:
        for a, b in zip(_tensors(one.layer(name)), _tensors(other.layer(name)), strict=True):
            assert_same(a, b, name)


# ---- golden file


def test_golden_checkpoint_facts() -> None:
    checkpoint = open_checkpoint(golden_path("svdq-int4_r16-tinyflux.safetensors"))
    assert dataclasses.astuple(checkpoint.config) == (128, 1, 1, 64, 64, 64, 32, True)
    assert (checkpoint.format, checkpoint.variant, checkpoint.precision) == ("nunchaku", "dev", "int4")
    assert checkpoint.ranks == {16: 12} and checkpoint.dtype == torch.bfloat16 and checkpoint.notes == ()


def test_golden_checkpoint_is_what_the_original_encoded() -> None:
    checkpoint = open_checkpoint(golden_path("svdq-int4_r16-tinyflux.safetensors"))
    expected = load_golden("tinyflux_expected_comfy.safetensors")
    shapes = json.loads(read_all(golden_path("tinyflux_expected_comfy.safetensors"))[1]["comfy_keys"])
    got: dict[str, Tensor] = {}
    for name, layer in checkpoint.layers():
        got[f"{name}.weight"], bias = effective(layer, torch.float32)
        if bias is not None:
            got[f"{name}.bias"] = bias
    assert {name: list(tensor.shape) for name, tensor in got.items()} == shapes

    for key, value in expected.items():
        kind, _, name = key.partition(".")
        tensor = got.get(name)
        if kind == "full":
            # Exact for what is stored as it is; float16 is how the golden file keeps dense weights.
            rms = {torch.float16: 3e-4, torch.float32: 1e-6, torch.bfloat16: 1e-12}[value.dtype]
            assert_close(tensor, value, rms=rms, peak=None, what=key)
        elif kind == "sample_val":
            index = expected[f"sample_idx.{name}"].long()
            assert (tensor.reshape(-1)[index] - value).abs().max() <= 1e-6 * value.abs().max(), key
        elif kind == "probe_y":
            exact = tensor.double() @ expected[f"probe_x.{name}"].double()
            assert_close(exact, value, rms=2e-6, peak=None, what=key)


# ---- saved by ComfyUI


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_saved_model_has_the_same_layers(variant: str, tmp_path: Path) -> None:
    path = tiny(tmp_path, variant=variant)
    checkpoint, saved = open_checkpoint(path), open_checkpoint(save_as_comfyui(path, tmp_path / f"{variant}_00001_.st"))
    _assert_same_layers(checkpoint, saved)
    assert (saved.format, saved.variant, saved.notes) == ("comfyui", variant, ())
    same = ("config", "ranks", "dtype", "precision")
    assert [getattr(saved, fact) for fact in same] == [getattr(checkpoint, fact) for fact in same]


@pytest.mark.parametrize("rank", [0, 48])
@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", ""])
def test_a_saved_model_under_other_prefixes(prefix: str, rank: int, tmp_path: Path) -> None:
    path = tiny(tmp_path, rank=rank, dtype="fp16")
    saved = open_checkpoint(save_as_comfyui(path, tmp_path / "saved.safetensors", prefix))
    _assert_same_layers(open_checkpoint(path), saved)
    assert saved.ranks == {rank: 24} and saved.dtype == torch.float16


def test_a_saved_checkpoint_with_other_models(dev: Path, tmp_path: Path) -> None:
    def add(tensors: dict[str, Tensor], _: dict[str, str]) -> None:
        tensors |= {"vae.decoder.conv_in.weight": torch.zeros(4), "text_encoders.clip_l.logit_scale": torch.zeros(1)}

    saved = open_checkpoint(changed(save_as_comfyui(dev, tmp_path / "saved.safetensors"), add))
    _assert_same_layers(open_checkpoint(dev), saved)
    assert len(saved.notes) == 1 and "2 tensors of other models" in saved.notes[0]


def test_a_saved_lora_beside_a_weight(dev: Path, tmp_path: Path) -> None:
    down, up = torch.randn(3, 256), torch.randn(1536, 3)

    def add(tensors: dict[str, Tensor], _: dict[str, str]) -> None:
        layer = "model.diffusion_model.double_blocks.0.img_mod.lin"
        tensors |= {f"{layer}.lora_down": down, f"{layer}.lora_up": up}

    layer = open_checkpoint(changed(save_as_comfyui(dev, tmp_path / "saved.safetensors"), add)).layer(
        "double_blocks.0.img_mod.lin"
    )
    assert_same(layer.lora[0], down)
    assert_same(layer.lora[1], up)
    plain = effective(dataclasses.replace(layer, lora=None), torch.float32)[0]
    torch.testing.assert_close(effective(layer, torch.float32)[0], plain + up @ down)


# ---- every variant


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny(tmp_path, variant=variant))
    assert checkpoint.config == flux_config(variant, "tiny")
    assert checkpoint.variant == variant
    assert checkpoint.notes == ()
    guidance = [name for name in checkpoint.layer_names if name.startswith("guidance_in.")]
    assert bool(guidance) == (variant != "schnell")
    assert checkpoint.layer("img_in").shape == (256, {"fill": 384, "canny": 128, "depth": 128}.get(variant, 64))
    shapes = {name: layer.shape for name, layer in checkpoint.layers()}
    assert shapes["single_blocks.1.linear1"] == (7 * 256, 256)
    assert shapes["single_blocks.1.linear2"] == (256, 5 * 256)
    assert shapes["double_blocks.1.txt_mod.lin"] == (6 * 256, 256)


@pytest.mark.parametrize("rank", [0, 16, 32, 64, 128])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_ranks_and_types(rank: int, dtype: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny(tmp_path, rank=rank, dtype=dtype))
    assert checkpoint.ranks == {rank: 24} and checkpoint.rank == rank
    assert checkpoint.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    layer = checkpoint.layer("single_blocks.0.linear2")
    assert isinstance(layer, W4A4Linear) and layer.axis == 1
    assert [part.rank for part in layer.parts] == [rank, rank]
    assert [part.act_unsigned for part in layer.parts] == [False, True]
    assert [part.wscales.dtype for part in layer.parts] == [checkpoint.dtype] * 2
    for weight, _ in (effective(layer, torch.float32) for _, layer in checkpoint.layers()):
        assert weight.isfinite().all()


def test_ranks_may_differ_between_layers(dev: Path) -> None:
    def widen(tensors: dict[str, Tensor], _: dict[str, str]) -> None:
        for leaf, size in (("lora_down", 256), ("lora_up", 768)):
            tensors[f"transformer_blocks.0.qkv_proj.{leaf}"] = torch.zeros(size, 48, dtype=torch.bfloat16)

    assert open_checkpoint(changed(dev, widen)).ranks == {32: 23, 48: 1}


def test_second_naming(dev: Path) -> None:
    def rename(tensors: dict[str, Tensor], _: dict[str, str]) -> None:
        for key in list(tensors):
            tensors[second_name(key)] = tensors.pop(key)

    renamed = changed(dev, rename, "v2.safetensors")
    names = read_all(renamed)[0]
    assert "transformer_blocks.0.ff_context.net.0.proj.smooth_factor" in names
    assert "single_transformer_blocks.1.attn.to_out.proj_up" in names
    _assert_same_layers(open_checkpoint(dev), open_checkpoint(renamed))


def test_padded_and_exact_modulation_scale_rows(dev: Path) -> None:
    rows = read_all(dev)[0]["single_transformer_blocks.0.norm.linear.wscales"].shape[0]
    assert rows == 16, "the original converter pads 256 / 64 = 4 rows to 16, and so does synth"

    def trim(tensors: dict[str, Tensor], _: dict[str, str]) -> None:
        for key in tensors:
            if ".norm" in key and key.endswith((".wscales", ".wzeros")):
                tensors[key] = tensors[key][:4]

    padded, trimmed = open_checkpoint(dev), open_checkpoint(changed(dev, trim, "trimmed.safetensors"))
    for name, layer in padded.layers():
        assert_same(effective(layer, torch.float32)[0], effective(trimmed.layer(name), torch.float32)[0], name)


def test_plain_layers_may_be_float32(dev: Path) -> None:
    def widen(tensors: dict[str, Tensor], _: dict[str, str]) -> None:
        tensors["x_embedder.weight"] = tensors["x_embedder.weight"].float()

    assert open_checkpoint(changed(dev, widen, "f32.safetensors")).layer("img_in").weight.dtype == torch.float32


def test_legacy_folder(dev: Path, tmp_path: Path) -> None:
    folder = tmp_path / "svdq-int4-flux.1-dev"
    synth(folder, container="folder")
    names = ["comfy_config.json", "config.json", "transformer_blocks.safetensors", "unquantized_layers.safetensors"]
    assert sorted(os.listdir(folder)) == names
    checkpoint = open_checkpoint(folder)
    assert checkpoint.format == "nunchaku-legacy-folder" and len(checkpoint.files) == 2
    assert checkpoint.file_bytes == sum(os.path.getsize(folder / name) for name in names if name.endswith("tensors"))
    _assert_same_layers(open_checkpoint(dev), checkpoint)
    for name in ("config.json", "comfy_config.json"):
        (folder / name).unlink()
    without = open_checkpoint(folder)
    assert without.config == checkpoint.config and len(without.notes) == 1
    _assert_same_layers(checkpoint, without)


def test_file_without_metadata(dev: Path) -> None:
    checkpoint = open_checkpoint(changed(dev, lambda _, metadata: metadata.clear(), "bare.safetensors"))
    assert checkpoint.config == flux_config("dev", "tiny")
    assert len(checkpoint.notes) == 1 and "metadata" in checkpoint.notes[0]


def test_metadata_that_tensors_contradict_is_noted(dev: Path) -> None:
    def lie(_: dict[str, Tensor], metadata: dict[str, str]) -> None:
        metadata["config"] = json.dumps(json.loads(metadata["config"]) | {"in_channels": 384})

    checkpoint = open_checkpoint(changed(dev, lie, "lie.safetensors"))
    assert checkpoint.config.in_channels == 64 and checkpoint.variant == "dev"
    assert any("384" in note for note in checkpoint.notes)


# ---- what a layer means


def test_modulation_bias_is_in_stock_order_without_the_one(dev: Path) -> None:
    stored = read_all(dev)[0]["transformer_blocks.0.norm1.linear.bias"].float().reshape(256, 6)
    layer = open_checkpoint(dev).layer("double_blocks.0.img_mod.lin")
    assert isinstance(layer, AWQLinear) and layer.weight.splits == 6
    chunks = layer.bias.reshape(6, 256)
    for i in range(6):
        assert torch.equal(chunks[i], stored[:, i] - (1 if i in (1, 4) else 0))


def test_final_modulation_has_its_halves_swapped(dev: Path) -> None:
    tensors, layer = read_all(dev)[0], open_checkpoint(dev).layer("final_layer.adaLN_modulation.1")
    for leaf in ("weight", "bias"):
        stored = tensors[f"norm_out.linear.{leaf}"]
        assert_same(getattr(layer, leaf), torch.cat((stored[256:], stored[:256])), leaf)


def test_biases_of_single_blocks(dev: Path) -> None:
    def fill(tensors: dict[str, Tensor], _: dict[str, str]) -> None:
        tensors["single_transformer_blocks.0.out_proj.bias"] = torch.full((256,), 0.25, dtype=torch.bfloat16)
        tensors["single_transformer_blocks.0.mlp_fc2.bias"] = torch.arange(256, dtype=torch.bfloat16)

    checkpoint = open_checkpoint(changed(dev, fill, "biases.safetensors"))
    bias = checkpoint.layer("single_blocks.0.linear2").bias
    assert torch.equal(bias.float(), layout.unpack_vector(torch.arange(256.0)) + 0.25), "both are added, unrounded"
    tensors, first = read_all(dev)[0], open_checkpoint(dev).layer("single_blocks.0.linear1").bias
    stored = [tensors[f"single_transformer_blocks.0.{name}.bias"] for name in ("qkv_proj", "mlp_fc1")]
    assert_same(first, torch.cat([layout.unpack_vector(bias) for bias in stored]))


# ---- laziness


def test_only_the_layer_that_is_asked_for_is_read(dev: Path, tmp_path: Path) -> None:
    asked: list[str] = []

    def reader(path: str):
        get = mapped_reader(path)
        return lambda name: asked.append(name) or get(name)

    checkpoint = open_checkpoint(dev, reader)
    assert asked == []
    checkpoint.layer("double_blocks.1.img_attn.proj")
    assert asked and all(name.startswith("transformer_blocks.1.out_proj.") for name in asked)
    asked.clear()
    saved = open_checkpoint(save_as_comfyui(dev, tmp_path / "saved.safetensors"), reader)
    assert asked == []
    saved.layer("double_blocks.1.img_attn.proj")
    assert asked and all(name.startswith("model.diffusion_model.double_blocks.1.img_attn.proj.") for name in asked)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads memory figures from /proc")
def test_memory_while_iterating(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading every byte of a 120 MB file leaves no more than about one layer in private memory."""
    config = dataclasses.replace(flux_config("dev", "full"), hidden_size=1024, depth=2, depth_single_blocks=5)
    monkeypatch.setattr("svdq.cli.synth.flux_config", lambda variant, scale: config)
    path = tmp_path / "large.safetensors"
    synth(path)
    script = """
import sys, types
package = types.ModuleType("svdq"); package.__path__ = [sys.argv[1]]; sys.modules["svdq"] = package
import torch
from svdq.loaders import open_checkpoint, W4A4Linear

def kilobytes(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key))

def visit(checkpoint):
    size, touched = 0, 0
    for name, layer in checkpoint.layers():
        weights = layer.parts if isinstance(layer, W4A4Linear) else (layer.weight,)
        tensors = [t for w in weights for t in ((w,) if torch.is_tensor(w) else vars(w).values()) if torch.is_tensor(t)]
        size = max(size, sum(t.nbytes for t in tensors))
        touched += sum(int(t.view(torch.uint8).max()) for t in tensors if t.numel())
    return size // 1024

visit(open_checkpoint(sys.argv[2]))  # what torch itself allocates on first use
before = kilobytes("RssAnon")
checkpoint = open_checkpoint(sys.argv[2])
opened = kilobytes("RssAnon")
layer = visit(checkpoint)
print(opened - before, kilobytes("RssAnon") - before, layer, checkpoint.file_bytes // 1024)
"""
    command = [sys.executable, "-c", script, str(ROOT), str(path)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    opened, grown, layer, file_size = map(int, output.split())
    assert file_size > 100_000
    assert opened < 8_000 and grown < layer + 8_000, f"{opened}, {grown} KB more after reading layers of {layer} KB"


@pytest.mark.parametrize("size", [0x0280, 0x0480, 0x0480 + (3 << 16)])
def test_size_of_a_header_that_looks_like_a_pickle(size: int, tmp_path: Path) -> None:
    """Its first two bytes are those of a pickle"""
    text = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    path = write_raw(tmp_path / "x.safetensors", text + b" " * (size - len(text)), bytes(4))
    assert path.read_bytes()[:1] == b"\x80" and list(read_header(str(path)).tensors) == ["a"]
