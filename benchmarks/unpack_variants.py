"""INT4 weights for INT8 products, three ways, on this GPU: `python3 benchmarks/unpack_variants.py`.

    kept        the product with an INT8 weight that is there
    expanded    the same behind ``expand_w4_to_int8``, which writes that weight anew
    unpacked    a product that reads the codes and makes INT8 of each block in registers, once for every block of rows

All three with one plain Triton kernel, so that they differ in nothing else, each with its fastest tile; beside them
what ``gemm_w8a8`` takes with a kept weight. No low-rank branch, no epilogue. A line for each M x N x K: microseconds,
medians. Results of all tiles are compared bit by bit. About a minute.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import conftest  # noqa: F401  makes the clone importable as svdq
import torch
import triton
import triton.language as tl
from torch import Tensor

from svdq.benchmarks.measure import time_calls
from svdq.kernels.gemm_int8 import gemm_w8a8
from svdq.kernels.int4 import GROUP, PackedW4A4
from svdq.kernels.weights_int8 import W8, expand_w4_to_int8

TOKENS = (4608, 1536, 512, 64)
WEIGHTS = ((9216, 3072), (3072, 12288))  # [N, K]
TILES = ((128, 128, 8, 4), (256, 128, 8, 3), (64, 128, 4, 4))  # rows, outputs, warps, stages


@triton.jit
def product_kernel(
    codes_ptr, w_ptr, ratios_ptr, wscales_ptr, scales_ptr, out_ptr, M, N, K,
    UNPACK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """BM rows and BN outputs. w_ptr: int8 [N, K], or UNPACK: two codes a byte, [N, K / 2], and ratios float32
    [N, K / 64]. The weight is the first operand: those can come from registers."""
    blocks_m, blocks_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    block, in_group = tl.program_id(0), GROUP_M * blocks_n
    first_m = block // in_group * GROUP_M
    group_m = tl.minimum(blocks_m - first_m, GROUP_M)
    offs_m = (first_m + block % in_group % group_m) * BM + tl.arange(0, BM)
    offs_n = block % in_group // group_m * BN + tl.arange(0, BN)
    offs_k = tl.arange(0, BK)
    rows = tl.minimum(offs_m, M - 1).to(tl.int64)
    acc = tl.zeros([BN, BM], tl.int32)
    for k in range(0, K, BK):
        x = tl.load(codes_ptr + rows[None, :] * K + (k + offs_k)[:, None])
        if UNPACK:
            pairs = tl.load(w_ptr + offs_n[:, None] * (K // 2) + (k // 2 + tl.arange(0, BK // 2))[None, :]).to(tl.int32)
            even, odd = ((pairs & 15) ^ 8) - 8, ((pairs >> 4 & 15) ^ 8) - 8
            values = tl.reshape(tl.join(even, odd).to(tl.float32), [BN, BK // 64, 64])
            groups = k // 64 + tl.arange(0, BK // 64)
            ratios = tl.load(ratios_ptr + offs_n[:, None] * (K // 64) + groups[None, :])
            # The sum rounds to an integer, ties to even, which is then the last byte.
            values = values * ratios[:, :, None] + 12582912.0
            w = tl.reshape(values, [BN, BK]).to(tl.int32, bitcast=True).to(tl.int8)
        else:
            w = tl.load(w_ptr + offs_n[:, None] * K + (k + offs_k)[None, :])
        acc = tl.dot(w, x, acc, out_dtype=tl.int32)
    y = acc.to(tl.float32) * tl.load(wscales_ptr + offs_n)[:, None]
    y *= tl.load(scales_ptr + rows)[None, :]
    mask = (offs_m < M)[None, :]
    tl.store(out_ptr + rows[None, :] * N + offs_n[:, None], y.to(out_ptr.dtype.element_ty), mask=mask)


def product(tile: tuple[int, ...], codes: Tensor, scales: Tensor, w: Tensor, ratios: Tensor, wscales: Tensor) -> Tensor:
    """T [M, N]; w: int8 [N, K], or uint8 [N, K / 2]."""
    (m, k), n = codes.shape, len(w)
    rows, outputs, warps, stages = tile
    out = torch.empty(m, n, dtype=torch.bfloat16, device=codes.device)
    product_kernel[(triton.cdiv(m, rows) * triton.cdiv(n, outputs),)](
        codes, w, ratios, wscales, scales, out, m, n, k,
        UNPACK=w.dtype == torch.uint8, BM=rows, BN=outputs, BK=128, GROUP_M=8, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


@dataclass(frozen=True)
class Weight:
    """One random weight [N, K] in each form: two codes a byte uint8 [N, K / 2] with ratios float32 [N, K / 64], the
    INT8 weight that they stand for, and 4-bit codes as a file has them (of other values)."""

    pairs: Tensor
    ratios: Tensor
    w8: W8
    packed: PackedW4A4

    @classmethod
    def random(cls, n: int, k: int, seed: int, device: str = "cuda") -> Weight:
        generator = torch.Generator(device).manual_seed(seed)

        def random(low: int, high: int, *shape: int) -> Tensor:
            return torch.randint(low, high, shape, generator=generator, device=device)

        codes, ratios = random(-8, 8, n, k), random(1, 128, n, k // GROUP) / 8
        q = (codes.view(n, -1, GROUP) * ratios[:, :, None]).round().to(torch.int8).view(n, k)
        scales = random(1, 100, n).float() * 1e-4
        pairs = (codes[:, 0::2] & 15) | (codes[:, 1::2] & 15) << 4
        wscales = (random(1, 100, k // GROUP, n) * 1e-4).bfloat16()
        none = [torch.zeros(*shape, dtype=torch.bfloat16, device=device) for shape in ((k,), (k, 0), (n, 0))]
        packed = PackedW4A4(random(-128, 128, n, k // 2).to(torch.int8), wscales, *none)
        return cls(pairs.to(torch.uint8), ratios, W8(q, scales, scales.view(torch.int32)), packed)


def call_all(*functions: Callable[[], object]) -> None:
    for function in functions:
        function()


def fastest(make: Callable[[Weight, tuple[int, ...]], Callable], weights: list[Weight]) -> tuple[float, tuple]:
    """(microseconds, tile) of what ``make`` makes for a weight and a tile; weights take turns, so that L2 has none."""
    return min((time_calls([make(w, tile) for w in weights], seconds=0.1).us, tile) for tile in TILES)


def measure(m: int, weights: list[Weight]) -> str:
    """The line of ``m`` rows. Raises RuntimeError where results differ."""
    n, k = weights[0].w8.n, weights[0].w8.k
    device = weights[0].pairs.device
    codes = torch.randint(-127, 128, (m, k), device=device, dtype=torch.int8)
    scales = torch.rand(m, device=device) * 1e-4
    into = W8(*(torch.empty_like(tensor) for tensor in (weights[0].w8.q, weights[0].w8.scales, weights[0].w8.sums)))
    lora_act, proj_up = (torch.empty(rows, 0, dtype=torch.bfloat16, device=device) for rows in (m, n))

    def kept(w: Weight, tile: tuple[int, ...]) -> Callable:
        return partial(product, tile, codes, scales, w.w8.q, w.ratios, w.w8.scales)

    def unpacked(w: Weight, tile: tuple[int, ...]) -> Callable:
        return partial(product, tile, codes, scales, w.pairs, w.ratios, w.w8.scales)

    def expanded(w: Weight, tile: tuple[int, ...]) -> Callable:
        return partial(call_all, partial(expand_w4_to_int8, w.packed, into), kept(w, tile))

    expected = kept(weights[0], TILES[0])()
    for make in (kept, unpacked):
        for tile in TILES:
            if not torch.equal(make(weights[0], tile)(), expected):
                raise RuntimeError(f"{make.__name__} {tile}: another result for {m} x {n} x {k}")
    ours = [partial(gemm_w8a8, codes, scales, lora_act, w.w8, proj_up) for w in weights]
    found = [fastest(make, weights) for make in (kept, expanded, unpacked)]
    times = [us for us, _ in found] + [time_calls(ours, seconds=0.1).us]
    figures = "".join(f"{us:11.1f}" for us in times)
    return f"{m:6} {n:6} {k:6}{figures}   {times[2] / times[0]:.2f}  {found[2][1]}"


def main() -> None:
    print("     M      N      K       kept   expanded   unpacked  gemm_w8a8   unpacked / kept, its tile")
    for n, k in WEIGHTS:
        weights = [Weight.random(n, k, seed) for seed in range(3)]
        for m in TOKENS:
            print(measure(m, weights), flush=True)


if __name__ == "__main__":
    main()
