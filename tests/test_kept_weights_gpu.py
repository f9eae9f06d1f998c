"""INT8 copies of weights on a GPU: the bits of a model that expands them, CUDA graphs, memory that comes back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from flux_models import forward, inputs
from test_memory_modes import write_lora

from svdq.loaders import open_checkpoint

pytestmark = [pytest.mark.comfy, pytest.mark.gpu]


@pytest.fixture
def load(tiny: Path):
    from svdq.model import load_flux

    return lambda weights: load_flux(str(tiny), "int8", weights)


@pytest.fixture
def lora(tiny: Path, tmp_path: Path) -> dict:
    import comfy.utils

    write_lora(tmp_path / "lora.safetensors", open_checkpoint(tiny).config)
    lora = comfy.utils.load_torch_file(str(tmp_path / "lora.safetensors"))
    return {name: tensor for name, tensor in lora.items() if not name.endswith("diff_b")}


def blocks_of(patcher) -> list:
    from svdq.model.flux import fused_blocks

    return fused_blocks(patcher.model.diffusion_model)


@pytest.mark.parametrize("size", [16, 32])
def test_no_bit_changes(size: int, tiny: Path, load, lora: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain, LoRAs and strengths, off again, half of the memory asked back, after an unload: as without copies."""
    import comfy.model_management as management
    import comfy.sd

    from svdq.model import graphs

    arguments = inputs(open_checkpoint(tiny), size=size, tokens=64, batch=1)

    def run(patcher, *strengths: float) -> torch.Tensor:
        for strength in strengths:
            patcher = comfy.sd.load_lora_for_models(patcher, None, lora, strength, 0)[0]
        return forward(patcher, arguments)

    cases = [(), (), (0.8,), (0.3,), (), (0.8, -0.5), (0.3,), ()]
    expanding, keeping = load("int4"), load("int8")
    expected = {strengths: run(expanding, *strengths) for strengths in dict.fromkeys(cases)}
    assert blocks_of(expanding)[0].kept.held == 0
    captures = []
    capture = graphs.BlockGraphs._capture
    monkeypatch.setattr(graphs.BlockGraphs, "_capture", lambda *a: captures.append(1) or capture(*a))
    counts = []
    for strengths in cases:
        assert torch.equal(run(keeping, *strengths), expected[strengths]), strengths
        counts.append(len(captures))
    kept = blocks_of(keeping)[0].kept
    assert kept.held == kept.needed(blocks_of(keeping)) > 0
    assert counts[0] > 0 and counts[3] == counts[2], "another strength needed new graphs"
    keeping.partially_unload(torch.device("cpu"), keeping.loaded_size() // 2)
    assert kept.held == 0 and blocks_of(keeping)[0].graphs.count() == 0
    assert torch.equal(run(keeping), expected[()])
    management.unload_all_models()
    assert torch.equal(run(keeping), expected[()])
    assert kept.held > 0


def test_memory_is_what_is_reported_and_comes_back(tiny: Path, load, monkeypatch: pytest.MonkeyPatch) -> None:
    import comfy.model_management as management

    from svdq.model import graphs

    monkeypatch.setattr(graphs, "enabled", lambda: False)  # they have memory of their own
    arguments = inputs(open_checkpoint(tiny), size=16, tokens=64, batch=1)
    patcher = load("auto")
    if patcher.is_dynamic():
        pytest.skip("torch does not count the memory of dynamic VRAM")
    forward(patcher, arguments)
    kept, before = blocks_of(patcher)[0].kept, torch.cuda.memory_allocated()
    held = kept.held
    assert held == kept.needed(blocks_of(patcher)) > 0
    assert patcher.partially_unload(torch.device("cpu"), 1) == held
    freed = before - torch.cuda.memory_allocated()
    assert held <= freed <= 1.03 * held
    management.unload_all_models()


def test_kernels_read_kept_parts(load) -> None:
    """Layer by layer, with outputs that nothing else has rounded."""
    from svdq.kernels.layers import INT8

    for block in blocks_of(load("int4"))[::3]:
        for name in block.linears:
            for part in block.get_submodule(name).stored_parts():
                part = part.map(lambda tensor: tensor.cuda())
                memory = torch.full((INT8.kept_bytes(part),), 0x5A, dtype=torch.uint8, device="cuda")
                x = torch.randn(130, part.k, generator=torch.Generator().manual_seed(1)).to(part.wscales.dtype).cuda()
                expected = INT8.multiply(INT8.quantize(x, part), part, None)
                for fill in (True, False):
                    kept = INT8.keep(part, part, memory, fill, memory[:0])
                    assert torch.equal(INT8.multiply(INT8.quantize(x, kept), kept, None), expected)
