"""INT8 layers of a 4-bit model: the arithmetic against float64, kernels against PyTorch, and blocks that have some."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checks import OUTPUT_ROUNDING, relative_error
from conftest import find_comfyui
from flux_models import forward, inputs, load_dense, relative, rms_relative
from int8_files import NAMES, with_int8
from test_block_captures import SIDE, TOKENS, Graphs, on_cpu  # noqa: F401  a fixture
from test_flux_blocks import forward_once, unfused
from test_flux_blocks_cpu import LIMIT, load_both
from test_fused_arithmetic import SIZES
from test_memory_modes import MODES, check, write_lora
from test_offload import pinned  # noqa: F401  a fixture
from torch import Tensor

from svdq.kernels import layout, reference
from svdq.kernels.int4 import W8A8
from svdq.loaders import open_checkpoint
from svdq.quantizer import solve

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
# Products that a fused double block and a single one ask for: qkv, proj and fc2 of two streams; qkv and the last sum.
PRODUCTS = 6 + 2


def problem(m: int, n: int, k: int, dtype: torch.dtype) -> tuple[Tensor, W8A8, Tensor, tuple[Tensor, Tensor]]:
    """(x T [m, k] with an outlier channel and a token of zeros, weight, bias, a LoRA)."""
    generator = torch.Generator().manual_seed(m + n + k)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x = normal(m, k)
    x[:, 5] *= 30
    x[m // 2] *= m == 1
    smooth = (0.5 * normal(k)).exp().to(dtype)
    weight = solve.quantize_w8a8(normal(n, k) * k**-0.5, smooth)
    lora = ((normal(12, k) * k**-0.5).to(dtype), (0.3 * normal(n, 12)).to(dtype))
    return x.to(dtype), weight, normal(n).to(dtype), lora


def on_gpu(weight: W8A8) -> W8A8:
    return W8A8(weight.q.cuda(), weight.wscales.cuda(), weight.smooth_factor.cuda())


def test_a_weight() -> None:
    """Rows use the whole range, in steps that are at most half a code wrong; rows of zeros stay zeros."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(384, 256, generator=generator) * torch.rand(384, 1, generator=generator)
    weight[7] = 0
    smooth = (0.5 * torch.randn(256, generator=generator)).exp().bfloat16()
    made = solve.quantize_w8a8(weight, smooth)
    assert made.q.dtype == torch.int8 and made.wscales.dtype == torch.float32 and (made.n, made.k) == (384, 256)
    assert torch.equal(layout.unpack_vector(made.smooth_factor), smooth)
    largest = made.q.abs().amax(dim=1)
    assert largest[7] == 0 and (largest[torch.arange(384) != 7] == 127).all()
    smoothed = weight.double() * smooth.double()
    missed = (made.q.double() * made.wscales.double()[:, None] - smoothed).abs()
    assert (missed <= 0.5001 * made.wscales.double()[:, None]).all() and missed[7].max() == 0
    exact = made.q.double() * made.wscales.double()[:, None] / smooth.double()
    assert relative_error(reference.dequantize_w8a8(made), exact) < OUTPUT_ROUNDING[torch.float32]
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(reference.dequantize_w8a8(made, dtype), reference.dequantize_w8a8(made).to(dtype))


