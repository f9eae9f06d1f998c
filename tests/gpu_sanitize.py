"""Every kernel once at a small shape with a ragged end: a program for NVIDIA's compute-sanitizer.

    compute-sanitizer --tool memcheck python3 tests/gpu_sanitize.py
    compute-sanitizer --tool racecheck python3 tests/gpu_sanitize.py

Results are compared with float64 and the reference; the exit code is 1 if one is wrong.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator

# Before torch: every tensor gets memory of its own, so that memcheck sees an access beyond its end.
os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

import conftest  # noqa: F401  makes the clone importable as svdq
import test_feedback
import test_gemm_int4
import test_gemm_int8
import test_gemm_quantize
import test_gemv
import test_lora_rows
import test_quantize
import test_quantize_int8
import torch
import triton
from checks import OUTPUT_ROUNDING, assert_codes_close, relative_error
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from svdq.kernels import act_layout, reference
from svdq.kernels.device import describe
from svdq.kernels.gemm_int8 import HOPPER_TRITON, gemm_w8a8
from svdq.kernels.quantize_int8 import Cut
from svdq.kernels.tiles import TILES, Tile
from svdq.kernels.weights_int8 import expand_w4_to_int8

M, N, K, RANK = 70, 384, 256, 32  # M: two blocks of 64 tokens, the second nearly empty; N: one head of each of q, k, v
DTYPE = torch.bfloat16


def gemm(tile: Tile, act_unsigned: bool) -> None:
    operands = test_gemm_int4.problem(M, N, K, RANK, DTYPE, act_unsigned)
    _check(test_gemm_int4.run(*operands, tile=tile), test_gemm_int4.exact(*operands))


def gemm_float32(tile: Tile) -> None:
    operands = test_gemm_int4.problem(M, N, K, RANK, DTYPE)
    _check(test_gemm_int4.run(*operands, out_dtype=torch.float32, tile=tile), test_gemm_int4.exact(*operands))


def gemm_gelu(tile: Tile) -> None:
    operands, y = _small_problem()
    out = test_gemm_int4.run(*operands, after=_after(gelu=True), tile=tile)
    _check(out, torch.nn.functional.gelu(y, approximate="tanh"))


def gemm_gate_residual(tile: Tile) -> None:
    operands, y = _small_problem()
    gate, residual = _random(2, N), _random(M, N)
    out = test_gemm_int4.run(*operands, after=_after(gate=gate, residual=residual), tile=tile)
    _check(out, residual.double() + gate.double().repeat_interleave(M // 2, dim=0) * y)


def gemm_norm_rope(tile: Tile) -> None:
    operands, y = _small_problem()
    norm_q, norm_k = 1 + _random(128) / 4, 1 - _random(128) / 4
    angle = torch.linspace(0, 6, M * 64).reshape(M, 64)
    rotary = torch.stack((angle.sin(), angle.cos()), dim=-1)
    out = test_gemm_int4.run(*operands, after=_after(norm_q=norm_q, norm_k=norm_k, rotary=rotary), tile=tile)
    heads = y.reshape(M, 3, -1, 128)
    q, k = (test_gemm_int4._norm_rope(heads[:, i], norm, rotary) for i, norm in enumerate((norm_q, norm_k)))
    _check(out, torch.stack((q, k, heads[:, 2]), dim=1).reshape(M, N))


def gemm_two_inputs(tile: Tile) -> None:
    operands = test_gemm_int4.problem(M, N, K, RANK, DTYPE)
    codes, ascales, lora_act, weight, _ = test_gemm_int4.problem(M, N, 2 * K, 16, DTYPE, act_unsigned=True, seed=1)
    packed = act_layout.pack_act(codes), act_layout.pack_ascales(ascales), lora_act
    second = (*(part.to(test_gemm_int4.DEVICE) for part in packed), test_gemm_int4.on_gpu(weight.pack()))
    expected = test_gemm_int4.exact(*operands) + test_gemm_int4.exact(codes, ascales, lora_act, weight, None)
    _check(test_gemm_int4.run(*operands, second=second, tile=tile), expected)


def gemm_gelu_quantize(tile: Tile) -> None:
    operands, y = _small_problem()
    after = test_gemm_quantize.following(N, RANK, DTYPE)
    result = test_gemm_quantize.run(operands, after, tile=tile, rounds=3)
    codes, ascales, lora_act = test_gemm_quantize.valid(result, M)
    x = torch.nn.functional.gelu(y, approximate="tanh").to(DTYPE)
    expected = reference.quantize_act(x, after.smooth_factor, after.proj_down, True)
    assert_codes_close(codes, expected[0], share=5e-3)
    error = max(relative_error(ascales, expected[1].double()), relative_error(lora_act, expected[2].double()))
    assert error <= 1e-3, f"{error:.2e} from the reference"


def quantize(act_unsigned: bool, rank: int) -> None:
    x = _random(M, K)
    x = reference.gelu(x) if act_unsigned else x
    test_quantize.check(x, test_quantize.random_layer(K, rank, DTYPE, act_unsigned))


def quantize_int8(act_unsigned: bool, batches: int) -> None:
    # In one slice: blocks that wait for each other could wait for ever under a tool that runs them one by one.
    test_quantize_int8.check(M, 2 * K, RANK, act_unsigned, batches, DTYPE, Cut(1, 4))


def expand(act_unsigned: bool) -> None:
    layer = test_gemm_int8.layer(N, K, RANK, DTYPE, act_unsigned)
    expanded = expand_w4_to_int8(test_gemm_int4.on_gpu(layer.pack()))
    q, scales, sums = reference.expand_w4_to_int8(layer)
    assert torch.equal(expanded.q.cpu(), q) and torch.equal(expanded.scales.cpu(), scales)
    assert not act_unsigned or torch.equal(expanded.sums.cpu(), sums)


def gemm_int8(kernel: str) -> None:
    operands = test_gemm_int8.problem(M, N, K, RANK, DTYPE)
    expected = test_gemm_int8.exact(*operands)
    for tile in test_gemm_int8.tiles(kernel):
        _check(gemm_w8a8(*operands, tile=tile), expected.cpu())


@gluon.jit
def _first(out):
    offs = gl.arange(0, 128, gl.BlockedLayout([1], [32], [4], [0]))
    gl.store(out + offs, offs)


@gluon.jit
def _second(out):
    offs = 128 + gl.arange(0, 128, gl.BlockedLayout([1], [32], [4], [0]))
    gl.store(out + offs, offs)


@gluon.jit
def divided_kernel(out):
    """Two groups of four warps, each of which writes numbers of its own."""
    gl.warp_specialize([(_first, (out,)), (_second, (out,))], [4], [64])


def warp_specialization() -> None:
    """Of Triton, alone; see test_sanitizer.py."""
    out = torch.empty(256, dtype=torch.int32, device="cuda")
    divided_kernel[(1,)](out, num_warps=4)
    assert torch.equal(out.cpu(), torch.arange(256, dtype=torch.int32))


def gemv(rows: int) -> None:
    from svdq.kernels.gemv import gemv_w4a16

    layer, x = test_gemv.random_layer(132, 320, DTYPE), _random(rows, 320)  # neither is a multiple of the blocks
    _check(gemv_w4a16(x.cuda(), test_gemv.to_gpu(layer.pack(3))), test_gemv.exact(x, layer))


def lora_rows(rows: int) -> None:
    from svdq.kernels.lora_rows import add_lora

    y, *others = test_lora_rows.factors(rows, 132, 320, 20, DTYPE)
    _check(add_lora(y.cuda(), *(tensor.cuda() for tensor in others)), test_lora_rows.exact(y, *others))


def feedback(awq: bool) -> None:
    test_feedback.check_against_torch(40, 256, DTYPE, awq)


def cases(arch: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """(name, what raises AssertionError if a result is wrong)."""
    for tile in TILES.get(arch, ()):
        size = f"{tile.block_m} x {tile.block_n}"
        for act_unsigned in (False, True):
            yield f"gemm {'u4' if act_unsigned else 's4'} {size}", lambda t=tile, u=act_unsigned: gemm(t, u)
        for case in (gemm_float32, gemm_gelu, gemm_gate_residual, gemm_norm_rope, gemm_two_inputs):
            yield f"{case.__name__} {size}", lambda t=tile, c=case: c(t)
    for tile in TILES.get(arch, ())[1:]:  # with the GELU behind it, the first one is not used
        yield f"gemm_gelu_quantize {tile.block_m} x {tile.block_n}", lambda t=tile: gemm_gelu_quantize(t)
    for act_unsigned in (False, True):
        for rank in (0, RANK):
            name = f"quantize {'unsigned' if act_unsigned else 'signed'}, rank {rank}"
            yield name, lambda u=act_unsigned, r=rank: quantize(u, r)
    for rows in (1, 3, 8):
        yield f"gemv {rows}", lambda r=rows: gemv(r)
        yield f"LoRA on {rows} rows", lambda r=rows: lora_rows(r)
    for awq in (False, True):
        yield f"error feedback, {'AWQ' if awq else 'INT4'}", lambda a=awq: feedback(a)
    for act_unsigned in (False, True):
        sign = "unsigned" if act_unsigned else "signed"
        yield f"expand to int8, {sign}", lambda u=act_unsigned: expand(u)
        for batches in (0, 2):  # of the norm
            name = f"quantize to int8, {sign}, {'norm' if batches else 'plain'}"
            yield name, lambda u=act_unsigned, b=batches: quantize_int8(u, b)
    yield "gemm int8", lambda: gemm_int8("plain")
    if arch == "sm_90" and triton.__version__.startswith(HOPPER_TRITON):
        yield "warp specialization alone", warp_specialization
        yield "gemm int8 for Hopper", lambda: gemm_int8("hopper")


def main() -> int:
    if not torch.cuda.is_available():
        print("torch sees no NVIDIA GPU", file=sys.stderr)
        return 2
    wrong = 0
    for name, case in cases(describe("cuda").architecture):
        try:
            case()
            print(f"{name}: ok", flush=True)
        except AssertionError as error:
            print(f"{name}: WRONG: {error}", flush=True)
            wrong += 1
    torch.cuda.synchronize()
    print(f"{wrong} cases: WRONG" if wrong else "every case: ok", flush=True)
    return 1 if wrong else 0


def _small_problem() -> tuple[tuple, torch.Tensor]:
    """Operands whose result is about one, where GELU is curved; and that result in float64."""
    operands = test_gemm_int4.problem(M, N, K, RANK, DTYPE)
    operands[3].wscales.div_(10), operands[3].proj_up.div_(10), operands[4].div_(10)
    return operands, test_gemm_int4.exact(*operands)


def _after(**parts: object):
    from svdq.kernels.epilogue import After

    on_gpu = {name: part.to(test_gemm_int4.DEVICE) if torch.is_tensor(part) else part for name, part in parts.items()}
    return After(**on_gpu)


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))).to(DTYPE)


def _check(out: torch.Tensor, expected: torch.Tensor) -> None:
    error = relative_error(out.cpu(), expected)
    assert error <= OUTPUT_ROUNDING[out.dtype], f"{error:.2e} from float64"


if __name__ == "__main__":
    sys.exit(main())
