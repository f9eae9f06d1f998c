"""``synth``, ``inspect``, ``dequantize`` and ``doctor``, called as functions and as commands."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import assert_close, assert_same
from conftest import ROOT
from files import changed, read_all, save_as_comfyui, tiny

from svdq import cli
from svdq.cli import doctor
from svdq.cli.dequantize import dequantize, effective
from svdq.cli.doctor import Facts, Gpu, findings
from svdq.cli.inspect import inspect
from svdq.cli.synth import VARIANTS, flux_config, synth
from svdq.cli.synth_weights import tensor_specs
from svdq.kernels import reference
from svdq.loaders import AWQLinear, CheckpointError, W4A4Linear, open_checkpoint, write
from svdq.loaders.metadata import merged_metadata
from svdq.loaders.write import Spec, safetensors_writer


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("dev"))


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command line in this process: (exit code, stdout, stderr)."""
    monkeypatch.setattr(cli, "RESTARTED", "SVDQ_TEST_RESTARTED")

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setenv("SVDQ_TEST_RESTARTED", "1")
        code = cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ---- synth


def test_same_seed_same_bytes(dev: Path, tmp_path: Path) -> None:
    assert digest(tiny(tmp_path)) == digest(dev)
    assert digest(tiny(tmp_path, seed=1)) != digest(dev)


@pytest.mark.parametrize("variant, published", [("dev", 6_768_309_832), ("fill", 6_770_275_936)])
def test_full_size_is_that_of_the_published_files(variant: str, published: int) -> None:
    config = flux_config(variant, "full")
    specs = tensor_specs(config, 32, torch.bfloat16)
    header = write._header(specs, merged_metadata(variant, config, 32))[0]
    assert len(specs) == 2604
    assert abs(len(header) + sum(spec.nbytes for spec in specs.values()) - published) < 200, "but for the metadata"


def test_the_layers_are_well_scaled(dev: Path) -> None:
    for name, layer in open_checkpoint(dev).layers():
        weight, bias = effective(layer, torch.float32)
        if isinstance(layer, W4A4Linear):
            for part in layer.parts:
                unpacked = part.unpack()
                dense = reference.dequantize_w4a4(unpacked)[0]
                low_rank = unpacked.proj_up.float() @ unpacked.proj_down.float()
                assert dense.std() * part.k**0.5 == pytest.approx(1.1, abs=0.1), name
                assert low_rank.norm() / dense.norm() == pytest.approx(0.27, abs=0.03), name
                assert unpacked.q.min() == -7 and unpacked.q.max() == 7
                assert unpacked.smooth_factor.float().log().std() == pytest.approx(0.3, abs=0.06), name
            assert bias.abs().max() < 0.2, f"{name}: the shift term is in the bias"
        elif isinstance(layer, AWQLinear):
            code = layer.weight.unpack()
            assert_same(code.wzeros, -(7 * code.wscales))
            assert code.code.max() == 14
            assert weight.abs().mean() < 0.1


@pytest.mark.parametrize("container", ["single", "folder"])
def test_synth_replaces_only_when_told(container: str, tmp_path: Path) -> None:
    path = tmp_path / "out"
    synth(path, container=container)
    with pytest.raises(CheckpointError, match="Choose another name"):
        synth(path, container=container)
    synth(path, container=container, variant="schnell", force=True)
    assert open_checkpoint(path).variant == "schnell"
    assert os.listdir(tmp_path) == ["out"]


def test_synth_leaves_other_files_of_a_folder_alone(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    synth(folder, container="folder", force=True)
    assert (folder / "notes.txt").read_text() == "mine" and open_checkpoint(folder).variant == "dev"


@pytest.mark.parametrize("container", ["single", "folder"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, OSError])
def test_synth_leaves_nothing_behind(container: str, error: type[BaseException], tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise error

    with pytest.raises(error):
        synth(tmp_path / "out", container=container, progress=stop)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "options, match",
    [({"rank": 24}, "rank: found 24"), ({"rank": -16}, "rank: found -16")],
)
def test_synth_refuses_a_rank_that_does_not_fit(options: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=match):
        synth(tmp_path / "out", **options)


def test_targets_that_cannot_be_written(dev: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for container in ("single", "folder"):
        with pytest.raises(CheckpointError, match=r"no folder .*Create it first"):
            synth(tmp_path / "missing" / "out", container=container)
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointError, match="a folder of that name"):
        dequantize(dev, tmp_path / "folder", force=True)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        os.symlink(tmp_path / "pipe", tmp_path / "to a pipe")
        for name, force in (("pipe", True), ("to a pipe", True), ("pipe", False)):
            with pytest.raises(CheckpointError, match="a device, pipe or socket, expected a file name"):
                dequantize(dev, tmp_path / name, force=force)
        assert (tmp_path / "pipe").is_fifo() and (tmp_path / "to a pipe").is_symlink()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1_000_000))
    for run in (
        lambda: synth(tmp_path / "x"),
        lambda: synth(tmp_path / "x", container="folder"),
        lambda: dequantize(dev, tmp_path / "x"),
    ):
        with pytest.raises(CheckpointError, match=r"free disk space: found 1.0 MB, expected \d+\.\d MB\. Make room"):
            run()


