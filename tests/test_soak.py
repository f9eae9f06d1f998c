"""Memory of models: ComfyUI knows how large they are, and twenty changes leave neither memory nor objects behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, find_comfyui
from flux_models import forward, inputs

from svdq.benchmarks.process_memory import STATUS, ram, tensors
from svdq.cli import synth as synth_command
from svdq.cli.synth import synth
from svdq.loaders import open_checkpoint
from svdq.loaders.weights import FluxConfig

pytestmark = [pytest.mark.comfy, pytest.mark.slow]

CHANGES, WARM = 20, 6
SLACK = 2e6  # bytes; a tiny model has 7 million
# hidden size, blocks and so on of a model that is large beside what allocators round up: 59 MB
MEDIUM = FluxConfig(768, 3, 6, 64, 64, 256, 128, True)


@pytest.fixture
def medium(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two checkpoints of the size ``MEDIUM``."""
    monkeypatch.setattr(synth_command, "flux_config", lambda variant, scale: MEDIUM)
    paths = [tmp_path / f"{seed}.safetensors" for seed in (1, 2)]
    for seed, path in enumerate(paths):
        synth(path, seed=seed)
    return paths


def inner_bytes(model: torch.nn.Module) -> int:
    """Bytes of all tensors of a model, counted without ComfyUI; tensors that several layers share count once."""
    from comfy_kitchen.tensor.base import QuantizedTensor

    found: dict[int, torch.Tensor] = {}
    for parameter in (*model.parameters(), *model.buffers()):
        names = parameter.__tensor_flatten__()[0] if isinstance(parameter, QuantizedTensor) else ["data"]
        for tensor in (getattr(parameter, name) for name in names):
            found[tensor.data_ptr()] = tensor
    return sum(tensor.nbytes for tensor in found.values())


@pytest.mark.parametrize("on_gpu", [False, pytest.param(True, marks=pytest.mark.gpu)], ids=["ram", "vram"])
def test_sizes(comfy, on_gpu: bool, medium: list[Path]) -> None:
    """What ComfyUI takes for the size of the model, and of what is loaded, is what it is, to 3 %."""
    import comfy.model_management as management

    from svdq.model import load_flux

    management.unload_all_models()
    patcher = load_flux(str(medium[0]), weights="int4")
    size = inner_bytes(patcher.model)
    assert size > 50e6
    assert patcher.model_size() == pytest.approx(size, rel=0.03)
    assert patcher.model_size() == pytest.approx(medium[0].stat().st_size, rel=0.03)
    before = torch.cuda.memory_allocated() if on_gpu else 0
    management.load_models_gpu([patcher])
    assert patcher.loaded_size() == pytest.approx(size, rel=0.03)
    if on_gpu:
        assert patcher.loaded_size() == pytest.approx(torch.cuda.memory_allocated() - before, rel=0.03)
    for share in (0.5, 0.25):
        patcher.partially_unload(patcher.offload_device, patcher.loaded_size() - share * size)
        loaded = patcher.loaded_size()
        assert 0.4 * share * size < loaded < 1.1 * share * size
        if on_gpu:
            assert loaded == pytest.approx(torch.cuda.memory_allocated() - before, rel=0.03)
    management.unload_all_models()
    assert patcher.loaded_size() == 0
    assert not on_gpu or torch.cuda.memory_allocated() - before < 0.01 * size


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["--enable-dynamic-vram", "--disable-dynamic-vram"])
def test_changing_models_in_a_process_of_its_own(mode: str, medium: list[Path]) -> None:
    """As a server does it, dynamic VRAM included, whose memory is not torch's."""
    script = ROOT / "benchmarks" / "model_switches.py"
    command = [sys.executable, script, find_comfyui(), *medium, "--switches", 20, "--size", 256, "--", mode]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    (row,) = (json.loads(line[4:]) for line in done.stdout.splitlines() if line.startswith("ROW "))
    print(row)
    assert row["ram_growth_mb"] < 8 and row["vram_growth_mb"] < 8, "of models that have 59 MB"
    assert max(row["torch_mb"][-2:]) <= max(row["torch_mb"][6:8])
    if "disable" in mode:
        assert row["size_percent"] < 3


@pytest.mark.skipif(not STATUS.exists(), reason="reads the memory of a process from Linux's /proc")
@pytest.mark.parametrize("on_gpu", [False, pytest.param(True, marks=pytest.mark.gpu)], ids=["ram", "vram"])
def test_changing_models_does_not_grow(comfy, on_gpu: bool, tmp_path: Path) -> None:
    import comfy.model_management as management
    import comfy.sd

    from svdq.model import load_flux

    paths = [tmp_path / f"{variant}.safetensors" for variant in ("dev", "schnell")]
    for path in paths:
        synth(path, variant=path.stem, scale="tiny", seed=1)
    hidden = open_checkpoint(paths[0]).config.hidden_size
    lora = {
        f"diffusion_model.single_blocks.0.linear1.lora_{side}.weight": torch.ones(*shape) * 0.01
        for side, shape in (("down", (4, hidden)), ("up", (7 * hidden, 4)))
    }
    seen = []
    for change in range(CHANGES):
        path = paths[change % 2]
        patcher = load_flux(str(path))
        with torch.inference_mode():
            forward(patcher, inputs(open_checkpoint(path)))
            forward(comfy.sd.load_lora_for_models(patcher, None, lora, 0.5, 0)[0], inputs(open_checkpoint(path)))
        del patcher
        if change % 2:  # both ways that ComfyUI has: with the next model, and on request
            management.unload_all_models()
        management.cleanup_models_gc()
        allocated = torch.cuda.memory_allocated() if on_gpu else 0
        seen.append((ram()[0], tensors(), allocated))
    management.unload_all_models()
    print([f"{own / 1e6:.1f} MB, {count} tensors, {vram / 1e6:.1f} MB" for own, count, vram in seen])
    own, count, vram = zip(*seen[WARM:], strict=True)
    # The two models differ: odd changes with odd ones, even with even ones.
    for parity in (0, 1):
        assert own[-2 + parity] - own[parity] < SLACK
        assert count[-2 + parity] <= count[parity]
        assert vram[-2 + parity] <= vram[parity]
