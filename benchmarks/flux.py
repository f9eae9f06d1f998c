"""One FLUX step inside ComfyUI, ours beside 16-bit weights: `python benchmarks/flux.py COMFYUI FILE [size ...]`.

FILE is a full-size checkpoint (`python3 . synth OUT --scale full`). Prints wall and GPU time of a step (medians),
memory, and the largest kernels. Measured in torch.inference_mode(), as ComfyUI runs.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections import defaultdict

from full_size import TOKENS, register_package


def main(comfyui: str, path: str, sizes: list[int]) -> None:
    sys.path.insert(0, comfyui)
    sys.argv = ["main.py", "--disable-dynamic-vram"]
    register_package()
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.model_management as management
    import torch

    from svdq.model import load_flux
    from svdq.model.ops import QuantizedLinear, is_quantized

    def arguments(size: int, batch: int = 1) -> dict:
        generator = torch.Generator().manual_seed(size)
        values = {
            "x": torch.randn(batch, 16, size // 8, size // 8, generator=generator),
            "timestep": torch.full((batch,), 0.7),
            "context": torch.randn(batch, TOKENS, 4096, generator=generator),
            "y": torch.randn(batch, 768, generator=generator),
            "guidance": torch.full((batch,), 3.5),
        }
        return {k: v.to("cuda", torch.float32 if k == "timestep" else torch.bfloat16) for k, v in values.items()}

    def step(patcher, values) -> torch.Tensor:
        with torch.inference_mode():
            return patcher.model.diffusion_model(**values)

    def measure(name: str, patcher, size: int, batch: int = 1, count: int = 10) -> tuple[dict, torch.Tensor]:
        values = arguments(size, batch)
        start = time.perf_counter()
        step(patcher, values)
        torch.cuda.synchronize()
        first = time.perf_counter() - start
        for _ in range(2):
            step(patcher, values)
        torch.cuda.reset_peak_memory_stats()
        walls, issues = [], []
        for _ in range(count):
            torch.cuda.synchronize()
            start = time.perf_counter()
            out = step(patcher, values)
            issues.append(time.perf_counter() - start)
            torch.cuda.synchronize()
            walls.append(time.perf_counter() - start)
        row = {
            "name": name,
            "size": size,
            "batch": batch,
            "wall_ms": round(statistics.median(walls) * 1e3, 2),
            "spread_ms": round((max(walls) - min(walls)) * 1e3, 2),
            "issue_ms": round(statistics.median(issues) * 1e3, 2),
            "first_s": round(first, 2),
            "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        }
        kernels = profile(patcher, values)
        row["kernel_ms"] = round(sum(ms for ms, _ in kernels.values()), 2)
        row["kernels"] = sum(count for _, count in kernels.values())
        print(json.dumps(row), flush=True)
        for kernel, (ms, count) in sorted(kernels.items(), key=lambda item: -item[1][0])[:14]:
            print(f"    {ms:8.2f} ms {count:5d} x  {kernel[:110]}", flush=True)
        return row, out

    def profile(patcher, values) -> dict[str, tuple[float, int]]:
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as run:
            step(patcher, values)
            torch.cuda.synchronize()
        kernels: dict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
        for event in run.events():
            if event.device_type == torch.autograd.DeviceType.CUDA:
                ms, count = kernels[event.name]
                kernels[event.name] = (ms + event.device_time / 1e3, count + 1)
        return kernels

    outs = {}
    for name, forced in (("int8", None), ("16bit", "16bit")):
        os.environ.pop("SVDQ_BACKEND", None)
        if forced:
            os.environ["SVDQ_BACKEND"] = forced
        start = time.perf_counter()
        patcher = load_flux(path)
        management.load_models_gpu([patcher])
        torch.cuda.synchronize()
        print(f"{name}: load {time.perf_counter() - start:.2f} s, {torch.cuda.memory_allocated() / 2**30:.2f} GiB")
        if name == "16bit":
            # The dense twin: every quantized weight replaced by its dequantized one, on the GPU.
            for module in patcher.model.modules():
                if isinstance(module, QuantizedLinear) and is_quantized(module.weight):
                    with torch.inference_mode():
                        dense, bias = module._dense(module.weight.new_empty(0), module.weight, module.bias, [], [])
                    bias = None if bias is None else torch.nn.Parameter(bias.to(dense.dtype), requires_grad=False)
                    module.weight, module.bias = torch.nn.Parameter(dense, requires_grad=False), bias
            name = "bf16"
        for size in sizes:
            _, outs[name, size] = measure(name, patcher, size)
        management.unload_all_models()
        del patcher
        torch.cuda.empty_cache()
    for size in sizes:
        ours, dense = outs["int8", size].double(), outs["bf16", size].double()
        print(f"{size}: distance int8 - bf16 {((ours - dense).norm() / dense.norm()).item():.4f}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], [int(size) for size in sys.argv[3:]] or [1024])
