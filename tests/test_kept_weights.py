"""INT8 copies of weights that stay in VRAM: the same bits, honest sizes, and nothing left behind.

Without a GPU the INT8 layers compute in PyTorch, by the functions of kernels/reference.py in place of the kernels.
"""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import reference_layers
import torch
from flux_models import forward, inputs, relative
from int8_files import with_int8
from test_flux_blocks_cpu import PlainLayers
from test_memory_modes import write_lora

from svdq.kernels import reference
from svdq.loaders import open_checkpoint

pytestmark = pytest.mark.comfy

FREE = 10**12  # bytes


@pytest.fixture(scope="module")
def lora(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    import comfy.utils

    file = tmp_path_factory.mktemp("kept") / "lora.safetensors"
    write_lora(file, open_checkpoint(tiny).config)
    return {key: value for key, value in comfy.utils.load_torch_file(str(file)).items() if not key.endswith("diff_b")}


@pytest.fixture(scope="module")
def arguments(tiny: Path) -> dict:
    return inputs(open_checkpoint(tiny), size=8, tokens=4, batch=1)


# ---- stand-ins for kernels


def expand(part, out=None):
    from svdq.kernels.weights_int8 import W8

    made = reference.expand_w4_to_int8(part.unpack())
    expand.calls += 1
    if out is None:
        return W8(*made, part.act_unsigned)
    for tensor, value in zip((out.q, out.scales, out.sums)[: 2 + part.act_unsigned], made, strict=False):
        tensor.copy_(value)
    return out


def factors(part, proj_down=None, proj_up=None):
    natural = part.unpack()
    factors.calls += 1
    if proj_down is None:
        return natural.proj_down, natural.proj_up
    return proj_down.copy_(natural.proj_down), proj_up.copy_(natural.proj_up)


def quantize(x, part, proj_down, scale=None, shift=None, layers=1):
    x = x if scale is None else reference.layer_norm_modulate(x, scale, shift)
    return reference_layers.quantize_act_int8(x.to(part.smooth_factor.dtype), part, proj_down, layers=layers)


def gemm(codes, scales, lora_act, weight, proj_up, bias=None, after=None, out=None):
    y = codes.double() @ weight.q.double().t()
    if weight.act_unsigned:
        y += 128 * weight.sums.double()
    y = y * scales.double()[:, None] * weight.scales.double() + lora_act.double() @ proj_up.double().t()
    y = (y if bias is None else y + bias.double()).float()
    if after is not None and after.gelu:
        return reference.gelu(y)
    return PlainLayers()._finish(y, after, out)


class Graphs:
    """None; counts how often they are given up, and keeps what they would be known by."""

    cleared = 0

    def __init__(self):
        self.places = weakref.WeakKeyDictionary()  # block: of its last run

    def run(self, block, kind, places, compute, attend, apart, tensors, streams):
        assert not apart and isinstance(hash(kind), int)
        self.places[block] = places
        compute(attend, *tensors)
        return tensors[:streams]

    def clear(self):
        self.cleared += 1
        return 0


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch):
    """kernels.layers on the CPU."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("ComfyUI runs on the GPU here: see test_kept_weights_gpu.py")
    from svdq.kernels import kept_int8, layers
    from svdq.model import flux
    from svdq.model.ops import QuantizedLinear

    for module, functions in (
        (kept_int8, {"expand_w4_to_int8": expand, "natural_factors": factors}),
        (layers, {"quantize_act_int8": quantize, "gemm_w8a8": gemm}),
    ):
        for name, function in functions.items():
            monkeypatch.setattr(module, name, function)
    monkeypatch.setattr(layers.Layers, "device_type", "cpu")
    monkeypatch.setattr(layers.Layers, "compile_once", lambda self, key, compute: None)  # these are not Triton's
    monkeypatch.setattr(flux, "torch_attention", lambda options: True)  # which graphs can hold
    plain = QuantizedLinear.plain
    # float32 activations, the type that ComfyUI computes in on a CPU
    monkeypatch.setattr(QuantizedLinear, "plain", lambda self, dtype: plain(self, self.weight._params.scale.dtype))
    monkeypatch.setattr(QuantizedLinear, "_has_room", lambda self, ranks: True)
    expand.calls = factors.calls = 0
    return layers


@pytest.fixture
def load(tiny: Path, kernels, free):
    from svdq.model import flux, load_flux

    def load(weights: str, path: Path = tiny):
        patcher = load_flux(str(path), "16bit")
        flux.fuse_blocks(patcher.model.diffusion_model, SimpleNamespace(kernels=True, layers=kernels.INT8), weights)
        graphs = Graphs()
        for block in flux.fused_blocks(patcher.model.diffusion_model):
            block.graphs = block.kept._graphs = graphs
            for norm in map(block.get_submodule, block.norms):  # or they would be converted each time
                norm.weight = torch.nn.Parameter(norm.weight.float(), requires_grad=False)
        return patcher

    return load


@pytest.fixture
def free(comfy, monkeypatch: pytest.MonkeyPatch):
    """Bytes of VRAM that ComfyUI finds free: a function to set them."""
    import comfy.model_management as management

    found = management.get_free_memory

    def set_free(size: int) -> None:
        def free_memory(device=None, torch_free_too=False):
            return found(device, torch_free_too) if torch_free_too else size

        monkeypatch.setattr(management, "get_free_memory", free_memory)

    set_free(FREE)
    return set_free


def kept_of(patcher):
    from svdq.model.flux import fused_blocks

    return fused_blocks(patcher.model.diffusion_model)[0].kept


def parts_of(patcher) -> list:
    from svdq.model.flux import fused_blocks

    blocks = fused_blocks(patcher.model.diffusion_model)
    return [part for block in blocks for name in block.linears for part in block.get_submodule(name).stored_parts()]


def with_lora(patcher, lora: dict, *strengths: float):
    import comfy.sd

    for strength in strengths:
        patcher = comfy.sd.load_lora_for_models(patcher, None, lora, strength, 0)[0]
    return patcher


# ---- the memory


@pytest.mark.parametrize("rank", [0, 16, 48])
@pytest.mark.parametrize("unsigned", [False, True])
def test_what_is_kept_of_a_part_lies_side_by_side(unsigned: bool, rank: int) -> None:
    pytest.importorskip("triton")
    from test_gemm_int8 import layer

    from svdq.kernels.kept_int8 import kept_bytes, kept_views

    part = layer(384, 256, rank, torch.bfloat16, unsigned).pack()
    memory = torch.zeros(kept_bytes(part) + 512, dtype=torch.uint8)
    w8, low_rank = kept_views(part, memory)
    views = [w8.q, w8.scales, *([w8.sums] if unsigned else []), *(low_rank if rank else [])]
    shapes = [(384, 256), (384,), *([(384,)] if unsigned else []), *([(rank, 256), (384, rank)] if rank else [])]
    assert [tuple(view.shape) for view in views] == shapes
    assert all((view.data_ptr() - memory.data_ptr()) % 512 == 0 for view in views)
    for view in views:
        assert not view.view(torch.uint8).any(), "views overlap"
        view.view(torch.uint8).fill_(1)
    assert memory.sum() == sum(view.nbytes for view in views)
    assert not memory[-512:].any()
    assert w8.act_unsigned == unsigned


# ---- the same bits


def test_no_bit_changes(load, arguments: dict, lora: dict) -> None:
    """Plain, with LoRAs, another strength, two of them, without again, after an unload; expanded once each time."""
    import comfy.model_management as management

    expanding, keeping = load("int4"), load("int8")
    parts = len(parts_of(keeping))
    expected = {strengths: forward(with_lora(expanding, lora, *strengths), arguments)
                for strengths in ((), (0.8,), (0.3,), (0.8, -0.5))}  # fmt: skip
    assert relative(expected[(0.8,)], expected[()]) > 1e-3
    assert expand.calls == 4 * parts and kept_of(expanding).held == 0
    expand.calls = 0
    for strengths in ((), (), (0.8,), (0.3,), (), (0.8, -0.5), (0.8,), ()):
        assert torch.equal(forward(with_lora(keeping, lora, *strengths), arguments), expected[strengths]), strengths
    assert expand.calls == parts
    forward(with_lora(keeping, lora, 0.8), arguments)
    factors.calls = 0
    forward(with_lora(keeping, lora, 0.8), arguments)
    assert factors.calls == 0, "nothing has changed"
    forward(with_lora(keeping, lora, 0.7), arguments)
    assert 0 < factors.calls < parts, "those of layers with a LoRA"
    forward(keeping, arguments)
    assert not any(memory.loras for memory in kept_of(keeping)._memories.values())
    management.unload_all_models()
    assert torch.equal(forward(keeping, arguments), expected[()])
    assert expand.calls == 2 * parts


def test_two_models_of_one_file(load, arguments: dict) -> None:
    import comfy.model_management as management

    first, second = load("int8"), load("int8")
    expected = forward(first, arguments)
    assert torch.equal(forward(second, arguments), expected)
    assert kept_of(first).held == kept_of(second).held > 0
    first.detach()
    assert kept_of(first).held == 0 < kept_of(second).held
    expand.calls = 0
    assert torch.equal(forward(second, arguments), expected) and expand.calls == 0
    management.unload_all_models()


def test_a_weight_that_is_replaced_is_expanded_anew(load, arguments: dict) -> None:
    keeping, expanding = load("int8"), load("int4")
    before = forward(keeping, arguments)
    for patcher in (keeping, expanding):
        flux = patcher.model.diffusion_model
        flux.single_blocks[0].linear1.weight = torch.nn.Parameter(flux.single_blocks[1].linear1.weight, False)
    actual = forward(keeping, arguments, load=False)
    assert not torch.equal(actual, before)
    assert torch.equal(actual, forward(expanding, arguments))


# ---- when


@pytest.mark.parametrize("weights", ["auto", "int4", "int8"])
def test_the_rule(weights: str, load, free, arguments: dict, caplog: pytest.LogCaptureFixture) -> None:
    import comfy.model_management as management

    from svdq.model.flux import fused_blocks

    patcher = load(weights)
    needed = kept_of(patcher).needed(fused_blocks(patcher.model.diffusion_model))
    least = {"auto": 2 * needed, "int8": needed + int(management.minimum_inference_memory())}.get(weights)
    for size, keeps in ((FREE, True),) if least is None else ((least - 1, False), (least, True)):
        free(size)
        caplog.clear()
        with caplog.at_level("INFO"):
            forward(patcher, arguments)
        keeps = keeps and weights != "int4"
        assert (kept_of(patcher).held > 0) == keeps
        lines = [record.levelname for record in caplog.records if "kept in INT8 too" in record.getMessage()]
        assert lines == {"auto": ["INFO"], "int4": [], "int8": ["INFO" if keeps else "WARNING"]}[weights]
        free(FREE if not keeps else 0)
        forward(patcher, arguments)
        assert (kept_of(patcher).held > 0) == keeps, "decided when the model is loaded, until it is loaded anew"
        management.unload_all_models()


def test_a_choice_without_effect_is_named(tiny: Path, comfy, caplog: pytest.LogCaptureFixture) -> None:
    from svdq.model import load_flux

    load_flux(str(tiny), "16bit", "int8")
    assert [record for record in caplog.records if "weights int8 changes nothing" in record.getMessage()]
    with pytest.raises(ValueError, match="weights is 'fp8', expected one of auto, int4, int8"):
        load_flux(str(tiny), "16bit", "fp8")


def test_sizes(load, arguments: dict, lora: dict) -> None:
    """ComfyUI is told of copies that are or will be there, makes room for those that were asked for, and takes them
    first; a clone and the stock size of the weights know nothing of them."""
    from svdq.model.flux import fused_blocks

    int4, auto, int8 = (load(weights) for weights in ("int4", "auto", "int8"))
    weights = int4.model_size()
    needed = kept_of(int8).needed(fused_blocks(int8.model.diffusion_model))
    assert needed >= sum(part.n * part.k for part in parts_of(int8))
    assert [auto.model_size(), int8.model_size()] == [weights, weights + needed]
    for patcher in (auto, int8):
        for model in (patcher, patcher.clone(), with_lora(patcher, lora, 0.5)):
            forward(model, arguments)
            assert model.model_size() == model.loaded_size() == weights + needed
            assert model.size in (0, weights)
            assert model.model.model_loaded_weight_memory == weights
        cleared = kept_of(patcher)._graphs.cleared
        assert patcher.partially_unload(torch.device("cpu"), 1) == needed
        assert patcher.model_size() == patcher.loaded_size() == weights
        assert kept_of(patcher)._graphs.cleared > cleared, "graphs read what is gone"
        forward(patcher, arguments)
        assert patcher.loaded_size() == weights, "given back until the model is loaded anew"


def test_a_block_that_runs_layer_by_layer_keeps_nothing(load, tiny: Path, tmp_path: Path, arguments: dict) -> None:
    """And no room is asked for it."""
    from svdq.model.flux import fused_blocks

    names = "double_blocks.0.img_mlp.2", "single_blocks.1.modulation.lin"
    whole, patcher = load("int8"), load("int8", with_int8(tiny, names, tmp_path / "int8.safetensors"))
    blocks, all_blocks = (fused_blocks(one.model.diffusion_model) for one in (patcher, whole))
    first = kept_of(whole).needed(all_blocks) - kept_of(patcher).needed(blocks)
    assert first == load("int8").model.diffusion_model.double_blocks[0].kept.needed(all_blocks[:1]) > 0
    forward(patcher, arguments)
    assert kept_of(patcher).held == kept_of(patcher).needed(blocks)


def test_more_than_the_copies_is_asked_back(load, arguments: dict) -> None:
    patcher = load("auto")
    expected = forward(patcher, arguments)
    needed, weights = kept_of(patcher).held, patcher.model.model_loaded_weight_memory
    freed = patcher.partially_unload(torch.device("cpu"), needed + 10_000)
    assert needed + 10_000 <= freed < needed + weights
    assert patcher.loaded_size() == needed + weights - freed
    assert torch.equal(forward(patcher, arguments, load=False), expected)
    assert kept_of(patcher).held == 0


def test_nothing_is_left(load, arguments: dict, lora: dict) -> None:
    """After the copies are given back, after an unload, and after the model itself is gone."""
    import comfy.model_management as management

    def memories(patcher) -> list:
        return [weakref.ref(memory.bytes.untyped_storage()) for memory in kept_of(patcher)._memories.values()]

    def give_back(patcher) -> None:
        patcher.partially_unload(torch.device("cpu"), 1)

    patcher = load("auto")
    forward(with_lora(patcher, lora, 0.5), arguments)
    for leave in (give_back, lambda patcher: management.unload_all_models()):
        forward(patcher, arguments)
        found = memories(patcher)
        assert found
        leave(patcher)
        assert not any(memory() for memory in found)
        management.unload_all_models()
    forward(patcher, arguments)
    found = memories(patcher)
    del patcher
    management.cleanup_models_gc()
    gc.collect()
    assert found and not any(memory() for memory in found)


def test_memory_goes_with_the_model(load, arguments: dict) -> None:
    """At once: what a block keeps for its next call are no cycles that wait for the garbage collector."""
    import comfy.model_management as management

    patcher = load("auto")
    forward(patcher, arguments)
    flux = patcher.model.diffusion_model
    found = [weakref.ref(flux.double_blocks[0]), weakref.ref(flux.single_blocks[0].linear1.weight)]
    management.unload_all_models()
    gc.collect()
    gc.disable()
    try:
        del patcher, flux
        assert [reference() for reference in found] == [None, None]
    finally:
        gc.enable()


def test_no_memory_after_all(load, arguments: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    from svdq.model import kept_weights

    expected, patcher = forward(load("int4"), arguments), load("int8")
    left = [3]

    def empty(*size, **options):
        left[0] -= 1
        if left[0] < 0:
            raise torch.OutOfMemoryError("out of memory")
        return torch.empty(*size, **options)

    monkeypatch.setattr(kept_weights, "torch", SimpleNamespace(**vars(torch) | {"empty": empty}))
    assert torch.equal(forward(patcher, arguments), expected)
    assert kept_of(patcher).held == 0 and patcher.model_size() == patcher.loaded_size()
    assert torch.equal(forward(patcher, arguments), expected)
    assert left[0] == -1, "not tried again"


# ---- dynamic VRAM


class FakeVBAR:
    """comfy-aimdo's pages, one for each allocation, at addresses that stay. ``taken``: as many of the last are gone."""

    def __init__(self, size: int, device: int | None) -> None:
        self.max_size, self.taken, self.pins = size, 0, 0
        self.memory = torch.empty(size, dtype=torch.uint8)
        self.pages: list[torch.Tensor] = []
        self.serials: list[int] = []
        self.there: list[bool] = []

    def prioritize(self) -> None:
        self.taken = 0

    def alloc(self, size: int):
        start = sum(page.nbytes for page in self.pages)
        assert start + size <= self.max_size
        self.pages.append(self.memory[start : start + size])
        self.serials.append(0)
        self.there.append(False)
        return self, len(self.pages) - 1, size

    def fault(self, index: int, size: int):
        if index >= len(self.pages) - self.taken:
            return None
        if not self.there[index]:
            self.there[index] = True
            self.serials[index] += 1
        self.pins += 1
        return self.serials[index]

    def loaded_size(self) -> int:
        return sum(page.nbytes for page, there in zip(self.pages, self.there, strict=True) if there)

    def free_memory(self, size: float) -> int:
        freed = 0
        while freed < size and self.taken < len(self.pages):
            self.taken += 1
            index = len(self.pages) - self.taken
            freed += self.pages[index].nbytes * self.there[index]
            self.there[index] = False
            self.pages[index].fill_(99)  # whoever still reads it finds something else
        return freed


