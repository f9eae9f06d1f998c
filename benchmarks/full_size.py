"""A full-size FLUX.1 checkpoint, once through everything, on one GPU: `python benchmarks/full_size.py COMFYUI FOLDER`.

Writes a synthetic 12B checkpoint and its dequantized 16-bit twin into FOLDER (30 GB), loads both into ComfyUI, runs one
1024 x 1024 forward pass of each and prints one table: times, sizes, and the distance of the two outputs. Runs the
checkpoint in INT4 arithmetic as well, by the kernels (emulated where the GPU has no INT4) and by PyTorch.

The yardstick is bf16 itself: the dequantized model computed in float32. Two bf16 computations of the same model are
each as far from it, so about sqrt(2) times as far from each other. Exit code 1 if ours and the twin are further apart,
or the INT4 kernels and PyTorch.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOKENS = 512
LATENT = 128  # 1024 pixels


def register_package() -> None:
    """Make the clone importable as ``svdq``."""
    package = types.ModuleType("svdq")
    package.__path__ = [str(ROOT)]
    sys.modules["svdq"] = package


def timed(action: Callable[[], object]) -> tuple[object, float]:
    """(result, seconds), the GPU's work included."""
    import torch

    torch.cuda.synchronize()
    start = time.perf_counter()
    result = action()
    torch.cuda.synchronize()
    return result, time.perf_counter() - start


def read_seconds(path: Path) -> float:
    """Seconds to read a file from start to end; its pages are in the cache afterwards."""
    buffer, start = bytearray(64 * 1024 * 1024), time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return time.perf_counter() - start


