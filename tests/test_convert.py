"""``convert``: from one format to another and back, what ComfyUI makes of the result, and what cannot be converted."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from checks import assert_same, golden_path, relative_error
from files import Metadata, Tensors, changed, read_all, save_as_comfyui, second_name, tiny, write_raw
from flux_models import forward, inputs, relative
from safetensors.torch import save_file

from svdq import cli
from svdq.cli.convert import FORMATS, Lora, convert, lora
from svdq.cli.dequantize import effective
from svdq.cli.inspect import inspect
from svdq.cli.synth import synth
from svdq.kernels import reference
from svdq.loaders import AWQLinear, CheckpointError, PlainLayer, open_checkpoint

QKV, LINEAR1, FC2 = "double_blocks.0.img_attn.qkv", "single_blocks.0.linear1", "double_blocks.0.img_mlp.2"


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("dev"))


@pytest.fixture(scope="module")
def written(dev: Path) -> dict[str, Path]:
    """``dev`` in the formats of ComfyUI."""
    paths = {to: dev.with_name(f"{to}.safetensors") for to in FORMATS if to != "nunchaku"}
    for to, path in paths.items():
        convert(dev, path, to)
    return paths


def assert_same_tensors(got: Path, expected: Path) -> None:
    got_tensors, expected_tensors = read_all(got)[0], read_all(expected)[0]
    assert got_tensors.keys() == expected_tensors.keys()
    for name, tensor in expected_tensors.items():
        assert_same(got_tensors[name], tensor, name)


# ---- nunchaku


@pytest.mark.parametrize("variant", ["dev", "schnell", "fill"])
def test_a_legacy_folder_becomes_the_file_that_was_published(variant: str, tmp_path: Path) -> None:
    """The same bytes: names, order, metadata."""
    for container in ("folder", "single"):
        synth(tmp_path / container, variant=variant, container=container)
    result = convert(tmp_path / "folder", tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "single").read_bytes()
    assert (result.to, result.dense, result.left_out) == ("nunchaku", (), 0)


def test_as_the_original_tool_merges(tmp_path: Path) -> None:
    """A folder from the golden file gives the golden file; config.json is kept as it is, and may be missing."""
    golden = golden_path("svdq-int4_r16-tinyflux.safetensors")
    tensors, metadata = read_all(golden)
    blocks = {name: tensor for name, tensor in tensors.items() if "transformer_blocks." in name}
    save_file(blocks, tmp_path / "transformer_blocks.safetensors")
    outer = {name: tensor for name, tensor in tensors.items() if name not in blocks}
    save_file(outer, tmp_path / "unquantized_layers.safetensors")
    for name in ("config", "comfy_config"):
        (tmp_path / f"{name}.json").write_text(metadata[name], encoding="utf-8")
    out = tmp_path / "out.safetensors"
    convert(tmp_path, out)
    assert_same_tensors(out, golden)
    assert read_all(out)[1] == metadata
    for name in ("config", "comfy_config"):
        (tmp_path / f"{name}.json").unlink()
    convert(tmp_path, out, force=True)
    made = read_all(out)[1]
    assert made.keys() == metadata.keys()
    for name in ("comfy_config", "quantization_config"):
        assert json.loads(made[name]) == json.loads(metadata[name])
    assert json.loads(made["config"]) == json.loads(metadata["config"]) | {"_name_or_path": tmp_path.name}


def test_a_saved_model_becomes_the_file_that_it_came_from(dev: Path, tmp_path: Path) -> None:
    saved = save_as_comfyui(dev, tmp_path / "saved.safetensors")
    convert(saved, tmp_path / "out.safetensors", "nunchaku")
    assert_same_tensors(tmp_path / "out.safetensors", dev)
    metadata = read_all(tmp_path / "out.safetensors")[1]
    assert metadata["svdq.source"] == "saved.safetensors"
    assert json.loads(metadata["quantization_config"]) == json.loads(read_all(dev)[1]["quantization_config"])


def test_names_of_the_second_kind_become_those_of_the_first(dev: Path, tmp_path: Path) -> None:
    tensors, metadata = read_all(dev)
    path = tmp_path / "second.safetensors"
    save_file({second_name(key): tensor for key, tensor in tensors.items()}, path, metadata)
    adapter = tmp_path / "lora.safetensors"
    save_file({f"{QKV}.lora_A.weight": torch.zeros(4, 256), f"{QKV}.lora_B.weight": torch.zeros(768, 4)}, adapter)
    convert(path, tmp_path / "out.safetensors", loras=[Lora(str(adapter), 1.0)])
    assert_same_tensors(tmp_path / "out.safetensors", dev)


# ---- comfy


def test_int8_layers_are_those_of_the_dense_model(dev: Path, written: dict[str, Path]) -> None:
    """Rotated back in float64, they are within the rounding to 8 bits."""
    tensors = read_all(written["comfy"])[0]
    four = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], dtype=torch.float64) / 2
    rotation = torch.kron(torch.kron(four, four), torch.kron(four, four))
    for name, layer in open_checkpoint(dev).layers():
        weight, bias = effective(layer, torch.float32)
        if isinstance(layer, PlainLayer):
            assert_same(tensors[f"{name}.weight"], layer.weight, name)
            continue
        described = json.loads(bytes(tensors[f"{name}.comfy_quant"].tolist()))
        assert described == {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256}
        q, scale = tensors[f"{name}.weight"].double(), tensors[f"{name}.weight_scale"].double()
        back = ((q * scale).reshape(len(q), -1, 256) @ rotation).reshape(weight.shape)
        assert relative_error(back, weight) < 0.015, f"{name}; measured: 0.007 to 0.011"
        assert torch.equal(q.abs().amax(dim=1), 127.0 * weight.any(dim=1)), name
        assert_same(tensors[f"{name}.bias"], bias.to(torch.bfloat16), name)


@pytest.mark.comfy
@pytest.mark.parametrize("variant", ["dev", "schnell"])
def test_comfyui_itself_loads_int8(
    variant: str, comfy: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As the node Load Diffusion Model does; its output is near that of our 16-bit arithmetic, nearer than W4A4 is"""
    import comfy.sd

    from svdq.model import load_flux

    path, out = tiny(tmp_path, variant=variant), tmp_path / "int8.safetensors"
    convert(path, out, "comfy")
    with caplog.at_level("INFO"):
        theirs = comfy.sd.load_diffusion_model(str(out))
    assert [r.message for r in caplog.records if "missing" in r.message or "left over" in r.message] == []
    assert theirs.model.diffusion_model.double_blocks[0].img_attn.qkv.quant_format == "int8_tensorwise"
    arguments = inputs(open_checkpoint(path))
    expected = forward(load_flux(str(path), "16bit"), arguments)
    error = relative(forward(theirs, arguments), expected)
    assert error < 0.04, f"measured: 0.023 and 0.022; now {error}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SVDQ_BACKEND", "int4-reference")
        assert relative(forward(load_flux(str(path)), arguments), expected) > 4 * error


