"""The INT8 path: what its reference means on any machine, the kernels on a GPU, and what compilers make of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from checks import OUTPUT_ROUNDING, relative_error

from svdq.kernels import reference
from svdq.kernels.int4 import GROUP, W4A4

DEVICE = "cuda"
BF16, FP16 = torch.bfloat16, torch.float16


def layer(n: int, k: int, rank: int, dtype: torch.dtype, act_unsigned: bool = False) -> W4A4:
    """A weight on the CPU, with group scales that differ twentyfold and all codes, -8 too."""
    g = torch.Generator().manual_seed(n + k)
    return W4A4(
        q=torch.randint(-8, 8, (n, k), generator=g).to(torch.int8),
        wscales=(torch.rand(n, k // GROUP, generator=g) * 0.02 + 0.001).to(dtype),
        smooth_factor=(torch.rand(k, generator=g) + 0.5).to(dtype),
        proj_down=(torch.randn(rank, k, generator=g) * k**-0.5).to(dtype),
        proj_up=(torch.randn(n, rank, generator=g) * 0.3).to(dtype),
        act_unsigned=act_unsigned,
    )


# ---- the reference


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_signed_activations(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    x = (torch.randn(20, 384, generator=g) * torch.randn(384, generator=g).exp()).to(dtype)
    x[3] = 0
    weight = layer(128, 384, 16, dtype)
    codes, scales, lora_act = reference.quantize_act_int8(x, weight.smooth_factor, weight.proj_down)
    v = (x.float() / weight.smooth_factor.float()).to(dtype).float()
    assert codes.dtype == torch.int8 and scales.dtype == torch.float32
    assert (codes[3] == 0).all() and scales[3] == 0
    assert (codes.int().abs().amax(dim=1) == 127)[torch.arange(20) != 3].all()
    assert ((codes.float() * scales[:, None] - v).abs() <= scales[:, None] * 0.5001).all()
    assert relative_error(lora_act, x.double() @ weight.proj_down.double().t()) < 1e-6


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_unsigned_activations_use_all_256_codes(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    x = reference.gelu((torch.randn(20, 384, generator=g) * 2).to(dtype))
    weight = layer(128, 384, 16, dtype, act_unsigned=True)
    codes, scales, _ = reference.quantize_act_int8(x, weight.smooth_factor, weight.proj_down, act_unsigned=True)
    v = ((x + reference.SHIFT).float() / weight.smooth_factor.float()).to(dtype).float()
    assert (codes.amax(dim=1) == 127).all() and codes.min() < -120
    assert (((codes.float() + 128) * scales[:, None] - v).abs() <= scales[:, None] * 0.5001).all()
    assert torch.allclose(scales * 255, v.amax(dim=1))


def test_expanded_weights() -> None:
    weight = layer(256, 640, 0, BF16)
    q, scales, sums = reference.expand_w4_to_int8(weight)
    exact = weight.q.float() * weight.wscales.float().repeat_interleave(GROUP, dim=1)
    assert ((q.float() * scales[:, None] - exact).abs() <= scales[:, None] * 0.5001).all(), "no code saturates"
    assert torch.equal(scales, weight.wscales.float().amax(dim=1) / 16)
    largest = (weight.wscales == weight.wscales.amax(dim=1, keepdim=True)).repeat_interleave(GROUP, dim=1)
    assert torch.equal(q[largest], weight.q[largest] * 16), "the group with the largest scale is exact"
    assert torch.equal(sums, q.sum(dim=1, dtype=torch.int32))


def test_expanded_weights_round_the_exact_product_to_even() -> None:
    weight = W4A4(
        q=torch.tensor([[1, 3, 5, -1, -3, -8, 7] + [0] * 57 + [7] * 64], dtype=torch.int8),
        wscales=torch.tensor([[0.5, 16.0]], dtype=BF16),  # a ratio of one half
        smooth_factor=torch.ones(128, dtype=BF16),
        proj_down=torch.zeros(0, 128, dtype=BF16),
        proj_up=torch.zeros(1, 0, dtype=BF16),
    )
    q, scales, _ = reference.expand_w4_to_int8(weight)
    assert scales.item() == 1.0 and (q[0, 64:] == 112).all()
    assert q[0, :8].tolist() == [0, 2, 2, 0, -2, -4, 4, 0]


@pytest.mark.parametrize("act_unsigned", [False, True])
def test_the_reference_computes_the_layer(act_unsigned: bool) -> None:
    """Against the dense layer of the 4-bit weights, with the stored bias: what is left is int8 rounding."""
    weight = layer(256, 1024, 32, BF16, act_unsigned)
    g = torch.Generator().manual_seed(0)
    x, bias = torch.randn(64, 1024, generator=g).bfloat16(), torch.randn(256, generator=g).bfloat16()
    x = reference.gelu(x) if act_unsigned else x
    dense, shift = reference.dequantize_w4a4(weight)
    expected = x.double() @ dense.double().t() + (bias.double() if shift is None else bias.double() + shift.double())
    operands = reference.quantize_act_int8(x, weight.smooth_factor, weight.proj_down, act_unsigned)
    q, scales, _ = reference.expand_w4_to_int8(weight)
    y = reference.gemm_w8a8(*operands, q, scales, weight.proj_up, bias, torch.float32, act_unsigned)
    assert relative_error(y, expected) < 0.02
    int4 = reference.linear_w4a4(x, weight, bias, torch.float32)
    assert relative_error(y, expected) < relative_error(int4, expected) / 4


# ---- the kernels


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(("n", "k", "act_unsigned"), [(128, 128, False), (384, 1152, True), (3072, 12288, True)])
def test_expand_kernel_has_the_bits_of_the_reference(n: int, k: int, act_unsigned: bool, dtype: torch.dtype) -> None:
    from svdq.kernels.weights_int8 import expand_w4_to_int8

    weight = layer(n, k, 0, dtype, act_unsigned)
    expanded = expand_w4_to_int8(weight.pack().map(lambda tensor: tensor.to(DEVICE)))
    q, scales, sums = reference.expand_w4_to_int8(weight)
    assert torch.equal(expanded.q.cpu(), q) and torch.equal(expanded.scales.cpu(), scales)
    if act_unsigned:
        assert torch.equal(expanded.sums.cpu(), sums)


def problem(m: int, n: int, k: int, rank: int, dtype: torch.dtype, act_unsigned: bool = False, seed: int = 0):
    """(codes, scales, lora_act, weight, proj_up, bias) on the GPU; outputs of about one."""
    from svdq.kernels.weights_int8 import W8

    g = torch.Generator().manual_seed(seed)
    q = torch.randint(-128, 128, (n, k), generator=g).to(torch.int8)
    weight = W8(
        q=q.to(DEVICE),
        scales=((torch.rand(n, generator=g) + 0.1) * 1e-2 * k**-0.5).to(DEVICE),
        sums=q.sum(dim=1, dtype=torch.int32).to(DEVICE),
        act_unsigned=act_unsigned,
    )
    codes = torch.randint(-128, 128, (m, k), generator=g).to(torch.int8)
    scales = (torch.rand(m, generator=g) + 0.1) * 1e-2
    lora_act = torch.randn(m, rank, generator=g).to(dtype)
    proj_up = (torch.randn(n, rank, generator=g) * 0.3).to(dtype)
    bias = torch.randn(n, generator=g).to(dtype)
    return codes.to(DEVICE), scales.to(DEVICE), lora_act.to(DEVICE), weight, proj_up.to(DEVICE), bias.to(DEVICE)


def exact(codes, scales, lora_act, weight, proj_up, bias) -> torch.Tensor:
    return reference.gemm_w8a8(
        codes, scales, lora_act, weight.q, weight.scales, proj_up, bias, torch.float64, weight.act_unsigned
    )


def tiles(kernel: str) -> list:
    """What this GPU runs of one of the kernels; None is the choice without being asked. Skips where it has no such."""
    import triton

    from svdq.kernels.gemm_int8 import HOPPER_TRITON
    from svdq.kernels.tiles_int8 import HOPPER, TILES, Tile

    architecture = "sm_{}{}".format(*torch.cuda.get_device_capability())
    hopper = architecture == "sm_90" and triton.__version__.startswith(HOPPER_TRITON)
    if kernel == "plain":
        return [*TILES.get(architecture, TILES["other"]), Tile(64, 128, 64, 4, 3), *([] if hopper else [None])]
    if not hopper:
        pytest.skip(f"the Hopper kernel is not for {architecture} with Triton {triton.__version__}")
    return [None, replace(HOPPER, join=0)]  # with pieces wherever that is possible; both are one program


KERNELS = pytest.mark.parametrize("kernel", ["plain", "hopper"])


@pytest.mark.gpu
@pytest.mark.parametrize(("kernel", "dtype"), [("plain", BF16), ("plain", FP16), ("hopper", BF16)])  # 3 s to compile
@pytest.mark.parametrize(
    ("m", "n", "k", "rank", "act_unsigned"),
    [
        (1, 384, 256, 16, False),
        (63, 128, 128, 0, True),
        (300, 640, 1152, 48, True),
        (4685, 256, 384, 128, False),
        (130, 9216, 3072, 32, False),
        (512, 3072, 12288, 32, True),
        (200, 256, 256, 80, False),
    ],
)
def test_gemm(m: int, n: int, k: int, rank: int, act_unsigned: bool, kernel: str, dtype: torch.dtype) -> None:
    from svdq.kernels.gemm_int8 import gemm_w8a8

    operands = problem(m, n, k, rank, dtype, act_unsigned)
    expected = exact(*operands)
    for tile in tiles(kernel):
        out = gemm_w8a8(*operands, tile=tile)
        assert out.dtype == dtype and out.shape == (m, n)
        assert relative_error(out, expected) <= OUTPUT_ROUNDING[dtype], tile
        assert torch.equal(out, gemm_w8a8(*operands, tile=tile)), f"two runs of {tile} differ"


@pytest.mark.gpu
@KERNELS
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_epilogues_and_a_second_input(dtype: torch.dtype, kernel: str) -> None:
    """Against float64 without any rounding in between."""
    from svdq.kernels.epilogue import After
    from svdq.kernels.gemm_int8 import gemm_w8a8

    m, n = 300, 768
    g = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g).to(dtype).to(DEVICE)

    operands = problem(m, n, 512, 48, dtype)
    codes2, scales2, _, weight2, _, _ = problem(m, n, 2048, 0, dtype, act_unsigned=True, seed=1)
    second = (codes2, scales2, weight2)
    none = torch.zeros(n, 0, dtype=dtype, device=DEVICE)
    more = exact(codes2, scales2, torch.zeros(m, 0, dtype=dtype, device=DEVICE), weight2, none, None)
    residual, gate = random(m, n), {batch: random(batch, n) for batch in (1, 2)}
    norms = [1 + 0.3 * random(128) for _ in range(2)]
    angle = torch.rand(m, 64, generator=g).to(DEVICE) * 6
    rotary = torch.stack((angle.sin(), angle.cos()), dim=-1)
    for tile in tiles(kernel):

        def check(expected: torch.Tensor, after: After | None = None, extra: tuple | None = None, tile=tile) -> None:
            out = gemm_w8a8(*operands, after=after, second=extra, tile=tile)
            assert relative_error(out, expected) <= OUTPUT_ROUNDING[dtype], (tile, after and after.name)

        y = exact(*operands)
        check(torch.nn.functional.gelu(y, approximate="tanh"), After(gelu=True))
        heads = y.reshape(m, 3, -1, 128)
        q, k = (_norm_rope(heads[:, i], norm, rotary) for i, norm in enumerate(norms))
        rotated = torch.stack((q, k, heads[:, 2]), dim=1).reshape(m, n)
        check(rotated, After(norm_q=norms[0], norm_k=norms[1], rotary=rotary))
        check(y + more, extra=second)
        for batch, extra, total in ((1, None, y), (2, None, y), (1, second, y + more)):
            gated = gate[batch].double().repeat_interleave(m // batch, dim=0) * total
            check(residual.double() + gated, After(gate=gate[batch], residual=residual), extra)


def _norm_rope(x: torch.Tensor, norm: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
    """float64 [M, heads, 128]: as reference.rms_norm_rope, without its rounding."""
    x = x * (x.square().mean(dim=-1, keepdim=True) + 1e-6).rsqrt() * norm.double()
    sine, cosine = rotary.double()[:, None, :, 0], rotary.double()[:, None, :, 1]
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), dim=-1).reshape(x.shape)


@pytest.mark.gpu
@KERNELS
def test_outputs(kernel: str) -> None:
    """Without bias, in float32, beside another output or where the copy engine cannot write, fp16 beyond its range."""
    from svdq.kernels.gemm_int8 import gemm_w8a8

    *operands, bias = problem(200, 256, 512, 32, BF16)
    without = exact(*operands, None)
    *others, _ = problem(64, 128, 256, 0, FP16)
    others[3].scales.mul_(1e6)
    for tile in tiles(kernel):
        assert relative_error(gemm_w8a8(*operands, tile=tile), without) <= OUTPUT_ROUNDING[BF16], tile
        both = torch.zeros(200, 384, dtype=BF16, device=DEVICE)
        out = gemm_w8a8(*operands, bias, out=both[:, 128:], tile=tile)
        assert torch.equal(out, gemm_w8a8(*operands, bias, tile=tile)) and (both[:, :128] == 0).all(), tile
        out = gemm_w8a8(*others, tile=tile)
        assert out.isfinite().all() and (out.abs() == 65504).any(), tile
    assert relative_error(gemm_w8a8(*operands, out_dtype=torch.float32), without) <= 2e-6
    askew = torch.zeros(200, 385, dtype=BF16, device=DEVICE)[:, 1:257]
    assert relative_error(gemm_w8a8(*operands, out=askew), without) <= OUTPUT_ROUNDING[BF16]


def test_low_rank_boxes() -> None:
    """All columns are copied, and none too many but in the last box of 64."""
    from svdq.kernels.tiles_int8 import low_rank_boxes

    assert low_rank_boxes(0) == (0, 0)
    for rank in range(16, 257, 16):
        ranks, boxes = low_rank_boxes(rank)
        assert ranks in (16, 32, 64) and ranks * boxes <= 64
        assert ranks * boxes == (rank if rank < 64 else 64)


def test_when_the_hopper_kernel_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where it compiles and the copy engine can write the output; the plain kernel runs everywhere."""
    triton = pytest.importorskip("triton")
    from svdq.kernels.gemm_int8 import takes_hopper

    out = torch.empty(8, 256, dtype=BF16)
    monkeypatch.setattr(triton, "__version__", "3.6.0.post1")
    assert takes_hopper(out, BF16, "sm_90")
    assert not takes_hopper(out, BF16, "sm_89") and not takes_hopper(out, BF16, "sm_100")
    assert not takes_hopper(out, FP16, "sm_90") and not takes_hopper(out.float(), BF16, "sm_90")
    assert not takes_hopper(out[:, 1:129], BF16, "sm_90"), "not aligned"
    assert not takes_hopper(torch.empty(8, 257, dtype=BF16)[:, :256], BF16, "sm_90"), "rows not aligned"
    for version in ("3.5.1", "3.7.0", "4.0.0"):
        monkeypatch.setattr(triton, "__version__", version)
        assert not takes_hopper(out, BF16, "sm_90")


