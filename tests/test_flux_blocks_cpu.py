"""The wiring of fused blocks without a GPU: layers in PyTorch in place of kernels, against ComfyUI's own blocks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from files import read_all
from flux_models import forward, inputs, relative
from safetensors.torch import save_file
from test_memory_modes import write_lora

from svdq.cli.dequantize import effective
from svdq.kernels import reference
from svdq.loaders import open_checkpoint

pytestmark = pytest.mark.comfy

LIMIT = 1e-5  # float32, sums in another order


class PlainLayers:
    """What kernels.layers.Layers offers, with activations as they are. Counts its products."""

    device_type, max_rank = "cpu", None

    def __init__(self) -> None:
        self.products = 0

    @staticmethod
    def after(**parts):
        return SimpleNamespace(**dict.fromkeys(("gate", "residual", "norm_q", "norm_k", "rotary")) | parts)

    @staticmethod
    def modulation(scale, shift):
        return SimpleNamespace(scale=scale, shift=shift)

    def compile_once(self, key, compute):
        assert isinstance(hash(key), int)

    def quantize(self, x, part, modulation=None):
        assert x.shape[1] == part.k
        return x if modulation is None else reference.layer_norm_modulate(x, modulation.scale, modulation.shift)

    def quantize_for(self, x, parts, modulation):
        first, second = parts
        assert second.smooth_factor is first.smooth_factor, "these could share their input"
        return tuple(self.quantize(x, part, modulation) for part in parts)

    def multiply(self, x, part, bias, after=None, out=None):
        self.products += 1
        return self._finish(self._product(x, part, bias), after, out)

    def multiply_sum(self, first, first_part, second, second_part, bias, after=None, out=None):
        self.products += 1
        y = self._product(first, first_part, bias) + self._product(second, second_part, None)
        return self._finish(y, after, out)

    def gelu_input(self, x, part, bias, following):
        assert following.k == part.n
        return torch.nn.functional.gelu(self._product(x, part, bias), approximate="tanh")

    def _product(self, x, part, bias):
        dense, shift = reference.dequantize_w4a4(part.unpack(), x.dtype)
        y = x @ dense.t()
        y = y if bias is None else y + bias.to(y.dtype)
        return y if shift is None else y + shift

    def _finish(self, y, after, out):
        if after is not None and after.gate is not None:
            rows = len(y) // len(after.gate)
            y = after.residual + after.gate.repeat_interleave(rows, dim=0) * y
        if after is not None and after.rotary is not None:
            heads = y.reshape(len(y), 3, -1, 128)
            q, k = (
                reference.rms_norm_rope(heads[:, i].contiguous(), norm, after.rotary)
                for i, norm in enumerate((after.norm_q, after.norm_k))
            )
            y = torch.stack((q, k, heads[:, 2]), dim=1).reshape(y.shape)
        return y if out is None else out.copy_(y)


@pytest.fixture
def models(tiny: Path, monkeypatch: pytest.MonkeyPatch):
    return load_both(tiny, monkeypatch)


def load_both(path: Path, monkeypatch: pytest.MonkeyPatch):
    """(MODEL with fused blocks, the same with stock ones, the layers of the first)."""
    from svdq.model import flux, load_flux
    from svdq.model.ops import QuantizedLinear, is_quantized

    plain = QuantizedLinear.plain
    # float32 activations, the type that ComfyUI computes in on a CPU
    monkeypatch.setattr(
        QuantizedLinear, "plain",
        lambda self, dtype: plain(self, self.weight._params.scale.dtype if is_quantized(self.weight) else dtype),
    )  # fmt: skip
    monkeypatch.setattr(QuantizedLinear, "_has_room", lambda self, ranks: True)
    layers = PlainLayers()
    fused, stock = load_flux(str(path), "16bit"), load_flux(str(path), "16bit")
    flux.fuse_blocks(fused.model.diffusion_model, SimpleNamespace(kernels=True, layers=layers))
    for block in (*fused.model.diffusion_model.double_blocks, *fused.model.diffusion_model.single_blocks):
        block.graphs = SimpleNamespace(clear=lambda: None)  # none are recorded on a CPU
    return fused, stock, layers


@pytest.mark.parametrize(("size", "tokens", "batch"), [(16, 20, 1), (16, 20, 2), (10, 7, 3)])
def test_fused_blocks_are_the_stock_ones(models, tiny: Path, size: int, tokens: int, batch: int) -> None:
    fused, stock, layers = models
    arguments = inputs(open_checkpoint(tiny), size=size, tokens=tokens, batch=batch)
    assert relative(forward(fused, arguments), forward(stock, arguments)) < LIMIT
    assert layers.products > 0


def test_a_linear_in_16_bits_takes_its_block_out(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of the quantizer with exceptions: of a linear, and of a modulation layer, whose block is fused all the
    same."""
    tensors, metadata = read_all(tiny)
    for name, stored in (("single_blocks.0.linear2", ("out_proj", "mlp_fc2")), ("single_blocks.1.modulation.lin", ())):
        weight, bias = effective(open_checkpoint(tiny).layer(name), torch.bfloat16)
        tensors |= {f"{name}.weight": weight, f"{name}.bias": bias}
        theirs = f"single_transformer_blocks.{name.split('.')[1]}"
        gone = [f"{theirs}.{layer}." for layer in stored or ("norm.linear",)]
        tensors = {key: value for key, value in tensors.items() if not key.startswith(tuple(gone))}
    save_file(tensors, tmp_path / "kept.safetensors", metadata)
    counts = []
    for path in (tiny, tmp_path / "kept.safetensors"):
        fused, stock, layers = load_both(path, monkeypatch)
        arguments = inputs(open_checkpoint(path))
        assert relative(forward(fused, arguments), forward(stock, arguments)) < LIMIT
        counts.append(layers.products)
    single = 3  # qkv of each of two pictures; the sum of attention output and fc2
    assert counts[1] == counts[0] - single