# ---- comfy-svdquant


def test_there_and_back_is_the_same_file(dev: Path, written: dict[str, Path], tmp_path: Path) -> None:
    convert(written["comfy-svdquant"], tmp_path / "out.safetensors", "nunchaku")
    got, expected = read_all(tmp_path / "out.safetensors")[0], read_all(dev)[0]
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        if name.endswith((".linear.wscales", ".linear.wzeros")):  # without padding, and a zero may lose its sign
            assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor[: 256 // 64]), name
        else:
            assert_same(got[name], tensor, name)


@pytest.mark.parametrize(
    "model, name", [("dev", "krea"), ("dev", "kontext"), ("canny", "depth"), ("canny", "canny"), ("schnell", "krea")]
)
def test_the_variant_survives_other_names(model: str, name: str, tmp_path: Path) -> None:
    """of files, where nothing else tells"""
    path = tiny(tmp_path, variant=model)
    path = changed(path, lambda _, metadata: metadata.pop("config"), f"flux1-{name}-mine.safetensors")
    expected = open_checkpoint(path).variant
    assert expected == (name if model != "schnell" else "schnell")
    convert(path, tmp_path / "a.safetensors", "comfy-svdquant")
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "nunchaku")
    assert [open_checkpoint(tmp_path / f"{letter}.safetensors").variant for letter in "ab"] == [expected] * 2
    for other in ("canny or depth", "kontext", "pro"):
        odd = changed(tmp_path / "b.safetensors", lambda _, metadata, other=other: (
            metadata.pop("config"), metadata.update({"svdq.variant": other})))  # fmt: skip
        plain = {"dev": "dev", "canny": "canny or depth", "schnell": "schnell"}[model]
        assert open_checkpoint(odd).variant == (other if (model, other) == ("dev", "kontext") else plain)