def test_synth_command(tmp_path: Path, command: Callable) -> None:
    path = tmp_path / "a b.safetensors"
    code, out, err = command("synth", "--variant", "canny", "--rank", 16, "--dtype", "fp16", "--seed", 7, path)
    assert (code, err) == (0, "") and str(path) in out
    checkpoint = open_checkpoint(path)
    assert (checkpoint.variant, checkpoint.rank, checkpoint.dtype) == ("canny", 16, torch.float16)
    code, _, err = command("synth", path)
    assert code == 2 and "--force" in err and err.count("\n") == 1
    assert command("synth", "--force", path)[0] == 0
    assert command("synth", "--variant", "pro", path)[0] == 2


# ---- the writer


def test_writer_checks_what_is_written(tmp_path: Path) -> None:
    specs = {"a": Spec(torch.bfloat16, (2, 3)), "b": Spec(torch.int8, (3,)), "empty": Spec(torch.float32, (0, 4))}
    tensors = {name: torch.ones(spec.shape, dtype=spec.dtype) for name, spec in specs.items()}

    def attempt(writes: list[tuple[str, torch.Tensor]]) -> None:
        with safetensors_writer(tmp_path / "out", specs, {"k": "ä"}) as write_tensor:
            for name, tensor in writes:
                write_tensor(name, tensor)

    with pytest.raises(ValueError, match="b was written twice"):
        attempt([("b", tensors["b"])] * 2)
    with pytest.raises(ValueError, match="announced as"):
        attempt([("b", tensors["a"])])
    with pytest.raises(ValueError, match="1 tensors were not written, b"):
        attempt([("a", tensors["a"]), ("empty", tensors["empty"])])
    assert os.listdir(tmp_path) == []
    attempt([(name, tensors[name]) for name in ("b", "empty", "a")])
    got, metadata = read_all(tmp_path / "out")
    assert metadata == {"k": "ä"} and list(tmp_path.iterdir()) == [tmp_path / "out"]
    for name, tensor in tensors.items():
        assert_same(got[name], tensor, name)


def test_writer_takes_tensors_that_are_not_contiguous(tmp_path: Path) -> None:
    tensor = torch.arange(6).reshape(2, 3).to(torch.int32).t()
    with safetensors_writer(tmp_path / "out", {"t": Spec(torch.int32, (3, 2))}, {}) as write_tensor:
        write_tensor("t", tensor)
    assert_same(read_all(tmp_path / "out")[0]["t"], tensor)


