"""Fused blocks inside ComfyUI's Flux against the stock blocks with the same linears, with and without CUDA graphs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from flux_models import forward, inputs, load_dense, relative

from svdq.loaders import open_checkpoint

pytestmark = [pytest.mark.comfy, pytest.mark.gpu]

BACKENDS = ("int4", "int8")


@pytest.fixture
def load(tiny: Path, monkeypatch: pytest.MonkeyPatch):
    """The checkpoint in an arithmetic."""
    from svdq.model import load_flux

    def load(backend: str):
        if backend != "int8":  # what a Hopper GPU takes by itself
            monkeypatch.setenv("SVDQ_BACKEND", backend)
        patcher = load_flux(str(tiny))
        monkeypatch.delenv("SVDQ_BACKEND", raising=False)
        return patcher

    return load


def unfused(patcher):
    """The same MODEL with stock blocks."""
    from comfy.ldm.flux.layers import DoubleStreamBlock, SingleStreamBlock

    flux = patcher.model.diffusion_model
    for blocks, stock in ((flux.double_blocks, DoubleStreamBlock), (flux.single_blocks, SingleStreamBlock)):
        for block in blocks:
            assert type(block) is not stock
            block.__class__ = stock
    return patcher


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("size", "tokens", "batch"), [(16, 20, 1), (16, 20, 2), (18, 77, 1), (32, 64, 3)])
def test_fused_blocks_are_the_stock_ones(backend: str, size: int, tokens: int, batch: int, tiny: Path, load) -> None:
    """Both round to 16 bits, at different places. The yardstick is how far the dense model is from either."""
    arguments = inputs(open_checkpoint(tiny), size=size, tokens=tokens, batch=batch)
    fused, stock = forward(load(backend), arguments), forward(unfused(load(backend)), arguments)
    dense = forward(load_dense(tiny), arguments)
    assert torch.isfinite(fused).all()
    error = relative(stock, dense)
    print(f"{backend}: fused - stock {relative(fused, stock):.4f}, fused - dense {relative(fused, dense):.4f}, "
          f"stock - dense {error:.4f}")  # fmt: skip
    assert relative(fused, stock) <= 1.1 * error
    assert relative(fused, dense) <= 1.1 * error


def test_int8_is_nearer_to_16_bit_than_int4(tiny: Path, load) -> None:
    arguments = inputs(open_checkpoint(tiny), size=32, tokens=64)
    dense = forward(load_dense(tiny), arguments)
    int4, int8 = (relative(forward(load(backend), arguments), dense) for backend in BACKENDS)
    print(f"int4 {int4:.4f}, int8 {int8:.4f} from the dense model")
    assert int8 < 0.7 * int4


@pytest.mark.parametrize("backend", BACKENDS)
def test_graphs_change_no_bit(backend: str, tiny: Path, load) -> None:
    """Without a graph, captured, replayed, with other inputs, another size in between, and after an unload."""
    import comfy.model_management as management

    patcher = load(backend)
    graphs = patcher.model.diffusion_model.double_blocks[0].graphs
    small, large = (inputs(open_checkpoint(tiny), size=size, tokens=64, batch=1) for size in (16, 32))
    other = small | {"x": small["x"] + 1, "timestep": small["timestep"] * 0.5}
    plain = {}
    for name, arguments in (("small", small), ("large", large), ("other", other)):
        graphs.clear()
        management.load_models_gpu([patcher])
        plain[name] = forward_once(patcher, arguments)
    graphs.clear()
    for name, arguments in (("small", small), ("small", small), ("small", small), ("other", other), ("large", large),
                            ("small", small), ("large", large), ("large", large)):  # fmt: skip
        assert torch.equal(forward_once(patcher, arguments), plain[name]), name
    assert graphs.count() > 0
    management.unload_all_models()
    assert not graphs._shapes, "graphs must not outlive the weights on the GPU"
    management.load_models_gpu([patcher])
    for _ in range(3):
        assert torch.equal(forward_once(patcher, small), plain["small"])


def test_what_looks_inside_gets_the_stock_block(tiny: Path, load) -> None:
    patcher = load("int8")
    arguments = inputs(open_checkpoint(tiny), size=16, tokens=64, batch=1)
    forward(patcher, arguments)
    seen = []

    def output_patch(attention, extra_options):
        seen.append(attention.shape)
        return attention

    options = {"patches": {"attn1_output_patch": [output_patch]}}
    stock = forward_once(patcher, arguments, transformer_options=options)
    blocks = len(patcher.model.diffusion_model.double_blocks) + len(patcher.model.diffusion_model.single_blocks)
    assert len(seen) == blocks
    assert torch.equal(stock, forward_once(unfused(patcher), arguments))


def test_an_attention_override_is_asked(tiny: Path, load) -> None:
    patcher = load("int8")
    arguments = inputs(open_checkpoint(tiny), size=16, tokens=64, batch=1)
    expected, seen = forward(patcher, arguments), []

    def override(function, q, k, v, heads, **options):
        seen.append(q.shape)
        return function(q, k, v, heads, **options)

    actual = forward_once(patcher, arguments, transformer_options={"optimized_attention_override": override})
    assert len(seen) > 0
    assert relative(actual, expected) < 0.1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["override", "mask"])
def test_graphs_around_attention_change_no_bit(
    backend: str, kind: str, tiny: Path, load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention that is asked each time, between two graphs of a block; another mask each time; after an unload."""
    import comfy.model_management as management

    from svdq.model import graphs

    patcher = load(backend)
    arguments = inputs(open_checkpoint(tiny), size=16, tokens=64, batch=1)
    length, asked = 64 + 8 * 8, []

    def override(function, q, k, v, heads, **options):
        asked.append(options["transformer_options"]["block_index"])
        return function(q, k, v, heads, **options)

    def step(number: int) -> torch.Tensor:
        if kind == "override":
            return forward_once(patcher, arguments, transformer_options={"optimized_attention_override": override})
        generator = torch.Generator("cuda").manual_seed(number)
        mask = torch.rand(length, length, device="cuda", generator=generator) < 0.8
        return forward_once(patcher, arguments, attention_mask=mask)

    with monkeypatch.context() as patch:
        patch.setattr(graphs, "enabled", lambda: False)
        management.load_models_gpu([patcher])
        step(0)  # the first pass of a process differs
        expected = [step(number) for number in range(6)]
    calls = len(asked)
    flux = patcher.model.diffusion_model
    for number in range(6):
        assert torch.equal(step(number), expected[number]), number
    recorded = flux.double_blocks[0].graphs
    assert recorded.count() == len(flux.double_blocks) + len(flux.single_blocks)
    assert kind == "mask" or len(asked) - calls == calls * 6 // 7
    assert recorded.held > 0 and patcher.partially_unload(torch.device("cpu"), 1) > 0
    assert patcher.is_dynamic() or recorded.held == 0, "the first memory to be given back"
    management.unload_all_models()
    assert recorded.held == 0
    management.load_models_gpu([patcher])
    assert torch.equal(step(3), expected[3])