def test_zero_points_there_and_back(tmp_path: Path) -> None:
    """Those of the quantizer are no multiples of the scale: they move by half a bit of the larger of both forms"""
    path = golden_path("svdq-int4_r16-tinyflux.safetensors")

    def move(tensors: Tensors, _: Metadata) -> None:
        generator = torch.Generator().manual_seed(0)
        zeros = tensors["transformer_blocks.0.norm1.linear.wzeros"]
        zeros.mul_(0.2 + torch.rand(zeros.shape, generator=generator).to(zeros.dtype))

    path = changed(Path(shutil.copy(path, tmp_path / "a.safetensors")), move)
    convert(path, tmp_path / "b.safetensors", "comfy-svdquant")
    convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "nunchaku")
    before, after = (open_checkpoint(p).layer("double_blocks.0.img_mod.lin").weight.unpack() for p in (
        path, tmp_path / "c.safetensors"))  # fmt: skip
    assert_same(after.code, before.code)
    assert_same(after.wscales, before.wscales)
    error = (after.wzeros.float() - before.wzeros.float()).abs()
    assert error.max() > 0 and (error <= before.wscales.float() / 32).all()


def test_commands_read_it(dev: Path, written: dict[str, Path]) -> None:
    (facts, error), (expected, _) = inspect(written["comfy-svdquant"]), inspect(dev)
    assert error is None and facts["format"] == "comfy-kitchen"
    same = ("layers", "ranks", "variant", "dtype", "config")
    assert [facts[key] for key in same] == [expected[key] for key in same]
    sizes = facts["bytes"]
    header = 8 + int.from_bytes(written["comfy-svdquant"].read_bytes()[:8], "little")
    assert sum(sizes[kind] for kind in ("w4a4", "low_rank", "modulation", "plain")) + header == facts["file_bytes"]


def test_parts_that_are_smoothed_differently_become_16_bits(dev: Path, tmp_path: Path) -> None:
    """And stay so on the way back"""

    def smooth(tensors: Tensors, _: Metadata) -> None:
        tensors["single_transformer_blocks.0.mlp_fc1.smooth"] *= 2

    path = changed(Path(shutil.copy(dev, tmp_path / "a.safetensors")), smooth)
    result = convert(path, tmp_path / "b.safetensors", "comfy-svdquant")
    assert result.dense == (LINEAR1,)
    tensors = read_all(tmp_path / "b.safetensors")[0]
    weight, bias = effective(open_checkpoint(path).layer(LINEAR1), torch.bfloat16)
    assert_same(tensors[f"{LINEAR1}.weight"], weight)
    assert_same(tensors[f"{LINEAR1}.bias"], bias)
    convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "nunchaku")
    assert open_checkpoint(tmp_path / "c.safetensors").plain_linears == (LINEAR1,)
    assert_same(open_checkpoint(tmp_path / "c.safetensors").layer(LINEAR1).weight, weight)