@pytest.fixture
def aimdo(monkeypatch: pytest.MonkeyPatch) -> None:
    from svdq.model import kept_weights

    def unpin(place) -> None:
        place[0].pins -= 1

    vbar = SimpleNamespace(ModelVBAR=FakeVBAR, vbar_fault=lambda place: place[0].fault(*place[1:]), vbar_unpin=unpin,
                           vbar_signature_compare=lambda a, b: a is not None and a == b)  # fmt: skip
    views = SimpleNamespace(aimdo_to_tensor=lambda place, device: place[0].pages[place[1]])
    monkeypatch.setattr(kept_weights, "comfy_aimdo", SimpleNamespace(model_vbar=vbar, torch=views))
    monkeypatch.setattr("comfy_aimdo.model_vbar.vbar_unpin", unpin)


def test_pages_come_and_go(load, aimdo, arguments: dict) -> None:
    import comfy.model_management as management

    from svdq.model.flux import fused_blocks

    expected, patcher = forward(load("int4"), arguments), load("auto")
    blocks, kept = fused_blocks(patcher.model.diffusion_model), kept_of(patcher)
    kept.decide(blocks, torch.device("cpu"), FREE, True)
    kept.prioritize()
    parts = len(parts_of(patcher))
    expand.calls = 0
    assert torch.equal(forward(patcher, arguments), expected) and expand.calls == parts
    assert torch.equal(forward(patcher, arguments), expected) and expand.calls == parts
    vbar = kept._vbar
    assert kept.held == vbar.loaded_size() == kept.needed(blocks)
    assert not vbar.pins, "pages stay pinned"
    freed = patcher.partially_unload(torch.device("cpu"), kept.needed(blocks) // 2)
    assert kept.needed(blocks) // 2 <= freed < kept.needed(blocks)
    assert kept.held == kept.needed(blocks) - freed
    graphs, places = kept._graphs.cleared, dict(kept._graphs.places)
    expand.calls = 0
    assert torch.equal(forward(patcher, arguments, load=False), expected)
    assert 0 < expand.calls < parts, "those of the blocks whose pages are gone, before each product"
    other = [block for block in blocks if kept._graphs.places[block] != places[block]]
    assert other == blocks[-vbar.taken :], "graphs that read pages which are gone must not run"
    expand.calls = 0
    vbar.prioritize()
    for _ in range(2):
        assert torch.equal(forward(patcher, arguments, load=False), expected)
        assert 0 < expand.calls < parts, "the same again, once"
    assert kept.held == kept.needed(blocks) and kept._graphs.cleared == graphs
    assert kept._graphs.places == places, "at the addresses that graphs know"
    management.unload_all_models()
    patcher.detach()
    assert kept.held == 0 and kept._vbar is None
