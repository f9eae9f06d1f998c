"""Every variant of the INT8 GEMM on the GPU of this machine: correctness first, then a table of rates.

    python3 benchmarks/int8_variants.py [name ...]      all variants, or those whose names begin so

Each variant runs in a process of its own, so that one that does not compile, or hangs, costs its own rows only. All of
them compile at once; then they have the GPU one after the other, each for at most LIMIT seconds.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

LIMIT = 6
COMPILE_LIMIT = 45
MOST_HANGING = 2  # then the rest is left out
TOLERANCE = 2e-3  # of bf16 rounding, relative Frobenius norm
RANK = 32
# M, N, K, K2
SHAPES = (
    (4608, 9216, 3072, 0),
    (4608, 3072, 3072, 0),
    (4608, 12288, 3072, 0),
    (4608, 21504, 3072, 0),
    (4608, 3072, 12288, 0),
    (4608, 3072, 3072, 12288),
)
MORE_SHAPES = (
    (4096, 9216, 3072, 0),
    (4096, 3072, 3072, 0),
    (4096, 12288, 3072, 0),
    (4096, 3072, 12288, 0),
    (512, 9216, 3072, 0),
    (512, 3072, 12288, 0),
)
# M, N, K, K2, rank, epilogue, unsigned: edges, pieces, two inputs
ODD = (
    (63, 384, 1152, 0, 48, "NORM_ROPE", False),
    (1, 256, 768, 0, 0, "NONE", True),
    (4685, 640, 384, 0, 16, "GELU", True),
    (300, 3072, 3072, 0, 128, "GATE_RESIDUAL", False),
    (130, 768, 128, 2048, 80, "GATE_RESIDUAL", True),
    (2304, 9216, 3072, 0, 32, "NORM_ROPE", False),
)


# unsigned, step, warps, stages
EXPAND = (
    (False, 8, 4, 1),
    (False, 8, 4, 2),
    (False, 8, 8, 2),
    (False, 4, 4, 3),
    (False, 4, 4, 1),
    (False, 8, 4, 3),
    (False, 16, 8, 2),
    (True, 8, 4, 2),
)


@dataclass(frozen=True)
class Variant:
    """tile: of the kernel · shapes: to be timed, and the first and last of them to be checked · rank, epilogue ·
    odd: further problems to be checked · wrong: results are known to be wrong · run: a function instead of all that."""

    tile: object = None
    shapes: tuple = ()
    rank: int = RANK
    epilogue: str = "NONE"
    odd: tuple = ()
    wrong: bool = False
    run: Callable[[], None] | None = None


def variants() -> dict[str, Variant]:
    """In the order of their importance."""
    from svdq.kernels.tiles_int8 import HopperTile, Tile

    qkv, proj, fc1, linear1, fc2, linear2 = SHAPES
    whole = {"least_steps": 10**6}  # no pieces
    own = HopperTile(rows=128, tm=128, tn=128, stages=5, **whole)
    wide, square = Tile(128, 256, 128, 8, 3, tma=True), Tile(128, 128, 128, 8, 4, tma=True)
    return {
        "shared": Variant(HopperTile(), (qkv, linear1)),
        "shared-pieces": Variant(HopperTile(), (fc2, proj, fc1)),
        "shared-second": Variant(HopperTile(), (linear2,)),
        "odd-a": Variant(HopperTile(), odd=ODD[:2]),
        "odd-b": Variant(HopperTile(), odd=ODD[2:4]),
        "odd-c": Variant(HopperTile(), odd=ODD[4:]),
        "whole": Variant(HopperTile(**whole), (fc2, proj, fc1)),
        "own-128x128": Variant(own, (qkv, proj, fc2), odd=ODD[3:4]),
        "gate": Variant(HopperTile(), (fc2, proj), epilogue="GATE_RESIDUAL"),
        "gelu": Variant(HopperTile(), (fc1,), epilogue="GELU"),
        "norm-rope": Variant(HopperTile(), (qkv,), epilogue="NORM_ROPE"),
        "second-gate": Variant(HopperTile(), (linear2,), epilogue="GATE_RESIDUAL"),
        "skew0": Variant(HopperTile(skew=0, **whole), (qkv, fc2)),
        "skew3": Variant(HopperTile(skew=3, **whole), (qkv, fc2)),
        "probe-no-loads": Variant(HopperTile(probe=1, **whole), (qkv, fc2), wrong=True),
        "probe-no-weights": Variant(HopperTile(probe=2, **whole), (qkv, fc2), wrong=True),
        "group16": Variant(HopperTile(group_m=16, **whole), (qkv, fc2)),
        "rank0": Variant(HopperTile(**whole), (qkv, fc2), rank=0),
        "own-gelu": Variant(own, (fc1,), epilogue="GELU"),
        "small-m": Variant(HopperTile(), MORE_SHAPES[4:]),
        "triton-wide": Variant(wide, (qkv, fc2, proj)),
        "triton-square": Variant(square, (qkv, fc2, proj, linear2)),
        "reference": Variant(run=run_reference),
        "expand": Variant(run=run_expand),
    }


# ---- one variant


def problem(m: int, n: int, k: int, k2: int, rank: int, unsigned: bool = False, seed: int = 0):
    """Operands on the GPU, heavy-tailed."""
    import torch

    from svdq.kernels.weights_int8 import W8

    g = torch.Generator(device="cuda").manual_seed(seed)

    def codes(rows: int, columns: int):
        x = torch.randn(rows, columns, generator=g, device="cuda")
        x.mul_(torch.rand(1, columns, generator=g, device="cuda").mul_(1.5).exp_())
        return x.mul_(127 / x.abs().amax(dim=1, keepdim=True)).round_().to(torch.int8)

    def scales(count: int, size: float):
        return (torch.rand(count, generator=g, device="cuda") + 0.2) * size

    def operand(columns: int, flag: bool):
        q = codes(n, columns)
        weight = W8(q, scales(n, 1e-2 * columns**-0.5), q.sum(dim=1, dtype=torch.int32), flag)
        return codes(m, columns), scales(m, 1e-2), weight

    first = operand(k, unsigned)
    second = operand(k2, not unsigned) if k2 else None
    lora_act = torch.randn(m, rank, generator=g, device="cuda").bfloat16()
    proj_up = (torch.randn(n, rank, generator=g, device="cuda") * 0.3).bfloat16()
    bias = torch.randn(n, generator=g, device="cuda").bfloat16()
    return first, second, lora_act, proj_up, bias


def call(tile, operands, after=None, out=None):
    from svdq.kernels.gemm_int8 import gemm_w8a8

    (codes, scales, weight), second, lora_act, proj_up, bias = operands
    return gemm_w8a8(codes, scales, lora_act, weight, proj_up, bias, after=after, out=out, second=second, tile=tile)


def epilogue(name: str, m: int, n: int):
    """(After, function on float64 [M, N])."""
    import torch

    from svdq.kernels.epilogue import After

    g = torch.Generator(device="cuda").manual_seed(1)
    if name == "GELU":
        return After(gelu=True), lambda y: torch.nn.functional.gelu(y, approximate="tanh")
    if name == "GATE_RESIDUAL":
        gate = torch.randn(1, n, generator=g, device="cuda").bfloat16()
        residual = torch.randn(m, n, generator=g, device="cuda").bfloat16()
        return After(gate=gate, residual=residual), lambda y: residual.double() + gate.double() * y
    if name == "NORM_ROPE":
        norms = [(1 + 0.3 * torch.randn(128, generator=g, device="cuda")).bfloat16() for _ in range(2)]
        angle = torch.rand(m, 64, generator=g, device="cuda") * 6
        sine, cosine = angle.sin(), angle.cos()

        def norm_rope(y):
            heads = y.reshape(m, 3, -1, 128).clone()
            for i, norm in enumerate(norms):
                x = heads[:, i]
                x = x * (x.square().mean(dim=-1, keepdim=True) + 1e-6).rsqrt() * norm.double()
                even, odd, s, c = x[..., 0::2], x[..., 1::2], sine[:, None].double(), cosine[:, None].double()
                heads[:, i] = torch.stack((even * c - odd * s, even * s + odd * c), dim=-1).reshape(x.shape)
            return heads.reshape(m, n)

        rotary = torch.stack((sine, cosine), dim=-1)
        return After(norm_q=norms[0], norm_k=norms[1], rotary=rotary), norm_rope
    return None, lambda y: y


def exact(operands):
    """float64 of the integer products and everything else."""
    first, second, lora_act, proj_up, bias = operands
    y = lora_act.double() @ proj_up.double().t() + bias.double()
    for part in (first, second):
        if part is not None:
            codes, scales, weight = part
            act = codes.double() + 128 * weight.act_unsigned
            y += (act @ weight.q.double().t()) * scales.double()[:, None] * weight.scales.double()
    return y


def error(tile, m, n, k, k2, rank, name="NONE", unsigned=False) -> float:
    operands = problem(m, n, k, k2, rank, unsigned)
    after, function = epilogue(name, m, n)
    expected = function(exact(operands))
    out = call(tile, operands, after)
    again = call(tile, operands, after)
    distance = ((out.double() - expected).norm() / expected.norm()).item()
    # What one row or one tile computes wrongly must not drown in the norm.
    worst = ((out.double() - expected).abs().amax() / expected.square().mean().sqrt()).item()
    same = bool((out == again).all())
    return distance if same and worst < 1 else -max(distance, worst)


def microseconds(functions, seconds: float = 0.06) -> float:
    """Median time of a call in CUDA graphs of one call of each function."""
    import torch

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for function in functions:
            function()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for function in functions:
            function()
    graph.replay()
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    times = []
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(times) < 5:
        events[0].record()
        graph.replay()
        events[1].record()
        torch.cuda.synchronize()
        times.append(events[0].elapsed_time(events[1]) * 1e3 / len(functions))
    return statistics.median(times)


def report(name: str, shape: tuple, us: float) -> None:
    m, n, k, k2 = shape
    what = f"{m:5} x {n:5} x {f'{k}+{k2}' if k2 else k:>10}"
    print(f"{name:16} {what} {us:8.1f} us {2e-6 * m * n * (k + k2) / us:6.0f} TOPS", flush=True)


def run_reference() -> None:
    import torch

    for shape in SHAPES:
        m, n, k, k2 = shape
        a = [torch.randn(m, k + k2, device="cuda").bfloat16() for _ in range(3)]
        b = [torch.randn(n, k + k2, device="cuda").bfloat16() for _ in range(3)]
        report("bf16 cuBLAS", shape, microseconds([lambda x=x, y=y: x @ y.t() for x, y in zip(a, b, strict=True)]))
        a = [x.to(torch.float8_e4m3fn) for x in a]
        b = [x.to(torch.float8_e4m3fn) for x in b]
        sa = torch.ones(m, 1, device="cuda")
        sb = torch.ones(1, n, device="cuda")
        calls = [
            partial(torch._scaled_mm, x, y.t(), sa, sb, out_dtype=torch.bfloat16, use_fast_accum=True)
            for x, y in zip(a, b, strict=True)
        ]
        report("fp8 row-wise", shape, microseconds(calls))


def run_expand() -> None:
    import torch

    from svdq.kernels import reference
    from svdq.kernels.int4 import W4A4
    from svdq.kernels.weights_int8 import expand_w4_to_int8

    for n, k in ((9216, 3072), (3072, 12288), (3072, 3072), (21504, 3072)):
        layers = []
        for unsigned in (False, True):
            g = torch.Generator(device="cuda").manual_seed(0)
            weight = W4A4(
                q=torch.randint(-8, 8, (n, k), generator=g, device="cuda").to(torch.int8),
                wscales=(torch.rand(n, k // 64, generator=g, device="cuda") * 0.02 + 0.001).bfloat16(),
                smooth_factor=torch.ones(k, device="cuda").bfloat16(),
                proj_down=torch.zeros(16, k, device="cuda").bfloat16(),
                proj_up=torch.zeros(n, 16, device="cuda").bfloat16(),
                act_unsigned=unsigned,
            )
            packed = weight.pack()
            got = expand_w4_to_int8(packed)
            q, scales, _ = reference.expand_w4_to_int8(weight)
            off = (got.q.int() - q.int()).abs()
            right = off.max().item() <= 1 and off.float().mean().item() < 1e-4 and torch.equal(got.scales, scales)
            if unsigned:
                right &= torch.equal(got.sums, got.q.sum(dim=1, dtype=torch.int32))
            print(f"expand {n} x {k} unsigned={unsigned}: {'right' if right else 'WRONG'}, {off.sum().item()} off")
            layers.append(packed)
        out = torch.empty(4, n, k, dtype=torch.int8, device="cuda")
        source = torch.empty(4, n, k * 3 // 4, dtype=torch.int8, device="cuda")
        us = microseconds([source[i].clone for i in range(4)], 0.05)
        print(f"  copy of as many bytes {us:6.1f} us {1.5e-6 * n * k / us:5.2f} TB/s")
        for unsigned, step, warps, stages in EXPAND:
            expand = partial(expand_w4_to_int8, layers[unsigned], step=step, warps=warps, stages=stages)
            calls = [partial(expand, out=out[i]) for i in range(4)]
            us = microseconds(calls, 0.05)
            what = f"unsigned={unsigned} step={step} warps={warps} stages={stages}"
            print(f"  {what} {us:6.1f} us {1.5e-6 * n * k / us:5.2f} TB/s", flush=True)


def run_variant(name: str) -> None:
    import torch

    torch.cuda.init()
    variant = variants()[name]
    if variant.run is run_expand:
        warm_expand()
    elif variant.run is None:
        warm(variant)
    print("READY", flush=True)
    input()
    variant.run() if variant.run else measure(name, variant)
    torch.cuda.synchronize()


def problems(v: Variant) -> list[tuple]:
    """What is checked."""
    edges = [] if v.wrong else v.shapes[:1]
    return [*v.odd, *((*shape, v.rank, v.epilogue, False) for shape in edges)]


def measure(name: str, v: Variant) -> None:
    for m, n, k, k2, rank, epilogue_name, unsigned in problems(v):
        e = error(v.tile, m, n, k, k2, rank, epilogue_name, unsigned)
        what = f"M={m} N={n} K={k}+{k2} R={rank} {epilogue_name}{' unsigned' if unsigned else ''}"
        print(f"{name:16} {what}: {e:.2e} {'right' if 0 <= e <= TOLERANCE else 'WRONG'}", flush=True)
    for shape in v.shapes:
        sets = [problem(*shape, v.rank, seed=seed) for seed in range(3)]
        after, _ = epilogue(v.epilogue, *shape[:2])
        report(name, shape, microseconds([lambda s=s, after=after: call(v.tile, s, after) for s in sets]))


class Warm:
    """A kernel that is compiled but not launched."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.kernel.warmup(*arguments, grid=grid, **options)


