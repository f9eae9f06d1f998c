"""Cuts of the memory-bound kernels of the INT8 mode on this GPU: `python3 benchmarks/int8_memory_variants.py [word]`.

One line for each shape and cut: what differs from the reference, time of a call in a CUDA graph of calls on operands
beyond the L2 cache, share of a copy's bandwidth. `word` selects lines whose name has it. About a minute: processes side
by side compile, then one process measures; if it is silent for LIMIT seconds, another goes on behind what stopped it.
"""

from __future__ import annotations

import functools
import os
import queue
import subprocess
import sys
import threading
from dataclasses import dataclass
from functools import partial
from pathlib import Path

LIMIT = 12  # seconds


@dataclass(frozen=True)
class Job:
    """kind: "plain", "norm" or "gelu" (unsigned) for x [m, k], with a rank other than 32 behind it; "expand" or "sums"
    (unsigned) for a weight [m, k] · options: a Cut's, or the shape for expand_w4_to_int8; none: what is chosen."""

    kind: str
    m: int
    k: int
    options: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.kind:6} {self.m:5} x {self.k:5}"

    @property
    def expands(self) -> bool:
        return self.kind in ("expand", "sums")


def cuts(kind: str, m: int, k: int, *options: tuple) -> list[Job]:
    return [Job(kind, m, k, option) for option in options]


def all_jobs() -> list[Job]:
    shapes = ((), (4, 4, 3), (4, 2, 2), (8, 4, 2), (8, 8, 2))
    return [
        *cuts("expand", 9216, 3072, *shapes),
        *cuts("sums", 3072, 12288, *shapes),
        *cuts("expand", 3072, 3072, *shapes),
        *cuts("expand", 12288, 3072, *shapes),
        *cuts("plain", 4608, 3072, (), (4, 4, 1, 16), (2, 0), (4, 4, 2)),
        *cuts("norm", 4608, 3072, (), (4, 4, 1, 16), (2, 0), (4, 4, 2)),
        *cuts("plain0", 4608, 3072, ()),
        *cuts("norm0", 4608, 3072, ()),
        *cuts("norm64", 4608, 3072, (), (2, 0), (4, 4, 2)),
        *cuts("norm", 4096, 3072, (), (4, 0), (4, 4)),
        *cuts("norm", 512, 3072, (), (0, 4), (1, 0), (1, 0, 2), (2, 0, 4)),
        *cuts("plain", 1536, 3072, (), (1, 4), (3, 0, 2), (4, 4, 3)),
        *cuts("gelu", 4608, 12288, (), (4, 4, 4), (4, 4, 8), (4, 4, 4, 16), (4, 4, 16, 4)),
        *cuts("gelu0", 4608, 12288, ()),
        *cuts("gelu", 512, 12288, (), (2, 0, 4), (4, 0, 8), (1, 0, 2)),
    ]


def cut_of(job: Job):
    from svdq.kernels.quantize_int8 import Cut

    return Cut(*job.options) if job.options else None


def split_kind(kind: str) -> tuple[str, int]:
    """("norm", 64) of "norm64"."""
    name = kind.rstrip("0123456789")
    return name, int(kind[len(name) :] or 32)


def shape_of(job: Job) -> dict[str, tuple[int, ...]]:
    return {"shape": job.options} if job.options else {}


