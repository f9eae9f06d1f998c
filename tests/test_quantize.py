"""The fused quantize + low-rank-down kernel against the reference and the original kernel's outputs."""

from __future__ import annotations

import pytest
import torch
from checks import assert_codes_close, golden_names, load_golden, relative_error

from svdq.kernels import reference
from svdq.kernels.int4 import W4A4, PackedW4A4

HALF = (torch.bfloat16, torch.float16)


def random_layer(k: int, rank: int, dtype: torch.dtype, unsigned: bool = False) -> W4A4:
    """A layer of which only the input side is used."""
    generator = torch.Generator().manual_seed(k + rank)
    return W4A4(
        q=torch.zeros(128, k, dtype=torch.int8),
        wscales=torch.ones(128, k // 64, dtype=dtype),
        smooth_factor=torch.randn(k, generator=generator).mul_(0.3).exp_().to(dtype),
        proj_down=(torch.randn(rank, k, generator=generator) * k**-0.5).to(dtype),
        proj_up=torch.zeros(128, rank, dtype=dtype),
        act_unsigned=unsigned,
    )


def to_gpu(weight: PackedW4A4) -> PackedW4A4:
    return weight.map(torch.Tensor.cuda)


def run(x: torch.Tensor, layer: W4A4, norm=None, cut=None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The kernel's outputs in natural order on the CPU; checks that a second run gives the same bits."""
    from svdq.kernels.act_layout import unpack_act, unpack_ascales
    from svdq.kernels.quantize import quantize_act

    weight, m = to_gpu(layer.pack()), x.shape[0]
    codes, ascales, lora_act = quantize_act(x.cuda(), weight, norm, cut)
    again = quantize_act(x.cuda(), weight, norm, cut)
    natural = unpack_act(codes.cpu(), m, layer.act_unsigned), unpack_ascales(ascales.cpu(), m), lora_act.cpu()
    natural_again = unpack_act(again[0].cpu(), m, layer.act_unsigned), unpack_ascales(again[1].cpu(), m), again[2].cpu()
    assert all(torch.equal(a, b) for a, b in zip(natural, natural_again, strict=True)), "two runs differ"
    return natural


def check(x: torch.Tensor, layer: W4A4, norm=None, cut=None, lora_error: float = 1e-5) -> None:
    codes, ascales, lora_act = run(x, layer, norm, cut)
    if norm is not None:
        x = reference.layer_norm_modulate(x, norm.scale.cpu(), norm.shift.cpu())
    expected_codes, expected_ascales, _ = reference.quantize_act(
        x, layer.smooth_factor, layer.proj_down, layer.act_unsigned
    )
    assert_codes_close(codes, expected_codes)
    # One rounding of x / smooth to 16 bits may fall to the other side, and take the group's largest value with it; with
    # a norm in front there are two such roundings.
    steps = (ascales.view(torch.int16).int() - expected_ascales.view(torch.int16).int()).abs()
    assert steps.max() <= (1 if norm is None else 2)
    # A share, and three more: one of 462 scales is more than the share. In the 77 x 384 case with a norm, float64 puts
    # one value 6.5e-6 bf16 steps, 4.7e-8 of it, from where its rounding changes. That is less than float32 resolves, so
    # the order of operations decides (of two in PyTorch one moves that scale), and it is its group's largest value.
    assert (steps > 0).float().mean() <= 1e-3 + 3 / steps.numel()
    if lora_act.numel():
        assert relative_error(lora_act, x.double() @ layer.proj_down.double().t()) < lora_error


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("unsigned", [False, True], ids=["signed", "unsigned"])
@pytest.mark.parametrize(
    ("m", "k", "rank"),
    [(4608, 3072, 32), (512, 12288, 32), (1, 128, 16), (63, 256, 48), (4685, 384, 0), (300, 1024, 128), (64, 512, 256)],
)
def test_against_the_reference(m: int, k: int, rank: int, unsigned: bool, dtype: torch.dtype) -> None:
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)) * 2
    x[:, 7] *= 40  # an outlier channel
    x = reference.gelu(x.to(dtype)) if unsigned else x.to(dtype)
    if m > 1:
        x[m // 2] = 0
    check(x, random_layer(k, rank, dtype, unsigned))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "cut",
    [(8, 1, 1), (8, 1, 3), (4, 1, 16), (16, 1, 3), (4, 2, 3), (2, 4, 2), (1, 4, 1), (1, 1, 2, 2), (8, 1, 1, 16)],
    ids=str,
)
def test_every_cut_of_the_work(cut: tuple[int, ...]) -> None:
    """1024 columns are 16 groups: with 3 pieces the last is shorter, and odd numbers of groups occur. 16 staged groups
    are too many to be copied ahead."""
    from svdq.kernels.quantize import Cut

    x = torch.randn(200, 1024, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    check(x, random_layer(1024, 32, torch.bfloat16), cut=Cut(*cut))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(("m", "batches", "rank"), [(4608, 1, 32), (192, 2, 32), (150, 2, 16), (77, 1, 0)])
def test_layer_norm_and_modulation(m: int, batches: int, rank: int, dtype: torch.dtype) -> None:
    """150 rows in two batches: 16 rows are of both."""
    from svdq.kernels.quantize import Modulation

    k, generator = 3072 if m > 1000 else 384, torch.Generator().manual_seed(m)
    x = (torch.randn(m, k, generator=generator) * 3 + 0.5).to(dtype)
    x[:, 7] *= 20
    scale, shift = (torch.randn(batches, k, generator=generator).mul(0.3).to(dtype).cuda() for _ in range(2))
    # sums of other order may take T(x') to its neighbour
    check(x, random_layer(k, rank, dtype), Modulation(scale, shift), lora_error=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_values_that_are_no_numbers_stay_in_their_groups(dtype: torch.dtype) -> None:
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)).to(dtype)
    layer = random_layer(512, 32, dtype)
    codes, ascales, lora_act = run(x, layer)
    x[3, 70], x[20, 300] = float("nan"), float("inf")
    broken_codes, broken_ascales, broken_lora_act = run_once(x, layer)
    whole = torch.ones(64, 8, dtype=torch.bool)
    whole[3, 1] = whole[20, 4] = False
    assert torch.equal(broken_ascales[whole], ascales[whole])
    whole_codes = whole.repeat_interleave(64, dim=1)
    assert torch.equal(broken_codes[whole_codes], codes[whole_codes])
    rows = whole.all(dim=1)
    assert torch.equal(broken_lora_act[rows], lora_act[rows])