@pytest.mark.comfy
def test_our_loader_reads_it(dev: Path, written: dict[str, Path], comfy: ModuleType) -> None:
    from svdq.model import load_flux

    arguments = inputs(open_checkpoint(dev))
    got, expected = (forward(load_flux(str(p), "16bit"), arguments) for p in (written["comfy-svdquant"], dev))
    assert torch.equal(got, expected)


@pytest.mark.comfy
def test_comfy_kitchen_computes_the_same(dev: Path, written: dict[str, Path], comfy: ModuleType) -> None:
    """Its layout classes on the tensors of the file: weights, and outputs in W4A4 arithmetic (it rounds elsewhere)"""
    from comfy_kitchen import tensor as kitchen

    tensors = read_all(written["comfy-svdquant"])[0]
    generator = torch.Generator().manual_seed(0)
    for name, layer in open_checkpoint(dev).layers():
        if isinstance(layer, PlainLayer):
            continue
        leaves = {key[len(name) + 1 :]: tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
        described = json.loads(bytes(leaves["comfy_quant"].tolist()))
        shared = {"scale": leaves["weight_scale"], "orig_dtype": torch.bfloat16, "orig_shape": layer.shape}
        x = torch.randn(5, layer.shape[1], generator=generator).bfloat16()
        weight, bias = effective(layer, torch.float32)
        if isinstance(layer, AWQLinear):
            assert described == {"format": "awq_w4a16", "group_size": 64}
            params = kitchen.TensorCoreAWQW4A16Layout.Params(**shared, zeros=leaves["weight_zeros"])
            quantized = kitchen.QuantizedTensor(leaves["weight"], "TensorCoreAWQW4A16Layout", params)
            assert relative_error(quantized.dequantize().float(), weight) < 4e-3, name
            expected, limit = x.float() @ weight.t() + bias, 8e-3
        else:
            unsigned = name.endswith("mlp.2")
            assert (described["format"], described["act_unsigned"]) == ("svdquant_w4a4", unsigned)
            x = reference.gelu(x) if unsigned else x
            factors = {leaf: leaves[leaf] for leaf in ("proj_down", "proj_up", "smooth_factor")}
            params = kitchen.TensorCoreSVDQuantW4A4Layout.Params(**shared, **factors, act_unsigned=unsigned)
            quantized = kitchen.QuantizedTensor(leaves["weight"], "TensorCoreSVDQuantW4A4Layout", params)
            if not unsigned:
                assert relative_error(quantized.dequantize().float(), weight) < 8e-3, name
            if name.endswith("linear2"):  # signed there, unsigned here
                expected, limit = x.float() @ weight.t() + bias, 0.15
            else:
                rows, parts = [0, *(part.n for part in layer.parts)], []
                for index, part in enumerate(layer.parts):
                    start = sum(rows[: index + 1])
                    parts.append(reference.linear_w4a4(x, part.unpack(), layer.bias[start : start + part.n]))
                expected, limit = torch.cat(parts, dim=1).float(), 0.05
        got = torch.nn.functional.linear(x, quantized, leaves["bias"].bfloat16()).float()
        assert relative_error(got, expected) < limit, name


# ---- the same each time, whole or not at all


@pytest.mark.parametrize("to", FORMATS)
def test_same_bytes_each_time(to: str, dev: Path, tmp_path: Path) -> None:
    source = save_as_comfyui(dev, tmp_path / "saved.safetensors") if to == "nunchaku" else dev
    digests = set()
    for name in ("a", "b"):
        convert(source, tmp_path / name, to)
        digests.add(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest())
    assert len(digests) == 1


@pytest.mark.parametrize("to", FORMATS)
def test_interrupted(to: str, dev: Path, tmp_path: Path) -> None:
    source = save_as_comfyui(dev, dev.with_name("saved.safetensors")) if to == "nunchaku" else dev

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", to, progress=stop)
    assert os.listdir(tmp_path) == []


# ---- what cannot be converted


def refused(match: str, *arguments: object, **options: object) -> None:
    with pytest.raises(CheckpointError, match=match) as error:
        convert(*arguments, **options)
    assert "\n" not in str(error.value)


def test_nothing_to_convert(dev: Path, written: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    refused(r"nothing to do, .*Add --to nunchaku or comfy or comfy-svdquant, or --lora FILE", dev, out)
    refused(r"format: found nunchaku already, .*Choose --to comfy or comfy-svdquant", dev, out, "nunchaku")
    path = written["comfy-svdquant"]
    refused(r"comfy-svdquant already, .*Choose --to nunchaku or comfy\.", path, out, "comfy-svdquant")
    for to in FORMATS:
        refused("a FLUX model that is not SVDQuant INT4", written["comfy"], out, to)
    assert os.listdir(tmp_path) == []


def test_sources_that_are_none(dev: Path, tmp_path: Path) -> None:
    out, short = tmp_path / "out.safetensors", tmp_path / "short.safetensors"
    short.write_bytes(dev.read_bytes()[:-100])
    refused("Download the file again", short, out, "comfy")
    save_file({"decoder.conv_in.weight": torch.zeros(4)}, tmp_path / "vae.safetensors")
    refused("a VAE", tmp_path / "vae.safetensors", out, "comfy")
    refused("nothing there", tmp_path / "none", out, "comfy")
    synth(tmp_path / "folder", container="folder")
    (tmp_path / "folder" / "unquantized_layers.safetensors").unlink()
    refused("unquantized_layers.safetensors", tmp_path / "folder", out)
    assert not out.exists()


def test_targets(dev: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = Path(shutil.copy(dev, tmp_path / "copy.safetensors"))
    refused("--force", dev, copy, "comfy")
    refused("a file that is read", copy, copy, "comfy", force=True)
    assert copy.read_bytes() == dev.read_bytes()
    synth(tmp_path / "folder", container="folder")
    inside = tmp_path / "folder" / "transformer_blocks.safetensors"
    refused("a file that is read", tmp_path / "folder", inside, force=True)
    refused("Create it first", dev, tmp_path / "none" / "out", "comfy")
    convert(dev, copy, "comfy", force=True)
    assert copy.read_bytes() != dev.read_bytes()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1_000))
    refused(r"free disk space: found \d+\.\d (kB|MB), expected \d\.\d MB\. Make room", dev, tmp_path / "out", "comfy")
    assert sorted(os.listdir(tmp_path)) == ["copy.safetensors", "folder"]


def described(layer: str, **entries: object) -> Callable[[Tensors, Metadata], None]:
    def change(tensors: Tensors, _: Metadata) -> None:
        conf = json.loads(bytes(tensors[f"{layer}.comfy_quant"].tolist())) | entries
        tensors[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps(conf).encode()), dtype=torch.uint8)

    return change


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda t, _: t.pop(f"{QKV}.proj_up"), rf"{QKV}\.proj_up: found 1 of .* keys missing"),
        (lambda t, _: t.update({f"{QKV}.x": torch.zeros(1)}), rf"{QKV}\.x: found 1 keys that no"),
        (lambda t, _: t.update({f"{QKV}.weight": torch.zeros(768, 256)}), r"weight: found dtype F32, expected I8"),
        (lambda t, _: t.update({f"{QKV}.weight": t[f"{QKV}.weight"].reshape(6, 4, 32, 128)}), r"\[6, 4, 32, 128\]"),
        (lambda t, _: t.update({f"{QKV}.proj_up": torch.zeros(768, 16).bfloat16()}), "rank 16, expected rank 32"),
        (described(QKV, format="convrot_w4a4"), rf'{QKV}\.comfy_quant: found .*expected {{"format": "svdquant_w4a4"'),
        (described(FC2, act_unsigned=False), '"act_unsigned": true'),
        (described(LINEAR1, act_unsigned=True), '"act_unsigned": false'),
        (described(LINEAR1, ranks=[32]), "ranks"),
        (described(LINEAR1, ranks=[40, 24]), "ranks"),
        (described(LINEAR1, ranks=[32, 16]), "ranks"),
        (described(LINEAR1, ranks="ab"), "ranks"),
        (described("double_blocks.0.img_mod.lin", group_size=128), '"group_size": 64'),
        (lambda t, _: t.update({f"{QKV}.comfy_quant": torch.full((3000,), 91, dtype=torch.uint8)}), "comfy_quant"),
    ],
)  # fmt: skip
def test_files_in_the_layouts_of_comfy_kitchen_that_do_not_fit(
    change: Callable, match: str, written: dict[str, Path], tmp_path: Path
) -> None:
    path = changed(Path(shutil.copy(written["comfy-svdquant"], tmp_path / "a.safetensors")), change)
    refused(match, path, tmp_path / "out", "nunchaku")