def warm(v: Variant) -> None:
    """Compile what will be needed, without using the GPU, which another process may be measuring."""
    from svdq.kernels import gemm_int8, gluon_hopper

    kernels = [(gemm_int8, "_gemm_w8a8_kernel"), (gluon_hopper, "gemm_w8a8_hopper_kernel")]
    originals = [getattr(*place) for place in kernels]
    for (module, name), kernel in zip(kernels, originals, strict=True):
        setattr(module, name, Warm(kernel))
    for m, n, k, k2, rank, name, unsigned in {
        *problems(v),
        *((*shape, v.rank, v.epilogue, False) for shape in v.shapes),
    }:
        call(v.tile, empty_problem(m, n, k, k2, rank, unsigned), empty_after(name, m, n))
    for (module, name), kernel in zip(kernels, originals, strict=True):
        setattr(module, name, kernel)


def warm_expand() -> None:
    import torch

    from svdq.kernels import weights_int8
    from svdq.kernels.int4 import PackedW4A4

    kernel = weights_int8._expand_kernel
    weights_int8._expand_kernel = Warm(kernel)
    for unsigned, step, warps, stages in EXPAND:
        shapes = ((48, 128), (3072, 16), (128, 16))
        bf16 = [torch.empty(*shape, dtype=torch.bfloat16, device="cuda") for shape in shapes]
        qweight = torch.empty(128, 1536, dtype=torch.int8, device="cuda")
        weight = PackedW4A4(qweight, bf16[0], bf16[0][0], bf16[1], bf16[2], unsigned)
        weights_int8.expand_w4_to_int8(weight, step=step, warps=warps, stages=stages)
    weights_int8._expand_kernel = kernel


