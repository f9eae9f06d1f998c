"""Twenty changes of the model: neither memory nor objects grow."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from flux_models import forward, inputs

from svdq.cli.synth import synth
from svdq.loaders import open_checkpoint

pytestmark = [pytest.mark.comfy, pytest.mark.slow]

CHANGES, WARM = 20, 6
SLACK = 2e6  # bytes; a tiny model has 7 million


def resident() -> int:
    """Bytes of this process in RAM that are not pages of mapped files, as Linux counts them."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


def tensors() -> int:
    """Tensors that Python knows."""
    gc.collect()
    return sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory of a process from Linux's /proc")
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
        seen.append((resident(), tensors(), allocated))
    management.unload_all_models()
    print([f"{ram / 1e6:.1f} MB, {count} tensors, {vram / 1e6:.1f} MB" for ram, count, vram in seen])
    ram, count, vram = zip(*seen[WARM:], strict=True)
    # The two models differ: odd changes with odd ones, even with even ones.
    for parity in (0, 1):
        assert ram[-2 + parity] - ram[parity] < SLACK
        assert count[-2 + parity] <= count[parity]
        assert vram[-2 + parity] <= vram[parity]