@pytest.mark.parametrize("batch", [1, 2])
def test_weights_that_core_brings_are_used_before_the_next_ones_come(
    models, tiny: Path, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Core brings offloaded weights through buffers that it writes over: here, each time, all that came before."""
    import comfy.ops

    from svdq.model import flux, ops

    fused, stock, layers = models
    arguments = inputs(open_checkpoint(tiny), batch=batch)
    expected = forward(stock, arguments)
    forward(fused, arguments)
    products, brought = layers.products, []

    def bring(module, *args, **options):
        while brought:
            for tensor in brought.pop():
                tensor.fill_(-1 if tensor.dtype.is_floating_point else 0)
        weight, bias, stream = cast(module, *args, **options)
        weight, bias = weight.clone(), None if bias is None else bias.clone()
        inner = list(weight.state_dict("").values()) if ops.is_quantized(weight) else [weight]
        brought.append([*inner, *([] if bias is None else [bias])])
        return weight, bias, stream

    cast = comfy.ops.cast_bias_weight
    monkeypatch.setattr(comfy.ops, "cast_bias_weight", bring)
    for module in (flux, ops):
        monkeypatch.setattr(module, "resident", lambda module, device, pins: None)
    assert relative(forward(fused, arguments, load=False), expected) < LIMIT
    assert layers.products == 2 * products and brought


@pytest.mark.parametrize("axes_dim", [(16, 56, 56), (64, 64)])
def test_rotations_are_the_stock_ones(comfy, axes_dim: tuple[int, ...]) -> None:
    """To the last bit, at whole positions and at those between them, which some nodes make."""
    from comfy.ldm.flux.layers import EmbedND

    from svdq.model.flux import FusedEmbedND

    generator = torch.Generator().manual_seed(0)
    whole = torch.randint(0, 300, (2, 70, len(axes_dim)), generator=generator).float()
    sizes = {"dim": sum(axes_dim), "theta": 10000, "axes_dim": list(axes_dim)}
    stock, fused = EmbedND(**sizes), FusedEmbedND(**sizes)
    for ids in (whole, whole[:1] * 0.37 - 5, whole.bfloat16()):
        expected, found = stock(ids), fused(ids)
        assert found.shape == expected.shape and found.dtype == expected.dtype == torch.float32
        assert torch.equal(found, expected)
    assert torch.equal(fused(whole[..., :1]), stock(whole[..., :1])), "fewer axes than the model has"


def test_torch_compile_leaves_blocks_out(models, tiny: Path) -> None:
    """The whole model, as TorchCompileModel does it, but for the backend."""
    fused, _, layers = models
    arguments, compiled_parts = inputs(open_checkpoint(tiny)), []
    expected = forward(fused, arguments)
    products = layers.products

    def backend(part, _):
        compiled_parts.append(part)
        return part.forward

    torch._dynamo.reset()
    compiled = torch.compile(fused.model.diffusion_model, backend=backend)
    values = {name: value.clone() for name, value in arguments.items()}
    x, timestep = values.pop("x"), values.pop("timestep")
    with torch.inference_mode():
        assert relative(compiled(x, timestep, **values).float(), expected) < LIMIT
        parts = len(compiled_parts)
        assert relative(compiled(x, timestep, **values).float(), expected) < LIMIT
    assert layers.products == 3 * products
    assert 0 < parts == len(compiled_parts), "something was compiled, and only once"
    torch._dynamo.reset()


def test_loras_are_in_the_low_rank_branch(models, tiny: Path, tmp_path: Path) -> None:
    import comfy.sd
    import comfy.utils

    fused, stock, layers = models
    write_lora(tmp_path / "lora.safetensors", open_checkpoint(tiny).config)
    lora = comfy.utils.load_torch_file(str(tmp_path / "lora.safetensors"))
    lora = {name: tensor for name, tensor in lora.items() if not name.endswith("diff_b")}
    arguments = inputs(open_checkpoint(tiny))
    before = forward(fused, arguments)
    products = layers.products
    patched = [comfy.sd.load_lora_for_models(model, None, lora, 0.7, 0)[0] for model in (fused, stock)]
    actual, expected = (forward(model, arguments) for model in patched)
    assert layers.products == 2 * products, "a block fell back to the stock forward"
    # Columns are rounded to the file's 16-bit type there, to float32 here.
    assert relative(actual, expected) < 5e-3 < relative(actual, before)
    assert torch.equal(forward(fused, arguments), before)


def test_a_mask_and_an_override_reach_the_attention(models, tiny: Path) -> None:
    fused, stock, _ = models
    arguments = inputs(open_checkpoint(tiny), batch=1)
    length = arguments["context"].shape[1] + arguments["x"].shape[-1] ** 2 // 4
    mask = torch.zeros(1, length, length).masked_fill(torch.rand(1, length, length) < 0.2, -1e4)
    masked = [run(model, arguments, attention_mask=mask) for model in (fused, stock)]
    assert relative(*masked) < LIMIT < relative(masked[0], run(fused, arguments))
    seen = []

    def override(function, *args, **options):
        seen.append(1)
        return function(*args, **options)

    options = {"optimized_attention_override": override}
    assert relative(run(fused, arguments, transformer_options=options), run(stock, arguments)) < LIMIT
    flux = fused.model.diffusion_model
    assert len(seen) == len(flux.double_blocks) + len(flux.single_blocks)


@pytest.mark.parametrize("patch", ["attn1_patch", "attn1_output_patch"])
def test_what_looks_inside_gets_the_stock_blocks(models, tiny: Path, patch: str) -> None:
    fused, stock, layers = models
    arguments, seen = inputs(open_checkpoint(tiny), batch=1), []

    def look(*args, **options):
        seen.append(1)
        return {} if patch == "attn1_patch" else args[0]

    actual = run(fused, arguments, transformer_options={"patches": {patch: [look]}})
    assert torch.equal(actual, run(stock, arguments))
    assert seen and not layers.products


@pytest.mark.parametrize("name", ["img_attn.norm.query_norm", "img_mlp", "txt_mod", "img_attn.proj"])
def test_what_is_hooked_to_a_part_or_put_in_its_place_is_called(models, tiny: Path, name: str) -> None:
    fused, _, layers = models
    arguments, seen = inputs(open_checkpoint(tiny), batch=1), []
    block = fused.model.diffusion_model.double_blocks[0]
    expected = run(fused, arguments)
    products, part = layers.products, block.get_submodule(name)
    handle = part.register_forward_hook(lambda *arguments: seen.append(1))
    assert relative(run(fused, arguments), expected) < LIMIT
    handle.remove()
    assert seen
    assert layers.products < 2 * products
    forward, products = part.forward, layers.products
    part.forward = lambda *arguments: seen.append(3) or forward(*arguments)
    assert relative(run(fused, arguments), expected) < LIMIT
    assert 3 in seen
    part.forward = forward  # the same as before: ComfyUI's bypass LoRA leaves it like this
    before = layers.products
    assert relative(run(fused, arguments), expected) < LIMIT
    assert layers.products - before > before - products

    class Wrapped(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *arguments):
            seen.append(2)
            return self.inner(*arguments)

    parent = block.get_submodule(name.rpartition(".")[0])
    setattr(parent, name.rpartition(".")[2], Wrapped(part))
    assert relative(run(fused, arguments), expected) < LIMIT
    assert 2 in seen


def test_patches_between_blocks_see_what_they_would(models, tiny: Path) -> None:
    """patches_replace gets and returns the same tensors as with stock blocks."""
    fused, stock, _ = models
    arguments = inputs(open_checkpoint(tiny), batch=1)

    def replace(args, extra):
        out = extra["original_block"](args)
        return {name: value * 0.5 for name, value in out.items()}

    options = {"patches_replace": {"dit": {("double_block", 0): replace, ("single_block", 1): replace}}}
    actual, expected = (run(model, arguments, transformer_options=options) for model in (fused, stock))
    assert relative(actual, expected) < LIMIT < relative(actual, run(fused, arguments))


def run(patcher, arguments: dict, **more) -> torch.Tensor:
    import comfy.model_management as management

    management.load_models_gpu([patcher])
    values = {name: value.clone() for name, value in arguments.items()}
    x, timestep = values.pop("x"), values.pop("timestep")
    with torch.inference_mode():
        return patcher.model.diffusion_model(x, timestep, **values, **more).float()
