"""Rival tiles of the Hopper INT8 GEMM on the GPU of this machine, in the four calls of a FLUX block.

    python3 benchmarks/int8_variants.py [name ...]      all calls, or those named: qkv, proj, fc1, fc2, plain, linear1

Each call has its real epilogue; plain and linear1 have none. A row of the table is one number of tokens: microseconds
with each tile, with the tile that gemm_w8a8 chooses by itself, and of cuBLAS without epilogue and low-rank branch, all
in one run. Results are checked against float64. Each column runs in a process of its own, so that one that does not
compile, or hangs, costs its own column only. All of them compile at once; then they have the GPU one after the other,
each for at most LIMIT seconds.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

LIMIT = 6
COMPILE_LIMIT = 45
MOST_HANGING = 2  # then the rest is left out
TOLERANCE = 2e-3  # of bf16 rounding, relative Frobenius norm
RANK = 32
TOKENS = (4608, 4096, 1536, 1024, 512)
# N, K, epilogue, unsigned activation codes
CALLS = {
    "qkv": (9216, 3072, "NORM_ROPE", False),
    "proj": (3072, 3072, "GATE_RESIDUAL", False),
    "fc1": (12288, 3072, "GELU", False),
    "fc2": (3072, 12288, "GATE_RESIDUAL", True),
    "plain": (9216, 3072, "NONE", False),
    "linear1": (21504, 3072, "NONE", False),
}
LIBRARY = "cuBLAS"  # instead of a tile
SECONDS = 0.03  # of one measurement


def tiles(call_name: str) -> dict:
    """Name -> tile of a column; None is what gemm_w8a8 chooses by itself."""
    from svdq.kernels.tiles_int8 import HOPPER, NO_PIECES, choose_tile

    n, _, name, _ = CALLS[call_name]
    if name == "NONE":
        return {"chosen": None}
    return {
        "chosen": None,
        "whole": NO_PIECES,
        "pieces": replace(HOPPER, join=0),  # wherever they make the list of work shorter
        "triton": choose_tile(4608, n, "sm_90", epilogue=name),
    }


# ---- one column


def problem(m: int, n: int, k: int, unsigned: bool, seed: int = 0):
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

    q = codes(n, k)
    weight = W8(q, scales(n, 1e-2 * k**-0.5), q.sum(dim=1, dtype=torch.int32), unsigned)
    lora_act = torch.randn(m, RANK, generator=g, device="cuda").bfloat16()
    proj_up = (torch.randn(n, RANK, generator=g, device="cuda") * 0.3).bfloat16()
    bias = torch.randn(n, generator=g, device="cuda").bfloat16()
    return codes(m, k), scales(m, 1e-2), lora_act, weight, proj_up, bias


def call(tile, operands, after=None):
    from svdq.kernels.gemm_int8 import gemm_w8a8

    return gemm_w8a8(*operands, after=after, tile=tile)


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
    codes, scales, lora_act, weight, proj_up, bias = operands
    sums = (codes.double() + 128 * weight.act_unsigned) @ weight.q.double().t()
    return sums * scales.double()[:, None] * weight.scales.double() + lora_act.double() @ proj_up.double().t() + bias


def error(tile, m: int, n: int, k: int, name: str, unsigned: bool) -> float:
    """Relative distance to float64; negative if one value is far off or a second run differs."""
    operands = problem(m, n, k, unsigned)
    after, function = epilogue(name, m, n)
    expected = function(exact(operands))
    out = call(tile, operands, after)
    again = call(tile, operands, after)
    distance = ((out.double() - expected).norm() / expected.norm()).item()
    # What one row or one tile computes wrongly must not drown in the norm.
    worst = ((out.double() - expected).abs().amax() / expected.square().mean().sqrt()).item()
    same = bool((out == again).all())
    return distance if same and worst < 1 else -max(distance, worst)


def microseconds(functions, seconds: float = SECONDS) -> float:
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


def run_reference(call_name: str) -> None:
    import torch

    n, k, _, _ = CALLS[call_name]
    for m in TOKENS:
        a = [torch.randn(m, k, device="cuda").bfloat16() for _ in range(3)]
        b = [torch.randn(n, k, device="cuda").bfloat16() for _ in range(3)]
        result(m, "bf16", microseconds([lambda x=x, y=y: x @ y.t() for x, y in zip(a, b, strict=True)]))
        a = [x.to(torch.float8_e4m3fn) for x in a]
        b = [x.to(torch.float8_e4m3fn) for x in b]
        sa = torch.ones(m, 1, device="cuda")
        sb = torch.ones(1, n, device="cuda")
        calls = [
            partial(torch._scaled_mm, x, y.t(), sa, sb, out_dtype=torch.bfloat16, use_fast_accum=True)
            for x, y in zip(a, b, strict=True)
        ]
        result(m, "fp8", microseconds(calls))


def result(m: int, column: str, us: float) -> None:
    """For the parent process."""
    print(f"RESULT {m} {us} {column}", flush=True)


def run_column(call_name: str, column: str) -> None:
    import torch

    torch.cuda.init()
    if column != LIBRARY:
        warm(call_name, tiles(call_name)[column])
    print("READY", flush=True)
    input()
    if column == LIBRARY:
        run_reference(call_name)
    else:
        measure(call_name, column)
    torch.cuda.synchronize()


def measure(call_name: str, column: str) -> None:
    n, k, name, unsigned = CALLS[call_name]
    tile = tiles(call_name)[column]
    for m in TOKENS:
        e = error(tile, m, n, k, name, unsigned)
        if not 0 <= e <= TOLERANCE:
            print(f"{call_name} {m} {column}: WRONG, {e:.2e}", flush=True)
        sets = [problem(m, n, k, unsigned, seed) for seed in range(3)]
        after, _ = epilogue(name, m, n)
        result(m, column, microseconds([lambda s=s, after=after: call(tile, s, after) for s in sets]))


class Warm:
    """A kernel that is compiled but not launched."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.kernel.warmup(*arguments, grid=grid, **options)


