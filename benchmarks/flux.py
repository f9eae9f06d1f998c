"""One FLUX step inside ComfyUI, ours and other ways beside it: what ``python3 . bench flux`` runs, as one process.

    python benchmarks/flux.py COMFYUI FILE [--sizes 1024,512] [--batch 1] [--peers bf16,ours] [-- ComfyUI's options]

FILE is an SVDQuant checkpoint. Prints one line "ROW {json}" for each peer and size. Measured in torch.inference_mode(),
as ComfyUI runs; times are medians.

A row: wall_ms (the step, waited for; spread_ms from fastest to slowest) · host_ms (until Python has started all of it)
· loop_ms (a step of ten, waited for at the end, as a sampler runs them) · gpu_ms (sum of the kernels of a step of three
such) · kernels · product_ms and so on (by kind of kernel) · longest (name, ms, count) ·
weights_gib, peak_gib (allocated) · load_s (open and move to the GPU) · first_s (first step at this size) · distance
(from bf16, relative) · same_bits (of all steps) · kitchen (comfy_kitchen's kernels: without cuda, rows of ComfyUI's own
formats, bf16 too, take longer) · add_s and so on (see measure_lora) · failed (why there is no row).
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import re
import statistics
import sys
import time
from collections import defaultdict

from comfyui_process import start_comfyui
from full_size import TOKENS, register_package

STEPS, PROFILED, ROUNDS = 10, 3, 7
PARTS = (  # kind, kernels whose names match; the first that does
    ("attention", r"attention|sdpa|fmha|flash"),
    ("product", r"gemm|gemv|nvjet|cutlass|xmma|matmul|linear|splitKreduce"),
    ("quantize", r"quantize|act_quant"),
    ("expand", r"expand|dequant"),
)


def main(args: argparse.Namespace, options: list[str]) -> None:
    register_package()
    start_comfyui(args.comfyui, options)
    from flux_peers import PEERS

    reference: dict[int, object] = {}
    for name in args.peers.split(","):
        try:
            rows = measure_peer(PEERS[name], args, reference, keep=name == "bf16")
        except Exception as error:  # another peer's failure is a row
            rows = [{"failed": f"{type(error).__name__}: {error}".split("\n")[0][:300]}]
        for row in rows:
            print("ROW " + json.dumps({"peer": name, "label": PEERS[name].label, **row}), flush=True)


def measure_peer(peer, args: argparse.Namespace, reference: dict, keep: bool) -> list[dict]:
    """Its rows; reference: outputs by size to compare with, which ``keep`` fills."""
    import comfy.model_management as management
    import torch
    from flux_peers import become, kitchen, without_low_rank

    from svdq.model import load_flux

    if peer.needs and importlib.util.find_spec(peer.needs) is None:
        raise RuntimeError(f"{peer.needs} is not installed")
    if peer.kernels and torch.cuda.is_available() and "cuda" not in kitchen():
        raise RuntimeError(f"comfy_kitchen has no kernels for CUDA here, only {kitchen()}")
    before, start = allocated(), time.perf_counter()
    patcher = load_flux(args.file, "auto" if peer.linear is None else "16bit", peer.weights)
    management.load_models_gpu([patcher])
    synchronize()
    load_s = time.perf_counter() - start
    rows = []
    try:
        options = become(peer, patcher.model.diffusion_model)
        weights, loaded = allocated() - before, patcher.loaded_size()
        for size in map(int, args.sizes.split(",")):
            with without_low_rank(peer), torch.inference_mode():
                row, out = measure(patcher, size, args.batch, options)
                if peer.lora:
                    row |= measure_lora(patcher, size, args.batch)
            if keep:
                reference[size] = out
            elif size in reference and not peer.rank0:
                row["distance"] = round(((out - reference[size]).norm() / reference[size].norm()).item(), 4)
            # What is kept of weights is made in the first step.
            kept = patcher.loaded_size() - loaded if peer.weights != "int4" else 0
            gib = round((weights + kept) / 2**30, 2)
            rows.append({"kitchen": kitchen(), "weights_gib": gib, "load_s": round(load_s, 2), **row})
    finally:
        management.unload_all_models()
        del patcher
        gc.collect()
        management.soft_empty_cache()
        if peer.compiled:
            torch._dynamo.reset()
    return rows


def measure_lora(patcher, size: int, batch: int) -> dict:
    """A LoRA of rank 16 on every quantized linear, through ComfyUI's own functions: seconds that adding it, another
    strength and removing it take (add_s, strength_s, remove_s), and a step with it (lora_ms, and lora_ in front of what
    :func:`profile` gives). lora_percent, lora_loop_percent: what it adds to a step and to the loop, by medians of
    rounds with and without it in turns, because clocks drift.

    A change is loading the model with it and three steps, after which all graphs are as they will be, less the same
    without a change.
    """
    import comfy.model_management as management
    import comfy.sd
    import torch
    from flux_peers import random_lora

    lora, values = random_lora(patcher.model.diffusion_model, rank=16), inputs(patcher, size, batch)

    def step(model) -> float:
        start = time.perf_counter()
        model.model.diffusion_model(**values)
        synchronize()
        return time.perf_counter() - start

    def run(make) -> tuple[float, object]:
        synchronize()
        start = time.perf_counter()
        model = make()
        management.load_models_gpu([model])
        for _ in range(3):
            step(model)
        return time.perf_counter() - start, model

    def steps(model) -> tuple[float, float]:
        """Seconds of a step that is waited for, the median, and of a step of a loop."""
        run(lambda: model)
        waited = statistics.median(step(model) for _ in range(STEPS))
        start = time.perf_counter()
        for _ in range(STEPS):
            model.model.diffusion_model(**values)
        synchronize()
        return waited, (time.perf_counter() - start) / STEPS

    def settled(model) -> float:
        return statistics.median(run(lambda: model)[0] for _ in range(3))

    def with_lora(strength: float):
        return comfy.sd.load_lora_for_models(patcher, None, lora, strength, 0)[0]

    plain = settled(patcher)
    added, patched = run(lambda: with_lora(1.0))
    later = settled(patched)
    in_turns = [(steps(patcher), steps(patched)) for _ in range(ROUNDS if torch.cuda.is_available() else 1)]
    lora_ms = statistics.median(of_lora[0] for _, of_lora in in_turns) * 1e3
    percent, loop_percent = (
        round(100 * (statistics.median(of_lora[i] / of_plain[i] for of_plain, of_lora in in_turns) - 1), 2)
        for i in range(2)
    )
    flux = patcher.model.diffusion_model
    gpu = profile(lambda: flux(**values)) if torch.cuda.is_available() else {}
    changed, stronger = run(lambda: with_lora(0.5))
    removed, _ = run(lambda: patcher)
    del patched, stronger
    torch.cuda.empty_cache() if torch.cuda.is_available() else None
    seconds = {"add_s": added - later, "strength_s": changed - later, "remove_s": removed - plain}
    row = {name: round(value, 3) for name, value in seconds.items()} | {"lora_ms": round(lora_ms, 2)}
    row |= {"lora_percent": percent, "lora_loop_percent": loop_percent}
    return row | {f"lora_{name}": value for name, value in gpu.items()}


def inputs(patcher, size: int, batch: int) -> dict:
    """Arguments of a step on the model's device, in its type; the same for each size."""
    import torch

    generator = torch.Generator().manual_seed(size)
    flux, device, dtype = patcher.model.diffusion_model, patcher.load_device, patcher.model.get_dtype_inference()
    values = {
        "x": torch.randn(batch, 16, size // 8, size // 8, generator=generator),
        "context": torch.randn(batch, TOKENS, flux.params.context_in_dim, generator=generator),
        "y": torch.randn(batch, flux.params.vec_in_dim, generator=generator),
        # ComfyUI multiplies it by 1000 in 16 bits: 3.5 becomes 3504 there and 3500 where torch.compile fuses that.
        "guidance": torch.full((batch,), 4.0),
    }
    values = {name: value.to(device, dtype) for name, value in values.items()}
    return values | {"timestep": torch.full((batch,), 0.7, device=device)}


def measure(patcher, size: int, batch: int, options: dict) -> tuple[dict, object]:
    """(row, output float32 on the CPU) of one size."""
    import torch

    flux, values = patcher.model.diffusion_model, inputs(patcher, size, batch)

    def run() -> object:
        return flux(**values, transformer_options=dict(options))

    def step() -> tuple[float, float, object]:
        """(seconds until Python is through, seconds until the GPU is, output)."""
        synchronize()
        start = time.perf_counter()
        out = run()
        host = time.perf_counter() - start
        synchronize()
        return host, time.perf_counter() - start, out

    first = step()[1]
    later = [step()[1] for _ in range(3)]  # a block starts as a graph from its third call on
    cuda = patcher.load_device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    count = STEPS if later[-1] < 5 else 1
    hosts, walls, outs = zip(*(step() for _ in range(count)), strict=True)
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    row = {
        "size": size,
        "batch": batch,
        "wall_ms": round(statistics.median(walls) * 1e3, 2),
        "spread_ms": round((max(walls) - min(walls)) * 1e3, 2),
        "host_ms": round(statistics.median(hosts) * 1e3, 2),
        "peak_gib": round(peak / 2**30, 2),
        "first_s": round(first, 2),
        "same_bits": sum(torch.equal(out, outs[-1]) for out in outs) == count,
    }
    start = time.perf_counter()
    for _ in range(count):
        run()
    synchronize()
    row["loop_ms"] = round((time.perf_counter() - start) / count * 1e3, 2)
    if cuda:
        row |= profile(run)
    return row, outs[-1].float().cpu()


def profile(step) -> dict:
    """gpu_ms, kernels, parts and the longest kernels of a step, from PROFILED one after the other."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as run:
        for _ in range(PROFILED):
            step()
        synchronize()
    found: dict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
    for event in run.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            ms, count = found[event.name]
            found[event.name] = (ms + event.device_time / 1e3, count + 1)
    found = {name: (ms / PROFILED, round(count / PROFILED)) for name, (ms, count) in found.items()}
    parts: dict[str, float] = defaultdict(float)
    for name, (ms, _) in found.items():
        parts[next((kind for kind, names in PARTS if re.search(names, name, re.IGNORECASE)), "other")] += ms
    longest = sorted(found.items(), key=lambda item: -item[1][0])[:12]
    return {
        "gpu_ms": round(sum(ms for ms, _ in found.values()), 2),
        "kernels": sum(count for _, count in found.values()),
        **{f"{kind}_ms": round(parts[kind], 2) for kind in (*(kind for kind, _ in PARTS), "other")},
        "longest": [[name[:90], round(ms, 2), count] for name, (ms, count) in longest],
    }


def allocated() -> int:
    """Bytes that torch has given out on the GPU."""
    import torch

    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("comfyui")
    parser.add_argument("file")
    parser.add_argument("--sizes", default="1024")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--peers", default="bf16,ours")
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    main(parser.parse_args(sys.argv[1:split]), sys.argv[split + 1 :])