def test_without_ranks_each_part_has_all_columns(dev: Path, written: dict[str, Path], tmp_path: Path) -> None:
    """As another program may write it: the same weights, with zeros in the branch"""
    path = Path(shutil.copy(written["comfy-svdquant"], tmp_path / "a.safetensors"))
    path = changed(path, lambda tensors, _: described(LINEAR1, ranks=None)(tensors, _))
    layer, expected = open_checkpoint(path).layer(LINEAR1), open_checkpoint(dev).layer(LINEAR1)
    assert [part.rank for part in layer.parts] == [64, 64]
    assert relative_error(effective(layer, torch.float32)[0], effective(expected, torch.float32)[0]) < 1e-6


# ---- the command


def test_strengths() -> None:
    for text, expected in (
        ("a.safetensors", Lora("a.safetensors", 1.0)),
        ("a.safetensors:0.5", Lora("a.safetensors", 0.5)),
        ("a:b.safetensors:-1e-1", Lora("a:b.safetensors", -0.1)),
        (r"C:\loras\a.safetensors", Lora(r"C:\loras\a.safetensors", 1.0)),
        (r"C:\loras\a.safetensors:2", Lora(r"C:\loras\a.safetensors", 2.0)),
    ):
        assert lora(text) == expected
    with pytest.raises(Exception, match="not a finite number"):
        lora("a:nan")