@functools.lru_cache(1)
def weight_of(n: int, k: int, rank: int, unsigned: bool):
    import torch

    from svdq.kernels.int4 import W4A4

    g = torch.Generator(device="cuda").manual_seed(n + k)
    return W4A4(
        q=torch.randint(-8, 8, (n, k), generator=g, device="cuda").to(torch.int8),
        wscales=(torch.rand(n, k // 64, generator=g, device="cuda") * 0.02 + 0.001).bfloat16(),
        smooth_factor=(torch.rand(k, generator=g, device="cuda") + 0.5).bfloat16(),
        proj_down=(torch.randn(rank, k, generator=g, device="cuda") * k**-0.5).bfloat16(),
        proj_up=torch.zeros(n, rank, device="cuda").bfloat16(),
        act_unsigned=unsigned,
    )


@functools.lru_cache(1)
def operands(kind: str, m: int, k: int):
    """(packed layer, its proj_down for the kernel, x, modulation, what the reference makes of it)."""
    import torch

    from svdq.kernels import reference
    from svdq.kernels.low_rank import natural_factors

    kind, rank = split_kind(kind)
    layer = weight_of(128, k, rank, kind == "gelu")
    g = torch.Generator(device="cuda").manual_seed(m)
    x = torch.randn(m, k, generator=g, device="cuda") * 2 + 0.5
    x[:, 7] *= 40
    x = reference.gelu(x.bfloat16()) if kind == "gelu" else x.bfloat16()
    x[m // 2] = 0
    modulation = ()
    plain = x
    if kind == "norm":
        modulation = tuple(torch.randn(1, k, generator=g, device="cuda").bfloat16() for _ in range(2))
        plain = reference.layer_norm_modulate(x, *modulation)
    expected = reference.quantize_act_int8(plain, layer.smooth_factor, layer.proj_down, kind == "gelu")
    packed = layer.pack()
    return packed, natural_factors(packed)[0], x, modulation, expected


def check(got, again, expected) -> str:
    import torch

    problems = [] if all(torch.equal(a, b) for a, b in zip(got, again, strict=True)) else ["TWO RUNS DIFFER"]
    steps = (got[0].int() - expected[0].int()).abs()
    if steps.max() > 2 or (steps > 0).float().mean() > 2e-3:
        problems.append(f"CODES {(steps > 0).float().mean():.1e} differ by up to {steps.max()}")
    if not (got[1] - expected[1]).norm() <= 1e-3 * expected[1].norm():
        problems.append("SCALES")
    if got[2].numel() and not (got[2].float() - expected[2]).norm() <= 3e-3 * expected[2].norm():
        problems.append("LORA_ACT")
    return ", ".join(problems) or "right"


def measured(job: Job, card, copy: float) -> str:
    import torch

    from svdq.benchmarks import measure
    from svdq.kernels import reference
    from svdq.kernels.quantize_int8 import quantize_act_int8
    from svdq.kernels.weights_int8 import expand_w4_to_int8

    if job.expands:
        layer = weight_of(job.m, job.k, 16, job.kind == "sums")
        packed = layer.pack()
        moved = 1.5 * job.m * job.k + 2 * layer.wscales.numel()
        got = expand_w4_to_int8(packed, **shape_of(job))
        q, scales, sums = reference.expand_w4_to_int8(layer)
        right = torch.equal(got.q, q) and torch.equal(got.scales, scales)
        right &= job.kind == "expand" or torch.equal(got.sums, sums)
        problems = "right" if right else f"WRONG {(got.q != q).sum().item()}"
        calls = [
            partial(expand_w4_to_int8, layer.pack(), expand_w4_to_int8(packed), **shape_of(job))
            for _ in measure.rotating(int, int(moved), card)
        ]
    else:
        packed, down, x, modulation, expected = operands(job.kind, job.m, job.k)
        moved = 3 * x.numel()
        call = partial(quantize_act_int8, weight=packed, proj_down=down, cut=cut_of(job))
        if modulation:
            call = partial(call, scale=modulation[0], shift=modulation[1])
        problems = check(call(x), call(x), expected)
        calls = [partial(call, y) for y in measure.rotating(x.clone, int(moved), card)]
    timing = measure.time_calls(calls, 0.05)
    return f"{timing.us:7.2f} us {100 * moved / timing.us / 1e3 / copy:3.0f} %  {problems}"


def measure_from(start: int, word: str) -> None:
    import torch

    from svdq.benchmarks import measure

    card = measure.this_card()
    copy = measure.copy_gbs(card)
    print(f"-1 {card.name}: copy {copy:.0f} GB/s", flush=True)
    for i, job in enumerate(all_jobs()):
        if i < start or word not in job.name:
            continue
        try:
            result = measured(job, card, copy)
        except Exception as error:  # costs its own line only
            result = f"{type(error).__name__}: {' '.join(str(error).split())[:40]}"
        print(f"{i} {result}", flush=True)
        torch.cuda.synchronize()  # after a fault on the GPU this raises: the next process goes on


def compile_share(index: int, count: int, word: str) -> None:
    """Every ``count``-th kernel into Triton's cache on disk."""
    import torch

    from svdq.kernels import quantize_int8, weights_int8

    class Warm:
        def __init__(self, kernel) -> None:
            self.kernel = kernel

        def __getitem__(self, grid):
            return partial(self.kernel.warmup, grid=grid)

    quantize_int8.quantize_int8_kernel = Warm(quantize_int8.quantize_int8_kernel)
    weights_int8.expand_kernel = Warm(weights_int8.expand_kernel)
    for job in [job for job in all_jobs() if word in job.name][index::count]:
        try:
            if job.expands:
                layer = weight_of(128, job.k, 16, job.kind == "sums")
                weights_int8.expand_w4_to_int8(layer.pack(), **shape_of(job))
                continue
            kind, rank = split_kind(job.kind)
            layer = weight_of(128, job.k, rank, kind == "gelu")
            x = torch.empty(job.m, job.k, dtype=torch.bfloat16, device="cuda")
            modulation = (x[:1], x[:1]) if kind == "norm" else ()
            quantize_int8.quantize_act_int8(x, layer.pack(), layer.proj_down, *modulation, cut=cut_of(job))
        except Exception as error:
            print(f"{job.name} {job.options}: {error}"[:200], flush=True)


def main() -> None:
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    jobs = all_jobs()
    count = min(16, os.cpu_count() or 1)
    compilers = [
        subprocess.Popen([sys.executable, __file__, "--compile", str(i), str(count), word]) for i in range(count)
    ]
    for compiler in compilers:
        compiler.wait()
    start, failures = 0, 0
    while start < len(jobs) and failures < 4:
        worker = subprocess.Popen(
            [sys.executable, __file__, "--measure", str(start), word], stdout=subprocess.PIPE, text=True
        )
        lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=lambda p=worker, q=lines: [*map(q.put, p.stdout), q.put("")], daemon=True).start()
        while True:
            try:
                line = lines.get(timeout=LIMIT)
            except queue.Empty:
                worker.kill()
                start = next((i for i in range(start, len(jobs)) if word in jobs[i].name), start)
                print(f"{jobs[start].name} {jobs[start].options} HANGS", flush=True)
                start, failures = start + 1, failures + 1
                break
            if not line:
                start, failures = (len(jobs), failures) if worker.wait() == 0 else (start, failures + 1)
                break
            i, result = line.strip().split(" ", 1)
            if int(i) < 0:
                print(result, flush=True)
                continue
            start = int(i) + 1
            options = " ".join(map(str, jobs[int(i)].options)) or "chosen"
            print(f"{jobs[int(i)].name} {options:14} {result}", flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    import conftest  # noqa: F401  makes the clone importable as svdq

    if sys.argv[1:2] == ["--compile"]:
        compile_share(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
    elif sys.argv[1:2] == ["--measure"]:
        measure_from(int(sys.argv[2]), sys.argv[3])
    else:
        main()