@DTYPES
@pytest.mark.parametrize("m", [1, 37])
def test_the_reference(m: int, dtype: torch.dtype) -> None:
    """Against float64, whose codes are the same but for ties."""
    x, weight, bias, (down, up) = problem(m, 256, 384, dtype)
    smooth = layout.unpack_vector(weight.smooth_factor)
    v = (x.double() / smooth.double()).to(dtype).double()
    scale = v.abs().amax(dim=1, keepdim=True) / 127
    codes = torch.where(scale > 0, v / scale, 0.0).round()
    assert codes.abs().max() == 127 or m == 1
    beside = bias.double() + (x.double() @ down.double().t()).to(dtype).double() @ up.double().t()
    expected = codes * scale @ (weight.q.double() * weight.wscales.double()[:, None]).t() + beside
    y = reference.linear_w8a8(x, weight, bias, (down, up))
    assert y.dtype == dtype and relative_error(y, expected) < 2 * OUTPUT_ROUNDING[dtype]
    alone = reference.linear_w8a8(x, weight, out_dtype=torch.float32)
    assert alone.dtype == torch.float32 and relative_error(alone, expected - beside) < 1e-3


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(1, 256, 384), (3, 18432, 3072), (37, 384, 128), (70, 256, 640), (129, 128, 15360), (1001, 3072, 12288)],
)
def test_kernels(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    """The exact product of the codes that they make; and as the reference, whatever the arithmetic of other layers.

    The yardstick for the latter is quantization itself, whose error is step / sqrt(12). Kernels and PyTorch may round
    0.01 % of the codes, and of a few codes three, to different sides: PyTorch rounds the quotient to float32 before.
    """
    from svdq.kernels.layers import INT4, INT8
    from svdq.kernels.quantize_int8 import quantize_act_int8

    x, weight, bias, _ = problem(m, n, k, dtype)
    x, weight, bias = x.cuda(), on_gpu(weight), bias.cuda()
    codes, scales, _ = quantize_act_int8(x, weight, x.new_empty(0, k))
    values = weight.q.double() * weight.wscales.double()[:, None]
    product = codes.double() * scales.double()[:, None] @ values.t()
    unquantized = (x.double() / layout.unpack_vector(weight.smooth_factor).double()) @ values.t()
    share = 1e-4 + 3 / x.numel()
    for b in (bias, torch.zeros_like(bias)):
        y, expected = INT8.linear_w8a8(x, weight, b), reference.linear_w8a8(x, weight, b)
        assert y.dtype == dtype and y.shape == (m, n)
        assert relative_error(y, product + b.double()) <= OUTPUT_ROUNDING[dtype]
        error = relative_error(expected, unquantized + b.double())
        assert relative_error(y, expected) <= (12 * share) ** 0.5 * error + OUTPUT_ROUNDING[dtype]
        assert torch.equal(y, INT8.linear_w8a8(x, weight, b)), "two runs differ"
        assert torch.equal(y, INT4.linear_w8a8(x, weight, b))
    assert torch.equal(INT8.linear_w8a8(x, weight, None), y), "no bias is one of zeros"


@pytest.mark.gpu
@DTYPES
def test_kernels_with_a_lora(dtype: torch.dtype) -> None:
    from svdq.kernels.layers import INT8

    x, weight, bias, lora = problem(2, 768, 256, dtype)
    x, weight, bias, lora = x.cuda(), on_gpu(weight), bias.cuda(), tuple(factor.cuda() for factor in lora)
    expected = reference.linear_w8a8(x, weight, bias, lora)
    found = INT8.linear_w8a8(x, weight, bias, lora)
    assert relative_error(found, expected) <= {torch.bfloat16: 6e-3, torch.float16: 9e-4}[dtype]  # rounded twice
    assert relative_error(INT8.linear_w8a8(x, weight, bias), expected) > 0.05


@pytest.fixture(scope="module")
def file(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_int8(tiny, NAMES, tmp_path_factory.mktemp("int8") / "int8.safetensors")


@pytest.mark.comfy
def test_a_linear_takes_its_block_out_of_fusing(tiny: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A modulation layer does not."""
    counts = []
    for path in (tiny, file):
        fused, stock, layers = load_both(path, monkeypatch)
        arguments = inputs(open_checkpoint(path), batch=1)
        assert relative(forward(fused, arguments), forward(stock, arguments)) < LIMIT
        counts.append(layers.products)
    assert counts[0] - counts[1] == PRODUCTS == counts[1]


@pytest.mark.comfy
def test_a_weight_on_its_way_to_a_gpu(file: Path, pinned) -> None:  # noqa: F811
    """In one piece, with every bit, whatever types it consists of."""
    from svdq.model import load_flux
    from svdq.model.offload import Staged, brought, inner_tensors

    linear = load_flux(str(file), "16bit").model.diffusion_model.get_submodule(NAMES[0])
    inside = inner_tensors(linear.weight)
    assert sorted(str(tensor.dtype) for tensor in inside.values()) == ["torch.bfloat16", "torch.float32", "torch.int8"]
    with brought(linear.weight, None, Staged.of(linear.weight), torch.device("cpu")) as (weight, _):
        there = inner_tensors(weight)
        assert there.keys() == inside.keys() and all(torch.equal(there[name], inside[name]) for name in inside)
        assert torch.equal(weight.dequantize(), linear.weight.dequantize())
    assert list(pinned.values()) == []


@pytest.mark.comfy
@pytest.mark.parametrize(("architecture", "kind"), [((8, 9), "INT4"), ((9, 0), "INT8"), ((12, 0), "INT8")])
@pytest.mark.parametrize("with_lora", [False, True])
def test_a_capture_allocates_nothing(
    architecture: tuple[int, int],
    kind: str,
    with_lora: bool,
    file: Path,
    on_cpu,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Blocks whose modulation layer is in INT8 are fused and run as CUDA graphs."""
    import comfy.model_management as management
    from comfy.weight_adapter import LoRAAdapter

    from svdq.kernels import layers
    from svdq.model import flux as model_flux
    from svdq.model import load_flux
    from svdq.model.ops import QuantizedLinear

    started = on_cpu(*architecture)
    monkeypatch.setattr(QuantizedLinear, "_has_room", lambda self, ranks: True)
    patcher = load_flux(str(file), "16bit")
    flux = patcher.model.diffusion_model
    if with_lora:
        k = flux.hidden_size
        factors = (torch.randn(3 * k, 4), torch.randn(4, k), None, None, None, None)
        patcher.add_patches({f"diffusion_model.{NAMES[3]}.weight": LoRAAdapter(set(), factors)})
    model_flux.fuse_blocks(flux, SimpleNamespace(kernels=True, layers=getattr(layers, kind)))
    graphs = Graphs()
    for block in model_flux.fused_blocks(flux):
        block.graphs = block.kept._graphs = graphs
    management.load_models_gpu([patcher])
    options = {"dtype": torch.bfloat16}
    hidden, length = flux.hidden_size, TOKENS + SIDE * SIDE
    x, vec = torch.randn(1, length, hidden, **options), torch.randn(1, hidden, **options)
    with torch.inference_mode():
        flux.single_blocks[1](x, vec, torch.randn(1, 1, length, 64, 2, 2), transformer_options={})
    assert graphs.runs == 1
    kernels = set(started)
    assert "gemv_kernel" not in kernels and "quantize_int8_kernel" in kernels
    assert kernels & {"_gemm_w8a8_kernel", "gemm_w8a8_hopper_kernel"}
    assert ("lora_up_kernel" in kernels) == with_lora


@pytest.mark.comfy
@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["int4", "int8"])
def test_a_model_on_a_gpu(backend: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels as the reference, layer by layer and for the whole model; fused as unfused; graphs change no bit. Bounds
    are those of test_flux_blocks.py; for one input alone, errors of two ways to round can be 1.11 times apart, as
    PyTorch's arithmetic shows without a GPU."""
    from svdq.model import load_flux
    from svdq.model.layout_svdq import int8_weight

    def load(value: str):
        if value != "int8":
            monkeypatch.setenv("SVDQ_BACKEND", value)
        patcher = load_flux(str(file))
        monkeypatch.delenv("SVDQ_BACKEND", raising=False)
        return patcher

    first, *others = (inputs(open_checkpoint(file), *size) for size in SIZES)
    models = patcher, stock, _ = load(backend), unfused(load(backend)), load_dense(file)
    once = forward(patcher, first)
    for _ in range(3):
        assert torch.equal(forward_once(patcher, first), once)
    assert patcher.model.diffusion_model.double_blocks[0].graphs.count() > 0
    fused, compared, dense = ([forward(model, arguments) for arguments in (first, *others)] for model in models)
    error = rms_relative(compared, dense)
    found = rms_relative(fused, compared) / error, rms_relative(fused, dense) / error
    print(f"{backend}: stock - dense {error:.4f}; fused - stock, fused - dense: {found} times that")
    assert max(found) <= 1.1
    if backend == "int4":
        expected = forward(load("int4-reference"), first)
        assert relative(compared[0], expected) <= relative(expected, dense[0])
    for name in NAMES:
        linear = stock.model.diffusion_model.get_submodule(name)
        weight = linear.weight.to("cuda")
        rows = 1 if name.endswith("lin") else 77
        x = torch.randn(rows, linear.in_features, generator=torch.Generator().manual_seed(rows)).bfloat16().cuda()
        with torch.inference_mode():
            y = linear(x)
        direct = reference.linear_w8a8(x, int8_weight(weight._qdata, weight._params), linear.bias.cuda())
        assert relative_error(y, direct.double()) <= 4e-3, name


@pytest.mark.comfy
@pytest.mark.gpu
@pytest.mark.slow
def test_memory_modes(file: Path, tmp_path: Path) -> None:
    """Weights that stay, that come for each use and that dynamic VRAM pages: the same bits, with a LoRA and without;
    what ModelSave writes is the same model (test_memory_modes.py)."""
    write_lora(tmp_path / "lora.safetensors", open_checkpoint(file).config)
    results = []
    for mode in ("static", "novram", "dynamic"):
        out = tmp_path / f"{mode}.pt"
        words = (Path(__file__).with_name("gpu_worker.py"), find_comfyui(), file, out, tmp_path / "lora.safetensors")
        done = subprocess.run(
            [sys.executable, *map(str, words), "int4", "--", *MODES[mode]],
            capture_output=True, text=True, timeout=600, env=os.environ | {"SVDQ_BACKEND": ""},
        )  # fmt: skip
        assert done.returncode == 0, f"{mode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        results.append(torch.load(out))
        check(results[-1])
        assert all(torch.equal(results[-1][key], results[0][key]) for key in ("plain", "columns")), mode