# ---- dequantize


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "float32"])
def test_dequantize(dtype: str, dev: Path, tmp_path: Path) -> None:
    out = tmp_path / "dense.safetensors"
    assert dequantize(dev, out, dtype) == out.stat().st_size
    tensors, metadata = read_all(out)
    assert metadata["svdq.source"] == dev.name and metadata["svdq.variant"] == "dev"
    expected = {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": torch.float32}[dtype]
    assert {tensor.dtype for tensor in tensors.values()} == {expected}
    checkpoint = open_checkpoint(dev)
    names = {f"{name}.weight" for name in checkpoint.layer_names}
    assert names == {name for name in tensors if name.endswith(".weight")}
    layer = checkpoint.layer("single_blocks.1.linear2")
    out_proj, fc2 = (reference.dequantize_w4a4(part.unpack()) for part in layer.parts)
    weight = torch.cat((out_proj[0], fc2[0]), dim=1)
    assert_close(tensors["single_blocks.1.linear2.weight"], weight, rms=2e-3, peak=5e-3)
    bias = layer.bias.float() + fc2[1]
    assert_close(tensors["single_blocks.1.linear2.bias"], bias, rms=2e-3, peak=5e-3)


def test_dequantize_refuses_to_replace(dev: Path, tmp_path: Path) -> None:
    out = tmp_path / "dense.safetensors"
    out.write_bytes(b"mine")
    with pytest.raises(CheckpointError, match="--force"):
        dequantize(dev, out)
    assert out.read_bytes() == b"mine"
    dequantize(dev, out, force=True)
    before = digest(dev)
    with pytest.raises(CheckpointError, match="a file that is read"):
        dequantize(dev, dev, force=True)
    assert digest(dev) == before and os.listdir(tmp_path) == [out.name]


def test_dequantize_command_reads_a_legacy_folder(tmp_path: Path, command: Callable) -> None:
    synth(tmp_path / "legacy", variant="fill", container="folder")
    code, out, err = command("dequantize", tmp_path / "legacy", tmp_path / "out.safetensors", "--dtype", "fp16")
    assert (code, err) == (0, "") and "fp16" in out
    tensors, metadata = read_all(tmp_path / "out.safetensors")
    assert tensors["img_in.weight"].shape == (256, 384)
    assert metadata["svdq.source"] == "legacy" and metadata["svdq.source_format"] == "nunchaku-legacy-folder"


def test_commands_read_a_saved_model(dev: Path, tmp_path: Path, command: Callable) -> None:
    saved = save_as_comfyui(dev, tmp_path / "saved.safetensors")
    dequantize(saved, tmp_path / "a.safetensors")
    dequantize(dev, tmp_path / "b.safetensors")
    tensors, expected = read_all(tmp_path / "a.safetensors")[0], read_all(tmp_path / "b.safetensors")[0]
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert_same(tensor, expected[name], name)
    facts, error = inspect(saved)
    sizes, same = facts["bytes"], ("layers", "ranks", "variant", "dtype", "config")
    assert error is None and facts["format"] == "comfyui"
    assert [facts[key] for key in same] == [inspect(dev)[0][key] for key in same]
    header = 8 + int.from_bytes(saved.read_bytes()[:8], "little")
    assert sum(sizes[kind] for kind in ("w4a4", "low_rank", "modulation", "plain")) + header == facts["file_bytes"]
    assert sizes["low_rank"] == inspect(dev)[0]["bytes"]["low_rank"]
    assert "SVDQuant, saved by ComfyUI" in command("inspect", saved)[1]


@pytest.mark.comfy
@pytest.mark.parametrize("variant", ["dev", "schnell", "fill", "canny"])
def test_stock_comfyui_loads_what_dequantize_writes(
    variant: str, comfy: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dequantize(tiny(tmp_path, variant=variant), tmp_path / "dense.safetensors", "float32")
    written = read_all(tmp_path / "dense.safetensors")[0]
    sd, metadata = comfy.utils.load_torch_file(str(tmp_path / "dense.safetensors"), return_metadata=True)
    with caplog.at_level(logging.INFO):
        patcher = comfy.sd.load_diffusion_model_state_dict(sd, metadata=metadata)
    problems = [r.message for r in caplog.records if "missing" in r.message or "left over" in r.message]
    assert patcher is not None and problems == []
    flux = patcher.model.diffusion_model
    assert type(flux).__name__ == "Flux" and flux.params.guidance_embed == (variant != "schnell")
    loaded = flux.state_dict()
    assert {name: tuple(t.shape) for name, t in loaded.items()} == {name: tuple(t.shape) for name, t in written.items()}
    # "canny" is told from "dev" by its input channels, which ComfyUI counts in latent channels.
    assert flux.params.in_channels == VARIANTS[variant][0] // 4


# ---- inspect


def test_inspect_facts(dev: Path) -> None:
    facts, error = inspect(dev)
    assert error is None and facts["error"] is None
    assert facts["layers"] == {"w4a4": 20, "modulation": 6, "plain": 22}
    assert facts["ranks"] == {"32": 24} and facts["variant"] == "dev" and facts["dtype"] == "bfloat16"
    sizes = facts["bytes"]
    header = 8 + int.from_bytes(dev.read_bytes()[:8], "little")
    assert sum(sizes[kind] for kind in ("w4a4", "low_rank", "modulation", "plain")) + header == facts["file_bytes"]
    dense = sum(
        effective(layer, torch.bfloat16)[0].nbytes + (0 if layer.bias is None else 2 * layer.shape[0])
        for _, layer in open_checkpoint(dev).layers()
    )
    assert sizes["all_in_16_bit"] == dense
    assert facts["machine"]["backend"] in ("int4", "int8", "16bit") and facts["machine"]["reason"]
    assert set(facts["machine"]["not_chosen"]) | {facts["machine"]["backend"]} == {"int4", "int8", "16bit"}
    assert facts["metadata"]["quantization_config.method"] == "svdquant"


def test_inspect_command(dev: Path, command: Callable) -> None:
    code, out, err = command("inspect", dev)
    assert (code, err) == (0, "")
    for text in ("FLUX.1 dev", "32 (24 weights)", "2 double, 2 single", "not int8", "all in 16 bit"):
        assert text in out
    code, out, _ = command("inspect", dev, "--json")
    assert code == 0 and json.loads(out)["path"] == str(dev)


@pytest.mark.parametrize("as_json", [False, True])
def test_inspect_of_other_files(as_json: bool, dev: Path, tmp_path: Path, command: Callable) -> None:
    def keep_lora(tensors: dict[str, torch.Tensor], _: dict[str, str]) -> None:
        for key in [key for key in tensors if "lora_" not in key]:
            del tensors[key]

    lora = changed(dev, keep_lora, "lora.safetensors")
    short = tmp_path / "short.safetensors"
    short.write_bytes(dev.read_bytes()[:1000])
    cases = {lora: "a LoRA", short: "1000 bytes", tmp_path: "no such file", tmp_path / "none": "nothing there"}
    for path, found in cases.items():
        code, out, err = command("inspect", path, *(["--json"] if as_json else []))
        assert code == 2 and err.startswith(f"error: {path}: ") and err.count("\n") == 1
        assert found in out
        if as_json:
            facts = json.loads(out)
            assert err == f"error: {facts['error']}\n"
            assert path != lora or (facts["tensors"] == 48 and facts["dtypes"] == {"BF16": 48})
            assert path != tmp_path or facts["files"] == {"short.safetensors": 1000}


# ---- doctor

GOOD = Facts(
    python=(3, 12, 1), system="Linux", machine="x86_64", ram=64_000_000_000, smi=("NVIDIA A", "580.1"),
    torch="2.11.0+cu130", torch_cuda="13.0",
    torch_architectures=("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"),
    gpus=(Gpu("NVIDIA A", (8, 6), 24_000_000_000),), triton="3.6.0", safetensors="0.8.0", comfyui="0.30.0",
    comfyui_path="/ComfyUI", comfy_kitchen="0.2", backends=(("int4", False, "why"), ("16bit", True, "so")),
)  # fmt: skip


def test_doctor_finds_nothing_on_a_good_machine() -> None:
    assert findings(GOOD) == []
    report = "\n".join(doctor.report(GOOD, []))
    for text in ("No problems found.", "sm_86", "not int4", "backend        16bit"):
        assert text in report


@pytest.mark.parametrize(
    "change, level, what, remedy",
    [
        ({"python": (3, 9, 0)}, "error", "Python 3.9.0", "python3.12"),
        ({"python": (3, 14, 0)}, "error", "Python 3.14.0", "python3.12"),
        ({"torch": None, "torch_missing": "no torch"}, "error", "no torch", "demo"),
        ({"torch": None, "comfyui_own": True}, "error", "torch", "Python that runs your ComfyUI (/ComfyUI)"),
        ({"torch": "2.7.1+cu126"}, "error", "torch 2.7.1", "--upgrade torch"),
        ({"safetensors": None}, "error", "safetensors", "pip install safetensors"),
        ({"gpus": (), "torch_cuda": None, "torch": "2.11.0+cpu"}, "error", "built without CUDA", "--force-reinstall"),
        ({"gpus": (), "gpu_missing": "driver too old"}, "error", "driver too old", "Update the NVIDIA driver"),
        ({"gpus": (), "gpu_hidden": True}, "warning", "CUDA_VISIBLE_DEVICES", "Unset"),
        ({"gpus": (), "smi": None}, "warning", "no GPU", "NVIDIA GPU"),
        ({"gpus": (Gpu("T4", (7, 5), 16_000_000_000),)}, "warning", "no bf16", "RTX 30"),
        ({"torch_architectures": ("sm_50", "sm_80")}, None, "", ""),
        ({"torch_architectures": ("sm_80", "sm_90", "compute_90")}, None, "", ""),
        ({"torch_architectures": ("sm_90", "sm_90a", "compute_90")}, "error", "no code for NVIDIA A", "pytorch.org"),
        ({"gpus": (Gpu("B", (12, 0), 32_000_000_000),)}, None, "", ""),
        ({"gpus": (Gpu("B", (12, 1), 32_000_000_000),)}, None, "", ""),
        ({"gpus": (Gpu("small", (8, 6), 6_000_000_000),)}, "note", "6 GB of GPU memory", "--lowvram"),
        ({"triton": None, "triton_missing": "no triton"}, "warning", "no triton", "pip install triton"),
        ({"triton": None, "system": "Windows"}, "warning", "Triton", "triton-windows"),
        (
            {"backends": (("int4", False, "Triton needs a C compiler"), ("16bit", True, "everywhere"))},
            "warning",
            "C compiler",
            "gcc",
        ),
        ({"triton": "3.4.0"}, "note", "Triton 3.4.0", "triton>=3.5,<3.10"),
        ({"triton": "3.10.0"}, "note", "Triton 3.10.0", "triton>=3.5,<3.10"),
        ({"comfyui": "0.29.9"}, "error", "ComfyUI 0.29.9", "Update ComfyUI"),
        ({"comfyui": None}, "warning", "does not say its version", "Update ComfyUI"),
        ({"comfyui": "1.0.0"}, None, "", ""),
        ({"comfyui": None, "comfyui_path": None}, "warning", "no ComfyUI", "COMFYUI_PATH"),
        ({"comfy_kitchen": None}, "error", "comfy-kitchen", "requirements.txt"),
        ({"ram": 8_000_000_000}, "warning", "8 GB of memory", "fp8 T5"),
        ({"ram": None}, None, "", ""),
        ({"forced": "int4"}, "note", "SVDQ_BACKEND=int4", "Unset"),
    ],
)
def test_doctor_has_one_remedy_per_problem(change: dict[str, Any], level: str | None, what: str, remedy: str) -> None:
    facts = dataclasses.replace(GOOD, **change)
    found = findings(facts)
    assert [finding.level for finding in found] == ([level] if level else [])
    if found:
        assert what in found[0].what and remedy in found[0].remedy
    assert doctor.report(facts, found)
    assert doctor.chosen(facts) == change.get("forced", "16bit")


def test_doctor_lists_errors_first() -> None:
    bare = Facts(python=(3, 9, 0), system="Linux", machine="arm", ram=4_000_000_000)
    levels = [finding.level for finding in findings(bare)]
    assert levels == sorted(levels, key=doctor.LEVELS.index) and levels[0] == "error"
    assert doctor.chosen(bare) is None
    assert doctor.report(bare, findings(bare))


def test_doctor_command(command: Callable) -> None:
    code, out, err = command("doctor", "--json")
    facts = json.loads(out)
    assert err == "" and facts["facts"]["torch"] == torch.__version__
    assert facts["backend"] == doctor.chosen(doctor.gather())
    assert code == (1 if any(f["level"] == "error" for f in facts["findings"]) else 0)
    assert command("doctor")[1].startswith("system ")


def test_doctor_refuses_an_unknown_backend(monkeypatch: pytest.MonkeyPatch, command: Callable) -> None:
    monkeypatch.setenv("SVDQ_BACKEND", "foo")
    code, out, _ = command("doctor")
    assert code == 1 and "backend        none\n" in out
    # The words of inspect.
    assert "error: SVDQ_BACKEND is 'foo', expected int4, int4-reference or 16bit\n  -> Change or unset it" in out
    code, out, _ = command("doctor", "--json")
    assert code == 1 and json.loads(out)["backend"] is None


def test_doctor_without_torch_or_with_a_broken_one(tmp_path: Path) -> None:
    """Nothing but the standard library, and packages that raise whatever they like."""
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.12:\\n cannot open shared object file')")
    (tmp_path / "triton.py").write_text("1 / 0")
    command = [sys.executable, "-I", "-S", "-c", f"""
import sys, types
sys.path.insert(0, {str(tmp_path)!r})
package = types.ModuleType("svdq"); package.__path__ = [{str(ROOT)!r}]; sys.modules["svdq"] = package
from svdq.cli import doctor
import argparse
sys.exit(doctor.run(argparse.Namespace(json=False)))
"""]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (1, "")
    assert "OSError: libcudart.so.12: cannot open" in result.stdout and "ZeroDivisionError" in result.stdout
