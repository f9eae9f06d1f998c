"""ComfyUI's memory modes, each in a process of its own: every one gives the same bits and honest sizes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import find_comfyui
from flux_models import relative

pytestmark = [pytest.mark.comfy, pytest.mark.slow]

MODES = {
    "dynamic": ["--enable-dynamic-vram"],
    "static": ["--disable-dynamic-vram"],
    "lowvram": ["--lowvram", "--disable-dynamic-vram"],
    "novram": ["--novram"],
    "highvram": ["--highvram"],
    "cpu": ["--cpu"],
}
GPU_MODES = [mode for mode in MODES if mode != "cpu"]
LORA_RANK = 8


def write_lora(path: Path, config) -> None:
    """A LoRA on every kind of quantized layer, in ComfyUI's key form. (Core itself rounds a LoRA into a 16-bit layer
    differently from mode to mode.)"""
    from safetensors.torch import save_file

    hidden, generator, tensors = config.hidden_size, torch.Generator().manual_seed(5), {}
    for name, n, k in (
        ("double_blocks.0.img_attn.qkv", 3 * hidden, hidden),
        ("double_blocks.0.txt_mlp.2", hidden, 4 * hidden),
        ("double_blocks.0.img_mod.lin", 6 * hidden, hidden),
        ("single_blocks.0.linear1", 7 * hidden, hidden),
        ("single_blocks.0.linear2", hidden, 5 * hidden),
    ):
        down = torch.randn(LORA_RANK, k, generator=generator) * k**-0.5
        up = torch.randn(n, LORA_RANK, generator=generator) * 0.1
        tensors |= {f"diffusion_model.{name}.lora_down.weight": down, f"diffusion_model.{name}.lora_up.weight": up}
        if name.endswith(("mlp.2", "linear2")):  # the biases that hold a shift correction
            tensors[f"diffusion_model.{name}.diff_b"] = torch.randn(n, generator=generator) * 0.1
    save_file(tensors, str(path))


@pytest.fixture(scope="module")
def run_mode(comfy, tmp_path_factory: pytest.TempPathFactory):
    """Result of gpu_worker.py in a mode and precision, with what is kept of the weights; each runs once."""
    from svdq.cli.synth import synth
    from svdq.loaders import open_checkpoint

    folder = tmp_path_factory.mktemp("modes")
    checkpoint, lora = folder / "dev.safetensors", folder / "lora.safetensors"
    synth(checkpoint, variant="dev", scale="tiny", seed=2)
    write_lora(lora, open_checkpoint(checkpoint).config)
    results: dict[tuple[str, ...], dict] = {}

    def run(mode: str, precision: str = "16bit", weights: str = "int4") -> dict:
        key = (mode, precision, weights)
        if key not in results:
            out = folder / f"{mode}-{precision}-{weights}.pt"
            worker = Path(__file__).with_name("gpu_worker.py")
            command = [sys.executable, worker, find_comfyui(), checkpoint, out, lora, weights, "--", *MODES[mode]]
            done = subprocess.run(
                [str(word) for word in command],
                capture_output=True,
                text=True,
                timeout=600,
                env=os.environ | {"SVDQ_BACKEND": precision},
            )
            # The log of dynamic VRAM's allocator would push a traceback out of what is shown.
            errors = "\n".join(line for line in done.stderr.splitlines() if not line.startswith("aimdo:"))
            assert done.returncode == 0, f"{key}:\n{done.stdout[-2000:]}\n{errors[-4000:]}"
            results[key] = torch.load(out)
        return results[key]

    return run


def check(result: dict) -> None:
    assert torch.isfinite(result["plain"]).all()
    assert torch.equal(result["plain"], result["plain_again"]), "removing a LoRA must restore every bit"
    assert relative(result["lora"], result["plain"]) > 1e-3, "the LoRA must do something"
    assert result["model_size"] - result.get("counted", 0) == pytest.approx(result["file_bytes"], rel=0.05)
    if "after_partial_unload" in result:
        assert torch.equal(result["after_partial_unload"], result["plain"])
    assert torch.equal(result["saved"], result["plain"]), "what ModelSave writes is the same model"


def check_saved_loras(result: dict) -> None:
    """In 16 bits: a saved LoRA's factors are rounded, and a part of the weight that is dequantized."""
    for key in ("lora", "columns"):
        distance = relative(result[f"saved_{key}"], result[key])
        assert distance < 0.1 * relative(result[key], result["plain"]), f"{key}: {distance:.3g}"


def test_cpu_mode(run_mode) -> None:
    result = run_mode("cpu")
    assert not result["dynamic"]
    assert result["patcher"] == "SVDQModelPatcher"
    check(result)
    check_saved_loras(result)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", GPU_MODES)
def test_gpu_mode(mode: str, run_mode) -> None:
    result = run_mode(mode)
    assert result["dynamic"] == (mode == "dynamic")
    assert result["patcher"] == ("SVDQModelPatcherDynamic" if mode == "dynamic" else "SVDQModelPatcher")
    check(result)
    check_saved_loras(result)
    if mode == "dynamic":
        assert result["paged"] > 0 and result["forgotten"] == 0, "a LoRA does not send weights again"
    reference = run_mode("static")
    for key in ("plain", "lora"):
        assert torch.equal(result[key], reference[key]), f"{key}: {mode} differs from static"


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["int4", ""], ids=["int4", "auto"])
@pytest.mark.parametrize("mode", GPU_MODES)
def test_gpu_mode_with_kernels(mode: str, precision: str, run_mode) -> None:
    """The same with weights that kernels read where ComfyUI has put them."""
    result = run_mode(mode, precision)
    check(result)
    for key in ("plain", "lora"):
        assert torch.equal(result[key], run_mode("static", precision)[key]), f"{key}: {mode} differs from static"
    assert 1e-3 < relative(result["plain"], run_mode("static")["plain"]) < 0.2  # activations are quantized
    assert torch.equal(result["saved_columns"], result["columns"]), "a saved LoRA is what kernels make of it"
    assert result["blocks"] > 0
    if mode in ("dynamic", "static", "highvram"):
        assert result["graphs"] == result["blocks"], "weights that stay in place run as CUDA graphs"
    if mode == "novram":
        assert result["graphs"] == 0


@pytest.mark.gpu
@pytest.mark.parametrize("mode", GPU_MODES)
def test_gpu_mode_with_kept_weights(mode: str, run_mode) -> None:
    """INT8 copies change no bit, and there are some where the weights stay on the GPU (on one that runs INT8)."""
    import torch.cuda

    if torch.cuda.get_device_capability() in ((8, 0), (8, 6), (8, 9)):
        pytest.skip("this GPU runs INT4")
    result, expected = run_mode(mode, "", "int8"), run_mode("static", "")
    check(result)
    for key in ("plain", "lora", "columns"):
        assert torch.equal(result[key], expected[key]), key
    if mode in ("dynamic", "static", "highvram"):
        assert result["graphs"] == result["blocks"]
        assert result["kept"] >= result["counted"] > 0
        assert result["loaded_size"] >= result["kept"]
    if mode == "novram":
        assert result["kept"] == 0
