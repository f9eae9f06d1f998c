"""Cuts of the quantize kernel's work, checked and timed on this GPU: `python3 benchmarks/quantize_variants.py`.

One line for each shape and cut: time of a call in a CUDA graph of calls on inputs beyond the L2 cache, and the share of
the bandwidth of a copy in the same run. About a minute; the kernels are compiled by processes side by side, and timed
in a process of their own: one that hangs or fails costs its line.
"""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import conftest  # noqa: F401  makes the clone importable as svdq
import torch
from test_quantize import random_layer, to_gpu

from svdq.benchmarks import measure
from svdq.kernels import reference
from svdq.kernels.act_layout import unpack_act, unpack_ascales
from svdq.kernels.quantize import Cut, Modulation, choose_cut, quantize_act

M = 4608


@dataclass(frozen=True)
class Case:
    """M x K, rank, kind: "s4", "u4" or "norm"; cuts: None is the one that quantize_act chooses."""

    m: int
    k: int
    rank: int
    cuts: tuple[Cut | None, ...]
    kind: str = "s4"


CASES = (
    Case(M, 3072, 32, (None, Cut(8, 1, 7, 8), Cut(4, 1, 7, 4), Cut(4, 1, 4, 4), Cut(4, 2, 3, 4), Cut(2, 4, 1, 8))),
    Case(M, 12288, 32, (None, Cut(8, 1, 14, 4), Cut(4, 2, 3, 8))),
    Case(M, 12288, 32, (None,), "u4"),
    Case(M, 3072, 0, (None, Cut(4, 1, 7, 4))),
    Case(M, 3072, 32, (None, Cut(4, 1, 7, 4)), "norm"),
    Case(512, 3072, 32, (None, Cut(8, 1, 16, 4), Cut(4, 2, 12), Cut(2, 4, 6))),
    Case(512, 12288, 32, (None, Cut(8, 1, 16, 4), Cut(4, 2, 16))),
)
JOBS = [(case, cut) for case in CASES for cut in case.cuts]
COMPILE_SECONDS, START_SECONDS, HANG_SECONDS = 60, 40, 12
NOTE = "# "  # how lines start that are not a job's


def layer_of(case: Case):
    return random_layer(case.k, case.rank, torch.bfloat16, case.kind == "u4")