@pytest.mark.gpu
def test_extreme_codes_are_exact() -> None:
    """The largest integer sums of the longest K, as float32: to its precision."""
    from svdq.kernels.gemm_int8 import gemm_w8a8
    from svdq.kernels.weights_int8 import W8

    k = 15360
    for act_unsigned in (False, True):
        codes = torch.full((64, k), 127 if act_unsigned else -128, dtype=torch.int8, device=DEVICE)
        q = torch.full((128, k), -128, dtype=torch.int8, device=DEVICE)
        ones = torch.ones(128, device=DEVICE)
        weight = W8(q, ones, q.sum(dim=1, dtype=torch.int32), act_unsigned)
        lora_act = torch.zeros(64, 0, dtype=BF16, device=DEVICE)
        up = torch.zeros(128, 0, dtype=BF16, device=DEVICE)
        out = gemm_w8a8(codes, ones[:64], lora_act, weight, up, out_dtype=torch.float32)
        assert (out == float((127 + 128 if act_unsigned else -128) * -128 * k)).all()


@pytest.mark.gpu
def test_operands_that_do_not_fit_are_refused() -> None:
    from svdq.kernels.gemm_int8 import gemm_w8a8

    codes, scales, lora_act, weight, proj_up, bias = problem(64, 128, 256, 16, BF16)
    with pytest.raises(ValueError, match=r"codes is torch.int8 \(64, 128\), expected torch.int8 \(64, 256\)"):
        gemm_w8a8(codes[:, :128], scales, lora_act, weight, proj_up, bias)
    with pytest.raises(ValueError, match=r"proj_up is torch.bfloat16 \(128, 16\), expected torch.bfloat16 \(128, 32\)"):
        gemm_w8a8(codes, scales, lora_act.repeat(1, 2), weight, proj_up, bias)
    with pytest.raises(ValueError, match=r"scales is torch\.float64"):
        gemm_w8a8(codes, scales.double(), lora_act, weight, proj_up, bias)
    with pytest.raises(ValueError, match=r"strides \(1, 64\), expected \[64, 128\] with contiguous rows"):
        gemm_w8a8(codes, scales, lora_act, weight, proj_up, bias, out=torch.empty(128, 64, device=DEVICE).t())


