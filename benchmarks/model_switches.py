"""Two checkpoints in turns in one ComfyUI process: what stays behind, and whether ComfyUI knows how large they are.

    python benchmarks/model_switches.py COMFYUI FILE FILE [--switches 20] [--size 1024] [--stock] [-- ComfyUI's options]

--stock: with ComfyUI's own loader, for files that it reads (twice the same will do): what the rest leaves behind.
Prints one line "ROW {json}": switch_s (median: open, load, one step) · size_percent (largest difference between the
size that ComfyUI counts as loaded and what loading takes of the GPU; None without one, and with dynamic VRAM, which has
pages) · ram_mb, file_mb, vram_mb, torch_mb (after each switch: of the process, of mapped files in it, of the GPU, of
torch's allocator) · ram_growth_mb, vram_growth_mb (from the first half of the warm switches to the second).
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from typing import Any

import process_memory
from comfyui_process import finish_node, start_comfyui
from full_size import register_package

WARM = 6  # switches; by then kernels are compiled and allocators have what they keep
MB = 1e6


def main(args: argparse.Namespace, options: list[str]) -> None:
    register_package()
    dynamic = start_comfyui(args.comfyui, options)
    import comfy.model_management as management
    import comfy.sd
    import torch

    from svdq.model import load_flux

    load = comfy.sd.load_diffusion_model if args.stock else load_flux
    on_gpu = management.get_torch_device().type == "cuda"
    if not on_gpu:
        torch.set_num_threads(1)  # each has an arena of its own, which comes and goes
    seconds: list[float] = []
    differences: list[float] = []
    seen: dict[str, list[float]] = {"ram_mb": [], "file_mb": [], "vram_mb": [], "torch_mb": []}
    for number in range(args.switches):
        start = time.perf_counter()
        with torch.inference_mode():
            patcher = load(args.files[number % 2])
            if on_gpu and not dynamic:
                management.unload_all_models()  # or the difference would be that of two models
                before = torch.cuda.memory_allocated()
                management.load_models_gpu([patcher])
                taken = torch.cuda.memory_allocated() - before
                differences.append(100 * abs(patcher.loaded_size() / taken - 1))
            step(patcher, args.size)
        finish_node()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        print(f"{number + 1} of {args.switches}: {seconds[-1]:.1f} s", file=sys.stderr, flush=True)
        del patcher
        gc.collect()
        management.cleanup_models_gc()
        management.soft_empty_cache()
        for name, value in memory(on_gpu).items():
            seen[name].append(round(value / MB, 1))
    row = {
        "switches": args.switches,
        "switch_s": round(statistics.median(seconds[WARM:]), 2),
        "size_percent": round(max(differences), 2) if differences else None,
        "ram_growth_mb": growth(seen["ram_mb"]),
        "vram_growth_mb": growth(seen["vram_mb"]) if on_gpu else None,
    }
    print("ROW " + json.dumps(row | seen), flush=True)


def step(patcher: Any, size: int) -> None:
    """One step of the model, loaded with room for its activations."""
    import comfy.model_management as management
    from flux import inputs

    management.load_models_gpu([patcher], memory_required=patcher.memory_required([1, 16, size // 8, size // 8]))
    patcher.model.diffusion_model(**inputs(patcher, size, 1))


def memory(on_gpu: bool) -> dict[str, float]:
    """Bytes by what is printed of them; RAM as Linux counts it."""
    import torch

    ram, file = process_memory.ram()
    free, total = torch.cuda.mem_get_info() if on_gpu else (0, 0)
    return {
        "ram_mb": ram,
        "file_mb": file,
        "vram_mb": total - free,
        "torch_mb": torch.cuda.memory_allocated() if on_gpu else 0,
    }


def growth(values: list[float]) -> float:
    """From the first half of the warm switches to the second, medians; each half has as many of both checkpoints."""
    warm = values[WARM:]
    return process_memory.growth(warm, len(warm) // 4 * 2)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("comfyui")
    parser.add_argument("files", nargs=2)
    parser.add_argument("--switches", type=int, default=20, help=f"an even number, at least {WARM + 4}")
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--stock", action="store_true", help="ComfyUI's own loader instead of this pack's")
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    main(parser.parse_args(sys.argv[1:split]), sys.argv[split + 1 :])