def test_command(
    dev: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "RESTARTED", "SVDQ_TEST_RESTARTED")

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setenv("SVDQ_TEST_RESTARTED", "1")
        code = cli.main([str(argument) for argument in ("convert", *arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    out, adapter = tmp_path / "a b.safetensors", tmp_path / "lora.safetensors"
    code, text, error = run(dev, out)
    assert (code, text) == (2, "") and error.startswith(f"error: {dev}: ") and error.count("\n") == 1
    code, text, error = run(dev, out, "--to", "comfy")
    assert (code, error) == (0, "") and f"\n{out}: 7.9 MB (comfy) in " in text
    assert run(dev, out, "--to", "comfy")[0] == 2
    save_file({f"{QKV}.lora_A.weight": torch.ones(4, 256), f"{QKV}.lora_B.weight": torch.ones(768, 4),
               "lora_te1_x.lora_up.weight": torch.ones(1)}, adapter)  # fmt: skip
    code, text, error = run(dev, out, "--force", "--lora", f"{adapter}:0.5", "--lora", adapter)
    assert (code, error) == (0, "") and "(nunchaku)" in text and "2 tensors of LoRAs are left out" in text
    metadata = read_all(out)[1]
    assert json.loads(metadata["svdq.loras"]) == [
        {"file": adapter.name, "strength": 0.5}, {"file": adapter.name, "strength": 1.0},
    ]  # fmt: skip
    assert json.loads(metadata["quantization_config"])["rank"] == 48
    assert run(write_raw(tmp_path / "x", b"{}"), out, "--to", "comfy", "--force")[0] == 2