def warm(call_name: str, tile) -> None:
    """Compile what will be needed, without using the GPU, which another process may be measuring."""
    from svdq.kernels import gemm_int8, gluon_hopper

    n, k, name, unsigned = CALLS[call_name]
    kernels = [(gemm_int8, "_gemm_w8a8_kernel"), (gluon_hopper, "gemm_w8a8_hopper_kernel")]
    originals = [getattr(*place) for place in kernels]
    for (module, kernel_name), kernel in zip(kernels, originals, strict=True):
        setattr(module, kernel_name, Warm(kernel))
    for m in TOKENS:
        call(tile, empty_problem(m, n, k, unsigned), empty_after(name, m, n))
    for (module, kernel_name), kernel in zip(kernels, originals, strict=True):
        setattr(module, kernel_name, kernel)


def empty_problem(m: int, n: int, k: int, unsigned: bool):
    """As ``problem``, without values."""
    import torch

    from svdq.kernels.weights_int8 import W8

    def empty(*shape: int, dtype=torch.bfloat16):
        return torch.empty(*shape, dtype=dtype, device="cuda")

    q, sums = empty(n, k, dtype=torch.int8), empty(n, dtype=torch.int32)
    weight = W8(q, empty(n, dtype=torch.float32), sums, unsigned)
    codes, scales = empty(m, k, dtype=torch.int8), empty(m, dtype=torch.float32)
    return codes, scales, empty(m, RANK), weight, empty(n, RANK), empty(n)


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
    """The process of one column; its results are kept, its other lines are printed as they come."""

    def __init__(self, call_name: str, column: str):
        self.name = f"{call_name} {column}"
        self.call_name = call_name
        self.results: dict[tuple[int, str], float] = {}  # (tokens, column) -> microseconds
        self.ready = threading.Event()
        command = [sys.executable, __file__, "--column", call_name, column]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        self.process = subprocess.Popen(command, text=True, **pipes)
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            if line.startswith("READY"):
                self.ready.set()
            elif line.startswith("RESULT "):
                _, m, us, column = line.rstrip().split(" ", 3)
                self.results[int(m), column] = float(us)
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
                print(f"{self.name}: FAILED, still running after {LIMIT} s", flush=True)
        self.process.kill()
        code = self.process.wait()
        if code not in (0, -9):
            print(f"{self.name}: FAILED with status {code}", flush=True)
        self.reader.join()
        return not hangs


def print_table(call_name: str, children: list[Child]) -> None:
    results = {key: us for child in children for key, us in child.results.items()}
    columns = list(dict.fromkeys(column for _, column in results))
    n, k, name, _ = CALLS[call_name]
    print(f"{call_name}: N={n} K={k} {name}, us; TOPS of the chosen")
    print("    M" + "".join(f"{column:>8}" for column in columns))
    for m in TOKENS:
        row = "".join(f"{results[m, column]:8.1f}" if (m, column) in results else "       -" for column in columns)
        chosen = results.get((m, "chosen"))
        print(f"{m:5}{row}" + (f"{2e-6 * m * n * k / chosen:6.0f}" if chosen else ""), flush=True)


def main(names: list[str]) -> None:
    begin = time.time()
    names = names or list(CALLS)
    children = [Child(name, column) for name in names for column in (*tiles(name), LIBRARY)]
    for child in children:
        child.ready.wait(max(0.0, begin + COMPILE_LIMIT - time.time()))
        if not child.ready.is_set():
            print(f"{child.name}: FAILED, not compiled after {COMPILE_LIMIT} s", flush=True)
    print(f"compiled after {time.time() - begin:.0f} s", flush=True)
    hanging = 0
    for name in names:
        group = [child for child in children if child.call_name == name]
        for child in group:
            if hanging < MOST_HANGING:
                hanging += not child.measure()
            else:
                child.process.kill()
                child.reader.join()
        print_table(name, group)
    print(f"{time.time() - begin:.0f} s")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    import conftest  # noqa: F401  makes the clone importable as svdq

    if sys.argv[1:2] == ["--column"]:
        run_column(sys.argv[2], sys.argv[3])
    else:
        main(sys.argv[1:])