def main(comfyui: str, folder: Path) -> int:
    sys.path.insert(0, comfyui)
    sys.argv = ["main.py", "--disable-dynamic-vram"]
    register_package()
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.model_management as management
    import comfy.sd
    import torch

    from svdq.cli.dequantize import dequantize
    from svdq.cli.synth import synth
    from svdq.model import load_flux

    folder.mkdir(parents=True, exist_ok=True)
    quantized, dense = folder / "svdq-int4_r32-synth.safetensors", folder / "synth-bf16.safetensors"
    rows: dict[str, float] = {}
    start = time.perf_counter()
    rows["synth s"] = 0.0 if quantized.exists() else (synth(quantized, scale="full"), time.perf_counter() - start)[1]
    start = time.perf_counter()
    rows["dequantize s"] = 0.0 if dense.exists() else (dequantize(quantized, dense), time.perf_counter() - start)[1]
    rows["file GB"] = quantized.stat().st_size / 1e9

    generator = torch.Generator().manual_seed(0)
    arguments = {
        "x": torch.randn(1, 16, LATENT, LATENT, generator=generator),
        "timestep": torch.tensor([0.7]),
        "context": torch.randn(1, TOKENS, 4096, generator=generator),
        "y": torch.randn(1, 768, generator=generator),
        "guidance": torch.tensor([3.5]),
    }
    arguments = {
        name: value.to("cuda", torch.float32 if name == "timestep" else torch.bfloat16)
        for name, value in arguments.items()
    }

    def step(patcher) -> torch.Tensor:
        with torch.inference_mode():
            return patcher.model.diffusion_model(**arguments)  # the arguments of the moment: bf16, then float32

    def run(name: str, load: Callable[[], object], steps: int = 5) -> torch.Tensor:
        before = torch.cuda.memory_allocated()
        patcher, rows[f"{name}: open s"] = timed(load)
        _, rows[f"{name}: to GPU s"] = timed(lambda: management.load_models_gpu([patcher]))
        rows[f"{name}: weights GiB"] = (torch.cuda.memory_allocated() - before) / 2**30
        rows[f"{name}: ComfyUI's figure GiB"] = patcher.model_size() / 2**30
        torch.cuda.reset_peak_memory_stats()
        first, rows[f"{name}: first step s"] = timed(lambda: step(patcher))
        rows[f"{name}: peak of a step GiB"] = (torch.cuda.max_memory_allocated() - before) / 2**30
        outs, seconds = zip(*(timed(lambda: step(patcher)) for _ in range(steps)), strict=True)
        rows[f"{name}: step ms, median of {steps}"] = statistics.median(seconds) * 1e3
        same = sum(torch.equal(out, outs[-1]) for out in (first, *outs))
        rows[f"{name}: steps with the bits of the last, of {steps + 1}"] = same
        management.unload_all_models()
        return outs[-1].double()

    rows["read the INT4 file s"] = read_seconds(quantized)
    rows["read it again s"] = read_seconds(quantized)
    ours = run("16bit mode", lambda: load_flux(str(quantized), "16bit"))
    torch.cuda.empty_cache()
    os.environ["SVDQ_BACKEND"] = "int4"
    kernels = run("int4 kernels", lambda: load_flux(str(quantized)), steps=2)
    os.environ["SVDQ_BACKEND"] = "int4-reference"
    reference = run("int4 in PyTorch", lambda: load_flux(str(quantized)), steps=1)
    del os.environ["SVDQ_BACKEND"]
    torch.cuda.empty_cache()
    twin = run("dequantized", lambda: comfy.sd.load_diffusion_model(str(dense), {"dtype": torch.bfloat16}))
    torch.cuda.empty_cache()
    arguments = {name: value.float() for name, value in arguments.items()}
    exact = run("float32", lambda: comfy.sd.load_diffusion_model(str(dense), {"dtype": torch.float32}))

    def distance(a: torch.Tensor, b: torch.Tensor) -> float:
        return ((a - b).norm() / exact.norm()).item()

    rows["distance 16bit mode - dequantized"] = distance(ours, twin)
    rows["distance 16bit mode - float32"] = distance(ours, exact)
    rows["distance dequantized - float32"] = distance(twin, exact)
    rows["distance int4 kernels - int4 in PyTorch"] = distance(kernels, reference)
    rows["distance int4 kernels - float32"] = distance(kernels, exact)
    rows["output standard deviation"] = exact.std().item()
    equal, steps = compare_weights(quantized, dense)
    rows["weights equal to the file's"], rows["largest weight difference, bf16 steps"] = equal, steps

    for name, value in rows.items():
        print(f"{name:<40} {value:.6g}")
    print(json.dumps(rows))
    limit = 1.5 * rows["distance dequantized - float32"]
    pairs = ("16bit mode - dequantized", "int4 kernels - int4 in PyTorch")
    return 0 if all(rows[f"distance {pair}"] <= limit for pair in pairs) else 1


def compare_weights(quantized: Path, dense: Path) -> tuple[float, float]:
    """Weights dequantized on the GPU beside those in the dequantized file, all layers.

    Returns (share of equal elements, largest difference in units of the last place of bf16).
    """
    import torch
    from safetensors import safe_open

    from svdq.loaders import PlainLayer, open_checkpoint
    from svdq.model.layout_svdq import dequantize, quantized_weight

    equal = total = largest = 0
    with safe_open(dense, framework="pt") as file:
        for name, layer in open_checkpoint(quantized).layers():
            if isinstance(layer, PlainLayer):
                continue
            ours = dequantize(quantized_weight(layer, torch.bfloat16).to("cuda"), torch.bfloat16)[0]
            theirs = file.get_tensor(f"{name}.weight").cuda()
            steps = (ours.view(torch.int16).int() - theirs.view(torch.int16).int()).abs()
            near_zero = torch.maximum(ours.abs(), theirs.abs()) < 1e-6  # where the two signs have distant bit patterns
            largest = max(largest, steps.masked_fill(near_zero, 0).max().item())
            equal, total = equal + (ours == theirs).sum().item(), total + ours.numel()
    return equal / total, largest


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(f"usage: {sys.argv[0]} COMFYUI FOLDER")
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
