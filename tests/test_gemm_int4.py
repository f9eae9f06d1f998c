"""The INT4 GEMM: layouts on any machine, results on a GPU, and what the compiler makes of it without one."""

from __future__ import annotations

import pytest
import torch
from checks import OUTPUT_ROUNDING, assert_same, golden_names, load_golden, relative_error

from svdq.kernels import act_layout, tiles
from svdq.kernels.int4 import GROUP, W4A4

DEVICE = "cuda"


def problem(m: int, n: int, k: int, rank: int, dtype: torch.dtype, act_unsigned: bool = False, seed: int = 0):
    """(codes, ascales, lora_act, weight, bias) in natural order on the CPU, with values of the size a layer has."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0 if act_unsigned else -7, 16 if act_unsigned else 8, (m, k), generator=g).to(torch.int8)
    ascales = (torch.rand(m, k // GROUP, generator=g) * 0.2 + 0.01).to(dtype)
    weight = W4A4(
        q=torch.randint(-8, 8, (n, k), generator=g).to(torch.int8),
        wscales=(torch.rand(n, k // GROUP, generator=g) * 0.02 + 0.001).to(dtype),
        smooth_factor=torch.ones(k, dtype=dtype),
        proj_down=torch.zeros(rank, k, dtype=dtype),
        proj_up=(torch.randn(n, rank, generator=g) * 0.3).to(dtype),
        act_unsigned=act_unsigned,
    )
    lora_act = torch.randn(m, rank, generator=g)
    bias = torch.randn(n, generator=g).to(dtype)
    return codes, ascales, lora_act, weight, bias


def exact(codes, ascales, lora_act, weight, bias) -> torch.Tensor:
    """float64 on the same codes and scales."""
    x = codes.double() * ascales.double().repeat_interleave(GROUP, dim=1)
    w = weight.q.double() * weight.wscales.double().repeat_interleave(GROUP, dim=1)
    y = x @ w.t() + lora_act.to(ascales.dtype).double() @ weight.proj_up.double().t()
    return y if bias is None else y + bias.double()


def run(codes, ascales, lora_act, weight, bias, **options) -> torch.Tensor:
    """The kernel on natural operands."""
    from svdq.kernels.gemm_int4 import gemm_w4a4

    return gemm_w4a4(
        act_layout.pack_act(codes).to(DEVICE),
        act_layout.pack_ascales(ascales).to(DEVICE),
        lora_act.to(DEVICE),
        on_gpu(weight.pack()),
        None if bias is None else bias.to(DEVICE),
        **options,
    )


def on_gpu(weight):
    return weight.map(lambda tensor: tensor.to(DEVICE))


@pytest.mark.parametrize("m", [1, 63, 64, 130])
@pytest.mark.parametrize("act_unsigned", [False, True])
def test_act_layout_round_trip(m: int, act_unsigned: bool) -> None:
    low, high = (0, 16) if act_unsigned else (-8, 8)
    codes = torch.randint(low, high, (m, 256), dtype=torch.int8)
    scales = torch.rand(m, 4).bfloat16()
    packed = act_layout.pack_act(codes)
    assert packed.shape == (act_layout.blocks_of(m), 4, act_layout.WORDS) and packed.dtype == torch.int32
    assert torch.equal(act_layout.unpack_act(packed, m, act_unsigned), codes)
    assert torch.equal(act_layout.unpack_ascales(act_layout.pack_ascales(scales), m), scales)


def test_act_layout_formulas() -> None:
    """The positions that the docstrings state, one element at a time."""
    for m, k in [(0, 0), (7, 9), (8, 63), (37, 64), (63, 191), (64, 100), (127, 32)]:
        codes = torch.zeros(128, 192, dtype=torch.int8)
        codes[m, k] = 5
        word = (m % 64 // 16 * 32 + m % 8 * 4 + k % 64 // 8 % 4) * 4 + k % 64 // 32 * 2 + m // 8 % 2
        assert int(act_layout.pack_act(codes)[m // 64, k // 64, word]) & 0xFFFFFFFF == 5 << 4 * (k % 8)
        scales = torch.zeros(128, 3, dtype=torch.float16)
        scales[m, k // 64] = 1
        assert act_layout.pack_ascales(scales)[m // 64, k // 64, m % 8 * 8 + m % 64 // 16 * 2 + m // 8 % 2] == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("act_unsigned", [False, True])
@pytest.mark.parametrize(
    ("m", "n", "k", "rank"),
    [
        (1, 384, 256, 16),
        (63, 128, 128, 0),
        (128, 384, 256, 32),
        (300, 384, 384, 48),
        (4685, 128, 256, 128),
        (130, 9216, 3072, 32),
        (65, 256, 12288, 32),
    ],
)
def test_gemm(m: int, n: int, k: int, rank: int, dtype: torch.dtype, act_unsigned: bool) -> None:
    operands = problem(m, n, k, rank, dtype, act_unsigned)
    out = run(*operands)
    assert out.dtype == dtype and out.shape == (m, n)
    assert relative_error(out.cpu(), exact(*operands)) <= OUTPUT_ROUNDING[dtype]
    assert torch.equal(out, run(*operands)), "two runs differ"


@pytest.mark.gpu
def test_gemm_without_bias_and_in_float32() -> None:
    codes, ascales, lora_act, weight, _ = problem(200, 256, 512, 32, torch.bfloat16)
    operands = (codes, ascales, lora_act, weight, None)
    assert relative_error(run(*operands).cpu(), exact(*operands)) <= OUTPUT_ROUNDING[torch.bfloat16]
    out = run(*operands, out_dtype=torch.float32)
    assert out.dtype == torch.float32
    assert relative_error(out.cpu(), exact(*operands)) <= OUTPUT_ROUNDING[torch.float32]


@pytest.mark.gpu
def test_extreme_codes_are_exact() -> None:
    """All codes at the ends of their ranges and scales of one: integers that float32 holds."""
    for act_unsigned, value in ((False, -8), (False, 7), (True, 15)):
        codes, ascales, lora_act, weight, _ = problem(64, 128, 256, 0, torch.bfloat16, act_unsigned)
        weight.q[::2], weight.q[1::2] = -8, 7
        weight.wscales.fill_(1), codes.fill_(value), ascales.fill_(1)
        operands = (codes, ascales, lora_act, weight, None)
        assert torch.equal(run(*operands, out_dtype=torch.float32).cpu().double(), exact(*operands))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tile", tiles.TILES["sm_86"])
def test_epilogues(tile: tiles.Tile, dtype: torch.dtype) -> None:
    """Against float64 without any rounding in between: the fused chain rounds once."""
    from svdq.kernels.epilogue import After

    m, n = 300, 768
    operands = problem(m, n, 256, 16, dtype)
    # Values of about one, where GELU is curved.
    operands[3].wscales.div_(10), operands[3].proj_up.div_(10), operands[4].div_(10)
    y = exact(*operands)
    g = torch.Generator().manual_seed(1)

    out = run(*operands, after=After(gelu=True), tile=tile)
    assert relative_error(out.cpu(), torch.nn.functional.gelu(y, approximate="tanh")) <= OUTPUT_ROUNDING[dtype]

    residual = torch.randn(m, n, generator=g).to(dtype)
    for batch in (1, 2):
        gate = torch.randn(batch, n, generator=g).to(dtype)
        out = run(*operands, after=After(gate=gate.to(DEVICE), residual=residual.to(DEVICE)), tile=tile)
        expected = residual.double() + gate.double().repeat_interleave(m // batch, dim=0) * y
        assert relative_error(out.cpu(), expected) <= OUTPUT_ROUNDING[dtype]

    norm_q, norm_k = ((1 + 0.3 * torch.randn(128, generator=g)).to(dtype) for _ in range(2))
    angle = torch.rand(m, 64, generator=g) * 6
    rotary = torch.stack((angle.sin(), angle.cos()), dim=-1)
    after = After(norm_q=norm_q.to(DEVICE), norm_k=norm_k.to(DEVICE), rotary=rotary.to(DEVICE))
    out = run(*operands, after=after, tile=tile)
    heads = y.reshape(m, 3, -1, 128)
    q, k = (_norm_rope(heads[:, i], norm, rotary) for i, norm in enumerate((norm_q, norm_k)))
    expected = torch.stack((q, k, heads[:, 2]), dim=1).reshape(m, n)
    assert relative_error(out.cpu(), expected) <= OUTPUT_ROUNDING[dtype]
    assert torch.equal(out, run(*operands, after=after, tile=tile)), "two runs differ"


def _norm_rope(x: torch.Tensor, norm: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
    """float64 [M, heads, 128]: as reference.rms_norm_rope, without its rounding."""
    x = x * (x.square().mean(dim=-1, keepdim=True) + 1e-6).rsqrt() * norm.double()
    sine, cosine = rotary.double()[:, None, :, 0], rotary.double()[:, None, :, 1]
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), dim=-1).reshape(x.shape)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tile", [None, *tiles.TILES["sm_86"]])
def test_two_inputs_are_summed(tile: tiles.Tile | None, dtype: torch.dtype) -> None:
    """A signed and an unsigned input, each with a K and a rank of its own, summed before anything is rounded."""
    from svdq.kernels.epilogue import After

    m, n = 130, 384
    first = problem(m, n, 256, 32, dtype)
    codes, ascales, lora_act, weight, _ = problem(m, n, 640, 16, dtype, act_unsigned=True, seed=1)
    expected = exact(*first) + exact(codes, ascales, lora_act, weight, None)
    second = (
        act_layout.pack_act(codes).to(DEVICE),
        act_layout.pack_ascales(ascales).to(DEVICE),
        lora_act.to(DEVICE),
        on_gpu(weight.pack()),
    )
    out = run(*first, second=second, tile=tile)
    assert relative_error(out.cpu(), expected) <= OUTPUT_ROUNDING[dtype]
    assert torch.equal(out, run(*first, second=second, tile=tile)), "two runs differ"
    gate, residual = torch.randn(1, n).to(dtype), torch.randn(m, n).to(dtype)
    after = After(gate=gate.to(DEVICE), residual=residual.to(DEVICE))
    out = run(*first, second=second, tile=tile, after=after)
    assert relative_error(out.cpu(), residual.double() + gate.double() * expected) <= OUTPUT_ROUNDING[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
def test_outputs_side_by_side(out_dtype: torch.dtype) -> None:
    """A part of a wider tensor is written, and nothing beside it."""
    operands = problem(130, 256, 256, 16, torch.bfloat16)
    wide = torch.full((131, 128 + 256 + 384), 7.0, dtype=out_dtype, device=DEVICE)
    out = run(*operands, out=wide[:130, 128:384])
    assert torch.equal(out, run(*operands, out_dtype=out_dtype))
    assert (wide[:, :128] == 7).all() and (wide[:, 384:] == 7).all() and (wide[130] == 7).all()
    with pytest.raises(ValueError, match=r"out is torch.float32 \(130, 128\)"):
        run(*operands, out=torch.empty(130, 128, device=DEVICE))


@pytest.mark.gpu
def test_epilogues_that_do_not_fit_are_refused() -> None:
    from svdq.kernels.epilogue import After

    operands = problem(64, 128, 128, 0, torch.bfloat16)
    gate, residual = torch.zeros(1, 128).bfloat16().to(DEVICE), torch.zeros(64, 128).bfloat16().to(DEVICE)
    with pytest.raises(ValueError, match="expected gelu, or gate and residual, or norm_q"):
        run(*operands, after=After(gelu=True, gate=gate, residual=residual))
    with pytest.raises(ValueError, match="gate has 3 rows, expected a divisor of 64"):
        run(*operands, after=After(gate=gate.expand(3, 128), residual=residual))
    with pytest.raises(ValueError, match=r"residual is torch.float32 .* expected torch.bfloat16"):
        run(*operands, after=After(gate=gate, residual=residual.float()))


@pytest.mark.gpu
def test_every_tile_gives_the_same_bits() -> None:
    operands = problem(300, 512, 384, 32, torch.bfloat16)
    expected = run(*operands)
    for tile in {*tiles.TILES["sm_80"], *tiles.TILES["sm_86"]}:
        assert torch.equal(run(*operands, tile=tile), expected), tile


@pytest.mark.gpu
def test_padding_rows_do_not_matter() -> None:
    """Codes and scales of rows beyond M filled with 0xFF and NaN: the same bits, and nothing is written past M rows."""
    from svdq.kernels.gemm_int4 import gemm_w4a4

    m = 70
    codes, ascales, lora_act, weight, bias = problem(m, 256, 256, 16, torch.bfloat16)
    expected = run(codes, ascales, lora_act, weight, bias)
    padding = act_layout.blocks_of(m) * act_layout.BLOCK_M - m
    codes = torch.cat((codes, torch.full((padding, codes.shape[1]), -1, dtype=torch.int8)))
    ascales = torch.cat((ascales, torch.full((padding, ascales.shape[1]), float("nan")).bfloat16()))
    out = gemm_w4a4(
        act_layout.pack_act(codes).to(DEVICE),
        act_layout.pack_ascales(ascales).to(DEVICE),
        lora_act.to(DEVICE),
        on_gpu(weight.pack()),
        bias.to(DEVICE),
    )
    assert torch.equal(out, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("name", golden_names("kernels/*_gemm_*.safetensors"))
def test_gemm_on_data_of_the_original(name: str) -> None:
    """Recorded operands of the original kernels: at output rounding from float64, and nearer to it than they are."""
    tensors = load_golden(name)
    dtype, codes = tensors["out.out"].dtype, tensors["in.logical.act"]
    m, k = codes.shape
    lora_act = tensors.get("in.logical.lora_act_in", torch.zeros(m, 0))
    if lora_act.shape[1]:
        lora_act = lora_act * tensors["in.lora_scales"].repeat_interleave(16)
    weight = W4A4(
        q=tensors["in.logical.wgt"],
        wscales=tensors["in.logical.wscales"],
        smooth_factor=torch.ones(k, dtype=dtype),
        proj_down=torch.zeros(lora_act.shape[1], k, dtype=dtype),
        proj_up=tensors.get("in.logical.lora_up", torch.zeros(tensors["in.logical.wgt"].shape[0], 0, dtype=dtype)),
        act_unsigned="_unsigned_" in name,
    )
    operands = (codes, tensors["in.logical.ascales"], lora_act, weight, tensors.get("in.logical.bias"))
    packed = weight.pack()
    assert_same(packed.qweight.view(torch.uint8), tensors["in.packed.wgt"].view(torch.uint8), "qweight")
    assert_same(packed.wscales, tensors["in.packed.wscales"], "wscales")
    out, expected = run(*operands).cpu(), exact(*operands)
    if dtype == torch.float16:
        expected = expected.clamp(-65504, 65504)
    error = relative_error(out, expected)
    assert error <= OUTPUT_ROUNDING[dtype]
    assert error < relative_error(tensors["out.out"], expected)


@pytest.mark.gpu
def test_operands_that_do_not_fit_are_refused() -> None:
    codes, ascales, lora_act, weight, bias = problem(64, 128, 256, 16, torch.bfloat16)
    with pytest.raises(ValueError, match=r"ascales is torch.bfloat16 .*, expected"):
        run(codes, ascales[:, :2], lora_act, weight, bias)
    with pytest.raises(ValueError, match=r"wscales is torch.bfloat16 .*, expected torch.float16"):
        run(codes, ascales.half(), lora_act, weight, bias)


# What Triton 3.6.0 is held to, and every other version. The original's main loop, accumulating in bf16, has 13.05.
INSTRUCTIONS_PER_MMA = 12.5
INSTRUCTIONS_PER_MMA_ELSEWHERE = 14.0  # and warps of 32 x 64, which take small shapes only
COMPILED = [(arch, i, "bf16", False) for arch in ("sm_80", "sm_86", "sm_89", "sm_90") for i in range(3)]
COMPILED += [("sm_86", 0, "bf16", True), ("sm_86", 0, "fp16", False), ("sm_89", 1, "fp16", True)]


@pytest.mark.parametrize(("arch", "index", "dtype", "act_unsigned"), COMPILED)
def test_main_loop_is_lean_without_spills(arch: str, index: int, dtype: str, act_unsigned: bool) -> None:
    """Compiled for GPUs that need not be here. sm_90 has no INT4 MMA in its machine code: a call emulates it."""
    triton = pytest.importorskip("triton")
    from svdq.benchmarks.sass import gemm_int4_figures

    tile = tiles.TILES[arch][index]
    figures = gemm_int4_figures(tile, arch, dtype, act_unsigned)
    assert figures.spill_bytes == 0
    assert figures.registers <= tiles.REGISTERS[tile.accumulators]
    if arch != "sm_90":
        assert figures.shared_bytes == tile.shared_bytes
        assert figures.mmas == 2 * tile.m16_per_warp * tile.n8_per_warp
        strict = triton.__version__ == "3.6.0" and tile.accumulators == 128
        assert figures.instructions_per_mma <= (INSTRUCTIONS_PER_MMA if strict else INSTRUCTIONS_PER_MMA_ELSEWHERE)


@pytest.mark.parametrize("after", ["GELU", "GATE_RESIDUAL", "NORM_ROPE"])
@pytest.mark.parametrize(("m", "n"), [(512, 3072), (4608, 9216)])
def test_main_loop_stays_lean_under_epilogues(m: int, n: int, after: str) -> None:
    """Epilogues may keep up to 40 bytes of addresses in local memory, none of it touched in the main loop."""
    triton = pytest.importorskip("triton")
    from svdq.benchmarks.sass import gemm_int4_figures

    tile = tiles.choose_tile(m, n, "sm_86", epilogue=after)
    figures = gemm_int4_figures(tile, "sm_86", after=after)
    limit = INSTRUCTIONS_PER_MMA if triton.__version__ == "3.6.0" else INSTRUCTIONS_PER_MMA_ELSEWHERE
    assert figures.instructions_per_mma <= limit
    if triton.__version__ == "3.6.0":
        assert figures.loop_spills == 0
        assert figures.spill_bytes <= 40


@pytest.mark.parametrize("after", ["NONE", "GATE_RESIDUAL"])
def test_main_loops_stay_lean_with_two_inputs(after: str) -> None:
    """Two loops in one kernel: a few values in local memory, at most one access to it for four MMAs."""
    triton = pytest.importorskip("triton")
    from svdq.benchmarks.sass import gemm_int4_figures

    tile = tiles.choose_tile(4608, 3072, "sm_86")
    figures = gemm_int4_figures(tile, "sm_86", after=after, parts=2)
    if triton.__version__ == "3.6.0":
        assert figures.instructions_per_mma <= INSTRUCTIONS_PER_MMA
        assert figures.loop_spills <= figures.mmas // 4
        assert figures.spill_bytes <= 128


def test_32_bit_output_compiles_without_spills() -> None:
    pytest.importorskip("triton")
    from svdq.benchmarks.sass import gemm_int4_figures

    tile = tiles.choose_tile(4608, 3072, "sm_86", out_bits=32)
    figures = gemm_int4_figures(tile, "sm_86", "bf16", out="fp32")
    assert figures.spill_bytes == 0
    assert figures.registers <= tiles.REGISTERS[tile.accumulators]