def empty_problem(m: int, n: int, k: int, k2: int, rank: int, unsigned: bool):
    """As ``problem``, without values."""
    import torch

    from svdq.kernels.weights_int8 import W8

    def operand(columns: int, flag: bool):
        q = torch.empty(n, columns, dtype=torch.int8, device="cuda")
        sums = torch.empty(n, dtype=torch.int32, device="cuda")
        codes = torch.empty(m, columns, dtype=torch.int8, device="cuda")
        return codes, torch.empty(m, device="cuda"), W8(q, torch.empty(n, device="cuda"), sums, flag)

    low_rank = [torch.empty(rows, rank, dtype=torch.bfloat16, device="cuda") for rows in (m, n)]
    bias = torch.empty(n, dtype=torch.bfloat16, device="cuda")
    return operand(k, unsigned), operand(k2, not unsigned) if k2 else None, *low_rank, bias


def empty_after(name: str, m: int, n: int):
    import torch

    from svdq.kernels.epilogue import After

    def empty(*shape: int, dtype=torch.bfloat16):
        return torch.empty(*shape, dtype=dtype, device="cuda")

    if name == "GATE_RESIDUAL":
        return After(gate=empty(1, n), residual=empty(m, n))
    if name == "NORM_ROPE":
        return After(norm_q=empty(128), norm_k=empty(128), rotary=empty(m, 64, 2, dtype=torch.float32))
    return After(gelu=name == "GELU")