def forward_once(patcher, arguments: dict, **more) -> torch.Tensor:
    """One pass, without the warming up of ``flux_models.forward``."""
    dtype = patcher.model.manual_cast_dtype or patcher.model_dtype()
    values = {
        name: value.to(patcher.load_device, dtype if name != "timestep" else None) for name, value in arguments.items()
    }
    x, timestep = values.pop("x"), values.pop("timestep")
    with torch.inference_mode():
        return patcher.model.diffusion_model(x, timestep, **values, **more).float().cpu()


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_compile(backend: str, tiny: Path, load) -> None:
    """Inductor compiles the layers around the blocks, in another order of roundings."""
    patcher, dense, arguments = load(backend), load_dense(tiny), inputs(open_checkpoint(tiny), size=16, tokens=20)
    # ComfyUI multiplies it by 1000 in 16 bits, which Inductor leaves out: 3.5 has quite another embedding then.
    arguments["guidance"] = torch.full_like(arguments["guidance"], 4.0)
    plain = forward(patcher, arguments)
    error = relative(plain, forward(dense, arguments))
    flux = patcher.model.diffusion_model
    torch._dynamo.reset()
    try:
        outs = []
        for model in (patcher, dense):
            model.model.diffusion_model.compile()
            outs += [forward(model, arguments), forward(model, arguments)]
        assert torch.equal(outs[0], outs[1])
        assert relative(outs[0], plain) <= error
        assert relative(outs[0], outs[2]) <= 1.5 * error
        assert flux.double_blocks[0].graphs.count() == len(flux.double_blocks) + len(flux.single_blocks)
    finally:
        torch._dynamo.reset()


