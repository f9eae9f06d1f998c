"""What goes when ComfyUI takes a model, or a part of it, off the GPU; and results that stay what they were."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import reference_layers
import torch
from flux_models import forward, inputs
from test_kept_weights import arguments, free, kept_of, kernels, load, lora, with_lora  # noqa: F401  fixtures

from svdq.loaders import open_checkpoint

pytestmark = pytest.mark.comfy


def held_for_patches(patcher) -> list:
    """What linears have made of their patches and have on the device."""
    made = [module._made for module in patcher.model.modules() if hasattr(module, "_made")]
    return [found for m in made for found in (m.columns, m.extended, m.factors) if found is not None]


def test_factors_of_loras_go_with_the_model(load, arguments: dict, lora: dict) -> None:  # noqa: F811
    """0.6 GB at rank 16 of a full-size model, which ComfyUI does not count."""
    import comfy.model_management as management

    patched = with_lora(load("int4"), lora, 0.7)
    expected = forward(patched, arguments)
    assert held_for_patches(patched)
    management.unload_all_models()
    assert not held_for_patches(patched)
    assert torch.equal(forward(patched, arguments), expected)


@pytest.mark.parametrize("leaf", ["alone", "with a layer that core patches"])
def test_copies_go_before_weights_do(leaf: str, load, arguments: dict, lora: dict) -> None:  # noqa: F811
    """A LoRA comes while VRAM has become short: core takes the model off the GPU and loads a part of it."""
    patcher = load("int8")
    forward(patcher, arguments)
    kept = kept_of(patcher)
    assert kept.held > 0
    flux = patcher.model.diffusion_model
    if leaf != "alone":
        shapes = {"down": (4, flux.img_in.in_features), "up": (flux.hidden_size, 4)}
        lora = lora | {f"diffusion_model.img_in.lora_{name}.weight": torch.randn(*s) for name, s in shapes.items()}
    patched, cleared = with_lora(patcher, lora, 0.7), kept._graphs.cleared
    patched.partially_load(torch.device("cpu"), -patcher.model.model_loaded_weight_memory // 2)
    assert kept.held == 0 and kept._graphs.cleared > cleared


def test_two_calls_of_a_wrapped_block_have_two_results(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph writes to the same tensors each time; who wraps a block may compare what two calls of it returned."""
    import comfy.model_management as management

    layers = reference_layers.in_place_of_kernels(monkeypatch)["int8"]
    patcher = reference_layers.load(tiny, layers, fused=True)
    patcher.model.manual_cast_dtype = None
    statics: dict[tuple, list[torch.Tensor]] = {}

    def replay(block, kind, weights, compute, attend, apart, tensors, streams):
        held = statics.setdefault((streams, *(t.shape for t in tensors)), [torch.empty_like(t) for t in tensors])
        for static, tensor in zip(held, tensors, strict=True):
            static.copy_(tensor)
        compute(attend, *held)
        return tuple(held[:streams])

    seen = []

    def wrapper(given: dict, extra: dict) -> dict:
        def call(vec: torch.Tensor) -> dict:
            clones = {name: given[name].clone() for name in ("img", "txt") if name in given}
            return extra["original_block"](given | clones | {"vec": vec})

        first = call(2 * given["vec"])
        before = first["img"].clone()
        second = call(given["vec"])
        seen.append(torch.equal(first["img"], before) and not torch.equal(first["img"], second["img"]))
        return second

    flux = patcher.model.diffusion_model
    for block in (*flux.double_blocks, *flux.single_blocks):
        block.graphs = SimpleNamespace(run=replay, clear=lambda: 0)
    values = inputs(open_checkpoint(tiny), size=8, tokens=8, batch=1, dtype=torch.bfloat16)
    blocks = [("double_block", 0), ("double_block", 1), ("single_block", 0), ("single_block", 1)]
    options = {"patches_replace": {"dit": dict.fromkeys(blocks, wrapper)}}
    management.load_models_gpu([patcher])
    with torch.inference_mode():
        flux(values.pop("x"), **values, transformer_options=options)
    assert seen == [True] * len(blocks)