def input_of(m: int, k: int, unsigned: bool, seed: int = 0) -> torch.Tensor:
    x = torch.randn(m, k, generator=torch.Generator("cuda").manual_seed(seed), device="cuda") * 2
    x[:, 7] *= 40
    x = reference.gelu(x.bfloat16()) if unsigned else x.bfloat16()
    if m > 1:
        x[m // 2] = 0
    return x


def modulation_of(case: Case) -> Modulation | None:
    if case.kind != "norm":
        return None
    generator = torch.Generator("cuda").manual_seed(1)
    scale, shift = (torch.randn(1, case.k, generator=generator, device="cuda").mul(0.3).bfloat16() for _ in range(2))
    return Modulation(scale, shift)


def check(case: Case, cut: Cut | None, m: int) -> str:
    """Compare with the reference, and with a second run. Returns what differs, or nothing."""
    layer, norm = layer_of(case), modulation_of(case)
    weight = to_gpu(layer.pack())
    x = input_of(m, case.k, layer.act_unsigned, m)
    got, again = (quantize_act(x, weight, norm, cut) for _ in range(2))
    natural, second = (
        (unpack_act(codes, m, layer.act_unsigned), unpack_ascales(ascales, m), lora_act)
        for codes, ascales, lora_act in (got, again)
    )
    problems = [] if all(torch.equal(a, b) for a, b in zip(natural, second, strict=True)) else ["two runs differ"]
    if norm is not None:
        x = reference.layer_norm_modulate(x, norm.scale, norm.shift)
    smooth, down = layer.smooth_factor.cuda(), layer.proj_down.cuda()
    codes, ascales, _ = reference.quantize_act(x, smooth, down, layer.act_unsigned)
    steps = (natural[0].int() - codes.int()).abs()
    if steps.max() > 1 or (steps > 0).float().mean() > 1e-3 + 3 / steps.numel():
        problems.append(f"codes: {(steps > 0).float().mean():.1e} differ, by up to {steps.max()}")
    steps = (natural[1].view(torch.int16).int() - ascales.view(torch.int16).int()).abs()
    if steps.max() > (1 if norm is None else 2) or (steps > 0).float().mean() > 1e-3 + 3 / steps.numel():
        problems.append(f"scales: {(steps > 0).float().mean():.1e} differ, by up to {steps.max()}")
    if case.rank:
        exact = x.double() @ down.double().t()
        error = ((natural[2].double() - exact).norm() / exact.norm()).item()
        if not error < (1e-5 if norm is None else 1e-4):
            problems.append(f"lora_act: {error:.1e}")
    return ", ".join(problems)


def compile_share(index: int, count: int) -> None:
    """Run every ``count``-th kernel once, which leaves it in Triton's cache on disk."""
    for case, cut in JOBS[index::count]:
        with suppress(Exception):  # the timing will say it
            quantize_act(input_of(case.m, case.k, False), to_gpu(layer_of(case).pack()), modulation_of(case), cut)


def compile_all(count: int) -> None:
    command = [sys.executable, __file__, "--compile"]
    processes = [subprocess.Popen([*command, str(i), str(count)]) for i in range(count)]
    end = time.monotonic() + COMPILE_SECONDS
    for process in processes:
        try:
            process.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()


def time_jobs(first: int) -> None:
    """Print a line for each job from ``first`` on, and one before each case's first."""
    card = measure.this_card()
    copy = measure.copy_gbs(card)
    case = None
    for of, cut in JOBS[first:]:
        try:
            if of is not case:
                case, weight, norm = of, to_gpu(layer_of(of).pack()), modulation_of(of)
                make = partial(input_of, of.m, of.k, of.kind == "u4")
                inputs = measure.rotating(make, 2 * of.m * of.k, card)
                outputs = quantize_act(inputs[0], weight, norm)
                factors = (weight.smooth_factor, *([weight.proj_down] if of.rank else []))
                moved = sum(t.nbytes for t in (inputs[0], *factors, *outputs))
                print(f"{NOTE}{card.name}: copy {copy:.0f} GB/s; {_same_bytes_copied(moved, card)}", flush=True)
            print(_line(of, cut, weight, norm, inputs, moved, copy)[:120], flush=True)
        except Exception as error:
            print(f"{of.m} x {of.k} {cut}: {type(error).__name__} {error}".replace("\n", " ")[:120], flush=True)


def _same_bytes_copied(moved: int, card: measure.Card) -> str:
    """What a kernel as short as ours can reach: its start and its end are in this time too."""
    sources = measure.rotating(lambda: torch.zeros(moved // 8, device="cuda"), moved // 2, card)
    calls = [partial(torch.neg, source, out=torch.empty_like(source)) for source in sources]
    return f"a copy of {moved / 1e6:.1f} MB {measure.time_calls(calls, 0.05).us:.2f} us"


def _line(case: Case, cut: Cut | None, weight, norm, inputs: list[torch.Tensor], moved: int, copy: float) -> str:
    timing = measure.time_calls([partial(quantize_act, x, weight, norm, cut) for x in inputs], 0.1)
    tiles, ranks = -(-case.m // 64) * 4, 1 << (case.rank // 16 - 1).bit_length() if case.rank else 0
    multiprocessors = torch.cuda.get_device_properties("cuda").multi_processor_count
    c = cut or choose_cut(tiles, case.k // 64, ranks, multiprocessors)
    name = f"{c.warps_m:2} x {c.warps_k} warps, {c.pieces:2} pieces, {c.staged:2} staged"
    share = 100 * moved / timing.us / 1e3 / copy
    times = f"{timing.us:6.2f} us ({timing.low_us:.2f}-{timing.high_us:.2f}) {share:3.0f} %"
    rows = (1, 63, 4685) if case.m == M else (case.m,)
    problems = "; ".join(f"M {m}: {problem}" for m in rows if (problem := check(case, cut, m)))
    chosen = "" if cut else " chosen"
    return f"{case.m:4} x {case.k:5} r{case.rank:2} {case.kind:4} {name} {times}{chosen} {problems}"


def main() -> None:
    start = time.monotonic()
    compile_all(min(16, os.cpu_count() or 1))
    print(f"compiled in {time.monotonic() - start:.0f} s", flush=True)
    done = 0
    while done < len(JOBS):
        finished, why = time_in_process(done)
        done += finished
        if done < len(JOBS):
            print(f"{why}: {JOBS[done]}"[:120], flush=True)
            done += 1
    print(f"{time.monotonic() - start:.0f} s")


def time_in_process(first: int) -> tuple[int, str]:
    """Pass on what a process prints about the jobs from ``first`` on. Returns (jobs finished, how it ended)."""
    process = subprocess.Popen([sys.executable, __file__, "--time", str(first)], stdout=subprocess.PIPE, text=True)
    lines: queue.Queue[str] = queue.Queue()
    threading.Thread(target=lambda: [*map(lines.put, process.stdout), lines.put("")], daemon=True).start()
    finished, limit = 0, START_SECONDS
    try:
        while line := lines.get(timeout=limit):
            print(line, end="", flush=True)
            finished, limit = finished + (not line.startswith(NOTE)), HANG_SECONDS
        return finished, "ended"
    except queue.Empty:
        return finished, "hangs"
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--compile"]:
        compile_share(int(sys.argv[2]), int(sys.argv[3]))
    elif sys.argv[1:2] == ["--time"]:
        time_jobs(int(sys.argv[2]))
    else:
        main()