def test_loras_of_a_rank_beyond_the_kernels_are_applied_beside_them(tiny: Path, load) -> None:
    import comfy.sd

    hidden = open_checkpoint(tiny).config.hidden_size
    generator = torch.Generator().manual_seed(0)
    lora = {
        f"diffusion_model.single_blocks.0.linear1.lora_{name}.weight": torch.randn(*shape, generator=generator) * 0.1
        for name, shape in (("down", (300, hidden)), ("up", (7 * hidden, 300)))
    }
    arguments = inputs(open_checkpoint(tiny), size=16, tokens=64, batch=1)
    patcher, dense = load("int4"), load_dense(tiny)
    base = relative(forward(patcher, arguments), forward(dense, arguments))
    patched, expected = (comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0)[0] for model in (patcher, dense))
    assert relative(forward(patched, arguments), forward(expected, arguments)) <= 1.3 * base


@pytest.mark.parametrize("backend", BACKENDS)
def test_graphs_under_loras(backend: str, tiny: Path, load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On, another strength, off, two at once: the bits of a model without graphs; a strength needs no new graphs."""
    import comfy.sd
    import comfy.utils
    from test_memory_modes import write_lora

    from svdq.model import graphs

    write_lora(tmp_path / "lora.safetensors", open_checkpoint(tiny).config)
    lora = comfy.utils.load_torch_file(str(tmp_path / "lora.safetensors"))
    lora = {name: tensor for name, tensor in lora.items() if not name.endswith("diff_b")}
    arguments = inputs(open_checkpoint(tiny), size=16, tokens=64, batch=1)
    patcher = load(backend)

    def run(*strengths: float) -> torch.Tensor:
        patched = patcher
        for strength in strengths:
            patched = comfy.sd.load_lora_for_models(patched, None, lora, strength, 0)[0]
        return forward(patched, arguments)

    cases = [(0.8,), (0.3,), (), (0.8,), (0.8, -0.5), (0.3,), (), (-0.2, 0.8)]
    with monkeypatch.context() as patch:
        patch.setattr(graphs, "enabled", lambda: False)
        expected = {strengths: run(*strengths) for strengths in set(cases)}
    captures = []
    capture = graphs.BlockGraphs._capture
    monkeypatch.setattr(graphs.BlockGraphs, "_capture", lambda *a: captures.append(1) or capture(*a))
    counts = []
    for strengths in cases:
        assert torch.equal(run(*strengths), expected[strengths]), strengths
        counts.append(len(captures))
    assert counts[0] > 0
    assert counts[1] == counts[0], "another strength needed new graphs"
    assert counts[2] > counts[1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_loras_stay_fused(backend: str, tiny: Path, load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On and off again, two of them, a change of strength; beside the dense model with the same LoRAs."""
    import comfy.sd
    import comfy.utils
    from comfy.ldm.flux.layers import DoubleStreamBlock
    from test_memory_modes import write_lora

    write_lora(tmp_path / "lora.safetensors", open_checkpoint(tiny).config)
    lora = comfy.utils.load_torch_file(str(tmp_path / "lora.safetensors"))
    lora = {name: tensor for name, tensor in lora.items() if not name.endswith("diff_b")}  # biases are not fused

    def with_loras(patcher, *strengths: float):
        for strength in strengths:
            patcher = comfy.sd.load_lora_for_models(patcher, None, lora, strength, 0)[0]
        return patcher

    arguments = inputs(open_checkpoint(tiny), size=16, tokens=64, batch=1)
    patcher, dense = load(backend), load_dense(tiny)
    plain = forward(patcher, arguments)
    base = relative(plain, forward(dense, arguments))
    stock_blocks = []
    stock = DoubleStreamBlock.forward
    for strengths in ((0.8,), (0.8, -0.5), (0.3,)):
        with monkeypatch.context() as patch:
            patch.setattr(DoubleStreamBlock, "forward", lambda *a, **k: stock_blocks.append(1) or stock(*a, **k))
            actual = forward(with_loras(patcher, *strengths), arguments)
        assert not stock_blocks, "a block with a plain LoRA fell back to the stock forward"
        assert relative(actual, plain) > 1e-3
        assert relative(actual, forward(with_loras(dense, *strengths), arguments)) <= 1.3 * base
    assert torch.equal(forward(patcher, arguments), plain)