def run_once(x: torch.Tensor, layer: W4A4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from svdq.kernels.act_layout import unpack_act, unpack_ascales
    from svdq.kernels.quantize import quantize_act

    codes, ascales, lora_act = quantize_act(x.cuda(), to_gpu(layer.pack()))
    m = x.shape[0]
    return unpack_act(codes.cpu(), m, layer.act_unsigned), unpack_ascales(ascales.cpu(), m), lora_act.cpu()


@pytest.mark.gpu
def test_the_smallest_values() -> None:
    """Where the scale is subnormal in float32, codes are those of the smallest normal one: small, of the right sign."""
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).mul(1e-38).to(torch.bfloat16)
    codes, _, _ = run(x, random_layer(256, 16, torch.bfloat16))
    assert codes.abs().max() <= 7
    assert (codes.float() * x.sign().float() >= 0).all()


@pytest.mark.gpu
def test_rows_that_are_not_adjacent() -> None:
    """The attention half of linear2's input is a slice of wider rows."""
    wide = torch.randn(100, 640, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    layer = random_layer(128, 16, torch.bfloat16)
    from svdq.kernels.act_layout import unpack_act
    from svdq.kernels.quantize import quantize_act

    weight = to_gpu(layer.pack())
    for start in (256, 258, 259):  # the last is not aligned to pairs
        sliced = quantize_act(wide.cuda()[:, start : start + 128], weight)
        adjacent = quantize_act(wide[:, start : start + 128].contiguous().cuda(), weight)
        assert torch.equal(sliced[2], adjacent[2])
        # blocks of 64 tokens, of which the second has 28 empty rows: compare what the rows hold
        assert torch.equal(unpack_act(sliced[0].cpu(), 100), unpack_act(adjacent[0].cpu(), 100))


@pytest.mark.gpu
def test_cuda_graphs() -> None:
    """A captured call gives the bits of an eager one, also in the second replay: its counters are 0 again."""
    from svdq.kernels.quantize import Cut, quantize_act

    x = torch.randn(200, 1024, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16).cuda()
    weight = to_gpu(random_layer(1024, 32, torch.bfloat16).pack())
    expected = quantize_act(x, weight, cut=Cut(8, 1, 4))[2]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        lora_act = quantize_act(x, weight, cut=Cut(8, 1, 4))[2]
    for _ in range(2):
        lora_act.zero_()
        graph.replay()
        assert torch.equal(lora_act, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [n for n in golden_names("kernels/*_quant_m*.safetensors") if "glu" not in n])
def test_against_the_original_kernel(name: str) -> None:
    data = load_golden(name)
    down = data["in.logical.lora_down"]
    rank, k = down.shape
    layer = random_layer(k, rank, down.dtype)
    layer = W4A4(layer.q, layer.wscales, data["in.logical.smooth"], down, layer.proj_up)
    codes, ascales, lora_act = run(data["in.x"], layer)
    assert torch.equal(ascales, data["out.logical.ascales"])
    # The original takes a subnormal scale for zero and saturates; ours divides by it.
    normal = ascales.float().repeat_interleave(64, dim=1).float() >= torch.finfo(torch.float32).tiny
    assert_codes_close(codes.masked_fill(~normal, 0), data["out.logical.act"].masked_fill(~normal, 0))
    expected = data["out.logical.lora_act"]
    normal = expected.abs().amax(dim=1) < 1e20  # without the rows of one huge value
    assert relative_error(lora_act[normal], expected[normal]) < 1e-5


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90"])
@pytest.mark.parametrize("kind", ["s4", "u4", "rank 0", "norm"])
def test_machine_code(arch: str, kind: str) -> None:
    """Instructions per element of the main loop, registers for two blocks of 8 warps, nothing in local memory."""
    pytest.importorskip("triton")
    from svdq.benchmarks import sass
    from svdq.kernels.quantize import quantize_kernel

    ranks = 0 if kind == "rank 0" else 2
    pointers = dict.fromkeys(("x_ptr", "smooth_ptr", "proj_down_ptr", "codes_ptr", "ascales_ptr"), "*i32")
    pointers |= {"lora_act_ptr": "*fp32", "pieces_ptr": "*fp32", "arrived_ptr": "*i32", "statistics_ptr": "*fp32"}
    pointers |= {"scale_ptr": "*i32", "shift_ptr": "*i32"}
    sizes = dict.fromkeys(("M", "K", "R", "stride_x", "row_blocks", "groups_per_piece", "rows_per_batch"), "i32")
    constants = {"UNSIGNED": kind == "u4", "T": 0, "XORSIGN": arch != "sm_80", "RT": ranks, "NORM": int(kind == "norm")}
    constants |= {"WM": 8, "WK": 1, "SLAB": 4, "BUFFERS": 2, "PIECES": 8 if ranks else 1}
    aligned = {*pointers, "K", "R", "stride_x"}
    figures = sass.compile_for(
        quantize_kernel, pointers | sizes, constants, arch, 8, aligned, mma="HMMA" if ranks else "HMNMX2"
    )
    groups = sum(count for opcode, count in figures.opcodes.items() if opcode.startswith("STG.E.128"))
    per_element = sum(figures.opcodes.values()) / (32 * groups)  # a lane has 32 elements of a group
    assert per_element <= {"s4": 7.5, "u4": 8.0, "rank 0": 6.8, "norm": 13.5}[kind]
    assert figures.registers <= 128 and figures.spill_bytes == 0