# ---- what compilers make of the kernels, for GPUs that need not be here

PLAIN = [("sm_90", 0, "NONE"), ("sm_90", 0, "GELU"), ("sm_90", 1, "NORM_ROPE"), ("sm_90", 1, "GATE_RESIDUAL")]
PLAIN += [(arch, 0, after) for arch in ("sm_80", "sm_86", "sm_120") for after in ("GELU", "GATE_RESIDUAL")]
PLAIN += [("sm_89", 0, "NORM_ROPE"), ("sm_86", 1, "NONE")]
TWO_INPUTS_SPILL = 96  # bytes of a thread, in the epilogue
MORE_RANKS_SPILL = 40  # bytes of a thread: addresses that the epilogue needs
GATE_SPILLS = 96  # bytes of a thread, in the epilogue: addresses of the residual


@pytest.mark.parametrize(("arch", "index", "after"), PLAIN)
def test_plain_kernel_compiles_without_spills(arch: str, index: int, after: str) -> None:
    pytest.importorskip("triton")
    from svdq.benchmarks.sass import compile_for
    from svdq.kernels.epilogue import KINDS
    from svdq.kernels.gemm_int8 import _gemm_w8a8_kernel as kernel
    from svdq.kernels.tiles_int8 import TILES

    tile = TILES.get(arch, TILES["other"])[index]
    blocks = {"a": tile.block_m, "w": tile.block_n, "a2": tile.block_m, "w2": tile.block_n}
    types = {name: f"tensordesc<i8[{rows}, {tile.block_k}]>" if tile.tma else "*i8" for name, rows in blocks.items()}
    constants = {"UNSIGNED": False, "UNSIGNED2": False, "SECOND": False, "BIAS": True, "RANKS": 32, "ONE_GATE": True}
    constants |= {"EPILOGUE": KINDS.index(after), "TMA": tile.tma, "FLATTEN": tile.flatten, "BM": tile.block_m}
    constants |= {"BN": tile.block_n, "BK": tile.block_k, "GROUP_M": tile.group_m}
    signature = {name: types.get(name) or _type(name) for name in kernel.arg_names if name not in constants}
    constants = {name: constants[name] for name in kernel.arg_names if name in constants}
    aligned = {name for name, kind in signature.items() if kind[0] == "*"} | {"N", "K", "K2", "R", "stride_out"}
    mma = "IGMMA" if arch == "sm_90" else "IMMA"
    figures = compile_for(kernel, signature, constants, arch, tile.warps, aligned, mma, num_stages=tile.stages)
    assert figures.mmas > 0 and figures.loop_spills == 0
    assert figures.spill_bytes <= (GATE_SPILLS if after == "GATE_RESIDUAL" and arch == "sm_90" else 0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"epilogue": 1},
        {"epilogue": 3, "unsigned": True},
        {"epilogue": 2, "one_gate": True},
        {"epilogue": 2, "one_gate": True, "second": True, "unsigned2": True},
        {"epilogue": 3, "ranks": 16, "boxes": 3},
        {"ranks": 64},
    ],
    ids=lambda options: "-".join(options),
)
def test_hopper_kernel_compiles_without_spills(options: dict) -> None:
    triton = pytest.importorskip("triton")
    from svdq.kernels.gemm_int8 import HOPPER_TRITON

    if not triton.__version__.startswith(HOPPER_TRITON):
        pytest.skip(f"the Hopper kernel is for Triton {HOPPER_TRITON}x")
    from svdq.benchmarks.sass import gemm_int8_hopper_figures
    from svdq.kernels.tiles_int8 import HopperTile

    figures = gemm_int8_hopper_figures(HopperTile(**options))
    allowed = TWO_INPUTS_SPILL if "second" in options else MORE_RANKS_SPILL if "ranks" in options else 0
    assert figures.mmas > 0 and figures.spill_bytes <= allowed
    assert figures.shared_bytes <= 227 * 1024


def _type(name: str) -> str:
    """Triton type of an argument that both kernels have."""
    if not name.endswith("_ptr"):
        return "i32"
    if "sums" in name or "counter" in name:
        return "*i32"
    return "*fp32" if any(word in name for word in ("scales", "rotary", "partial")) else "*bf16"