# ---- all of them


class Child:
    """The process of one variant; its lines are printed as they come."""

    def __init__(self, name: str):
        self.name = name
        self.ready = threading.Event()
        command = [sys.executable, __file__, "--variant", name]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        self.process = subprocess.Popen(command, text=True, **pipes)
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            if line.startswith("READY"):
                self.ready.set()
            else:
                print(line, end="", flush=True)
        self.ready.set()

    def measure(self) -> bool:
        """False if it hangs."""
        hangs = False
        if self.ready.is_set() and self.process.poll() is None:
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
            try:
                self.process.wait(LIMIT)
            except subprocess.TimeoutExpired:
                hangs = True
                print(f"{self.name:16} FAILED: still running after {LIMIT} s", flush=True)
        self.process.kill()
        code = self.process.wait()
        if code not in (0, -9):
            print(f"{self.name:16} FAILED with status {code}", flush=True)
        self.reader.join()
        return not hangs


def main(names: list[str]) -> None:
    begin = time.time()
    chosen = [name for name in variants() if not names or any(name.startswith(n) for n in names)]
    children = [Child(name) for name in chosen]
    for child in children:
        child.ready.wait(max(0.0, begin + COMPILE_LIMIT - time.time()))
        if not child.ready.is_set():
            print(f"{child.name:16} FAILED: not compiled after {COMPILE_LIMIT} s", flush=True)
    print(f"compiled after {time.time() - begin:.0f} s", flush=True)
    hanging = 0
    for child in children:
        if hanging < MOST_HANGING:
            hanging += not child.measure()
        else:
            child.process.kill()
            child.reader.join()
    print(f"{time.time() - begin:.0f} s")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    import conftest  # noqa: F401  makes the clone importable as svdq

    if sys.argv[1:2] == ["--variant"]:
        run_variant(sys.argv[2])
    else:
        main(sys.argv[1:])
